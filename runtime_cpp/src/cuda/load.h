#pragma once
#include <memory>

#include "artifact/file.h"
#include "artifact/raw_weights.h"
#include "compiled/package.h"
#include "cuda/driver.h"
#include "model/backend.h"

namespace kiln {

constexpr unsigned kReaders = 4;  // threads that read a file into memory

// Bytes of files on their way to a GPU: through two pinned buffers that threads fill by turns. uint8 [bytes].
Tensor load_file(const std::shared_ptr<const cuda::Gpu>& gpu, const MappedFile& file, uint64_t offset, uint64_t bytes, const Progress& progress);
// The same of GGUF tensors; blocks are packed by the package's kernels behind the copy. What lies in the host's memory they write to `host`,
// pinned: its addresses are the GPU's too.
Tensor load_raw(const std::shared_ptr<const cuda::Gpu>& gpu, const RawWeights& weights, const Tensor& host, const LoaderCode& loader, const Progress& progress);

}  // namespace kiln
