// The element-wise part of the distillation head on a CPU, one row of logits (one token) after the other.
//
// Per row: both softmaxes, the cross-entropy, the divergence, and the gradient written over the student's logits.
// Plain C++ with OpenMP, called through ctypes: it needs a compiler and no headers of torch. Statistics are taken in
// the compute type F (float for float and bfloat16 logits, double for double) inside a block and in double across
// blocks. Formulas and their sources: divergences.py.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

struct bfloat16 { uint16_t bits; };

constexpr int BLOCK = 1024;  // elements of a row that are worked on at a time: they stay in the first-level cache

enum Kind { NONE, FORWARD_KL, REVERSE_KL, JENSEN_SHANNON, SKEW_FORWARD_KL, SKEW_REVERSE_KL, TOTAL_VARIATION };

template <typename To, typename From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To out;
  std::memcpy(&out, &value, sizeof(To));
  return out;
}

inline float as_compute(float x) { return x; }
inline double as_compute(double x) { return x; }
inline float as_compute(bfloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

inline void put(float& out, float x) { out = x; }
inline void put(double& out, double x) { out = x; }
inline void put(bfloat16& out, float x) {  // to nearest, ties to even; NaN stays NaN
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = uint16_t(x == x ? rounded : 0x7fc0u);
}

// exp, log1p and expm1 without branches or calls, so that the compiler makes vector code of the loops around them.
// Errors are within 2 units in the last place where the results are used.

inline float exp_(float x) {
  x = x < -87.f ? -87.f : x > 88.f ? 88.f : x;       // NaN passes
  const float shifted = x * 1.44269504f + 12582912.f;  // the integer part ends up in the low bits
  const float n = shifted - 12582912.f;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.f;
  return y * bits_as<float>((bits_as<uint32_t>(shifted) + 127u) << 23);
}
inline double exp_(double x) { return std::exp(x); }

inline float expm1_(float x) {
  float series = 1.f / 5040.f;
  series = series * x + 1.f / 720.f;
  series = series * x + 1.f / 120.f;
  series = series * x + 1.f / 24.f;
  series = series * x + 1.f / 6.f;
  series = series * x + 0.5f;
  series = series * x * x + x;
  const float plain = exp_(x) - 1.f;
  return x > -0.35f && x < 0.35f ? series : plain;
}
inline double expm1_(double x) { return std::expm1(x); }

inline float log1p_(float y) {  // for y in (-1, 0]
  const float u = 1.f + y;
  const int32_t bits = bits_as<int32_t>(u);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // u = m * 2^exponent, m in [sqrt(1/2), sqrt(2))
  const float m = bits_as<float>(bits - (exponent << 23));
  const bool small = exponent == 0;
  const float w = small ? y / (2.f + y) : (m - 1.f) / (m + 1.f);
  const float w2 = w * w;
  float series = 2.f / 9.f;
  series = series * w2 + 2.f / 7.f;
  series = series * w2 + 2.f / 5.f;
  series = series * w2 + 2.f / 3.f;
  series = series * w2 * w + 2.f * w;
  return series + float(exponent) * 0.693147180f;
}
inline double log1p_(double y) { return std::log1p(y); }

template <typename F>
inline F tanh_(F x) {
  const F a = x < 0 ? -x : x;
  const F e = expm1_(F(-2) * a);
  const F t = -e / (e + F(2));
  return x < 0 ? -t : t;
}

// exp(x) - 1 - x relative to x^2, for |x| < 0.35.
inline float second_(float x) {
  float series = 1.f / 40320.f;
  series = series * x + 1.f / 5040.f;
  series = series * x + 1.f / 720.f;
  series = series * x + 1.f / 120.f;
  series = series * x + 1.f / 24.f;
  series = series * x + 1.f / 6.f;
  return series * x + 0.5f;
}
inline double second_(double) { return 0.5; }  // not used

// One element's share of the divergence, and h with gradient p * (h - sum p h), for the forward KL the gradient itself.
// q and p are probabilities of teacher and student, r = log q - log p, b the weight of q in the mixture.
template <Kind KIND, typename F>
inline void element(F q, F p, F r, F b, F& value, F& h) {
  // p - q from r where they are close: their own rounding would be all that is left.
  const bool close = sizeof(F) == 4 && r > F(-0.35) && r < F(0.35);
  const F series = r * r * second_(KIND == REVERSE_KL ? r : -r);
  const F d = close && KIND != REVERSE_KL ? q * (series - r) : p - q;
  if constexpr (KIND == FORWARD_KL) {
    value = close ? q * series : q * r + d;
    h = d;
  } else if constexpr (KIND == REVERSE_KL) {
    value = close ? p * series : -d - p * r;
    h = -r;
  } else if constexpr (KIND == TOTAL_VARIATION) {
    value = F(0.5) * (d < 0 ? -d : d);
    h = r > 0 ? F(-0.5) : r < 0 ? F(0.5) : r;  // r: 0 or NaN
  } else {
    const F distance = r < 0 ? -r : r;
    const F l = -log1p_((r >= 0 ? F(1) - b : b) * expm1_(-distance));
    const F log_q_m = r >= 0 ? l : l + r;  // log(q / m), m = b q + (1 - b) p
    const F log_p_m = r >= 0 ? l - r : l;
    if constexpr (KIND == JENSEN_SHANNON) {
      value = b * q * log_q_m + (F(1) - b) * p * log_p_m;
      h = (F(1) - b) * log_p_m;
    } else if constexpr (KIND == SKEW_FORWARD_KL) {
      value = q * log_q_m + (F(1) - b) * d;
      h = -(F(1) - b) * expm1_(log_q_m);
    } else {
      value = p * log_p_m - b * d;
      h = log_p_m - (F(1) - b) * expm1_(log_p_m);
    }
  }
}

template <typename F>
struct Softmax {  // running maximum and sum of exp(x - maximum)
  double max = -std::numeric_limits<double>::infinity();
  double sum = 0;

  void add(const F* x, int n, F scale) {
    F top = -std::numeric_limits<F>::infinity();
#pragma omp simd reduction(max : top)
    for (int i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
    const double peak = double(top * scale);
    if (peak > max) {
      sum *= std::exp(max - peak);
      max = peak;
    }
    const F shift = F(max);
    F part = 0;
#pragma omp simd reduction(+ : part)
    for (int i = 0; i < n; i++) part += exp_(x[i] * scale - shift);
    sum += double(part);
  }
  double log_sum() const { return max + std::log(sum); }
};

}  // namespace

extern "C" struct RowArguments {
  const void* student;    // (rows, classes) logits
  const void* teacher;    // the same, or null
  void* grad;             // the same, or null: not wanted; may be the student's logits themselves
  const int64_t* labels;  // (rows,); a row whose label is not in 0..classes-1 gives zeros
  double* ce;            // (rows,)
  double* divergence;    // (rows,)
  int64_t rows, classes, student_stride, teacher_stride, grad_stride;  // strides in elements
  double ce_weight, kd_weight, temperature, mix;  // gradient = ce_weight * dCE + kd_weight * dD/d(logits / T)
  double student_scale, student_cap, teacher_scale, teacher_cap;  // logits = cap tanh(scale x / cap); cap 0: scale x
  int64_t kind, half_grad, threads;  // half_grad: the gradient is bfloat16
};

namespace {

template <typename E, typename F>
void load(const E* in, F* out, int n, F scale, F cap) {
#pragma omp simd
  for (int i = 0; i < n; i++) out[i] = as_compute(in[i]) * scale;
  if (cap > 0) {
    const F inverse = F(1) / cap;
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] = cap * tanh_(out[i] * inverse);
  }
}

template <typename E, typename G, typename F, Kind KIND>
class RowKernel {
 public:
  explicit RowKernel(const RowArguments& arguments)
      : a(arguments), inverse_t(F(1 / arguments.temperature)), mix(F(arguments.mix)),
        with_ce(arguments.ce_weight != 0), one_softmax(KIND == NONE || arguments.temperature == 1) {}

  void operator()(int64_t row) const {
    const E* s = static_cast<const E*>(a.student) + row * a.student_stride;
    G* out = a.grad ? static_cast<G*>(a.grad) + row * a.grad_stride : nullptr;
    const E* t = KIND == NONE ? nullptr : static_cast<const E*>(a.teacher) + row * a.teacher_stride;
    const int64_t label = a.labels[row];
    a.ce[row] = a.divergence[row] = 0;
    if (label < 0 || label >= a.classes) {  // ignored, or refused by the caller
      if (out) std::memset(out, 0, sizeof(G) * size_t(a.classes));
      return;
    }
    Softmax<F> hard, soft, teacher;
    F at_label = 0;
    alignas(64) F xs[BLOCK], xt[BLOCK];
    for (int64_t k = 0; k < a.classes; k += BLOCK) {
      const int n = block(k);
      load(s + k, xs, n, F(a.student_scale), F(a.student_cap));
      if (label >= k && label < k + n) at_label = xs[label - k];
      if (with_ce || one_softmax) hard.add(xs, n, F(1));
      if (!one_softmax) soft.add(xs, n, inverse_t);
      if constexpr (KIND != NONE) {
        load(t + k, xt, n, F(a.teacher_scale), F(a.teacher_cap));
        teacher.add(xt, n, inverse_t);
      }
    }
    if (with_ce) a.ce[row] = hard.log_sum() - double(at_label);
    if (KIND == NONE && !out) return;
    const Softmax<F>& student = one_softmax ? hard : soft;
    F centre = 0;
    if constexpr (KIND != NONE && KIND != FORWARD_KL)
      centre = F(pass(s, t, nullptr, label, hard, student, teacher, centre, true));
    a.divergence[row] = pass(s, t, out, label, hard, student, teacher, centre, false);
  }

 private:
  int block(int64_t start) const { return int(a.classes - start < BLOCK ? a.classes - start : BLOCK); }

  // With `centring` sum(p h), else the divergence; and the gradient where `out` is not null.
  double pass(const E* s, const E* t, G* out, int64_t label, const Softmax<F>& hard, const Softmax<F>& student,
              const Softmax<F>& teacher, F centre, bool centring) const {
    alignas(64) F xs[BLOCK], xt[BLOCK], grad[BLOCK], values[BLOCK];
    const F ms = F(student.max), mt = F(teacher.max), is = F(1 / student.sum), it = F(1 / teacher.sum);
    const F mh = F(hard.max), ih = F(1 / hard.sum);
    const F offset = KIND == NONE ? F(0) : F(student.log_sum() - teacher.log_sum());
    const F ce_weight = F(a.ce_weight), kd_weight = F(a.kd_weight);
    const F shared_weight = KIND != NONE && one_softmax ? ce_weight : F(0);
    double total = 0;
    for (int64_t k = 0; k < a.classes; k += BLOCK) {
      const int n = block(k);
      load(s + k, xs, n, F(a.student_scale), F(a.student_cap));
      if constexpr (KIND != NONE) {
        load(t + k, xt, n, F(a.teacher_scale), F(a.teacher_cap));
#pragma omp simd
        for (int i = 0; i < n; i++) {
          const F p = exp_(xs[i] * inverse_t - ms) * is, q = exp_(xt[i] * inverse_t - mt) * it;
          F value, h;
          element<KIND>(q, p, (xt[i] - xs[i]) * inverse_t + offset, mix, value, h);
          values[i] = centring ? p * h : value;
          grad[i] = kd_weight * (KIND == FORWARD_KL ? h : p * (h - centre)) + shared_weight * p;
        }
        total += block_sum(values, n);
      } else {
        std::memset(grad, 0, sizeof(grad));
      }
      if (!out) continue;
      if (with_ce && (KIND == NONE || !one_softmax)) {
#pragma omp simd
        for (int i = 0; i < n; i++) grad[i] += ce_weight * (exp_(xs[i] - mh) * ih);
      }
      if (label >= k && label < k + n) grad[label - k] -= ce_weight;
      store(out + k, xs, grad, n);
    }
    return total;
  }

  static double block_sum(const F* values, int n) {
    F sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += values[i];
    return double(sum);
  }

  void store(G* out, const F* logits, F* grad, int n) const {
    const F scale = F(a.student_scale), cap = F(a.student_cap);
    const F inverse = cap > 0 ? F(1) / cap : F(0);
#pragma omp simd
    for (int i = 0; i < n; i++) {
      const F bend = logits[i] * inverse;
      put(out[i], grad[i] * (scale * (F(1) - bend * bend)));
    }
  }

  const RowArguments& a;
  const F inverse_t, mix;
  const bool with_ce, one_softmax;  // one_softmax: that of the cross-entropy serves the divergence too
};

template <typename E, typename G, typename F, Kind KIND>
void run(const RowArguments& a) {
  const RowKernel<E, G, F, KIND> kernel(a);
#pragma omp parallel for schedule(dynamic) num_threads(int(a.threads))
  for (int64_t row = 0; row < a.rows; row++) kernel(row);
}

template <typename E, typename G, typename F>
int dispatch(const RowArguments& a) {
  switch (a.kind) {
    case NONE: run<E, G, F, NONE>(a); return 0;
    case FORWARD_KL: run<E, G, F, FORWARD_KL>(a); return 0;
    case REVERSE_KL: run<E, G, F, REVERSE_KL>(a); return 0;
    case JENSEN_SHANNON: run<E, G, F, JENSEN_SHANNON>(a); return 0;
    case SKEW_FORWARD_KL: run<E, G, F, SKEW_FORWARD_KL>(a); return 0;
    case SKEW_REVERSE_KL: run<E, G, F, SKEW_REVERSE_KL>(a); return 0;
    case TOTAL_VARIATION: run<E, G, F, TOTAL_VARIATION>(a); return 0;
    default: return 1;
  }
}

}  // namespace

extern "C" int ddk_rows_float32(const RowArguments* a) {
  return a->half_grad ? dispatch<float, bfloat16, float>(*a) : dispatch<float, float, float>(*a);
}
extern "C" int ddk_rows_float64(const RowArguments* a) { return dispatch<double, double, double>(*a); }
extern "C" int ddk_rows_bfloat16(const RowArguments* a) { return dispatch<bfloat16, bfloat16, float>(*a); }
