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

// W0 [O, I], contiguous, from one of its columns on, and as many of them as are asked for.
template <typename T>
struct Columns {
  const T* weight;
  int64_t I, first, width;
};

// Σ_j a_j[o] b_j times W0, for R rows of it from o on -> to [R, width].
template <int64_t R, typename T>
void modulate_rows(const Columns<T>& of, const Pairs& pairs, int64_t o, T* to) {
  const int64_t I = of.I, first = of.first, width = of.width;
  const T* const weight = of.weight + o * I + first;
  each_step(width, [&](int64_t i, int64_t n) {
    Step sums[R];
    for (auto& sum : sums) sum = {Lanes(0), Lanes(0)};
    for (int64_t j = 0; j < pairs.count(); ++j) {
      const Step b = load(pairs.b[j] + first + i, n);
      for (int64_t r = 0; r < R; ++r) {
        const Lanes a(pairs.a[j][o + r]);
        add_product(sums[r], {a, a}, b);
      }
    }
    for (int64_t r = 0; r < R; ++r) {
      const Step w = load(weight + r * I + i, n);
      store(to + r * width + i, Step{sums[r].low * w.low, sums[r].high * w.high}, n);
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

// W0 ∘ (Σ_j a_j b_jᵀ), rounded once to W0's type: `rows` of it from o on -> to [rows, width].
template <typename T>
void modulate_block(const Columns<T>& of, const Pairs& pairs, int64_t o, int64_t rows, T* to) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) modulate_rows<kRows>(of, pairs, o + r, to + r * of.width);
  for (; r < rows; ++r) modulate_rows<1>(of, pairs, o + r, to + r * of.width);
}

// A thread's own, for one block after the other.
inline Scratch& block_scratch() {
  thread_local Scratch kept;
  return kept;
}

// W0's `count` rows, or columns, of `numbers` each, in blocks that a thread works on for so many
// tokens, one at a time: body(the thread's part of all, first, how many, memory for them).
template <typename T, typename Body>
void each_block(int64_t count, int64_t group, int64_t numbers, int64_t tokens, const Body& body) {
  const int64_t bytes = numbers * sizeof(T), fitting = std::min(tokens, kMostBlock / bytes);
  const int64_t most = std::max({kBlockRows, kBlock / bytes, fitting});
  const int64_t groups = (count + group - 1) / group;
  const int64_t parts = std::min<int64_t>(groups, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t start = groups * part / parts * group;
      const int64_t last = std::min(groups * (part + 1) / parts * group, count);
      const int64_t own = last - start, blocks = (own + most - 1) / most;
      const int64_t block = ((own + blocks - 1) / blocks + group - 1) / group * group;
      T* memory = static_cast<T*>(block_scratch().get(block * bytes));
      for (int64_t first = start; first < last; first += block)
        body(part, first, std::min(block, last - first), memory);
    }
  });
}

// x [C, I] through a modulated W0 -> to [C, O], `stride` numbers from row to row. A thread multiplies
// by some rows of W0 as soon as it has modulated them: they are in its own cache, and no other thread
// ever asks for them.
void multiply_modulated(const Job& job, int64_t first_page, int64_t pages, const void* weight,
                        const void* x, int64_t count, void* to, int64_t stride) {
  dispatch(job.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t I = job.I, O = job.O;
    const Pairs pairs({job.b, I}, {job.a, O}, first_page, pages);
    const Columns<T> all{static_cast<const T*>(weight), I, 0, I};
    const Tensor x_CI = matrix(x, count, I, I, job.dtype);
    each_block<T>(O, kRows, I, count, [&](int64_t, int64_t o, int64_t own, T* modulated) {
      modulate_block(all, pairs, o, own, modulated);
      multiply(x_CI, matrix(modulated, own, I, I, job.dtype), std::nullopt,
               matrix(static_cast<T*>(to) + o, count, own, stride, job.dtype));
    });
  });
}

// Its gradient of x: dy [C, O] through a modulated W0 -> dx [C, I], by W0's columns.
void multiply_back(const Job& job, int64_t first_page, int64_t pages, const void* weight,
                   const void* dy, int64_t count, void* dx) {
  dispatch(job.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t I = job.I, O = job.O;
    const Pairs pairs({job.b, I}, {job.a, O}, first_page, pages);
    const Tensor dy_CO = matrix(dy, count, O, O, job.dtype);
    each_block<T>(I, kUnit, O, count, [&](int64_t, int64_t i, int64_t own, T* modulated) {
      modulate_block({static_cast<const T*>(weight), I, i, own}, pairs, 0, O, modulated);
      matrix_product(dy_CO, matrix(modulated, O, own, own, job.dtype),
                     matrix(static_cast<T*>(dx) + i, count, own, I, job.dtype));
    });
  });
}

// Its gradients da and db, from G = dyᵀ x of dy [C, O] and x [C, I]. dout `[pages, O]`; din
// `[threads, pages, I]` is to be summed over the threads. Both begin with zeros.
void modulation_gradients(const Job& job, int64_t first_page, int64_t pages, const void* weight,
                          const void* dy, const void* x, int64_t count, float* din, float* dout) {
  dispatch(job.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t I = job.I, O = job.O;
    const Pairs pairs({job.b, I}, {job.a, O}, first_page, pages);
    const Tensor x_CI = matrix(x, count, I, I, job.dtype);
    each_block<T>(O, kRows, I, count, [&](int64_t part, int64_t first, int64_t own, T* g) {
      const Tensor dy_CR = matrix(static_cast<const T*>(dy) + first, count, own, O, job.dtype);
      matrix_product(turned(dy_CR), x_CI, matrix(g, own, I, I, job.dtype));
      const T* const w = static_cast<const T*>(weight) + first * I;
      float* const sums = din + part * pages * I;
      int64_t o = 0;
      for (; o + kRows <= own; o += kRows)
        gradient_rows<kRows>(g + o * I, w + o * I, pairs, first + o, sums, dout, O, I);
      for (; o < own; ++o)
        gradient_rows<1>(g + o * I, w + o * I, pairs, first + o, sums, dout, O, I);
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
