// Runs the threads of one CUDA block on one CPU thread, one after the other, as fibers.
//
// A thread runs until it waits for its warp or its block. Whose turn comes next is drawn from a
// seed, so that a missing barrier shows. A barrier that not all threads reach is an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulation {

[[noreturn]] inline void broken(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

// Small numbers in every dtype: a NaN would be undecided, and the right answer found all the same.
constexpr char kPoison = 0x3c;

struct Copy {
  void* to;
  const void* from;
};

// Of matrices in shared memory, by the threads of a warpgroup together.
struct Product {
  uint64_t a, b;
  bool more;
  bool operator!=(const Product& other) const {
    return a != other.a || b != other.b || more != other.more;
  }
};

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  std::vector<char> stack;
  unsigned thread;
  bool started, done;
  bool waited;                            // for the launch before
  std::vector<Copy> issued;               // not yet committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<size_t> unpublished;        // 16 bytes of shared memory each
  std::vector<Product> products;
  size_t committed;  // of those
  float* sums;       // what they add up to
  void (*multiply)(const std::vector<char>& read, bool more, std::vector<float>& sums);
  bool may_multiply;
};

struct Warp {
  int arrived;
  unsigned turn;
  alignas(16) char slots[2][32][32];
  const char* doing;
};

struct Warpgroup {
  std::vector<unsigned> waiting;
  std::vector<std::vector<char>> read;  // by products that are on their way
};

// In shared memory, where its 8 bytes are kMark.
struct Barrier {
  unsigned arrivals, missing, ended;  // `ended`: phases
  std::vector<unsigned> waiting;
};
constexpr uint64_t kMark = 0x6261727269657221;

class Block {
 public:
  static constexpr int kStack = 128 << 10;
  // Threads from here on may end before others wait at a barrier of all.
  static constexpr unsigned kMayEnd = 256;

  std::function<void()> body;
  std::function<void()> before;  // of a dependent launch: shows what the launch before wrote
  std::vector<char> shared;
  uint3 thread_index{}, block_index{};
  dim3 grid_dim, block_dim;

  void run(unsigned threads, size_t shared_bytes, std::mt19937& random) {
    random_ = &random;
    // Poisoned, with room behind to see what is written there.
    shared.assign(shared_bytes + 4096 + 1024, kPoison);
    memory = shared.data() + (1024 - reinterpret_cast<uintptr_t>(shared.data()) % 1024) % 1024;
    fibers.resize(threads);
    warps.assign(threads / 32, Warp{});
    warpgroups.assign((threads + 127) / 128, Warpgroup{});
    unpublished.assign(threads > kMayEnd ? shared_bytes / 16 + 1 : 0, false);
    barriers_.clear();
    waiting_.clear();
    ended_ = 0;
    ready_.clear();
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[t];
      fiber.thread = t;
      fiber.stack.resize(kStack);
      fiber.started = fiber.done = fiber.waited = false;
      fiber.issued.clear();
      fiber.groups.clear();
      fiber.unpublished.clear();
      fiber.products.clear();
      fiber.committed = 0;
      fiber.may_multiply = false;
      ready_.push_back(t);
    }
    unsigned finished = 0;
    // Of several warpgroups with work of their own one may have to wait for all others.
    const unsigned slow = threads > kMayEnd ? random() % 4 : ~0u;
    while (!ready_.empty()) {
      size_t pick = random() % ready_.size();
      for (size_t i = 0; i < ready_.size() && ready_[pick] / 128 == slow; ++i) {
        pick = (pick + 1) % ready_.size();
      }
      const unsigned t = ready_[pick];
      ready_[pick] = ready_.back();
      ready_.pop_back();
      enter(fibers[t]);
      if (!fibers[t].done) continue;
      ++finished;
      if (before && !fibers[t].waited) broken("a dependent launch did not wait");
      if (!fibers[t].products.empty()) broken("a thread ended while products were on their way");
      if (t < kMayEnd) continue;
      ++ended_;
      release();
    }
    if (finished != threads) broken("some threads wait at a barrier that others never reach");
    for (size_t i = memory - shared.data() + shared_bytes; i < shared.size(); ++i) {
      if (shared[i] != kPoison) broken("a write beyond the shared memory");
    }
  }

  char* memory = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warpgroup> warpgroups;
  std::vector<bool> unpublished;  // 16 bytes each that were copied, and not for products to see

  Fiber& current() { return fibers[thread_index.x]; }

  // Give `in` to the warp and return what the lane `from` gave.
  template <class V>
  V exchange(const V& in, const char* doing, const std::function<int(int)>& from) {
    V out;
    gather(&in, sizeof in, doing,
           [&](char (*slots)[32], int lane) { std::memcpy(&out, slots[from(lane)], sizeof out); });
    return out;
  }

  template <class Read>
  void gather(const void* in, size_t bytes, const char* doing, const Read& read) {
    if (bytes > 32) broken("an exchange of more than 32 bytes");
    Warp& warp = warps[thread_index.x / 32];
    const int lane = thread_index.x % 32;
    const unsigned turn = warp.turn;
    if (warp.arrived == 0) warp.doing = doing;
    if (std::strcmp(warp.doing, doing) != 0) broken("lanes of one warp at different operations");
    std::memcpy(warp.slots[turn % 2][lane], in, bytes);
    if (++warp.arrived == 32) {
      warp.arrived = 0;
      ++warp.turn;
      const unsigned first = thread_index.x / 32 * 32;
      for (unsigned t = first; t < first + 32; ++t) {
        if (t != thread_index.x) ready_.push_back(t);
      }
    } else {
      leave();
    }
    read(warp.slots[turn % 2], lane);
  }

  void barrier() {
    waiting_.push_back(thread_index.x);
    if (!release()) leave();
  }

  void start_barrier(uint64_t* at, unsigned arrivals) {
    *at = kMark;
    barriers_[at] = {arrivals, arrivals, 0, {}};
  }
  void arrive(uint64_t* at) {
    Barrier& barrier = barrier_at(at);
    if (--barrier.missing != 0) return;
    barrier.missing = barrier.arrivals;
    ++barrier.ended;
    wake(barrier.waiting);
  }
  void wait_for(uint64_t* at, unsigned phase) {
    for (;;) {
      Barrier& barrier = barrier_at(at);
      // A GPU tells even from odd phases, no more.
      if (barrier.ended != phase && barrier.ended != phase + 1) broken("a phase too far away");
      if (barrier.ended == phase + 1) return;
      barrier.waiting.push_back(thread_index.x);
      leave();
    }
  }

  void wait_for_launch_before() {
    if (before) before();
    current().waited = true;
  }

  // Products may not see 16 bytes that this thread copied before it publishes them.
  void copied(const void* to) {
    if (unpublished.empty()) return;
    const size_t at = (static_cast<const char*>(to) - memory) / 16;
    unpublished.at(at) = true;
    current().unpublished.push_back(at);
  }
  void publish() {
    for (const size_t at : current().unpublished) unpublished[at] = false;
    current().unpublished.clear();
  }

  // The 128 threads of a warpgroup; the last one to come does what is to be done.
  void meet(const std::function<void()>& last) {
    std::vector<unsigned>& waiting = warpgroups[thread_index.x / 128].waiting;
    if (waiting.size() + 1 < 128) {
      waiting.push_back(thread_index.x);
      leave();
    } else {
      last();
      wake(waiting);
    }
  }

 private:
  std::vector<Warp> warps;
  std::vector<unsigned> ready_, waiting_;  // `waiting_`: at the barrier of all
  std::map<const uint64_t*, Barrier> barriers_;
  unsigned ended_ = 0;
  jmp_buf scheduler_;
  std::mt19937* random_ = nullptr;

  void wake(std::vector<unsigned>& waiting) {
    for (const unsigned t : waiting) {
      if (t != thread_index.x) ready_.push_back(t);
    }
    waiting.clear();
  }

  bool release() {
    if (waiting_.size() + ended_ < fibers.size()) return false;
    wake(waiting_);
    return true;
  }

  Barrier& barrier_at(const uint64_t* at) {
    const auto found = barriers_.find(at);
    if (found == barriers_.end() || *at != kMark) broken("there is no barrier, or no more");
    return found->second;
  }

  static void begin(unsigned high, unsigned low) {
    Block* block =
        reinterpret_cast<Block*>(static_cast<uintptr_t>(high) << 32 | static_cast<uintptr_t>(low));
    block->body();
    block->current().done = true;
    _longjmp(block->scheduler_, 1);
  }

  void enter(Fiber& fiber) {
    thread_index = {fiber.thread, 0, 0};
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    fiber.start.uc_link = nullptr;
    const uintptr_t self = reinterpret_cast<uintptr_t>(this);
    makecontext(&fiber.start, reinterpret_cast<void (*)()>(&begin), 2,
                static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
    setcontext(&fiber.start);
  }

  void leave() {
    Fiber& fiber = current();
    if (_setjmp(fiber.here) == 0) _longjmp(scheduler_, 1);
  }
};

inline Block& block() {
  static Block block;
  return block;
}

// What the tests set and read.
struct Controls {
  int processors = 3;
  unsigned seed = 0;
  float margin_scale = 1;
  // Share of the sum of |products| and |accumulator|, at most; below 0 always all of that share,
  // upwards in even columns and downwards in odd ones.
  double mma_error = 0;
  bool capturing = false;
  int fail_launch = 0, fail_malloc = 0;  // error codes
  int good_launches = 0;                 // before one fails
  int shared_limit = 227 << 10;
  int capability = 90;
  int launches = 0, mallocs = 0;
  int64_t scored = 0;  // pairs of rows, canonically
  unsigned grid_x = 0, grid_y = 0;
  int shared_bytes = 0;
  const void* tickets = nullptr;
  int tickets_left = 0;  // words that a launch left different from 0
  const void* kernel = nullptr;
  int dependent = 0;  // launches that need not wait for the one before
};

inline Controls& controls() {
  static Controls controls;
  return controls;
}

inline std::mt19937& random() {
  static std::mt19937 random;
  return random;
}

// What a step on tensor cores gives where it should give `sum`.
inline float step_of_mma(double sum, double size, int column) {
  const double most = controls().mma_error;
  const double share = most < 0 ? (column % 2 == 0 ? -1 : 1) : random()() / 2147483648.0 - 1.0;
  const double error = most * size * share;
  return static_cast<float>(std::isfinite(error) ? sum + error : sum);
}

}  // namespace emulation
