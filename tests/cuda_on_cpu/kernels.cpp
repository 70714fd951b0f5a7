// The bodies of torch_freeze's kernels, from its own source: the one part here that knows the project.
#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels/tile_formula.h"
#include "optim/adam.h"
#include "optim/sgd.h"
#include "runtime.h"

namespace {

namespace multi_tensor = torch_freeze::multi_tensor;

// Takes an access as a GPU would: aligned to its size, within one allocation of its device. Without torch's
// caching allocator every tensor is an allocation, and this is then what memcheck looks at.
class CheckedMemory {
 public:
  explicit CheckedMemory(int device) : device_(device) {}

  template <int kBytes, bool kStreamed>
  void load(const char* from, uint32_t* raw) {
    check<kBytes>(from);
    std::memcpy(raw, from, kBytes);
  }
  template <int kBytes>
  void store(char* to, const uint32_t* raw) {
    check<kBytes>(to);
    std::memcpy(to, raw, kBytes);
  }

 private:
  template <int kBytes>
  void check(const char* address) {
    const auto place = reinterpret_cast<uintptr_t>(address);
    if (place % kBytes != 0) {
      throw std::runtime_error("misaligned address: an access of " + std::to_string(kBytes) + " bytes");
    }
    const auto holds = [&](const cuda_on_cpu::Bounds& known) {
      return place >= known.begin && place + kBytes <= known.end;
    };
    for (const auto& known : known_) {
      if (holds(known)) {
        return;
      }
    }
    auto& known = known_[next_++ % std::size(known_)];
    known = cuda_on_cpu::allocation_at(place, device_);
    if (!holds(known)) {
      throw std::runtime_error("an illegal memory access was encountered");
    }
  }

  int device_;
  cuda_on_cpu::Bounds known_[5] = {};  // parameter, gradient and the optimizer's buffers
  unsigned next_ = 0;
};

template <class Pointer>
void translate(Pointer& pointer) {
  if (pointer != nullptr) {
    pointer = static_cast<Pointer>(cuda_on_cpu::bytes_of(pointer));
  }
}

// Of what the kernel reads past CheckedMemory.
template <class Pointer>
void translate_scalar(Pointer& pointer, int device) {
  translate(pointer);
  if (pointer != nullptr && cuda_on_cpu::allocation_at(reinterpret_cast<uintptr_t>(pointer), device).end == 0) {
    throw std::runtime_error("an illegal memory access was encountered");
  }
}

template <class Table>
void translate_table(Table& table, int device) {
  using Formula = typename Table::Formula;
  translate_scalar(table.launch.found_inf, device);
  if constexpr (requires { table.launch.grad_scale; }) {
    translate_scalar(table.launch.grad_scale, device);
  }
  for (uint32_t i = 0; i < table.row_count; ++i) {
    auto& row = const_cast<typename Table::Row&>(table.row(i));
    for (auto& array : row.array) {
      translate(array);
    }
    if constexpr (requires { row.counted_on_device; }) {
      if ((row.branch & Formula::kCountOnDevice) != 0) {
        translate_scalar(row.counted_on_device, device);
      }
    }
  }
  if constexpr (requires(const typename Table::Group& group) { group.lr; }) {
    for (uint32_t i = 0; i < table.group_count; ++i) {
      translate_scalar(const_cast<typename Table::Group&>(table.group(i)).lr.device, device);
    }
  }
}

template <class Table>
void run(void* argument, dim3 grid, dim3 block, int device) {
  auto& table = *static_cast<Table*>(argument);
  translate_table(table, device);
  CheckedMemory memory(device);
  for (uint32_t i = 0; i < grid.x; ++i) {
    for (uint32_t thread = 0; thread < block.x; ++thread) {
      multi_tensor::update_block(table, memory, i, thread);
    }
  }
}

template <class Table>
void add() {
  char* const name = abi::__cxa_demangle(typeid(Table).name(), nullptr, nullptr, nullptr);
  cuda_on_cpu::register_kernel(std::string("multi_tensor_kernel<") + name + " >", sizeof(Table), &run<Table>);
  std::free(name);
}

// Of all sizes.
template <class Formula>
void add_tables() {
  add<multi_tensor::Table<Formula, multi_tensor::kSmallTable>>();
  add<multi_tensor::Table<Formula, multi_tensor::kMediumTable>>();
  add<multi_tensor::Table<Formula, multi_tensor::kLargeTable>>();
}

// For all dtypes.
template <class Formula, class... Types>
void add_all(std::tuple<Types...>*) {
  (add_tables<torch_freeze::TileFormula<Formula, Types>>(), ...);
}

}  // namespace

void register_torch_freeze() {
  auto* const dtypes = static_cast<torch_freeze::AllDtypes*>(nullptr);
  add_all<torch_freeze::SgdFormula>(dtypes);
  add_all<torch_freeze::AdamFormula>(dtypes);
  add_tables<torch_freeze::CountFormula<torch_freeze::AdamFormula>>();
}
