// Memory that begins after a page without access and ends at another.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

namespace jax_softmax2p {

// Pages with access, between two without.
class GuardedPages {
 public:
  GuardedPages() = default;
  explicit GuardedPages(std::size_t bytes) : size_((bytes / Page() + 1) * Page()) {
    void* const all = mmap(nullptr, size_ + 2 * Page(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    begin_ = static_cast<unsigned char*>(all) + Page();
    if (mprotect(begin_, size_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  }
  GuardedPages(GuardedPages&& other) noexcept { *this = std::move(other); }
  GuardedPages& operator=(GuardedPages&& other) noexcept {
    std::swap(begin_, other.begin_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~GuardedPages() {
    if (begin_ != nullptr) munmap(begin_ - Page(), size_ + 2 * Page());
  }

  static std::size_t Page() {
    static const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return page;
  }
  unsigned char* begin() const { return begin_; }
  unsigned char* end() const { return begin_ + size_; }
  std::size_t size() const { return size_; }

 private:
  unsigned char* begin_ = nullptr;
  std::size_t size_ = 0;
};

// Where an array lies: next to the page before it, next to the page after it, or to neither.
enum class Place { kApart, kAtBegin, kAtEnd };

// An array in guarded pages.
template <typename E>
class PagedArray {
 public:
  E* Prepare(std::int64_t n, Place place) {
    const std::size_t bytes = static_cast<std::size_t>(n) * sizeof(E);
    if (pages_.size() < bytes + 2 * GuardedPages::Page())
      pages_ = GuardedPages(bytes + 2 * GuardedPages::Page());
    unsigned char* const begin = place == Place::kAtBegin ? pages_.begin()
                                 : place == Place::kAtEnd ? pages_.end() - bytes
                                                          : pages_.begin() + GuardedPages::Page();
    return reinterpret_cast<E*>(begin);
  }
  E* Prepare(const std::vector<E>& contents, Place place) {
    E* const begin = Prepare(static_cast<std::int64_t>(contents.size()), place);
    if (!contents.empty()) std::memcpy(begin, contents.data(), contents.size() * sizeof(E));
    return begin;
  }

 private:
  GuardedPages pages_;
};

}  // namespace jax_softmax2p
