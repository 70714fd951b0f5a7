#include "core/overlap.h"

#include <algorithm>

#include "core/tensor_facts.h"

namespace torch_freeze {

Memory memory_of(const c10::TensorImpl* tensor) {
  if (is_opaque(tensor) || !tensor->has_storage() || tensor->numel() == 0) {
    return {};
  }
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor->dim(); ++dim) {
    last += (tensor->size(dim) - 1) * tensor->stride(dim);
  }
  const auto itemsize = static_cast<int64_t>(tensor->itemsize());
  const auto* const begin =
      static_cast<const char*>(tensor->unsafe_storage().data()) + tensor->storage_offset() * itemsize;
  return {begin, begin + (last + 1) * itemsize};
}

void merge(std::vector<Memory>& parts) {
  std::sort(parts.begin(), parts.end());
  size_t kept = 0;
  for (const auto& part : parts) {
    if (kept > 0 && part.begin < parts[kept - 1].end) {
      parts[kept - 1].end = std::max(parts[kept - 1].end, part.end);
    } else {
      parts[kept++] = part;
    }
  }
  parts.resize(kept);
}

bool overlap(const std::vector<Memory>& merged, const Memory& memory) {
  const auto after = std::lower_bound(
      merged.begin(), merged.end(), memory.end,
      [](const Memory& part, const char* end) { return part.begin < end; });
  return after != merged.begin() && memory.begin < std::prev(after)->end;
}

}  // namespace torch_freeze
