#pragma once
#include "fuzz.h"
#include "kiln/artifact.h"
#include "artifact/file.h"

namespace kiln::fuzz {

// Opens the artifact in `folder`, and uses what was promised of one that opens.
inline void open_artifact(const Folder& folder) {
  accepts([&] {
    Artifact artifact(folder.path());
    uint64_t sum = 0;
    for (const ConstantSpec& c : artifact.constants) {
      if (c.made()) {
        demand(artifact.gguf && !c.tensors.empty(), "a constant without a place is made of something");
        continue;
      }
      demand(c.offset <= artifact.weights->size() && c.bytes <= artifact.weights->size() - c.offset, "a constant lies in the file");
      uint64_t bytes = dtype_bytes(c.dtype);
      for (int64_t d : c.shape) bytes *= static_cast<uint64_t>(d);
      demand(bytes == c.bytes, "a constant has the bytes of its shape");
      if (c.bytes) sum += static_cast<unsigned char>(artifact.weights->data()[c.offset]) + static_cast<unsigned char>(artifact.weights->data()[c.offset + c.bytes - 1]);
    }
    demand(!artifact.targets.empty() && artifact.max_seq_len > 0 && artifact.prefill_chunk > 0 && sum < UINT64_MAX, "an artifact has targets and room");
    for (const TargetSpec& t : artifact.targets) {
      demand(artifact.find_target(t.cuda, t.major, t.minor) != nullptr, "a target is found");
    }
    accepts([&] { artifact.verify(1); });
    artifact.target_names();
  });
}

}  // namespace kiln::fuzz
