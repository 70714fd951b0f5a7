// One launch over many tensors, for any formula that maps the elements of K parallel arrays to new ones.
//
// The elements of all tensors are laid out in one space of *tiles*. A tile is what one warp moves with one vector
// per lane: 512 bytes of the widest array. Every tensor starts a tile of its own, shifted so that tiles begin
// at 128-byte lines of its first array; what is left over at either end is the tensor's lead and gap. The grid
// splits the tile space into one contiguous range per block, the block deals its range out to its warps tile by
// tile, and each warp finds its first tensor by one binary search and the next ones by walking on.
//
// This file needs neither CUDA nor torch: the kernel body is an ordinary function of (block, thread), so a CPU
// test runs every block and thread of any grid.
//
// A Formula is a class with
//   Elements    std::tuple of the arrays' element types
//   Value       the type it computes in
//   Launch      what all tensors of a launch share;  static bool skips(const Launch&): write nothing at all
//   Group       the hyper-parameters of one group of tensors, by value
//   Tensor      what a tensor brings beside its arrays, by value: mostly nothing
//   kStreamed   per array: read once and not soon again, so leave the caches to the others
//   kRealigned  per array: may lie at another alignment than the arrays written and still be read in vectors
//   Rule        what one tensor takes: made of (launch, group, tensor, branch); says reads<array>() and
//               writes<array>(); update(Value (&values)[arrays][n], element, stride) turns n elements into new
//               ones, the first being `element` of its tensor and each next one `stride` further, and where
//               `simple` holds, so does update_simple(), with fewer registers: else the tensor does without
//               vectors
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "kernels/host_device.h"

namespace torch_freeze::multi_tensor {

inline constexpr uint32_t kLanes = 32;
// Blocks of 128 threads: five of them on a multiprocessor leave 102 registers to each thread, which a kernel of
// three arrays needs, and small launches still spread over many multiprocessors.
inline constexpr uint32_t kWarps = 4;
inline constexpr uint32_t kThreads = kLanes * kWarps;
// Resident blocks per multiprocessor that the compiler must leave registers for, and vectors per array that a
// lane has under way at once: together they cover the memory latency (benchmarks/NOTES.md). With more arrays,
// fewer blocks have as many bytes under way, and their threads need more registers; most of all with the eight
// elements of a vector of 16-bit types.
constexpr int blocks_per_multiprocessor(int arrays, int vector) { return arrays <= 3 ? 5 : vector <= 4 ? 4 : 3; }
inline constexpr int kInFlight = 2;
inline constexpr int kVectorBytes = 16;
inline constexpr int kLineBytes = 128;
// Bytes of kernel parameters. A launch pays for copying all of them, hence the tiers; 32,764 is CUDA's limit.
inline constexpr int kSmallTable = 1024;
inline constexpr int kMediumTable = 8192;
inline constexpr int kLargeTable = 32760;
// Half of what a uint32_t counts, so that a step past the end cannot wrap: a terabyte of any one array.
inline constexpr int64_t kMaxTiles = int64_t{1} << 31;

template <class... Element>
constexpr int widest(std::tuple<Element...>*) {
  return std::max({static_cast<int>(sizeof(Element))...});
}

template <class Formula>
struct Shape {
  using Elements = typename Formula::Elements;
  static constexpr int kArrays = std::tuple_size_v<Elements>;
  template <int kArray>
  using Element = std::tuple_element_t<kArray, Elements>;
  template <int kArray>
  static constexpr int kSize = sizeof(Element<kArray>);

  // Elements of one vector: sixteen bytes of the widest array. A narrower one moves as many elements in
  // fewer bytes, so that every access of a warp stays one unbroken run.
  static constexpr int kVector = kVectorBytes / widest(static_cast<Elements*>(nullptr));
  static constexpr int kBlocksPerMultiprocessor = blocks_per_multiprocessor(kArrays, kVector);
  // Elements computed at once: sixteen bytes of results at most, whatever a vector of narrow types widens to, and
  // one double, whose division alone takes a score of registers.
  static constexpr int kPart = sizeof(typename Formula::Value) == 8 ? 1 : std::min(kVector, 4);
  static constexpr int kTile = kVector * static_cast<int>(kLanes);
  static_assert(kTile <= 256, "Row::gap counts the missing elements of a tile in a byte");
  static_assert(kVector * kSize<0> * static_cast<int>(kLanes) >= kLineBytes, "a lead must fit in one tile");
};

// What a tensor brings is a base because that takes no room where it is nothing.
template <class Formula>
struct Row : Formula::Tensor {
  void* array[Shape<Formula>::kArrays];
  uint32_t tile_end;  // the tile after this tensor's last; its first is the end of the row before
  uint16_t group;
  uint8_t branch;
  uint8_t gap;  // elements by which its last tile is not full
};

// Passed to the kernel by value. Rows grow from the front of one storage and groups from its back, so that one
// launch takes many tensors of few groups as well as fewer tensors of one group each.
template <class Formula_, int kBytes>
struct alignas(8) Table {
  using Formula = Formula_;
  using Group = typename Formula::Group;
  using Row = multi_tensor::Row<Formula>;
  static constexpr int kStorage =
      kBytes - static_cast<int>(sizeof(typename Formula::Launch)) - 4 * static_cast<int>(sizeof(uint32_t));

  typename Formula::Launch launch;
  uint32_t row_count;
  uint32_t group_count;
  uint32_t tiles_per_block;
  uint32_t longer_blocks;  // the first so many blocks take one tile more
  alignas(8) unsigned char storage[kStorage];

  TORCH_FREEZE_INLINE const Row& row(uint32_t index) const { return reinterpret_cast<const Row*>(storage)[index]; }
  TORCH_FREEZE_INLINE const Group& group(uint32_t index) const {
    return *reinterpret_cast<const Group*>(storage + kStorage - (index + 1) * sizeof(Group));
  }
  TORCH_FREEZE_INLINE uint32_t tile_count() const { return row(row_count - 1).tile_end; }
  TORCH_FREEZE_INLINE uint32_t first_tile(uint32_t block) const {
    return block * tiles_per_block + (block < longer_blocks ? block : longer_blocks);
  }

  // The host's side: nothing below runs on the device.
  bool has_room(bool new_group) const {
    return (row_count + 1) * sizeof(Row) + (group_count + (new_group ? 1 : 0)) * sizeof(Group) <= kStorage;
  }
  void add_group(const Group& group) {
    ++group_count;
    new (storage + kStorage - group_count * sizeof(Group)) Group(group);
  }
  void add_row(const Row& row) {
    new (storage + row_count * sizeof(Row)) Row(row);
    ++row_count;
  }
  // The blocks to launch, where `resident` fit the device at once: every warp has at least one tile.
  uint32_t useful_blocks(uint32_t resident) const { return std::min(resident, (tile_count() - 1) / kWarps + 1); }
  void spread_over(uint32_t blocks) {
    tiles_per_block = tile_count() / blocks;
    longer_blocks = tile_count() % blocks;
  }
};

namespace detail {

template <class Run, int... kArray>
TORCH_FREEZE_INLINE void for_arrays(Run&& run, std::integer_sequence<int, kArray...>) {
  (run(std::integral_constant<int, kArray>{}), ...);
}

// Elements between the 128-byte line in which a tensor's first array begins and that beginning.
template <class Formula>
TORCH_FREEZE_INLINE int32_t lead_of(const void* first_array) {
  return static_cast<int32_t>(reinterpret_cast<uintptr_t>(first_array) % kLineBytes) /
         Shape<Formula>::template kSize<0>;
}

// The kBytes that begin `shift` bytes into the two aligned words `low` and `high`; `shift` < kBytes, and even.
template <int kBytes>
TORCH_FREEZE_INLINE void realign(uint32_t (&low)[4], const uint32_t (&high)[4], uint32_t shift) {
  constexpr int kWords = kBytes / 4;
  uint32_t words[2 * kWords + 2] = {};
  TORCH_FREEZE_UNROLL
  for (int i = 0; i < kWords; ++i) {
    words[i] = low[i];
    words[kWords + i] = high[i];
  }
  // By powers of two, since registers have no index.
  TORCH_FREEZE_UNROLL
  for (int i = 0; i < 2 * kWords; ++i) {
    words[i] = (shift & 8) != 0 ? words[i + 2] : words[i];
  }
  TORCH_FREEZE_UNROLL
  for (int i = 0; i < 2 * kWords; ++i) {
    words[i] = (shift & 4) != 0 ? words[i + 1] : words[i];
  }
  TORCH_FREEZE_UNROLL
  for (int i = 0; i < kWords; ++i) {
    const uint64_t pair = static_cast<uint64_t>(words[i + 1]) << 32 | words[i];
    low[i] = static_cast<uint32_t>(pair >> ((shift & 2) * 8));
  }
}

// One tensor as a warp sees it.
template <class Formula>
struct Span {
  char* array[Shape<Formula>::kArrays];
  uint32_t shift[Shape<Formula>::kArrays];  // bytes by which the array's tiles miss its vectors' alignment
  int64_t numel;
  int32_t lead;
  uint32_t first;          // its first tile
  uint32_t vectors_begin;  // the tiles moved in vectors: full ones, where every array written is aligned
  uint32_t vectors_end;

  // The element at which `lane` starts in `tile`, each lane taking `stride` elements: negative in the lead.
  TORCH_FREEZE_INLINE int64_t element(uint32_t tile, uint32_t lane, int stride) const {
    return static_cast<int64_t>(tile - first) * Shape<Formula>::kTile - lead + static_cast<int64_t>(lane * stride);
  }
};

template <class Formula>
TORCH_FREEZE_INLINE Span<Formula> span_of(
    const typename Formula::Rule& rule, const Row<Formula>& row, uint32_t first) {
  using Of = Shape<Formula>;
  Span<Formula> span;
  span.first = first;
  span.lead = lead_of<Formula>(row.array[0]);
  span.numel = static_cast<int64_t>(row.tile_end - first) * Of::kTile - span.lead - row.gap;
  bool vectors = rule.simple;
  bool shifted = false;
  for_arrays(
      [&](auto index) {
        constexpr int kArray = decltype(index)::value;
        constexpr uint32_t kBytes = Of::kVector * Of::template kSize<kArray>;
        span.array[kArray] = static_cast<char*>(row.array[kArray]);
        span.shift[kArray] = 0;
        if (rule.template reads<kArray>() || rule.template writes<kArray>()) {
          const auto address = reinterpret_cast<uintptr_t>(row.array[kArray]);
          const uint32_t shift = static_cast<uint32_t>(address - span.lead * Of::template kSize<kArray>) % kBytes;
          span.shift[kArray] = shift;
          shifted |= shift != 0;
          vectors &= shift == 0 || (Formula::template kRealigned<kArray> && !rule.template writes<kArray>());
        }
      },
      std::make_integer_sequence<int, Of::kArrays>{});
  span.vectors_begin = first + (span.lead != 0 || shifted ? 1 : 0);
  span.vectors_end = row.tile_end - (row.gap != 0 || shifted ? 1 : 0);
  if (shifted && row.gap > Of::kTile - Of::kVector) {
    // A realigned vector reads up to the next one's end, which the last tile does not hold.
    --span.vectors_end;
  }
  if (!vectors) {
    span.vectors_end = span.vectors_begin;
  }
  return span;
}

// A tile element by element, each lane a column: as many bytes under way as in one vector per lane, and the
// same lines touched, in more accesses. For what is not full or not aligned.
template <class Formula, class Memory>
TORCH_FREEZE_INLINE void update_by_element(
    const typename Formula::Rule& rule, Memory& memory, const Span<Formula>& span, uint32_t tile, uint32_t lane) {
  using Of = Shape<Formula>;
  using Value = typename Formula::Value;
  const auto arrays = std::make_integer_sequence<int, Of::kArrays>{};
  const int64_t start = span.element(tile, lane, 1);
  // Of the lane's rows, those from `begin` to `end` are the tensor's.
  constexpr int64_t kStride = kLanes;
  const int32_t begin = start < 0 ? static_cast<int32_t>((-start + kStride - 1) / kStride) : 0;
  const int64_t left = start < span.numel ? (span.numel - start + kStride - 1) / kStride : 0;
  const int32_t end = left < Of::kVector ? static_cast<int32_t>(left) : Of::kVector;
  const auto inside = [&](int row) { return row >= begin && row < end; };
  uint32_t raw[Of::kArrays][Of::kVector][2];
  for_arrays(
      [&](auto index) {
        constexpr int kArray = decltype(index)::value;
        constexpr int kSize = Of::template kSize<kArray>;
        TORCH_FREEZE_UNROLL
        for (int i = 0; i < Of::kVector; ++i) {
          raw[kArray][i][0] = 0;
          raw[kArray][i][1] = 0;
          if (rule.template reads<kArray>() && inside(i)) {
            memory.template load<kSize, Formula::template kStreamed<kArray>>(
                span.array[kArray] + (start + i * kStride) * kSize, raw[kArray][i]);
          }
        }
      },
      arrays);
  TORCH_FREEZE_UNROLL
  for (int part = 0; part < Of::kVector; part += Of::kPart) {
    Value values[Of::kArrays][Of::kPart];
    for_arrays(
        [&](auto index) {
          constexpr int kArray = decltype(index)::value;
          TORCH_FREEZE_UNROLL
          for (int i = 0; i < Of::kPart; ++i) {
            typename Of::template Element<kArray> element;
            std::memcpy(&element, raw[kArray][part + i], sizeof(element));
            values[kArray][i] = static_cast<Value>(element);
          }
        },
        arrays);
    rule.update(values, start + part * kStride, kLanes);
    for_arrays(
        [&](auto index) {
          constexpr int kArray = decltype(index)::value;
          constexpr int kSize = Of::template kSize<kArray>;
          TORCH_FREEZE_UNROLL
          for (int i = 0; i < Of::kPart; ++i) {
            if (rule.template writes<kArray>() && inside(part + i)) {
              const auto element = static_cast<typename Of::template Element<kArray>>(values[kArray][i]);
              uint32_t out[2];
              std::memcpy(out, &element, kSize);
              memory.template store<kSize>(span.array[kArray] + (start + (part + i) * kStride) * kSize, out);
            }
          }
        },
        arrays);
  }
}

// Up to kInFlight full tiles, a block's warps apart, all loads before the first store. Returns the tile to go
// on with.
template <class Formula, class Memory>
TORCH_FREEZE_INLINE uint32_t update_by_vector(
    const typename Formula::Rule& rule, Memory& memory, const Span<Formula>& span, uint32_t tile, uint32_t end,
    uint32_t lane) {
  using Of = Shape<Formula>;
  using Value = typename Formula::Value;
  const auto arrays = std::make_integer_sequence<int, Of::kArrays>{};
  const int64_t start = span.element(tile, lane, Of::kVector);
  constexpr int64_t kStep = static_cast<int64_t>(kWarps) * Of::kTile;
  uint32_t raw[Of::kArrays][kInFlight][4];
  for_arrays(
      [&](auto index) {
        constexpr int kArray = decltype(index)::value;
        constexpr int kSize = Of::template kSize<kArray>;
        constexpr int kBytes = Of::kVector * kSize;
        if (rule.template reads<kArray>()) {
          // All others lie as the arrays written do.
          const uint32_t shift = Formula::template kRealigned<kArray> ? span.shift[kArray] : 0;
          const char* const from = span.array[kArray] + start * kSize - shift;
          TORCH_FREEZE_UNROLL
          for (int i = 0; i < kInFlight; ++i) {
            if (tile + i * kWarps < end) {
              memory.template load<kBytes, Formula::template kStreamed<kArray>>(
                  from + i * kStep * kSize, raw[kArray][i]);
            }
          }
        }
      },
      arrays);
  for_arrays(
      [&](auto index) {
        constexpr int kArray = decltype(index)::value;
        if constexpr (Formula::template kRealigned<kArray>) {
          constexpr int kSize = Of::template kSize<kArray>;
          constexpr int kBytes = Of::kVector * kSize;
          if (span.shift[kArray] != 0) {
            const char* const from = span.array[kArray] + start * kSize - span.shift[kArray] + kBytes;
            uint32_t high[kInFlight][4];
            TORCH_FREEZE_UNROLL
            for (int i = 0; i < kInFlight; ++i) {
              if (tile + i * kWarps < end) {
                memory.template load<kBytes, Formula::template kStreamed<kArray>>(
                    from + i * kStep * kSize, high[i]);
              }
            }
            TORCH_FREEZE_UNROLL
            for (int i = 0; i < kInFlight; ++i) {
              realign<kBytes>(raw[kArray][i], high[i], span.shift[kArray]);
            }
          }
        }
      },
      arrays);
  TORCH_FREEZE_UNROLL
  for (int i = 0; i < kInFlight; ++i) {
    if (tile >= end) {
      break;
    }
    tile += kWarps;
    TORCH_FREEZE_UNROLL
    for (int part = 0; part < Of::kVector; part += Of::kPart) {
      Value values[Of::kArrays][Of::kPart];
      for_arrays(
          [&](auto index) {
            constexpr int kArray = decltype(index)::value;
            using Element = typename Of::template Element<kArray>;
            if (rule.template reads<kArray>()) {
              Element elements[Of::kPart];
              std::memcpy(elements, raw[kArray][i] + part * sizeof(Element) / 4, sizeof(elements));
              TORCH_FREEZE_UNROLL
              for (int j = 0; j < Of::kPart; ++j) {
                values[kArray][j] = static_cast<Value>(elements[j]);
              }
            } else {
              TORCH_FREEZE_UNROLL
              for (int j = 0; j < Of::kPart; ++j) {
                values[kArray][j] = Value(0);
              }
            }
          },
          arrays);
      rule.update_simple(values, start + i * kStep + part, 1);
      for_arrays(
          [&](auto index) {
            constexpr int kArray = decltype(index)::value;
            using Element = typename Of::template Element<kArray>;
            if (rule.template writes<kArray>()) {
              Element elements[Of::kPart];
              TORCH_FREEZE_UNROLL
              for (int j = 0; j < Of::kPart; ++j) {
                elements[j] = static_cast<Element>(values[kArray][j]);
              }
              std::memcpy(raw[kArray][i] + part * sizeof(Element) / 4, elements, sizeof(elements));
            }
          },
          arrays);
    }
    for_arrays(
        [&](auto index) {
          constexpr int kArray = decltype(index)::value;
          constexpr int kSize = Of::template kSize<kArray>;
          if (rule.template writes<kArray>()) {
            memory.template store<Of::kVector * kSize>(
                span.array[kArray] + (start + i * kStep) * kSize, raw[kArray][i]);
          }
        },
        arrays);
  }
  return tile;
}

template <class Table>
TORCH_FREEZE_INLINE uint32_t row_of_tile(const Table& table, uint32_t tile) {
  uint32_t low = 0;
  uint32_t high = table.row_count - 1;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (table.row(middle).tile_end <= tile) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace detail

// The kernel: what `thread` of `block` does. `memory` loads and stores raw bytes.
template <class Table, class Memory>
TORCH_FREEZE_INLINE void update_block(const Table& table, Memory& memory, uint32_t block, uint32_t thread) {
  using Formula = typename Table::Formula;
  const uint32_t lane = thread % kLanes;
  const uint32_t end = table.first_tile(block + 1);
  uint32_t tile = table.first_tile(block) + thread / kLanes;
  if (tile >= end) {
    return;
  }
  uint32_t row = detail::row_of_tile(table, tile);
  if (Formula::skips(table.launch)) {
    return;
  }
  while (true) {
    const auto& tensor = table.row(row);
    const uint32_t span_end = tensor.tile_end < end ? tensor.tile_end : end;
    const typename Formula::Rule rule(table.launch, table.group(tensor.group), tensor, tensor.branch);
    const auto span = detail::span_of<Formula>(rule, tensor, row == 0 ? 0 : table.row(row - 1).tile_end);
    const uint32_t vectors_end = span.vectors_end < span_end ? span.vectors_end : span_end;
    while (tile < span_end) {
      if (tile >= span.vectors_begin && tile < vectors_end) {
        tile = detail::update_by_vector<Formula>(rule, memory, span, tile, vectors_end, lane);
      } else {
        detail::update_by_element<Formula>(rule, memory, span, tile, lane);
        tile += kWarps;
      }
    }
    if (tile >= end) {
      return;
    }
    do {
      ++row;
    } while (table.row(row).tile_end <= tile);
  }
}

namespace detail {

template <class Table, class Source, class Launch>
void fill_and_launch(const Source& source, int64_t& next, Launch&& launch) {
  using Formula = typename Table::Formula;
  using Of = Shape<Formula>;
  Table table;  // left as it is where no row is written: clearing it would cost more than filling it
  table.launch = source.launch();
  table.row_count = 0;
  table.group_count = 0;
  int64_t tiles = 0;
  int64_t last_group = -1;
  for (; next < source.count(); ++next) {
    const int64_t numel = source.numel(next);
    if (numel == 0) {
      continue;
    }
    typename Table::Row row;
    source.fill(next, row);
    const int64_t group = source.group_of(next);
    const int64_t slots = lead_of<Formula>(row.array[0]) + numel;
    const int64_t own = (slots - 1) / Of::kTile + 1;
    if (own > kMaxTiles) {
      throw std::length_error("a tensor of " + std::to_string(numel) + " elements is too large for one launch");
    }
    if (!table.has_room(group != last_group) || tiles + own > kMaxTiles) {
      break;
    }
    if (group != last_group) {
      table.add_group(source.group(group));
      last_group = group;
    }
    tiles += own;
    row.tile_end = static_cast<uint32_t>(tiles);
    row.group = static_cast<uint16_t>(table.group_count - 1);
    row.gap = static_cast<uint8_t>(own * Of::kTile - slots);
    table.add_row(row);
  }
  if (table.row_count != 0) {
    launch(table);
  }
}

}  // namespace detail

// Packs the tensors of `source`, in order, into as few tables as hold them, each of the smallest tier that
// does, and calls `launch(table)` for each. A Source has launch(), count(), group_count(), numel(tensor),
// group_of(tensor), group(index), and fill(tensor, row), which writes the row's arrays, branch and Tensor. Tensors
// of one group are best kept together: a group is written again whenever it changes.
template <class Formula, class Source, class Launch>
void for_each_table(const Source& source, Launch&& launch) {
  using Small = Table<Formula, kSmallTable>;
  using Medium = Table<Formula, kMediumTable>;
  using Large = Table<Formula, kLargeTable>;
  static_assert(sizeof(Small) == kSmallTable && sizeof(Medium) == kMediumTable && sizeof(Large) == kLargeTable);
  int64_t next = 0;
  while (next < source.count()) {
    const int64_t left = source.count() - next;
    const int64_t bytes =
        left * static_cast<int64_t>(sizeof(typename Large::Row)) +
        std::min(left, source.group_count()) * static_cast<int64_t>(sizeof(typename Large::Group));
    if (bytes <= Small::kStorage) {
      detail::fill_and_launch<Small>(source, next, launch);
    } else if (bytes <= Medium::kStorage) {
      detail::fill_and_launch<Medium>(source, next, launch);
    } else {
      detail::fill_and_launch<Large>(source, next, launch);
    }
  }
}

}  // namespace torch_freeze::multi_tensor
