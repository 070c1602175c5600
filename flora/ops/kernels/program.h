// Layers in one batch as `program.py` writes them, which run without Python.

#pragma once

#include "product.h"
#include "rows.h"

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int64_t kScratch = 1 << 26;  // bytes that a thread keeps for one use

// What a layer adds to its product, or one of some merged layers to its columns.
struct Part {
  const Job* job;
  const Product* product;  // its own, where the layers are not taken as a whole
  const void* bias;
  int64_t copies;          // of which that product is
  int64_t expands;
  int64_t first;           // bytes from the first of all columns to its own
};

// A layer in one batch.
struct Program {
  const Job* job;          // the first part's, which says of all what rows there are
  const Product* product;  // of the layer as a whole; null: each part has its own
  int64_t out;
  int64_t copies;          // of which the product is
  int64_t expands;         // whether the job makes these; else they are x
  int64_t in_place;        // whether the product is y
  int64_t untouched;       // whether no adapter of the batch touches the layer
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

}  // namespace
