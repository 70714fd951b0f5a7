#include "kernels/launch_cpu.h"
#include "optim/sgd.h"

template void torch_freeze::launch_cpu(const torch_freeze::SgdBatch&);
