#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kiln/artifact.h"
#include "kiln/tokenizer.h"

namespace kiln {

struct LoadOptions {
  // The GGUF file that the weights come from, or any part of a split one, where the artifact holds code only. Empty: the file that it was
  // made of, if it lies in the artifact's folder or beside it.
  std::string weights;
  // "cpu", "cuda", "cuda:1"; "auto" is the first GPU when there is one and the artifact has a GPU target, else the CPU.
  std::string device = "auto";
  bool verify = false;  // recompute every SHA-256 before anything is used; of a GGUF file those that the artifact has
  int threads = 1;      // of verify
  // Where a GPU finds a table of which only rows are read, a per-layer embedding: "device", "host" (pinned memory, read over the bus), or as the
  // artifact says.
  std::string ple;
  std::function<void(uint64_t done, uint64_t total)> progress;  // bytes of weights on the device so far, from 0 to total
  std::function<void(const std::string& line)> note;            // of what a user should know of a GGUF file that is otherwise in order
  // The process runs no GPU kernels but ours: its CUDA context may be as small as they allow.
  bool small_context = false;
};

// A loaded artifact on one device: its weights, its tokenizer. Shared by any number of sessions; immutable.
class Model {
 public:
  // Throws Error when the artifact is damaged, has no target for the device, or does not fit into its memory.
  static std::shared_ptr<const Model> load(const std::string& directory, const LoadOptions& options = {});
  ~Model();

  const Artifact& artifact() const;
  const Tokenizer& tokenizer() const;  // Error when the artifact has none
  bool has_tokenizer() const;
  const TargetSpec& target() const;
  std::string device() const;  // "cpu", "cuda:0"
  uint64_t free_bytes() const;  // memory of the device that nothing has taken yet
  int64_t vocab_size() const;  // of the logits
  bool is_eog(int64_t token) const;
  // Of the artifact and, where the weights come from a GGUF file, of that: what saved sessions are held against. A SHA-256 in hex.
  const std::string& identity() const;

  // For measurements: where each constant lies on the device.
  struct WeightMemory {
    std::string name;
    const void* data;
    uint64_t bytes;
  };
  std::vector<WeightMemory> weight_memory() const;

  // `raw`: BOS and the text. Else one user turn in the chat template, when the artifact has one.
  std::vector<int64_t> encode_prompt(std::string_view text, bool raw = false) const;

  struct Impl;
  const Impl& impl() const { return *impl_; }

 private:
  explicit Model(std::unique_ptr<Impl> impl);
  static std::unique_ptr<Impl> load_impl(const std::string& directory, const LoadOptions& options);
  std::unique_ptr<Impl> impl_;
};

// Threads of the CPU kernels, for the whole process.
void set_threads(int threads);
std::string version();  // "0.1.0 (artifact format 2)"

}  // namespace kiln
