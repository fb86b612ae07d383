// A file of weights that is read where the system keeps it, and moved to huge pages of its own while nobody waits for it.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "thread_pool.hpp"

namespace hasten {

// A run of a file's bytes.
struct Extent {
    std::size_t offset, size;
};

// The first `size` bytes of a file, to be read only. They keep their addresses when they are moved: whoever reads one meanwhile sees the
// same byte before and after, for the system exchanges whole pages at once.
class MappedFile {
   public:
    // Throws std::system_error where the file cannot be mapped.
    MappedFile(int file, std::size_t size);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const std::byte* data() const { return data_; }
    std::size_t size() const { return size_; }

    // Is all of it in memory, so that nothing must be read from a disk? False where the system does not say.
    bool resident() const;

    // The digest() of each extent, by all threads together.
    std::vector<std::uint64_t> digests(ThreadPool& pool, std::span<const Extent> extents) const;

    // Begin to move all of it, after a moment and with long rests, on a thread of its own. `digests` are those of `extents`, which are taken
    // again of what was moved. Once. Nothing moves where the system cannot: then it stays as it is. What is moved takes memory of its own.
    void move(std::vector<Extent> extents, std::vector<std::uint64_t> digests);

    // Waits for the end of the move, which rests no more. How many bytes lie in memory of their own; all of them, or what there was room for.
    std::size_t moved();

    // Did an extent have another digest when it was moved than when it was mapped? Somebody changed the file since.
    bool changed() const { return changed_.load(std::memory_order_relaxed); }

   private:
    void move_all(std::vector<Extent> extents, std::vector<std::uint64_t> digests);
    bool stopped_after(std::chrono::nanoseconds rest);

    std::byte* data_ = nullptr;
    std::size_t size_, reserved_ = 0, moved_ = 0;
    std::atomic<bool> changed_{false};
    std::mutex mutex_;
    std::condition_variable told_;
    bool stop_ = false, hurry_ = false;
    std::thread mover_;
};

}  // namespace hasten
