// Reading, copying and scaling an array, and multiplying and adding: what memory and the arithmetic units
// themselves allow, for kernels to be held against.
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
constexpr float kScale = 3;

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

// Whole cache lines, in order: scale·x with plain stores, x with plain and with non-temporal ones.
template <typename Of, typename Store>
void Write(const float* x, float* out, std::size_t n, const Of& of, const Store& store) {
  for (std::size_t i = 0; i < n; i += kLine) {
    const __m128 a = of(_mm_load_ps(x + i)), b = of(_mm_load_ps(x + i + 4));
    const __m128 c = of(_mm_load_ps(x + i + 8)), d = of(_mm_load_ps(x + i + 12));
    store(out + i, a);
    store(out + i + 4, b);
    store(out + i + 8, c);
    store(out + i + 12, d);
  }
}

constexpr auto kItself = [](__m128 v) { return v; };

void Copy(const float* x, float* out, std::size_t n) { Write(x, out, n, kItself, _mm_store_ps); }

void StreamCopy(const float* x, float* out, std::size_t n) {
  Write(x, out, n, kItself, _mm_stream_ps);
  _mm_sfence();
}

void Scale(const float* x, float* out, std::size_t n) {
  const __m128 scale = _mm_set1_ps(kScale);
  const auto scaled = [scale](__m128 v) { return _mm_mul_ps(v, scale); };
  Write(x, out, n, scaled, _mm_store_ps);
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

void StreamCopy(const float* x, float* out, std::size_t n) { Copy(x, out, n); }

void Scale(const float* x, float* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = kScale * x[i];
}

#endif

// At least `count` multiply-adds of floats in chains that do not wait for each other: as many chains as hide
// the latency of two units, and with their operands fit the registers. They stay within ±4.
template <typename Vector>
[[gnu::always_inline]] inline float MultiplyAdd(std::size_t count) {
  constexpr int kChains = 12;
  constexpr std::size_t kPerTurn = kChains * sizeof(Vector) / sizeof(float);
  Vector factor, term, chains[kChains];
  for (std::size_t lane = 0; lane < sizeof(Vector) / sizeof(float); ++lane) {
    factor[lane] = -0.5F;
    term[lane] = 1;
  }
  for (Vector& chain : chains) chain = term;
  for (std::size_t i = 0; i < count; i += kPerTurn) {
#pragma GCC unroll 12
    for (Vector& chain : chains) chain = chain * factor + term;
  }
  float sum = 0;
  for (const Vector& chain : chains) sum += chain[0];
  return sum;
}

using MultiplyAddLoop = float (*)(std::size_t count);

template <int kBytes>
struct FloatVector {
  typedef float Type __attribute__((vector_size(kBytes)));
};

#if defined(__x86_64__)

[[gnu::target("avx512f,fma")]] float MultiplyAddAvx512(std::size_t count) {
  return MultiplyAdd<FloatVector<64>::Type>(count);
}

[[gnu::target("avx2,fma")]] float MultiplyAddAvx2(std::size_t count) {
  return MultiplyAdd<FloatVector<32>::Type>(count);
}

MultiplyAddLoop FastestMultiplyAdd() {
  if (__builtin_cpu_supports("avx512f")) return MultiplyAddAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return MultiplyAddAvx2;
  return MultiplyAdd<FloatVector<16>::Type>;
}

#else

MultiplyAddLoop FastestMultiplyAdd() { return MultiplyAdd<FloatVector<16>::Type>; }

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

using Loop = void (*)(const float* x, float* out, std::size_t n);

static void Run(Loop loop, const float* x, float* out, std::size_t n, std::size_t copies, int threads) {
  OnThreads(n, threads, [&](std::size_t first, std::size_t end) {
    for (std::size_t i = 0; i < copies; ++i) loop(x + first, out + i * n + first, end - first);
  });
}

// As often as there are outputs, one after the other. The sum keeps the reads from being left out.
extern "C" float read_all(const float* x, std::size_t n, std::size_t copies, int threads) {
  std::atomic<float> sum{0};
  OnThreads(n, threads, [&](std::size_t first, std::size_t end) {
    for (std::size_t i = 0; i < copies; ++i) sum = sum + Read(x + first, end - first);
  });
  return sum;
}

extern "C" void copy_all(const float* x, float* out, std::size_t n, std::size_t copies, int threads) {
  Run(Copy, x, out, n, copies, threads);
}

extern "C" void stream_copy_all(const float* x, float* out, std::size_t n, std::size_t copies, int threads) {
  Run(StreamCopy, x, out, n, copies, threads);
}

extern "C" void scale_all(const float* x, float* out, std::size_t n, std::size_t copies, int threads) {
  Run(Scale, x, out, n, copies, threads);
}

// Divided among the threads. The sum keeps the work from being left out.
extern "C" float multiply_add(std::size_t count, int threads) {
  const MultiplyAddLoop loop = FastestMultiplyAdd();
  std::atomic<float> sum{0};
  OnThreads(count, threads, [&](std::size_t first, std::size_t end) { sum = sum + loop(end - first); });
  return sum;
}

// Additions that wait for each other, a cycle each on every CPU: their time tells the clock.
extern "C" void count_cycles(std::size_t cycles) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < cycles; i += 16) {
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) {
      count += 1;
      __asm__ volatile("" : "+r"(count));
    }
  }
}
