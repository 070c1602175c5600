// W0 as an adapter modulates it, by blocks of its rows, and the gradients of the Hadamard factors.

#pragma once

#include "job.h"
#include "product.h"

#include <algorithm>

namespace {

constexpr int64_t kRows = 4;             // of W0, which share what is loaded of the factors
constexpr int64_t kColumns = 512;        // of it: as many as the fastest cache holds of a few rows
constexpr int64_t kBlock = 1 << 18;      // bytes of a modulated W0 that a thread's own cache holds
constexpr int64_t kMostBlock = 1 << 21;  // where so many tokens share it that their passes count
constexpr int64_t kBlockRows = 64;       // of it at least, as products of fewer are slow

// Σ_j a_j[o] b_j times W0, for R rows of it from o on.
template <int64_t R, typename T>
void modulate_rows(const T* weight, const Pairs& pairs, int64_t o, T* to, int64_t I) {
  each_step(I, [&](int64_t i, int64_t n) {
    Step sums[R];
    for (auto& sum : sums) sum = {Lanes(0), Lanes(0)};
    for (int64_t j = 0; j < pairs.count(); ++j) {
      const Step b = load(pairs.b[j] + i, n);
      for (int64_t r = 0; r < R; ++r) {
        const Lanes a(pairs.a[j][o + r]);
        add_product(sums[r], {a, a}, b);
      }
    }
    for (int64_t r = 0; r < R; ++r) {
      const Step w = load(weight + r * I + i, n);
      store(to + r * I + i, Step{sums[r].low * w.low, sums[r].high * w.high}, n);
    }
  });
}

// Of R rows from o on, and of the columns that a thread's fastest cache holds: G ∘ W0, and from it
// each page's part of da = (G ∘ W0) b and db = (G ∘ W0)ᵀ a.
template <int64_t R, typename T>
void gradient_rows(const T* gradient, const T* weight, const Pairs& pairs, int64_t o, float* din,
                   float* dout, int64_t O, int64_t I) {
  float products[R][kColumns];
  for (int64_t first = 0; first < I; first += kColumns) {
    const int64_t width = std::min(kColumns, I - first);
    each_step(width, [&](int64_t i, int64_t n) {
      for (int64_t r = 0; r < R; ++r) {
        const Step g = load(gradient + r * I + first + i, n), w = load(weight + r * I + first + i, n);
        store(products[r] + i, Step{g.low * w.low, g.high * w.high}, n);
      }
    });
    for (int64_t j = 0; j < pairs.count(); ++j) {
      Step a[R], sums[R];
      for (int64_t r = 0; r < R; ++r) {
        a[r] = {Lanes(pairs.a[j][o + r]), Lanes(pairs.a[j][o + r])};
        sums[r] = {Lanes(0), Lanes(0)};
      }
      each_step(width, [&](int64_t i, int64_t n) {
        const Step b = load(pairs.b[j] + first + i, n);
        Step db = load(din + j * I + first + i, n);
        for (int64_t r = 0; r < R; ++r) {
          const Step product = load(products[r] + i, n);
          add_product(sums[r], product, b);
          add_product(db, product, a[r]);
        }
        store(din + j * I + first + i, db, n);
      });
      for (int64_t r = 0; r < R; ++r) dout[j * O + o + r] += total(sums[r]);
    }
  }
}

// Of one row's tokens and `width` of its features: dv = dy ∘ page, and Σ dy ∘ v over the tokens.
template <typename T>
void scale_gradients_of(const T* dy, const T* v, const Scale& page, int64_t first, T* dv,
                        float* sums, int64_t N, int64_t stride, int64_t width) {
  std::fill_n(sums, width, 0.0f);
  for (int64_t n = 0; n < N; ++n, dy += stride, v += stride, dv += stride) {
    each_step(width, [&](int64_t i, int64_t count) {
      const Step d = load(dy + i, count), p = page.at(first + i, count);
      Step sum = load(sums + i, count);
      add_product(sum, d, load(v + i, count));
      store(sums + i, sum, count);
      store(dv + i, Step{d.low * p.low, d.high * p.high}, count);
    });
  }
}

// W0 ∘ (Σ_j a_j b_jᵀ), rounded once to W0's type: `rows` of it from o on.
template <typename T>
void modulate_block(const T* weight, const Pairs& pairs, int64_t o, int64_t rows, T* to, int64_t I) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    modulate_rows<kRows>(weight + (o + r) * I, pairs, o + r, to + r * I, I);
  for (; r < rows; ++r) modulate_rows<1>(weight + (o + r) * I, pairs, o + r, to + r * I, I);
}

void modulate(const Job& job, int64_t first_page, int64_t pages, const void* weight, void* to) {
  dispatch(job.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t I = job.I, O = job.O;
    const Pairs pairs({job.b, I}, {job.a, O}, first_page, pages);
    const int64_t blocks = (O + kRows - 1) / kRows;
    parallel_for(blocks, kRows * I, [&](int64_t begin, int64_t end) {
      const int64_t o = begin * kRows, rows = std::min(end * kRows, O) - o;
      modulate_block(static_cast<const T*>(weight), pairs, o, rows, static_cast<T*>(to) + o * I, I);
    });
  });
}

// copies [C, I] through a modulated W0 -> to [C, O], `stride` numbers from row to row. A thread
// multiplies by some rows of W0 as soon as it has modulated them: they are in its own cache, and no
// other thread ever asks for them.
void multiply_modulated(const Job& job, int64_t first_page, int64_t pages, const void* weight,
                        const void* copies, int64_t count, void* to, int64_t stride) {
  dispatch(job.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t I = job.I, O = job.O, threads = torch::stable::get_num_threads();
    const Pairs pairs({job.b, I}, {job.a, O}, first_page, pages);
    const int64_t bytes = I * sizeof(T);
    const int64_t most = std::max({kBlockRows, kBlock / bytes, std::min(count, kMostBlock / bytes)});
    // As many blocks for each thread, of whole groups of rows.
    const int64_t share = (O + threads - 1) / threads, each = (share + most - 1) / most;
    const int64_t even = (O + threads * each - 1) / (threads * each);
    const int64_t rows = (even + kRows - 1) / kRows * kRows;
    const Tensor x = matrix(copies, count, I, I, job.dtype);
    torch::stable::parallel_for(0, (O + rows - 1) / rows, 1, [&](int64_t begin, int64_t end) {
      thread_local Scratch kept;
      T* modulated = static_cast<T*>(kept.get(rows * bytes));
      for (int64_t o = begin * rows; o < std::min(end * rows, O); o += rows) {
        const int64_t own = std::min(rows, O - o);
        modulate_block(static_cast<const T*>(weight), pairs, o, own, modulated, I);
        multiply(x, matrix(modulated, own, I, I, job.dtype), std::nullopt,
                 matrix(static_cast<T*>(to) + o, count, own, stride, job.dtype));
      }
    });
  });
}

// da and db of a modulated W0, from G = dYᵀ X `[O, I]`. din `[chunks, pages, I]` is to be summed over
// the chunks of W0's rows: in this order each time, however many threads there are; dout `[pages, O]`.
// Both begin with zeros.
void modulation_gradients(const Job& job, int64_t first_page, int64_t pages, int64_t chunks,
                          const void* gradient, const void* weight, float* din, float* dout) {
  dispatch(job.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t I = job.I, O = job.O, rows = (O + chunks - 1) / chunks;
    const Pairs pairs({job.b, I}, {job.a, O}, first_page, pages);
    parallel_for(chunks, rows * I, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t last = std::min((chunk + 1) * rows, O);
        float* sums = din + chunk * pages * I;
        const auto* g = static_cast<const T*>(gradient);
        const auto* w = static_cast<const T*>(weight);
        int64_t o = chunk * rows;
        for (; o + kRows <= last; o += kRows)
          gradient_rows<kRows>(g + o * I, w + o * I, pairs, o, sums, dout, O, I);
        for (; o < last; ++o)
          gradient_rows<1>(g + o * I, w + o * I, pairs, o, sums, dout, O, I);
      }
    });
  });
}

// The backward of v ∘ page for rows of one copy each: dv [S, N, W] = dy ∘ page, and sums [S, W] =
// Σ dy ∘ v over a row's tokens. W is O for `of_out`, and I for the other side.
void scale_gradients(const Job& job, int64_t of_out, const void* dy, const void* v, void* dv,
                     float* sums) {
  dispatch(job.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t N = job.N, W = of_out ? job.O : job.I;
    const Scales pages(of_out ? job.a : job.b, W);
    const int64_t blocks = (W + kColumns - 1) / kColumns;
    parallel_for(job.S * blocks, N * kColumns, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t s = block / blocks, first = block % blocks * kColumns;
        const int64_t width = std::min(kColumns, W - first), at = s * N * W + first;
        const auto *from = static_cast<const T*>(dy) + at, *by = static_cast<const T*>(v) + at;
        T* to = static_cast<T*>(dv) + at;
        float* own = sums + s * W + first;
        if (const int64_t page = job.rows[s].first_page; page >= 0) {
          scale_gradients_of(from, by, pages[page], first, to, own, N, W, width);
        } else {
          std::fill_n(own, width, 0.0f);
          for (int64_t n = 0; n < N; ++n) std::copy_n(from + n * W, width, to + n * W);
        }
      }
    });
  });
}

}  // namespace
