#pragma once
#include <cstdint>
#include <memory>
#include <random>
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
  const std::vector<int64_t>& text() const { return text_; }

 private:
  uint64_t key(int64_t end) const;
  void note(int64_t end);

  int64_t shortest_, longest_;
  std::vector<int64_t> text_;
  // The ends of what occurred: hash of the `shortest_` tokens before an end -> the newest such end; and of each end the one before it.
  std::unordered_map<uint64_t, int64_t> newest_;
  std::vector<int64_t> before_;  // [length() + 1], -1: none
};

// Tokens that are known to come, of which each place of a draft is right as often as `rates` says, by a coin of `seed`: for measurements. Its text
// is what was appended, the first of which is the script's.
class ScriptedDrafter : public Drafter {
 public:
  ScriptedDrafter(std::vector<int64_t> script, std::vector<double> rates, int64_t vocab_size, uint64_t seed);
  void append(const std::vector<int64_t>& tokens) override { length_ += static_cast<int64_t>(tokens.size()); }
  void cut(int64_t length) override { length_ = length; }
  int64_t length() const override { return length_; }
  std::vector<int64_t> draft(int64_t most) const override;

 private:
  std::vector<int64_t> script_;
  std::vector<double> rates_;
  int64_t vocab_size_, length_ = 0;
  mutable std::mt19937_64 coin_;
};

// How many drafts of one text were right, and what may be hoped of the next.
class Acceptance {
 public:
  explicit Acceptance(int64_t most);  // drafts of a step

  // Of the drafts how many the model agrees with: it wrote `written`, which has one token more.
  static int64_t agreed(const std::vector<int64_t>& drafts, const std::vector<int64_t>& written);
  void took(int64_t drafted, int64_t accepted);
  // [most]: how likely the next i + 1 drafts are all right.
  std::vector<double> chances() const;
  // Nothing was drafted for so long that one draft is due, whatever the chances. The more often that was in vain, the longer it takes.
  bool due() const { return idle_ >= patience_; }
  void count_from_here();  // tried() and right() begin again; what was learned stays

  // [most]: how often each place of a draft was tried (behind a wrong one nothing is known), and right.
  const std::vector<int64_t>& tried() const { return tried_; }
  const std::vector<int64_t>& right() const { return right_; }

 private:
  std::vector<int64_t> tried_, right_;
  std::vector<double> recent_;  // share that was right, of late
  int64_t idle_ = 0, patience_;
};

// What steps of several tokens take, as they were measured.
class StepCosts {
 public:
  explicit StepCosts(std::vector<int64_t> sizes);  // tokens of a step, ascending
  void took(int64_t tokens, double seconds);
  // Of the smallest step that `tokens` fit into. One that was not measured is believed to go on as smaller ones do, one that was not of late to
  // cost little more than those.
  double of(int64_t tokens) const;
  bool knows(int64_t tokens) const { return costs_[fits(tokens)].seconds > 0; }
  const std::vector<int64_t>& sizes() const { return sizes_; }

 private:
  size_t fits(int64_t tokens) const;
  std::vector<int64_t> sizes_;
  struct Cost {
    double seconds = 0;  // 0: not measured
    int64_t age = 0;     // steps since it was
  };
  std::vector<Cost> costs_;
};

// How many drafts of each row are worth taking into one step, so that it gives most tokens for its time. chances[r]: of each place of row r's draft.
// draft_seconds[r]: what one of its drafts takes to make, where that is not nothing. None before a step without drafts was measured. All rows fit
// into the largest step.
std::vector<int64_t> share_drafts(const std::vector<std::vector<double>>& chances, const StepCosts& costs, const std::vector<double>& draft_seconds = {});

}  // namespace kiln
