#include "stored.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>
#include <system_error>

namespace hasten {
namespace {

static_assert(std::endian::native == std::endian::little, "digests and packed weights are little-endian");

constexpr std::uint64_t kPrime1 = 0x9E3779B185EBCA87, kPrime2 = 0xC2B2AE3D27D4EB4F, kPrime3 = 0x165667B19E3779F9,
                        kPrime4 = 0x85EBCA77C2B2AE63, kPrime5 = 0x27D4EB2F165667C5;

template <class T>
T load(const std::byte* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

std::uint64_t mixed(std::uint64_t sum, std::uint64_t word) { return std::rotl(sum + word * kPrime2, 31) * kPrime1; }

std::uint64_t merged(std::uint64_t hash, std::uint64_t sum) { return (hash ^ mixed(0, sum)) * kPrime1 + kPrime4; }

// 0, or the errno of what failed; a file that ends early is EIO.
int read_all(int file, std::uint64_t offset, std::byte* to, std::size_t count) {
    while (count) {
        const ssize_t got = pread(file, to, count, static_cast<off_t>(offset));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return got < 0 ? errno : EIO;
        to += got;
        offset += static_cast<std::uint64_t>(got);
        count -= static_cast<std::size_t>(got);
    }
    return 0;
}

}  // namespace

std::uint64_t xxh64(const std::byte* data, std::size_t count, std::uint64_t seed) {
    const std::byte* const end = data + count;
    std::uint64_t hash = seed + kPrime5;
    if (count >= 32) {
        std::uint64_t sums[4] = {seed + kPrime1 + kPrime2, seed + kPrime2, seed, seed - kPrime1};
        for (; end - data >= 32; data += 32)
            for (int lane = 0; lane < 4; ++lane) sums[lane] = mixed(sums[lane], load<std::uint64_t>(data + 8 * lane));
        hash = std::rotl(sums[0], 1) + std::rotl(sums[1], 7) + std::rotl(sums[2], 12) + std::rotl(sums[3], 18);
        for (std::uint64_t sum : sums) hash = merged(hash, sum);
    }
    hash += count;
    for (; end - data >= 8; data += 8) hash = std::rotl(hash ^ mixed(0, load<std::uint64_t>(data)), 27) * kPrime1 + kPrime4;
    for (; end - data >= 4; data += 4) hash = std::rotl(hash ^ load<std::uint32_t>(data) * kPrime1, 23) * kPrime2 + kPrime3;
    for (; data < end; ++data) hash = std::rotl(hash ^ static_cast<std::uint64_t>(*data) * kPrime5, 11) * kPrime1;
    hash = (hash ^ hash >> 33) * kPrime2;
    hash = (hash ^ hash >> 29) * kPrime3;
    return hash ^ hash >> 32;
}

std::uint64_t digest(const std::byte* data, std::size_t count) { return digest(data, count, 0, digest_chunks(count)); }

std::uint64_t digest(const std::byte* data, std::size_t count, std::size_t first, std::size_t last) {
    std::uint64_t sum = 0;
    for (std::size_t chunk = first; chunk < last; ++chunk) {
        const std::size_t begin = chunk * kDigestChunk;
        sum += xxh64(data + begin, std::min(kDigestChunk, count - begin), chunk);
    }
    return sum;
}

std::uint64_t read_stored(ThreadPool& pool, int file, std::uint64_t offset, std::byte* data, std::size_t count) {
    std::atomic<std::uint64_t> sum{0};
    std::atomic<int> failed{0};
    pool.run([&](unsigned thread) {
        const Share mine = share(digest_chunks(count), thread, pool.size());
        std::uint64_t own = 0;
        for (std::size_t chunk = mine.begin; chunk < mine.end; ++chunk) {
            const std::size_t begin = chunk * kDigestChunk, size = std::min(kDigestChunk, count - begin);
            if (const int error = read_all(file, offset + begin, data + begin, size)) {
                failed = error;
                return;
            }
            own += xxh64(data + begin, size, chunk);  // while it is in the cache
        }
        sum += own;
    });
    if (const int error = failed) throw std::system_error(error, std::generic_category());
    return sum;
}

void will_need(const std::byte* data, std::size_t count) {
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto begin = reinterpret_cast<std::uintptr_t>(data) / page * page;
    const auto end = reinterpret_cast<std::uintptr_t>(data) + count;
    if (count) posix_madvise(reinterpret_cast<void*>(begin), end - begin, POSIX_MADV_WILLNEED);  // advice: a refusal changes nothing
}

}  // namespace hasten
