// Layers in one batch as `program.py` writes them, which run without Python.

#pragma once

#include "modulation.h"
#include "product.h"
#include "rows.h"

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int64_t kScratch = 1 << 26;  // bytes that a thread keeps for one use

// Copies that stand together behind all others, and go through a W0 of their own: `Table` in table.py.
struct Segment {
  int32_t first_copy, copies;
  int32_t first_page, pages;
};

// The rows of a step, for layers in which its adapters have as many pages: `Table` in table.py.
struct Batch {
  const Row* rows;
  const Segment* segments;
  int64_t S, N;
  int64_t copies;     // of all rows
  int64_t modulated;  // segments
  int64_t scaled;     // whether pages scale copies
  int64_t in_order;   // whether each row has one copy, in its own place
  int64_t adds;       // whether an adapter adds to a product

  // The copies that go through W0 as it is: the first ones.
  int64_t plain() const { return modulated ? segments->first_copy : copies; }
};

// What adapters do to a layer, or to one of some merged ones.
struct Part {
  Job job;                          // of a batch that is not named yet
  const Product* product;           // its own; null: it has none but the merged layers'
  const void* weight;               // W0 [O, I]; null: it is modulated in no step
  const void* bias;
  int64_t offset;                   // bytes from the first of all columns to its own
  int64_t in_neutral, out_neutral;  // whether all pages of that side are ones
  int64_t batch;                    // which of a step's

  bool expands(const Batch& of) const { return !of.in_order || (of.scaled && !in_neutral); }

  bool contracts(const Batch& of) const {
    return !of.in_order || (of.scaled && !out_neutral) || of.adds || bias;
  }
};

// A step, in all layers.
struct Laid {
  const Part* parts;
  const Batch* batches;
  const bool* shared;  // of each layer whether its parts have the same copies, and none a W0 of its own
};

// A layer of a model, and the step that runs on it; null: one without adapters.
struct Layer {
  const Laid* const* step;
  const Product* product;
  int64_t number;
  int64_t first, count;  // its parts among the model's
  int64_t out;
  const char* python;  // the operator that does without a program
  const char* name;    // that this knows the layer by

  template <typename Of>
  bool any(const Laid& of, const Of& is) const {
    const Part* own = of.parts + first;
    return std::any_of(own, own + count,
                       [&](const Part& part) { return is(part, of.batches[part.batch]); });
  }

  bool is_touched(const Laid& of) const {
    return any(of, [](const Part& part, const Batch& batch) {
      return part.expands(batch) || batch.scaled || batch.adds || batch.modulated;
    });
  }

  // Whether all parts go through the merged product.
  bool is_whole(const Laid& of) const {
    return of.shared[number] || !any(of, [](const Part& part, const Batch& batch) {
      return part.expands(batch) || batch.modulated;
    });
  }

  bool takes(const Laid& of, const Tensor& x) const {
    int32_t type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
    const bool whole = is_whole(of);
    return !any(of, [&](const Part& part, const Batch& batch) {
      return (batch.plain() && !whole && !part.product) || type != kNumbers[part.job.dtype] ||
             x.numel() != batch.S * batch.N * part.job.I;
    });
  }
};

// Memory that a thread keeps for one use: what is new takes longer to get than to fill.
template <int Use>
Tensor scratch(int64_t rows, int64_t columns, int64_t dtype) {
  thread_local Scratch kept;
  const int64_t bytes = rows * columns * bytes_of(dtype);
  if (bytes > kScratch) return empty({rows, columns}, kNumbers[dtype]);
  return matrix(kept.get(bytes), rows, columns, columns, dtype);
}

inline char* at(const Tensor& tensor, int64_t bytes) {
  return static_cast<char*>(tensor.data_ptr()) + bytes;
}

// The copies of a part's rows, of contiguous x, through W0, or what pages make of it, to `to`.
// product: for those that go through W0 as it is, if there are any.
void multiply_copies(const Product* product, const Part& part, const Job& job, const Batch& batch,
                     const Tensor& x, const Tensor& to) {
  const int64_t N = job.N, I = job.I, count = batch.copies * N, plain = batch.plain() * N;
  const bool expands = part.expands(batch);
  const Tensor copies = expands ? scratch<0>(count, I, job.dtype)
                                : matrix(x.data_ptr(), count, I, I, job.dtype);
  if (expands) expand(job, x.data_ptr(), copies.data_ptr());
  if (plain == count) return (*product)(copies, std::nullopt, to);
  const int64_t stride = to.stride(0);
  if (plain) {
    (*product)(matrix(copies.data_ptr(), plain, I, I, job.dtype), std::nullopt,
               matrix(to.data_ptr(), plain, to.size(1), stride, job.dtype));
  }
  for (int64_t w = 0; w < batch.modulated; ++w) {
    const Segment& own = batch.segments[w];
    const int64_t first = own.first_copy * N * bytes_of(job.dtype);
    multiply_modulated(job, own.first_page, own.pages, part.weight, at(copies, first * I),
                       own.copies * N, at(to, first * stride), stride);
  }
}

// y of contiguous x that the layer takes, its tokens in whatever shape.
Tensor run(const Layer& layer, const Laid& step, const Tensor& x) {
  const auto shape = x.sizes();
  std::vector<int64_t> sizes(shape.begin(), shape.end());
  sizes.back() = layer.out;
  const Part* const parts = step.parts + layer.first;
  const int64_t dtype = parts->job.dtype;
  const Tensor y = empty(sizes, kNumbers[dtype]);
  const bool whole = layer.is_whole(step);
  const bool in_place = whole && !layer.any(step, [](const Part&, const Batch& batch) {
    return !batch.in_order;
  });
  std::optional<Tensor> product;
  for (const Part* part = parts; part != parts + layer.count; ++part) {
    const Batch& batch = step.batches[part->batch];
    const bool contracts = part->contracts(batch);
    // What only kernels of ours multiply may be written among columns of others.
    const bool among = !whole && !contracts && !batch.plain();
    Job job = part->job;
    job.rows = batch.rows, job.S = batch.S, job.N = batch.N;
    job.y_stride = layer.out, job.product_stride = whole ? layer.out : job.O;
    if (!whole || !product) {
      const int64_t count = batch.copies * batch.N;
      product = in_place ? matrix(y.data_ptr(), count, layer.out, layer.out, dtype)
                : among  ? matrix(at(y, part->offset), count, job.O, layer.out, dtype)
                         : scratch<1>(count, job.product_stride, dtype);
      multiply_copies(whole ? layer.product : part->product, *part, job, batch, x, *product);
    }
    if (contracts || !(in_place || among)) {
      contract(job, at(*product, whole ? part->offset : 0), x.data_ptr(), part->bias,
               at(y, part->offset));
    }
  }
  return y;
}

// The same, by the addresses of a layer and of a step.
Tensor run_program(int64_t layer_at, int64_t step_at, const Tensor& x) {
  const Layer& layer = *reinterpret_cast<const Layer*>(layer_at);
  const Laid& step = *reinterpret_cast<const Laid*>(step_at);
  if (!layer.takes(step, x))
    throw std::invalid_argument("a prepared layer was given x of another shape or type");
  return run(layer, step, x.is_contiguous() ? x : torch::stable::contiguous(x));
}

// A layer in compiled code. Python is asked for what no program does.
Tensor linear(const Tensor& given, const std::optional<Tensor>& bias, const Tensor& layer,
              int64_t out) {
  const Layer& own = **static_cast<const Layer* const*>(layer.data_ptr());
  const Laid* step = *own.step;
  if (given.dim() == 2) {
    const Tensor x = given.is_contiguous() ? given : torch::stable::contiguous(given);
    if (!step || !own.is_touched(*step)) {
      int32_t type;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
      const Tensor y = empty({x.size(0), out}, type);
      (*own.product)(x, bias, y);
      return y;
    }
    if (own.takes(*step, x)) return run(own, *step, x);
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
