// Bytes kept in a file between runs: their digest, and reading them into memory by many threads at once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "thread_pool.hpp"

namespace hasten {

// XXH64 (Yann Collet, xxHash specification 0.1.1): finds damage at the speed of memory; no defence against forgery.
std::uint64_t xxh64(const std::byte* data, std::size_t count, std::uint64_t seed);

// The sum, modulo 2⁶⁴, of the XXH64 of every 256 KiB, seeded with its place in the row: the same in whatever order they are taken.
constexpr std::size_t kDigestChunk = std::size_t{256} << 10;
constexpr std::size_t digest_chunks(std::size_t count) { return (count + kDigestChunk - 1) / kDigestChunk; }
std::uint64_t digest(const std::byte* data, std::size_t count);

// What the chunks [first, last) of `count` bytes add to their digest.
std::uint64_t digest(const std::byte* data, std::size_t count, std::size_t first, std::size_t last);

// Fills `data` with `count` bytes of a file from `offset` on, every thread a run of its own, and returns their digest.
// Throws std::system_error where the file cannot be read or ends before.
std::uint64_t read_stored(ThreadPool& pool, int file, std::uint64_t offset, std::byte* data, std::size_t count);

// Lets the system fetch mapped bytes from disk ahead of who reads them; nothing where they are in memory.
void will_need(const std::byte* data, std::size_t count);

}  // namespace hasten
