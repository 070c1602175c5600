// The operator's own work around W0's product on a CPU: scale, sum, add, modulate.
//
// Lanes are ATen's vectors, whose instructions the build chooses (DEFAULT, AVX2, AVX512); tensors
// and threads go through torch's stable ABI. Sums are taken in fp32 and rounded once. Shapes as in
// `ops/__init__.py`; T counts the copies of all rows, C those of one.

#include <ATen/cpu/vec/functional.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

using at::vec::Vectorized;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Lanes = Vectorized<float>;

constexpr int64_t kLanes = Lanes::size();
constexpr int64_t kStep = 2 * kLanes;  // one vector of 16-bit numbers
constexpr int64_t kTokens = 4;         // of one row, which share what is loaded of its factors
constexpr int64_t kGrain = 16384;      // numbers for which a second thread is worth waking

// A row of the batch, as `cpu.py` writes it.
struct Row {
  int32_t first_copy;  // its copies stand together
  int32_t copies;
  int32_t first_page;  // Hadamard pages, one a copy; -1: unscaled
  int32_t first_rank;  // additive pages
  int32_t rank;
  int32_t bias;  // page; -1: the layer's own
};

// Copies of one group, that go through W0 modulated by its pages.
struct Segment {
  int32_t first_copy, copies, first_page, pages;
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
  } else {
    at::vec::convert_from_float<T>(step.low, step.high).store(to, count);
  }
}

inline void add_product(Step& sum, const Step& a, const Step& b) {
  sum.low = at::vec::fmadd(a.low, b.low, sum.low);
  sum.high = at::vec::fmadd(a.high, b.high, sum.high);
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

template <typename T>
void expand_token(const T* x, const float* pages, const Row& row, T* out, int64_t stride,
                  int64_t I) {
  for (int64_t copy = 0; copy < row.copies; ++copy, out += stride) {
    if (row.first_page < 0) {
      std::copy_n(x, I, out);
      continue;
    }
    const float* b = pages + (row.first_page + copy) * I;
    each_step(I, [&](int64_t i, int64_t n) {
      const Step s = load(x + i, n), f = load(b + i, n);
      store(out + i, Step{s.low * f.low, s.high * f.high}, n);
    });
  }
}

// V x for K ranks and N tokens: hidden[token * rank + k].
template <int64_t N, int64_t K, typename T>
void shrink(const T* x, const T* down, float* hidden, int64_t rank, int64_t I) {
  Step sums[N][K];
  for (auto& token : sums)
    for (auto& sum : token) sum = {Lanes(0), Lanes(0)};
  each_step(I, [&](int64_t i, int64_t n) {
    Step numbers[N];
    for (int64_t t = 0; t < N; ++t) numbers[t] = load(x + t * I + i, n);
    for (int64_t k = 0; k < K; ++k) {
      const Step v = load(down + k * I + i, n);
      for (int64_t t = 0; t < N; ++t) add_product(sums[t][k], numbers[t], v);
    }
  });
  for (int64_t t = 0; t < N; ++t)
    for (int64_t k = 0; k < K; ++k) hidden[t * rank + k] = total(sums[t][k]);
}

template <typename T>
struct Contraction {
  const T *product, *x, *down, *up, *biases, *own_bias;
  const float* out_pages;
  T* y;
  int64_t N, I, O;

  // N tokens of one row from token `first` on.
  template <int64_t Tokens>
  void run(const Row& row, int64_t s, int64_t first) const {
    thread_local std::vector<float> hidden;
    hidden.resize(Tokens * row.rank);
    const T* in = x + (s * N + first) * I;
    const T* v = down + row.first_rank * I;
    constexpr int64_t K = Tokens == 1 ? 4 : 2;
    int64_t k = 0;
    for (; k + K <= row.rank; k += K)
      shrink<Tokens, K>(in, v + k * I, hidden.data() + k, row.rank, I);
    for (; k < row.rank; ++k) shrink<Tokens, 1>(in, v + k * I, hidden.data() + k, row.rank, I);

    const T* u = up + row.first_rank * O;
    const T* bias = row.bias < 0 ? own_bias : biases + row.bias * O;
    const T* part = product + (row.first_copy * N + first) * O;
    T* to = y + (s * N + first) * O;
    each_step(O, [&](int64_t o, int64_t n) {
      Step sums[Tokens];
      const Step start = bias ? load(bias + o, n) : Step{Lanes(0), Lanes(0)};
      for (auto& sum : sums) sum = start;
      for (int64_t copy = 0; copy < row.copies; ++copy) {
        const T* from = part + copy * N * O + o;
        const Step a = row.first_page < 0 ? Step{Lanes(1), Lanes(1)}
                                          : load(out_pages + (row.first_page + copy) * O + o, n);
        for (int64_t t = 0; t < Tokens; ++t) add_product(sums[t], a, load(from + t * O, n));
      }
      for (int64_t r = 0; r < row.rank; ++r) {
        const Step numbers = load(u + r * O + o, n);
        for (int64_t t = 0; t < Tokens; ++t) {
          const Lanes h(hidden[t * row.rank + r]);
          add_product(sums[t], {h, h}, numbers);
        }
      }
      for (int64_t t = 0; t < Tokens; ++t) store(to + t * O + o, sums[t], n);
    });
  }
};

// Σ_j a_j[o] b_j times W0, kTokens rows of it at a time.
template <int64_t R, typename T>
void modulate_rows(const T* weight, const float* in, const float* out, T* to, int64_t pages,
                   int64_t O, int64_t I) {
  each_step(I, [&](int64_t i, int64_t n) {
    Step sums[R];
    for (auto& sum : sums) sum = {Lanes(0), Lanes(0)};
    for (int64_t j = 0; j < pages; ++j) {
      const Step b = load(in + j * I + i, n);
      for (int64_t r = 0; r < R; ++r) {
        const Lanes a(out[j * O + r]);
        add_product(sums[r], {a, a}, b);
      }
    }
    for (int64_t r = 0; r < R; ++r) {
      const Step w = load(weight + r * I + i, n);
      store(to + r * I + i, Step{sums[r].low * w.low, sums[r].high * w.high}, n);
    }
  });
}

template <typename Body>
void dispatch(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float: return body(float{});
    case ScalarType::BFloat16: return body(at::BFloat16{});
    case ScalarType::Half: return body(at::Half{});
    default: STD_TORCH_CHECK(false, "the CPU kernels take float32, bfloat16 and float16");
  }
}

template <typename T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

int64_t grain(int64_t numbers) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, numbers));
}

// [S, N, I] -> [T, N, I]: each row's copies, each scaled by its page.
Tensor expand(const Tensor& x_, const Tensor& pages, const Tensor& rows, int64_t copies) {
  const Tensor x = torch::stable::contiguous(x_);
  const int64_t S = x.size(0), N = x.size(1), I = x.size(2);
  Tensor out = torch::stable::new_empty(x, {copies, N, I});
  const Row* table = static_cast<const Row*>(rows.data_ptr());
  const float* b = static_cast<const float*>(pages.data_ptr());
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(x.data_ptr());
    T* to = static_cast<T*>(out.data_ptr());
    torch::stable::parallel_for(0, S * N, grain(I), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const Row& row = table[token / N];
        expand_token(from + token * I, b, row, to + (row.first_copy * N + token % N) * I, N * I, I);
      }
    });
  });
  return out;
}

// [T, N, O] -> [S, N, O]: each row's copies scaled and summed, with its additive part and bias.
Tensor contract(const Tensor& product_, const Tensor& x_, const Tensor& rows,
                const std::optional<Tensor>& out_pages, const std::optional<Tensor>& down,
                const std::optional<Tensor>& up, const std::optional<Tensor>& biases,
                const std::optional<Tensor>& bias) {
  const Tensor x = torch::stable::contiguous(x_), product = torch::stable::contiguous(product_);
  const int64_t S = x.size(0), N = x.size(1), I = x.size(2), O = product.size(2);
  Tensor y = torch::stable::new_empty(product, {S, N, O});
  const Row* table = static_cast<const Row*>(rows.data_ptr());
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Contraction<T> job{static_cast<const T*>(product.data_ptr()),
                             static_cast<const T*>(x.data_ptr()),
                             pointer<T>(down),
                             pointer<T>(up),
                             pointer<T>(biases),
                             pointer<T>(bias),
                             pointer<float>(out_pages),
                             static_cast<T*>(y.data_ptr()),
                             N,
                             I,
                             O};
    const int64_t blocks = (N + kTokens - 1) / kTokens;
    torch::stable::parallel_for(0, S * blocks, grain(I + O), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t s = block / blocks, first = block % blocks * kTokens;
        if (first + kTokens <= N) {
          job.template run<kTokens>(table[s], s, first);
        } else {
          for (int64_t token = first; token < N; ++token) job.template run<1>(table[s], s, token);
        }
      }
    });
  });
  return y;
}

// W0 ∘ (Σ_j a_j b_jᵀ), rounded once to W0's type.
void modulate(Tensor& to, const Tensor& weight, const float* in, const float* out,
              int64_t pages) {
  const int64_t O = weight.size(0), I = weight.size(1), blocks = (O + kTokens - 1) / kTokens;
  dispatch(weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(weight.data_ptr());
    T* result = static_cast<T*>(to.data_ptr());
    torch::stable::parallel_for(0, blocks, grain(kTokens * I), [&](int64_t begin, int64_t end) {
      for (int64_t o = begin * kTokens; o < std::min(end * kTokens, O); o += kTokens) {
        if (o + kTokens <= O) {
          modulate_rows<kTokens>(from + o * I, in, out + o, result + o * I, pages, O, I);
        } else {
          for (int64_t r = o; r < O; ++r)
            modulate_rows<1>(from + r * I, in, out + r, result + r * I, pages, O, I);
        }
      }
    });
  });
}

// x Wᵀ, by the product that the layer itself takes.
Tensor product_of(const Tensor& x, const Tensor& weight) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(std::optional<Tensor>())};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The whole layer where it is W0 and nothing else. Copies from `segments` on, if any, stand behind
// those that go through W0 as it is, segment after segment.
Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& rows, int64_t copies,
              const std::optional<Tensor>& segments, const std::optional<Tensor>& in_pages,
              const std::optional<Tensor>& out_pages, const std::optional<Tensor>& down,
              const std::optional<Tensor>& up, const std::optional<Tensor>& biases,
              const std::optional<Tensor>& bias) {
  Tensor scaled = in_pages ? expand(x, *in_pages, rows, copies) : x;
  if (!segments) {
    return contract(product_of(scaled, weight), x, rows, out_pages, down, up, biases, bias);
  }
  const Tensor plain = torch::stable::contiguous(weight);
  const int64_t N = x.size(1), I = x.size(2), O = weight.size(0);
  Tensor product = torch::stable::new_empty(x, {copies, N, O});
  Tensor modulated = torch::stable::empty_like(plain);
  auto multiply = [&](int64_t first, int64_t count, const Tensor& by) {
    Tensor part = torch::stable::narrow(product, 0, first, count);
    torch::stable::copy_(part, product_of(torch::stable::narrow(scaled, 0, first, count), by));
  };
  const Segment* table = static_cast<const Segment*>(segments->data_ptr());
  if (table[0].first_copy) multiply(0, table[0].first_copy, weight);
  for (int64_t s = 0; s < segments->size(0); ++s) {
    const Segment& segment = table[s];
    modulate(modulated, plain, pointer<float>(in_pages) + segment.first_page * I,
             pointer<float>(out_pages) + segment.first_page * O, segment.pages);
    multiply(segment.first_copy, segment.copies, modulated);
  }
  return contract(product, x, rows, out_pages, down, up, biases, bias);
}

}  // namespace

STABLE_TORCH_LIBRARY(flora_cpu, m) {
  m.def("expand(Tensor x, Tensor pages, Tensor rows, int copies) -> Tensor");
  m.def(
      "contract(Tensor product, Tensor x, Tensor rows, Tensor? out_pages, Tensor? down, Tensor? up, "
      "Tensor? biases, Tensor? bias) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor rows, int copies, Tensor? segments, Tensor? in_pages, "
      "Tensor? out_pages, Tensor? down, Tensor? up, Tensor? biases, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(flora_cpu, CPU, m) {
  m.impl("expand", TORCH_BOX(&expand));
  m.impl("contract", TORCH_BOX(&contract));
  m.impl("linear", TORCH_BOX(&linear));
}
