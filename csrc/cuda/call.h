// One call of an operator: tensors -> Problem -> launches.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>

#include "../operators.h"
#include "device.h"
#include "kernels.h"

namespace grace::cuda {

constexpr int64_t kLaunchQueries = 4096;  // more queries are several launches

// Not torch::stable::empty, which looks the operator up by its name and boxes six arguments: a call
// of ours has three of these.
inline Tensor allocate(const char* what, int64_t size, ScalarType dtype, const Tensor& like) {
  const int32_t kind = dtype == ScalarType::Long    ? aoti_torch_dtype_int64()
                       : dtype == ScalarType::Float ? aoti_torch_dtype_float32()
                                                    : aoti_torch_dtype_uint8();
  try {
    int32_t device = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
    AtenTensorHandle made = nullptr;
    const int64_t stride = 1;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(1, &size, &stride, kind, device, like.get_device_index(), &made));
    return Tensor(made);
  } catch (const std::exception& error) {
    const int64_t element = dtype == ScalarType::Long ? 8 : dtype == ScalarType::Float ? 4 : 1;
    throw std::runtime_error(
        std::string("grace_cuda: ") + what + " of " + std::to_string(size * element) +
        " bytes could not be allocated on cuda:" + std::to_string(like.get_device_index()) +
        " (out of memory?): " + error.what());
  }
}

// Rows of 16-byte vectors: where one starts and how long it is are multiples of 16 bytes.
inline bool rows_aligned(const void* data, int64_t stride_bytes, int64_t rows) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows <= 1 || stride_bytes % 16 == 0);
}

inline Tensor at_16_bytes(const Tensor& t) {
  return rows_aligned(t.const_data_ptr(), 0, 1) ? t : torch::stable::clone(t);
}

// Arguments of one call; keeps the tensors it points into.
class Call {
 public:
  explicit Call(const Question& question)
      : source_(with_unit_stride(question.source)),
        keys_(with_unit_stride(question.keys)),
        radii_(question.radii),
        count_(question.count) {
    STD_TORCH_CHECK(keys_.size(1) <= kMaxDim, "keys must have at most ", kMaxDim,
                    " columns on CUDA, got ", keys_.size(1));
    STD_TORCH_CHECK(keys_.size(0) <= kMaxSlots, "keys must have at most ", kMaxSlots,
                    " rows on CUDA, got ", keys_.size(0));
    const int64_t element = static_cast<int64_t>(keys_.element_size());
    p_.keys = keys_.const_data_ptr();
    p_.key_stride = keys_.stride(0);
    p_.capacity = keys_.size(0);
    p_.dim = static_cast<int>(keys_.size(1));
    p_.keys_aligned =
        rows_aligned(p_.keys, p_.key_stride * element, p_.capacity) && p_.dim * element % 16 == 0;
    p_.radii = static_cast<const float*>(radii_.const_data_ptr());
    p_.radius_stride = radii_.stride(0);
    if (count_.has_value()) p_.count = count_->const_data_ptr<int64_t>();
    set_source();
    if (p_.dim == 0) p_.keys_aligned = p_.source_aligned = false;  // no address to copy from
    p_.batch = source_.size(0);
    p_.bounded = question.bounded;
  }

  // A sketch of the keys is looked at first.
  void use(const SketchTensors& sketch) {
    for (const Tensor* codes : {&sketch.head, &sketch.tail}) {
      STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(codes->const_data_ptr()) % 4 == 0,
                      "head and tail must start at a multiple of 4 bytes");
    }
    centre_ = at_16_bytes(sketch.centre);
    directions_ = at_16_bytes(sketch.directions);
    SketchView& view = p_.sketch;
    view.centre = centre_->const_data_ptr<float>();
    view.directions = static_cast<const uint16_t*>(directions_->const_data_ptr());
    view.aligned = p_.dim % 8 == 0;
    view.scales = sketch.scales.const_data_ptr<float>();
    view.head = static_cast<const int8_t*>(sketch.head.const_data_ptr());
    view.tail = static_cast<const int8_t*>(sketch.tail.const_data_ptr());
    view.blocks = p_.dim > 0 ? sketch.head.size(0) : 0;
    view.covered = sketch.covered.const_data_ptr<int64_t>();
    view.radius_bound = sketch.radius_bound.const_data_ptr<float>();
    view.outliers = sketch.outliers.const_data_ptr<int64_t>();
    view.counters = sketch.counters.mutable_data_ptr<int64_t>();
    view.margin = sketch_margin(p_.dim);
  }

  // The batch items ask with rows query_row of the source, and their hits are written.
  void write(const Written& written) {
    written_ = written;
    const auto& [hidden, query_row, first_row, last_row, values] = written;
    p_.batch = query_row.size(0);
    p_.query_row = query_row.const_data_ptr<int64_t>();
    p_.query_row_stride = query_row.stride(0);
    p_.first_row = first_row.const_data_ptr<int64_t>();
    p_.first_row_stride = first_row.stride(0);
    p_.last_row = last_row.const_data_ptr<int64_t>();
    p_.last_row_stride = last_row.stride(0);
    if (hidden.numel() == 0) return;
    const int64_t element = static_cast<int64_t>(hidden.element_size());
    STD_TORCH_CHECK(element == 2 || element == 4 || element == 8,
                    "hidden must have elements of 2, 4 or 8 bytes, got ", element);
    p_.hidden = static_cast<char*>(hidden.mutable_data_ptr());
    p_.hidden_rows = hidden.size(0);
    p_.hidden_stride = hidden.stride(0) * element;
    p_.hidden_step = hidden.stride(1) * element;
    p_.values = static_cast<const char*>(values.const_data_ptr());
    p_.value_stride = values.stride(0) * element;
    p_.value_step = values.stride(1) * element;
    p_.units = hidden.size(1);
    p_.unit = static_cast<int>(element);
    if (p_.hidden_step == element && p_.value_step == element && p_.units * element % 16 == 0 &&
        rows_aligned(p_.hidden, p_.hidden_stride, p_.hidden_rows) &&
        rows_aligned(p_.values, p_.value_stride, values.size(0))) {
      p_.units = p_.units * element / 16;
      p_.unit = 16;
      p_.hidden_step = p_.value_step = 16;
    }
    hidden_end_ = p_.hidden + (hidden.size(0) - 1) * hidden.stride(0) * element +
                  (hidden.size(1) - 1) * hidden.stride(1) * element + element;
  }

  Answers run() {
    const OnDevice on(source_.get_device_index());
    Tensor index = allocate("index", p_.batch, ScalarType::Long, source_);
    Tensor distance = allocate("distance", p_.batch, ScalarType::Float, source_);
    if (p_.batch == 0) return {index, distance};
    const int device_index = source_.get_device_index();
    const Device& device = State::get().device(device_index);
    const bool pruned = p_.sketch.counters != nullptr;
    const Launches launches = choose(device, pruned);
    const Kernel& kernel = launches.scan;
    State::get().prepare(device_index, kernel);
    if (launches.before) State::get().prepare(device_index, *launches.before);
    if (launches.behind) State::get().prepare(device_index, *launches.behind);
    // A block may write while another one still reads its queries.
    const int64_t written_by_one = launches.behind ? 1 : kernel.queries;
    if (p_.batch > written_by_one && hidden_meets_source()) {
      source_ = torch::stable::clone(source_);
      set_source();
    }
    const Margin margin = kernel.margin(p_.dim);
    p_.relative = margin.relative;
    p_.absolute = margin.absolute;
    p_.index = static_cast<int64_t*>(index.mutable_data_ptr());
    p_.distance = static_cast<float*>(distance.mutable_data_ptr());
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &current));
    const cudaStream_t stream = static_cast<cudaStream_t>(current);
    // All that may fail comes before anything is written, if it can: parts run one after the other
    // and share the workspace and the tickets.
    const int64_t at_once = std::min(kLaunchQueries, p_.batch);
    const dim3 first = grid(device, launches, at_once);
    const dim3 last = grid(device, launches, (p_.batch - 1) % kLaunchQueries + 1);
    const int64_t records = std::max(int64_t{first.x} * first.y, int64_t{last.x} * last.y);
    const int64_t bytes = records * (kernel.queries + 1) * static_cast<int64_t>(sizeof(Partial));
    const int64_t sums = launches.before ? at_once * parts_of(p_.dim) * kQuerySums : 0;
    const Tensor workspace = allocate(
        "workspace", bytes + sums * static_cast<int64_t>(sizeof(float)), ScalarType::Byte, source_);
    p_.partials = workspace.mutable_data_ptr();
    if (launches.before) {
      p_.sums = reinterpret_cast<float*>(static_cast<char*>(p_.partials) + bytes);
    }
    p_.tickets = State::get().tickets.take(device_index, stream, static_cast<int>(first.y));
    for (int64_t at = 0; at < p_.batch; at += kLaunchQueries) {
      const cudaError_t status =
          launch(launches, device, part(at, std::min(kLaunchQueries, p_.batch - at)), stream);
      if (status == cudaSuccess) continue;
      std::string what = "the launch";
      if (at > 0) {
        what += " for query " + std::to_string(at) + " and later ones, with those before answered,";
      }
      check(status, what.c_str());
    }
    return {index, distance};
  }

 private:
  void set_source() {
    p_.source = source_.const_data_ptr();
    p_.source_stride = source_.stride(0);
    p_.source_rows = source_.size(0);
    const int64_t element = static_cast<int64_t>(source_.element_size());
    p_.source_aligned = rows_aligned(p_.source, p_.source_stride * element, p_.source_rows) &&
                        p_.dim * element % 16 == 0;
    // Without elements there is no address, but the kernel takes null for "does not ask".
    if (p_.dim == 0) p_.source = this;
  }

  bool hidden_meets_source() const {
    if (p_.hidden == nullptr || source_.numel() == 0) return false;
    const char* begin = static_cast<const char*>(p_.source);
    const char* end =
        begin + ((p_.source_rows - 1) * p_.source_stride + p_.dim) * source_.element_size();
    return p_.hidden < end && begin < hidden_end_;
  }

  // The launches of a call: the scan, and where a form asks for it one before or behind. The second
  // one may begin before the first has ended, see let_dependents_start().
  struct Launches {
    Kernel scan;
    std::optional<Kernel> before, behind;
    bool dependent = false;
  };

  template <class T>
  Launches choose(const Asked& asked) const {
    const unsigned forms = forms_in_use();
    Launches found{cuda::choose<T>(asked, forms), std::nullopt, std::nullopt};
    found.dependent = forms & kFormDependent && asked.capability >= 90;
    if (asked.pruned) {
      found.scan = with_sketch(found.scan);
      // More queries of a block share the directions.
      if (forms & kFormCoordinates && asked.batch <= 64 && asked.dim > 0)
        found.before = coordinates<T>();
    } else if (found.scan.apart || (forms & kFormApart && found.scan.margin != &no_margin)) {
      found.behind = apart<T>();
    }
    return found;
  }

  Launches choose(const Device& device, bool pruned) const {
    const Asked asked = {p_.batch,
                         p_.capacity,
                         p_.dim,
                         p_.keys_aligned && p_.source_aligned,
                         pruned,
                         device.processors,
                         device.shared_limit,
                         device.capability};
    switch (keys_.scalar_type()) {
      case ScalarType::Float:
        return choose<float>(asked);
      case ScalarType::Half:
        return choose<Half>(asked);
      case ScalarType::BFloat16:
        return choose<BFloat>(asked);
      default:
        STD_TORCH_CHECK(false, "keys must be float32, float16 or bfloat16");
    }
  }

  // Batch items from..from+batch-1.
  Problem part(int64_t from, int64_t batch) const {
    Problem p = p_;
    p.batch = batch;
    p.index += from;
    p.distance += from;
    if (p.query_row != nullptr) {
      p.query_row += from * p.query_row_stride;
    } else {
      p.source = static_cast<const char*>(p.source) +
                 from * p.source_stride * static_cast<int64_t>(source_.element_size());
    }
    if (p.first_row != nullptr) {
      p.first_row += from * p.first_row_stride;
      p.last_row += from * p.last_row_stride;
    }
    return p;
  }

  // Slices times blocks of queries. Depends on shapes only, never on count: a graph stays right
  // when slots come into use.
  dim3 grid(const Device& device, const Launches& launches, int64_t batch) const {
    const Kernel& kernel = launches.scan;
    const int64_t query_blocks = (batch + kernel.queries - 1) / kernel.queries;
    const int64_t record = (kernel.queries + 1) * static_cast<int64_t>(sizeof(Partial));
    int64_t slices = std::min(device.processors * kernel.blocks / query_blocks,
                              (p_.capacity + kernel.least_slots - 1) / kernel.least_slots);
    // A block that answers for all of them has their records in shared memory.
    if (!launches.behind) slices = std::min(slices, kernel.scan_bytes / record);
    slices = std::max(slices, (p_.capacity + kMaxSliceSlots - 1) / kMaxSliceSlots);
    slices = std::max<int64_t>(slices, 1);
    return dim3(static_cast<unsigned>(slices), static_cast<unsigned>(query_blocks));
  }

  cudaError_t launch(const Launches& launches, const Device& device, Problem p,
                     cudaStream_t stream) const {
    cudaGetLastError();  // an error of somebody else's
    const auto one = [&](const Kernel& kernel, dim3 blocks, bool dependent) {
      void* arguments[] = {&p};
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
      const dim3 threads(kernel.threads);
      const size_t shared = kernel.shared_bytes;
      const cudaLaunchConfig_t config = {blocks, threads, shared, stream, &attribute, 1};
      const cudaError_t status =
          dependent ? cudaLaunchKernelExC(&config, kernel.function, arguments)
                    : cudaLaunchKernel(kernel.function, blocks, threads, arguments, shared, stream);
      return status == cudaSuccess ? cudaGetLastError() : status;
    };
    const auto batch = static_cast<unsigned>(p.batch);
    if (launches.before) {
      const dim3 blocks(parts_of(p.dim), (batch + kTogether - 1) / kTogether);
      const cudaError_t status = one(*launches.before, blocks, false);
      if (status != cudaSuccess) return status;
    }
    const dim3 blocks = grid(device, launches, p.batch);
    if (launches.behind) {
      p.apart_slices = static_cast<int>(blocks.x);
      p.apart_queries = launches.scan.queries;
    }
    const cudaError_t status = one(launches.scan, blocks, launches.before && launches.dependent);
    if (status != cudaSuccess || !launches.behind) return status;
    return one(*launches.behind, dim3(batch), launches.dependent);
  }

  Tensor source_, keys_, radii_;
  std::optional<Tensor> count_, centre_, directions_;
  std::optional<Written> written_;
  const char* hidden_end_ = nullptr;
  Problem p_{};
};

}  // namespace grace::cuda
