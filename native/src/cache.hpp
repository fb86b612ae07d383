// A paged cache of keys and values: what its elements are, and where they lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace hasten {

// int8 and fp8 (e4m3: no infinities, 448 at most) stand for multiples of their row's float16 scale. A row is what one token has of one
// key/value head: its key, or its value. The meaning of each, and how it is rounded, is written in hasten/formats/cache.py.
enum class CacheFormat { bf16, int8, fp8 };

constexpr std::size_t element_bytes(CacheFormat format) { return format == CacheFormat::bf16 ? 2 : 1; }
constexpr std::size_t scale_bytes(CacheFormat format) { return format == CacheFormat::bf16 ? 0 : sizeof(std::uint16_t); }

// bf16, int8 or fp8. Throws std::invalid_argument for any other name.
CacheFormat cache_format_named(const std::string& name);

// One layer of a paged cache. A page holds `page` tokens, one key/value head after the other: keys [page][key_dim], values
// [page][value_dim], the scales of the keys [page] and of the values [page]; bf16 has no scales. Scales may lie at any byte.
// value_dim 0: latent rows, which are keys whose first features are the values; in bf16 only.
struct PagedLayer {
    std::byte* base;          // page 0 of this layer
    std::size_t page_stride;  // bytes from one page to the next
    CacheFormat format;
    int page, kv_heads, key_dim, value_dim;

    std::size_t key_bytes() const { return static_cast<std::size_t>(key_dim) * element_bytes(format); }      // of one token and head
    std::size_t value_bytes() const { return static_cast<std::size_t>(value_dim) * element_bytes(format); }  // likewise
    std::size_t scales_offset() const { return static_cast<std::size_t>(page) * (key_bytes() + value_bytes()); }  // from a head's begin
    std::size_t head_bytes() const { return scales_offset() + 2 * static_cast<std::size_t>(page) * scale_bytes(format); }
    std::size_t bytes() const { return static_cast<std::size_t>(kv_heads) * head_bytes(); }
    std::byte* head(std::int64_t number, int which) const {
        return base + static_cast<std::size_t>(number) * page_stride + static_cast<std::size_t>(which) * head_bytes();
    }
};

// Rounds rows [first, last) of k [rows, kv_heads·key_dim] and v [rows, kv_heads·value_dim] to the layer's format and writes them to the
// places slots[row] = page · page_size + offset.
void append_kv(const PagedLayer& layer, const float* k, const float* v, const std::int64_t* slots, int first, int last);

}  // namespace hasten
