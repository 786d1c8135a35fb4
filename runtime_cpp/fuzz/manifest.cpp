// manifest.json beside a good weights file.
#include "artifact.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const kiln::fuzz::Folder folder;
  static const bool once = [] {
    // One tensor "a" of 64 float32, as the seeds' manifest has it.
    std::string header = R"({"a":{"dtype":"F32","shape":[8,8],"data_offsets":[0,256]}})";
    header.resize(248, ' ');
    folder.write("weights.safetensors", std::string("\xF8\0\0\0\0\0\0\0", 8) + header + std::string(256, 'x'));
    folder.write("model.pt2", "code");
    return true;
  }();
  static_cast<void>(once);
  folder.write("manifest.json", kiln::fuzz::text(data, size));
  kiln::fuzz::open_artifact(folder);
  return 0;
}
