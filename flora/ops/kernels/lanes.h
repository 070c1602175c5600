// Rows of numbers, some lanes at a time: ATen's vectors, whose instructions the build chooses (DEFAULT,
// AVX2, AVX512). Numbers of 16 bits are computed with in fp32 and rounded once.

#pragma once

#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <type_traits>

namespace {

using at::vec::Vectorized;
using Lanes = Vectorized<float>;

constexpr int64_t kLanes = Lanes::size();
constexpr int64_t kStep = 2 * kLanes;  // one vector of 16-bit numbers
constexpr int64_t kLine = 64;          // bytes that memory gives at once

struct Step {
  Lanes low, high;
};

// `count` numbers, kStep but at the end of a row, where zeros fill up.
template <typename T>
C10_ALWAYS_INLINE Step load(const T* from, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    if (count == kStep) return {Lanes::loadu(from), Lanes::loadu(from + kLanes)};
    if (count <= kLanes) return {Lanes::loadu(from, count), Lanes(0)};
    return {Lanes::loadu(from), Lanes::loadu(from + kLanes, count - kLanes)};
  } else {
    const auto numbers =
        count == kStep ? Vectorized<T>::loadu(from) : Vectorized<T>::loadu(from, count);
    const auto [low, high] = at::vec::convert_to_float<T>(numbers);
    return {low, high};
  }
}

template <typename T>
C10_ALWAYS_INLINE void store(T* to, const Step& step, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    step.low.store(to, std::min(count, kLanes));
    if (count > kLanes) step.high.store(to + kLanes, count - kLanes);
#ifdef __AVX512BF16__
  } else if constexpr (std::is_same_v<T, at::BFloat16>) {
    // One instruction, where ATen rounds by hand in a dozen.
    const auto numbers = (__m512i)_mm512_cvtne2ps_pbh(step.high, step.low);
    _mm512_mask_storeu_epi16(to, __mmask32((uint64_t{1} << count) - 1), numbers);
#endif
  } else {
    at::vec::convert_from_float<T>(step.low, step.high).store(to, count);
  }
}

C10_ALWAYS_INLINE void add_product(Step& sum, const Step& a, const Step& b) {
  sum.low = at::vec::fmadd(a.low, b.low, sum.low);
  sum.high = at::vec::fmadd(a.high, b.high, sum.high);
}

// A row's factors are mostly read by no other row: so ask early for the pages that come next.
template <typename T>
C10_ALWAYS_INLINE void fetch(const T* from) {
  for (int64_t byte = 0; byte < kStep * int64_t(sizeof(T)); byte += kLine)
    __builtin_prefetch(reinterpret_cast<const char*>(from) + byte, 0, 2);
}

template <typename Body>
inline void each_step(int64_t width, const Body& body) {
  int64_t at = 0;
  for (; at + kStep <= width; at += kStep) body(at, kStep);
  if (at < width) body(at, width - at);
}

inline float total(const Step& step) {
  return at::vec::vec_reduce_all<float>(
      [](const Lanes& x, const Lanes& y) { return x + y; }, step.low + step.high);
}

}  // namespace
