#include "kernels/launch_cpu.h"
#include "optim/sgd.h"

namespace torch_freeze {

void sgd_step_cpu(const SgdBatch& batch) { launch_cpu<SgdFormula>(batch); }

}  // namespace torch_freeze
