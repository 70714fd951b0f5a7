// Who else is watching a step: profilers, modes, and CUDA graphs that are being captured.
#pragma once

#include <c10/core/Device.h>

namespace torch_freeze {

// Whether a profiler or another observer records each step.
bool is_observed();

// Whether a mode or a function transform intercepts every operator, and may return tensors of its own.
bool is_intercepted();

// Whether launches on the device's current stream are being captured in a CUDA graph. Makes a CUDA context on a
// device that has none.
bool is_capturing(c10::Device device);

}  // namespace torch_freeze
