// Reading through a sketch.
//
// First pass: which keys truly answer by themselves, being within their own radius? Most queries
// have none, and are misses. For the others, second pass: which key is the nearest within the
// distance of the nearest such key? It decides. A chunk of which the sketch leaves too many slots
// is read whole, for its nearest key within the largest radius, which serves both passes.
#include <mutex>

#include "search_base.h"

namespace grace::cpu {
namespace {

constexpr int64_t kSketchedSlots = 1024;  // what a thread takes from the common pile at a time
// Of the slots of a chunk, what the sketch may leave; beyond, reading them in turn is cheaper than
// one by one. Four queries at a time share what is read.
constexpr int64_t kOneOf = 8;
constexpr int64_t kDirectionsPerThread = 1 << 20;  // elements times directions when sketching

// No s beyond this has a root within `radius`: Lemma 2 of docs/error-bounds.md.
float square_within(float radius) {
  const double s = static_cast<double>(radius) * radius * (1 + 0x1p-22);
  return s < 0x1p127 ? static_cast<float>(s * (1 + 0x1p-22) + 0x1p-148) : kInf;
}

// `threshold` is not below the s of the nearest so far.
float narrowed(float reach, const Best& best) { return std::min(reach, std::sqrt(best.threshold)); }

// Whether to ask the sketch about the next chunk: not, for longer and longer, where it left too
// many slots of several chunks in a row, so that a hopeless one costs little beside reading them.
class Patience {
 public:
  bool asks() {
    if (skipped_ == 0) return true;
    --skipped_;
    return false;
  }
  void note(bool too_many) {
    failures_ = too_many ? std::min(failures_ + 1, 4) : 0;
    skipped_ = too_many ? (1 << failures_) - 2 : 0;
  }

 private:
  int failures_ = 0, skipped_ = 0;
};

class PrunedSearch : public Search {
 public:
  PrunedSearch(const Codebook& book, const Asking& asking, int64_t* index, float* distance)
      : Search(book, asking, true, index, distance) {}

  void run(const Sketch& sketch) {
    workspace().reserve(common_bytes() + pruned_bytes(sketch));
    take_common();
    take_pruned(sketch);
    std::vector<int64_t> plain;  // rarely any: batch items to be answered without the sketch
    int64_t queries = 0;
    for (int64_t next = 0; next < asking_.batch;) {
      gather(next, asking_.batch, nullptr);
      queries += scan_.batch;
      sketch_queries(sketch, plain);
      if (scan_.batch > 0) prune(sketch, plain);
    }
    count_up(sketch, 0, queries);
    count_up(sketch, 1, queries * sketch.covered);
    count_up(sketch, 2, scored_);
    count_up(sketch, 3, scanned_ + static_cast<int64_t>(plain.size()) * count_);
    if (!plain.empty()) Search::run(&plain);
  }

 private:
  size_t pruned_bytes(const Sketch& sketch) const {
    return Workspace::size_of<Sketched>(most_) + Workspace::size_of<float>(threads_ * most_) +
           Workspace::size_of<float>(threads_ * most_) +
           Workspace::size_of<Pair>(threads_ * survivor_room()) + Workspace::size_of<Best>(most_) +
           Workspace::size_of<bool>(chunks_of(sketch)) + 2 * Workspace::size_of<bool>(most_);
  }

  void take_pruned(const Sketch& sketch) {
    sketched_ = workspace().take<Sketched>(most_);
    hit_ = workspace().take<float>(threads_ * most_);
    reach_ = workspace().take<float>(threads_ * most_);
    survivors_ = workspace().take<Pair>(threads_ * survivor_room());
    whole_best_ = workspace().take<Best>(most_);
    whole_ = workspace().take<bool>(chunks_of(sketch));
    unsketched_ = workspace().take<bool>(most_);
    hit_at_infinity_ = workspace().take<bool>(most_);
  }

  static int64_t room_for(int64_t queries) {
    return kSketchedSlots / kOneOf * std::max<int64_t>(1, queries / 4);
  }
  int64_t survivor_room() const { return room_for(most_); }
  static int64_t chunks_of(const Sketch& sketch) {
    return (sketch.covered + kSketchedSlots - 1) / kSketchedSlots;
  }

  static void count_up(const Sketch& sketch, int which, int64_t by) {
    if (by != 0) __atomic_fetch_add(sketch.counters + which, by, __ATOMIC_RELAXED);
  }

  // Queries that cannot be sketched go to `plain`; the last ones take their places.
  void sketch_queries(const Sketch& sketch, std::vector<int64_t>& plain) {
    const int64_t batch = scan_.batch;
    const int64_t worth = batch * scan_.dim * kDirections / kDirectionsPerThread;
    const int64_t threads = std::max<int64_t>(1, std::min({worth, batch, threads_}));
    in_parallel(threads, [&](int64_t thread) {
      for (int64_t q = thread; q < batch; q += threads) {
        const float* query = queries_ + q * scan_.query_stride;
        unsketched_[q] = !kernels_.sketch(sketch.codes, query, &sketched_[q]);
      }
    });
    for (int64_t q = 0; q < scan_.batch;) {
      if (!unsketched_[q]) {
        ++q;
        continue;
      }
      plain.push_back(who_[q]);
      const int64_t last = --scan_.batch;
      std::copy_n(queries_ + last * scan_.query_stride, scan_.query_stride,
                  queries_ + q * scan_.query_stride);
      sketched_[q] = sketched_[last];
      who_[q] = who_[last];
      unsketched_[q] = unsketched_[last];
    }
  }

  void prune(const Sketch& sketch, std::vector<int64_t>& plain) {
    const bool some_whole = find_own(sketch);
    const int64_t batch = scan_.batch;
    // What is known now: the nearest key of the chunks that were read whole, and the nearest hit
    // of the others. Without a hit among them there is none at all.
    bool any = false;
    for (int64_t q = 0; q < batch; ++q) {
      whole_best_[q] = best_[q];
      const Best& best = best_[q];
      float nearest = hit_[q];
      if (best.index >= 0 && std::sqrt(best.s) <= scan_.radii[best.index]) {
        nearest = std::min(nearest, best.s);
      }
      // At a distance of +inf anything may tie.
      if (nearest == kInf && (hit_at_infinity_[q] || (some_whole && limit_ == kInf))) {
        plain.push_back(who_[q]);
      }
      hit_[q] = nearest;
      any |= nearest < kInf;
    }
    if (!any) return;
    const int64_t chunks = chunks_of(sketch);
    const bool all_whole = std::find(whole_, whole_ + chunks, false) == whole_ + chunks;
    if (!all_whole) find_nearer(sketch);
    for (int64_t q = 0; q < batch; ++q) {
      if (!(hit_[q] < kInf)) continue;
      merge(best_[q], whole_best_[q]);
      answer(best_[q], who_[q]);
    }
  }

  // First pass. Tells whether some slots were scanned.
  bool find_own(const Sketch& sketch) {
    const int64_t batch = scan_.batch, chunks = chunks_of(sketch);
    const int64_t uncovered = count_ - sketch.covered;
    const int64_t at_once = std::max<int64_t>(8, kChunkBytes / key_bytes() / 8 * 8);
    const int64_t all = chunks + (uncovered + at_once - 1) / at_once;
    const int64_t room = room_for(batch);
    std::atomic<int64_t> next{0}, scored{0}, scanned{0};
    std::once_flag once;
    std::fill(hit_at_infinity_, hit_at_infinity_ + batch, false);
    in_parallel(threads_, [&](int64_t thread) {
      Best* best = best_ + thread * batch;
      float* hit = hit_ + thread * batch;
      float* reach = reach_ + thread * batch;
      Pair* survivors = survivors_ + thread * survivor_room();
      Patience patience;
      bool limited = false;
      const auto read = [&](int64_t begin, int64_t end) {
        std::call_once(once, [&] {
          set_limit();
          arrange();
        });
        for (int64_t q = 0; q < batch && !limited; ++q) best[q].threshold = limit_;
        limited = true;
        scanned += (end - begin) * batch;
        if (limit_ < 0) return;
        kernels_.scan(scan_, begin, end, best);
        // Farther keys than the nearest so far do not matter, whether they are hits or not.
        for (int64_t q = 0; q < batch; ++q) reach[q] = narrowed(reach[q], best[q]);
      };
      for (int64_t q = 0; q < batch; ++q) {
        clear(best[q], kInf);
        hit[q] = kInf;
        reach[q] = kInf;
      }
      for (;;) {
        const int64_t chunk = next.fetch_add(1, std::memory_order_relaxed);
        if (chunk >= all) break;
        if (chunk >= chunks) {
          const int64_t start = sketch.covered + (chunk - chunks) * at_once;
          read(start, std::min(start + at_once, count_));
          continue;
        }
        const int64_t start = chunk * kSketchedSlots;
        const int64_t stop = std::min(start + kSketchedSlots, sketch.covered);
        int64_t left = -1;
        if (patience.asks()) {
          left = kernels_.filter(sketch.codes, scan_, start, stop, sketched_, reach, true,
                                 survivors, room);
          patience.note(left < 0);
        }
        whole_[chunk] = left < 0;
        if (left < 0) {
          read(start, stop);
          continue;
        }
        scored += left;
        for (int64_t i = 0; i < left; ++i) {
          const Pair& pair = survivors[i];
          const int64_t q = pair.query;
          const float radius = scan_.radii[pair.slot];
          const float s = kernels_.score(scan_, pair, std::min(square_within(radius), hit[q]));
          const float d = std::sqrt(s);
          if (!(d <= radius)) continue;
          if (s == kInf) __atomic_store_n(&hit_at_infinity_[q], true, __ATOMIC_RELAXED);
          if (s < hit[q]) {
            hit[q] = s;
            reach[q] = d;
          }
        }
      }
      kernels_.finish(scan_, best);
    });
    merge_threads();
    for (int64_t thread = 1; thread < threads_; ++thread) {
      for (int64_t q = 0; q < batch; ++q) hit_[q] = std::min(hit_[q], hit_[thread * batch + q]);
    }
    scored_ += scored;
    scanned_ += scanned;
    return scanned > 0;
  }

  // Second pass: the nearest key of the chunks that were not read whole, within hit_[q].
  void find_nearer(const Sketch& sketch) {
    const int64_t batch = scan_.batch, chunks = chunks_of(sketch);
    const int64_t room = room_for(batch);
    std::atomic<int64_t> next{0}, scored{0}, scanned{0};
    std::once_flag once;
    in_parallel(threads_, [&](int64_t thread) {
      Best* best = best_ + thread * batch;
      float* reach = reach_ + thread * batch;
      Pair* survivors = survivors_ + thread * survivor_room();
      Patience patience;
      for (int64_t q = 0; q < batch; ++q) {
        const bool asks = hit_[q] < kInf;
        // Above the coarse result of every key that is as near.
        const float s = asks ? hit_[q] + (hit_[q] * scan_.relative + scan_.absolute) : -1;
        clear(best[q], s);
        reach[q] = asks ? std::sqrt(hit_[q]) : -1;
      }
      for (;;) {
        const int64_t chunk = next.fetch_add(1, std::memory_order_relaxed);
        if (chunk >= chunks) break;
        if (whole_[chunk]) continue;
        const int64_t start = chunk * kSketchedSlots;
        const int64_t stop = std::min(start + kSketchedSlots, sketch.covered);
        int64_t left = -1;
        if (patience.asks()) {
          left = kernels_.filter(sketch.codes, scan_, start, stop, sketched_, reach, false,
                                 survivors, room);
          patience.note(left < 0);
        }
        if (left < 0) {
          std::call_once(once, [&] { arrange(); });
          kernels_.scan(scan_, start, stop, best);
          scanned += (stop - start) * batch;
        } else {
          for (int64_t i = 0; i < left; ++i) kernels_.consider(scan_, survivors[i], best);
          scored += left;
        }
        for (int64_t q = 0; q < batch; ++q) reach[q] = narrowed(reach[q], best[q]);
      }
      kernels_.finish(scan_, best);
    });
    merge_threads();
    scored_ += scored;
    scanned_ += scanned;
  }

  Sketched* sketched_ = nullptr;
  float* hit_ = nullptr;       // per thread and query: the least s of a key within its own radius
  float* reach_ = nullptr;     // per thread and query: of the filter
  Pair* survivors_ = nullptr;  // per thread
  Best* whole_best_ = nullptr;
  bool* whole_ = nullptr;            // per chunk: was read whole in the first pass
  bool* unsketched_ = nullptr;       // per query: its sketch could not be computed
  bool* hit_at_infinity_ = nullptr;  // per query: a key at +inf is within its own radius
  int64_t scored_ = 0, scanned_ = 0;
};

}  // namespace

void find_pruned(const Codebook& codebook, const Sketch& sketch, const Asking& asking,
                 int64_t* index, float* distance) {
  if (sketch.covered == 0) return find_nearest(codebook, asking, true, index, distance);
  DefaultFloatingPoint guard;
  PrunedSearch(codebook, asking, index, distance).run(sketch);
}

}  // namespace grace::cpu
