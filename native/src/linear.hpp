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

// k of one 1 KiB tile.
constexpr int tile_depth(WeightFormat format) { return format == WeightFormat::bf16 ? 32 : format == WeightFormat::int8 ? 64 : 128; }

// Groups of k that have their own scales: 1 for one scale per channel, 0 for bf16.
inline int scale_groups(const PackedLinear& weight) {
    if (weight.format == WeightFormat::bf16) return 0;
    return weight.format == WeightFormat::int4 && weight.group ? (weight.in + weight.group - 1) / weight.group : 1;
}

// How a level walks k: in units of 64 bytes of a row of activations, or 32 where groups are that small; every `per_group` units a sum
// ends. Units beyond the last group hold zeros only and are left out.
struct Units {
    int depth, count, groups, per_group;  // depth: bytes of k in a unit
    float fold;  // what the scales are to be multiplied by: nibbles are unpacked to 16 · q, which costs one instruction less

    explicit Units(const PackedLinear& weight) {
        const int group = weight.format == WeightFormat::int4 ? weight.group : 0;
        depth = group == 32 ? 32 : 64;
        groups = scale_groups(weight);
        const int padded = weight.padded_in() * (weight.format == WeightFormat::bf16 ? 2 : 1);
        count = (group ? std::min(padded, groups * group) : padded) / depth;
        per_group = group ? group / depth : count;
        fold = weight.format == WeightFormat::int4 ? 0.0625f : 1.0f;
    }
};

inline const std::byte* panel_tiles(const PackedLinear& weight, int panel) {
    return weight.tiles + static_cast<std::ptrdiff_t>(panel) * (weight.padded_in() / tile_depth(weight.format)) * kTileBytes;
}

inline const float* panel_scales(const PackedLinear& weight, int panel) {
    return weight.scales + static_cast<std::ptrdiff_t>(panel) * scale_groups(weight) * kChannels;
}

// Channels of a panel that exist.
inline int panel_channels(const PackedLinear& weight, int panel) { return std::min(kChannels, weight.out - panel * kChannels); }

#if defined(__x86_64__)
// linear() with AMX tiles.
void linear_amx(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride);
#endif

}  // namespace hasten
