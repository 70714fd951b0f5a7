// The bodies of torch_freeze's kernels, from its own source: the one part here that knows the project.
#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels/tile_formula.h"
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
  cuda_on_cpu::Bounds known_[3] = {};  // parameter, gradient and momentum
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
void run(void* argument, dim3 grid, dim3 block, int device) {
  auto& table = *static_cast<Table*>(argument);
  translate_scalar(table.launch.grad_scale, device);
  translate_scalar(table.launch.found_inf, device);
  for (uint32_t i = 0; i < table.row_count; ++i) {
    for (auto& array : const_cast<typename Table::Row&>(table.row(i)).array) {
      translate(array);
    }
  }
  for (uint32_t i = 0; i < table.group_count; ++i) {
    translate_scalar(const_cast<typename Table::Group&>(table.group(i)).device_lr, device);
  }
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

// For all dtypes.
template <class Formula, class... Types>
void add_all(std::tuple<Types...>*) {
  using torch_freeze::TileFormula;
  (add<multi_tensor::Table<TileFormula<Formula, Types>, multi_tensor::kSmallTable>>(), ...);
  (add<multi_tensor::Table<TileFormula<Formula, Types>, multi_tensor::kMediumTable>>(), ...);
  (add<multi_tensor::Table<TileFormula<Formula, Types>, multi_tensor::kLargeTable>>(), ...);
}

}  // namespace

void register_torch_freeze() { add_all<torch_freeze::SgdFormula>(static_cast<torch_freeze::AllDtypes*>(nullptr)); }
