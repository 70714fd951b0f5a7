// The memory that tensors share.
#pragma once

#include <c10/core/TensorImpl.h>

#include <vector>

namespace torch_freeze {

// From a tensor's first byte to behind its last; what its strides leave out counts too. Empty for what has no
// memory of its own.
struct Memory {
  const char* begin = nullptr;
  const char* end = nullptr;
  bool operator<(const Memory& other) const { return begin < other.begin; }
};

Memory memory_of(const c10::TensorImpl* tensor);

// Sorted and without overlaps.
void merge(std::vector<Memory>& parts);

bool overlap(const std::vector<Memory>& merged, const Memory& memory);

}  // namespace torch_freeze
