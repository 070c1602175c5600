// Products with some W0, and torch's tensors around memory.

#pragma once

#include "lanes.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace {

using torch::stable::Tensor;

const torch::stable::Device kCpu(torch::headeronly::DeviceType::CPU);
const int32_t kNumbers[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                            aoti_torch_dtype_float16()};
constexpr torch::headeronly::ScalarType kTypes[] = {torch::headeronly::ScalarType::Float,
                                                    torch::headeronly::ScalarType::BFloat16,
                                                    torch::headeronly::ScalarType::Half};

constexpr int64_t kFewTokens = 128;  // of which a product is mostly the reading of W0
constexpr int64_t kUnit = 32;        // rows of W0 that stay together: whole lines of y
constexpr int64_t kLeastUnits = 2;   // for which a second thread is worth waking

// New memory, contiguous, of a type by torch's own number.
Tensor empty(const std::vector<int64_t>& sizes, int32_t type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), type, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Numbers of a tensor as a matrix, from its `first` one on.
Tensor window(const Tensor& of, int64_t first, const std::array<int64_t, 2>& sizes,
              const std::array<int64_t, 2>& strides) {
  char* const at = static_cast<char*>(of.data_ptr()) + first * of.element_size();
  return torch::stable::from_blob(at, {sizes.data(), 2}, {strides.data(), 2}, kCpu,
                                  of.scalar_type());
}

// Memory as a matrix, `stride` numbers from row to row.
Tensor matrix(const void* data, int64_t rows, int64_t columns, int64_t stride, int64_t dtype) {
  const int64_t sizes[] = {rows, columns}, strides[] = {stride, 1};
  return torch::stable::from_blob(const_cast<void*>(data), {sizes, 2}, {strides, 2}, kCpu,
                                  kTypes[dtype]);
}

// Memory for one use until the next, from the start of a cache's line on: a product on AMX whose
// numbers lie across lines takes 1.8 times as long.
struct Scratch {
  std::vector<char> kept;

  void* get(int64_t bytes) {
    size_t space = bytes + kLine;
    if (kept.size() < space) kept.resize(space);
    void* at = kept.data();
    return std::align(kLine, bytes, at, space);
  }
};

// A matrix's transpose, where it lies.
Tensor turned(const Tensor& of) {
  return window(of, 0, {of.size(1), of.size(0)}, {of.stride(1), of.stride(0)});
}

// left [C, K] by right [K, D] -> to [C, D], by torch's own product: it takes one thread within a
// parallel region. Not through the dispatcher, whose calls by name take microseconds.
void matrix_product(const Tensor& left, const Tensor& right, const Tensor& to) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(to.get(), left.get(), right.get()));
}

// x [C, in] by W0 [out, in] -> to [C, out].
void multiply(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
              const Tensor& to) {
  const Tensor by = turned(weight);
  if (!bias) return matrix_product(x, by, to);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(to.get(), bias->get(), x.get(), by.get(), 1, 1));
}

// The same, each thread by its own rows of W0. Of few tokens torch's own threads multiply one alone,
// or wait for each other.
void multiply_by_rows(const Tensor& x, const Tensor& weight, const Tensor& to) {
  const int64_t C = x.size(0), I = weight.size(1), O = weight.size(0);
  const auto body = [&](int64_t begin, int64_t end) {
    const int64_t o = begin * kUnit, rows = std::min(end * kUnit, O) - o, row = weight.stride(0);
    multiply(x, window(weight, o * row, {rows, I}, {row, weight.stride(1)}), std::nullopt,
             window(to, o, {C, rows}, {to.stride(0), 1}));
  };
  torch::stable::parallel_for(0, (O + kUnit - 1) / kUnit, kLeastUnits, body);
}

// A product with some W0: x [C, in] -> to [C, out].
struct Product {
  std::string name;  // of another library's operator that computes it; empty: torch's own does
  bool packed;       // whether that is (to, x, W0, bias, true), and not (to, x, bias, W0)
  Tensor weight;     // in whatever form it is taken

  void operator()(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& to) const {
    using torch::stable::detail::from;
    if (name.empty() && !bias && x.size(0) <= kFewTokens) {
      multiply_by_rows(x, weight, to);
    } else if (name.empty()) {
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

}  // namespace
