// Many queries at once, compiled once per instruction set after lookup_kernel_body.h.
//
//   |x - k|^2 = |x|^2 - 2 x.k + |k|^2
//
// One operation per element and query instead of two. A vector holds 8 queries (at kApart elements
// each), so a number of a key is loaded into all of its lanes, no sum is folded across them, and
// Isa::product_keys keys share the load of the queries. kProductRows keys are widened at a time, a
// piece of them that stays in L1. What this form cannot rule out within its margin is looked at by
// direct differences, as everything is where those stop early or this rules out too little. Keys
// are read from memory once per call and kMostQueries queries; the limit is the rate of arithmetic.

constexpr int64_t kApart = kVector / kPanel;
constexpr int64_t kLine = 32;  // elements between prefetches
static_assert(kVector % kPanel == 0 && kProductRows % Isa::product_keys == 0);
static_assert(kProductPiece % kLine == 0 && kPadding % kLine == 0);

struct Products {
  alignas(64) float keys[kProductRows][kProductPiece];
  alignas(64) float products[kProductRows][kMostQueries];
  alignas(64) float most[kMostQueries];   // beyond it no key can be the nearest, see most()
  typename Isa::V squares[kProductRows];  // of the keys' elements, by lane
};

// What a sum of p.dim products may err, in shares of |x| |k|: Lemma 6 of docs/error-bounds.md.
inline double product_error(const Scan& p) {
  const double m = (kProductPiece + static_cast<double>(p.dim) / kProductPiece + 8) * 0x1p-24;
  return m / (1 - m);
}

// Squared norms beyond this are left to direct differences, so that nothing overflows here.
constexpr float kProductNorm = 0x1p120f;

// h of Lemma 6: with it, fl(|k|^2 (1 - h) - 2 x.k) > most() shows that k is not the nearest.
inline float product_margin(const Scan& p) {
  return static_cast<float>(2.2 * product_error(p) + 0x1p-21) * (1 + 0x1p-22f);
}

inline float most(const Scan& p, float margin, int64_t q, const Best& best) {
  const float norm = p.queries[q * p.query_stride + padded(p.dim)];
  if (!(norm < kProductNorm) || best.threshold == std::numeric_limits<float>::infinity()) {
    return std::numeric_limits<float>::infinity();
  }
  const double t = best.threshold;
  const double bound = t + t * p.relative + 8.0 * p.absolute - norm * (1.0 - margin);
  return static_cast<float>(bound + std::fabs(bound) * 0x1p-22 + 0x1p-148);
}

template <bool kReordered>
inline void arrange_row(const float* x, int64_t size, float* out) {
  for (int64_t line = 0; line < size; line += kLine, out += kLine * kPanel) {
#pragma GCC unroll 32
    for (int64_t i = 0; i < kLine; ++i) {
      out[i / kApart * kVector + i % kApart] = x[line + (kReordered ? Isa::from(i) : i)];
    }
  }
}

// Panels of kPanel queries: kApart elements of each, then the next ones. Zeros after the last.
void arrange(const Scan& p, float* panels) {
  const int64_t size = padded(p.dim);
  std::memset(panels, 0, panel_rows(p.batch) * size * sizeof *panels);
  for (int64_t q = 0; q < p.batch; ++q) {
    const auto row = p.dtype == Dtype::kBFloat16 ? arrange_row<true> : arrange_row<false>;
    row(p.queries + q * p.query_stride, size,
        panels + q / kPanel * kPanel * size + q % kPanel * kApart);
  }
}

// Add the squares of `length` elements of a key and widen them, in the order of the panels and with
// zeros up to a multiple of kLine.
template <class T>
inline void take(const T* key, int64_t length, typename Isa::V& squares, float* out) {
  constexpr int kParts = kLine / kVector;
  typename Isa::V sums[kParts];
#pragma GCC unroll 4
  for (int j = 0; j < kParts; ++j) sums[j] = Isa::zero();
  const auto line = [&](const T* at) __attribute__((always_inline)) {
    typename Isa::V part[kParts];
    Isa::load_line(at, part);
#pragma GCC unroll 4
    for (int j = 0; j < kParts; ++j) {
      Isa::store(out + j * kVector, part[j]);
      sums[j] = Isa::add_square(sums[j], part[j]);
    }
    out += kLine;
  };
  int64_t i = 0;
  for (; i + kLine <= length; i += kLine) line(key + i);
  if (i < length) {
    T rest[kLine] = {};
    std::memcpy(rest, key + i, (length - i) * sizeof(T));
    line(rest);
  }
#pragma GCC unroll 4
  for (int j = 1; j < kParts; ++j) sums[0] = sums[0] + sums[j];
  squares = squares + sums[0];
}

// Add the products of P panels and K keys. `ahead` are the same elements of what comes next.
template <class T, int P, int K>
inline void multiply(const float* panel, int64_t panel_size, const float* keys, int64_t length,
                     float* out, const T* ahead, int64_t key_stride) {
  typename Isa::V sums[K][P];
#pragma GCC unroll 16
  for (int n = 0; n < K; ++n) {
#pragma GCC unroll 2
    for (int j = 0; j < P; ++j) sums[n][j] = Isa::zero();
  }
  for (int64_t line = 0; line < length; line += kLine) {
    if (ahead != nullptr) {
#pragma GCC unroll 16
      for (int n = 0; n < K; ++n) Isa::prefetch(ahead + n * key_stride + line);
      if (sizeof(T) == 4) {
#pragma GCC unroll 16
        for (int n = 0; n < K; ++n) Isa::prefetch(ahead + n * key_stride + line + kLine / 2);
      }
    }
#pragma GCC unroll 2
    for (int64_t i = 0; i < kLine; i += kApart, keys += kApart, panel += kVector) {
      typename Isa::V x[P];
#pragma GCC unroll 2
      for (int j = 0; j < P; ++j) x[j] = Isa::load(panel + j * panel_size);
#pragma GCC unroll 16
      for (int n = 0; n < K; ++n) {
        const typename Isa::V k = Isa::spread(keys + n * kProductPiece);
#pragma GCC unroll 2
        for (int j = 0; j < P; ++j) sums[n][j] = Isa::add_product(sums[n][j], x[j], k);
      }
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < K; ++n) {
#pragma GCC unroll 2
    for (int j = 0; j < P; ++j) Isa::fold(sums[n][j], out + n * kMostQueries + j * kPanel);
  }
}

template <class T>
void multiply_keys(const Scan& p, int64_t begin, int64_t rows, Products& of) {
  constexpr int K = Isa::product_keys;
  std::memset(of.products, 0, sizeof of.products);
  for (auto& squares : of.squares) squares = Isa::zero();
  const int64_t panel_size = kPanel * padded(p.dim);
  const T* keys = static_cast<const T*>(p.keys) + begin * p.key_stride;
  for (int64_t from = 0; from < p.dim; from += kProductPiece) {
    const int64_t to = from + kProductPiece < p.dim ? from + kProductPiece : p.dim;
    for (int64_t n = 0; n < rows; ++n) {
      take(keys + n * p.key_stride + from, to - from, of.squares[n], of.keys[n]);
    }
    const int64_t length = (to - from + kLine - 1) / kLine * kLine;
    const T* next = to < p.dim ? keys + to : keys + kProductRows * p.key_stride;
    for (int64_t q = 0; q < p.batch;) {
      const float* panel = p.panels + q / kPanel * panel_size + from * kPanel;
      const bool two = Isa::product_panels > 1 && q + kPanel < p.batch;
      for (int64_t n = 0; n < rows; n += K) {
        const T* ahead = q == 0 ? next + n * p.key_stride : nullptr;
        if (two) {
          multiply<T, Isa::product_panels, K>(panel, panel_size, of.keys[n], length,
                                              &of.products[n][q], ahead, p.key_stride);
        } else {
          multiply<T, 1, K>(panel, panel_size, of.keys[n], length, &of.products[n][q], ahead,
                            p.key_stride);
        }
      }
      q += two ? Isa::product_panels * kPanel : kPanel;
    }
  }
}

// Call `left(q)` for the queries for which row n of `of` may still be the nearest.
template <class Left>
inline void not_ruled_out(const Scan& p, float margin, int64_t slot, int64_t n, const Products& of,
                          const Left& left) {
  if (p.radii[slot] == -std::numeric_limits<float>::infinity()) return;
  float norm = Isa::sum(of.squares[n]);
  norm = norm < kProductNorm ? norm * (1 - margin) : std::numeric_limits<float>::quiet_NaN();
  const typename Isa::V from = Isa::every(norm), twice = Isa::every(-2.0f);
  for (int64_t q = 0; q < p.batch; q += kVector) {
    const typename Isa::V s = Isa::add_product(from, Isa::load(&of.products[n][q]), twice);
    int bits = ~Isa::above(s, Isa::load(&of.most[q]));  // a NaN rules nothing out
    const int64_t real = p.batch - q < kVector ? p.batch - q : kVector;
    for (bits &= (1 << real) - 1; bits != 0; bits &= bits - 1) left(q + __builtin_ctz(bits));
  }
}

// The first rows tell whether direct differences stop early, and how little products rule out.
template <class T>
void scan_products(const Scan& p, int64_t begin, int64_t end, Best* best) {
  constexpr int64_t kProbe = 8;
  Pace pace;
  int64_t start = begin + kProbe < end ? begin + kProbe : end;
  scan_direct<T>(p, begin, start, best, pace);
  if (2 * pace.stopped >= pace.blocks) return scan_direct<T>(p, start, end, best, pace);

  Products of;
  const float margin = product_margin(p);
  for (int64_t q = 0; q < p.batch; ++q) of.most[q] = most(p, margin, q, best[q]);
  for (; start < end; start += kProductRows) {
    const int64_t rows = start + kProductRows < end ? kProductRows : end - start;
    multiply_keys<T>(p, start, rows, of);
    int64_t left = 0;
    for (int64_t n = 0; n < rows; ++n) {
      not_ruled_out(p, margin, start + n, n, of, [&](int64_t) { ++left; });
    }
    if (4 * left > rows * p.batch) return scan_direct<T>(p, start, end, best, pace);
    if (left == 0) continue;
    for (int64_t n = 0; n < rows; ++n) {
      not_ruled_out(p, margin, start + n, n, of, [&](int64_t q) {
        consider_key<T>(p, {start + n, q}, best);
        of.most[q] = most(p, margin, q, best[q]);
      });
    }
  }
}

// Few queries beyond whole panels are not worth one more.
template <class T>
void scan_keys(const Scan& p, int64_t begin, int64_t end, Best* best) {
  Scan some = p, rest = p;
  if (p.panels == nullptr || product_error(p) >= 0.05) {
    some.batch = 0;
  } else if (p.batch % kPanel < Isa::product_rest) {
    some.batch -= p.batch % kPanel;
  }
  rest.batch -= some.batch;
  rest.queries += some.batch * p.query_stride;
  if (some.batch > 0) scan_products<T>(some, begin, end, best);
  if (rest.batch > 0) {
    Pace pace;
    scan_direct<T>(rest, begin, end, best + some.batch, pace);
  }
}

void scan(const Scan& p, int64_t begin, int64_t end, Best* best) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return scan_keys<float>(p, begin, end, best);
    case Dtype::kFloat16:
      return scan_keys<Half>(p, begin, end, best);
    case Dtype::kBFloat16:
      return scan_keys<BFloat>(p, begin, end, best);
  }
}
