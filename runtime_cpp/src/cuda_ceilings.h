#pragma once
#include <memory>

#include "backend.h"
#include "cuda_driver.h"

namespace kiln {

// Copy and read bandwidth and the rate of bfloat16 matmuls of the GPU. Takes about 8 GB of it, or two thirds of what is free.
Ceilings measure_ceilings(const std::shared_ptr<const cuda::Gpu>& gpu);

}  // namespace kiln
