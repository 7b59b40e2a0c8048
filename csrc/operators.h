// The operators of grace_kernels/ops.py as the compiled libraries have them: signatures, checks of
// shapes, registration. What answers is a class Call, one in cpu/lookup.cpp and one in cuda/call.h,
// with a constructor from a Question, write(Written), use(SketchTensors) and run().
//
// Of torch, its stable ABI alone, so that a library serves many versions of it. The Python package
// has said what is wrong with arguments; here is refused what would be read or written out of
// bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "sketch_layout.h"

// The namespace of the operators, as grace_kernels/namespace.py has it: another one in a copy that
// has to stand beside this package in one process.
#ifndef GRACE_NAMESPACE
#define GRACE_NAMESPACE grace
#endif
#define GRACE_JOIN_EXPANDED(a, b) a##b
#define GRACE_JOIN(a, b) GRACE_JOIN_EXPANDED(a, b)
#define GRACE_CPU_NAMESPACE GRACE_JOIN(GRACE_NAMESPACE, _cpu)
#define GRACE_CUDA_NAMESPACE GRACE_JOIN(GRACE_NAMESPACE, _cuda)
#define GRACE_CUDA_FORMS_NAMESPACE GRACE_JOIN(GRACE_NAMESPACE, _cuda_forms)

namespace grace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Answers = std::tuple<Tensor, Tensor>;  // index and distance

// Rows of `source` ask, in turn or by query_row; the slots are rows of `keys` and `radii`.
struct Question {
  Tensor source, keys, radii;
  std::optional<Tensor> count;
  bool bounded;  // whether the radius of the nearest slot decides over a hit (lookup) or not
};

// What adapt_ writes where, and which rows of the source ask.
struct Written {
  Tensor hidden, query_row, first_row, last_row, values;
};

// The tensors of a grace_kernels.Sketch.
struct SketchTensors {
  Tensor centre, directions, scales, head, tail, covered, radius_bound, outliers, counters;
};

inline Tensor with_unit_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) > 1 && t.stride(last) != 1 ? torch::stable::contiguous(t) : t;
}

inline void check_device(const Tensor& tensor, const char* name, const Question& question) {
  const auto named = [](int64_t device) {
    return device < 0 ? std::string("cpu") : "cuda:" + std::to_string(device);
  };
  const int64_t wanted = question.source.get_device_index(), got = tensor.get_device_index();
  STD_TORCH_CHECK(got == wanted, name, " must be on the device of the query (", named(wanted),
                  "), got ", named(got));
}

inline void check(const Question& question) {
  const auto& [source, keys, radii, count, bounded] = question;
  STD_TORCH_CHECK(source.dim() == 2 && keys.dim() == 2 && radii.dim() == 1,
                  "query and keys must have rank 2 and radii rank 1");
  STD_TORCH_CHECK(source.size(1) == keys.size(1) && radii.size(0) == keys.size(0),
                  "query, keys and radii must fit together");
  STD_TORCH_CHECK(
      source.scalar_type() == keys.scalar_type() && radii.scalar_type() == ScalarType::Float,
      "query and keys must share a dtype and radii be float32");
  check_device(keys, "keys", question);
  check_device(radii, "radii", question);
  if (!count.has_value()) return;
  STD_TORCH_CHECK(count->numel() == 1 && count->scalar_type() == ScalarType::Long,
                  "count must be one int64");
  check_device(*count, "count", question);
}

inline void check(const Written& written, const Question& question) {
  const auto& [hidden, query_row, first_row, last_row, values] = written;
  STD_TORCH_CHECK(hidden.dim() == 2 && values.dim() == 2 && hidden.size(1) == values.size(1) &&
                      values.size(0) >= question.keys.size(0) &&
                      hidden.scalar_type() == values.scalar_type(),
                  "hidden and values must have one width and dtype, and values a row per key");
  check_device(hidden, "hidden", question);
  check_device(values, "values", question);
  for (const Tensor* rows : {&query_row, &first_row, &last_row}) {
    STD_TORCH_CHECK(rows->dim() == 1 && rows->size(0) == query_row.size(0) &&
                        rows->scalar_type() == ScalarType::Long,
                    "query_row, first_row and last_row must be int64 of one length");
    check_device(*rows, "query_row, first_row and last_row", question);
  }
}

inline std::string text(const std::vector<int64_t>& sizes) {
  std::string list;
  for (const int64_t size : sizes) list += (list.empty() ? "" : ", ") + std::to_string(size);
  return "[" + list + "]";
}

inline void check(const SketchTensors& sketch, const Question& question) {
  const auto part = [&](const char* name, const Tensor& tensor, ScalarType dtype,
                        std::initializer_list<int64_t> sizes) {
    check_device(tensor, name, question);
    STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous(), name,
                    " must be contiguous and of the dtype of a Sketch");
    bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
    int64_t at = 0;
    for (const int64_t size : sizes) fits = fits && tensor.size(at++) == size;
    if (fits) return;
    std::vector<int64_t> got;
    for (int64_t i = 0; i < tensor.dim(); ++i) got.push_back(tensor.size(i));
    STD_TORCH_CHECK(false, "the tensors must be those of a sketch of the keys: ", name,
                    " must have shape ", text(sizes), ", got ", text(got));
  };
  const int64_t dim = question.keys.size(1);
  const int64_t blocks = sketch.head.dim() == 3 ? sketch.head.size(0) : 0;
  part("centre", sketch.centre, ScalarType::Float, {dim});
  part("directions", sketch.directions, ScalarType::BFloat16, {kDirections, dim});
  part("scales", sketch.scales, ScalarType::Float, {kScales});
  part("head", sketch.head, ScalarType::Char, {blocks, kHeadNumbers, kBlockSlots});
  part("tail", sketch.tail, ScalarType::Char, {blocks, kTailNumbers, kBlockSlots});
  part("covered", sketch.covered, ScalarType::Long, {});
  part("radius_bound", sketch.radius_bound, ScalarType::Float, {});
  part("outliers", sketch.outliers, ScalarType::Long, {kOutliers});
  part("counters", sketch.counters, ScalarType::Long, {kCounters});
}

template <class Call>
struct Operators {
  static Answers nearest(Tensor query, Tensor keys, Tensor radii, std::optional<Tensor> count) {
    return answer({query, keys, radii, count, false}, nullptr, nullptr);
  }

  static Answers lookup(Tensor query, Tensor keys, Tensor radii, std::optional<Tensor> count) {
    return answer({query, keys, radii, count, true}, nullptr, nullptr);
  }

  static Answers adapt_(Tensor hidden, Tensor source, Tensor query_row, Tensor first_row,
                        Tensor last_row, Tensor keys, Tensor radii, Tensor values,
                        std::optional<Tensor> count) {
    const Written written{hidden, query_row, first_row, last_row, values};
    return answer({source, keys, radii, count, true}, &written, nullptr);
  }

  static Answers pruned_lookup(Tensor query, Tensor keys, Tensor radii, std::optional<Tensor> count,
                               Tensor centre, Tensor directions, Tensor scales, Tensor head,
                               Tensor tail, Tensor covered, Tensor radius_bound, Tensor outliers,
                               Tensor counters) {
    const SketchTensors sketch{centre,  directions,   scales,   head,    tail,
                               covered, radius_bound, outliers, counters};
    return answer({query, keys, radii, count, true}, nullptr, &sketch);
  }

  static Answers pruned_adapt_(Tensor hidden, Tensor source, Tensor query_row, Tensor first_row,
                               Tensor last_row, Tensor keys, Tensor radii, Tensor values,
                               std::optional<Tensor> count, Tensor centre, Tensor directions,
                               Tensor scales, Tensor head, Tensor tail, Tensor covered,
                               Tensor radius_bound, Tensor outliers, Tensor counters) {
    const Written written{hidden, query_row, first_row, last_row, values};
    const SketchTensors sketch{centre,  directions,   scales,   head,    tail,
                               covered, radius_bound, outliers, counters};
    return answer({source, keys, radii, count, true}, &written, &sketch);
  }

  static void implement(torch::stable::detail::StableLibrary& library) {
    library.impl("nearest", TORCH_BOX(&nearest));
    library.impl("lookup", TORCH_BOX(&lookup));
    library.impl("adapt_", TORCH_BOX(&adapt_));
    library.impl("pruned_lookup", TORCH_BOX(&pruned_lookup));
    library.impl("pruned_adapt_", TORCH_BOX(&pruned_adapt_));
  }

 private:
  // All checks come before anything is read.
  static Answers answer(const Question& question, const Written* written,
                        const SketchTensors* sketch) {
    check(question);
    if (written != nullptr) check(*written, question);
    if (sketch != nullptr) check(*sketch, question);
    Call call(question);
    if (written != nullptr) call.write(*written);
    if (sketch != nullptr) call.use(*sketch);
    return call.run();
  }
};

}  // namespace grace
