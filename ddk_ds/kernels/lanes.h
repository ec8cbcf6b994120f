// Packs of 64 bytes of a row in the vector types of GCC and Clang: reading, writing, exp, log1p, expm1, tanh.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

// With `inline` alone GCC makes calls, and constants and packs would go through memory at each exp.
#define INLINE inline __attribute__((always_inline))

namespace {

struct bfloat16 { uint16_t bits; };

template <typename F> struct Lanes;
template <> struct Lanes<float> {
  typedef float V __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
};
template <> struct Lanes<double> {
  typedef double V __attribute__((vector_size(64)));
  typedef int64_t I __attribute__((vector_size(64)));
};
using V = Lanes<float>::V;
using I = Lanes<float>::I;
using W = Lanes<double>::V;
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t Half __attribute__((vector_size(32)));

template <typename P, typename F> INLINE P splat(F x) { return P{} + x; }

// Whole packs from memory and back.
INLINE V read(const float* x) { V v; std::memcpy(&v, x, sizeof v); return v; }
INLINE W read(const double* x) { W v; std::memcpy(&v, x, sizeof v); return v; }
INLINE V read(const bfloat16* x) {
  Half h;
  std::memcpy(&h, x, sizeof h);
  return (V)(__builtin_convertvector(h, U) << 16);
}
INLINE void write(float* out, V v) { std::memcpy(out, &v, sizeof v); }
INLINE void write(double* out, W v) { std::memcpy(out, &v, sizeof v); }
INLINE void write(bfloat16* out, V v) {  // to nearest, ties to even; NaN stays NaN
  const U bits = (U)v;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Half h = __builtin_convertvector(v == v ? rounded : splat<U>(0x7fc0u), Half);
  std::memcpy(out, &h, sizeof h);
}

// The larger of a and b; b if either is NaN.
INLINE W max_(W a, W b) { return a > b ? a : b; }
INLINE V max_(V a, V b) {
#ifdef __AVX512F__
  return (V)_mm512_max_ps((__m512)a, (__m512)b);  // GCC finds this single instruction under finite mathematics only
#else
  return a > b ? a : b;
#endif
}

// exp, log1p and expm1 of arguments up to 88, within 2 units in the last place where the results are used.
INLINE V exp_(V x) {
  x = max_(splat<V>(-87.f), x);  // NaN passes
  // 2^n * 2^f: adding 1.5 * 2^23 leaves the integer n, with the exponent's bias, in the low bits.
  constexpr float LOG2_E = 1.44269504f, SHIFT = 12582912.f + 127.f;
  const V shifted = x * LOG2_E + SHIFT;
  const V f = x * LOG2_E - (shifted - SHIFT);
  V y = f * 1.534581159e-4f + 1.339993122e-3f;
  y = y * f + 9.618488959e-3f;
  y = y * f + 5.550328777e-2f;
  y = y * f + 2.402264689e-1f;
  y = y * f + 6.931472057e-1f;
  y = y * f + 1.f;
  return y * (V)((I)shifted << 23);
}
INLINE V expm1_(V x) {
  V series = x * (1.f / 5040.f) + 1.f / 720.f;
  series = series * x + 1.f / 120.f;
  series = series * x + 1.f / 24.f;
  series = series * x + 1.f / 6.f;
  series = series * x + 0.5f;
  series = series * (x * x) + x;
  const V plain = exp_(x) - 1.f;
  return (x > -0.35f) & (x < 0.35f) ? series : plain;
}
INLINE V log1p_(V y) {  // for y in (-1, 0]
  const I bits = (I)(y + 1.f);
  const I exponent = (bits - 0x3f3504f3) >> 23;  // 1 + y = m * 2^exponent, m in [sqrt(1/2), sqrt(2))
  const V m = (V)(bits - (exponent << 23));
  const V top = exponent == 0 ? y : m - 1.f;
  const V w = top / (top + 2.f);
  const V w2 = w * w;
  V series = w2 * (2.f / 9.f) + 2.f / 7.f;
  series = series * w2 + 2.f / 5.f;
  series = series * w2 + 2.f / 3.f;
  series = series * (w2 * w) + 2.f * w;
  return series + __builtin_convertvector(exponent, V) * 0.693147180f;
}
// exp(x) - 1 - x relative to x^2, for |x| < 0.25.
INLINE V second_(V x) {
  V series = x * (1.f / 5040.f) + 1.f / 720.f;
  series = series * x + 1.f / 120.f;
  series = series * x + 1.f / 24.f;
  series = series * x + 1.f / 6.f;
  return series * x + 0.5f;
}

template <typename Function>
INLINE W each(W x, Function function) {
  for (int i = 0; i < 8; i++) x[i] = function(x[i]);
  return x;
}
INLINE W exp_(W x) { return each(x, [](double a) { return std::exp(a); }); }
INLINE W expm1_(W x) { return each(x, [](double a) { return std::expm1(a); }); }
INLINE W log1p_(W x) { return each(x, [](double a) { return std::log1p(a); }); }
INLINE W second_(W x) { return x; }  // not used

template <typename P>
INLINE P tanh_(P x) {
  const P e = expm1_((x < 0 ? x : -x) * 2);
  const P t = -e / (e + 2);
  return x < 0 ? -t : t;
}

template <typename P>
INLINE double sum_of(P v) {
  double sum = 0;
  for (size_t i = 0; i < sizeof(P) / sizeof(v[0]); i++) sum += double(v[i]);
  return sum;
}

// A row of logits, read in packs.
template <typename E, typename F>
struct Logits {
  using P = typename Lanes<F>::V;
  static constexpr int N = sizeof(P) / sizeof(F);
  const E* x;
  int64_t classes;

  // Lanes past the row's end are very low: their probabilities add nothing.
  INLINE P operator()(int64_t at) const {
    if (at + N <= classes) return read(x + at);
    E last[N] = {};
    std::memcpy(last, x + at, sizeof(E) * size_t(classes - at));
    P v = read(last);
    for (int i = int(classes - at); i < N; i++) v[i] = F(-1e30);
    return v;
  }
};

template <typename F, typename P, typename G>
INLINE void store(G* out, int64_t at, int64_t classes, P v) {
  constexpr int N = sizeof(P) / sizeof(F);
  if (at + N <= classes) return write(out + at, v);
  G last[N];
  write(last, v);
  std::memcpy(out + at, last, sizeof(G) * size_t(classes - at));
}

}  // namespace
