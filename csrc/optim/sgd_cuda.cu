#include "kernels/launch_cuda.cuh"
#include "optim/sgd.h"

namespace torch_freeze {

void sgd_step_cuda(const SgdBatch& batch) { launch_cuda<SgdFormula>(batch); }

}  // namespace torch_freeze
