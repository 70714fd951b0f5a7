// A module for the tests: the body of the CUDA kernel on the CPU, thread after thread of block after block of any
// grid, so that its tests need no GPU; and the CPU's kernel on the same description of tensors, to compare it
// with.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kernels/launch_cpu.h"
#include "kernels/tile_formula.h"
#include "optim/sgd.h"

namespace py = pybind11;
using namespace py::literals;

namespace torch_freeze {
namespace {

// (param, grad, momentum, numel, group, index, fresh); pointers as integers.
using Update = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int32_t, uint32_t, bool>;
// (lr, momentum, dampening, weight_decay, nesterov, maximize, device_lr, device_lr_is_double, rounding_seed)
using Group = std::tuple<double, double, double, double, bool, bool, uintptr_t, bool, uint64_t>;
// (address, bytes, bytes per access, whether it is a store)
using Access = std::tuple<uintptr_t, int64_t, int, bool>;
using Dtypes = std::tuple<std::string, std::string, std::string>;

c10::ScalarType scalar_type(const std::string& name) {
  static const std::map<std::string, c10::ScalarType> kTypes = {
      {"float32", c10::kFloat}, {"float64", c10::kDouble}, {"bfloat16", c10::kBFloat16}, {"float16", c10::kHalf}};
  const auto found = kTypes.find(name);
  if (found == kTypes.end()) {
    throw py::value_error("kernel on host: no dtype " + name);
  }
  return found->second;
}

BatchKind kind_of(const Dtypes& dtypes, bool stochastic) {
  return {
      c10::kCPU, scalar_type(std::get<0>(dtypes)), scalar_type(std::get<1>(dtypes)),
      scalar_type(std::get<2>(dtypes)), stochastic};
}

class Batch {
 public:
  Batch(
      const std::vector<Update>& updates, const std::vector<Group>& groups, const Dtypes& dtypes,
      uintptr_t grad_scale, uintptr_t found_inf, bool stochastic) {
    for (const auto& [param, grad, momentum, numel, group, index, fresh] : updates) {
      updates_.push_back(
          {{},
           reinterpret_cast<void*>(param),
           reinterpret_cast<void*>(grad),
           {reinterpret_cast<void*>(momentum)},
           numel,
           group,
           index,
           fresh});
      batch_.numel += numel;
    }
    for (const auto& [lr, momentum, dampening, weight_decay, nesterov, maximize, device_lr, is_double, seed] :
         groups) {
      SgdGroup group;
      group.lr = {lr, reinterpret_cast<const void*>(device_lr), is_double};
      group.momentum = momentum;
      group.undamped = 1.0 - dampening;
      group.weight_decay = weight_decay;
      group.nesterov = nesterov;
      group.maximize = maximize;
      group.rounding_seed = seed;
      groups_.push_back(group);
    }
    batch_.kind = kind_of(dtypes, stochastic);
    batch_.updates = updates_.data();
    batch_.count = static_cast<int64_t>(updates_.size());
    batch_.groups = groups_.data();
    batch_.group_count = static_cast<int64_t>(groups_.size());
    batch_.grad_scale = reinterpret_cast<const float*>(grad_scale);
    batch_.found_inf = reinterpret_cast<const float*>(found_inf);
  }
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  const SgdBatch& get() const { return batch_; }

  // Calls `run(table, blocks)` for each launch of a device on which `resident` blocks run at once.
  template <class Run>
  void for_each_launch(uint32_t resident, Run&& run) const {
    const bool known = for_each_table<SgdFormula>(batch_, nullptr, [&](auto& table) {
      const uint32_t blocks = table.useful_blocks(resident);
      table.spread_over(blocks);
      run(table, blocks);
    });
    if (!known) {
      throw py::type_error("kernel on host: no kernel for these dtypes");
    }
  }

 private:
  std::vector<SgdBatch::Update> updates_;
  std::vector<SgdGroup> groups_;
  SgdBatch batch_;
};

// A GPU stops at an access that is not aligned to its own size.
template <int kBytes>
void check_alignment(const char* address) {
  if (reinterpret_cast<uintptr_t>(address) % kBytes != 0) {
    throw std::logic_error("kernel on host: an access of " + std::to_string(kBytes) + " bytes is misaligned");
  }
}

struct HostMemory {
  template <int kBytes, bool kStreamed>
  void load(const char* from, uint32_t* raw) const {
    check_alignment<kBytes>(from);
    std::memcpy(raw, from, kBytes);
  }
  template <int kBytes>
  void store(char* to, const uint32_t* raw) const {
    check_alignment<kBytes>(to);
    std::memcpy(to, raw, kBytes);
  }
};

// Notes the accesses and makes none: the tensors need not exist.
class RecordedMemory {
 public:
  template <int kBytes, bool kStreamed>
  void load(const char* from, uint32_t* raw) {
    note<kBytes>(from, false);
    std::memset(raw, 0, kBytes);
  }
  template <int kBytes>
  void store(char* to, const uint32_t*) {
    note<kBytes>(to, true);
  }

  // In order of address for each kind; accesses that meet end to end become one, those that overlap do not.
  std::vector<Access> runs() {
    std::sort(accesses_.begin(), accesses_.end(), [](const Access& a, const Access& b) {
      return std::tuple(std::get<3>(a), std::get<2>(a), std::get<0>(a)) <
             std::tuple(std::get<3>(b), std::get<2>(b), std::get<0>(b));
    });
    std::vector<Access> runs;
    for (const Access& access : accesses_) {
      const auto [address, bytes, width, store] = access;
      if (!runs.empty()) {
        auto& [run_address, run_bytes, run_width, run_store] = runs.back();
        if (run_store == store && run_width == width && run_address + run_bytes == address) {
          run_bytes += bytes;
          continue;
        }
      }
      runs.push_back(access);
    }
    return runs;
  }

 private:
  template <int kBytes>
  void note(const char* address, bool store) {
    check_alignment<kBytes>(address);
    accesses_.emplace_back(reinterpret_cast<uintptr_t>(address), kBytes, kBytes, store);
  }

  std::vector<Access> accesses_;
};

// How many blocks to run: the chosen ones, or all.
uint32_t chosen_count(const std::optional<std::vector<uint32_t>>& chosen, uint32_t blocks) {
  if (!chosen) {
    return blocks;
  }
  for (const uint32_t block : *chosen) {
    if (block >= blocks) {
      throw py::index_error("kernel on host: no block " + std::to_string(block) + " of " + std::to_string(blocks));
    }
  }
  return static_cast<uint32_t>(chosen->size());
}

std::vector<py::dict> step(
    const std::vector<Update>& updates, const std::vector<Group>& groups, const Dtypes& dtypes, uint32_t resident,
    uintptr_t grad_scale, uintptr_t found_inf, bool backwards, bool stochastic,
    const std::optional<std::vector<uint32_t>>& chosen) {
  const Batch batch(updates, groups, dtypes, grad_scale, found_inf, stochastic);
  std::vector<py::dict> launches;
  batch.for_each_launch(resident, [&](const auto& table, uint32_t blocks) {
    HostMemory memory;
    const uint32_t count = chosen_count(chosen, blocks);
    const uint32_t threads = count * multi_tensor::kThreads;
    for (uint32_t i = 0; i < threads; ++i) {
      const uint32_t thread = backwards ? threads - 1 - i : i;
      const uint32_t block = thread / multi_tensor::kThreads;
      multi_tensor::update_block(
          table, memory, chosen ? (*chosen)[block] : block, thread % multi_tensor::kThreads);
    }
    launches.push_back(
        py::dict(
            "parameter_bytes"_a = sizeof(table), "tensors"_a = table.row_count, "groups"_a = table.group_count,
            "blocks"_a = blocks, "table"_a = py::bytes(reinterpret_cast<const char*>(&table), sizeof(table))));
  });
  return launches;
}

std::vector<Access> accesses(
    const std::vector<Update>& updates, const std::vector<Group>& groups, const Dtypes& dtypes, uint32_t resident,
    const std::optional<std::vector<uint32_t>>& chosen, uintptr_t grad_scale, bool stochastic) {
  const Batch batch(updates, groups, dtypes, grad_scale, 0, stochastic);
  RecordedMemory memory;
  batch.for_each_launch(resident, [&](const auto& table, uint32_t blocks) {
    const uint32_t count = chosen_count(chosen, blocks);
    for (uint32_t i = 0; i < count; ++i) {
      for (uint32_t thread = 0; thread < multi_tensor::kThreads; ++thread) {
        multi_tensor::update_block(table, memory, chosen ? (*chosen)[i] : i, thread);
      }
    }
  });
  return memory.runs();
}

void cpu_step(
    const std::vector<Update>& updates, const std::vector<Group>& groups, const Dtypes& dtypes,
    uintptr_t grad_scale, uintptr_t found_inf, bool stochastic) {
  launch_cpu<SgdFormula>(Batch(updates, groups, dtypes, grad_scale, found_inf, stochastic).get());
}

// How many tensors a table of each tier holds where they have `groups` groups.
std::vector<std::tuple<int, int64_t>> capacities(const Dtypes& dtypes, int64_t groups, bool stochastic) {
  std::vector<std::tuple<int, int64_t>> tiers;
  const auto add = [&](auto* tier) {
    using Table = std::remove_pointer_t<decltype(tier)>;
    const auto room = Table::kStorage - groups * static_cast<int64_t>(sizeof(typename Table::Group));
    tiers.emplace_back(static_cast<int>(sizeof(Table)), room / static_cast<int64_t>(sizeof(typename Table::Row)));
  };
  with_dtypes(kind_of(dtypes, stochastic), [&](auto types) {
    using Formula = TileFormula<SgdFormula, decltype(types)>;
    add(static_cast<multi_tensor::Table<Formula, multi_tensor::kSmallTable>*>(nullptr));
    add(static_cast<multi_tensor::Table<Formula, multi_tensor::kMediumTable>*>(nullptr));
    add(static_cast<multi_tensor::Table<Formula, multi_tensor::kLargeTable>*>(nullptr));
  });
  return tiers;
}

}  // namespace
}  // namespace torch_freeze

PYBIND11_MODULE(_kernel_on_host, module) {
  module.doc() = "The kernels' bodies on descriptions of tensors, for the tests.";
  module.def(
      "step", &torch_freeze::step, "updates"_a, "groups"_a, "dtypes"_a, "resident"_a, py::kw_only(),
      "grad_scale"_a = 0, "found_inf"_a = 0, "backwards"_a = false, "stochastic"_a = false,
      "chosen"_a = py::none(),
      "The CUDA step on tensors in host memory, by all blocks of each launch or by the chosen ones; what each "
      "launch was.");
  module.def(
      "accesses", &torch_freeze::accesses, "updates"_a, "groups"_a, "dtypes"_a, "resident"_a,
      "chosen"_a = py::none(), py::kw_only(), "grad_scale"_a = 0, "stochastic"_a = false,
      "What the chosen blocks of each launch, or all of them, would load and store.");
  module.def(
      "capacities", &torch_freeze::capacities, "dtypes"_a, "groups"_a, py::kw_only(), "stochastic"_a = false,
      "(bytes of kernel parameters, tensors that fit) of each table.");
  module.def(
      "cpu_step", &torch_freeze::cpu_step, "updates"_a, "groups"_a, "dtypes"_a, py::kw_only(), "grad_scale"_a = 0,
      "found_inf"_a = 0, "stochastic"_a = false, "The CPU's own step on the same description of tensors.");
}
