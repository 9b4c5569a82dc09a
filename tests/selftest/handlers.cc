// Calls the FFI handlers as XLA does, through call frames made by hand: on thread pools of every kind, with
// too little memory, and with operands and attributes that no caller should pass.
//
//   handlers [--quick]

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "ffi/ops/algorithm.h"
#include "ffi/ops/softmax.h"
#include "ffi/runtime/dispatch.h"
#include "ffi/runtime/workers.h"
#include "tests/selftest/current_case.h"
#include "tests/selftest/fake_xla.h"
#include "tests/selftest/faults.h"
#include "tests/selftest/requests.h"
#include "tests/selftest/support.h"

namespace jax_softmax2p {
namespace {

class Tests {
 public:
  explicit Tests(bool quick) : quick_(quick) {
    AddPool("no pool", Start::kRefused, 0);
    for (const int threads : {1, 2, 5, 64}) AddPool("a pool", Start::kAtOnce, threads);
    AddPool("a pool that runs tasks inline", Start::kInline, 5);
    AddPool("a late pool", Start::kLate, 5);
    AddPool("a reversing pool", Start::kReversed, 5);
    AddPool("a pool that starts nothing before the handler has returned", Start::kAfterReturn, 64);
  }

  int Run() {
    CheckPools();
    CheckAttention();
    CheckConcurrentCalls();
    CheckRefusals();
    CheckRandomCalls();
    CheckFaults();
    std::int64_t late = 0;
    for (const auto& pool : pools_) late += pool->late_tasks();
    std::printf(
        "handlers: %lld calls on %zu pools, %lld tasks started after their handler had returned; %lld bad "
        "calls refused, %lld random ones refused and %lld done; %lld faults injected\n",
        static_cast<long long>(calls_), pools_.size(), static_cast<long long>(late),
        static_cast<long long>(refused_), static_cast<long long>(random_refused_),
        static_cast<long long>(random_done_), static_cast<long long>(faults_));
    if (late == 0 || random_done_ < 100 || random_refused_ < 100 || faults_ < 100)
      Fail("to test what it should");
    return failures_ != 0;
  }

 private:
  void AddPool(const std::string& kind, Start start, int threads) {
    pools_.push_back(
        std::make_unique<FakePool>(kind + ", " + std::to_string(threads) + " threads", start, threads));
  }
  FakePool& PoolStarting(Start start, int threads) {
    return **std::find_if(pools_.begin(), pools_.end(), [&](const auto& pool) {
      return pool->start() == start && pool->Threads() == threads;
    });
  }

  void Begin(const std::string& what) {
    SetCurrentCase("%s", what.c_str());
    alarm(60);
  }
  void Fail(const std::string& what) {
    if (++failures_ <= 20) std::printf("FAILED %s: %s\n", what.c_str(), current_case);
  }

  static std::string Results(const FakeCall& call) {
    std::string bytes;
    for (const FakeBuffer& result : call.results) {
      bytes.append(reinterpret_cast<const char*>(result.data), result.size);
    }
    return bytes;
  }

  // Runs a call and frees its buffers before late tasks start. `results` are the bytes of its results.
  Outcome RunAndForget(FakeCall call, FakePool& pool, std::string& results) {
    const Outcome outcome = call.Run(pool);
    results = Results(call);
    call = FakeCall{};
    pool.Drain();
    return outcome;
  }

  // ---- The same bits on every pool, and no waiting for tasks that have not started.

  void CheckPools() {
    for (const Request& request : PoolRequests()) {
      std::string expected, results;
      for (const auto& pool : pools_) {
        Begin(Describe(request) + " on " + pool->name());
        const Outcome outcome = RunAndForget(Make(request), *pool, expected.empty() ? expected : results);
        ++calls_;
        if (!outcome.ok()) {
          Fail("to be done (" + outcome.message + ")");
        } else if (!results.empty() && results != expected) {
          Fail("to give the same bits");
        }
      }
    }
  }

  // Attention of few queries and of many, and its gradient, give the same bits on every pool.
  void CheckAttention() {
    for (const ElementType& type : kTypes) {
      for (const std::int64_t queries : {3, 130, 131}) {
        for (const bool gradient : {false, true}) {
          std::string expected, results;
          for (const auto& pool : pools_) {
            Begin(std::string("attention ") + type.name + " on " + pool->name());
            FakeCall call = MakeAttention(gradient, type, queries, 1300);
            const Outcome outcome =
                RunAndForget(std::move(call), *pool, expected.empty() ? expected : results);
            ++calls_;
            if (!outcome.ok()) Fail("to be done (" + outcome.message + ")");
            if (!results.empty() && results != expected) Fail("to give the same bits");
          }
        }
      }
    }
  }

  // Calls from many threads at once, on one pool, give the same bits.
  void CheckConcurrentCalls() {
    FakePool& pool = PoolStarting(Start::kAtOnce, 5);
    for (const Signature& signature : Signatures()) {
      const Request request{
          &signature, kTypes[0], {256, 260}, -1, signature.takes_operands ? kScale | kBias : 0};
      Begin(Describe(request) + " from eight threads at once");
      std::string results[8];
      std::vector<std::thread> callers;
      for (std::string& own : results) {
        callers.emplace_back([&] { RunAndForget(Make(request), pool, own); });
      }
      for (std::thread& caller : callers) caller.join();
      calls_ += static_cast<std::int64_t>(std::size(results));
      for (const std::string& own : results) {
        if (own != results[0]) Fail("to give the same bits");
      }
    }
  }

  std::vector<Request> PoolRequests() const {
    struct Shape {
      Dims dims;
      std::int64_t axis;
    };
    // Rows that are shared out whole and in segments, columns that are, and a few that stay in one thread.
    std::vector<Shape> shapes = {
        {{260, 260}, -1}, {{1, 66000}, -1}, {{3, 100, 220}, -2}, {{1, 34000, 2}, -2}, {{4, 5}, -1}};
    if (!quick_) {
      for (Shape more :
           {Shape{{5000, 20}, -1}, {{70001}, -1}, {{20, 3, 2000}, -3}, {{40000, 2, 2}, -3}, {{7, 0}, -1}}) {
        shapes.push_back(more);
      }
    }
    std::vector<Request> requests;
    for (const Signature& signature : Signatures()) {
      for (const ElementType& type : kTypes) {
        if (quick_ && type.type != XLA_FFI_DataType_F32 && type.type != XLA_FFI_DataType_BF16) continue;
        for (const Shape& shape : shapes) {
          Request request{&signature, type, shape.dims, shape.axis};
          requests.push_back(request);
          if (!signature.takes_operands) continue;
          request.operands = kScale | kBias | kWhere;
          request.algorithm = "three_pass_reload";
          requests.push_back(request);
          if (shape.axis != -1 || shape.dims.size() < 2) continue;
          request.operands = kWhere;
          request.before = request.after = 100;
          request.algorithm = "two_pass_reload";
          requests.push_back(request);
        }
      }
    }
    return requests;
  }

  // ---- Calls that must be refused.

  struct Mutation {
    const char* name;
    std::function<void(FakeCall&)> apply;
  };

  void CheckRefusals() {
    for (const Signature& signature : Signatures()) {
      Request request{&signature, kTypes[0], {4, 6, 5}};
      request.operands = signature.takes_operands ? kScale | kBias | kWhere : 0;
      for (const Mutation& mutation : Mutations(signature)) {
        FakeCall call = Make(request);
        mutation.apply(call);
        Begin(std::string(signature.name) + " with " + mutation.name);
        ExpectRefusal(std::move(call));
      }
    }
    CheckShapes();
  }

  void ExpectRefusal(FakeCall call) {
    std::string results;
    const Outcome outcome = RunAndForget(std::move(call), PoolStarting(Start::kAtOnce, 5), results);
    ++refused_;
    if (outcome.ok()) return Fail("to be refused");
    // The message must be a sentence.
    if (outcome.message.size() < 20 || outcome.message.find(' ') == std::string::npos) Fail("to say why");
    if (results.find_first_not_of('\xa5') != std::string::npos) Fail("to leave its results alone");
  }

  static std::vector<Mutation> Mutations(const Signature& signature) {
    constexpr auto kLeast = std::numeric_limits<std::int64_t>::min(),
                   kMost = std::numeric_limits<std::int64_t>::max();
    std::vector<Mutation> all = {
        {"the last argument missing", [](FakeCall& call) { call.arguments.pop_back(); }},
        {"no arguments", [](FakeCall& call) { call.arguments.clear(); }},
        {"an argument more",
         [](FakeCall& call) { call.arguments.push_back(Input(XLA_FFI_DataType_F32, {4, 6, 5})); }},
        {"the last result missing", [](FakeCall& call) { call.results.pop_back(); }},
        {"a result more",
         [](FakeCall& call) { call.results.push_back(Output(XLA_FFI_DataType_F32, {4, 6, 5})); }},
        {"an axis missing", [](FakeCall& call) { call.attributes.erase("axis"); }},
        {"an attribute more", [](FakeCall& call) { call.attributes["unknown"] = std::int64_t{1}; }},
        {"the axis in 32 bits", [](FakeCall& call) { call.attributes["axis"] = std::int32_t{-1}; }},
        {"the axis a float", [](FakeCall& call) { call.attributes["axis"] = -1.0f; }},
        {"the axis a string", [](FakeCall& call) { call.attributes["axis"] = std::string("-1"); }},
        {"the axis an array",
         [](FakeCall& call) { call.attributes["axis"] = std::vector<std::int64_t>{-1}; }},
        {"the stage wrong", [](FakeCall& call) { call.stage = XLA_FFI_ExecutionStage_INSTANTIATE; }},
    };
    for (const std::int64_t axis : {std::int64_t{0}, std::int64_t{1}, std::int64_t{-4}, kLeast, kMost}) {
      all.push_back({"the axis out of range", [axis](FakeCall& call) { call.attributes["axis"] = axis; }});
    }
    for (std::size_t i = 0; i < signature.arguments.size(); ++i) {
      if (signature.arguments[i] == Kind::kNoLabels) {
        all.push_back({"labels where there must be none",
                       [i](FakeCall& call) { call.arguments[i] = Input(XLA_FFI_DataType_S32, {4, 6}); }});
      } else {
        AddBufferMutations([i](FakeCall& call) -> FakeBuffer& { return call.arguments[i]; }, all);
      }
    }
    for (std::size_t i = 0; i < signature.results.size(); ++i) {
      AddBufferMutations([i](FakeCall& call) -> FakeBuffer& { return call.results[i]; }, all);
    }
    if (signature.takes_operands) AddOperandMutations(signature.arguments.size(), all);
    if (signature.takes_algorithm) {
      all.push_back({"an unknown algorithm",
                     [](FakeCall& call) { call.attributes["algorithm"] = std::string("four"); }});
      all.push_back({"a number for an algorithm",
                     [](FakeCall& call) { call.attributes["algorithm"] = std::int64_t{2}; }});
    }
    return all;
  }

  template <typename BufferOf>
  static void AddBufferMutations(BufferOf of, std::vector<Mutation>& all) {
    for (const int type : {0, 1, 2, 5, 8, 15, 17, 19, 63}) {
      all.push_back({"a wrong element type",
                     [=](FakeCall& call) { of(call).dtype = static_cast<XLA_FFI_DataType>(type); }});
    }
    all.push_back({"another element type", [=](FakeCall& call) {
                     FakeBuffer& buffer = of(call);
                     buffer.dtype =
                         buffer.dtype == XLA_FFI_DataType_F32 ? XLA_FFI_DataType_F64 : XLA_FFI_DataType_F32;
                   }});
    all.push_back({"a size one less", [=](FakeCall& call) { --of(call).dims[0]; }});
    all.push_back({"a size one more", [=](FakeCall& call) { ++of(call).dims[0]; }});
    all.push_back({"a negative size", [=](FakeCall& call) { of(call).dims[1] *= -1; }});
    all.push_back({"two negative sizes", [=](FakeCall& call) {
                     of(call).dims[0] *= -1;
                     of(call).dims[1] *= -1;
                   }});
    all.push_back({"sizes whose product overflows", [=](FakeCall& call) {
                     of(call).dims[0] = std::int64_t{1} << 62;
                     of(call).dims[1] = 4;
                   }});
    all.push_back({"rank 0", [=](FakeCall& call) { of(call).dims.clear(); }});
  }

  static void AddOperandMutations(std::size_t first, std::vector<Mutation>& all) {
    constexpr auto kLeast = std::numeric_limits<std::int64_t>::min(),
                   kMost = std::numeric_limits<std::int64_t>::max();
    for (const std::int64_t operands : {std::int64_t{0}, std::int64_t{3}, std::int64_t{6}, std::int64_t{8},
                                        std::int64_t{15}, std::int64_t{-1}, kLeast, kMost}) {
      all.push_back({"a number of operands that differs from the attribute",
                     [operands](FakeCall& call) { call.attributes["operands"] = operands; }});
    }
    for (std::size_t i = first; i < first + 3; ++i) {
      for (const int type : {0, 2, 4, 12, 16, 63}) {
        all.push_back({"an operand of a wrong type", [=](FakeCall& call) {
                         call.arguments[i].dtype = static_cast<XLA_FFI_DataType>(type);
                       }});
      }
      all.push_back({"an operand of lower rank", [=](FakeCall& call) { call.arguments[i].dims.pop_back(); }});
      all.push_back(
          {"an operand of higher rank", [=](FakeCall& call) { call.arguments[i].dims.push_back(1); }});
      for (const std::int64_t size : {std::int64_t{0}, std::int64_t{2}, std::int64_t{-6}, kLeast, kMost}) {
        all.push_back({"an operand that does not broadcast",
                       [=](FakeCall& call) { call.arguments[i].dims[1] = size; }});
      }
    }
    all.push_back({"a scale along the axis",
                   [=](FakeCall& call) { call.arguments[first] = Input(XLA_FFI_DataType_F32, {4, 6, 5}); }});
    for (const char* limit : {"before", "after"}) {
      all.push_back({"a band along another axis", [=](FakeCall& call) {
                       call.attributes[limit] = std::int64_t{1};
                       call.attributes["axis"] = std::int64_t{-2};
                     }});
    }
  }

  // Shapes on which all buffers agree, and which no memory can hold.
  void CheckShapes() {
    constexpr std::int64_t kHalf = std::int64_t{1} << 32, kMost = std::numeric_limits<std::int64_t>::max();
    for (const Dims& dims : std::vector<Dims>{{kHalf, kHalf},
                                              {kMost, 2},
                                              {kMost, kMost, kMost},
                                              {-1, 5},
                                              {5, -1},
                                              {-3, -3},
                                              {kHalf, kHalf, 0},
                                              {1 << 20, 1 << 20, 1 << 20},
                                              {kMost},
                                              {}}) {
      for (const Signature& signature : Signatures()) {
        Request request{&signature, kTypes[0], dims.empty() ? Dims{1} : dims};
        Begin(std::string(signature.name) + " of shape " + Describe(dims));
        FakeCall call = Make(request);
        if (dims.empty()) {
          for (auto* buffers : {&call.arguments, &call.results}) {
            for (FakeBuffer& buffer : *buffers) buffer.dims.clear();
          }
        }
        ExpectRefusal(std::move(call));
      }
    }
  }

  // ---- Random calls, valid or not. Those that are accepted stay within their buffers.

  void CheckRandomCalls() {
    std::string results;
    Random random(1);
    for (int i = 0; i < (quick_ ? 3000 : 30000); ++i) {
      const Signature& signature = Signatures()[random.Next() % Signatures().size()];
      const ElementType& type = kTypes[random.Next() % 4];
      Request request{&signature, type, {}};
      for (std::uint64_t rank = 1 + random.Next() % 4; rank > 0; --rank)
        request.dims.push_back(RandomSize(random));
      request.axis = -1 - static_cast<std::int64_t>(random.Next() % request.dims.size());
      if (signature.takes_operands && random.Next() % 2 == 0) request.operands = random.Next() % 8;
      if (random.Next() % 4 == 0) request.before = RandomSize(random);
      if (random.Next() % 4 == 0) request.after = RandomSize(random);
      request.algorithm = kAlgorithms[random.Next() % std::size(kAlgorithms)].name;
      FakeCall call = Make(request);
      if (random.Next() % 2 == 0) Corrupt(random, call);
      Begin("random call " + std::to_string(i) + ", " + Describe(request));
      const bool done = RunAndForget(std::move(call), *pools_[random.Next() % pools_.size()], results).ok();
      ++(done ? random_done_ : random_refused_);
    }
  }

  static std::int64_t RandomSize(Random& random) {
    constexpr std::int64_t kSizes[] = {0, 1, 1, 2, 3, 5, 8, 16, 17, 33};
    return kSizes[random.Next() % std::size(kSizes)];
  }

  // Corrupts one buffer or attribute. A corrupted buffer gets memory to match where there can be.
  static void Corrupt(Random& random, FakeCall& call) {
    std::vector<FakeBuffer>& buffers = random.Next() % 3 == 0 ? call.results : call.arguments;
    const std::size_t place = random.Next() % buffers.size();
    XLA_FFI_DataType type = buffers[place].dtype;
    Dims dims = buffers[place].dims;
    const std::size_t d = dims.empty() ? 0 : random.Next() % dims.size();
    switch (random.Next() % 8) {
      case 0:
        type = static_cast<XLA_FFI_DataType>(random.Next() % 35);
        break;
      case 1:
        if (!dims.empty()) dims[d] = RandomSize(random);
        break;
      case 2:
        if (!dims.empty()) dims[d] = static_cast<std::int64_t>(random.Next());
        break;
      case 3:
        dims.push_back(RandomSize(random));
        break;
      case 4:
        if (!dims.empty()) dims.pop_back();
        break;
      case 5:
        call.attributes["axis"] = static_cast<std::int64_t>(random.Next() % 12) - 6;
        return;
      case 6:
        if (call.attributes.count("operands"))
          call.attributes["operands"] = static_cast<std::int64_t>(random.Next() % 10);
        return;
      default:
        if (random.Next() % 2 == 0) {
          buffers.erase(buffers.begin() + static_cast<std::ptrdiff_t>(place));
        } else {
          buffers.insert(buffers.begin() + static_cast<std::ptrdiff_t>(place), Input(type, dims));
        }
        return;
    }
    buffers[place] = Input(type, dims);
  }

  // ---- Memory that runs out: a call gives an error, or the same bits.

  void CheckFaults() {
    std::vector<Request> requests;
    for (const Signature& signature : Signatures()) {
      for (const Request& request :
           {Request{&signature, kTypes[0], {256, 260}}, Request{&signature, kTypes[2], {14, 5000}},
            Request{&signature, kTypes[0], {1, 66000}}, Request{&signature, kTypes[3], {3, 100, 220}, -2},
            Request{&signature, kTypes[1], {1, 34000, 2}, -2}, Request{&signature, kTypes[0], {9, 9}}}) {
        requests.push_back(request);
        if (!signature.takes_operands || (quick_ && request.type.type != XLA_FFI_DataType_F32)) continue;
        requests.push_back(request);
        requests.back().operands = kScale | kBias | kWhere;
        requests.back().algorithm = "two_pass_reload";
      }
    }
    for (const Request& request : requests) {
      for (FakePool* pool : {&PoolStarting(Start::kInline, 5), &PoolStarting(Start::kReversed, 5),
                             &PoolStarting(Start::kAtOnce, 64)}) {
        for (const Failing failing : {Failing::kOne, Failing::kAllFrom})
          CheckFaultsOf(request, *pool, failing);
      }
    }
    CheckFaultsOfWorkers();
  }

  // Lets each allocation fail, one after the other, until the call makes no more.
  void CheckFaultsOf(const Request& request, FakePool& pool, Failing failing) {
    FakeCall call = Make(request);
    call.Run(pool);
    pool.Drain();
    const std::string expected = Results(call);
    bool injected = true;
    for (std::int64_t k = 0; injected; ++k) {
      Begin(Describe(request) + " on " + pool.name() + " without memory for allocation " + std::to_string(k) +
            (failing == Failing::kAllFrom ? " and all after it" : ""));
      for (FakeBuffer& result : call.results) std::memset(result.data, 0xa5, result.size);
      Outcome outcome;
      {
        const AllocationFault fault(failing, k);
        outcome = call.Run(pool);
        injected = fault.Injected();
      }
      const bool right = outcome.ok() ? Results(call) == expected
                                      : injected && outcome.code == XLA_FFI_Error_Code_RESOURCE_EXHAUSTED;
      if (!right) Fail("to give an error or the same bits (" + outcome.message + ")");
      pool.Drain();
      faults_ += injected;
    }
  }

  // The library's own threads, which no handler uses.
  void CheckFaultsOfWorkers() {
    const FakeBuffer x = Input(XLA_FFI_DataType_F32, {3, 70000});
    const FakeBuffer expected = Output(XLA_FFI_DataType_F32, {3, 70000});
    const auto softmax = [&](const FakeBuffer& y) {
      Workers executor(4);
      Softmax(*ActiveKernels().kernels, executor, Algorithm::kTwoPassReload,
              PlainLogits(reinterpret_cast<const float*>(x.data), {3, 70000, 1}),
              reinterpret_cast<float*>(y.data));
    };
    softmax(expected);
    bool injected = true;
    for (std::int64_t k = 0; injected; ++k) {
      Begin("softmax on our own threads without memory for allocation " + std::to_string(k));
      const FakeBuffer y = Output(XLA_FFI_DataType_F32, {3, 70000});
      const AllocationFault fault(Failing::kOne, k);
      bool done = true;
      try {
        softmax(y);
      } catch (const std::bad_alloc&) {
        done = false;
      }
      injected = fault.Injected();
      faults_ += injected;
      if (done && std::memcmp(y.data, expected.data, y.size) != 0) Fail("to give the same bits");
    }
  }

  const bool quick_;
  std::vector<std::unique_ptr<FakePool>> pools_;
  std::int64_t failures_ = 0, calls_ = 0, refused_ = 0, random_refused_ = 0, random_done_ = 0, faults_ = 0;
};

}  // namespace
}  // namespace jax_softmax2p

int main(int count, char** arguments) {
  const bool quick = count == 2 && std::string_view(arguments[1]) == "--quick";
  if (count > 1 && !quick) {
    std::fprintf(stderr, "handlers [--quick]\n");
    return 2;
  }
  jax_softmax2p::WatchCases(60);
  return jax_softmax2p::Tests(quick).Run();
}
