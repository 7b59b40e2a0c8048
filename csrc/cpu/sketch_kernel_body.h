// The sketch's part of the lookup, compiled once per instruction set after lookup_kernel_body.h.
// The mathematics are in grace_kernels/sketch.py.
//
// Filter: a vector of keys at a time against up to kFiltered queries, 8 numbers at a time, and on
// to the next 8 only where one of the keys is still in question. Usually 10 bytes of codes and 4 of
// radius per key are read, from memory or a cache, instead of the key; some 9 instructions per key
// and query.

// With u = 2^-24 and z = x - c: y = fl(z) is within u |z| of it. A sum over the elements has chains
// of at most m = D/8 + 32 roundings, so a coordinate errs by g |y|, g = m u / (1 - m u), as no
// direction is longer than 1; all 64 together by 8 g |y|. What underflows is less than 2^-60.
//     rho^2 = |z|^2 - |P z|^2 = v +- w,  v = fl(|y|^2) - sum of squared coordinates,
// where |y|^2 errs by (g + 3 u) |z|^2, and the squared coordinates by e (2 |z| + e) for their error
// e.
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
    for (int j = 0; j < kAtOnce; ++j) out->coordinate[first + j] = Isa::sum(sums[j]);
    for (int64_t i = whole; i < dim; ++i) {
      const float y = query[i] - codes.centre[i];
      if (first == 0) square += y * y;
      for (int j = 0; j < kAtOnce; ++j) out->coordinate[first + j] += widen(rows[j * dim + i]) * y;
    }
  }
  const double u = 0x1p-24;
  const double m = (static_cast<double>(dim) / 8 + 32) * u;
  const double g = m / (1 - m);
  double along = 0;
  for (const float a : out->coordinate) along += static_cast<double>(a) * a;
  const double length = std::sqrt(static_cast<double>(square)) * (1 + g + 0x1p-20) + 0x1p-60;
  const double error = length * (u + 8 * g) * 1.05 + 0x1p-60;
  const double rest = square - along;
  const double off = length * length * (g + 3 * u) + error * (2.1 * length + error);
  const double shift = codes.scales[kDirections + 2];
  const double low = std::sqrt(rest - off > 0 ? rest - off : 0) - shift;
  const double high = std::sqrt((rest > 0 ? rest : 0) + off) - shift;
  out->rho_low = static_cast<float>(low - 0x1p-22 * std::fabs(low) - 0x1p-100);
  out->rho_high = static_cast<float>(high + 0x1p-22 * std::fabs(high) + 0x1p-100);
  out->slack = static_cast<float>(error * (1 + 0x1p-22));
  // NaN or infinite where anything was.
  const double all = length + along + out->rho_low + out->rho_high + out->slack;
  return m < 0.05 && all - all == 0;
}

// The square of a distance that a sum of squares Q must exceed for its key to be out of reach t: Q
// has 65 squares of singly rounded differences, an error of 2^-17; t three roundings.
inline typename Isa::V threshold(typename Isa::V t) {
  return t * t * Isa::every(1 + 0x1p-16f) + Isa::every(0x1p-120f);
}

constexpr int kFiltered = kVector == 16 ? 8 : 4;  // queries at a time, by the number of registers

template <int Q>
int64_t filter_group(const Codes& codes, const Scan& p, int64_t begin, int64_t end,
                     const Sketched* queries, const float* reach, bool own, int64_t first_query,
                     Pair* out, int64_t listed, int64_t room) {
  using V = typename Isa::V;
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const float* scales = codes.scales;
  const V rho_scale = Isa::every(scales[0]), e_scale = Isa::every(scales[1]);
  // From T to T (1 + 2^-22) + 2^-74 and the slack of the query, rounded up.
  const V grow = Isa::every(1 + 0x1p-21f);
  V fixed[Q], most[Q];
  for (int q = 0; q < Q; ++q) {
    fixed[q] = Isa::every(queries[q].slack + 0x1p-73f);
    most[q] = Isa::every(reach[q]);
  }
  for (int64_t row = begin; row < end; row += kVector) {
    const int64_t block = row / kBlockKeys, place = row % kBlockKeys;
    const int8_t* head = codes.head + block * kHeadNumbers * kBlockKeys + place;
    float padded[kVector];
    const float* radii = p.radii + row;
    if (row + kVector > end) {
      for (int64_t i = 0; i < kVector; ++i) padded[i] = row + i < end ? radii[i] : -kInf;
      radii = padded;
    }
    const V radius = Isa::load(radii);
    // Where own radii count, a negative or NaN one reaches nothing; elsewhere it still blocks.
    const int alive =
        own ? Isa::above(radius, Isa::every(-0x1p-149f))
            : ~Isa::above(Isa::every(-0x1.fffffep127f), radius) & ((1 << kVector) - 1);
    if (alive == 0) continue;
    const V code = Isa::load(head + kBlockKeys);
    const V e = code * e_scale;
    const int unknown = Isa::above(code, Isa::every(kUnknown - 0.5f));
    const V rho = Isa::load(head) * rho_scale;
    V sums[Q], limit[Q];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const V farther =
          Isa::larger(Isa::every(queries[q].rho_low) - rho, rho - Isa::every(queries[q].rho_high));
      const V away = Isa::larger(farther, Isa::zero());
      sums[q] = away * away;
      // Not below reach where own radii do not count. -(max(-a, -b)) is min(a, b).
      const V t =
          own ? Isa::zero() - Isa::larger(Isa::zero() - radius, Isa::zero() - most[q]) : most[q];
      limit[q] = threshold(t * grow + fixed[q] + e);
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const V k = Isa::load(head + (2 + j) * kBlockKeys) * Isa::every(scales[2 + j]);
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        sums[q] = Isa::add_square(sums[q], Isa::every(queries[q].coordinate[j]) - k);
      }
    }
    for (int q = 0; q < Q; ++q) {
      if (reach[q] < 0) continue;
      int left = alive & (~Isa::above(sums[q], limit[q]) | unknown);
      const int8_t* tail = codes.tail + block * kTailNumbers * kBlockKeys + place;
      for (int64_t j = 8; (left & ~unknown) != 0 && j < kDirections;) {
        for (const int64_t stop = j + 8; j < stop; ++j, tail += kBlockKeys) {
          const V k = Isa::load(tail) * Isa::every(scales[2 + j]);
          sums[q] = Isa::add_square(sums[q], Isa::every(queries[q].coordinate[j]) - k);
        }
        left &= ~Isa::above(sums[q], limit[q]) | unknown;
      }
      for (; left != 0; left &= left - 1) {
        if (listed == room) return -1;
        const int64_t at = row + __builtin_ctz(left);
        out[listed++] = {at, first_query + q};
        const char* key = static_cast<const char*>(p.keys) +
                          at * p.key_stride * (p.dtype == Dtype::kFloat32 ? 4 : 2);
        Isa::prefetch(key);
        Isa::prefetch(key + 64);
      }
    }
  }
  return listed;
}

int64_t filter(const Codes& codes, const Scan& p, int64_t begin, int64_t end,
               const Sketched* queries, const float* reach, bool own, Pair* out, int64_t room) {
  int64_t listed = 0;
  for (int64_t q = 0; q < p.batch && listed >= 0;) {
    const int64_t left = p.batch - q;
    const int64_t taken = left >= kFiltered ? kFiltered : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    bool any = false;
    for (int64_t i = 0; i < taken; ++i) any |= !(reach[q + i] < 0);
    if (any) {
      const auto group = taken == kFiltered ? filter_group<kFiltered>
                         : taken == 4       ? filter_group<4>
                         : taken == 2       ? filter_group<2>
                                            : filter_group<1>;
      listed = group(codes, p, begin, end, queries + q, reach + q, own, q, out, listed, room);
    }
    q += taken;
  }
  return listed;
}

template <class T>
float score_row(const Scan& p, const Pair& pair, float most) {
  const float* x = p.queries + pair.query * p.query_stride;
  const T* k = static_cast<const T*>(p.keys) + pair.row * p.key_stride;
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
      return score_row<float>(p, pair, most);
    case Dtype::kFloat16:
      return score_row<Half>(p, pair, most);
    case Dtype::kBFloat16:
      return score_row<BFloat>(p, pair, most);
  }
  return std::numeric_limits<float>::infinity();
}

void consider(const Scan& p, const Pair& pair, Best* best) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return consider_row<float>(p, pair, best);
    case Dtype::kFloat16:
      return consider_row<Half>(p, pair, best);
    case Dtype::kBFloat16:
      return consider_row<BFloat>(p, pair, best);
  }
}
