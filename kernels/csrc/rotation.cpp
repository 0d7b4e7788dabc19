// The rotation sketch and its adjoint for the CPU; kernels/native.py compiles and calls this file.
//
//   sketch    out[j, m, g·B + u]    = Σ_l s[j,g,l] · x[m, (g·c+l)·B + (u - h[j,g,l]) mod B]
//   unsketch  out[m, (g·c+l)·B + t] = Σ_j s[j,g,l] · g[j, m, g·B + (t + h[j,g,l]) mod B]
//
// Within one row and supergroup both are the same thing: every *target* (j, or l) is a signed sum of
// rotated *sources* (l, or j). The sources are copied to a small buffer, each twice in a row; there a
// rotation is a plain contiguous read from an offset in [0, B), with no wrap to test for. The copy
// also widens to the type that sums run in, and fills the features beyond K with zeros. It stays in
// the first-level cache, so that memory sees one read of the input and one write of the output.
//
// Offsets are reduced modulo B before use: no code can make a read leave the buffer.
// Sums run in float (double for double), in the order of the sources, as in kernels/portable.py.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(_MSC_VER)
#define SS1_EXPORT extern "C" __declspec(dllexport)
#define SS1_RESTRICT __restrict
#else
#define SS1_EXPORT extern "C" __attribute__((visibility("default")))
#define SS1_RESTRICT __restrict__
#endif

namespace {

struct BFloat16 {
  uint16_t bits;
};

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
inline Sum<T> widen(T value) {
  return Sum<T>(value);
}

inline float widen(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

template <typename T>
inline void narrow(Sum<T> value, T& to) {
  to = T(value);
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
inline void narrow(float value, BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = uint16_t(value == value ? rounded : 0x7fc0u);
}

// Rows of `parts` pieces: part p of supergroup g starts at p·part_stride + g·group_stride.
struct Layout {
  int64_t parts, part_stride, group_stride, row_stride;
};

struct Sizes {
  int64_t rows, in_features, hashes, groups, reduction, block, threads;
};

// out[u] = Σ_p sign[p] · from[p][u], or += where `more`. C is fixed so that the C pointers and signs
// stay in registers.
template <int C, typename A>
void signed_sum(const A* const* from, const A* sign, A* SS1_RESTRICT out, int64_t n, bool more) {
  const A* source[C];
  A factor[C];
  for (int p = 0; p < C; ++p) {
    source[p] = from[p];
    factor[p] = sign[p];
  }
  if (more) {
#pragma omp simd
    for (int64_t u = 0; u < n; ++u) {
      A sum = out[u];
      for (int p = 0; p < C; ++p) sum += factor[p] * source[p][u];
      out[u] = sum;
    }
  } else {
#pragma omp simd
    for (int64_t u = 0; u < n; ++u) {
      A sum = A(0);
      for (int p = 0; p < C; ++p) sum += factor[p] * source[p][u];
      out[u] = sum;
    }
  }
}

constexpr int kMostSources = 8;

template <typename A>
void any_signed_sum(const A* const* from, const A* sign, int64_t parts, A* out, int64_t n) {
  for (int64_t p = 0; p < parts; p += kMostSources) {
    const bool more = p > 0;
    const A* const* f = from + p;
    const A* s = sign + p;
    switch (std::min<int64_t>(parts - p, kMostSources)) {
      case 1: signed_sum<1>(f, s, out, n, more); break;
      case 2: signed_sum<2>(f, s, out, n, more); break;
      case 3: signed_sum<3>(f, s, out, n, more); break;
      case 4: signed_sum<4>(f, s, out, n, more); break;
      case 5: signed_sum<5>(f, s, out, n, more); break;
      case 6: signed_sum<6>(f, s, out, n, more); break;
      case 7: signed_sum<7>(f, s, out, n, more); break;
      default: signed_sum<8>(f, s, out, n, more); break;
    }
  }
}

// The code as [G, targets, sources]: where in the doubled source to begin, and the sign.
template <typename A>
struct Plan {
  std::vector<int64_t> start;
  std::vector<A> sign;

  Plan(const int32_t* code, const Sizes& s, bool adjoint)
      : start(s.hashes * s.groups * s.reduction), sign(start.size()) {
    for (int64_t j = 0; j < s.hashes; ++j) {
      for (int64_t g = 0; g < s.groups; ++g) {
        for (int64_t l = 0; l < s.reduction; ++l) {
          const int32_t packed = *code++;
          const int64_t rotation = int64_t(packed < 0 ? ~packed : packed) % s.block;
          const int64_t within = adjoint ? l * s.hashes + j : j * s.reduction + l;
          const int64_t at = g * s.hashes * s.reduction + within;
          start[at] = adjoint || rotation == 0 ? rotation : s.block - rotation;
          sign[at] = packed < 0 ? A(-1) : A(1);
        }
      }
    }
  }
};

template <typename T>
void combine_rows(const T* in, const Layout& source, T* out, const Layout& target,
                  const Plan<Sum<T>>& plan, const Sizes& s, bool adjoint, int64_t first,
                  int64_t last) {
  using A = Sum<T>;
  const int64_t block = s.block;
  std::vector<A> doubled(source.parts * 2 * block);
  std::vector<const A*> from(source.parts);
  std::vector<A> sums(std::is_same_v<T, A> ? 0 : block);
  // The part of chunk (g, l) of x that lies below K.
  const auto width = [&](int64_t g, int64_t l) {
    return std::clamp<int64_t>(s.in_features - (g * s.reduction + l) * block, 0, block);
  };
  for (int64_t m = first; m < last; ++m) {
    for (int64_t g = 0; g < s.groups; ++g) {
      for (int64_t p = 0; p < source.parts; ++p) {
        const int64_t n = adjoint ? block : width(g, p);
        const T* x = in + m * source.row_stride + g * source.group_stride + p * source.part_stride;
        A* once = doubled.data() + p * 2 * block;
        if (n > 0) {
#pragma omp simd
          for (int64_t u = 0; u < n; ++u) once[u] = widen(x[u]);
        }
        std::fill(once + n, once + block, A(0));
        std::memcpy(once + block, once, block * sizeof(A));
      }
      for (int64_t q = 0; q < target.parts; ++q) {
        const int64_t n = adjoint ? width(g, q) : block;
        if (n == 0) continue;
        const int64_t at = (g * target.parts + q) * source.parts;
        for (int64_t p = 0; p < source.parts; ++p) {
          from[p] = doubled.data() + p * 2 * block + plan.start[at + p];
        }
        T* y = out + m * target.row_stride + g * target.group_stride + q * target.part_stride;
        if constexpr (std::is_same_v<T, A>) {
          any_signed_sum(from.data(), &plan.sign[at], source.parts, y, n);
        } else {
          any_signed_sum(from.data(), &plan.sign[at], source.parts, sums.data(), n);
#pragma omp simd
          for (int64_t u = 0; u < n; ++u) narrow(sums[u], y[u]);
        }
      }
    }
  }
}

template <typename T>
void combine(const T* in, const Layout& source, const int32_t* code, T* out, const Layout& target,
             const Sizes& s, bool adjoint) {
  const Plan<Sum<T>> plan(code, s, adjoint);
  // One thread enters no parallel region: that alone costs more than a small sketch.
  if (s.threads <= 1) {
    combine_rows(in, source, out, target, plan, s, adjoint, 0, s.rows);
    return;
  }
#pragma omp parallel for num_threads(int(s.threads)) schedule(static, 1)
  for (int64_t i = 0; i < s.threads; ++i) {
    combine_rows(in, source, out, target, plan, s, adjoint, s.rows * i / s.threads,
                 s.rows * (i + 1) / s.threads);
  }
}

}  // namespace

// `wide` is the tensor [rows, K], `sketched` the tensor [J, rows, K_c]; strides count elements, and
// the last dimension of both is contiguous.
#define SS1_ROTATION(name, T)                                                                      \
  SS1_EXPORT void ss1_sketch_##name(const void* wide, int64_t wide_row, const int32_t* code,       \
                                    void* sketched, int64_t sketched_hash, int64_t sketched_row,   \
                                    int64_t rows, int64_t in_features, int64_t hashes,             \
                                    int64_t groups, int64_t reduction, int64_t block,              \
                                    int64_t threads) {                                             \
    combine<T>(static_cast<const T*>(wide), {reduction, block, reduction * block, wide_row}, code, \
               static_cast<T*>(sketched), {hashes, sketched_hash, block, sketched_row},            \
               {rows, in_features, hashes, groups, reduction, block, threads}, false);             \
  }                                                                                                \
  SS1_EXPORT void ss1_unsketch_##name(void* wide, int64_t wide_row, const int32_t* code,           \
                                      const void* sketched, int64_t sketched_hash,                 \
                                      int64_t sketched_row, int64_t rows, int64_t in_features,     \
                                      int64_t hashes, int64_t groups, int64_t reduction,           \
                                      int64_t block, int64_t threads) {                            \
    combine<T>(static_cast<const T*>(sketched), {hashes, sketched_hash, block, sketched_row},      \
               code, static_cast<T*>(wide), {reduction, block, reduction * block, wide_row},       \
               {rows, in_features, hashes, groups, reduction, block, threads}, true);              \
  }

SS1_ROTATION(float32, float)
SS1_ROTATION(float64, double)
SS1_ROTATION(bfloat16, BFloat16)
#if defined(__FLT16_MANT_DIG__)
SS1_ROTATION(float16, _Float16)
#endif
