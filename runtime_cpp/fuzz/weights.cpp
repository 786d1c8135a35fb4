// The header of weights.safetensors beside a manifest that asks for two tensors of such a file.
#include "artifact.h"

namespace {

constexpr const char* kManifest = R"({"format":"kiln","format_version":%d,"producer":{"kiln":"0","torch":"2.11.0","triton":"0"},
"source":{"architecture":"toy"},"max_seq_len":8,"prefill_chunk":4,
"targets":[{"target":"cpu","file":"model.pt2","device":"cpu","compute_capability":null,"bytes":4,
"sha256":"5694d08a2e53ffcae0c3103e5ad6f6076abd960eb1f8a56577040bc1028f702b"}],
"entry_points":{"prefill":{"inputs":[],"outputs":[]},"decode":{"inputs":[],"outputs":[]}},
"constants":[{"name":"a","dtype":"float32","shape":[8,8],"offset":512,"bytes":256,"sha256":""},
{"name":"b","dtype":"int32","shape":[3],"offset":768,"bytes":12,"sha256":""}],
"kv":[],"weights":{"file":"weights.safetensors","bytes":%zu},"tokenizer":null,"chat":null})";

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const kiln::fuzz::Folder folder;
  char manifest[2000];
  std::snprintf(manifest, sizeof manifest, kManifest, static_cast<int>(kiln::kFormatVersion), size);
  folder.write("manifest.json", manifest);
  folder.write("model.pt2", "code");
  folder.write("weights.safetensors", kiln::fuzz::text(data, size));
  kiln::fuzz::open_artifact(folder);
  return 0;
}
