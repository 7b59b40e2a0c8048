// The sketch's part of the lookup, compiled once per instruction set after lookup_kernel_body.h.
// The mathematics are in grace_kernels/sketch_math.py.
//
// Filter: a vector of keys at a time against up to kFiltered queries, 8 numbers at a time, and on
// to the next 8 only where one of the keys is still in question. Usually 10 bytes of codes and 4 of
// radius per key are read, from memory or a cache, instead of the key; some 9 instructions per key
// and query.

// Bounds of the residual and of what the coordinates err by: Lemma 17 of docs/error-bounds.md.
bool sketch(const Codes& codes, const float* query, Sketched* out) {
  constexpr int kAtOnce = 8;  // directions
  const int64_t dim = codes.dim;
  const int64_t whole = dim / kVector * kVector;
  float square = 0;
  for (int64_t first = 0; first < kDirections; first += kAtOnce) {
    const auto* rows = reinterpret_cast<const BFloat*>(codes.directions) + first * dim;
    typename Isa::V sums[kAtOnce], norm = Isa::zero();
#pragma GCC unroll 8
    for (int j = 0; j < kAtOnce; ++j) sums[j] = Isa::zero();
    for (int64_t i = 0; i < whole; i += kVector) {
      const typename Isa::V y = Isa::load(query + i) - Isa::load(codes.centre + i);
      if (first == 0) norm = Isa::add_square(norm, y);
#pragma GCC unroll 8
      for (int j = 0; j < kAtOnce; ++j) {
        sums[j] = Isa::add_product(sums[j], Isa::load(rows + j * dim + i), y);
      }
    }
    if (first == 0) square = Isa::sum(norm);
#pragma GCC unroll 8
    for (int j = 0; j < kAtOnce; ++j) out->coordinates[first + j] = Isa::sum(sums[j]);
    for (int64_t i = whole; i < dim; ++i) {
      const float y = query[i] - codes.centre[i];
      if (first == 0) square += y * y;
      for (int j = 0; j < kAtOnce; ++j) out->coordinates[first + j] += widen(rows[j * dim + i]) * y;
    }
  }
  const double u = 0x1p-24;
  const double m = (static_cast<double>(dim) / 8 + 32) * u;
  const double g = m / (1 - m);
  double coordinates_square = 0;
  for (const float a : out->coordinates) coordinates_square += static_cast<double>(a) * a;
  const double length = std::sqrt(static_cast<double>(square)) * (1 + g + 0x1p-20) + 0x1p-60;
  const double error = length * (u + 8 * g) * 1.05 + 0x1p-60;
  const double residual_square = square - coordinates_square;
  const double square_error = length * length * (g + 3 * u) + error * (2.1 * length + error);
  const double middle = codes.scales[kMiddle];
  const double low =
      std::sqrt(residual_square - square_error > 0 ? residual_square - square_error : 0) - middle;
  const double high =
      std::sqrt((residual_square > 0 ? residual_square : 0) + square_error) - middle;
  out->residual_low = static_cast<float>(low - 0x1p-22 * std::fabs(low) - 0x1p-100);
  out->residual_high = static_cast<float>(high + 0x1p-22 * std::fabs(high) + 0x1p-100);
  out->error = static_cast<float>(error * (1 + 0x1p-22));
  // NaN or infinite where anything was.
  const double all =
      length + coordinates_square + out->residual_low + out->residual_high + out->error;
  return m < 0.05 && all - all == 0;
}

// The squared gap beyond which a key is out of reach t, given the roundings of both (Lemma 16).
inline typename Isa::V gap_beyond(typename Isa::V t) {
  return t * t * Isa::every(1 + 0x1p-16f) + Isa::every(0x1p-120f);
}

constexpr int kFiltered = kVector == 16 ? 8 : 4;  // queries at a time, by the number of registers

template <int Q>
int64_t filter_group(const Codes& codes, const Scan& p, int64_t begin, int64_t end,
                     const Sketched* queries, const float* reach, bool own, int64_t first_query,
                     Pair* survivors, int64_t found, int64_t room) {
  using V = typename Isa::V;
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const float* scales = codes.scales;
  const V residual_scale = Isa::every(scales[kResidual]), error_scale = Isa::every(scales[kError]);
  // A reach T becomes T (1 + 2^-22) + 2^-74 and the error of the query, rounded up (Lemma 16).
  const V grow = Isa::every(1 + 0x1p-21f);
  V fixed[Q], reach_of[Q];
  for (int q = 0; q < Q; ++q) {
    fixed[q] = Isa::every(queries[q].error + 0x1p-73f);
    reach_of[q] = Isa::every(reach[q]);
  }
  for (int64_t slot = begin; slot < end; slot += kVector) {
    const int64_t block = slot / kBlockSlots, place = slot % kBlockSlots;
    const int8_t* head = codes.head + block * kHeadBytes + place;
    float padded[kVector];
    const float* radii = p.radii + slot;
    if (slot + kVector > end) {
      for (int64_t i = 0; i < kVector; ++i) padded[i] = slot + i < end ? radii[i] : -kInf;
      radii = padded;
    }
    const V radius = Isa::load(radii);
    // Where own radii count, a negative or NaN one reaches nothing; elsewhere it still blocks.
    const int alive =
        own ? Isa::above(radius, Isa::every(-0x1p-149f))
            : ~Isa::above(Isa::every(-0x1.fffffep127f), radius) & ((1 << kVector) - 1);
    if (alive == 0) continue;
    const V code = Isa::load(head + kError * kBlockSlots);
    const V error = code * error_scale;
    const int unknown = Isa::above(code, Isa::every(kUnknown - 0.5f));
    const V residual = Isa::load(head + kResidual * kBlockSlots) * residual_scale;
    V gap[Q], beyond[Q];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const V farther = Isa::larger(Isa::every(queries[q].residual_low) - residual,
                                    residual - Isa::every(queries[q].residual_high));
      const V away = Isa::larger(farther, Isa::zero());
      gap[q] = away * away;
      // Not below reach where own radii do not count. -(max(-a, -b)) is min(a, b).
      const V t = own ? Isa::zero() - Isa::larger(Isa::zero() - radius, Isa::zero() - reach_of[q])
                      : reach_of[q];
      beyond[q] = gap_beyond(t * grow + fixed[q] + error);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kHead; ++j) {
      const int at = kCoordinates + j;
      const V k = Isa::load(head + at * kBlockSlots) * Isa::every(scales[at]);
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        gap[q] = Isa::add_square(gap[q], Isa::every(queries[q].coordinates[j]) - k);
      }
    }
    for (int q = 0; q < Q; ++q) {
      if (reach[q] < 0) continue;
      int left = alive & (~Isa::above(gap[q], beyond[q]) | unknown);
      const int8_t* tail = codes.tail + block * kTailBytes + place;
      for (int64_t j = kHead; (left & ~unknown) != 0 && j < kDirections;) {
        for (const int64_t stop = j + 8; j < stop; ++j, tail += kBlockSlots) {
          const V k = Isa::load(tail) * Isa::every(scales[kCoordinates + j]);
          gap[q] = Isa::add_square(gap[q], Isa::every(queries[q].coordinates[j]) - k);
        }
        left &= ~Isa::above(gap[q], beyond[q]) | unknown;
      }
      for (; left != 0; left &= left - 1) {
        if (found == room) return -1;
        const int64_t at = slot + __builtin_ctz(left);
        survivors[found++] = {at, first_query + q};
        const char* key = static_cast<const char*>(p.keys) +
                          at * p.key_stride * (p.dtype == Dtype::kFloat32 ? 4 : 2);
        Isa::prefetch(key);
        Isa::prefetch(key + 64);
      }
    }
  }
  return found;
}

int64_t filter(const Codes& codes, const Scan& p, int64_t begin, int64_t end,
               const Sketched* queries, const float* reach, bool own, Pair* survivors,
               int64_t room) {
  int64_t found = 0;
  for (int64_t q = 0; q < p.batch && found >= 0;) {
    const int64_t left = p.batch - q;
    const int64_t taken = left >= kFiltered ? kFiltered : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    bool any = false;
    for (int64_t i = 0; i < taken; ++i) any |= !(reach[q + i] < 0);
    if (any) {
      const auto group = taken == kFiltered ? filter_group<kFiltered>
                         : taken == 4       ? filter_group<4>
                         : taken == 2       ? filter_group<2>
                                            : filter_group<1>;
      found = group(codes, p, begin, end, queries + q, reach + q, own, q, survivors, found, room);
    }
    q += taken;
  }
  return found;
}

template <class T>
float score_key(const Scan& p, const Pair& pair, float most) {
  const float* x = p.queries + pair.query * p.query_stride;
  const T* k = static_cast<const T*>(p.keys) + pair.slot * p.key_stride;
  Best limit;
  limit.threshold = upper(p, most);
  float s[1][1];
  if (!coarse<T, 1, 1, 4>(x, p.query_stride, k, p.key_stride, p.dim, false, true, &limit, s) ||
      s[0][0] > limit.threshold) {
    return std::numeric_limits<float>::infinity();
  }
  const float exact = canonical(x, k, p.dim);
  return exact == exact ? exact : std::numeric_limits<float>::infinity();
}

float score(const Scan& p, const Pair& pair, float most) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return score_key<float>(p, pair, most);
    case Dtype::kFloat16:
      return score_key<Half>(p, pair, most);
    case Dtype::kBFloat16:
      return score_key<BFloat>(p, pair, most);
  }
  return std::numeric_limits<float>::infinity();
}

void consider(const Scan& p, const Pair& pair, Best* best) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return consider_key<float>(p, pair, best);
    case Dtype::kFloat16:
      return consider_key<Half>(p, pair, best);
    case Dtype::kBFloat16:
      return consider_key<BFloat>(p, pair, best);
  }
}
