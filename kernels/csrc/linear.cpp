// A whole SS1 layer on few rows, for the CPU; kernels/native.py compiles this after rotation.cpp, as
// one file.
//
//   y[m, n] = Σ_k X̃[j(n), m, k] z[n, k] + b[n]
//
// Few rows leave the library's matrix product nothing to reuse: z is read once, row by row, which is
// all the time there is, and for small layers what surrounds the product (views, two more calls, a
// buffer) costs more than the product itself. Sums run in float (double for double).

namespace {

template <typename T>
struct Product {
  const Sum<T>* sketched;  // [J, M, K_c]
  const T* z;
  int64_t z_row;
  const T* bias;
  T* y;
  int64_t rows, reduced, columns, width;
};

// R rows of X̃ at a time, so that a row of z is widened once for them.
template <int R, typename T>
void some_rows(const Product<T>& p, int64_t m, int64_t first, int64_t last) {
  using A = Sum<T>;
  for (int64_t n = first; n < last; ++n) {
    const T* SS1_RESTRICT z = p.z + n * p.z_row;
    const A* x0 = p.sketched + (n / p.width * p.rows + m) * p.reduced;
    // rows beyond R repeat the last: three rows are four with one thrown away
    const A* x1 = R > 1 ? x0 + p.reduced : x0;
    const A* x2 = R > 2 ? x1 + p.reduced : x1;
    const A* x3 = R > 3 ? x2 + p.reduced : x2;
    A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    if constexpr (R == 1) {
#pragma omp simd reduction(+ : s0)
      for (int64_t k = 0; k < p.reduced; ++k) s0 += x0[k] * widen(z[k]);
    } else if constexpr (R == 2) {
#pragma omp simd reduction(+ : s0, s1)
      for (int64_t k = 0; k < p.reduced; ++k) {
        const A wide = widen(z[k]);
        s0 += x0[k] * wide;
        s1 += x1[k] * wide;
      }
    } else {
#pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int64_t k = 0; k < p.reduced; ++k) {
        const A wide = widen(z[k]);
        s0 += x0[k] * wide;
        s1 += x1[k] * wide;
        s2 += x2[k] * wide;
        s3 += x3[k] * wide;
      }
    }
    const A sums[] = {s0, s1, s2, s3};
    for (int r = 0; r < R; ++r) {
      narrow(p.bias ? sums[r] + widen(p.bias[n]) : sums[r], p.y[(m + r) * p.columns + n]);
    }
  }
}

constexpr int64_t kCached = 1 << 15;  // bytes of z that are read again for the next rows

template <typename T>
void all_rows(const Product<T>& p, int64_t first, int64_t last) {
  const int64_t step = std::max<int64_t>(1, kCached / (p.reduced * sizeof(T)));
  for (int64_t n = first; n < last; n += step) {
    const int64_t end = std::min(last, n + step);
    int64_t m = 0;
    for (; m + 4 <= p.rows; m += 4) some_rows<4>(p, m, n, end);
    switch (p.rows - m) {
      case 1: some_rows<1>(p, m, n, end); break;
      case 2: some_rows<2>(p, m, n, end); break;
      case 3: some_rows<3>(p, m, n, end); break;
    }
  }
}

// X̃[j, m, g·r : (g+1)·r] = x_g S[j, g] for blocks S [J, G, size, r], in the type that sums run in.
template <typename T>
void learned_sketch(const T* x, int64_t x_row, const T* blocks, const Sizes& s, Sum<T>* out) {
  const int64_t size = s.reduction, rank = s.block, reduced = s.groups * rank;
  for (int64_t j = 0; j < s.hashes; ++j) {
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t inside = std::min(size, s.in_features - g * size);
      const T* block = blocks + (j * s.groups + g) * size * rank;
      for (int64_t m = 0; m < s.rows; ++m) {
        const T* from = x + m * x_row + g * size;
        Sum<T>* SS1_RESTRICT to = out + (j * s.rows + m) * reduced + g * rank;
        std::fill(to, to + rank, Sum<T>(0));
        for (int64_t k = 0; k < inside; ++k) {
          const Sum<T> value = widen(from[k]);
          const T* SS1_RESTRICT row = block + k * rank;
#pragma omp simd
          for (int64_t q = 0; q < rank; ++q) to[q] += value * widen(row[q]);
        }
      }
    }
  }
}

// A sketch is rounded to x's type wherever it is stored, and here too.
template <typename T>
void rounded(std::vector<Sum<T>>& values) {
  if constexpr (!std::is_same_v<T, Sum<T>>) {
    for (Sum<T>& value : values) {
      T narrowed;
      narrow(value, narrowed);
      value = widen(narrowed);
    }
  }
}

// `code` holds the rotations, or is null and `blocks` holds the learned sketch; then `reduction` is
// a group's size and `block` its rank.
template <typename T>
void linear(const T* x, int64_t x_row, const int32_t* code, const T* blocks, const T* z,
            int64_t z_row, const T* bias, T* y, int64_t columns, const Sizes& s) {
  const int64_t reduced = s.groups * s.block, count = s.hashes * s.rows * reduced;
  std::vector<Sum<T>> sketched(count);
  if (code) {
    Sizes alone = s;
    alone.threads = 1;
    const Layout source{s.reduction, s.block, s.reduction * s.block, x_row};
    const Layout target{s.hashes, s.rows * reduced, s.block, reduced};
    if constexpr (std::is_same_v<T, Sum<T>>) {
      combine<T>(x, source, code, sketched.data(), target, alone, false);
    } else {
      std::vector<T> narrowed(count);
      combine<T>(x, source, code, narrowed.data(), target, alone, false);
      for (int64_t i = 0; i < count; ++i) sketched[i] = widen(narrowed[i]);
    }
  } else {
    learned_sketch<T>(x, x_row, blocks, s, sketched.data());
    rounded<T>(sketched);
  }
  const Product<T> p{sketched.data(), z,       z_row,   bias, y,
                     s.rows,          reduced, columns, (columns + s.hashes - 1) / s.hashes};
  if (s.threads <= 1) {
    all_rows(p, 0, columns);
    return;
  }
#pragma omp parallel for num_threads(int(s.threads)) schedule(static, 1)
  for (int64_t i = 0; i < s.threads; ++i) {
    all_rows(p, columns * i / s.threads, columns * (i + 1) / s.threads);
  }
}

}  // namespace

// `x` is the tensor [rows, K], `z` [columns, K_c], `y` [rows, columns] contiguous; the last dimension
// of all is contiguous, and the strides count elements.
#define SS1_LINEAR(name, T)                                                                        \
  SS1_EXPORT void ss1_linear_##name(const void* x, int64_t x_row, const int32_t* code,             \
                                    const void* blocks, const void* z, int64_t z_row,              \
                                    const void* bias, void* y, int64_t rows, int64_t in_features,  \
                                    int64_t columns, int64_t hashes, int64_t groups,               \
                                    int64_t reduction, int64_t block, int64_t threads) {           \
    linear<T>(static_cast<const T*>(x), x_row, code, static_cast<const T*>(blocks),                \
              static_cast<const T*>(z), z_row, static_cast<const T*>(bias), static_cast<T*>(y),    \
              columns, {rows, in_features, hashes, groups, reduction, block, threads});            \
  }

SS1_LINEAR(float32, float)
SS1_LINEAR(float64, double)
SS1_LINEAR(bfloat16, BFloat16)
#if defined(__FLT16_MANT_DIG__)
SS1_LINEAR(float16, _Float16)
#endif
