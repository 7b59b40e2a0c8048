// What reading every key and reading through a sketch have in common: queries in passes, threads,
// bounds, answers.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "search.h"

namespace grace::cpu {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kWorkPerThread = 256 << 10;  // bytes of keys below which a thread does not pay
constexpr int64_t kChunkBytes = 512 << 10;  // what a thread takes from the common pile at a time,
constexpr int64_t kChunkSlots = 512;        // or this where many queries ask

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

// One per calling thread, grown and kept, so that a call allocates nothing but its outputs.
class Workspace {
 public:
  void reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    memory_.reset();
    size_ = 0;
    const size_t rounded = (bytes + 63) / 64 * 64;
    memory_.reset(std::aligned_alloc(64, rounded));
    if (memory_ == nullptr) throw std::bad_alloc();
    size_ = rounded;
  }
  template <class T>
  static size_t size_of(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }
  template <class T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(static_cast<char*>(memory_.get()) + used_);
    used_ += size_of<T>(count);
    return result;
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0, used_ = 0;
};

// How far coarse results may mislead: a key of a coarse result above c (1 + relative) + absolute is
// farther than one of a coarse or canonical result c: Lemma 5 of docs/error-bounds.md.
inline void set_coarse_margin(Scan& p) {
  const double m = static_cast<double>(p.dim) / 8 + 16;
  const double g = m * 0x1p-24 / (1 - m * 0x1p-24);
  p.relative = m * 0x1p-24 < 0.05 ? static_cast<float>(2.5 * g + 0x1p-20) : kInf;
  p.absolute = static_cast<float>(static_cast<double>(p.dim + 16) * 0x1p-147);
}

inline void clear(Best& best, float threshold) {
  best.threshold = threshold;
  best.s = kInf;
  best.index = -1;
  best.candidates = 0;
}

inline void merge(Best& best, const Best& other) {
  if (other.index < 0) return;
  if (best.index < 0 || other.s < best.s || (other.s == best.s && other.index < best.index)) {
    best.s = other.s;
    best.index = other.index;
  }
}

template <class Work>
void in_parallel(int64_t threads, const Work& work) {
  const auto guarded = [&](int64_t begin, int64_t end) {
    DefaultFloatingPoint guard;
    for (int64_t thread = begin; thread < end; ++thread) work(thread);
  };
  if (threads == 1) {
    guarded(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, guarded);
  }
}

class Search {
 public:
  Search(const Codebook& book, const Asking& asking, bool bounded, int64_t* index, float* distance)
      : kernels_(chosen_kernels()),
        count_(book.count),
        asking_(asking),
        bounded_(bounded),
        index_(index),
        distance_(distance),
        most_(std::min(asking.batch, kMostQueries)) {
    scan_.keys = book.keys;
    scan_.key_stride = book.key_stride;
    scan_.dtype = book.dtype;
    scan_.dim = book.dim;
    scan_.radii = book.radii;
    // A line more, for the sum of squares, and as rows a power of two apart would share sets of the
    // cache.
    scan_.query_stride = padded(scan_.dim) + 16;
    set_coarse_margin(scan_);
    threads_ = thread_count();
    std::fill(index, index + asking.batch, int64_t{-1});
    std::fill(distance, distance + asking.batch, kInf);
  }

  // Read every key for the batch items of `some`, or for all.
  void run(const std::vector<int64_t>* some = nullptr) {
    set_limit();
    if (limit_ < 0) return;
    workspace().reserve(common_bytes());
    take_common();
    const int64_t items = some == nullptr ? asking_.batch : static_cast<int64_t>(some->size());
    for (int64_t next = 0; next < items;) {
      gather(next, items, some);
      if (scan_.batch == 0) continue;
      scan_all();
      for (int64_t q = 0; q < scan_.batch; ++q) {
        // No key at a finite s: if all of them matter they tie at +inf.
        if (best_[q].index < 0 && limit_ == kInf) {
          best_[q].index = 0;
          while (scan_.radii[best_[q].index] == -kInf) ++best_[q].index;
        }
        answer(best_[q], who_[q]);
      }
    }
  }

 protected:
  static Workspace& workspace() {
    static thread_local Workspace memory;
    return memory;
  }

  int64_t panel_numbers() const {
    if (most_ < kernels_.product_batch || count_ < kProductKeys) return 0;
    return panel_rows(most_) * padded(scan_.dim);
  }

  size_t common_bytes() const {
    return Workspace::size_of<float>(most_ * scan_.query_stride) +
           Workspace::size_of<float>(panel_numbers()) + Workspace::size_of<Best>(threads_ * most_) +
           Workspace::size_of<int64_t>(most_);
  }

  void take_common() {
    queries_ = workspace().take<float>(most_ * scan_.query_stride);
    panels_ = workspace().take<float>(panel_numbers());
    best_ = workspace().take<Best>(threads_ * most_);
    who_ = workspace().take<int64_t>(most_);
    scan_.queries = queries_;
  }

  // Widen the next queries that ask, up to what a pass takes. One with a NaN is a miss.
  void gather(int64_t& next, int64_t items, const std::vector<int64_t>* some) {
    scan_.batch = 0;
    scan_.panels = nullptr;  // those of the pass before
    for (; next < items && scan_.batch < most_; ++next) {
      const int64_t b = some == nullptr ? next : (*some)[next];
      const int64_t row = asking_.row == nullptr ? b : asking_.row[b];
      if (row < 0) continue;
      const void* query = asking_.source + row * asking_.stride_bytes;
      float* widened = queries_ + scan_.batch * scan_.query_stride;
      if (kernels_.prepare(query, scan_.dtype, scan_.dim, widened)) who_[scan_.batch++] = b;
    }
  }

  // Before keys are read for all queries.
  void arrange() {
    if (scan_.panels != nullptr || panel_numbers() == 0) return;
    if (scan_.batch < kernels_.product_batch) return;
    kernels_.arrange(scan_, panels_);
    scan_.panels = panels_;
  }

  // The largest s that can matter: with `bounded_` no key beyond the largest radius can change an
  // answer (Lemma 2). Negative if nothing can match.
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
      const double s = static_cast<double>(radius) * radius * (1 + 0x1p-22);
      const double bound = s + (s * scan_.relative + scan_.absolute);
      limit_ = bound < 0x1p127 ? static_cast<float>(bound * (1 + 0x1p-22) + 0x1p-148) : kInf;
    }
  }

  int64_t key_bytes() const {
    const int64_t element = scan_.dtype == Dtype::kFloat32 ? 4 : 2;
    return std::max<int64_t>(1, scan_.dim * element);
  }

  int64_t thread_count() const {
    const int64_t work = count_ * key_bytes() * ((most_ + 3) / 4);
    const int64_t worth = std::max<int64_t>(1, work / kWorkPerThread);
    return std::min<int64_t>({worth, std::max<int64_t>(1, count_ / 8),
                              static_cast<int64_t>(torch::stable::get_num_threads())});
  }

  void scan_all() {
    arrange();
    // Threads take chunks from a common pile, in ascending order each, so that a busy core does not
    // hold the others up. Which thread scans what does not change an answer.
    const int64_t slots = std::max(kChunkBytes / key_bytes(), scan_.panels ? kChunkSlots : 0);
    const int64_t share = scan_.panels ? 4 : 1;
    const int64_t chunk = std::max<int64_t>(
        8, std::min(slots, (count_ + share * threads_ - 1) / (share * threads_)) / 8 * 8);
    std::atomic<int64_t> next{0};
    in_parallel(threads_, [&](int64_t thread) {
      Best* mine = best_ + thread * scan_.batch;
      for (int64_t q = 0; q < scan_.batch; ++q) clear(mine[q], limit_);
      for (;;) {
        const int64_t start = next.fetch_add(chunk, std::memory_order_relaxed);
        if (start >= count_) break;
        kernels_.scan(scan_, start, std::min(start + chunk, count_), mine);
      }
      kernels_.finish(scan_, mine);
    });
    merge_threads();
  }

  void merge_threads() {
    for (int64_t thread = 1; thread < threads_; ++thread) {
      for (int64_t q = 0; q < scan_.batch; ++q) merge(best_[q], best_[thread * scan_.batch + q]);
    }
  }

  void answer(const Best& best, int64_t b) const {
    if (best.index < 0) return;
    const float d = std::sqrt(best.s);
    if (bounded_ && !(d <= scan_.radii[best.index])) return;
    index_[b] = best.index;
    distance_[b] = d;
  }

  const Kernels& kernels_;
  const int64_t count_;
  const Asking& asking_;
  const bool bounded_;
  int64_t* const index_;
  float* const distance_;
  const int64_t most_;  // queries per pass
  int64_t threads_ = 1;
  float limit_ = -1;
  Scan scan_{};
  float* queries_ = nullptr;
  float* panels_ = nullptr;
  Best* best_ = nullptr;    // per thread and query
  int64_t* who_ = nullptr;  // batch items
};

}  // namespace grace::cpu
