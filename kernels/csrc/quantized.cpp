// int8 layers on the CPU; kernels/quantized_native.py compiles this after rotation.cpp, as one file.
//
//   quantize      rows of a sketch -> integers of 8 bits and a scale per row, in one pass
//   product       y[m, n] = s_x[j,m] · s_z[n] · Σ_k q[j,m,k] z[n,k] + b[n], exact in int32
//   dequantize    z in float, row by row, for the library's matrix product
//   weight_only   y[m, n] = Σ_g s_z[n,g] · Σ_{k in g} X̃[j,m,k] z[n,k] + b[n], few rows, in float
//
// Integers are multiplied as int16 pairs (vpmaddwd and an addition, one instruction with VNNI), whose
// sums are exact. vpmaddubsw would do twice as many at a time, but saturates at two products of 8
// bits, and so do the libraries that use it.
//
// Many rows: a tile of z, two vectors of columns wide, is widened to int16 pairs [K/2][columns][2];
// rows of q are then broadcast pair by pair. Few rows: z is read once as it lies, row by row.

#include <cmath>
#include <limits>

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// --- vectors of int32 sums of int16 pairs ---------------------------------------------------------

#if defined(__AVX512BW__)
constexpr int kLanes = 16;
using Vector = __m512i;
inline Vector zero() { return _mm512_setzero_si512(); }
inline Vector load(const int16_t* p) { return _mm512_loadu_si512(p); }
inline Vector widen8(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vector same(int32_t pair) { return _mm512_set1_epi32(pair); }
inline Vector add_products(Vector sum, Vector a, Vector b) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
inline void store(int32_t* p, Vector v) { _mm512_storeu_si512(p, v); }
#elif defined(__AVX2__)
constexpr int kLanes = 8;
using Vector = __m256i;
inline Vector zero() { return _mm256_setzero_si256(); }
inline Vector load(const int16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Vector widen8(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vector same(int32_t pair) { return _mm256_set1_epi32(pair); }
inline Vector add_products(Vector sum, Vector a, Vector b) {
#if defined(__AVXVNNI__)
  return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}
inline void store(int32_t* p, Vector v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
}
#else
constexpr int kLanes = 4;
struct Vector {
  int32_t lane[kLanes];
};
inline Vector zero() { return {}; }
inline int32_t product_of(const int16_t* a, const int16_t* b) {
  return int32_t(a[0]) * b[0] + int32_t(a[1]) * b[1];
}
struct Pairs {
  int16_t value[2 * kLanes];
};
inline Pairs load(const int16_t* p) {
  Pairs v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline Pairs widen8(const int8_t* p) {
  Pairs v;
  for (int i = 0; i < 2 * kLanes; ++i) v.value[i] = p[i];
  return v;
}
inline Pairs same(int32_t pair) {
  Pairs v;
  for (int i = 0; i < kLanes; ++i) std::memcpy(v.value + 2 * i, &pair, sizeof(pair));
  return v;
}
inline Vector add_products(Vector sum, const Pairs& a, const Pairs& b) {
  for (int i = 0; i < kLanes; ++i) sum.lane[i] += product_of(a.value + 2 * i, b.value + 2 * i);
  return sum;
}
inline void store(int32_t* p, const Vector& v) { std::memcpy(p, &v, sizeof(v)); }
#endif

constexpr int kTile = 2 * kLanes;  // columns of a tile
constexpr int kFewRows = 12;       // from more rows on, widening z into a tile pays

inline int32_t total_of(const Vector& sums) {
#if defined(__AVX512BW__)
  return _mm512_reduce_add_epi32(sums);
#else
  int32_t lanes[kLanes], total = 0;
  store(lanes, sums);
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
#endif
}

struct Product {
  const int16_t* q;  // [J, M, K], rows contiguous
  const float* q_scale;
  const int8_t* z;
  int64_t z_row;
  const float* scale;
  const float* bias;
  float* y;
  int64_t hashes, rows, reduced, columns, threads;

  int64_t width() const { return (columns + hashes - 1) / hashes; }
  const int16_t* row(int64_t j, int64_t m) const { return q + (j * rows + m) * reduced; }
  // Columns first … of row m from their sums.
  void put(int64_t j, int64_t m, int64_t first, int64_t count, const int32_t* sums) const {
    const float row_scale = q_scale[j * rows + m];
    const float* SS1_RESTRICT s = scale + first;
    float* SS1_RESTRICT to = y + m * columns + first;
    if (bias) {
      const float* SS1_RESTRICT b = bias + first;
#pragma omp simd
      for (int64_t n = 0; n < count; ++n) to[n] = float(sums[n]) * row_scale * s[n] + b[n];
    } else {
#pragma omp simd
      for (int64_t n = 0; n < count; ++n) to[n] = float(sums[n]) * row_scale * s[n];
    }
  }
};

// Column blocks cut into tiles; the last tile of a block, and the last block, may be narrower.
struct Tiles {
  int64_t width, per_block, columns, count;

  explicit Tiles(const Product& p)
      : width(p.width()), per_block((width + kTile - 1) / kTile), columns(p.columns),
        count(per_block * p.hashes) {}
  int64_t block(int64_t i) const { return i / per_block; }
  int64_t first(int64_t i) const { return block(i) * width + i % per_block * kTile; }
  int64_t end(int64_t i) const {
    return std::min({first(i) + kTile, (block(i) + 1) * width, columns});
  }
};

template <typename F>
void parallel(int64_t count, int64_t threads, const F& run) {
  if (threads <= 1) {
    run(0, count);
    return;
  }
#pragma omp parallel for num_threads(int(threads)) schedule(static, 1)
  for (int64_t i = 0; i < threads; ++i) run(count * i / threads, count * (i + 1) / threads);
}

// --- many rows ------------------------------------------------------------------------------------

// z[first … end) as [pairs][kTile][2], zeros beyond K and N.
void widen_tile(const Product& p, int64_t first, int64_t end, int16_t* tile, int64_t pairs) {
  if (end - first < kTile || p.reduced % 2) {
    std::memset(tile, 0, size_t(pairs) * kTile * 2 * sizeof(int16_t));
  }
  // A piece of the tile at a time, which stays in the first-level cache: rows write with a stride.
  constexpr int64_t kPiece = 128;
  const int64_t whole = p.reduced / 2;
  for (int64_t from = 0; from < whole; from += kPiece) {
    const int64_t to = std::min(from + kPiece, whole);
    for (int64_t n = first; n < end; ++n) {
      const int8_t* z = p.z + n * p.z_row;
      int16_t* at = tile + from * 2 * kTile + (n - first) * 2;
      for (int64_t i = from; i < to; ++i, at += 2 * kTile) {
        at[0] = z[2 * i];
        at[1] = z[2 * i + 1];
      }
    }
  }
  if (p.reduced % 2) {
    int16_t* at = tile + whole * 2 * kTile;
    for (int64_t n = first; n < end; ++n) {
      at[(n - first) * 2] = p.z[n * p.z_row + p.reduced - 1];
    }
  }
}

template <int R>
void tile_rows(const Product& p, int64_t j, int64_t m, int64_t first, int64_t end,
               const int16_t* tile) {
  Vector sums[R][2];
  const int16_t* q[R];
  for (int r = 0; r < R; ++r) {
    q[r] = p.row(j, m + r);
    sums[r][0] = sums[r][1] = zero();
  }
  const int64_t whole = p.reduced / 2;
  for (int64_t i = 0; i < whole; ++i, tile += 2 * kTile) {
    const auto a = load(tile), b = load(tile + kTile);
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, q[r] + 2 * i, sizeof(pair));
      const auto x = same(pair);
      sums[r][0] = add_products(sums[r][0], x, a);
      sums[r][1] = add_products(sums[r][1], x, b);
    }
  }
  if (p.reduced % 2) {
    const auto a = load(tile), b = load(tile + kTile);
    for (int r = 0; r < R; ++r) {
      const int16_t last[2] = {q[r][p.reduced - 1], 0};
      int32_t pair;
      std::memcpy(&pair, last, sizeof(pair));
      const auto x = same(pair);
      sums[r][0] = add_products(sums[r][0], x, a);
      sums[r][1] = add_products(sums[r][1], x, b);
    }
  }
  for (int r = 0; r < R; ++r) {
    int32_t total[kTile];
    store(total, sums[r][0]);
    store(total + kLanes, sums[r][1]);
    if (end - first == kTile) {
      p.put(j, m + r, first, kTile, total);
    } else {
      p.put(j, m + r, first, end - first, total);
    }
  }
}

void many_rows(const Product& p) {
  const Tiles tiles(p);
  const int64_t pairs = (p.reduced + 1) / 2;
  parallel(tiles.count, p.threads, [&](int64_t from, int64_t to) {
    std::vector<int16_t> tile(size_t(pairs) * kTile * 2);
    for (int64_t i = from; i < to; ++i) {
      const int64_t j = tiles.block(i), first = tiles.first(i), end = tiles.end(i);
      if (first >= end) continue;
      widen_tile(p, first, end, tile.data(), pairs);
      int64_t m = 0;
      for (; m + 8 <= p.rows; m += 8) tile_rows<8>(p, j, m, first, end, tile.data());
      for (; m + 4 <= p.rows; m += 4) tile_rows<4>(p, j, m, first, end, tile.data());
      for (; m < p.rows; ++m) tile_rows<1>(p, j, m, first, end, tile.data());
    }
  });
}

// --- few rows -------------------------------------------------------------------------------------

template <int R>
void whole_rows(const Product& p, int64_t m, int64_t from, int64_t to) {
  constexpr int kStep = 2 * kLanes;
  const int64_t width = p.width(), whole = p.reduced / kStep * kStep;
  for (int64_t n = from; n < to; ++n) {
    const int64_t j = n / width;
    const int8_t* z = p.z + n * p.z_row;
    const int16_t* q[R];
    Vector sums[R];
    for (int r = 0; r < R; ++r) {
      q[r] = p.row(j, m + r);
      sums[r] = zero();
    }
    for (int64_t k = 0; k < whole; k += kStep) {
      const auto wide = widen8(z + k);
      for (int r = 0; r < R; ++r) sums[r] = add_products(sums[r], load(q[r] + k), wide);
    }
    for (int r = 0; r < R; ++r) {
      int32_t total = total_of(sums[r]);
      for (int64_t k = whole; k < p.reduced; ++k) total += int32_t(q[r][k]) * z[k];
      p.put(j, m + r, n, 1, &total);
    }
  }
}

void few_rows(const Product& p) {
  parallel(p.columns, p.threads, [&](int64_t from, int64_t to) {
    int64_t m = 0;
    for (; m + 4 <= p.rows; m += 4) whole_rows<4>(p, m, from, to);
    for (; m + 2 <= p.rows; m += 2) whole_rows<2>(p, m, from, to);
    for (; m < p.rows; ++m) whole_rows<1>(p, m, from, to);
  });
}

// --- weight-only ----------------------------------------------------------------------------------

template <int R>
void float_rows(const float* x, const int8_t* z, int64_t z_row, const float* scale,
                const float* bias, float* y, int64_t m, int64_t hashes, int64_t rows,
                int64_t reduced, int64_t columns, int64_t groups, int64_t from, int64_t to) {
  const int64_t width = (columns + hashes - 1) / hashes, size = reduced / groups;
  for (int64_t n = from; n < to; ++n) {
    const float* row[R];
    float total[R];
    for (int r = 0; r < R; ++r) {
      row[r] = x + (n / width * rows + m + r) * reduced;
      total[r] = 0;
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int8_t* part = z + n * z_row + g * size;
      float sum[R] = {};
      if constexpr (R == 1) {
        const float* x0 = row[0] + g * size;
        float s0 = 0;
#pragma omp simd reduction(+ : s0)
        for (int64_t k = 0; k < size; ++k) s0 += x0[k] * float(part[k]);
        sum[0] = s0;
      } else if constexpr (R == 2) {
        const float *x0 = row[0] + g * size, *x1 = row[1] + g * size;
        float s0 = 0, s1 = 0;
#pragma omp simd reduction(+ : s0, s1)
        for (int64_t k = 0; k < size; ++k) {
          const float wide = float(part[k]);
          s0 += x0[k] * wide;
          s1 += x1[k] * wide;
        }
        sum[0] = s0, sum[1] = s1;
      } else {
        const float *x0 = row[0] + g * size, *x1 = row[1] + g * size;
        const float *x2 = row[2] + g * size, *x3 = row[3] + g * size;
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (int64_t k = 0; k < size; ++k) {
          const float wide = float(part[k]);
          s0 += x0[k] * wide;
          s1 += x1[k] * wide;
          s2 += x2[k] * wide;
          s3 += x3[k] * wide;
        }
        sum[0] = s0, sum[1] = s1, sum[2] = s2, sum[3] = s3;
      }
      for (int r = 0; r < R; ++r) total[r] += scale[n * groups + g] * sum[r];
    }
    for (int r = 0; r < R; ++r) y[(m + r) * columns + n] = bias ? total[r] + bias[n] : total[r];
  }
}

// --- quantising rows ------------------------------------------------------------------------------

// As kernels/quantize.py: ties to even, scale 1 below the smallest normal, NaN and zeros for a row
// that is not finite.
template <typename Q>
float quantize_row(const float* row, Q* to, int64_t n) {
  float most = 0;
  int32_t strange = 0;
#pragma omp simd reduction(max : most) reduction(| : strange)
  for (int64_t k = 0; k < n; ++k) {
    const float size = std::fabs(row[k]);
    strange |= size <= std::numeric_limits<float>::max() ? 0 : 1;
    most = most > size ? most : size;
  }
  if (strange) {
    std::fill(to, to + n, Q(0));
    return std::numeric_limits<float>::quiet_NaN();
  }
  float scale = most / 127.0f;
  if (scale < std::numeric_limits<float>::min()) scale = 1.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 · 2²³: adding it leaves no fraction
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const float value = std::min(std::max(row[k] / scale, -127.0f), 127.0f);
    to[k] = Q(int32_t((value + kRound) - kRound));
  }
  return scale;
}

constexpr int64_t kSketchedRows = 8;

// x [M, K] -> q [J, M, K_c] and scale [J, M], a few sketched rows at a time.
template <typename T, typename Q>
void sketch_quantized(const T* x, int64_t x_row, const int32_t* code, Q* q, float* scale,
                      const Sizes& s) {
  const int64_t reduced = s.groups * s.block;
  const Plan<float> plan(code, s, false);
  const Layout target{s.hashes, kSketchedRows * reduced, s.block, reduced};
  parallel(s.rows, s.threads, [&](int64_t from, int64_t to) {
    std::vector<float> wide(std::is_same_v<T, float> ? 0 : kSketchedRows * s.in_features);
    std::vector<float> sketched(s.hashes * kSketchedRows * reduced);
    for (int64_t m = from; m < to; m += kSketchedRows) {
      const int64_t rows = std::min(kSketchedRows, to - m);
      const float* in;
      Layout source{s.reduction, s.block, s.reduction * s.block, x_row};
      if constexpr (std::is_same_v<T, float>) {
        in = x + m * x_row;
      } else {
        source.row_stride = s.in_features;
        for (int64_t r = 0; r < rows; ++r) {
          const T* row = x + (m + r) * x_row;
          for (int64_t k = 0; k < s.in_features; ++k) wide[r * s.in_features + k] = widen(row[k]);
        }
        in = wide.data();
      }
      combine_rows(in, source, sketched.data(), target, plan, s, false, 0, rows);
      for (int64_t j = 0; j < s.hashes; ++j) {
        for (int64_t r = 0; r < rows; ++r) {
          const float* row = sketched.data() + (j * kSketchedRows + r) * reduced;
          const int64_t at = j * s.rows + m + r;
          scale[at] = quantize_row(row, q + at * reduced, reduced);
        }
      }
    }
  });
}

}  // namespace

#define SS1_SKETCH_QUANTIZED(name, T)                                                              \
  SS1_EXPORT void ss1_sketch_quantized_##name(                                                     \
      const void* x, int64_t x_row, const int32_t* code, void* q, float* scale, int64_t rows,      \
      int64_t in_features, int64_t hashes, int64_t groups, int64_t reduction, int64_t block,       \
      int64_t threads, int64_t wide) {                                                             \
    const Sizes s{rows, in_features, hashes, groups, reduction, block, threads};                   \
    const T* from = static_cast<const T*>(x);                                                      \
    if (wide) {                                                                                    \
      sketch_quantized(from, x_row, code, static_cast<int16_t*>(q), scale, s);                     \
    } else {                                                                                       \
      sketch_quantized(from, x_row, code, static_cast<int8_t*>(q), scale, s);                      \
    }                                                                                              \
  }

SS1_SKETCH_QUANTIZED(float32, float)
SS1_SKETCH_QUANTIZED(bfloat16, BFloat16)
#if defined(__FLT16_MANT_DIG__)
SS1_SKETCH_QUANTIZED(float16, _Float16)
#endif

// q int16 [J, M, K_c], z int8 [N, K_c] of any row stride, y float [M, N].
SS1_EXPORT void ss1_product_int8(const void* q, const float* q_scale, const void* z, int64_t z_row,
                                 const float* scale, const float* bias, float* y, int64_t hashes,
                                 int64_t rows, int64_t reduced, int64_t columns, int64_t threads) {
  const Product p{static_cast<const int16_t*>(q), q_scale, static_cast<const int8_t*>(z), z_row,
                  scale, bias, y, hashes, rows, reduced, columns, threads};
  if (rows <= kFewRows) {
    few_rows(p);
  } else {
    many_rows(p);
  }
}

// x float [J, M, K_c], z int8 [N, K_c] of any row stride, scale [N, groups], y float [M, N].
SS1_EXPORT void ss1_weight_only_int8(const float* x, const void* z, int64_t z_row,
                                     const float* scale, const float* bias, float* y,
                                     int64_t hashes, int64_t rows, int64_t reduced,
                                     int64_t columns, int64_t groups, int64_t threads) {
  const int8_t* values = static_cast<const int8_t*>(z);
  parallel(columns, threads, [&](int64_t from, int64_t to) {
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4) {
      float_rows<4>(x, values, z_row, scale, bias, y, m, hashes, rows, reduced, columns, groups,
                    from, to);
    }
    for (; m + 2 <= rows; m += 2) {
      float_rows<2>(x, values, z_row, scale, bias, y, m, hashes, rows, reduced, columns, groups,
                    from, to);
    }
    for (; m < rows; ++m) {
      float_rows<1>(x, values, z_row, scale, bias, y, m, hashes, rows, reduced, columns, groups,
                    from, to);
    }
  });
}

// out float [N, K_c] = scale · z, of rows of z.
SS1_EXPORT void ss1_dequantize_int8(const void* z, int64_t z_row, const float* scale, float* out,
                                    int64_t rows, int64_t reduced, int64_t groups,
                                    int64_t threads) {
  const int8_t* values = static_cast<const int8_t*>(z);
  const int64_t size = reduced / groups;
  parallel(rows, threads, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) {
      for (int64_t g = 0; g < groups; ++g) {
        const int8_t* SS1_RESTRICT part = values + n * z_row + g * size;
        float* SS1_RESTRICT wide = out + n * reduced + g * size;
        const float step = scale[n * groups + g];
#pragma omp simd
        for (int64_t k = 0; k < size; ++k) wide[k] = step * float(part[k]);
      }
    }
  });
}
