#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kiln/error.h"

namespace kiln {

constexpr int64_t kFormatVersion = 2;

enum class DType { U8, I16, I32, I64, F16, BF16, F32 };
const char* dtype_name(DType dtype);  // as in manifest.json: "bfloat16"
uint64_t dtype_bytes(DType dtype);
std::string shape_text(const std::vector<int64_t>& shape);  // "[2, 3]"

struct TensorSpec {
  std::string name;  // fully qualified, as in the compiled models
  DType dtype = DType::U8;
  std::vector<int64_t> shape;
  uint64_t bytes = 0;
};

struct ConstantSpec : TensorSpec {
  uint64_t offset = 0;  // from the start of the weights file
  std::string sha256;   // lower-case hex
};

struct KvSpec : TensorSpec {
  int64_t layer = 0;
  bool ring = false;  // a sliding layer's ring, else a global layer's cache
};

struct TargetSpec {
  std::string target;  // "cpu", "sm_90"
  std::string file;
  bool cuda = false;
  int major = 0, minor = 0;  // compute capability
  uint64_t bytes = 0;
  std::string sha256;
};

struct ValueSpec {  // an input or output of an entry point
  std::string name;
  DType dtype = DType::U8;
  std::vector<int64_t> shape;  // -1: the number of tokens of the call
};

struct EntryPoint {
  std::vector<ValueSpec> inputs, outputs;  // in call order
  std::vector<std::string> waits;          // prefixes of the names of GPU kernels that may start early
};

struct TokenizerSpec {
  std::string file;
  std::optional<int64_t> bos;
  std::vector<int64_t> eog;
};

struct ChatSpec {
  std::string prefix, suffix;
  bool trim = true;  // the template takes white space off the user's text
};

class MappedFile;

// An opened artifact directory: its manifest, checked, and its weights file, mapped and checked against the manifest.
// Throws Error on everything that does not fit. Reads no weight bytes until asked to.
class Artifact {
 public:
  explicit Artifact(const std::string& directory);

  const std::string& directory() const { return directory_; }
  std::string path(const std::string& file) const { return directory_ + "/" + file; }

  // `cuda` false: the CPU target. Else the target of compute capability major.minor. nullptr when absent.
  const TargetSpec* find_target(bool cuda, int major = 0, int minor = 0) const;
  std::string target_names() const;  // "cpu, sm_90"

  const EntryPoint& entry(const std::string& name) const { return entry_points.at(name); }

  // Recomputes the SHA-256 of every constant. Throws Error with the first that differs. (That of a target's code is checked at every load.)
  void verify(int threads) const;

  std::string producer_torch;
  std::string architecture;
  int64_t max_seq_len = 0;
  int64_t prefill_chunk = 0;
  std::string manifest;  // the JSON text
  std::vector<TargetSpec> targets;
  std::map<std::string, EntryPoint> entry_points;  // prefill and decode at least
  std::vector<ConstantSpec> constants;
  std::vector<KvSpec> kv;
  std::optional<TokenizerSpec> tokenizer;
  std::optional<ChatSpec> chat;
  std::shared_ptr<const MappedFile> weights;

 private:
  void read_manifest();
  void open_weights();

  std::string directory_;
  std::string weights_file_;
  uint64_t weights_bytes_ = 0;
};

}  // namespace kiln
