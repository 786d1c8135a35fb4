#include "kiln/artifact.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <set>
#include <thread>
#include <tuple>
#include <unordered_map>

#include "artifact/file.h"
#include "artifact/gguf_map.h"
#include "kiln/json.h"
#include "artifact/sha256.h"

namespace kiln {

namespace {

struct DTypeRow {
  DType dtype;
  const char* name;         // manifest.json
  const char* safetensors;  // weights.safetensors
  uint64_t bytes;
};
constexpr DTypeRow kDTypes[] = {{DType::U8, "uint8", "U8", 1},     {DType::I16, "int16", "I16", 2},     {DType::I32, "int32", "I32", 4},  {DType::I64, "int64", "I64", 8},
                                {DType::F16, "float16", "F16", 2}, {DType::BF16, "bfloat16", "BF16", 2}, {DType::F32, "float32", "F32", 4}};
constexpr uint64_t kAlignment = 256;
constexpr uint64_t kMaxHeader = 100'000'000;  // of a safetensors file, as its other readers have it
constexpr size_t kMaxDims = 8;
constexpr uint64_t kMaxText = 1'000'000'000;  // of a manifest

const DTypeRow& row(DType dtype) { return kDTypes[static_cast<int>(dtype)]; }

DType parse_dtype(std::string_view name) {
  for (const DTypeRow& r : kDTypes)
    if (r.name == name) return r.dtype;
  fail("unknown dtype '", name, "'");
}

std::string string_at(const Json& object, std::string_view key) {
  try {
    return std::string(object.at(key).as_string());
  } catch (const Error& e) {
    fail("'", key, "': ", e.what());
  }
}

int64_t int_at(const Json& object, std::string_view key, int64_t least) {
  const Json& v = object.at(key);
  if (v.type() != Json::Type::Int || v.as_int() < least) fail("'", key, "' must be an integer >= ", least);
  return v.as_int();
}

std::vector<int64_t> parse_shape(const Json& array) {
  std::vector<int64_t> shape;
  for (const Json& d : array) shape.push_back(d.as_int());
  return shape;
}

void parse_tensor(const Json& object, TensorSpec& spec) {
  spec.name = string_at(object, "name");
  spec.dtype = parse_dtype(string_at(object, "dtype"));
  spec.shape = parse_shape(object.at("shape"));
  spec.bytes = static_cast<uint64_t>(int_at(object, "bytes", 0));
  // Neither the bytes nor a stride of the tensor, which a size of 0 does not shorten, may leave int64.
  auto unit = static_cast<int64_t>(dtype_bytes(spec.dtype)), span = unit, elements = int64_t{1};
  if (spec.shape.size() > kMaxDims) fail("'", spec.name, "': ", spec.shape.size(), " dimensions, this runner knows ", kMaxDims);
  for (int64_t d : spec.shape) {
    if (d < 0 || __builtin_mul_overflow(span, std::max<int64_t>(d, 1), &span)) fail("'", spec.name, "': shape ", shape_text(spec.shape));
    elements *= d;
  }
  auto bytes = static_cast<uint64_t>(elements * unit);
  if (bytes != spec.bytes)
    fail("'", spec.name, "': ", dtype_name(spec.dtype), " ", shape_text(spec.shape), " takes ", bytes, " bytes, 'bytes' says ", spec.bytes);
}

std::vector<ValueSpec> parse_values(const Json& array) {
  std::vector<ValueSpec> values;
  for (const Json& object : array) {
    ValueSpec v;
    v.name = string_at(object, "name");
    v.dtype = parse_dtype(string_at(object, "dtype"));
    for (const Json& d : object.at("shape")) v.shape.push_back(d.is_string() ? -1 : d.as_int());
    values.push_back(std::move(v));
  }
  return values;
}

EntryPoint parse_entry(const Json& object) {
  EntryPoint point{parse_values(object.at("inputs")), parse_values(object.at("outputs")), {}};
  if (const Json* waits = object.find("waits"))
    for (const Json& prefix : *waits) {
      point.waits.emplace_back(prefix.as_string());
      if (point.waits.back().empty()) fail("'waits': an empty name would mean every kernel");
    }
  return point;
}

// A file name of the manifest must stay inside the artifact.
std::string file_name(const Json& object) {
  std::string name = string_at(object, "file");
  if (name.empty() || name.find('/') != std::string::npos || name == "..") fail("'file': '", name, "' is not a file name");
  return name;
}

PackKernel parse_kernel(const Json& object) {
  PackKernel k{file_name(object), string_at(object, "kernel"), 0, 0, 0, 0};
  for (auto [member, key, least, most] : {std::tuple(&k.threads, "threads", 1, 1024), {&k.shared, "shared", 0, 1 << 20}, {&k.rows, "rows", 1, 1 << 16}, {&k.units, "units", 1, 1 << 10}})
    if ((*member = int_at(object, key, least)) > most) fail("'packing': '", key, "' is ", *member);
  return k;
}

TargetSpec parse_target(const Json& object) {
  TargetSpec t;
  t.target = string_at(object, "target");
  t.file = file_name(object);
  std::string device = string_at(object, "device");
  if (device != "cpu" && device != "cuda") fail("target '", t.target, "': unknown device '", device, "'");
  t.cuda = device == "cuda";
  if (t.cuda) {
    for (auto [part, i] : {std::pair(&t.major, 0), {&t.minor, 1}}) {
      int64_t number = object.at("compute_capability")[static_cast<size_t>(i)].as_int();
      if (number < 0 || number > 999) fail("target '", t.target, "': compute capability ", number);
      *part = static_cast<int>(number);
    }
  }
  t.bytes = static_cast<uint64_t>(int_at(object, "bytes", 1));
  t.sha256 = string_at(object, "sha256");
  if (object.find("blocks_at_once")) t.blocks_at_once = int_at(object, "blocks_at_once", 1);
  if (const Json* packing = object.find("packing"); packing && !packing->is_null()) {
    t.pack_words = parse_kernel(packing->at("words"));
    t.pack_halves = parse_kernel(packing->at("halves"));
  }
  return t;
}

}  // namespace

const char* dtype_name(DType dtype) { return row(dtype).name; }
uint64_t dtype_bytes(DType dtype) { return row(dtype).bytes; }

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (int64_t d : shape) out += (out.size() > 1 ? ", " : "") + std::to_string(d);
  return out + "]";
}

Artifact::Artifact(const std::string& directory) : directory_(directory) {
  while (directory_.size() > 1 && directory_.back() == '/') directory_.pop_back();
  if (!file_exists(directory_)) fail(directory_, ": no such directory");
  if (!file_exists(path("manifest.json"))) fail(directory_, ": not an artifact: it has no manifest.json");
  read_manifest();
  open_weights();
}

void Artifact::read_manifest() {
  const std::string where = path("manifest.json");
  manifest = read_file(where, kMaxText);
  JsonDocument doc(manifest, where);
  try {
    const Json& root = doc.root();
    const Json* format = root.find("format");
    if (!format || !format->is_string() || format->as_string() != "kiln") fail("not a kiln artifact: 'format' is not 'kiln'");
    int64_t version = int_at(root, "format_version", 0);
    if (version != kFormatVersion)
      fail("the artifact has format version ", version, ", this runner reads ", kFormatVersion, "; ",
           version > kFormatVersion ? "use a newer runner" : "export the model again");
    producer_torch = string_at(root.at("producer"), "torch");
    architecture = string_at(root.at("source"), "architecture");
    max_seq_len = int_at(root, "max_seq_len", 1);
    prefill_chunk = int_at(root, "prefill_chunk", 1);
    for (const Json& t : root.at("targets")) targets.push_back(parse_target(t));
    if (targets.empty()) fail("the artifact has no targets");
    const Json& entries = root.at("entry_points");
    for (size_t i = 0; i < entries.size(); ++i) {
      std::string name(entries.key(i));
      if (name.empty() || name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_") != std::string::npos)
        fail("'entry_points': '", name, "' is not a name of lower-case letters, digits and _");
      if (!entry_points.emplace(name, parse_entry(entries.value(i))).second) fail("'entry_points': '", name, "' is there twice");
    }
    for (const char* name : {"prefill", "decode"})
      if (!entry_points.count(name)) fail("'entry_points': has no '", name, "'");
    if (root.find("rows")) rows = int_at(root, "rows", 1);
    for (int64_t m : steps())
      for (const ValueSpec& v : entry("decode_" + std::to_string(m)).inputs)
        if (v.shape != std::vector<int64_t>{m}) fail("'entry_points': '", v.name, "' of decode_", m, " has shape ", shape_text(v.shape));
    for (const Json& c : root.at("constants")) {
      ConstantSpec spec;
      parse_tensor(c, spec);
      if (const Json* source = c.find("source")) {
        spec.plane = string_at(*source, "plane");
        for (const Json& name : source->at("tensors")) spec.tensors.emplace_back(name.as_string());
        if (const Json* limit = source->find("limit")) spec.limit = limit->as_double();
        if (!spec.made()) fail("'", spec.name, "': 'plane' is empty");
      } else {
        spec.offset = static_cast<uint64_t>(int_at(c, "offset", 0));
        spec.sha256 = string_at(c, "sha256");
      }
      if (const Json* memory = c.find("gathered")) {
        spec.gathered = true;
        spec.host = memory->as_string() == "host";
        if (!spec.host && memory->as_string() != "device") fail("'", spec.name, "': 'gathered' is '", memory->as_string(), "', neither 'device' nor 'host'");
      }
      constants.push_back(std::move(spec));
    }
    for (const Json& k : root.at("kv")) {
      KvSpec spec;
      parse_tensor(k, spec);
      spec.layer = int_at(k, "layer", 0);
      std::string kind = string_at(k, "kind");
      if (kind != "ring" && kind != "global" && kind != "state" && kind != "prefix") fail("kv '", spec.name, "': unknown kind '", kind, "'");
      spec.ring = kind == "ring";
      if (spec.ring && !spec.shape.empty()) {  // no more slots than its window, unless told
        spec.window = k.find("window") ? int_at(k, "window", 1) : spec.shape[0];
        if (spec.window > spec.shape[0]) fail("kv '", spec.name, "': a window of ", spec.window, " in ", spec.shape[0], " slots");
      }
      spec.state = kind == "state";
      if (spec.state && (spec.shape.empty() || spec.shape[0] != kStateSlots))
        fail("kv '", spec.name, "' has shape ", shape_text(spec.shape), "; a state is kept ", kStateSlots, " times");
      spec.prefix = kind == "prefix";
      if (k.find("behind")) spec.behind = int_at(k, "behind", 0);
      if (spec.behind && spec.forgets()) fail("kv '", spec.name, "': a ", kind, " that is ", spec.behind, " positions behind");
      if (!spec.forgets() && !spec.prefix && std::find(spec.shape.begin(), spec.shape.end(), max_seq_len) == spec.shape.end())
        fail("kv '", spec.name, "' has shape ", shape_text(spec.shape), " and no slots for 'max_seq_len' ", max_seq_len, " positions");
      kv.push_back(std::move(spec));
    }
    std::set<std::string_view> names;
    for (const ConstantSpec& c : constants)
      if (!names.insert(c.name).second) fail("'", c.name, "' is there twice");
    for (const KvSpec& k : kv)
      if (!names.insert(k.name).second) fail("'", k.name, "' is there twice, as a constant or a KV cache");
    weights_file_ = file_name(root.at("weights"));
    weights_bytes_ = static_cast<uint64_t>(int_at(root.at("weights"), "bytes", 1));
    if (const Json* map = root.at("weights").find("gguf")) gguf = std::make_shared<const GgufMap>(*map, constants);
    for (const ConstantSpec& c : constants)
      if (c.made() && !gguf) fail("'", c.name, "' is made of a GGUF file's tensors, and 'weights' has no 'gguf'");
    if (const Json* t = root.find("tokenizer"); t && !t->is_null()) {
      TokenizerSpec spec;
      spec.file = file_name(*t);
      if (const Json* bos = t->find("bos"); bos && !bos->is_null()) spec.bos = bos->as_int();
      for (const Json& id : t->at("eog")) spec.eog.push_back(id.as_int());
      tokenizer = std::move(spec);
    }
    if (const Json* c = root.find("chat"); c && !c->is_null()) {
      const Json* trim = c->find("trim");
      chat = ChatSpec{string_at(*c, "prefix"), string_at(*c, "suffix"), !trim || trim->as_bool()};
    }
  } catch (const Error& e) {
    fail(where, ": ", e.what());
  }
}

void Artifact::open_weights() {
  const std::string where = path(weights_file_);
  uint64_t size = file_size(where);
  if (size != weights_bytes_)
    fail(where, ": ", size, " bytes, the manifest says ", weights_bytes_, size < weights_bytes_ ? ": the file was cut short" : "",
         "; copy the artifact again");
  auto file = std::make_shared<const MappedFile>(where);
  uint64_t header_size = 0;
  if (size < 8) fail(where, ": too short for a safetensors file");
  std::memcpy(&header_size, file->data(), 8);
  if (header_size > std::min(size - 8, kMaxHeader)) fail(where, ": the header is said to have ", header_size, " bytes, the file has ", size);
  const uint64_t data_start = 8 + header_size;
  JsonDocument doc(std::string(file->data() + 8, header_size), where);
  const Json& header = doc.root();
  try {
    std::unordered_map<std::string_view, const Json*> found;
    for (size_t i = 0; i < header.size(); ++i)
      if (header.key(i) != "__metadata__" && header.key(i).substr(0, 6) != "__pad.") found[header.key(i)] = &header.value(i);
    for (const ConstantSpec& c : constants) {
      if (c.made()) continue;
      auto it = found.find(c.name);
      if (it == found.end()) fail("tensor '", c.name, "' of the manifest is missing");
      const Json& t = *it->second;
      found.erase(it);
      if (t.at("dtype").as_string() != row(c.dtype).safetensors)
        fail("'", c.name, "' has dtype ", t.at("dtype").as_string(), ", the manifest says ", row(c.dtype).safetensors);
      auto shape = parse_shape(t.at("shape"));
      if (shape != c.shape) fail("'", c.name, "' has shape ", shape_text(shape), ", the manifest says ", shape_text(c.shape));
      auto begin = data_start + static_cast<uint64_t>(t.at("data_offsets")[0].as_int());
      auto end = data_start + static_cast<uint64_t>(t.at("data_offsets")[1].as_int());
      if (begin != c.offset || end != c.offset + c.bytes)
        fail("'", c.name, "' is at bytes ", begin, "..", end, ", the manifest says ", c.offset, "..", c.offset + c.bytes);
      if (c.offset % kAlignment) fail("'", c.name, "' is at byte ", c.offset, ", not a multiple of ", kAlignment);
      if (end > size || begin > end) fail("'", c.name, "' ends at byte ", end, ", the file has ", size);
    }
    if (!found.empty()) fail("tensor '", found.begin()->first, "' is not in the manifest");
  } catch (const Error& e) {
    fail(where, ": ", e.what());
  }
  weights = std::move(file);
}

const TargetSpec* Artifact::find_target(bool cuda, int major, int minor) const {
  for (const TargetSpec& t : targets)
    if (t.cuda == cuda && (!cuda || (t.major == major && t.minor == minor))) return &t;
  return nullptr;
}

std::vector<int64_t> Artifact::steps() const {
  std::vector<int64_t> found;
  for (const auto& [name, point] : entry_points) {
    constexpr std::string_view kPrefix = "decode_";
    if (name.compare(0, kPrefix.size(), kPrefix) != 0) continue;
    const std::string digits = name.substr(kPrefix.size());
    if (digits.empty() || digits.size() > 3 || digits[0] == '0' || digits.find_first_not_of("0123456789") != std::string::npos) continue;
    if (int64_t m = std::stoll(digits); m > 1) found.push_back(m);
  }
  std::sort(found.begin(), found.end());
  return found;
}

int64_t Artifact::hidden_size() const {
  auto drafter = entry_points.find("draft");
  if (drafter == entry_points.end()) return 0;
  for (const ValueSpec& v : drafter->second.inputs)
    if (v.name == "hidden" && v.shape.size() == 2) return v.shape[1];
  return 0;
}

std::string Artifact::target_names() const {
  std::string out;
  for (const TargetSpec& t : targets) out += (out.empty() ? "" : ", ") + t.target;
  return out;
}

void Artifact::verify(int threads) const {
  std::atomic<size_t> next{0};
  std::mutex mutex;
  size_t bad = constants.size();
  std::string bad_hash;
  auto work = [&] {
    for (size_t i; (i = next++) < constants.size();) {
      if (constants[i].made()) continue;
      std::string found = sha256(weights->data() + constants[i].offset, constants[i].bytes);
      if (found == constants[i].sha256) continue;
      std::lock_guard<std::mutex> lock(mutex);
      if (i < bad) bad = i, bad_hash = found;
      next = constants.size();  // smaller indices are all taken: the first bad one will be among them
    }
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; ++i) pool.emplace_back(work);
  work();
  for (auto& t : pool) t.join();
  if (bad < constants.size())
    fail(weights->path(), ": damaged: tensor '", constants[bad].name, "' has SHA-256 ", bad_hash, ", the manifest says ", constants[bad].sha256,
         "; copy the artifact again");
}

}  // namespace kiln
