// Stands in for XLA, as its FFI handlers see it: errors, call frames, and thread pools, some of kinds that
// XLA does not have.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "tests/selftest/faults.h"
#include "tests/selftest/guard_pages.h"
#include "xla/ffi/api/c_api.h"

struct XLA_FFI_Error {
  XLA_FFI_Error_Code code;
  std::string message;
};

namespace jax_softmax2p {

// ---------------------------------------------------------------------------------------------------------
// Thread pools.

enum class Start {
  kRefused,      // there is no pool
  kInline,       // when scheduled, in the caller's thread
  kAtOnce,       // as soon as a thread is free
  kLate,         // a while after it was scheduled
  kReversed,     // last to first, when all are scheduled or the handler has returned
  kAfterReturn,  // when the handler has returned and its buffers are gone
};

class FakePool {
 public:
  FakePool(std::string name, Start start, int threads)
      : name_(std::move(name)), start_(start), size_(threads) {
    const bool own = start == Start::kAtOnce || start == Start::kLate || start == Start::kReversed;
    for (int i = 0; own && i < threads; ++i) threads_.emplace_back([this] { Work(); });
  }
  ~FakePool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
    }
    ready_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  const std::string& name() const { return name_; }
  Start start() const { return start_; }
  // The number of tasks that started after their handler had returned.
  std::int64_t late_tasks() const { return late_tasks_; }

  XLA_FFI_ExecutionContext* AsContext() { return reinterpret_cast<XLA_FFI_ExecutionContext*>(this); }
  static FakePool& Of(XLA_FFI_ExecutionContext* context) { return *reinterpret_cast<FakePool*>(context); }

  bool HasThreads() const { return start_ != Start::kRefused; }
  int Threads() const { return size_; }

  // Returns whether the task is taken.
  bool Schedule(XLA_FFI_Task* task, void* data) {
    if (start_ == Start::kRefused) return false;
    if (start_ == Start::kInline) {
      task(data);
      return true;
    }
    const ExemptFromFaults exempt;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back({task, data});
    }
    // All threads are woken only where one more task lets others start: waking 64 takes longer than a task.
    start_ == Start::kReversed ? ready_.notify_all() : ready_.notify_one();
    return true;
  }

  // To be called when the handler has returned. Returns when all tasks are done.
  void Drain() {
    std::unique_lock<std::mutex> lock(mutex_);
    returned_ = true;
    late_tasks_ += static_cast<std::int64_t>(tasks_.size());
    while (start_ == Start::kAfterReturn && !tasks_.empty()) RunOne(lock);
    if (start_ == Start::kReversed) ready_.notify_all();
    idle_.wait(lock, [this] { return tasks_.empty() && running_ == 0; });
    returned_ = false;
  }

 private:
  struct Task {
    XLA_FFI_Task* run;
    void* data;
  };

  bool MayStart() const {
    if (tasks_.empty()) return false;
    return start_ != Start::kReversed || returned_ || static_cast<int>(tasks_.size()) >= size_ - 1;
  }

  void Work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      ready_.wait(lock, [this] { return ended_ || MayStart(); });
      if (ended_) return;
      RunOne(lock);
    }
  }

  void RunOne(std::unique_lock<std::mutex>& lock) {
    const bool last = start_ == Start::kReversed;
    const Task task = last ? tasks_.back() : tasks_.front();
    last ? tasks_.pop_back() : tasks_.pop_front();
    ++running_;
    lock.unlock();
    if (start_ == Start::kLate) std::this_thread::sleep_for(std::chrono::microseconds(200));
    task.run(task.data);
    lock.lock();
    if (--running_ == 0) idle_.notify_all();
  }

  const std::string name_;
  const Start start_;
  const int size_;
  std::mutex mutex_;
  std::condition_variable ready_, idle_;
  std::deque<Task> tasks_;
  int running_ = 0;
  bool returned_ = false;
  bool ended_ = false;
  std::int64_t late_tasks_ = 0;
  std::vector<std::thread> threads_;
};

// ---------------------------------------------------------------------------------------------------------
// Those functions of the API that the handlers call.

inline const XLA_FFI_Api& FakeApi() {
  static const XLA_FFI_Api api = [] {
    XLA_FFI_Api made{};
    made.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    made.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    made.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) {
      const ExemptFromFaults exempt;
      return new XLA_FFI_Error{args->errc, args->message};
    };
    made.XLA_FFI_Error_GetMessage = [](XLA_FFI_Error_GetMessage_Args* args) {
      args->message = args->error->message.c_str();
    };
    made.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) { delete args->error; };
    made.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) -> XLA_FFI_Error* {
      if (FakePool::Of(args->ctx).Schedule(args->task, args->data)) return nullptr;
      return new XLA_FFI_Error{XLA_FFI_Error_Code_UNIMPLEMENTED, "no pool"};
    };
    made.XLA_FFI_ThreadPool_NumThreads = [](XLA_FFI_ThreadPool_NumThreads_Args* args) -> XLA_FFI_Error* {
      FakePool& pool = FakePool::Of(args->ctx);
      if (!pool.HasThreads()) return new XLA_FFI_Error{XLA_FFI_Error_Code_UNIMPLEMENTED, "no pool"};
      *args->num_threads = pool.Threads();
      return nullptr;
    };
    return made;
  }();
  return api;
}

// ---------------------------------------------------------------------------------------------------------
// Calls.

// A buffer with its own memory, which ends at a page without access and is unmapped with the buffer.
struct FakeBuffer {
  FakeBuffer(XLA_FFI_DataType type, std::vector<std::int64_t> dimensions, std::size_t bytes)
      : dtype(type), dims(std::move(dimensions)), size(bytes), pages(bytes), data(pages.end() - bytes) {}

  XLA_FFI_DataType dtype;
  std::vector<std::int64_t> dims;
  std::size_t size;
  GuardedPages pages;
  unsigned char* data;
};

using Attribute =
    std::variant<std::int64_t, std::int32_t, float, double, std::string, std::vector<std::int64_t>>;

struct Outcome {
  XLA_FFI_Error_Code code = XLA_FFI_Error_Code_OK;
  std::string message;
  bool ok() const { return code == XLA_FFI_Error_Code_OK; }
};

struct FakeCall {
  XLA_FFI_Handler* handler = nullptr;
  std::vector<FakeBuffer> arguments, results;
  std::map<std::string, Attribute> attributes;
  XLA_FFI_ExecutionStage stage = XLA_FFI_ExecutionStage_EXECUTE;

  Outcome Run(FakePool& pool);
};

namespace internal {

inline std::vector<XLA_FFI_Buffer> AsXla(std::vector<FakeBuffer>& buffers) {
  std::vector<XLA_FFI_Buffer> all;
  for (FakeBuffer& buffer : buffers) {
    all.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, buffer.dtype, buffer.data,
                   static_cast<std::int64_t>(buffer.dims.size()), buffer.dims.data()});
  }
  return all;
}

template <typename T>
std::vector<void*> Addresses(std::vector<T>& all) {
  std::vector<void*> addresses;
  for (T& one : all) addresses.push_back(&one);
  return addresses;
}

// An attribute as XLA passes it.
struct XlaAttribute {
  XlaAttribute(const std::string& attribute_name, const Attribute& attribute)
      : name{attribute_name.data(), attribute_name.size()} {
    if (const auto* text = std::get_if<std::string>(&attribute)) {
      type = XLA_FFI_AttrType_STRING;
      value = XLA_FFI_ByteSpan{text->data(), text->size()};
    } else if (const auto* numbers = std::get_if<std::vector<std::int64_t>>(&attribute)) {
      type = XLA_FFI_AttrType_ARRAY;
      value =
          XLA_FFI_Array{XLA_FFI_DataType_S64, numbers->size(), const_cast<std::int64_t*>(numbers->data())};
    } else {
      type = XLA_FFI_AttrType_SCALAR;
      value = std::visit([](const auto& scalar) { return Scalar(scalar); }, attribute);
    }
  }

  void* address() {
    return std::visit([](auto& one) -> void* { return &one; }, value);
  }

  XLA_FFI_AttrType type;
  XLA_FFI_ByteSpan name;

 private:
  template <typename T>
  static XLA_FFI_Scalar Scalar(const T& scalar) {
    const XLA_FFI_DataType type = std::is_same_v<T, float>          ? XLA_FFI_DataType_F32
                                  : std::is_same_v<T, double>       ? XLA_FFI_DataType_F64
                                  : std::is_same_v<T, std::int32_t> ? XLA_FFI_DataType_S32
                                                                    : XLA_FFI_DataType_S64;
    return {type, const_cast<T*>(&scalar)};
  }

  std::variant<XLA_FFI_Scalar, XLA_FFI_ByteSpan, XLA_FFI_Array> value;
};

}  // namespace internal

inline Outcome FakeCall::Run(FakePool& pool) {
  Outcome outcome;
  XLA_FFI_Error* error = nullptr;
  {
    std::optional<ExemptFromFaults> exempt(std::in_place);
    std::vector<XLA_FFI_Buffer> args = internal::AsXla(arguments), rets = internal::AsXla(results);
    std::vector<void*> arg_addresses = internal::Addresses(args), ret_addresses = internal::Addresses(rets);
    std::vector<XLA_FFI_ArgType> arg_types(args.size(), XLA_FFI_ArgType_BUFFER);
    std::vector<XLA_FFI_RetType> ret_types(rets.size(), XLA_FFI_RetType_BUFFER);
    std::deque<internal::XlaAttribute> attrs;
    for (const auto& [name, attribute] : attributes) attrs.emplace_back(name, attribute);
    std::vector<XLA_FFI_AttrType> attr_types;
    std::vector<XLA_FFI_ByteSpan*> attr_names;
    std::vector<void*> attr_addresses;
    for (internal::XlaAttribute& attr : attrs) {
      attr_types.push_back(attr.type);
      attr_names.push_back(&attr.name);
      attr_addresses.push_back(attr.address());
    }
    XLA_FFI_CallFrame frame{};
    frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
    frame.api = &FakeApi();
    frame.ctx = pool.AsContext();
    frame.stage = stage;
    frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<std::int64_t>(args.size()), arg_types.data(),
                  arg_addresses.data()};
    frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<std::int64_t>(rets.size()), ret_types.data(),
                  ret_addresses.data()};
    frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,           static_cast<std::int64_t>(attrs.size()),
                   attr_types.data(),         attr_names.data(), attr_addresses.data()};
    exempt.reset();
    error = handler(&frame);
    exempt.emplace();
  }
  if (error != nullptr) {
    outcome = {error->code, error->message};
    delete error;
  }
  return outcome;
}

}  // namespace jax_softmax2p
