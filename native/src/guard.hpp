// Mapped memory that AddressSanitizer can guard: by itself it knows only what malloc gave. In any other build these do nothing.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace hasten {

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kGuard = 4096;  // bytes before and after that nobody may touch
#else
constexpr std::size_t kGuard = 0;
#endif

// Bytes to map for `bytes` and what guards them.
constexpr std::size_t guarded(std::size_t bytes) { return bytes + 2 * kGuard; }

// Where the `bytes` to be used begin in a map of guarded(bytes).
inline void* guard(void* map, [[maybe_unused]] std::size_t bytes) {
    std::byte* const data = static_cast<std::byte*>(map) + kGuard;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(map, kGuard);
    ASAN_POISON_MEMORY_REGION(data + bytes, kGuard);
#endif
    return data;
}

// The map that guard() was given, fit to be given back.
inline void* unguard(void* data, [[maybe_unused]] std::size_t bytes) {
    std::byte* const map = static_cast<std::byte*>(data) - kGuard;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(map, guarded(bytes));
#endif
    return map;
}

}  // namespace hasten
