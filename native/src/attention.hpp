// What attention's levels share: which keys a row sees, where a cached token lies, how scratch memory is divided.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

namespace hasten {

constexpr int kKeyBlock = 64;  // keys a step of the running softmax takes, at absolute positions

inline int lesser(int a, int b) { return a < b ? a : b; }  // not the standard's: its templates would be compiled for the includer's level
inline int greater(int a, int b) { return a > b ? a : b; }
constexpr int up_to_multiple(int n, int of) { return (n + of - 1) / of * of; }

// Query rows that are worked on together, so that their blocks of keys and values come out of a near cache.
inline int rows_together(const AttendShape& shape, int rows) {
    const int group = shape.heads / shape.kv_heads, most = group < 128 ? 128 / group : 1;
    return rows < most ? rows : most;
}

// The first key that a query at `position` sees.
inline int oldest_seen(const AttendShape& shape, int position) {
    return shape.window > 0 && position >= shape.window ? position - shape.window + 1 : 0;
}

// One block of keys as query rows [0, count) at positions from `first` see it.
struct KeyBlock {
    int base;        // its first position
    int begin, end;  // rows that see any of it; the others pass it by
    int low, high;   // keys [base + low, base + high) are seen by some row; no others may be touched
};

inline KeyBlock key_block(const AttendShape& shape, int block, int first, int count) {
    const int base = block * kKeyBlock, top = base + kKeyBlock - 1;
    KeyBlock b{base, base > first ? base - first : 0, count, 0, kKeyBlock};
    if (shape.window > 0 && static_cast<std::int64_t>(top) + shape.window - first < count)  // position - window < top
        b.end = static_cast<int>(static_cast<std::int64_t>(top) + shape.window - first);
    const int oldest = oldest_seen(shape, first + b.begin), newest = first + b.end - 1;
    if (oldest > base) b.low = oldest - base;
    if (newest < top) b.high = newest - base + 1;
    return b;
}

// Where the keys and values of a block lie, by place in the block; those outside [low, high) are the nearest that lie in it.
struct BlockRows {
    const std::byte *keys[kKeyBlock], *values[kKeyBlock];
};

// Scales of a block's keys and values by place in the block, as bits of float16; zero outside [low, high).
struct HalfScales {
    alignas(64) std::uint16_t keys[kKeyBlock];
    alignas(64) std::uint16_t values[kKeyBlock];
};

// The same as float32.
struct BlockScales {
    alignas(64) float keys[kKeyBlock];
    alignas(64) float values[kKeyBlock];
};

// Places [begin, end) of a block that one page holds.
struct Run {
    int begin, end;
    const std::byte* head;  // where the page's share of the head begins
    std::size_t offset;     // tokens of the page before them
};

inline Run run_at(const PagedLayer& layer, const std::int32_t* table, int head, const KeyBlock& block, int begin) {
    if (begin >= block.high) return {begin, begin, nullptr, 0};
    const int position = block.base + begin, index = position / layer.page, offset = position - index * layer.page;
    return {begin, lesser(block.high, begin + layer.page - offset), layer.head(table[index], head), static_cast<std::size_t>(offset)};
}

// The rows of one key/value head; asks for their scales, which find_scales will want.
inline void find_rows(const PagedLayer& layer, const std::int32_t* table, int head, const KeyBlock& block, BlockRows& rows) {
    const std::size_t key_bytes = layer.key_bytes(), page_size = static_cast<std::size_t>(layer.page);
    const bool latent = layer.value_dim == 0;
    const std::size_t value_bytes = latent ? key_bytes : layer.value_bytes();
    for (Run run = run_at(layer, table, head, block, block.low); run.head; run = run_at(layer, table, head, block, run.end)) {
        const std::byte* key = run.head + run.offset * key_bytes;
        const std::byte* value = latent ? key : run.head + page_size * key_bytes + run.offset * value_bytes;
        if (layer.format != CacheFormat::bf16) {
            const std::byte* scales = run.head + layer.scales_offset() + run.offset * sizeof(std::uint16_t);
            for (int t = run.begin; t < run.end; t += 32, scales += 64) {
                __builtin_prefetch(scales);
                __builtin_prefetch(scales + page_size * sizeof(std::uint16_t));
            }
        }
        for (int t = run.begin; t < run.end; ++t, key += key_bytes, value += value_bytes) {
            rows.keys[t] = key;
            rows.values[t] = value;
        }
    }
    for (int t = 0; t < block.low; ++t) rows.keys[t] = rows.keys[block.low], rows.values[t] = rows.values[block.low];
    for (int t = block.high; t < kKeyBlock; ++t) rows.keys[t] = rows.keys[block.high - 1], rows.values[t] = rows.values[block.high - 1];
}

inline void find_scales(const PagedLayer& layer, const std::int32_t* table, int head, const KeyBlock& block, HalfScales& scales) {
    for (int t = 0; t < kKeyBlock; ++t) scales.keys[t] = scales.values[t] = 0;
    for (Run run = run_at(layer, table, head, block, block.low); run.head; run = run_at(layer, table, head, block, run.end)) {
        const std::byte* from = run.head + layer.scales_offset() + run.offset * sizeof(std::uint16_t);
        const std::size_t count = static_cast<std::size_t>(run.end - run.begin) * sizeof(std::uint16_t);
        __builtin_memcpy(scales.keys + run.begin, from, count);
        __builtin_memcpy(scales.values + run.begin, from + static_cast<std::size_t>(layer.page) * sizeof(std::uint16_t), count);
    }
}

// Asks for the next block's rows while this one is worked on, a few at a time: the machine's own prefetch stops at every 4 KiB, and more
// at once than it has buffers for would wait.
struct Ahead {
    const BlockRows* rows;  // null: none
    std::size_t key_bytes, value_bytes;

    __attribute__((always_inline)) void ask_keys(int from, int to) const {
        for (int t = from; rows && t < to; ++t)
            for (std::size_t d = 0; d < key_bytes; d += 64) __builtin_prefetch(rows->keys[t] + d, 0, 2);
    }
    __attribute__((always_inline)) void ask_values(int from, int to) const {
        for (int t = from; rows && t < to; ++t)
            for (std::size_t d = 0; d < value_bytes; d += 64) __builtin_prefetch(rows->values[t] + d, 0, 2);
    }
    __attribute__((always_inline)) void ask(int from, int to) const {
        ask_keys(from, to);
        ask_values(from, to);
    }
};

// The blocks of one key/value head that query rows [0, count) at positions from `first` see, each with the one behind it.
class Blocks {
 public:
    Blocks(const AttendShape& shape, const PagedLayer& layer, const std::int32_t* table, int head, int first, int count)
        : shape_(shape),
          layer_(layer),
          table_(table),
          head_(head),
          first_(first),
          count_(count),
          index_(oldest_seen(shape, first) / kKeyBlock) {
        find();
    }
    bool more() const { return index_ * static_cast<std::int64_t>(kKeyBlock) < first_ + count_; }
    void next() { ++index_; }
    const KeyBlock& block() const { return blocks_[index_ % 2]; }
    const BlockRows& rows() const { return rows_[index_ % 2]; }

    // Null where the format has none. Called once a block.
    const HalfScales* scales() {
        if (layer_.format == CacheFormat::bf16) return nullptr;
        find_scales(layer_, table_, head_, block(), scales_);
        return &scales_;
    }

    // What asks for this block itself, as nobody has for the first.
    Ahead here() const { return {&rows(), layer_.key_bytes(), layer_.value_bytes()}; }

    // Called once a block.
    Ahead ahead() {
        const BlockRows& behind = rows_[(index_ + 1) % 2];
        ++index_;
        const bool is = more();
        if (is) find();
        --index_;
        return {is ? &behind : nullptr, layer_.key_bytes(), layer_.value_bytes()};
    }

 private:
    void find() {
        blocks_[index_ % 2] = key_block(shape_, index_, first_, count_);
        find_rows(layer_, table_, head_, blocks_[index_ % 2], rows_[index_ % 2]);
    }

    const AttendShape& shape_;
    const PagedLayer& layer_;
    const std::int32_t* table_;
    int head_, first_, count_, index_;
    KeyBlock blocks_[2];
    BlockRows rows_[2];
    HalfScales scales_;
};

// Hands out 64-byte aligned pieces of scratch memory.
class Scratch {
 public:
    explicit Scratch(float* memory) : at_(memory + (64 - reinterpret_cast<std::uintptr_t>(memory) % 64) % 64 / sizeof(float)) {}

    template <class T = float>
    __attribute__((always_inline)) T* take(std::size_t count) {
        T* piece = reinterpret_cast<T*>(at_);
        at_ += (count * sizeof(T) + 63) / 64 * 16;
        return piece;
    }

 private:
    float* at_;
};

}  // namespace hasten
