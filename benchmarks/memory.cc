// Reading an array and copying it past the caches: what memory itself allows, for kernels to be held against.
//
// Compiled by benchmarks/memory.py. Arrays are aligned to 64 bytes and hold a multiple of 16 floats.

#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

constexpr std::size_t kLine = 16;  // floats in 64 bytes

#if defined(__SSE2__)

float Read(const float* x, std::size_t n) {
  __m128 a = _mm_setzero_ps(), b = a, c = a, d = a;
  for (std::size_t i = 0; i < n; i += kLine) {
    a = _mm_add_ps(a, _mm_load_ps(x + i));
    b = _mm_add_ps(b, _mm_load_ps(x + i + 4));
    c = _mm_add_ps(c, _mm_load_ps(x + i + 8));
    d = _mm_add_ps(d, _mm_load_ps(x + i + 12));
  }
  float sums[4];
  _mm_storeu_ps(sums, _mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d)));
  return sums[0] + sums[1] + sums[2] + sums[3];
}

// Streams every cache line whole and in order.
void Copy(const float* x, float* out, std::size_t n) {
  for (std::size_t i = 0; i < n; i += kLine) {
    const __m128 a = _mm_load_ps(x + i), b = _mm_load_ps(x + i + 4);
    const __m128 c = _mm_load_ps(x + i + 8), d = _mm_load_ps(x + i + 12);
    _mm_stream_ps(out + i, a);
    _mm_stream_ps(out + i + 4, b);
    _mm_stream_ps(out + i + 8, c);
    _mm_stream_ps(out + i + 12, d);
  }
  _mm_sfence();
}

#else  // Plain loops: other targets have no portable way to ask for non-temporal stores.

float Read(const float* x, std::size_t n) {
  float sums[kLine] = {};
  for (std::size_t i = 0; i < n; i += kLine) {
    for (std::size_t lane = 0; lane < kLine; ++lane) sums[lane] += x[i + lane];
  }
  float sum = 0;
  for (const float each : sums) sum += each;
  return sum;
}

void Copy(const float* x, float* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = x[i];
}

#endif

}  // namespace

// Calls body(first, end) for a stretch of whole lines on each thread; the caller's is the last.
template <typename Body>
static void OnThreads(std::size_t n, int threads, const Body& body) {
  const std::size_t stretch = n / kLine / threads * kLine;
  std::vector<std::thread> helpers;
  for (int i = 0; i + 1 < threads; ++i) helpers.emplace_back(body, i * stretch, (i + 1) * stretch);
  body((threads - 1) * stretch, n);
  for (std::thread& helper : helpers) helper.join();
}

// The sum keeps the reads from being left out.
extern "C" float read_all(const float* x, std::size_t n, int threads) {
  std::atomic<float> sum{0};
  OnThreads(n, threads,
            [&](std::size_t first, std::size_t end) { sum = sum + Read(x + first, end - first); });
  return sum;
}

extern "C" void copy_all(const float* x, float* out, std::size_t n, int threads) {
  OnThreads(n, threads,
            [&](std::size_t first, std::size_t end) { Copy(x + first, out + first, end - first); });
}
