// libcuda.so.1: what torch asks of the driver itself. build.py adds a stub for each other function it is linked
// to.
extern "C" {

bool cuda_on_cpu_has_context(int device);

int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  *flags = 0;
  *active = cuda_on_cpu_has_context(device) ? 1 : 0;
  return 0;
}

int cuGetErrorString(int, const char** text) {
  *text = "an error of the simulated driver";
  return 0;
}

}  // extern "C"
