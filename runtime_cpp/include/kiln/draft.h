#pragma once
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace kiln {

// Guesses tokens that a model may write next; the model then says which of them it would have written. It keeps a text of its own.
class Drafter {
 public:
  virtual ~Drafter() = default;
  // The text goes on with `tokens`.
  virtual void append(const std::vector<int64_t>& tokens) = 0;
  // The text is its first `length` tokens.
  virtual void cut(int64_t length) = 0;
  virtual int64_t length() const = 0;
  // At most `most` tokens that may come next, likeliest continuation only; possibly none.
  virtual std::vector<int64_t> draft(int64_t most) const = 0;
};

// What followed where the longest suffix of the text occurred before, most recently where it did more than once. No model.
class NgramDrafter : public Drafter {
 public:
  // Suffixes of `shortest` to `longest` tokens are looked for.
  explicit NgramDrafter(int64_t shortest = 2, int64_t longest = 8);
  void append(const std::vector<int64_t>& tokens) override;
  void cut(int64_t length) override;
  int64_t length() const override { return static_cast<int64_t>(text_.size()); }
  std::vector<int64_t> draft(int64_t most) const override;

 private:
  uint64_t key(int64_t end) const;
  void note(int64_t end);

  int64_t shortest_, longest_;
  std::vector<int64_t> text_;
  // The ends of what occurred: hash of the `shortest_` tokens before an end -> the newest such end; and of each end the one before it.
  std::unordered_map<uint64_t, int64_t> newest_;
  std::vector<int64_t> before_;  // [length() + 1], -1: none
};

// How many of a step's drafts were right, and how many are worth drafting next.
class Acceptance {
 public:
  explicit Acceptance(int64_t most);  // drafts of a step

  // Of the drafts how many the model agrees with: it wrote `written`, which has one token more.
  static int64_t agreed(const std::vector<int64_t>& drafts, const std::vector<int64_t>& written);
  void took(int64_t drafted, int64_t accepted);
  // Drafts of the next step, 0 .. most: as many as are still right as a whole often enough, and now and then one where none is.
  int64_t worth() const;

  int64_t steps() const { return steps_; }
  int64_t drafted() const;
  int64_t accepted() const;
  // [most]: how often each place of a draft was tried (behind a wrong one nothing is known), and right.
  const std::vector<int64_t>& tried() const { return tried_; }
  const std::vector<int64_t>& right() const { return right_; }

 private:
  std::vector<int64_t> tried_, right_;
  std::vector<double> recent_;  // share that was right, of late
  int64_t steps_ = 0, idle_ = 0;
};

}  // namespace kiln
