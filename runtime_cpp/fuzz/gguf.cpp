// A GGUF file: keys, values, tensors; and the constants that an artifact of code alone makes of two of them.
#include "artifact/gguf.h"

#include <algorithm>

#include "artifact.h"
#include "artifact/raw_weights.h"

namespace {

using kiln::fuzz::demand;

constexpr const char* kManifest = R"({"format":"kiln","format_version":%d,"producer":{"kiln":"0","torch":"2.11.0","triton":"0"},
"source":{"architecture":"toy"},"max_seq_len":8,"prefill_chunk":4,
"targets":[{"target":"cpu","file":"model.pt2","device":"cpu","compute_capability":null,"bytes":4,
"sha256":"5694d08a2e53ffcae0c3103e5ad6f6076abd960eb1f8a56577040bc1028f702b"}],
"entry_points":{"prefill":{"inputs":[],"outputs":[]},"decode":{"inputs":[],"outputs":[]}},
"constants":[{"name":"m.words","dtype":"int32","shape":[2,4,3],"bytes":96,"gathered":"host","source":{"plane":"words","tensors":["m.weight"]}},
{"name":"m.halves","dtype":"float16","shape":[2,1,3],"bytes":12,"gathered":"host","source":{"plane":"halves","tensors":["m.weight"]}},
{"name":"v","dtype":"float32","shape":[5],"bytes":20,"source":{"plane":"values","tensors":["v.weight"],"limit":2.0}}],
"kv":[],"tokenizer":null,"chat":null,
"weights":{"file":"weights.safetensors","bytes":10,"gguf":{"file":"m.gguf","types":{"F32":0,"F16":1,"Q4_0":2,"Q6_K":14,"BF16":30},
"packings":{"Q4_0":{"elements":32,"bytes":18,"words":["2&0f0f0f0f|6&0f0f0f0f<<4","2&f0f0f0f0>>4|6&f0f0f0f0","10&0f0f0f0f|14&0f0f0f0f<<4",
"10&f0f0f0f0>>4|14&f0f0f0f0"],"halves":["0&0000ffff"]}},
"tensors":[{"name":"m.weight","type":"Q4_0","shape":[3,64]},{"name":"v.weight","type":"F32","shape":[5]}],
"unused":["x.*"],"metadata":{"checked":["toy.*"],"equal":{"toy.absent":null},"free":["toy.free.*"],"noted":{"note":null}}}}})";

void open_file(const std::string& path) {
  kiln::GgufFile file(path);
  size_t sum = 0;
  for (const auto& [key, value] : file.metadata()) {
    const char* begin = file.part(0).data();
    demand(value.bytes.data() >= begin && value.bytes.data() + value.bytes.size() <= begin + file.part(0).size(), "a value lies in the file");
    for (char c : value.bytes) sum += static_cast<unsigned char>(c);
  }
  for (const auto& [name, t] : file.tensors()) {
    uint64_t elements = 1;
    for (int64_t d : t.shape) {
      demand(d >= 0, "a size is not negative");
      elements *= static_cast<uint64_t>(std::max<int64_t>(d, 1));
    }
    demand(!t.shape.empty() && elements <= INT64_MAX, "elements can be counted");
    demand(t.part < file.part_count() && t.offset <= file.part(t.part).size(), "a tensor begins in its file");
  }
  demand(sum < SIZE_MAX, "values can be read");
}

void make_constants(const kiln::Artifact& artifact, const std::string& path) {
  std::vector<std::string> notes;
  kiln::RawWeights weights(artifact, path, true, [](const kiln::ConstantSpec& c) { return c.gathered; }, &notes);
  demand(weights.pieces().size() == 1 && weights.made().size() == 1, "two tensors are wanted");
  const kiln::RawWeights::Piece& p = weights.pieces()[0];
  demand(p.rows == 3 && p.row_bytes == 36 && p.offset <= p.file->size() && 108 <= p.file->size() - p.offset, "a tensor lies in its file");
  std::string raw(108, '\0'), planes(weights.bytes(p.host), '\0');
  p.file->read(p.offset, raw.size(), raw.data(), 1);
  p.packing->pack(raw.data(), p.row_bytes, p.rows, p.groups, reinterpret_cast<uint32_t*>(planes.data() + p.words),
                  reinterpret_cast<uint16_t*>(planes.data() + p.halves), p.n);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const kiln::fuzz::Folder folder;
  static const kiln::Artifact artifact = [] {
    char manifest[4000];
    std::snprintf(manifest, sizeof manifest, kManifest, static_cast<int>(kiln::kFormatVersion));
    folder.write("manifest.json", manifest);
    folder.write("model.pt2", "code");
    folder.write("weights.safetensors", std::string("\2\0\0\0\0\0\0\0{}", 10));
    return kiln::Artifact(folder.path());
  }();
  const std::string path = folder.path() + "/m.gguf";
  folder.write("m.gguf", kiln::fuzz::text(data, size));
  kiln::fuzz::accepts([&] { open_file(path); });
  kiln::fuzz::accepts([&] { make_constants(artifact, path); });
  return 0;
}
