#include "mapped.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "stored.hpp"

namespace hasten {
namespace {

constexpr std::size_t kHuge = std::size_t{2} << 20;  // bytes of a huge page, and of what is moved at a time
constexpr std::chrono::milliseconds kFirst{1000};    // the first tokens come first
constexpr int kRest = 9;                             // times as long as a piece took: whoever decodes meanwhile loses a tenth of a core

std::size_t up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Address space of `bytes` bytes from a multiple of kHuge on.
std::byte* reserve(std::size_t bytes, int access) {
    void* const map = mmap(nullptr, bytes + kHuge, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return nullptr;
    auto* const begin = static_cast<std::byte*>(map);
    auto* const data = reinterpret_cast<std::byte*>(up(reinterpret_cast<std::uintptr_t>(map), kHuge));
    if (data > begin) munmap(begin, static_cast<std::size_t>(data - begin));
    if (const std::size_t tail = kHuge - static_cast<std::size_t>(data - begin)) munmap(data + bytes, tail);
    return data;
}

}  // namespace

MappedFile::MappedFile(int file, std::size_t size) : size_(size), reserved_(up(std::max<std::size_t>(size, 1), kHuge)) {
    data_ = reserve(reserved_, PROT_NONE);
    if (data_ && size && mmap(data_, size, PROT_READ, MAP_PRIVATE | MAP_FIXED, file, 0) == MAP_FAILED) {
        const int error = errno;
        munmap(data_, reserved_);
        throw std::system_error(error, std::generic_category());
    }
    if (!data_) throw std::system_error(ENOMEM, std::generic_category());
}

MappedFile::~MappedFile() {
    {
        const std::lock_guard held(mutex_);
        stop_ = true;
    }
    told_.notify_all();
    if (mover_.joinable()) mover_.join();  // after the piece it is at
    munmap(data_, reserved_);
}

bool MappedFile::resident() const {
#if defined(__linux__)
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    std::vector<unsigned char> there((size_ + page - 1) / page);
    if (there.empty()) return true;
    return mincore(data_, size_, there.data()) == 0 && std::all_of(there.begin(), there.end(), [](unsigned char each) { return each & 1; });
#else
    return false;
#endif
}

std::vector<std::uint64_t> MappedFile::digests(ThreadPool& pool, std::span<const Extent> extents) const {
    std::vector<std::atomic<std::uint64_t>> sums(extents.size());
    std::size_t all = 0;
    for (const Extent& extent : extents) all += digest_chunks(extent.size);
    pool.run([&](unsigned thread) {
        const Share mine = share(all, thread, pool.size());
        std::size_t before = 0;
        for (std::size_t i = 0; i < extents.size() && before < mine.end; ++i) {
            const std::size_t count = digest_chunks(extents[i].size);
            const std::size_t first = std::clamp(mine.begin, before, before + count) - before;
            const std::size_t last = std::clamp(mine.end, before, before + count) - before;
            if (first < last) sums[i] += digest(data_ + extents[i].offset, extents[i].size, first, last);
            before += count;
        }
    });
    return {sums.begin(), sums.end()};
}

void MappedFile::move(std::vector<Extent> extents, std::vector<std::uint64_t> digests) {
#if defined(__linux__)
    if (mover_.joinable()) return;
    try {
        mover_ = std::thread([this, extents = std::move(extents), digests = std::move(digests)] { move_all(extents, digests); });
    } catch (const std::system_error&) {
        // No more threads are to be had: it stays as it is.
    }
#else
    (void)extents, (void)digests;
#endif
}

std::size_t MappedFile::moved() {
    {
        const std::lock_guard held(mutex_);
        hurry_ = true;
    }
    told_.notify_all();
    if (mover_.joinable()) mover_.join();
    return moved_;
}

bool MappedFile::stopped_after(std::chrono::nanoseconds rest) {
    std::unique_lock held(mutex_);
    told_.wait_for(held, rest, [&] { return stop_ || hurry_; });
    return stop_;
}

void MappedFile::move_all([[maybe_unused]] std::vector<Extent> extents, [[maybe_unused]] std::vector<std::uint64_t> digests) {
#if defined(__linux__)
    using Clock = std::chrono::steady_clock;
    if (stopped_after(kFirst)) return;
    std::byte* const fresh = reserve(reserved_, PROT_READ | PROT_WRITE);
    if (!fresh) return;
    madvise(fresh, reserved_, MADV_HUGEPAGE);
    std::size_t done = 0, next = 0;
    for (Clock::duration took{0}; done < reserved_ && !stopped_after(kRest * took); done += kHuge) {
        const auto began = Clock::now();
        std::memcpy(fresh + done, data_ + done, std::min(kHuge, size_ - done));
        if (mremap(fresh + done, kHuge, kHuge, MREMAP_MAYMOVE | MREMAP_FIXED, data_ + done) == MAP_FAILED) break;
        moved_ = std::min(done + kHuge, size_);
        for (; next < extents.size() && extents[next].offset + extents[next].size <= moved_; ++next)
            if (digest(data_ + extents[next].offset, extents[next].size) != digests[next]) changed_ = true;
        took = Clock::now() - began;
    }
    if (done < reserved_) munmap(fresh + done, reserved_ - done);
#endif
}

}  // namespace hasten
