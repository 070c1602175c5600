// What a layer adds to its product, row by row: `expand` makes the copies that the product takes,
// `contract` brings them together.

#pragma once

#include "job.h"

#include <tuple>
#include <vector>

namespace {

constexpr int64_t kTokens = 4;  // of one row, which share what is loaded of its factors
constexpr int64_t kRanks = 8;   // which a row adds in one visit

// The page to ask for early while page `copy` of a row is read: that of the row ahead.
inline int64_t page_ahead(const Row& row, const Row& ahead, int64_t copy) {
  if (ahead.first_page < 0) return row.first_page + copy;
  return ahead.first_page + std::min<int64_t>(copy, ahead.copies - 1);
}

template <typename T>
void expand_token(const T* x, const Scales& pages, const Row& row, const Row& ahead, T* out,
                  int64_t stride, int64_t I) {
  for (int64_t copy = 0; copy < row.copies; ++copy, out += stride) {
    if (row.first_page < 0) {
      std::copy_n(x, I, out);
      continue;
    }
    const Scale b = pages[row.first_page + copy], next = pages[page_ahead(row, ahead, copy)];
    each_step(I, [&](int64_t i, int64_t n) {
      next.fetch_at(i);
      const Step s = load(x + i, n), f = b.at(i, n);
      store(out + i, Step{s.low * f.low, s.high * f.high}, n);
    });
  }
}

// Numbers as a product takes them: two lanes of fp32, or 16 bits where an instruction multiplies these.
template <typename T>
struct Factor : Step {
  static Factor of(const T* from, int64_t count) { return {load(from, count)}; }
  void add_to(Step& sum, const Factor& other) const { add_product(sum, *this, other); }
};

#ifdef __AVX512BF16__
template <>
struct Factor<at::BFloat16> {
  __m512bh numbers;
  static Factor of(const at::BFloat16* from, int64_t count) {
    return {(__m512bh)_mm512_maskz_loadu_epi16(__mmask32((uint64_t{1} << count) - 1), from)};
  }
  void add_to(Step& sum, const Factor& other) const {
    sum.low = _mm512_dpbf16_ps(sum.low, numbers, other.numbers);
  }
};
#endif

// V x for K ranks from page `first` on, and N tokens: hidden[token * rank + k]. Pages from `ahead` on
// are asked for early.
template <int64_t N, int64_t K, typename T>
void shrink(const T* x, const Pages<T>& down, int64_t first, int64_t ahead, float* hidden,
            int64_t rank, int64_t I) {
  const T *own[K], *next[K];
  for (int64_t k = 0; k < K; ++k) own[k] = down[first + k], next[k] = down[ahead + k];
  Step sums[N][K];
  for (auto& token : sums)
    for (auto& sum : token) sum = {Lanes(0), Lanes(0)};
  each_step(I, [&](int64_t i, int64_t n) {
    Factor<T> numbers[N];
    for (int64_t t = 0; t < N; ++t) numbers[t] = Factor<T>::of(x + t * I + i, n);
    for (int64_t k = 0; k < K; ++k) {
      fetch(next[k] + i);
      const auto v = Factor<T>::of(own[k] + i, n);
      for (int64_t t = 0; t < N; ++t) numbers[t].add_to(sums[t][k], v);
    }
  });
  for (int64_t t = 0; t < N; ++t)
    for (int64_t k = 0; k < K; ++k) hidden[t * rank + k] = total(sums[t][k]);
}

// The page of a row's k-th rank, or of those of the row ahead that come behind its last.
inline int64_t rank_after(const Row& row, const Row& ahead, int64_t k) {
  return k < row.rank ? row.first_rank + k : ahead.first_rank + k - row.rank;
}

template <typename T>
struct Contraction {
  const T *product, *x, *own_bias;
  Scales a;
  Pages<T> down, up, biases;
  T* y;
  int64_t N, I, O, product_stride, y_stride;

  // Tokens of row s, from its token `first` on; the row `ahead` is the next to come.
  template <int64_t Tokens>
  void run(const Row row, const Row ahead, int64_t s, int64_t first) const {
    thread_local std::vector<float> hidden, sums;
    thread_local std::vector<Scale> scales;
    scales.clear();
    if (row.first_page >= 0) {
      for (int64_t copy = 0; copy < row.copies; ++copy) scales.push_back(a[row.first_page + copy]);
      for (int64_t copy = 0; copy < row.copies; ++copy)
        scales.push_back(a[page_ahead(row, ahead, copy)]);
    }
    hidden.resize(Tokens * row.rank);
    const T* in = x + (s * N + first) * I;
    constexpr int64_t K = Tokens == 1 ? 4 : 2;
    int64_t k = 0;
    for (; k + K <= row.rank; k += K)
      shrink<Tokens, K>(in, down, row.first_rank + k, rank_after(row, ahead, k + K),
                        hidden.data() + k, row.rank, I);
    for (; k < row.rank; ++k)
      shrink<Tokens, 1>(in, down, row.first_rank + k, rank_after(row, ahead, k + 1),
                        hidden.data() + k, row.rank, I);

    // Some ranks at a time, as their pages then come from memory one behind the other.
    if (row.rank > kRanks) sums.resize(Tokens * O);
    const Span<Tokens> own{row, ahead, product + (row.first_copy * N + first) * product_stride,
                           scales.empty() ? nullptr : scales.data(), hidden.data(), sums.data(),
                           y + (s * N + first) * y_stride};
    if (row.rank <= kRanks) return add<true, true>(own, 0, row.rank);
    add<true, false>(own, 0, kRanks);
    int64_t r = kRanks;
    for (; r + kRanks < row.rank; r += kRanks) add<false, false>(own, r, r + kRanks);
    add<false, true>(own, r, row.rank);
  }

  template <int64_t>
  struct Span {
    Row row, ahead;
    const T* product;     // of its first copy
    const Scale* scales;  // of its copies, and as many that come next; null: unscaled
    const float* hidden;
    float* sums;
    T* y;
  };

  // The bias and the copies, if it is the First time, and the ranks from r to end; into the sums, but
  // the Last time into y.
  template <bool First, bool Last, int64_t Tokens>
  void add(const Span<Tokens> own, int64_t r, int64_t end) const {
    const T *pages[kRanks], *next[kRanks];
    for (int64_t k = 0; r + k < end; ++k) {
      pages[k] = up[own.row.first_rank + r + k];
      next[k] = up[rank_after(own.row, own.ahead, end + k)];
    }
    each_step(O, [&](int64_t o, int64_t n) {
      Step sum[Tokens];
      if constexpr (First) {
        add_copies(sum, own, o, n);
      } else {
        for (int64_t t = 0; t < Tokens; ++t) sum[t] = load(own.sums + t * O + o, n);
      }
      for (int64_t k = 0; r + k < end; ++k) {
        fetch(next[k] + o);
        const Step u = load(pages[k] + o, n);
        for (int64_t t = 0; t < Tokens; ++t) {
          const Lanes h(own.hidden[t * own.row.rank + r + k]);
          add_product(sum[t], {h, h}, u);
        }
      }
      for (int64_t t = 0; t < Tokens; ++t) {
        if constexpr (Last) store(own.y + t * y_stride + o, sum[t], n);
        else store(own.sums + t * O + o, sum[t], n);
      }
    });
  }

  template <int64_t Tokens>
  C10_ALWAYS_INLINE void add_copies(Step (&sum)[Tokens], const Span<Tokens>& own, int64_t o, int64_t n) const {
    const Row& row = own.row;
    const T* bias = row.bias < 0 ? own_bias : biases[row.bias];
    const Step start = bias ? load(bias + o, n) : Step{Lanes(0), Lanes(0)};
    for (auto& each : sum) each = start;
    for (int64_t copy = 0; copy < row.copies; ++copy) {
      Step scale{Lanes(1), Lanes(1)};
      if (own.scales) {
        own.scales[row.copies + copy].fetch_at(o);
        scale = own.scales[copy].at(o, n);
      }
      const T* from = own.product + copy * N * product_stride + o;
      for (int64_t t = 0; t < Tokens; ++t)
        add_product(sum[t], scale, load(from + t * product_stride, n));
    }
  }
};

// x [S, N, I] -> to [T, N, I]: each row's copies, each scaled by its page.
void expand(const Job& job, const void* x, void* to) {
  dispatch(job.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t N = job.N, I = job.I;
    const Scales pages(job.b, I);
    parallel_for(job.S * N, I, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const Row& row = job.rows[token / N];
        const Row& ahead = job.rows[std::min(token + 1, end - 1) / N];
        T* copies = static_cast<T*>(to) + (row.first_copy * N + token % N) * I;
        expand_token(static_cast<const T*>(x) + token * I, pages, row, ahead, copies, N * I, I);
      }
    });
  });
}

// Whether rows of one token each can be taken for one row's tokens: they have one adapter, and one
// copy each, which stand together.
inline bool alike(const Row* rows) {
  const auto factors = [](const Row& row) {
    return std::tie(row.copies, row.first_page, row.first_rank, row.rank, row.bias);
  };
  for (int64_t k = 0; k < kTokens; ++k) {
    const bool next = rows[k].copies == 1 && rows[k].first_copy == rows[0].first_copy + k;
    if (!next || factors(rows[k]) != factors(rows[0])) return false;
  }
  return true;
}

inline bool adds_nothing(const Row& row) {
  return row.copies == 1 && row.first_page < 0 && row.rank == 0 && row.bias < 0;
}

// product [T, N, O] -> to [S, N, O]: each row's copies scaled and summed, with its additive part and
// bias. `to` may be the product where each row has one copy, in its own place. Both may be some columns
// of a wider matrix.
void contract(const Job& job, const void* product, const void* x, const void* bias, void* to) {
  dispatch(job.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto typed = [](const void* pointer) { return static_cast<const T*>(pointer); };
    const int64_t I = job.I, O = job.O;
    const Contraction<T> part{typed(product),   typed(x),       typed(bias),        {job.a, O},
                              {job.down, I},    {job.up, O},    {job.biases, O},
                              static_cast<T*>(to), job.N, I, O,
                              job.product_stride,  job.y_stride};
    const int64_t N = job.N, blocks = (N + kTokens - 1) / kTokens;
    parallel_for(job.S * blocks, I + O, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const Row& row = job.rows[block / blocks];
        const int64_t s = block / blocks, first = block % blocks * kTokens;
        const bool together = N == 1 && block + kTokens <= end && alike(&row);
        if (together) block += kTokens - 1;
        if (product == to && !bias && adds_nothing(row)) continue;
        const Row& ahead = job.rows[std::min(block + 1, end - 1) / blocks];
        if (together || first + kTokens <= N) {
          part.template run<kTokens>(row, ahead, s, first);
        } else {
          for (int64_t token = first; token < N; ++token) part.template run<1>(row, ahead, s, token);
        }
      }
    });
  });
}

}  // namespace
