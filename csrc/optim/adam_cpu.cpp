#include "kernels/launch_cpu.h"
#include "optim/adam.h"

namespace torch_freeze {

void adam_step_cpu(const AdamBatch& batch) { launch_cpu<AdamFormula>(batch); }

}  // namespace torch_freeze
