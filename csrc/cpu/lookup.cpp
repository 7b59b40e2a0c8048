// grace::* on a CPU: tensors -> pointers -> search.h.
#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "../operators.h"
#include "search.h"

namespace grace::cpu {
namespace {

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

[[noreturn]] void bad(const char* name, const std::string& rule, int64_t got, int64_t at = -1) {
  std::string message = std::string(name) + " must " + rule + ", got " + std::to_string(got);
  if (at >= 0) message += " at [" + std::to_string(at) + "]";
  throw std::invalid_argument(message);
}

std::string range(int64_t low, int64_t high) {
  return "lie in [" + std::to_string(low) + ", " + std::to_string(high) + "]";
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

// One call of an operator; keeps the tensors it points into.
class Call {
 public:
  explicit Call(const Question& question)
      : source_(with_unit_stride(question.source)),
        keys_(with_unit_stride(question.keys)),
        radii_(with_unit_stride(question.radii)),
        bounded_(question.bounded) {
    book_.count = keys_.size(0);
    if (question.count.has_value()) {
      book_.count = *question.count->const_data_ptr<int64_t>();
      if (book_.count < 0 || book_.count > keys_.size(0)) {
        bad("count", range(0, keys_.size(0)), book_.count);
      }
    }
    book_.keys = keys_.const_data_ptr();
    book_.key_stride = keys_.stride(0);
    book_.dtype = key_dtype(keys_);
    book_.dim = keys_.size(1);
    book_.radii = static_cast<const float*>(radii_.const_data_ptr());
    asking_.source = static_cast<const char*>(source_.const_data_ptr());
    asking_.stride_bytes = source_.stride(0) * static_cast<int64_t>(source_.element_size());
    asking_.batch = source_.size(0);
  }

  void use(const SketchTensors& tensors) {
    Sketch sketch;
    sketch.codes.centre = tensors.centre.const_data_ptr<float>();
    sketch.codes.directions = static_cast<const uint16_t*>(tensors.directions.const_data_ptr());
    sketch.codes.dim = book_.dim;
    sketch.codes.scales = tensors.scales.const_data_ptr<float>();
    sketch.codes.head = tensors.head.const_data_ptr<int8_t>();
    sketch.codes.tail = tensors.tail.const_data_ptr<int8_t>();
    sketch.covered = std::clamp<int64_t>(*tensors.covered.const_data_ptr<int64_t>(), 0,
                                         std::min(book_.count, tensors.head.size(0) * kBlockSlots));
    sketch.counters = static_cast<int64_t*>(tensors.counters.mutable_data_ptr());
    sketch_ = sketch;
  }

  void write(const Written& written) {
    written_ = written;
    query_row_ = with_unit_stride(written.query_row);
    first_row_ = with_unit_stride(written.first_row);
    last_row_ = with_unit_stride(written.last_row);
    asking_.row = query_row_->const_data_ptr<int64_t>();
    asking_.batch = query_row_->size(0);
    check_rows();
  }

  Answers run() const {
    Tensor index = empty_answers(ScalarType::Long), distance = empty_answers(ScalarType::Float);
    auto* index_p = static_cast<int64_t*>(index.mutable_data_ptr());
    auto* distance_p = static_cast<float*>(distance.mutable_data_ptr());
    if (sketch_.has_value()) {
      find_pruned(book_, *sketch_, asking_, index_p, distance_p);
    } else {
      find_nearest(book_, asking_, bounded_, index_p, distance_p);
    }
    if (written_.has_value()) write_hits(index_p);
    return {index, distance};
  }

 private:
  Tensor empty_answers(ScalarType dtype) const {
    return torch::stable::empty({asking_.batch}, dtype, std::nullopt, source_.device());
  }

  // Before anything is written.
  void check_rows() const {
    const int64_t* first = first_row_->const_data_ptr<int64_t>();
    const int64_t* last = last_row_->const_data_ptr<int64_t>();
    const int64_t rows = written_->hidden.size(0);
    for (int64_t b = 0; b < asking_.batch; ++b) {
      if (asking_.row[b] < 0) continue;
      if (asking_.row[b] >= source_.size(0)) {
        bad("query_row", "be less than " + std::to_string(source_.size(0)), asking_.row[b], b);
      }
      if (first[b] < 0 || first[b] > rows) bad("first_row", range(0, rows), first[b], b);
      if (last[b] < first[b] || last[b] > rows) {
        bad("last_row", range(first[b], rows), last[b], b);
      }
    }
  }

  void write_hits(const int64_t* index) const {
    const Tensor &hidden = written_->hidden, &values = written_->values;
    const int64_t* first = first_row_->const_data_ptr<int64_t>();
    const int64_t* last = last_row_->const_data_ptr<int64_t>();
    const int64_t element = static_cast<int64_t>(hidden.element_size());
    char* out = static_cast<char*>(hidden.mutable_data_ptr());
    const char* in = static_cast<const char*>(values.const_data_ptr());
    for (int64_t b = 0; b < asking_.batch; ++b) {
      if (index[b] < 0) continue;
      for (int64_t row = first[b]; row < last[b]; ++row) {
        write_row(out + row * hidden.stride(0) * element, hidden.stride(1) * element,
                  in + index[b] * values.stride(0) * element, values.stride(1) * element,
                  hidden.size(1), element);
      }
    }
  }

  Tensor source_, keys_, radii_;
  bool bounded_;
  Codebook book_{};
  Asking asking_{};
  std::optional<Sketch> sketch_;
  std::optional<Written> written_;
  std::optional<Tensor> query_row_, first_row_, last_row_;
};

STABLE_TORCH_LIBRARY_IMPL(GRACE_NAMESPACE, CPU, m) { Operators<Call>::implement(m); }

}  // namespace
}  // namespace grace::cpu
