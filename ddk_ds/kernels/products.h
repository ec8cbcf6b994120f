// Products of bfloat16 matrices with float32 results on a CPU: torch's own products round theirs to bfloat16.
//
// oneDNN, which is inside torch, has the inner kernel: it multiplies blocks, by AMX or AVX512-BF16, and torch exports it
// for its operators on a CPU as at::native::cpublas::brgemm. Here matrices are cut into blocks for it, and shared among
// threads. One thread computes an element, in one order of addition for any number of threads.

#include <cstdlib>
#include <new>

namespace {

// c (m, n) = a (m, k) @ b (k, n) + (add ? c : 0). b lies as pairs of rows: [k / 2][n][2].
typedef void (*Multiply)(int64_t m, int64_t n, int64_t k, int64_t a_stride, int64_t b_stride, int64_t c_stride,
                         bool add, const bfloat16* a, const bfloat16* b, float* c, bool in_pairs);
typedef void (*Release)(bool in_pairs);  // gives back the matrix unit's state, which torch's own products set as well

// Memory of one thread, kept for the next block and call.
template <typename T>
class Kept {
 public:
  T* of(int64_t count) {
    if (count > size) {
      memory.reset(static_cast<T*>(std::aligned_alloc(64, (size_t(count) * sizeof(T) + 63) / 64 * 64)));
      if (!memory) throw std::bad_alloc();
      size = count;
    }
    return memory.get();
  }

 private:
  struct Free {
    void operator()(T* block) const { std::free(block); }
  };
  std::unique_ptr<T, Free> memory;
  int64_t size = 0;
};

#ifdef __AVX512F__
constexpr int64_t PACK = 16;  // 32-bit elements in a register

// The 4 bytes at each of the places 0, step, 2 step ..., in units of SCALE bytes; 0 from the place `count` on.
template <int SCALE>
INLINE __m512i gather(const void* from, int64_t step, int64_t count) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int(step)));
  const __mmask16 mask = count < PACK ? __mmask16((1u << count) - 1) : __mmask16(0xffff);
  return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, places, from, SCALE);
}

// out[k / 2][n][2] of the transpose of b (n, k); k is even. `width` is the stride of out in pairs, a multiple of PACK.
void pack_rows(const bfloat16* b, int64_t stride, int64_t n, int64_t k, int64_t width, uint32_t* out) {
  for (int64_t y = 0; y < n; y += PACK) {
    for (int64_t x = 0; x < k / 2; x++) {
      _mm512_store_si512(out + x * width + y, gather<2>(b + y * stride + 2 * x, stride, n - y));
    }
  }
}

// out[k / 2][n][2] of b (k, n), with zeros for rows from k to `even`.
void pack_pairs(const bfloat16* b, int64_t stride, int64_t n, int64_t k, int64_t even, int64_t width, uint32_t* out) {
  for (int64_t x = 0; x < even; x += 2, out += width) {
    const bfloat16 *one = b + x * stride, *two = one + stride;
    if (x + 1 < k) {
      for (int64_t y = 0; y < n; y++) out[y] = uint32_t(one[y].bits) | uint32_t(two[y].bits) << 16;
    } else {
      for (int64_t y = 0; y < n; y++) out[y] = x < k ? one[y].bits : 0;
    }
  }
}

// Calls block(start, stop) for each part of 0..count-1, on all threads; returns 1 if torch refuses to multiply.
template <typename Block>
int in_blocks(int64_t count, int64_t size, int64_t threads, Release release, const Block& block) {
  int failed = 0;
#pragma omp parallel num_threads(int(threads)) reduction(| : failed)
  {
#pragma omp for schedule(static)
    for (int64_t start = 0; start < count; start += size) {
      try {
        block(start, std::min(start + size, count));
      } catch (...) {  // must not leave a thread
        failed = 1;
      }
    }
    release(true);
  }
  return failed;
}
#endif

struct ProductArguments {
  Multiply multiply;
  Release release;
  const bfloat16 *a, *b;
  float* out;
  int64_t a_stride, b_stride, out_stride;  // in elements
  int64_t m, n, k, b_rows, keep, threads;
};

}  // namespace

#ifdef __AVX512F__
// out (m, n) = a (m, k) @ b.T, with b (n, k), for an even k: logits.
extern "C" int ddk_product(const ProductArguments* p) {
  constexpr int64_t WIDTH = 256, HEIGHT = 32;
  return in_blocks(p->n, WIDTH, p->threads, p->release, [=](int64_t start, int64_t stop) {
    thread_local Kept<uint32_t> kept;
    uint32_t* const pairs = kept.of(p->k / 2 * WIDTH);
    pack_rows(p->b + start * p->b_stride, p->b_stride, stop - start, p->k, WIDTH, pairs);
    for (int64_t row = 0; row < p->m; row += HEIGHT) {
      p->multiply(std::min(HEIGHT, p->m - row), stop - start, p->k, p->a_stride, WIDTH, p->out_stride, false,
                  p->a + row * p->a_stride, reinterpret_cast<bfloat16*>(pairs),
                  p->out + row * p->out_stride + start, true);
    }
  });
}

// out (n, m) = (a (m, k) @ b).T + (keep ? out : 0), with b (b_rows, n) and zeros below it up to k: a weight's gradient.
extern "C" int ddk_product_transposed(const ProductArguments* p) {
  constexpr int64_t WIDTH = 128, HEIGHT = 256;
  return in_blocks(p->n, WIDTH, p->threads, p->release, [=](int64_t start, int64_t stop) {
    thread_local Kept<uint32_t> kept;
    thread_local Kept<float> product;
    uint32_t* const pairs = kept.of(p->k / 2 * WIDTH);
    float* const block = product.of(HEIGHT * WIDTH);
    pack_pairs(p->b + start, p->b_stride, stop - start, p->b_rows, p->k, WIDTH, pairs);
    for (int64_t row = 0; row < p->m; row += HEIGHT) {
      const int64_t height = std::min(HEIGHT, p->m - row);
      p->multiply(height, stop - start, p->k, p->a_stride, WIDTH, WIDTH, false, p->a + row * p->a_stride,
                  reinterpret_cast<bfloat16*>(pairs), block, true);
      for (int64_t y = 0; y < stop - start; y++) {
        float* const sums = p->out + (start + y) * p->out_stride + row;
        const Logits<float, float> old{sums, height};
        for (int64_t x = 0; x < height; x += PACK) {
          const V part = (V)gather<4>(block + x * WIDTH + y, WIDTH, height - x);
          store<float>(sums, x, height, p->keep ? part + old(x) : part);
        }
      }
    }
  });
}
#endif
