#include "kernels/launch_cuda.cuh"
#include "optim/adam.h"

namespace torch_freeze {

void adam_step_cuda(const AdamBatch& batch) { launch_cuda<AdamFormula>(batch); }

}  // namespace torch_freeze
