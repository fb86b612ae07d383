// What the instruction-set levels of a linear layer share. Everything here is inlined into functions with target attributes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

#define HASTEN_INLINE inline __attribute__((always_inline))

namespace hasten {

constexpr int kChannels = 16;    // of a panel
constexpr int kTileBytes = 1024;

// How a weight lies: tiles of `depth` k × 16 channels, `bytes` each.
struct TileShape {
    int depth, bytes;
};

constexpr TileShape tile_shape(WeightFormat format) {
    switch (format) {
        case WeightFormat::f32: return {16, kTileBytes};
        case WeightFormat::f16:
        case WeightFormat::bf16: return {32, kTileBytes};
        case WeightFormat::fp8:
        case WeightFormat::int8: return {64, kTileBytes};
        case WeightFormat::int4:
        case WeightFormat::lut4: return {128, kTileBytes};
        case WeightFormat::int3: return {256, kTileBytes + kTileBytes / 2};
        default: return {256, kTileBytes};
    }
}

constexpr int tile_depth(WeightFormat format) { return tile_shape(format).depth; }

// Formats whose values are exact as they lie; the others have scales.
constexpr bool has_scales(WeightFormat format) {
    return format != WeightFormat::f32 && format != WeightFormat::f16 && format != WeightFormat::bf16;
}

// Integers, whose products with int8 rows are exact.
constexpr bool is_integer(WeightFormat format) { return has_scales(format) && format != WeightFormat::fp8; }

// Groups of k that have their own scales: 1 for one scale per channel, 0 for formats without.
inline int scale_groups(const PackedLinear& weight) {
    if (!has_scales(weight.format)) return 0;
    return weight.group ? (weight.in + weight.group - 1) / weight.group : 1;
}

// What a product multiplies; weights stored otherwise are decoded to tiles of it.
enum class Feed { f32, bf16, int8 };

inline Feed feed_of(const PackedLinear& weight, const Activations& x) {
    if (weight.format == WeightFormat::f32 || weight.format == WeightFormat::f16) return Feed::f32;
    return x.scales ? Feed::int8 : Feed::bf16;
}

// Elements of a row of activations that a product reads: padding too, but of float32.
inline int row_elements(const PackedLinear& weight) {
    return weight.format == WeightFormat::f32 || weight.format == WeightFormat::f16 ? weight.in : weight.padded_in();
}

constexpr int element_bytes(Feed feed) { return feed == Feed::f32 ? 4 : feed == Feed::bf16 ? 2 : 1; }

// Nibbles without zero points are decoded to 16 · q, which costs one instruction less.
inline bool shifted(const PackedLinear& weight) { return weight.format == WeightFormat::int4 && !weight.zeros; }

// How a product walks k: in units of 64 bytes of a row of activations, or 32 where groups are that small; every `per_group` units a sum
// ends. Units beyond the last group hold zeros only and are left out.
struct Units {
    int depth, count, groups, per_group;  // depth: bytes of a row of activations in a unit
    float fold;  // what the scales are to be multiplied by

    Units(const PackedLinear& weight, Feed feed) {
        const int element = element_bytes(feed), group = has_scales(weight.format) ? weight.group : 0;
        depth = std::min(64, group ? group * element : 64);
        groups = scale_groups(weight);
        count = (group ? std::min(weight.padded_in(), groups * group) : weight.padded_in()) * element / depth;
        per_group = group ? group * element / depth : count;
        fold = shifted(weight) ? 0.0625f : 1.0f;
    }
};

inline const std::byte* panel_tiles(const PackedLinear& weight, int panel) {
    const TileShape tile = tile_shape(weight.format);
    return weight.tiles + static_cast<std::ptrdiff_t>(panel) * (weight.padded_in() / tile.depth) * tile.bytes;
}

inline const float* panel_scales(const PackedLinear& weight, int panel) {
    return weight.scales + static_cast<std::ptrdiff_t>(panel) * scale_groups(weight) * kChannels;
}

inline const std::int8_t* panel_zeros(const PackedLinear& weight, int panel) {
    return weight.zeros + static_cast<std::ptrdiff_t>(panel) * scale_groups(weight) * kChannels;
}

// Channels of a panel that exist.
inline int panel_channels(const PackedLinear& weight, int panel) { return std::min(kChannels, weight.out - panel * kChannels); }

// linear() at the levels without tiles.
void linear_generic(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride);
#if defined(__x86_64__)
void linear_avx2(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride);
void linear_avx512(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride);
// And with AMX tiles.
void linear_amx(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride);
#endif

}  // namespace hasten
