// Stochastic rounding to bfloat16. Added to an fp32 value, sixteen random bits carry into the bits that bfloat16
// keeps with the probability of what is cut off then, so that the expected result is the value itself: to either
// neighbour, never past it, and what bfloat16 holds exactly (zeros, infinities) stays. Between the largest finite
// bfloat16 and 2^128 the upper neighbour is infinity, as it is for rounding to nearest.
//
// The bits are a function of seed, parameter and element alone: nothing is stored, and the order of threads,
// blocks or instructions makes no difference.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/host_device.h"

namespace torch_freeze {

// Stafford's thirteenth variant of MurmurHash3's finaliser, as in Java's SplittableRandom
// (doi 10.1145/2660193.2660195).
TORCH_FREEZE_INLINE uint64_t mix_bits(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// What the bits of one tensor's elements start from, and what they go on by.
struct RoundingKey {
  uint32_t start;
  uint32_t step;  // odd, so that 2^32 elements differ
};

// The seed is mixed before the index comes in: else seeds an odd constant apart would share their tensors' keys.
TORCH_FREEZE_INLINE RoundingKey rounding_key(uint64_t seed, uint32_t index) {
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
  const uint64_t key = mix_bits(mix_bits(seed + kGolden) + (index + uint64_t{1}) * kGolden);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32) | 1u};
}

// The same for the k-th buffer of a tensor.
TORCH_FREEZE_INLINE RoundingKey buffer_key(const RoundingKey& key, int k) {
  return {key.start ^ static_cast<uint32_t>(k) * 0x9e3779b9u, key.step ^ static_cast<uint32_t>(k) * 0x85ebca6au};
}

// Sixteen bits for the element at `high` * 2^32 + `low` in its tensor's memory. Two rounds of a shift and of
// x (2x + 1), which permutes the 32-bit numbers; a multiplication by a constant, as cheap, lets neighbours differ
// by the same amount again and again.
TORCH_FREEZE_INLINE uint32_t rounding_bits(const RoundingKey& key, uint32_t low, uint32_t high) {
  uint32_t x = key.start + low * key.step;
  x ^= x >> 16;
  x *= 2 * x + 1;
  x += high * 0x9e3779b9u;
  x ^= x >> 15;
  x *= 2 * x + 1;
  return x >> 16;
}

// The bits of `value` rounded to bfloat16 by sixteen random bits; every NaN becomes the quiet one.
TORCH_FREEZE_INLINE uint32_t round_to_bfloat16(float value, uint32_t random) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return value != value ? 0x7fc0u : (bits + random) >> 16;
}

}  // namespace torch_freeze
