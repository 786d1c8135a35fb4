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
constexpr int64_t kStateSlots = 2;  // a state of n tokens lies in slot n mod 2

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
  // Or made of tensors of a GGUF file, rows one after another: their "words" or "halves" (see GgufMap), or their "values".
  std::string plane;
  std::vector<std::string> tensors;
  double limit = 0;  // of the size of a value, where there is one
  // Only rows of it are read, as of a per-layer embedding: on a GPU it may lie in the host's memory; whether it does unless LoadOptions say.
  bool gathered = false, host = false;

  bool made() const { return !plane.empty(); }
};

struct KvSpec : TensorSpec {
  int64_t layer = 0;
  bool ring = false;   // a sliding layer's ring, else a global layer's cache, a state or a prefix's
  bool state = false;  // replaced by every step, kept twice: it can be stepped back by the one step that was just made, and no further
  bool prefix = false; // written once, with position `behind`, from the positions up to it, and the same for all that come after
  int64_t behind = 0;  // of what is no ring and no state: how many of the newest positions are not in it yet
  int64_t window = 0;  // of a ring: how many of the newest positions a token needs, its own included

  bool forgets() const { return ring || state; }  // a chunk of tokens overwrites what an earlier position needs
};

// A kernel of a GPU's package that packs blocks of any type into one plane: docs/ARTIFACT.md says what it is given.
struct PackKernel {
  std::string file, name;
  int64_t threads = 0, shared = 0;  // of a thread block; bytes of shared memory
  int64_t rows = 0, units = 0;      // of the plane that a thread block makes; that its steps are counted for
};

struct TargetSpec {
  std::string target;  // "cpu", "sm_90"
  std::string file;
  bool cuda = false;
  int major = 0, minor = 0;  // compute capability
  uint64_t bytes = 0;
  std::string sha256;
  std::optional<PackKernel> pack_words, pack_halves;
  int64_t blocks_at_once = 0;  // thread blocks of a decode kernel that wait for each other; 0: there is none
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
class GgufMap;

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

  int64_t hidden_size() const;         // of the rows that a drafter is given; 0: there is none
  std::vector<int64_t> steps() const;  // M of the entries decode_M, ascending
  const EntryPoint& entry(const std::string& name) const { return entry_points.at(name); }

  // Recomputes the SHA-256 of every constant of the weights file. Throws Error with the first that differs. (That of a target's code is checked at every load.)
  void verify(int threads) const;

  std::string producer_torch;
  std::string architecture;
  int64_t max_seq_len = 0;
  int64_t prefill_chunk = 0;
  int64_t rows = 1;      // timelines that an entry decode_M takes; kv has the caches of one
  std::string manifest;  // the JSON text
  std::vector<TargetSpec> targets;
  std::map<std::string, EntryPoint> entry_points;  // prefill and decode at least
  std::vector<ConstantSpec> constants;
  std::vector<KvSpec> kv;
  std::optional<TokenizerSpec> tokenizer;
  std::optional<ChatSpec> chat;
  std::shared_ptr<const MappedFile> weights;  // the constants that are not made of a GGUF file
  std::shared_ptr<const GgufMap> gguf;        // null: there are no others

 private:
  void read_manifest();
  void open_weights();

  std::string directory_;
  std::string weights_file_;
  uint64_t weights_bytes_ = 0;
};

}  // namespace kiln
