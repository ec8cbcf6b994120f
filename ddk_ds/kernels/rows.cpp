// The element-wise part of the distillation head on a CPU, one row of logits (one token) after the other.
//
// Per row: both softmaxes, the cross-entropy, the divergence, and the gradient. Plain C++ with OpenMP and the vector
// types of GCC and Clang, called through ctypes: it needs a compiler and no headers of torch. Statistics are taken in
// the compute type F (float for float and bfloat16 logits, double for double) inside a block and in double across
// blocks. Formulas and their sources: divergences.py.

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "lanes.h"
#include "products.h"

namespace {

enum Kind { NONE, FORWARD_KL, REVERSE_KL, JENSEN_SHANNON, SKEW_FORWARD_KL, SKEW_REVERSE_KL, TOTAL_VARIATION };

constexpr int BLOCK = 2048;  // elements between two additions to the double sums; a block stays in the nearest cache

// One pack's share of the divergence, and h with gradient p * (h - sum p h), for the forward KL the gradient itself.
// q and p are probabilities of teacher and student, r = log q - log p, b the weight of q in the mixture.
template <Kind KIND, typename F, typename P>
INLINE void compare(P q, P p, P r, F b, P& value, P& h) {
  // p - q from r where they are close: their own rounding would be all that is left.
  const P distance = r < 0 ? -r : r;
  const auto close = distance < (sizeof(F) == 4 ? F(0.25) : F(0));
  const P series = r * r * second_(KIND == REVERSE_KL ? r : -r);
  const P d = KIND == REVERSE_KL ? p - q : close ? q * (series - r) : p - q;
  if constexpr (KIND == FORWARD_KL) {
    value = close ? q * series : q * r + d;
    h = d;
  } else if constexpr (KIND == REVERSE_KL) {
    value = close ? p * series : -d - p * r;
    h = -r;
  } else if constexpr (KIND == TOTAL_VARIATION) {
    value = F(0.5) * (d < 0 ? -d : d);
    h = F(-0.5) * r / (r == 0 ? splat<P>(F(1)) : distance);  // minus half its sign
  } else {
    const P l = -log1p_((r >= 0 ? splat<P>(F(1) - b) : splat<P>(b)) * expm1_(-distance));
    const P log_q_m = r >= 0 ? l : l + r;  // log(q / m), m = b q + (1 - b) p
    const P log_p_m = r >= 0 ? l - r : l;
    if constexpr (KIND == JENSEN_SHANNON) {
      value = b * q * log_q_m + (F(1) - b) * p * log_p_m;
      h = (F(1) - b) * log_p_m;
    } else if constexpr (KIND == SKEW_FORWARD_KL) {
      value = q * log_q_m + (F(1) - b) * d;
      h = (b - F(1)) * expm1_(log_q_m);
    } else {
      value = p * log_p_m - b * d;
      h = log_p_m - (F(1) - b) * expm1_(log_p_m);
    }
  }
}

// The form of a model's logits x: cap * tanh(scale * x / cap), or scale * x where cap is 0.
template <typename F>
struct Form {
  using P = typename Lanes<F>::V;
  F scale, cap;

  bool plain() const { return scale == 1 && cap == 0; }

  template <typename E>
  void apply(E* x, int64_t classes) const {
    const Logits<E, F> row{x, classes};
    for (int64_t k = 0; k < classes; k += row.N) {
      const P v = scale * row(k);
      store<F>(x, k, classes, cap > 0 ? cap * tanh_(v / cap) : v);
    }
  }
  // Derivative of a logit v to the raw one.
  P slope(P v) const {
    const P bent = cap > 0 ? v / cap : splat<P>(F(0));
    return scale * (F(1) - bent * bent);
  }
};

// A row's softmax: its maximum, its sum, and exp(x * scale - maximum of the block) of every element. The second pass
// reads these back, because an exp costs more. The memory belongs to the thread and is kept for the next row.
template <typename F>
class Softmax {
  using P = typename Lanes<F>::V;

 public:
  void start(int64_t classes) {
    const size_t blocks = size_t(classes + BLOCK - 1) / BLOCK;
    if (tops.size() < blocks) {
      tops.resize(blocks);
      powers.reset(static_cast<F*>(std::aligned_alloc(64, blocks * BLOCK * sizeof(F))));
      if (!powers) throw std::bad_alloc();
    }
    max = -std::numeric_limits<double>::infinity();
    sum = 0;
  }

  template <typename Row>
  void add(const Row& row, int64_t begin, int64_t end, F scale) {
    P top = splat<P>(-std::numeric_limits<F>::infinity());
    for (int64_t k = begin; k < end; k += Row::N) top = max_(row(k), top);
    F peak = top[0];
    for (int i = 1; i < Row::N; i++) peak = std::max(peak, F(top[i]));
    const F shift = tops[size_t(begin / BLOCK)] = peak * scale;
    P part = splat<P>(F(0));
    F* const kept = powers.get();
    for (int64_t k = begin; k < end; k += Row::N) {
      const P power = exp_(row(k) * scale - shift);
      write(kept + k, power);
      part += power;
    }
    if (double(shift) > max) {
      sum *= std::exp(max - double(shift));
      max = double(shift);
    }
    sum += sum_of(part) * std::exp(double(shift) - max);
  }
  double log_sum() const { return max + std::log(sum); }
  const F* kept() const { return powers.get(); }
  // The factor that turns the powers of the block at `begin` into probabilities.
  F factor(int64_t begin) const { return F(std::exp(double(tops[size_t(begin / BLOCK)]) - max) / sum); }

 private:
  struct Free {
    void operator()(F* memory) const { std::free(memory); }
  };
  double max, sum;
  std::vector<F> tops;
  std::unique_ptr<F[], Free> powers;
};

}  // namespace

extern "C" struct RowArguments {
  void* student;          // (rows, classes) logits; overwritten where they have a scale or a cap
  void* teacher;          // the same, or null
  void* grad;             // the same, null if not wanted; can be the student's logits themselves
  const int64_t* labels;  // (rows,); a row whose label is not in 0..classes-1 gives zeros
  double* ce;             // (rows,)
  double* divergence;     // (rows,)
  int64_t rows, classes, student_stride, teacher_stride, grad_stride;  // strides in elements
  double ce_weight, kd_weight, temperature, mix;  // gradient = ce_weight * dCE + kd_weight * dD/d(logits / T)
  double student_scale, student_cap, teacher_scale, teacher_cap;
  int64_t kind, half_grad, threads;  // half_grad: the gradient is bfloat16
  // The teacher by the tokens of it that are known (TeacherTopK), or null. An id below 0 is none.
  const int64_t* known_ids;      // (rows, known)
  const double* known_log_probs; // (rows, known)
  const double* known_log_tail;  // (rows,)
  int64_t known;
};

namespace {

template <typename E, typename G, typename F, Kind KIND>
class RowKernel {
  using Row = Logits<E, F>;
  using P = typename Row::P;
  static constexpr int N = Row::N;

 public:
  explicit RowKernel(const RowArguments& arguments)
      : a(arguments), inverse_t(F(1 / arguments.temperature)), mix(F(arguments.mix)),
        student_form{F(arguments.student_scale), F(arguments.student_cap)},
        teacher_form{F(arguments.teacher_scale), F(arguments.teacher_cap)},
        with_ce(arguments.ce_weight != 0), one_softmax(KIND == NONE || arguments.temperature == 1) {}

  void operator()(int64_t row) const {
    E* own = static_cast<E*>(a.student) + row * a.student_stride;
    E* other = KIND == NONE ? nullptr : static_cast<E*>(a.teacher) + row * a.teacher_stride;
    G* out = a.grad ? static_cast<G*>(a.grad) + row * a.grad_stride : nullptr;
    const int64_t label = a.labels[row];
    a.ce[row] = a.divergence[row] = 0;
    if (label < 0 || label >= a.classes) {  // ignored, or refused by the caller
      if (out) std::memset(out, 0, sizeof(G) * size_t(a.classes));
      return;
    }
    if (!student_form.plain()) student_form.apply(own, a.classes);
    if (KIND != NONE && !teacher_form.plain()) teacher_form.apply(other, a.classes);
    const Row s{own, a.classes}, t{other, a.classes};
    thread_local Softmax<F> hard, soft, target;
    if (with_ce || one_softmax) hard.start(a.classes);
    if (!one_softmax) soft.start(a.classes);
    if (KIND != NONE) target.start(a.classes);
    for (int64_t k = 0; k < a.classes; k += BLOCK) {
      const int64_t end = std::min<int64_t>(k + BLOCK, a.classes);
      if (with_ce || one_softmax) hard.add(s, k, end, F(1));
      if (!one_softmax) soft.add(s, k, end, inverse_t);
      if constexpr (KIND != NONE) target.add(t, k, end, inverse_t);
    }
    if (with_ce) a.ce[row] = hard.log_sum() - double(s(label / N * N)[label % N]);
    if (KIND == NONE && !out) return;
    const Pass pass{hard, one_softmax ? hard : soft, target, label};
    F centre = 0;
    if constexpr (KIND != NONE && KIND != FORWARD_KL) centre = F(run<true>(s, t, pass, centre, nullptr));
    a.divergence[row] = run<false>(s, t, pass, centre, out);
  }

 private:
  struct Pass {
    const Softmax<F>&hard, &student, &teacher;
    int64_t label;
  };

  // Returns sum(p h) with CENTRING, otherwise the divergence; writes the gradient if `out` is not null.
  template <bool CENTRING>
  double run(const Row& s, const Row& t, const Pass& pass, F centre, G* out) const {
    const F offset = KIND == NONE ? F(0) : F(pass.student.log_sum() - pass.teacher.log_sum());
    const F ce_weight = F(a.ce_weight), kd_weight = F(a.kd_weight);
    const F shared_weight = KIND != NONE && one_softmax ? ce_weight : F(0);
    const bool own_softmax = with_ce && (KIND == NONE || !one_softmax), plain = student_form.plain();
    const F *es = pass.student.kept(), *et = pass.teacher.kept(), *eh = pass.hard.kept();
    double total = 0;
    for (int64_t begin = 0; begin < a.classes; begin += BLOCK) {
      const int64_t end = std::min<int64_t>(begin + BLOCK, a.classes);
      const F fs = KIND == NONE ? F(0) : pass.student.factor(begin);
      const F ft = KIND == NONE ? F(0) : pass.teacher.factor(begin);
      const F fh = own_softmax ? pass.hard.factor(begin) : F(0);
      P part = splat<P>(F(0));
      for (int64_t k = begin; k < end; k += N) {
        const P x = s(k);
        P grad = splat<P>(F(0));
        if constexpr (KIND != NONE) {
          const P y = t(k);
          const P p = read(es + k) * fs, q = read(et + k) * ft;
          P value, h;
          compare<KIND>(q, p, (y - x) * inverse_t + offset, mix, value, h);
          part += CENTRING ? p * h : value;
          grad = kd_weight * (KIND == FORWARD_KL ? h : p * (h - centre)) + shared_weight * p;
        }
        if (CENTRING || !out) continue;
        if (own_softmax) grad += ce_weight * (read(eh + k) * fh);
        if (pass.label >= k && pass.label < k + N) grad[pass.label - k] -= ce_weight;
        if (!plain) grad *= student_form.slope(x);
        store<F>(out, k, a.classes, grad);
      }
      total += sum_of(part);
    }
    return total;
  }

  const RowArguments& a;
  const F inverse_t, mix;
  const Form<F> student_form, teacher_form;
  const bool with_ce, one_softmax;  // one_softmax: that of the cross-entropy serves the divergence too
};

// Rows whose teacher is known by a few tokens; the others are one bucket, the tail (TeacherTopK). The forward KL's
// gradient is p - q of a known token, and of a token of the tail its share of what the two tails differ by.
template <typename E, typename G, typename F>
class KnownKernel {
  using Row = Logits<E, F>;
  using P = typename Row::P;
  static constexpr int N = Row::N;
  struct Bucket {
    double p, difference, value;  // difference: p - q
  };
  struct Known {
    int64_t id;
    double logit, log_q;
    Bucket bucket;
  };

 public:
  explicit KnownKernel(const RowArguments& arguments)
      : a(arguments), form{F(arguments.student_scale), F(arguments.student_cap)},
        with_ce(arguments.ce_weight != 0), one_softmax(arguments.temperature == 1) {}

  void operator()(int64_t row) const {
    E* own = static_cast<E*>(a.student) + row * a.student_stride;
    G* out = a.grad ? static_cast<G*>(a.grad) + row * a.grad_stride : nullptr;
    const int64_t label = a.labels[row];
    a.ce[row] = a.divergence[row] = 0;
    if (label < 0 || label >= a.classes) {
      if (out) std::memset(out, 0, sizeof(G) * size_t(a.classes));
      return;
    }
    if (!form.plain()) form.apply(own, a.classes);
    const double at_label = value_of(own[label]);
    thread_local std::vector<Known> known;
    const double log_norm_q = take(row, own, known);
    thread_local Softmax<F> hard, soft;  // of the other tokens
    if (with_ce || one_softmax) hard.start(a.classes);
    if (!one_softmax) soft.start(a.classes);
    const Row s{own, a.classes};
    for (int64_t k = 0; k < a.classes; k += BLOCK) {
      const int64_t end = std::min<int64_t>(k + BLOCK, a.classes);
      if (with_ce || one_softmax) hard.add(s, k, end, F(1));
      if (!one_softmax) soft.add(s, k, end, F(1 / a.temperature));
    }
    const Softmax<F>& others = one_softmax ? hard : soft;
    const double log_hard = with_ce ? log_sum(hard.log_sum(), known, 1) : 0;
    const double log_soft = log_sum(others.log_sum(), known, 1 / a.temperature);
    if (with_ce) a.ce[row] = log_hard - at_label;
    const Bucket tail = compare(a.known_log_tail[row] - log_norm_q, others.log_sum() - log_soft);
    a.divergence[row] = tail.value;
    for (Known& one : known) {
      one.bucket = compare(one.log_q - log_norm_q, one.logit / a.temperature - log_soft);
      a.divergence[row] += one.bucket.value;
    }
    if (!out) return;
    const double hard_share = with_ce ? std::exp(hard.log_sum() - log_hard) : 0;
    write_others(s, hard, others, F(a.kd_weight * tail.difference), F(a.ce_weight * hard_share), label, out);
    for (const Known& one : known) {
      double grad = a.kd_weight * one.bucket.difference;
      const double hard_p = one_softmax || !with_ce ? one.bucket.p : std::exp(one.logit - log_hard);
      grad += a.ce_weight * (hard_p - double(one.id == label));
      if (!form.plain()) grad *= double(form.slope(splat<P>(F(one.logit)))[0]);
      store<F>(out + one.id, 0, 1, splat<P>(F(grad)));
    }
  }

 private:
  static double value_of(float x) { return double(x); }
  static double value_of(double x) { return x; }
  static double value_of(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return double(value);
  }

  // Takes the known tokens of a row out of its logits, which are very low then; returns the log of their sum of q.
  double take(int64_t row, E* own, std::vector<Known>& known) const {
    known.clear();
    double top = a.known_log_tail[row];
    for (int64_t i = row * a.known; i < (row + 1) * a.known; i++) {
      const int64_t id = a.known_ids[i];
      if (id < 0 || id >= a.classes) continue;
      known.push_back({id, value_of(own[id]), a.known_log_probs[i], {}});
      top = std::max(top, a.known_log_probs[i]);
    }
    for (const Known& one : known) store<F>(own + one.id, 0, 1, splat<P>(F(-1e30)));
    double sum = std::exp(a.known_log_tail[row] - top);
    for (const Known& one : known) sum += std::exp(one.log_q - top);
    return top + std::log(sum);
  }

  static double log_sum(double others, const std::vector<Known>& known, double scale) {
    double top = others;
    for (const Known& one : known) top = std::max(top, one.logit * scale);
    double sum = std::exp(others - top);
    for (const Known& one : known) sum += std::exp(one.logit * scale - top);
    return top + std::log(sum);
  }

  // Of one bucket: p, p - q and its summand of the divergence, which is of second order near the teacher.
  static Bucket compare(double log_q, double log_p) {
    const double p = std::exp(log_p), q = std::exp(log_q), r = log_q - log_p;
    if (q == 0) return {p, p, p};
    if (std::abs(r) > 0.35) return {p, p - q, q * r + p - q};
    const double step = std::expm1(-r);
    return {p, q * step, q * (step + r)};
  }

  // The gradient of the tokens of the tail, by their shares of it: in the whole row they can underflow together.
  void write_others(const Row& s, const Softmax<F>& hard, const Softmax<F>& others, F kd, F ce, int64_t label,
                    G* out) const {
    const F *es = others.kept(), *eh = hard.kept();
    for (int64_t begin = 0; begin < a.classes; begin += BLOCK) {
      const int64_t end = std::min<int64_t>(begin + BLOCK, a.classes);
      const F fs = others.factor(begin) * (one_softmax ? kd + ce : kd);
      const F fh = with_ce && !one_softmax ? hard.factor(begin) * ce : F(0);
      for (int64_t k = begin; k < end; k += N) {
        P grad = read(es + k) * fs;
        if (with_ce && !one_softmax) grad += read(eh + k) * fh;
        if (label >= k && label < k + N) grad[label - k] -= F(a.ce_weight);
        if (!form.plain()) grad *= form.slope(s(k));
        store<F>(out, k, a.classes, grad);
      }
    }
  }

  const RowArguments& a;
  const Form<F> form;
  const bool with_ce, one_softmax;
};

template <typename Kernel>
void run(const RowArguments& a) {
  const Kernel kernel(a);
#pragma omp parallel for schedule(dynamic) num_threads(int(a.threads))
  for (int64_t row = 0; row < a.rows; row++) kernel(row);
}

template <typename E, typename G, typename F, Kind KIND>
void run(const RowArguments& a) {
  run<RowKernel<E, G, F, KIND>>(a);
}

template <typename E, typename G, typename F>
int dispatch(const RowArguments& a) {
  if (a.known_ids) {
    if (a.kind != FORWARD_KL) return 1;
    run<KnownKernel<E, G, F>>(a);
    return 0;
  }
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

// out = scale * in + (keep ? out : 0), in one pass: torch makes a float32 copy of bfloat16 first.
template <typename E, typename G>
static void scaled(G* out, const E* in, int64_t n, float scale, bool keep, int threads) {
  constexpr int64_t SPAN = 1 << 16;
#pragma omp parallel for num_threads(threads)
  for (int64_t begin = 0; begin < n; begin += SPAN) {
    const int64_t end = std::min(begin + SPAN, n);
    const Logits<E, float> x{in, end};
    const Logits<G, float> old{out, end};
    for (int64_t k = begin; k < end; k += x.N) store<float>(out, k, end, keep ? scale * x(k) + old(k) : scale * x(k));
  }
}
extern "C" void ddk_add_bfloat16(float* out, const bfloat16* in, int64_t n, int64_t keep, int64_t threads) {
  scaled(out, in, n, 1.f, keep, int(threads));
}
extern "C" void ddk_to_bfloat16(bfloat16* out, const float* in, int64_t n, double scale, int64_t threads) {
  scaled(out, in, n, float(scale), false, int(threads));
}
