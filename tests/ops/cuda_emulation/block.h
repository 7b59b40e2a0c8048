// Runs the threads of one CUDA block on one CPU thread, one after the other, as fibers.
//
// A thread runs until it waits for its warp or its block. Whose turn comes next is drawn from a
// seed, so that a missing barrier shows. A barrier that not all threads reach is an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
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

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  std::vector<char> stack;
  unsigned thread;
  bool started, done;
  std::vector<Copy> issued;               // not yet committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

struct Warp {
  int arrived;
  unsigned turn;
  alignas(16) char slots[2][32][32];
  const char* doing;
};

class Block {
 public:
  static constexpr int kStack = 128 << 10;

  std::function<void()> body;
  std::vector<char> shared;
  uint3 thread_index{}, block_index{};
  dim3 grid_dim, block_dim;

  void run(unsigned threads, size_t shared_bytes, std::mt19937& random) {
    random_ = &random;
    // Poisoned, with room behind to see what is written there.
    shared.assign(shared_bytes + 4096 + 16, kPoison);
    memory = shared.data() + (16 - reinterpret_cast<uintptr_t>(shared.data()) % 16) % 16;
    fibers.resize(threads);
    warps.assign(threads / 32, Warp{});
    arrived_ = 0;
    ready_.clear();
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[t];
      fiber.thread = t;
      fiber.stack.resize(kStack);
      fiber.started = fiber.done = false;
      fiber.issued.clear();
      fiber.groups.clear();
      ready_.push_back(t);
    }
    unsigned finished = 0;
    while (!ready_.empty()) {
      const size_t pick = random() % ready_.size();
      const unsigned t = ready_[pick];
      ready_[pick] = ready_.back();
      ready_.pop_back();
      enter(fibers[t]);
      finished += fibers[t].done;
    }
    if (finished != threads) broken("some threads wait at a barrier that others never reach");
    for (size_t i = memory - shared.data() + shared_bytes; i < shared.size(); ++i) {
      if (shared[i] != kPoison) broken("a write beyond the shared memory");
    }
  }

  char* memory = nullptr;

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
    if (++arrived_ < static_cast<int>(fibers.size())) {
      leave();
      return;
    }
    arrived_ = 0;
    for (Fiber& fiber : fibers) {
      if (fiber.thread != thread_index.x) ready_.push_back(fiber.thread);
    }
  }

 private:
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned> ready_;
  int arrived_ = 0;
  jmp_buf scheduler_;
  std::mt19937* random_ = nullptr;

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
  double mma_error = 0;  // share of the sum of |products| and |accumulator|
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
};

inline Controls& controls() {
  static Controls controls;
  return controls;
}

inline std::mt19937& random() {
  static std::mt19937 random;
  return random;
}

}  // namespace emulation
