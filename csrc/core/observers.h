// Who else is watching a step: profilers, modes, and CUDA graphs that are being captured.
#pragma once

#include <c10/core/Device.h>

namespace torch_freeze {

// Whether a profiler or another observer wants to hear of each step.
bool is_observed();

// A mode or a function transform wants to see every operator, and may give back tensors of its own.
bool is_intercepted();

// Whether what is launched on the device's current stream is recorded for a CUDA graph. Makes a context on a
// device that has none.
bool is_capturing(c10::Device device);

}  // namespace torch_freeze
