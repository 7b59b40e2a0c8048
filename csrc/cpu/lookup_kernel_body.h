// The lookup kernel, compiled once per instruction set inside a namespace of its own.
//
//   s(x, k) = round_to_fp32( sum_i (x_i - k_i)^2 )
//
// Coarse pass: fp32 direct differences, a tile of keys (kTileBytes, stays in L2) against all
// queries, Q x K pairs in registers. Every key is read from memory once per call and
// block of queries; N * D * sizeof(key) bytes, so few queries run at the bandwidth of the memory
// and many at the rate of the arithmetic (two operations per element and query).
// Candidates: a key whose coarse result lies within a certified margin of the best one so far.
// Re-score: fp64, unfused, 32 lanes in fixed order. Only its results are ever compared or returned.
//
// The including file includes lookup_kernel.h (the constants), <cstdint>, <cstring> and <limits>
// outside the namespace, declares struct Half and BFloat, and provides struct Isa: V (`width`
// floats, 8 or 16), zero, load (float, Half, BFloat), store, every, add_product, add_square, sum,
// above, keep, prefetch; spread, fold and what is tuned for product_kernel_body.h.

constexpr int64_t kVector = Isa::width;
static_assert(kPadding % kVector == 0 && kVector >= 8);

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(BFloat value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline float widen(Half value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  float result;
  std::memcpy(&result, &magnitude, sizeof result);
  result *= 0x1p112f;  // moves the exponent from bias 15 to 127; exact, subnormals included
  uint32_t bits;
  std::memcpy(&bits, &result, sizeof bits);
  if ((value.bits & 0x7c00) == 0x7c00) bits = 0x7f800000 | magnitude;
  bits |= static_cast<uint32_t>(value.bits & 0x8000) << 16;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// The canonical squared distance. Element i belongs to lane (i / 8) mod 32; a lane adds its
// elements in ascending i; the lanes are folded by halves. Must not be reordered or fused.
template <class T>
float canonical(const float* x, const T* k, int64_t dim) {
  constexpr int kLanes = 32, kRun = 8;
  double lanes[kLanes] = {};
  int64_t base = 0;
  for (; base + kLanes * kRun <= dim; base += kLanes * kRun) {
    for (int lane = 0; lane < kLanes; ++lane) {
      double sum = lanes[lane];
      for (int j = 0; j < kRun; ++j) {
        const int64_t i = base + lane * kRun + j;
        const double difference = static_cast<double>(x[i]) - static_cast<double>(widen(k[i]));
        sum += difference * difference;
      }
      lanes[lane] = sum;
    }
  }
  for (int64_t i = base; i < dim; ++i) {
    const double difference = static_cast<double>(x[i]) - static_cast<double>(widen(k[i]));
    lanes[(i - base) / kRun] += difference * difference;
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return static_cast<float>(lanes[0]);
}

template <int Q, int K>
inline bool all_beyond(const typename Isa::V (&sums)[Q][K], const Best* best) {
  bool beyond = true;
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
    for (int n = 0; n < K; ++n) beyond &= Isa::sum(sums[q][n]) > best[q].threshold;
  }
  return beyond;
}

// Coarse squared distances of Q queries and K keys, with U accumulators each. False, and no result,
// once all sums are beyond their thresholds: sums of squares only grow, in fp32 too, so the rest of
// the rows would not make any of these keys a candidate.
template <class T, int Q, int K, int U>
inline bool coarse(const float* x, int64_t x_stride, const T* k, int64_t k_stride, int64_t dim,
                   bool cold, bool may_stop, const Best* best, float (&out)[Q][K]) {
  typename Isa::V sums[U][Q][K];
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) {
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
      for (int n = 0; n < K; ++n) sums[u][q][n] = Isa::zero();
    }
  }
  const auto step = [&](int64_t at, typename Isa::V(&sum)[Q][K]) __attribute__((always_inline)) {
    typename Isa::V key[K];
#pragma GCC unroll 8
    for (int n = 0; n < K; ++n) key[n] = Isa::load(k + n * k_stride + at);
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      typename Isa::V query = Isa::load(x + q * x_stride + at);
      Isa::keep(query);
#pragma GCC unroll 8
      for (int n = 0; n < K; ++n) sum[q][n] = Isa::add_square(sum[q][n], query - key[n]);
    }
  };
  int64_t i = 0;
  const int64_t whole = dim / (kVector * U) * (kVector * U);
  // A gap of less than a page in the stream of reads costs more than it saves, except after so
  // short a start that it can be prefetched, see Pace.
  const int64_t last_check = dim - kPage / static_cast<int64_t>(sizeof(T));
  for (int64_t check = may_stop ? kFirstCheck : whole;;) {
    const int64_t end = check < whole ? check : whole;
    if (cold) {
      for (; i < end; i += kVector * U) {
#pragma GCC unroll 8
        for (int n = 0; n < K; ++n) {
#pragma GCC unroll 4
          for (int64_t j = 0; j < kVector * U; j += kLineBytes / sizeof(T)) {
            Isa::prefetch(k + n * k_stride + i + j + kAhead / sizeof(T));
          }
        }
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) step(i + u * kVector, sums[u]);
      }
    } else {
      for (; i < end; i += kVector * U) {
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) step(i + u * kVector, sums[u]);
      }
    }
#pragma GCC unroll 8
    for (int u = 1; u < U; ++u) {
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
        for (int n = 0; n < K; ++n) {
          sums[0][q][n] = sums[0][q][n] + sums[u][q][n];
          sums[u][q][n] = Isa::zero();
        }
      }
    }
    if (end == whole) break;
    if (all_beyond(sums[0], best)) return false;
    check = 2 * check <= last_check ? 2 * check : whole;
  }
  for (; i + kVector <= dim; i += kVector) step(i, sums[0]);
  if (i < dim) {  // the queries are padded, the keys are not
    for (int n = 0; n < K; ++n) {
      T rest[kVector] = {};
      std::memcpy(rest, k + n * k_stride + i, (dim - i) * sizeof(T));
      const typename Isa::V key = Isa::load(rest);
      for (int q = 0; q < Q; ++q) {
        sums[0][q][n] = Isa::add_square(sums[0][q][n], Isa::load(x + q * x_stride + i) - key);
      }
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
    for (int n = 0; n < K; ++n) out[q][n] = Isa::sum(sums[0][q][n]);
  }
  return true;
}

inline float upper(const Scan& p, float s) { return s + (s * p.relative + p.absolute); }

template <class T>
void rescore(const Scan& p, const float* x, Best& best) {
  for (int c = 0; c < best.candidates; ++c) {
    if (!(best.coarse[c] <= best.threshold)) continue;
    const int64_t slot = best.slot[c];
    const float s = canonical(x, static_cast<const T*>(p.keys) + slot * p.key_stride, p.dim);
    // Slots come in ascending order, so an equal s never displaces; a NaN never does either.
    if (s < best.s) {
      best.s = s;
      best.index = slot;
      const float bound = upper(p, s);
      if (bound < best.threshold) best.threshold = bound;
    }
  }
  best.candidates = 0;
}

template <class T>
void propose(const Scan& p, const float* x, int64_t slot, float coarse_s, Best& best) {
  if (p.radii[slot] == -std::numeric_limits<float>::infinity()) return;
  if (best.candidates == kCandidates) {
    int kept = 0;
    for (int c = 0; c < kCandidates; ++c) {
      if (!(best.coarse[c] <= best.threshold)) continue;
      best.slot[kept] = best.slot[c];
      best.coarse[kept++] = best.coarse[c];
    }
    best.candidates = kept;
    if (kept > kCandidates / 2) rescore<T>(p, x, best);
    if (!(coarse_s <= best.threshold)) return;
  }
  best.slot[best.candidates] = slot;
  best.coarse[best.candidates++] = coarse_s;
  const float bound = upper(p, coarse_s);
  if (bound < best.threshold) best.threshold = bound;
}

// Whether to stop within short rows, which pays only where nearly every row is stopped at its first
// check (measured: stops further on, at D = 768, cost up to 2.5 times a whole scan).
struct Pace {
  int doubt = 0;
  int64_t whole = 0;                // blocks of rows that will be read whole
  int64_t blocks = 0, stopped = 0;  // so far

  bool may_stop() { return whole == 0 || --whole == 0; }
  void note(bool stopped) {
    doubt += stopped ? (doubt > 0 ? -1 : 0) : 1;
    if (doubt < 4) return;
    doubt = 0;
    whole = 256;
  }
};

template <class T, int Q, int K, int U>
inline void block(const Scan& p, int64_t q0, int64_t n0, Best* best, Pace& pace) {
  float s[Q][K];
  const float* x = p.queries + q0 * p.query_stride;
  const T* k = static_cast<const T*>(p.keys) + n0 * p.key_stride;
  const bool may_stop = pace.may_stop();
  if (q0 == 0) {  // the start of a row some way on; helps whole rows too
    constexpr int kLine = kLineBytes / sizeof(T);
    const T* next = k + kRowsAhead * p.key_stride;
    for (int n = 0; n < K; ++n) {
      for (int i = 0; i < kFirstCheck && i < p.dim; i += kLine) {
        Isa::prefetch(next + n * p.key_stride + i);
      }
    }
  }
  const bool cold = q0 == 0;
  const bool whole =
      coarse<T, Q, K, U>(x, p.query_stride, k, p.key_stride, p.dim, cold, may_stop, best + q0, s);
  ++pace.blocks;
  pace.stopped += !whole;
  if (may_stop && p.dim * static_cast<int64_t>(sizeof(T)) < 2 * kPage) pace.note(!whole);
  if (!whole) return;
  for (int q = 0; q < Q; ++q) {
    for (int n = 0; n < K; ++n) {
      if (s[q][n] <= best[q0 + q].threshold) {
        propose<T>(p, x + q * p.query_stride, n0 + n, s[q][n], best[q0 + q]);
      }
    }
  }
}

template <class T, int Q, int K, int U>
void tile(const Scan& p, int64_t q0, int64_t begin, int64_t end, Best* best, Pace& pace) {
  int64_t n = begin;
  for (; n + K <= end; n += K) block<T, Q, K, U>(p, q0, n, best, pace);
  for (; n < end; ++n) block<T, Q, 1, U>(p, q0, n, best, pace);
}

template <class T>
void scan_direct(const Scan& p, int64_t begin, int64_t end, Best* best, Pace& pace) {
  const int64_t key_bytes = p.dim * sizeof(T) + 1;
  const int64_t at_once = key_bytes * 8 < kTileBytes ? kTileBytes / key_bytes / 8 * 8 : 8;
  for (int64_t n = begin; n < end; n += at_once) {
    const int64_t stop = n + at_once < end ? n + at_once : end;
    int64_t q = 0;
    for (; q + 4 <= p.batch; q += 4) tile<T, 4, 2, 1>(p, q, n, stop, best, pace);
    switch (p.batch - q) {
      case 1:
        tile<T, 1, 1, 4>(p, q, n, stop, best, pace);
        break;
      case 2:
        tile<T, 2, 2, 2>(p, q, n, stop, best, pace);
        break;
      case 3:
        tile<T, 3, 2, 1>(p, q, n, stop, best, pace);
        break;
    }
  }
}

template <class T>
void consider_key(const Scan& p, const Pair& pair, Best* best) {
  const float* x = p.queries + pair.query * p.query_stride;
  const T* k = static_cast<const T*>(p.keys) + pair.slot * p.key_stride;
  Best& mine = best[pair.query];
  float s[1][1];
  if (!coarse<T, 1, 1, 4>(x, p.query_stride, k, p.key_stride, p.dim, false, true, &mine, s)) return;
  if (s[0][0] <= mine.threshold) propose<T>(p, x, pair.slot, s[0][0], mine);
}

template <class T>
void finish_queries(const Scan& p, Best* best) {
  for (int64_t q = 0; q < p.batch; ++q) {
    rescore<T>(p, p.queries + q * p.query_stride, best[q]);
  }
}

void finish(const Scan& p, Best* best) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return finish_queries<float>(p, best);
    case Dtype::kFloat16:
      return finish_queries<Half>(p, best);
    case Dtype::kBFloat16:
      return finish_queries<BFloat>(p, best);
  }
}

template <class T>
bool prepare_row(const T* row, int64_t dim, float* out) {
  bool nan = false;
  for (int64_t i = 0; i < dim; ++i) {
    out[i] = widen(row[i]);
    nan |= out[i] != out[i];
  }
  const int64_t size = padded(dim);
  for (int64_t i = dim; i < size; ++i) out[i] = 0.0f;
  float norm = 0;
  for (int64_t from = 0; from < size; from += kProductPiece) {
    const int64_t to = from + kProductPiece < size ? from + kProductPiece : size;
    typename Isa::V sum = Isa::zero();
    for (int64_t i = from; i < to; i += kVector) sum = Isa::add_square(sum, Isa::load(out + i));
    norm += Isa::sum(sum);
  }
  out[size] = norm;
  return !nan;
}

bool prepare(const void* row, Dtype dtype, int64_t dim, float* out) {
  switch (dtype) {
    case Dtype::kFloat32:
      return prepare_row(static_cast<const float*>(row), dim, out);
    case Dtype::kFloat16:
      return prepare_row(static_cast<const Half*>(row), dim, out);
    case Dtype::kBFloat16:
      return prepare_row(static_cast<const BFloat*>(row), dim, out);
  }
  return false;
}
