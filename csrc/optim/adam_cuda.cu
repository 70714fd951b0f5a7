#include "kernels/launch_cuda.cuh"
#include "optim/adam.h"

template void torch_freeze::launch_cuda(const torch_freeze::AdamBatch&);
