// The header of a GGUF file: keys, values, tensors.
#include "artifact/gguf.h"

#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const kiln::fuzz::Folder folder;
  folder.write("m.gguf", kiln::fuzz::text(data, size));
  kiln::fuzz::accepts([&] {
    kiln::GgufFile file(folder.path() + "/m.gguf");
    size_t sum = 0;
    for (const auto& [key, value] : file.metadata()) {
      const char* begin = file.part(0).data();
      kiln::fuzz::demand(value.bytes.data() >= begin && value.bytes.data() + value.bytes.size() <= begin + file.part(0).size(), "a value lies in the file");
      for (char c : value.bytes) sum += static_cast<unsigned char>(c);
    }
    for (const auto& [name, t] : file.tensors()) {
      uint64_t elements = 1;
      for (int64_t d : t.shape) {
        kiln::fuzz::demand(d >= 0, "a size is not negative");
        elements *= static_cast<uint64_t>(std::max<int64_t>(d, 1));
      }
      kiln::fuzz::demand(!t.shape.empty() && elements <= INT64_MAX, "elements can be counted");
      kiln::fuzz::demand(t.part < file.part_count() && t.offset <= file.part(t.part).size(), "a tensor begins in its file");
    }
    kiln::fuzz::demand(sum < SIZE_MAX, "values can be read");
  });
  return 0;
}
