// grace::nearest, lookup and adapt_ on a CPU: tensors -> Scan -> threads -> answers.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "isa.h"
#include "lookup_kernel.h"

namespace grace::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 128;                // queries per pass over the keys
constexpr int64_t kWorkPerThread = 256 << 10;  // bytes of keys below which a thread does not pay
constexpr int64_t kChunkBytes = 512 << 10;     // what a thread takes from the common pile at a time

// A query's distances must not depend on what the process did to rounding or subnormals
// (torch.set_flush_denormal).
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatingPoint() { std::fesetenv(&saved_); }
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
  DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;

 private:
  std::fenv_t saved_;
};

// How far coarse results may mislead. Let S be the exact sum of squares of a pair, c the coarse
// fp32 result, s the canonical one, u = 2^-24.
//
// * c: the difference carries one rounding (twice, being squared; subtraction does not underflow),
//   the square one, and at most D/8 + 5 additions follow (a vector lane, the tail, three folds), so
//     |c - S| <= g S + e,  g = m u / (1 - m u), m = D/8 + 16,
//   where e = (2 D + 16) 2^-150 (1 + g) covers what products and sums lose by underflow.
// * s: its fp64 sum is within 2^-40 S (any D < 2^17; 2^-28 for the largest D admitted) and is
//   rounded once to fp32, and rounding is monotone.
//
// Key n cannot be nearer than or tie with key b if the fp64 sums are more than an fp32 step apart,
// for which S_n (1 - 2^-28) > S_b (1 + 2^-28) (1 + 2^-23) + 2^-149 is enough, hence
//     c_n > c_b (1 + r) + a,  r = 2.5 g + 2^-20,  a = (D + 16) 2^-147
// for g <= 0.1: (1 + g) / (1 - g) <= 1 + 2.23 g, and 2^-20 leaves room for the fp32 rounding of
// this very bound. Where c_b overflows, the bound is +inf and every key stays a candidate. The same
// holds with the canonical s_b in place of c_b, and so with the square of a radius.
void set_coarse_margin(Scan& p) {
  const double m = static_cast<double>(p.dim) / 8 + 16;
  const double g = m * 0x1p-24 / (1 - m * 0x1p-24);
  p.relative = m * 0x1p-24 < 0.05 ? static_cast<float>(2.5 * g + 0x1p-20) : kInf;
  p.absolute = static_cast<float>(static_cast<double>(p.dim + 16) * 0x1p-147);
}

// One per calling thread, grown and kept, so that a call allocates nothing but its outputs.
class Workspace {
 public:
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      const size_t rounded = (bytes + 63) / 64 * 64;
      memory_.reset(std::aligned_alloc(64, rounded));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

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

// The rows of `source` that ask: all, or row[b] where that is not negative.
struct Asking {
  const char* source;
  int64_t stride_bytes;
  int64_t batch;
  const int64_t* row;
};

class Search {
 public:
  Search(const Tensor& query, const Tensor& keys, const Tensor& radii,
         const std::optional<Tensor>& count, bool bounded)
      : keys_(with_unit_stride(keys)), radii_(with_unit_stride(radii)), bounded_(bounded) {
    STD_TORCH_CHECK(query.dim() == 2 && keys.dim() == 2 && radii.dim() == 1,
                    "query and keys must have rank 2 and radii rank 1");
    STD_TORCH_CHECK(query.size(1) == keys.size(1) && radii.size(0) == keys.size(0),
                    "query, keys and radii must fit together");
    STD_TORCH_CHECK(
        query.scalar_type() == keys.scalar_type() && radii.scalar_type() == ScalarType::Float,
        "query and keys must share a dtype and radii be float32");
    count_ = keys.size(0);
    if (count.has_value()) {
      STD_TORCH_CHECK(count->numel() == 1 && count->scalar_type() == ScalarType::Long,
                      "count must be one int64");
      count_ = *count->const_data_ptr<int64_t>();
      if (count_ < 0 || count_ > keys.size(0)) bad("count", range(0, keys.size(0)), count_);
    }
    scan_.keys = keys_.const_data_ptr();
    scan_.key_stride = keys_.stride(0);
    scan_.dtype = key_dtype(keys_);
    scan_.dim = keys_.size(1);
    scan_.radii = static_cast<const float*>(radii_.const_data_ptr());
    // One line more than needed: rows a power of two apart would share their sets of the cache.
    scan_.query_stride = (scan_.dim + kVector - 1) / kVector * kVector + 16;
    set_coarse_margin(scan_);
  }

  void run(const Asking& asking, int64_t* index, float* distance) {
    const Kernels& kernels = chosen_kernels();
    DefaultFloatingPoint guard;
    std::fill(index, index + asking.batch, int64_t{-1});
    std::fill(distance, distance + asking.batch, kInf);
    set_limit();
    if (limit_ < 0) return;

    static thread_local Workspace workspace;
    const int64_t most = std::min(asking.batch, kBlock);
    const int64_t threads = thread_count(most);
    const size_t query_bytes = (most * scan_.query_stride * sizeof(float) + 63) / 64 * 64;
    char* memory = static_cast<char*>(
        workspace.reserve(query_bytes + threads * most * sizeof(Best) + most * sizeof(int64_t)));
    float* queries = reinterpret_cast<float*>(memory);
    Best* best = reinterpret_cast<Best*>(memory + query_bytes);
    int64_t* who = reinterpret_cast<int64_t*>(best + threads * most);
    scan_.queries = queries;

    int64_t b = 0;
    while (b < asking.batch) {
      scan_.batch = 0;
      for (; b < asking.batch && scan_.batch < most; ++b) {
        const int64_t row = asking.row == nullptr ? b : asking.row[b];
        if (row < 0) continue;
        const void* query = asking.source + row * asking.stride_bytes;
        float* widened = queries + scan_.batch * scan_.query_stride;
        if (kernels.prepare(query, scan_.dtype, scan_.dim, widened)) who[scan_.batch++] = b;
      }
      if (scan_.batch == 0) continue;
      search(kernels, threads, best);
      for (int64_t q = 0; q < scan_.batch; ++q) answer(best[q], &index[who[q]], &distance[who[q]]);
    }
  }

 private:
  // The largest s that can matter: with `bounded_` no key beyond the largest radius can change an
  // answer. Negative if nothing can match.
  void set_limit() {
    constexpr int kLanes = 8;
    float largest[kLanes];
    std::fill(largest, largest + kLanes, -kInf);
    bool live = false;
    for (int64_t i = 0; i < count_; i += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, count_ - i));
      for (int j = 0; j < lanes; ++j) {
        const float radius = scan_.radii[i + j];
        largest[j] = radius > largest[j] ? radius : largest[j];  // false for a NaN
        live |= radius != -kInf;
      }
    }
    const float radius = *std::max_element(largest, largest + kLanes);
    if (!live || (bounded_ && radius < 0)) {
      limit_ = -1;
    } else if (!bounded_ || radius == kInf) {
      limit_ = kInf;
    } else {
      // d <= radius means sqrt(s) <= radius (1 + u), after the rounding of the root.
      const double s = static_cast<double>(radius) * radius * (1 + 0x1p-22);
      const double bound = s + (s * scan_.relative + scan_.absolute);
      limit_ = bound < 0x1p127 ? static_cast<float>(bound * (1 + 0x1p-22) + 0x1p-148) : kInf;
    }
  }

  int64_t key_bytes() const {
    return std::max<int64_t>(1, scan_.dim * static_cast<int64_t>(keys_.element_size()));
  }

  int64_t thread_count(int64_t batch) const {
    const int64_t work = count_ * key_bytes() * ((batch + 3) / 4);
    const int64_t worth = std::max<int64_t>(1, work / kWorkPerThread);
    return std::min<int64_t>({worth, std::max<int64_t>(1, count_ / 8),
                              static_cast<int64_t>(torch::stable::get_num_threads())});
  }

  void search(const Kernels& kernels, int64_t threads, Best* best) {
    // Threads take chunks from a common pile, in ascending order each, so that a busy core does not
    // hold the others up. Which thread scans what does not change an answer.
    const int64_t chunk = std::max<int64_t>(
        8, std::min(kChunkBytes / key_bytes(), (count_ + threads - 1) / threads) / 8 * 8);
    std::atomic<int64_t> next{0};
    const auto work = [&](int64_t begin, int64_t end) {
      DefaultFloatingPoint guard;
      for (int64_t thread = begin; thread < end; ++thread) {
        Best* mine = best + thread * scan_.batch;
        for (int64_t q = 0; q < scan_.batch; ++q) {
          mine[q].threshold = limit_;
          mine[q].s = kInf;
          mine[q].index = -1;
          mine[q].candidates = 0;
        }
        for (;;) {
          const int64_t start = next.fetch_add(chunk, std::memory_order_relaxed);
          if (start >= count_) break;
          kernels.scan(scan_, start, std::min(start + chunk, count_), mine);
        }
        kernels.finish(scan_, mine);
      }
    };
    if (threads == 1) {
      work(0, 1);
    } else {
      torch::stable::parallel_for(0, threads, 1, work);
    }
    for (int64_t thread = 1; thread < threads; ++thread) {
      for (int64_t q = 0; q < scan_.batch; ++q) {
        const Best& other = best[thread * scan_.batch + q];
        if (other.index < 0) continue;
        Best& mine = best[q];
        if (mine.index < 0 || other.s < mine.s || (other.s == mine.s && other.index < mine.index)) {
          mine.s = other.s;
          mine.index = other.index;
        }
      }
    }
  }

  void answer(const Best& best, int64_t* index, float* distance) const {
    int64_t slot = best.index;
    // No key at a finite s: if all of them matter they tie at +inf.
    if (slot < 0 && limit_ == kInf) {
      slot = 0;
      while (scan_.radii[slot] == -kInf) ++slot;
    }
    if (slot < 0) return;
    const float d = std::sqrt(best.s);
    if (bounded_ && !(d <= scan_.radii[slot])) return;
    *index = slot;
    *distance = d;
  }

  Tensor keys_, radii_;
  bool bounded_;
  int64_t count_;
  float limit_ = -1;
  Scan scan_{};
};

Tensor empty_answers(int64_t batch, ScalarType dtype, const Tensor& like) {
  return torch::stable::empty({batch}, dtype, std::nullopt, like.device());
}

std::tuple<Tensor, Tensor> find(const Tensor& query, const Tensor& keys, const Tensor& radii,
                                const std::optional<Tensor>& count, bool bounded) {
  Search search(query, keys, radii, count, bounded);
  const Tensor rows = with_unit_stride(query);
  Tensor index = empty_answers(rows.size(0), ScalarType::Long, query);
  Tensor distance = empty_answers(rows.size(0), ScalarType::Float, query);
  const Asking asking = {static_cast<const char*>(rows.const_data_ptr()),
                         rows.stride(0) * static_cast<int64_t>(rows.element_size()), rows.size(0),
                         nullptr};
  search.run(asking, static_cast<int64_t*>(index.mutable_data_ptr()),
             static_cast<float*>(distance.mutable_data_ptr()));
  return {index, distance};
}

std::tuple<Tensor, Tensor> nearest(Tensor query, Tensor keys, Tensor radii,
                                   std::optional<Tensor> count) {
  return find(query, keys, radii, count, false);
}

std::tuple<Tensor, Tensor> lookup(Tensor query, Tensor keys, Tensor radii,
                                  std::optional<Tensor> count) {
  return find(query, keys, radii, count, true);
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

std::tuple<Tensor, Tensor> adapt_(Tensor hidden, Tensor source, Tensor query_row, Tensor first_row,
                                  Tensor last_row, Tensor keys, Tensor radii, Tensor values,
                                  std::optional<Tensor> count) {
  Search search(source, keys, radii, count, true);
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

  const Tensor asked = with_unit_stride(source);
  Tensor index = empty_answers(batch, ScalarType::Long, source);
  Tensor distance = empty_answers(batch, ScalarType::Float, source);
  int64_t* index_p = static_cast<int64_t*>(index.mutable_data_ptr());
  const Asking asking = {static_cast<const char*>(asked.const_data_ptr()),
                         asked.stride(0) * static_cast<int64_t>(asked.element_size()), batch,
                         ask_p};
  search.run(asking, index_p, static_cast<float*>(distance.mutable_data_ptr()));

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

STABLE_TORCH_LIBRARY_IMPL(grace, CPU, m) {
  m.impl("nearest", TORCH_BOX(&nearest));
  m.impl("lookup", TORCH_BOX(&lookup));
  m.impl("adapt_", TORCH_BOX(&adapt_));
}

}  // namespace
}  // namespace grace::cpu
