// Memory for weights, caches and activations: anonymous, in huge pages where the system has them, touched first by who asks.
#pragma once

#include <cstddef>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#else
#include <cstdlib>
#endif

#include "guard.hpp"

namespace hasten {

// Zeroed bytes, 64-byte aligned at least; reserved at once, taken from the system page by page as they are touched.
class Buffer {
   public:
    Buffer() = default;
    explicit Buffer(std::size_t bytes) : bytes_(bytes) {
        if (bytes == 0) return;
#if defined(__linux__)
        void* const map = mmap(nullptr, guarded(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (map == MAP_FAILED) throw std::bad_alloc();
        data_ = guard(map, bytes);
        madvise(data_, bytes, MADV_HUGEPAGE);  // small ones too: neighbours become one map, whose huge pages span them
#else
        data_ = std::calloc(1, bytes + 64);
        if (!data_) throw std::bad_alloc();
#endif
    }
    ~Buffer() { release(); }
    Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
    Buffer& operator=(Buffer&& other) noexcept {
        if (this != &other) {
            release();
            data_ = other.data_;
            bytes_ = other.bytes_;
            other.data_ = nullptr;
        }
        return *this;
    }

    std::byte* data() const { return static_cast<std::byte*>(data_); }
    std::size_t size() const { return bytes_; }

   private:
    void release() {
        if (!data_) return;
#if defined(__linux__)
        munmap(unguard(data_, bytes_), guarded(bytes_));
#else
        std::free(data_);
#endif
    }

    void* data_ = nullptr;
    std::size_t bytes_ = 0;
};

}  // namespace hasten
