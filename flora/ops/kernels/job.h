// What the kernels are told of a batch: `cpu_kernels.py` writes it.

#pragma once

#include "lanes.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <deque>
#include <vector>

namespace {

constexpr int64_t kGrain = 16384;  // numbers for which a second thread is worth waking

// A row of the batch, as `table.py` writes it.
struct Row {
  int32_t first_copy;  // its copies stand together
  int32_t copies;
  int32_t first_page;  // Hadamard pages, one a copy; -1: unscaled
  int32_t first_rank;  // additive pages
  int32_t rank;
  int32_t bias;  // page; -1: the layer's own
};

// As a job holds them: `index` says which pages of the pool a batch takes; null: all, in order.
struct Pool {
  const void* pages;
  const int32_t* index;
  int64_t count;
  const at::BFloat16* centers;  // Hadamard pages': null where these lie as fp32
};

template <typename T>
struct Pages {
  const T* pages;
  const int32_t* index;
  int64_t last, width;

  Pages(const Pool& pool, int64_t width)
      : pages(static_cast<const T*>(pool.pages)), index(pool.index), last(pool.count - 1),
        width(width) {}

  // Of a page behind the last, which is only asked for early, that of the last.
  const T* operator[](int64_t page) const { return pages + place(page) * width; }

  int64_t place(int64_t page) const {
    page = std::min(page, last);
    return index ? index[page] : page;
  }
};

// A Hadamard page: in fp32, or in bf16 by how far each number lies off the page's center.
struct Scale {
  const float* exact;
  const at::BFloat16* offsets;
  float center;

  C10_ALWAYS_INLINE Step at(int64_t i, int64_t count) const {
    if (exact) return load(exact + i, count);
    const Step off = load(offsets + i, count);
    return {Lanes(center) + off.low, Lanes(center) + off.high};
  }

  void fetch_at(int64_t i) const { exact ? fetch(exact + i) : fetch(offsets + i); }
};

struct Scales {
  Pages<float> exact;
  Pages<at::BFloat16> offsets;
  const at::BFloat16* centers;

  Scales(const Pool& pool, int64_t width)
      : exact(pool, width), offsets(pool, width), centers(pool.centers) {}

  Scale operator[](int64_t page) const {
    if (!centers) return {exact[page], nullptr, 0};
    return {nullptr, offsets[page], float(centers[offsets.place(page)])};
  }
};

// The pages of one adapter in fp32, where they lie or copied once for all rows of W0.
struct Pairs {
  std::vector<const float*> b, a;

  Pairs(const Scales& in, const Scales& out, int64_t first, int64_t count) {
    for (int64_t j = 0; j < count; ++j)
      b.push_back(exact(in, first + j)), a.push_back(exact(out, first + j));
  }

  int64_t count() const { return b.size(); }

 private:
  std::deque<std::vector<float>> copies;

  const float* exact(const Scales& pages, int64_t number) {
    const Scale page = pages[number];
    if (page.exact) return page.exact;
    const int64_t width = pages.offsets.width;
    float* copy = copies.emplace_back(width).data();
    each_step(width, [&](int64_t i, int64_t n) { store(copy + i, page.at(i, n), n); });
    return copy;
  }
};

// What is the same at every step: `Job` in cpu_kernels.py keeps alive what it points to.
struct Job {
  const Row* rows;
  Pool b, a, down, up, biases;
  int64_t S, N, I, O;
  int64_t product_stride, y_stride;  // numbers from one token's outputs to the next one's
  int64_t dtype;  // of x and of all that has no type here: an index into `DTYPES`
};

inline int64_t bytes_of(int64_t dtype) { return dtype ? 2 : 4; }

// `numbers`: how many each of the `count` parts of the work takes.
template <typename Body>
void parallel_for(int64_t count, int64_t numbers, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, numbers));
  torch::stable::parallel_for(0, count, grain, body);
}

template <typename Body>
void dispatch(int64_t dtype, const Body& body) {
  switch (dtype) {
    case 0: return body(float{});
    case 1: return body(at::BFloat16{});
    default: return body(at::Half{});
  }
}

}  // namespace
