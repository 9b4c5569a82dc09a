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
// The same where a bias is shared, for which examples and heads are split.
constexpr std::int64_t kSharedBiasTasks = 64;

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
  if (args.HasDropout()) args.dropout_mask.data += at(attention.dropout_mask);
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
  const std::int64_t threads = executor.Threads();
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
  const std::int64_t threads = executor.Threads(), units = attention.batch * attention.key_heads;
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
  const std::int64_t wanted = CeilDiv(units * chunks, kTasks * executor.Threads());
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
  // The kernel for few queries reads no dropout mask, which decoding does not have.
  if (rows <= kernels.attention_few_rows && !args.HasDropout())
    return AttendFew(kernels, executor, attention);
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
  AttentionGradientArgs<E> args{ArgsOf(attention, unit), gradient.cotangent,      gradient.query_gradient,
                                gradient.key_gradient,   gradient.value_gradient, gradient.bias_gradient};
  args.cotangent += args.output - attention.first.output;
  args.query_gradient += args.query - attention.first.query;
  args.key_gradient += args.key - attention.first.key;
  args.value_gradient += args.value - attention.first.value;
  if (args.bias_gradient != nullptr) args.bias_gradient += args.bias.data - attention.first.bias.data;
  return args;
}

// How a gradient is divided into tasks: by the shape alone, so that the bits do not depend on the number of
// threads. Units, as ArgsOf numbers them, are in groups: those of a group add to the same elements of the
// gradient of the bias. A task computes a chunk of the keys for a part of a group, one unit after the other,
// and every part has a gradient of the bias of its own.
struct GradientPlan {
  std::int64_t key_heads;
  std::int64_t group_batch, group_heads;  // units of a group
  std::int64_t groups;
  std::int64_t parts;  // of a group
  std::int64_t chunk;  // keys
  std::int64_t chunks;

  std::int64_t Tasks() const { return groups * parts * chunks; }
  std::int64_t Members() const { return group_batch * group_heads; }
  std::int64_t First(std::int64_t part) const { return Members() * part / parts; }
  // Member m of group g.
  std::int64_t Unit(std::int64_t g, std::int64_t m) const {
    const std::int64_t groups_of_heads = key_heads / group_heads;
    const std::int64_t b = g / groups_of_heads * group_batch + m / group_heads;
    return b * key_heads + g % groups_of_heads * group_heads + m % group_heads;
  }
};

template <typename E>
GradientPlan PlanGradient(const AttentionGradient<E>& gradient) {
  const Attention<E>& attention = gradient.attention;
  const std::int64_t keys = attention.first.keys;
  const bool has_bias = gradient.bias_gradient != nullptr;
  GradientPlan plan{};
  plan.key_heads = attention.key_heads;
  plan.group_batch = has_bias && attention.bias.batch == 0 ? attention.batch : 1;
  plan.group_heads = has_bias && attention.bias.head == 0 ? attention.key_heads : 1;
  plan.groups = attention.batch * attention.key_heads / plan.Members();
  // As many parts as threads may want, unless their biases take more memory than the gradient of the queries;
  // then chunks of keys, each of which has a gradient of the queries.
  const std::int64_t query_elements =
      attention.batch * attention.key_heads * attention.first.Rows() * attention.first.size;
  const std::int64_t affordable = 1 + query_elements / std::max<std::int64_t>(1, gradient.bias_elements);
  plan.parts = std::min({CeilDiv(kSharedBiasTasks, plan.groups), affordable, plan.Members()});
  const std::int64_t wanted =
      std::min(CeilDiv(kGradientTasks, plan.groups * plan.parts), CeilDiv(keys, kChunk));
  plan.chunk = RoundUp(CeilDiv(keys, wanted), 64);
  plan.chunks = CeilDiv(keys, plan.chunk);
  return plan;
}

// What tasks leave beside the results: the chunks' gradients of the queries, where there are several chunks,
// and the gradients of the bias of all parts but the first.
template <typename T>
struct GradientPartials {
  std::unique_ptr<T[]> queries;
  std::unique_ptr<T[]> biases;
};

template <typename E>
void ComputeTask(const KernelTable<E>& kernels, const AttentionGradient<E>& gradient,
                 const GradientPlan& plan, std::int64_t task, const GradientPartials<ComputeOf<E>>& partials,
                 ComputeOf<E>* scratch) {
  const AttentionArgs<E>& args = gradient.attention.first;
  const std::int64_t c = task % plan.chunks, part = task / plan.chunks % plan.parts;
  AttentionGradient<E> of_part = gradient;
  if (part > 0) of_part.bias_gradient = partials.biases.get() + (part - 1) * gradient.bias_elements;
  for (std::int64_t m = plan.First(part); m < plan.First(part + 1); ++m) {
    const std::int64_t unit = plan.Unit(task / (plan.chunks * plan.parts), m);
    const std::int64_t at = (unit * plan.chunks + c) * args.Rows() * args.size;
    kernels.attention_gradient(GradientArgsOf(of_part, unit), c * plan.chunk,
                               std::min(args.keys, (c + 1) * plan.chunk),
                               plan.chunks > 1 ? partials.queries.get() + at : nullptr, scratch);
  }
}

// Adds to the first of `count` arrays of n elements the others, in order.
template <typename T>
void AddParts(Executor& executor, T* first, const T* others, std::int64_t count, std::int64_t n) {
  if (count == 1) return;
  constexpr std::int64_t kBlock = std::int64_t{1} << 14;
  ParallelFor(executor, CeilDiv(n, kBlock), [&](std::int64_t block) {
    const ScopedFloatMode mode;
    const std::int64_t begin = block * kBlock, end = std::min(n, begin + kBlock);
    for (std::int64_t part = 1; part < count; ++part) {
      const T* const other = others + (part - 1) * n;
      for (std::int64_t i = begin; i < end; ++i) first[i] += other[i];
    }
  });
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
  const std::int64_t query_elements = args.Rows() * args.size, bias_elements = gradient.bias_elements;
  std::fill_n(gradient.bias_gradient, bias_elements, T{0});
  if (units == 0) return;
  const GradientPlan plan = PlanGradient(gradient);
  GradientPartials<T> partials;
  if (plan.chunks > 1) partials.queries.reset(new T[units * plan.chunks * query_elements]);
  if (plan.parts > 1) partials.biases.reset(new T[(plan.parts - 1) * bias_elements]());
  const std::int64_t products = args.Rows() * plan.chunk * (args.size + args.value_size) * 5 / 2;
  const std::int64_t work = CeilDiv(plan.Members(), plan.parts) * products;
  const std::int64_t grain = CeilDiv(kGrain, std::max<std::int64_t>(1, work)), tasks = plan.Tasks();
  ParallelFor(executor, CeilDiv(tasks, grain), [&](std::int64_t i) {
    const ScopedFloatMode mode;
    const std::int64_t size = kernels.attention_gradient_scratch(GradientArgsOf(gradient, 0), plan.chunk);
    const std::unique_ptr<T[]> scratch(new T[size]);
    for (std::int64_t task = i * grain; task < std::min(tasks, (i + 1) * grain); ++task) {
      ComputeTask(kernels, gradient, plan, task, partials, scratch.get());
    }
  });
  AddParts(executor, gradient.bias_gradient, partials.biases.get(), plan.parts, bias_elements);
  if (plan.chunks == 1) return;
  ParallelFor(executor, units, [&](std::int64_t unit) {
    const ScopedFloatMode mode;
    const AttentionGradientArgs<E> unit_args = GradientArgsOf(gradient, unit);
    const T* const of_unit = partials.queries.get() + unit * plan.chunks * query_elements;
    for (std::int64_t t = 0; t < args.queries; ++t) AddChunks(unit_args, of_unit, plan.chunks, t);
  });
}

#define SOFTMAX2P_INSTANTIATE(E)                                                               \
  template void AttendGradient(const KernelTable<E>&, Executor&, const AttentionGradient<E>&); \
  template void Attend(const KernelTable<E>&, Executor&, const Attention<E>&);
SOFTMAX2P_FOR_EACH_ELEMENT(SOFTMAX2P_INSTANTIATE)

}  // namespace jax_softmax2p
