#include "kiln/model.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <set>

#include "cpu/ops.h"
#include "artifact/file.h"
#include "artifact/raw_weights.h"
#include "artifact/sha256.h"
#include "model/model_impl.h"

namespace kiln {

namespace {

struct Place {
  bool cuda = false;
  int index = 0;
  const TargetSpec* target = nullptr;
};

std::string sm_name(std::pair<int, int> cc) { return "sm_" + std::to_string(cc.first) + std::to_string(cc.second); }

Place cuda_place(const Artifact& artifact, int index) {
  auto cc = cuda_compute_capability(index);
  const TargetSpec* target = artifact.find_target(true, cc.first, cc.second);
  if (!target)
    fail(artifact.directory(), ": no target for cuda:", index, ", which is ", sm_name(cc), "; the artifact has: ", artifact.target_names(),
         ". Export with --target ", sm_name(cc), artifact.find_target(false) ? ", or run with --device cpu" : "");
  return {true, index, target};
}

Place cpu_place(const Artifact& artifact) {
  const TargetSpec* target = artifact.find_target(false);
  if (!target) fail(artifact.directory(), ": no CPU target; the artifact has: ", artifact.target_names(), ". Export with --target cpu");
  return {false, 0, target};
}

Place choose_place(const Artifact& artifact, const std::string& device) {
  if (device == "cpu") return cpu_place(artifact);
  std::string why;
  if (device == "auto") {
    bool has_gpu_target = std::any_of(artifact.targets.begin(), artifact.targets.end(), [](const TargetSpec& t) { return t.cuda; });
    if (has_gpu_target && cuda_device_count(&why) > 0) return cuda_place(artifact, 0);
    if (!artifact.find_target(false)) fail(artifact.directory(), ": has targets ", artifact.target_names(), ", but no usable GPU: ", why);
    return cpu_place(artifact);
  }
  size_t used = 0;
  int index = 0;
  if (device.rfind("cuda:", 0) == 0 && device.size() > 5 && device.find_first_not_of("0123456789", 5) == std::string::npos && device.size() < 9)
    index = std::stoi(device.substr(5), &used);
  else if (device != "cuda")
    fail("unknown device '", device, "'; use cpu, cuda or cuda:N");
  int count = cuda_device_count(&why);
  if (count == 0) fail("no usable GPU for --device ", device, ": ", why);
  if (index >= count) fail("--device ", device, ": this machine has ", count, count == 1 ? " GPU" : " GPUs");
  return cuda_place(artifact, index);
}

void check_inputs(const std::string& entry, const EntryPoint& point) {
  static const std::set<std::string> known = {"tokens", "pos", "temperature", "top_k", "top_p", "seed"};
  for (const ValueSpec& v : point.inputs)
    if (!known.count(v.name)) fail("manifest.json: ", entry, " has the input '", v.name, "', which this runner does not know");
  for (const char* name : {"tokens", "pos"}) {
    auto it = std::find_if(point.inputs.begin(), point.inputs.end(), [&](const ValueSpec& v) { return v.name == name; });
    if (it == point.inputs.end() || it->dtype != DType::I64) fail("manifest.json: ", entry, " has no int64 input '", name, "'");
  }
  for (const auto& [name, dtype] : {std::pair("token", DType::I64), std::pair("logits", DType::F32)}) {
    auto it = std::find_if(point.outputs.begin(), point.outputs.end(), [&, n = name](const ValueSpec& v) { return v.name == n; });
    if (it == point.outputs.end() || it->dtype != dtype) fail("manifest.json: ", entry, " has no ", dtype_name(dtype), " output '", name, "'");
  }
}

// The entry of a drafter, and what the others give it.
void check_drafter(const Artifact& artifact) {
  if (!artifact.entry_points.count("draft")) return;
  const EntryPoint& point = artifact.entry("draft");
  static const std::map<std::string, DType> known = {{"tokens", DType::I64}, {"pos", DType::I64},         {"last", DType::I64},  {"row", DType::I64},   {"hidden", DType::F32},
                                                     {"seed", DType::I64},   {"temperature", DType::F32}, {"top_k", DType::I32}, {"top_p", DType::F32}};
  std::vector<int64_t> hidden;
  std::set<std::string> given;
  for (const ValueSpec& v : point.inputs) {
    auto it = known.find(v.name);
    if (it == known.end() || it->second != v.dtype) fail("manifest.json: draft has the input '", v.name, "' (", dtype_name(v.dtype), "), which this runner does not know");
    if (v.name == "hidden") hidden = v.shape;
    if (v.name == "hidden" ? v.shape.size() != 2 || v.shape[0] != 1 || v.shape[1] < 1 : v.shape != std::vector<int64_t>{1})
      fail("manifest.json: the input '", v.name, "' of draft has shape ", shape_text(v.shape));
    given.insert(v.name);
  }
  for (const char* name : {"tokens", "pos", "last", "row", "hidden"})
    if (!given.count(name)) fail("manifest.json: draft has no input '", name, "'");
  if (artifact.steps().empty()) fail("manifest.json: there is a drafter, and no step of several tokens that would check its drafts");
  std::map<std::string, int64_t> rows = {{"prefill", 1}, {"decode", 1}, {"draft", 1}};
  for (int64_t m : artifact.steps()) rows.emplace("decode_" + std::to_string(m), m);
  for (const auto& [entry, m] : rows)
    for (const auto& [name, dtype] : {std::pair("token", DType::I64), std::pair("logits", DType::F32), std::pair("hidden", DType::F32)}) {
      const auto& outputs = artifact.entry(entry).outputs;
      auto it = std::find_if(outputs.begin(), outputs.end(), [&, n = name](const ValueSpec& v) { return v.name == n; });
      if (it == outputs.end() || it->dtype != dtype) fail("manifest.json: ", entry, " has no ", dtype_name(dtype), " output '", name, "', which a drafter needs");
      if (it->name == "hidden" && it->shape != std::vector<int64_t>{m, hidden[1]})
        fail("manifest.json: 'hidden' of ", entry, " has shape ", shape_text(it->shape), ", the drafter takes rows of ", hidden[1]);
    }
}

// The file that a code-only artifact was made of, where a file of its name lies in the artifact's folder or beside it; else empty.
std::string weights_nearby(const Artifact& artifact) {
  const std::string& name = artifact.gguf->file();
  if (!name.empty() && name.find('/') == std::string::npos)
    for (const char* where : {"/", "/../"}) {
      const std::string path = artifact.directory() + where + name;
      struct stat found;
      if (stat(path.c_str(), &found) == 0 && S_ISREG(found.st_mode)) return path;
    }
  return "";
}

// Whether the folder has a link for that file whose target is gone.
bool leads_nowhere(const Artifact& artifact) {
  struct stat found;
  const std::string path = artifact.directory() + "/" + artifact.gguf->file();
  return lstat(path.c_str(), &found) == 0 && S_ISLNK(found.st_mode);
}

// The weights of a code-only artifact, checked; null where the artifact holds its own.
std::unique_ptr<RawWeights> open_weights(const Model::Impl& impl, const LoadOptions& options) {
  const Artifact& artifact = impl.artifact;
  if (!artifact.gguf) {
    if (!options.weights.empty()) fail(artifact.directory(), ": holds its weights; give no other (", options.weights, ")");
    return nullptr;
  }
  const std::string file = options.weights.empty() ? weights_nearby(artifact) : options.weights;
  if (file.empty())
    fail(artifact.directory(), ": holds code only; give the GGUF file of the weights with --weights (it was made of ", artifact.gguf->file(),
         leads_nowhere(artifact) ? ", to which this folder's link leads no more)" : ", which is neither in this folder nor beside it)");
  std::vector<std::string> notes;
  auto weights = std::make_unique<RawWeights>(artifact, file, options.verify, [&](const ConstantSpec& c) { return impl.on_host(c); }, &notes);
  for (const std::string& note : notes)
    if (options.note) options.note(note);
  return weights;
}

// Error where the device has no room for the weights.
void check_room(const Model::Impl& impl, uint64_t bytes) {
  if (const uint64_t free = impl.backend->free_bytes(); bytes > free)
    fail("the weights take ", gigabytes(bytes), " (", bytes, " bytes), ", impl.backend->device().str(), " has ", gigabytes(free), " (", free, " bytes) free");
}

// The weights of an artifact that holds them. In the file, those in the host's memory follow one another, as do the others.
void load_copied(Model::Impl& impl, const Progress& progress) {
  const Artifact& artifact = impl.artifact;
  struct {
    uint64_t begin = UINT64_MAX, end = 0;
  } found[2];
  for (const ConstantSpec& c : artifact.constants) {
    auto& part = found[impl.on_host(c)];
    part.begin = std::min(part.begin, c.offset), part.end = std::max(part.end, c.offset + c.bytes);
  }
  if (found[true].end && found[false].end && found[true].begin < found[false].end && found[false].begin < found[true].end)
    fail(artifact.directory(), ": constants of which only rows are read stand among others; export the model again");
  if (found[false].end && impl.target->cuda) check_room(impl, found[false].end - found[false].begin);
  const Progress none;
  for (bool host : {false, true})
    if (const auto& part = found[host]; part.end)
      impl.blobs[host] = impl.backend->load(*artifact.weights, part.begin, part.end - part.begin, host, host ? none : progress);
  for (const ConstantSpec& c : artifact.constants) impl.bind(c, c.offset - found[impl.on_host(c)].begin);
}

// SHA-256 of the manifest, which has those of all else; and of the beginnings and ends of all tensors that are not in the artifact.
std::string identity_of(const Artifact& artifact, const RawWeights* raw) {
  constexpr uint64_t kSample = 4096;
  std::string text = sha256(artifact.manifest.data(), artifact.manifest.size());
  if (!raw) return text;
  for (const RawWeights::Piece& p : raw->pieces()) {
    const uint64_t bytes = p.rows * p.row_bytes, some = std::min(bytes, kSample);
    std::string sample(2 * some, '\0');
    p.file->read(p.offset, some, sample.data(), 1);
    p.file->read(p.offset + bytes - some, some, sample.data() + some, 1);
    text += sha256(sample.data(), sample.size());
  }
  for (const RawWeights::Made& m : raw->made()) text += sha256(m.bytes.data(), m.bytes.size());
  return sha256(text.data(), text.size());
}

}  // namespace

std::string gigabytes(uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3f GB", static_cast<double>(bytes) / 1e9);
  return text;
}

Model::Model(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Model::~Model() = default;

std::shared_ptr<const Model> Model::load(const std::string& directory, const LoadOptions& options) {
  return std::shared_ptr<const Model>(new Model(load_impl(directory, options)));
}

std::unique_ptr<Model::Impl> Model::load_impl(const std::string& directory, const LoadOptions& options) {
  auto impl = std::make_unique<Impl>(directory);
  const Artifact& artifact = impl->artifact;
  for (const char* entry : {"prefill", "decode"}) check_inputs(entry, artifact.entry(entry));
  check_drafter(artifact);
  Place place = choose_place(artifact, options.device);
  impl->target = place.target;
  impl->ple = options.ple;
  if (!options.ple.empty() && options.ple != "device" && options.ple != "host") fail("unknown place '", options.ple, "' of a per-layer embedding; use device or host");
  if (options.ple == "host" && std::none_of(artifact.constants.begin(), artifact.constants.end(), [](const ConstantSpec& c) { return c.gathered; }))
    fail(directory, ": has no per-layer embedding that could lie on the host; leave --ple away");
  impl->package = std::make_unique<Package>(artifact, *place.target);
  if (options.verify) artifact.verify(options.threads);
  std::unique_ptr<RawWeights> raw = open_weights(*impl, options);

  impl->identity = identity_of(artifact, raw.get());
  for (const ValueSpec& v : artifact.entry("decode").outputs)
    if (v.name == "logits") impl->vocab_size = v.shape.empty() ? 0 : v.shape.back();
  if (impl->vocab_size <= 0) fail(directory, "/manifest.json: decode's logits have no vocabulary size");
  if (artifact.tokenizer) {
    impl->tokenizer = Tokenizer::load(artifact.path(artifact.tokenizer->file));
    if (artifact.tokenizer->bos.value_or(-1) != impl->tokenizer->bos())
      fail(directory, ": BOS is ", artifact.tokenizer->bos.value_or(-1), " in manifest.json, ", impl->tokenizer->bos(), " in ", artifact.tokenizer->file);
    if (impl->tokenizer->size() > impl->vocab_size)
      fail(directory, ": the tokenizer has ", impl->tokenizer->size(), " tokens, the model ", impl->vocab_size);
  }

  impl->backend = place.cuda ? make_cuda_backend(place.index, options.small_context) : make_cpu_backend();
  if (raw) {
    check_room(*impl, raw->bytes());
    auto loaded = impl->backend->load(*raw, impl->package->loader(), options.progress);
    std::move(loaded.begin(), loaded.end(), impl->blobs);
    for (const ConstantSpec& c : artifact.constants) impl->bind(c, raw->at(c.name));
  } else {
    load_copied(*impl, options.progress);
  }
  return impl;
}

const Artifact& Model::artifact() const { return impl_->artifact; }
bool Model::has_tokenizer() const { return impl_->tokenizer.has_value(); }
const Tokenizer& Model::tokenizer() const {
  if (!impl_->tokenizer) fail(impl_->artifact.directory(), ": has no tokenizer; give token ids");
  return *impl_->tokenizer;
}
const TargetSpec& Model::target() const { return *impl_->target; }
std::string Model::device() const { return impl_->backend->device().str(); }
uint64_t Model::free_bytes() const { return impl_->backend->free_bytes(); }
int64_t Model::vocab_size() const { return impl_->vocab_size; }
const std::string& Model::identity() const { return impl_->identity; }
bool Model::is_eog(int64_t token) const {
  const auto& spec = impl_->artifact.tokenizer;
  return spec && std::find(spec->eog.begin(), spec->eog.end(), token) != spec->eog.end();
}

std::vector<Model::WeightMemory> Model::weight_memory() const {
  std::vector<WeightMemory> found;
  for (const auto& [name, tensor] : impl_->constants) found.push_back({name, tensor.data(), tensor.bytes()});
  return found;
}

std::vector<int64_t> Model::encode_prompt(std::string_view text, bool raw) const {
  const auto& chat = impl_->artifact.chat;
  if (raw || !chat) return tokenizer().encode(text);
  return tokenizer().encode_chat(chat->prefix, text, chat->suffix, chat->trim);
}

void set_threads(int threads) { set_cpu_threads(threads); }

std::string version() { return KILN_VERSION " (artifact format " + std::to_string(kFormatVersion) + ")"; }

}  // namespace kiln
