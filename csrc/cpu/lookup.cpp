// grace::nearest, lookup, adapt_ and the pruned ones on a CPU: tensors -> pointers -> search.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "search.h"

namespace grace::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// In the order of the operators' arguments, see grace_kernels/sketch.py.
using SketchTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Dtype key_dtype(const Tensor& keys) {
  switch (keys.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "keys must be float32, float16 or bfloat16");
  }
}

Tensor with_unit_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) > 1 && t.stride(last) != 1 ? torch::stable::contiguous(t) : t;
}

[[noreturn]] void bad(const char* name, const std::string& rule, int64_t got, int64_t at = -1) {
  std::string message = std::string(name) + " must " + rule + ", got " + std::to_string(got);
  if (at >= 0) message += " at [" + std::to_string(at) + "]";
  throw std::invalid_argument(message);
}

std::string range(int64_t low, int64_t high) {
  return "lie in [" + std::to_string(low) + ", " + std::to_string(high) + "]";
}

Tensor empty_answers(int64_t batch, ScalarType dtype, const Tensor& like) {
  return torch::stable::empty({batch}, dtype, std::nullopt, like.device());
}

// What the operators share: a codebook, and perhaps a sketch of it, as pointers.
class Call {
 public:
  Call(const Tensor& query, const Tensor& keys, const Tensor& radii,
       const std::optional<Tensor>& count)
      : keys_(with_unit_stride(keys)), radii_(with_unit_stride(radii)) {
    STD_TORCH_CHECK(query.dim() == 2 && keys.dim() == 2 && radii.dim() == 1,
                    "query and keys must have rank 2 and radii rank 1");
    STD_TORCH_CHECK(query.size(1) == keys.size(1) && radii.size(0) == keys.size(0),
                    "query, keys and radii must fit together");
    STD_TORCH_CHECK(
        query.scalar_type() == keys.scalar_type() && radii.scalar_type() == ScalarType::Float,
        "query and keys must share a dtype and radii be float32");
    book_.count = keys.size(0);
    if (count.has_value()) {
      STD_TORCH_CHECK(count->numel() == 1 && count->scalar_type() == ScalarType::Long,
                      "count must be one int64");
      book_.count = *count->const_data_ptr<int64_t>();
      if (book_.count < 0 || book_.count > keys.size(0)) {
        bad("count", range(0, keys.size(0)), book_.count);
      }
    }
    book_.keys = keys_.const_data_ptr();
    book_.key_stride = keys_.stride(0);
    book_.dtype = key_dtype(keys_);
    book_.dim = keys_.size(1);
    book_.radii = static_cast<const float*>(radii_.const_data_ptr());
  }

  void prune(const SketchTensors& tensors) {
    const Tensor& head = std::get<3>(tensors);
    const auto shaped = [](const Tensor& t, ScalarType dtype,
                           std::initializer_list<int64_t> sizes) {
      bool fits = t.scalar_type() == dtype && t.is_contiguous() &&
                  t.dim() == static_cast<int64_t>(sizes.size());
      int64_t at = 0;
      for (const int64_t size : sizes) fits = fits && t.size(at++) == size;
      return fits;
    };
    STD_TORCH_CHECK(head.dim() == 3, "head must have rank 3");
    const int64_t blocks = head.size(0);
    STD_TORCH_CHECK(
        shaped(std::get<0>(tensors), ScalarType::Float, {book_.dim}) &&
            shaped(std::get<1>(tensors), ScalarType::BFloat16, {kDirections, book_.dim}) &&
            shaped(std::get<2>(tensors), ScalarType::Float, {kDirections + 3}) &&
            shaped(head, ScalarType::Char, {blocks, kHeadNumbers, kBlockKeys}) &&
            shaped(std::get<4>(tensors), ScalarType::Char, {blocks, kTailNumbers, kBlockKeys}) &&
            shaped(std::get<5>(tensors), ScalarType::Long, {}) &&
            shaped(std::get<8>(tensors), ScalarType::Long, {4}),
        "the tensors must be those of a sketch of the keys");
    Sketch sketch;
    sketch.codes.centre = std::get<0>(tensors).const_data_ptr<float>();
    sketch.codes.directions = static_cast<const uint16_t*>(std::get<1>(tensors).const_data_ptr());
    sketch.codes.dim = book_.dim;
    sketch.codes.scales = std::get<2>(tensors).const_data_ptr<float>();
    sketch.codes.head = head.const_data_ptr<int8_t>();
    sketch.codes.tail = std::get<4>(tensors).const_data_ptr<int8_t>();
    sketch.covered = std::clamp<int64_t>(*std::get<5>(tensors).const_data_ptr<int64_t>(), 0,
                                         std::min(book_.count, blocks * kBlockKeys));
    sketch.counters = static_cast<int64_t*>(std::get<8>(tensors).mutable_data_ptr());
    sketch_ = sketch;
  }

  // With radii that decide (`bounded`, which a sketch implies) or not.
  std::tuple<Tensor, Tensor> find(const Tensor& source, const int64_t* row, int64_t batch,
                                  bool bounded) const {
    const Tensor rows = with_unit_stride(source);
    Tensor index = empty_answers(batch, ScalarType::Long, source);
    Tensor distance = empty_answers(batch, ScalarType::Float, source);
    const Asking asking = {static_cast<const char*>(rows.const_data_ptr()),
                           rows.stride(0) * static_cast<int64_t>(rows.element_size()), batch, row};
    auto* index_p = static_cast<int64_t*>(index.mutable_data_ptr());
    auto* distance_p = static_cast<float*>(distance.mutable_data_ptr());
    if (sketch_.has_value()) {
      find_pruned(book_, *sketch_, asking, index_p, distance_p);
    } else {
      find_nearest(book_, asking, bounded, index_p, distance_p);
    }
    return {index, distance};
  }

 private:
  Tensor keys_, radii_;
  Codebook book_{};
  std::optional<Sketch> sketch_;
};

std::tuple<Tensor, Tensor> nearest(Tensor query, Tensor keys, Tensor radii,
                                   std::optional<Tensor> count) {
  return Call(query, keys, radii, count).find(query, nullptr, query.size(0), false);
}

std::tuple<Tensor, Tensor> lookup(Tensor query, Tensor keys, Tensor radii,
                                  std::optional<Tensor> count) {
  return Call(query, keys, radii, count).find(query, nullptr, query.size(0), true);
}

std::tuple<Tensor, Tensor> pruned_lookup(Tensor query, Tensor keys, Tensor radii,
                                         std::optional<Tensor> count, Tensor centre,
                                         Tensor directions, Tensor scales, Tensor head, Tensor tail,
                                         Tensor covered, Tensor radius_bound, Tensor outliers,
                                         Tensor counters) {
  Call call(query, keys, radii, count);
  call.prune({centre, directions, scales, head, tail, covered, radius_bound, outliers, counters});
  return call.find(query, nullptr, query.size(0), true);
}

Tensor row_numbers(const Tensor& t, int64_t batch) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == batch && t.scalar_type() == ScalarType::Long,
                  "query_row, first_row and last_row must be int64 of one length");
  return with_unit_stride(t);
}

void write_row(char* out, int64_t out_step, const char* in, int64_t in_step, int64_t columns,
               int64_t element) {
  if (out_step == element && in_step == element) {
    std::memcpy(out, in, columns * element);
    return;
  }
  for (int64_t c = 0; c < columns; ++c) {
    std::memcpy(out + c * out_step, in + c * in_step, element);
  }
}

std::tuple<Tensor, Tensor> replace_rows(const Call& call, const Tensor& hidden,
                                        const Tensor& source, const Tensor& query_row,
                                        const Tensor& first_row, const Tensor& last_row,
                                        const Tensor& keys, const Tensor& values) {
  STD_TORCH_CHECK(hidden.dim() == 2 && values.dim() == 2 && hidden.size(1) == values.size(1) &&
                      values.size(0) >= keys.size(0) &&
                      hidden.scalar_type() == values.scalar_type(),
                  "hidden and values must have one width and dtype, and values a row per key");
  const int64_t batch = query_row.size(0);
  const Tensor ask = row_numbers(query_row, batch);
  const Tensor first = row_numbers(first_row, batch);
  const Tensor last = row_numbers(last_row, batch);
  const int64_t* ask_p = ask.const_data_ptr<int64_t>();
  const int64_t* first_p = first.const_data_ptr<int64_t>();
  const int64_t* last_p = last.const_data_ptr<int64_t>();
  const int64_t rows = hidden.size(0);
  for (int64_t b = 0; b < batch; ++b) {
    if (ask_p[b] < 0) continue;
    if (ask_p[b] >= source.size(0)) {
      bad("query_row", "be less than " + std::to_string(source.size(0)), ask_p[b], b);
    }
    if (first_p[b] < 0 || first_p[b] > rows) bad("first_row", range(0, rows), first_p[b], b);
    if (last_p[b] < first_p[b] || last_p[b] > rows) {
      bad("last_row", range(first_p[b], rows), last_p[b], b);
    }
  }

  auto [index, distance] = call.find(source, ask_p, batch, true);
  const int64_t* index_p = index.const_data_ptr<int64_t>();

  const int64_t element = static_cast<int64_t>(hidden.element_size());
  char* out = static_cast<char*>(hidden.mutable_data_ptr());
  const char* in = static_cast<const char*>(values.const_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    if (index_p[b] < 0) continue;
    for (int64_t row = first_p[b]; row < last_p[b]; ++row) {
      write_row(out + row * hidden.stride(0) * element, hidden.stride(1) * element,
                in + index_p[b] * values.stride(0) * element, values.stride(1) * element,
                hidden.size(1), element);
    }
  }
  return {index, distance};
}

std::tuple<Tensor, Tensor> adapt_(Tensor hidden, Tensor source, Tensor query_row, Tensor first_row,
                                  Tensor last_row, Tensor keys, Tensor radii, Tensor values,
                                  std::optional<Tensor> count) {
  const Call call(source, keys, radii, count);
  return replace_rows(call, hidden, source, query_row, first_row, last_row, keys, values);
}

std::tuple<Tensor, Tensor> pruned_adapt_(Tensor hidden, Tensor source, Tensor query_row,
                                         Tensor first_row, Tensor last_row, Tensor keys,
                                         Tensor radii, Tensor values, std::optional<Tensor> count,
                                         Tensor centre, Tensor directions, Tensor scales,
                                         Tensor head, Tensor tail, Tensor covered,
                                         Tensor radius_bound, Tensor outliers, Tensor counters) {
  Call call(source, keys, radii, count);
  call.prune({centre, directions, scales, head, tail, covered, radius_bound, outliers, counters});
  return replace_rows(call, hidden, source, query_row, first_row, last_row, keys, values);
}

STABLE_TORCH_LIBRARY_IMPL(grace, CPU, m) {
  m.impl("nearest", TORCH_BOX(&nearest));
  m.impl("lookup", TORCH_BOX(&lookup));
  m.impl("adapt_", TORCH_BOX(&adapt_));
  m.impl("pruned_lookup", TORCH_BOX(&pruned_lookup));
  m.impl("pruned_adapt_", TORCH_BOX(&pruned_adapt_));
}

}  // namespace
}  // namespace grace::cpu
