// The operator's own work around W0's product on a CPU: scale, sum, add, modulate.
//
// Lanes are ATen's vectors, whose instructions the build chooses (DEFAULT, AVX2, AVX512); threads are
// torch's, through its stable ABI. Sums are taken in fp32 and rounded once. Shapes as in
// `ops/__init__.py`; T counts the copies of all rows.

#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <ATen/cpu/vec/functional.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <deque>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

using at::vec::Vectorized;
using Lanes = Vectorized<float>;

constexpr int64_t kLanes = Lanes::size();
constexpr int64_t kStep = 2 * kLanes;  // one vector of 16-bit numbers
constexpr int64_t kTokens = 4;         // of one row, which share what is loaded of its factors
constexpr int64_t kColumns = 512;      // in as many as the fastest cache holds of a few rows
constexpr int64_t kRanks = 8;          // which a row adds in one visit
constexpr int64_t kLine = 64;          // bytes that memory gives at once
constexpr int64_t kGrain = 16384;      // numbers for which a second thread is worth waking
constexpr int64_t kBlock = 1 << 18;    // bytes of a modulated W0 that a thread's own cache holds
constexpr int64_t kMostBlock = 1 << 21;  // where so many tokens share it that their passes count
constexpr int64_t kScratch = 1 << 26;   // bytes that a thread keeps for one use
constexpr int64_t kBlockRows = 64;     // of it at least, as products of fewer are slow

// A row of the batch, as `cpu.py` writes it.
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

struct Step {
  Lanes low, high;
};

// `count` numbers, kStep but at the end of a row, where zeros fill up.
template <typename T>
inline Step load(const T* from, int64_t count) {
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
inline void store(T* to, const Step& step, int64_t count) {
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

inline void add_product(Step& sum, const Step& a, const Step& b) {
  sum.low = at::vec::fmadd(a.low, b.low, sum.low);
  sum.high = at::vec::fmadd(a.high, b.high, sum.high);
}

// A row's factors are mostly read by no other row: so ask early for the pages that come next.
template <typename T>
inline void fetch(const T* from) {
  for (int64_t byte = 0; byte < kStep * int64_t(sizeof(T)); byte += kLine)
    __builtin_prefetch(reinterpret_cast<const char*>(from) + byte, 0, 2);
}

// A Hadamard page: in fp32, or in bf16 by how far each number lies off the page's center.
struct Scale {
  const float* exact;
  const at::BFloat16* offsets;
  float center;

  Step at(int64_t i, int64_t count) const {
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

template <typename T>
void expand_token(const T* x, const Scales& pages, const Row& row, T* out,
                  int64_t stride, int64_t I) {
  for (int64_t copy = 0; copy < row.copies; ++copy, out += stride) {
    if (row.first_page < 0) {
      std::copy_n(x, I, out);
      continue;
    }
    const Scale b = pages[row.first_page + copy];
    each_step(I, [&](int64_t i, int64_t n) {
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

// V x for K ranks from page `first` on, and N tokens: hidden[token * rank + k].
template <int64_t N, int64_t K, typename T>
void shrink(const T* x, const Pages<T>& down, int64_t first, float* hidden, int64_t rank,
            int64_t I) {
  const T *own[K], *next[K];
  for (int64_t k = 0; k < K; ++k) own[k] = down[first + k], next[k] = down[first + k + K];
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

template <typename T>
struct Contraction {
  const T *product, *x, *own_bias;
  Scales a;
  Pages<T> down, up, biases;
  T* y;
  int64_t N, I, O, product_stride, y_stride;

  // Tokens of row s, from its token `first` on.
  template <int64_t Tokens>
  void run(const Row row, int64_t s, int64_t first) const {
    thread_local std::vector<float> hidden, sums;
    thread_local std::vector<Scale> scales;
    scales.clear();
    if (row.first_page >= 0)
      for (int64_t copy = 0; copy < 2 * row.copies; ++copy) scales.push_back(a[row.first_page + copy]);
    hidden.resize(Tokens * row.rank);
    const T* in = x + (s * N + first) * I;
    constexpr int64_t K = Tokens == 1 ? 4 : 2;
    int64_t k = 0;
    for (; k + K <= row.rank; k += K)
      shrink<Tokens, K>(in, down, row.first_rank + k, hidden.data() + k, row.rank, I);
    for (; k < row.rank; ++k)
      shrink<Tokens, 1>(in, down, row.first_rank + k, hidden.data() + k, row.rank, I);

    // Some ranks at a time, as their pages then come from memory one behind the other.
    if (row.rank > kRanks) sums.resize(Tokens * O);
    const Span<Tokens> own{row, product + (row.first_copy * N + first) * product_stride,
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
    Row row;
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
    const int64_t first = own.row.first_rank + r;
    for (int64_t k = 0; r + k < end; ++k) pages[k] = up[first + k], next[k] = up[first + end - r + k];
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
  void add_copies(Step (&sum)[Tokens], const Span<Tokens>& own, int64_t o, int64_t n) const {
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

// What is the same at every step: `Job` in cpu.py fills it, and keeps alive what it points to.
struct Job {
  const Row* rows;
  Pool b, a, down, up, biases;
  int64_t S, N, I, O;
  int64_t product_stride, y_stride;  // numbers from one token's outputs to the next one's
  int64_t dtype;  // of x and of all that has no type here: an index into `DTYPES`
};

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

// x [S, N, I] -> to [T, N, I]: each row's copies, each scaled by its page.
void expand(const Job& job, const void* x, void* to) {
  dispatch(job.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t N = job.N, I = job.I;
    const Scales pages(job.b, I);
    parallel_for(job.S * N, I, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const Row& row = job.rows[token / N];
        T* copies = static_cast<T*>(to) + (row.first_copy * N + token % N) * I;
        expand_token(static_cast<const T*>(x) + token * I, pages, row, copies, N * I, I);
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
        if (first + kTokens <= N) {
          part.template run<kTokens>(row, s, first);
        } else if (N == 1 && block + kTokens <= end && alike(&row)) {
          part.template run<kTokens>(row, s, first);
          block += kTokens - 1;
        } else {
          for (int64_t token = first; token < N; ++token) part.template run<1>(row, s, token);
        }
      }
    });
  });
}

// W0 ∘ (Σ_j a_j b_jᵀ), rounded once to W0's type: `rows` of it from o on.
template <typename T>
void modulate_block(const T* weight, const Pairs& pairs, int64_t o, int64_t rows, T* to, int64_t I) {
  int64_t r = 0;
  for (; r + kTokens <= rows; r += kTokens)
    modulate_rows<kTokens>(weight + (o + r) * I, pairs, o + r, to + r * I, I);
  for (; r < rows; ++r) modulate_rows<1>(weight + (o + r) * I, pairs, o + r, to + r * I, I);
}

void modulate(const Job& job, int64_t first_page, int64_t pages, const void* weight, void* to) {
  dispatch(job.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t I = job.I, O = job.O;
    const Pairs pairs({job.b, I}, {job.a, O}, first_page, pages);
    const int64_t blocks = (O + kTokens - 1) / kTokens;
    parallel_for(blocks, kTokens * I, [&](int64_t begin, int64_t end) {
      const int64_t o = begin * kTokens, rows = std::min(end * kTokens, O) - o;
      modulate_block(static_cast<const T*>(weight), pairs, o, rows, static_cast<T*>(to) + o * I, I);
    });
  });
}

using torch::stable::Tensor;

const torch::stable::Device kCpu(torch::headeronly::DeviceType::CPU);
const int32_t kNumbers[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                            aoti_torch_dtype_float16()};
constexpr torch::headeronly::ScalarType kTypes[] = {torch::headeronly::ScalarType::Float,
                                                    torch::headeronly::ScalarType::BFloat16,
                                                    torch::headeronly::ScalarType::Half};

// New memory, contiguous, of a type by torch's own number.
Tensor empty(const std::vector<int64_t>& sizes, int32_t type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), type, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Memory as a matrix, `stride` numbers from row to row.
Tensor matrix(const void* data, int64_t rows, int64_t columns, int64_t stride, int64_t dtype) {
  const int64_t sizes[] = {rows, columns}, strides[] = {stride, 1};
  return torch::stable::from_blob(const_cast<void*>(data), {sizes, 2}, {strides, 2}, kCpu,
                                  kTypes[dtype]);
}

// x [C, in] by W0 [out, in] -> to [C, out], by torch's own product: it takes one thread within a
// parallel region. Not through the dispatcher, whose calls by name take microseconds.
void multiply(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
              const Tensor& to) {
  const int64_t sizes[] = {weight.size(1), weight.size(0)};
  const int64_t strides[] = {weight.stride(1), weight.stride(0)};
  const Tensor turned = torch::stable::from_blob(weight.data_ptr(), {sizes, 2}, {strides, 2}, kCpu,
                                                 weight.scalar_type());
  STABLE_TORCH_ERROR_CODE_CHECK(
      bias ? aoti_torch_cpu_addmm_out(to.get(), bias->get(), x.get(), turned.get(), 1, 1)
           : aoti_torch_cpu_mm_out(to.get(), x.get(), turned.get()));
}

// A product with some W0: x [C, in] -> to [C, out].
struct Product {
  std::string name;  // of another library's operator that computes it; empty: torch's own does
  bool packed;       // whether that is (to, x, W0, bias, true), and not (to, x, bias, W0)
  Tensor weight;     // in whatever form it is taken

  void operator()(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& to) const {
    using torch::stable::detail::from;
    if (name.empty()) {
      multiply(x, weight, bias, to);
    } else if (packed) {
      std::array<StableIValue, 5> stack{from(to), from(x), from(weight), from(bias), from(true)};
      call(stack.data());
    } else {
      std::array<StableIValue, 4> stack{from(to), from(x), from(bias), from(weight)};
      call(stack.data());
    }
  }

  void call(StableIValue* stack) const {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name.c_str(), "", stack, TORCH_ABI_VERSION));
  }
};

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
    const int64_t rows = (even + kTokens - 1) / kTokens * kTokens;
    const Tensor x = matrix(copies, count, I, I, job.dtype);
    torch::stable::parallel_for(0, (O + rows - 1) / rows, 1, [&](int64_t begin, int64_t end) {
      thread_local std::vector<T> modulated;
      if (modulated.size() < static_cast<size_t>(rows * I)) modulated.resize(rows * I);
      for (int64_t o = begin * rows; o < std::min(end * rows, O); o += rows) {
        const int64_t own = std::min(rows, O - o);
        modulate_block(static_cast<const T*>(weight), pairs, o, own, modulated.data(), I);
        multiply(x, matrix(modulated.data(), own, I, I, job.dtype), std::nullopt,
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
        for (; o + kTokens <= last; o += kTokens)
          gradient_rows<kTokens>(g + o * I, w + o * I, pairs, o, sums, dout, O, I);
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

// What a layer adds to its product, or one of some merged layers to its columns.
struct Part {
  const Job* job;
  const Product* product;  // its own, where the layers are not taken as a whole
  const void* bias;
  int64_t copies;          // of which that product is
  int64_t expands;
  int64_t first;           // bytes from the first of all columns to its own
};

// A layer in one batch, as `program.py` writes it.
struct Program {
  const Job* job;    // the first part's, which says of all what rows there are
  const Product* product;  // of the layer as a whole; null: each part has its own
  int64_t out;
  int64_t copies;    // of which the product is
  int64_t expands;   // whether the job makes these; else they are x
  int64_t in_place;  // whether the product is y
  int64_t untouched;  // whether no adapter of the batch touches the layer
  int64_t count;
  const Part* parts;

  int64_t rows() const { return job->S * job->N; }
};

// A layer of a model, and the programs of the batch that runs on it; null: one without adapters.
struct Layer {
  const Program* const* const* programs;
  int64_t number;
  const Product* product;
  const char* python;  // the operator that makes a program, or does without one
  const char* name;    // that this knows the layer by
};

// Memory for one use until the next: what is new takes longer to get than to fill.
template <int Use>
Tensor scratch(int64_t rows, int64_t columns, int64_t dtype) {
  thread_local std::vector<char> kept;
  const int64_t bytes = rows * columns * (dtype ? 2 : 4);
  if (bytes > kScratch) return empty({rows, columns}, kNumbers[dtype]);
  if (static_cast<int64_t>(kept.size()) < bytes) kept.resize(bytes);
  return matrix(kept.data(), rows, columns, columns, dtype);
}

inline char* at(const Tensor& tensor, int64_t bytes) {
  return static_cast<char*>(tensor.data_ptr()) + bytes;
}

// y of contiguous x, its tokens in whatever shape.
Tensor run(const Program& program, const Tensor& x) {
  const int64_t tokens = program.rows(), dtype = program.job->dtype;
  const auto shape = x.sizes();
  std::vector<int64_t> sizes(shape.begin(), shape.end());
  sizes.back() = program.out;
  const Tensor y = empty(sizes, kNumbers[dtype]);
  const auto expanded = [&](bool expands, const Job& job, int64_t copies) {
    if (!expands) return matrix(x.data_ptr(), tokens, job.I, job.I, dtype);
    const Tensor to = scratch<0>(copies, job.I, dtype);
    expand(job, x.data_ptr(), to.data_ptr());
    return to;
  };
  std::optional<Tensor> whole;
  if (program.product) {
    whole = program.in_place ? matrix(y.data_ptr(), tokens, program.out, program.out, dtype)
                             : scratch<1>(program.copies, program.out, dtype);
    (*program.product)(expanded(program.expands, *program.job, program.copies), std::nullopt, *whole);
  }
  for (const Part *part = program.parts, *end = part + program.count; part != end; ++part) {
    const Job& job = *part->job;
    const Tensor product = whole ? *whole : scratch<1>(part->copies, job.O, dtype);
    if (!whole) (*part->product)(expanded(part->expands, job, part->copies), std::nullopt, product);
    contract(job, at(product, whole ? part->first : 0), x.data_ptr(), part->bias, at(y, part->first));
  }
  return y;
}

Tensor run_program(int64_t at, const Tensor& x) {
  const Program& program = *reinterpret_cast<const Program*>(at);
  const Job& job = *program.job;
  if (x.numel() != program.rows() * job.I || x.scalar_type() != kTypes[job.dtype])
    throw std::invalid_argument("a prepared layer was given x of another shape or type");
  return run(program, x.is_contiguous() ? x : torch::stable::contiguous(x));
}

// A layer in compiled code. Python is asked where its program is not made yet, or there can be none.
Tensor linear(const Tensor& given, const std::optional<Tensor>& bias, const Tensor& layer,
              int64_t out) {
  const Layer& own = **static_cast<const Layer* const*>(layer.data_ptr());
  const Program* const* programs = *own.programs;
  const Program* program = programs ? programs[own.number] : nullptr;
  if (given.dim() == 2) {
    const Tensor x = given.is_contiguous() ? given : torch::stable::contiguous(given);
    if (!programs || (program && program->untouched)) {
      int32_t type;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
      const Tensor y = empty({x.size(0), out}, type);
      (*own.product)(x, bias, y);
      return y;
    }
    if (program && program->rows() == x.size(0)) return run(*program, x);
  }
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(given), from(bias), from(std::string(own.name)), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(own.python, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

int64_t make_product(const std::string& name, bool packed, const Tensor& weight) {
  return reinterpret_cast<int64_t>(new Product{name, packed, weight});
}

void drop_product(int64_t product) { delete reinterpret_cast<Product*>(product); }

template <typename T>
T argument(PyObject* number) {
  if constexpr (std::is_pointer_v<T>) return static_cast<T>(PyLong_AsVoidPtr(number));
  else return PyLong_AsLongLong(number);
}

// A Python function of integers: addresses and counts. torch's own operators take several times as
// long to call, and a step of decoding has hundreds of layers.
template <typename... Args>
PyObject* call(void (*kernel)(const Job&, Args...), PyObject* const* args, Py_ssize_t count) {
  if (count != 1 + sizeof...(Args)) {
    PyErr_SetString(PyExc_TypeError, "a job and its kernel's arguments are expected");
    return nullptr;
  }
  size_t at = 0;
  const auto* job = static_cast<const Job*>(PyLong_AsVoidPtr(args[at++]));
  std::tuple<Args...> values{argument<Args>(args[at++])...};
  if (PyErr_Occurred()) return nullptr;
  PyThreadState* state = PyEval_SaveThread();
  std::string error;
  try {
    std::apply([&](Args... value) { kernel(*job, value...); }, values);
  } catch (const std::exception& found) {
    error = found.what();
  }
  PyEval_RestoreThread(state);
  if (!error.empty()) {
    PyErr_SetString(PyExc_RuntimeError, error.c_str());
    return nullptr;
  }
  Py_RETURN_NONE;
}

template <auto kernel>
PyObject* method(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call(kernel, args, count);
}

template <auto kernel>
PyMethodDef entry(const char* name, const char* doc) {
  // Through a function of no arguments, as C's API has one type for all calling conventions.
  const auto function = reinterpret_cast<void (*)()>(&method<kernel>);
  return {name, reinterpret_cast<PyCFunction>(function), METH_FASTCALL, doc};
}

PyMethodDef methods[] = {
    entry<&expand>("expand", "expand(job, x, to)"),
    entry<&contract>("contract", "contract(job, product, x, bias, to)"),
    entry<&modulate>("modulate", "modulate(job, first_page, pages, weight, to)"),
    entry<&multiply_modulated>(
        "multiply_modulated",
        "multiply_modulated(job, first_page, pages, weight, copies, count, to, stride)"),
    entry<&modulation_gradients>(
        "modulation_gradients",
        "modulation_gradients(job, first_page, pages, chunks, gradient, weight, din, dout)"),
    entry<&scale_gradients>("scale_gradients", "scale_gradients(job, of_out, dy, v, dv, sums)"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "cpu", nullptr, 0, methods};

STABLE_TORCH_LIBRARY_FRAGMENT(flora, library) {
  library.def("cpu_linear(Tensor x, Tensor? bias, Tensor layer, int out_features) -> Tensor");
  library.def("run_program(int program, Tensor x) -> Tensor");
  library.def("make_product(str name, bool packed, Tensor weight) -> int");
  library.def("drop_product(int product) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flora, CompositeExplicitAutograd, library) {
  library.impl("cpu_linear", TORCH_BOX(&linear));
  library.impl("run_program", TORCH_BOX(&run_program));
  library.impl("make_product", TORCH_BOX(&make_product));
  library.impl("drop_product", TORCH_BOX(&drop_product));
}

}  // namespace

#define INIT_(name) PyInit_##name
#define INIT(name) INIT_(name)

PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)() { return PyModule_Create(&definition); }
