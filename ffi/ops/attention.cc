#include "ffi/ops/attention.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "ffi/base/layout.h"
#include "ffi/runtime/float_mode.h"

namespace jax_softmax2p {
namespace {

// The queries and the output of a block, in bytes: with a tile of keys and values they fit into a
// second-level cache. Every block packs the keys again, so that larger ones are better.
constexpr std::int64_t kBlockBytes = std::int64_t{192} << 10;
// Multiply-adds that are worth a task of their own, some 10 µs.
constexpr std::int64_t kGrain = std::int64_t{1} << 19;
// Keys in a chunk, where there are few queries.
constexpr std::int64_t kChunk = 512;
// Tasks a thread, so that all threads end at about the same time.
constexpr std::int64_t kTasks = 4;

// Tasks of a gradient, where there are so few examples and heads that keys are split.
constexpr std::int64_t kGradientTasks = 16;

// At least the caller's: XLA may have no pool, and then counts -1 helpers.
std::int64_t ThreadsOf(const Executor& executor) { return std::max<std::int64_t>(1, executor.Helpers() + 1); }

// The arguments of one example and head of keys.
template <typename E>
AttentionArgs<E> ArgsOf(const Attention<E>& attention, std::int64_t unit) {
  const std::int64_t b = unit / attention.key_heads, k = unit % attention.key_heads;
  const auto at = [&](const UnitStrides& strides) { return b * strides.batch + k * strides.head; };
  AttentionArgs<E> args = attention.first;
  args.query += at(attention.query);
  args.key += at(attention.key);
  args.value += at(attention.value);
  args.output += at(attention.output);
  args.lse += at(attention.lse);
  if (args.bias.data != nullptr) args.bias.data += at(attention.bias);
  if (args.mask.data != nullptr) args.mask.data += at(attention.mask);
  if (args.sinks != nullptr) args.sinks += at(attention.sinks);
  const auto length = [&](const std::int32_t* lengths, std::int64_t size) {
    return lengths == nullptr ? size : std::clamp<std::int64_t>(lengths[b], 0, size);
  };
  args.query_length = length(attention.query_lengths, args.queries);
  args.key_length = length(attention.key_lengths, args.keys);
  return args;
}

// Tasks that one call of a thread does, with one allocation of scratch memory: enough of them to be worth it,
// and so few that all threads end at about the same time.
std::int64_t GrainOf(const Executor& executor, std::int64_t tasks, std::int64_t work) {
  constexpr std::int64_t kCalls = 16;  // a thread
  const std::int64_t threads = ThreadsOf(executor);
  return std::max<std::int64_t>(
      {1, CeilDiv(kGrain, std::max<std::int64_t>(1, work)), tasks / (threads * kCalls)});
}

// Rows in a block: as many as caches hold, or fewer where there are threads without work.
template <typename E>
std::int64_t RowsOfBlock(const KernelTable<E>& kernels, const Executor& executor,
                         const Attention<E>& attention) {
  const AttentionArgs<E>& args = attention.first;
  const std::int64_t rows = args.Rows(), panel = kernels.attention_columns;
  const auto bytes = static_cast<std::int64_t>(sizeof(ComputeOf<E>)) * (args.size + args.value_size);
  const std::int64_t most = std::max<std::int64_t>(1, kBlockBytes / (bytes * panel));
  const std::int64_t threads = ThreadsOf(executor), units = attention.batch * attention.key_heads;
  const std::int64_t blocks = threads == 1 ? 1 : std::max<std::int64_t>(1, kTasks * threads / units);
  const std::int64_t panels = std::clamp<std::int64_t>(CeilDiv(CeilDiv(rows, blocks), panel), 1, most);
  // Blocks of about one size.
  return CeilDiv(CeilDiv(rows, CeilDiv(rows, panels * panel)), panel) * panel;
}

// Few rows: tasks of chunks of keys and of adjacent heads, and then the chunks of every unit combined.
template <typename E>
void AttendFew(const KernelTable<E>& kernels, Executor& executor, const Attention<E>& attention) {
  using T = ComputeOf<E>;
  const AttentionArgs<E>& args = attention.first;
  const std::int64_t rows = args.Rows(), units = attention.batch * attention.key_heads;
  const std::int64_t chunks = CeilDiv(args.keys, kChunk), size = rows * kernels.attention_few_size(args);
  const std::unique_ptr<T[]> partials(new T[units * chunks * size]);
  // As many heads in a task as leave all threads enough tasks, and a task enough work.
  const std::int64_t work = rows * std::min(args.keys, kChunk) * (args.size + args.value_size);
  const std::int64_t fewest = std::min(attention.key_heads, CeilDiv(kGrain / 4, work));
  const std::int64_t wanted = CeilDiv(units * chunks, kTasks * (ThreadsOf(executor)));
  const std::int64_t heads = std::clamp(wanted, fewest, attention.key_heads);
  const std::int64_t groups = CeilDiv(attention.key_heads, heads), tasks = attention.batch * chunks * groups;
  const std::int64_t grain = CeilDiv(kGrain / 4, work * heads);
  const auto compute = [&](std::int64_t task) {
    const std::int64_t chunk = task / groups % chunks, head = task % groups * heads;
    const std::int64_t unit = task / (groups * chunks) * attention.key_heads + head;
    std::vector<AttentionArgs<E>> args_of_heads;
    for (std::int64_t k = head; k < std::min(head + heads, attention.key_heads); ++k) {
      args_of_heads.push_back(ArgsOf(attention, unit + k - head));
    }
    const auto count = static_cast<std::int64_t>(args_of_heads.size());
    const std::unique_ptr<T[]> scratch(new T[count * kernels.attention_few_scratch(args)]);
    kernels.attention_few(args_of_heads.data(), count, chunk * kChunk,
                          std::min(args.keys, (chunk + 1) * kChunk),
                          partials.get() + (unit * chunks + chunk) * size, chunks * size, scratch.get());
  };
  ParallelFor(executor, CeilDiv(tasks, grain), [&](std::int64_t i) {
    const ScopedFloatMode mode;
    for (std::int64_t task = i * grain; task < std::min(tasks, (i + 1) * grain); ++task) compute(task);
  });
  const ScopedFloatMode mode;
  for (std::int64_t unit = 0; unit < units; ++unit) {
    kernels.attention_few_combine(ArgsOf(attention, unit), partials.get() + unit * chunks * size, chunks);
  }
}

}  // namespace

template <typename E>
void Attend(const KernelTable<E>& kernels, Executor& executor, const Attention<E>& attention) {
  using T = ComputeOf<E>;
  const AttentionArgs<E>& args = attention.first;
  const std::int64_t rows = args.Rows(), units = attention.batch * attention.key_heads;
  if (rows * units == 0) return;
  if (rows <= kernels.attention_few_rows) return AttendFew(kernels, executor, attention);
  const std::int64_t block = RowsOfBlock(kernels, executor, attention);
  const std::int64_t blocks = CeilDiv(rows, block), tasks = units * blocks;
  const std::int64_t work = std::min(rows, block) * args.keys * (args.size + args.value_size);
  const std::int64_t grain = GrainOf(executor, tasks, work);
  ParallelFor(executor, CeilDiv(tasks, grain), [&](std::int64_t i) {
    const ScopedFloatMode mode;
    const std::int64_t size = kernels.attention_scratch(args, std::min(rows, block));
    const std::unique_ptr<T[]> scratch(new T[size]);
    for (std::int64_t task = i * grain; task < std::min(tasks, (i + 1) * grain); ++task) {
      const std::int64_t begin = task % blocks * block;
      kernels.attention(ArgsOf(attention, task / blocks), begin, std::min(rows, begin + block),
                        scratch.get());
    }
  });
}

namespace {

template <typename E>
AttentionGradientArgs<E> GradientArgsOf(const AttentionGradient<E>& gradient, std::int64_t unit) {
  const Attention<E>& attention = gradient.attention;
  AttentionGradientArgs<E> args{ArgsOf(attention, unit), gradient.cotangent, gradient.query_gradient,
                                gradient.key_gradient, gradient.value_gradient};
  args.cotangent += args.output - attention.first.output;
  args.query_gradient += args.query - attention.first.query;
  args.key_gradient += args.key - attention.first.key;
  args.value_gradient += args.value - attention.first.value;
  return args;
}

// Adds up what the chunks of keys have left of one query's gradient.
template <typename E>
void AddChunks(const AttentionGradientArgs<E>& args, const ComputeOf<E>* partials, std::int64_t chunks,
               std::int64_t t) {
  using T = ComputeOf<E>;
  const std::int64_t width = args.heads * args.size, chunk = args.queries * width;
  for (std::int64_t i = 0; i < width; ++i) {
    T sum = 0;
    for (std::int64_t c = 0; c < chunks; ++c) sum += partials[c * chunk + t * width + i];
    Narrow(sum, args.query_gradient[t * args.query_stride + i]);
  }
}

}  // namespace

template <typename E>
void AttendGradient(const KernelTable<E>& kernels, Executor& executor, const AttentionGradient<E>& gradient) {
  using T = ComputeOf<E>;
  const AttentionArgs<E>& args = gradient.attention.first;
  const std::int64_t units = gradient.attention.batch * gradient.attention.key_heads;
  const std::int64_t rows = args.Rows();
  if (rows * units == 0) return;
  // By the shape alone, so that the bits do not depend on the number of threads.
  const std::int64_t wanted = std::min(CeilDiv(kGradientTasks, units), CeilDiv(args.keys, kChunk));
  const std::int64_t chunk = RoundUp(CeilDiv(args.keys, wanted), 64), chunks = CeilDiv(args.keys, chunk);
  const std::unique_ptr<T[]> partials(chunks > 1 ? new T[units * chunks * rows * args.size] : nullptr);
  const std::int64_t work = rows * chunk * (args.size + args.value_size) * 5 / 2;
  const std::int64_t grain = CeilDiv(kGrain, std::max<std::int64_t>(1, work)), tasks = units * chunks;
  ParallelFor(executor, CeilDiv(tasks, grain), [&](std::int64_t i) {
    const ScopedFloatMode mode;
    const std::int64_t size = kernels.attention_gradient_scratch(GradientArgsOf(gradient, 0), chunk);
    const std::unique_ptr<T[]> scratch(new T[size]);
    for (std::int64_t task = i * grain; task < std::min(tasks, (i + 1) * grain); ++task) {
      const std::int64_t begin = task % chunks * chunk;
      T* const partial = chunks > 1 ? partials.get() + task * rows * args.size : nullptr;
      kernels.attention_gradient(GradientArgsOf(gradient, task / chunks), begin,
                                 std::min(args.keys, begin + chunk), partial, scratch.get());
    }
  });
  if (chunks == 1) return;
  ParallelFor(executor, units, [&](std::int64_t unit) {
    const ScopedFloatMode mode;
    const AttentionGradientArgs<E> unit_args = GradientArgsOf(gradient, unit);
    const T* const of_unit = partials.get() + unit * chunks * rows * args.size;
    for (std::int64_t t = 0; t < args.queries; ++t) AddChunks(unit_args, of_unit, chunks, t);
  });
}

#define SOFTMAX2P_INSTANTIATE(E)                                                               \
  template void AttendGradient(const KernelTable<E>&, Executor&, const AttentionGradient<E>&); \
  template void Attend(const KernelTable<E>&, Executor&, const Attention<E>&);
SOFTMAX2P_FOR_EACH_ELEMENT(SOFTMAX2P_INSTANTIATE)

}  // namespace jax_softmax2p
