// From numbers to the stored form of every weight format, and back. bf16, int8 and int4 from bf16 are in linear.cpp, sparse in sparse_pack.cpp.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "weight_decode.hpp"

namespace hasten {
namespace {

HASTEN_INLINE float largest_integer(WeightFormat format) {
    switch (format) {
        case WeightFormat::fp8: return 448.0f;
        case WeightFormat::int8: return 127.0f;
        case WeightFormat::int4: return 7.0f;
        case WeightFormat::int3: return 3.0f;
        default: return 1.0f;
    }
}

HASTEN_INLINE int bits_of(WeightFormat format) { return format == WeightFormat::int8 ? 8 : format == WeightFormat::int4 ? 4 : format == WeightFormat::int3 ? 3 : 2; }

// To the nearest value of `mantissa` bits (half to even) with exponents from `least` on, as its bits without a sign: what IEEE 754 has
// for small formats. `x` is not negative, and no larger than the format's largest value.
template <int mantissa, int least>
HASTEN_INLINE std::uint32_t small_float(float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    constexpr int dropped = 23 - mantissa;
    const std::uint32_t normal = ((bits + (1u << (dropped - 1)) - 1 + (bits >> dropped & 1)) >> dropped) - (static_cast<std::uint32_t>(126 + least) << mantissa);
    // Below 2^least a step is as large as the first normal ones; adding 2²³ leaves their number in the low bits.
    constexpr float unit = std::bit_cast<float>(static_cast<std::uint32_t>(127 + least - mantissa) << 23), base = 0x1p23f;
    const std::uint32_t below = std::bit_cast<std::uint32_t>(x / unit + base) - std::bit_cast<std::uint32_t>(base);
    return bits < static_cast<std::uint32_t>(127 + least) << 23 ? below : normal;
}

HASTEN_INLINE std::uint8_t to_fp8(float x) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x), sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
    const std::uint32_t most = size < 0x43e00000 ? size : 0x43e00000;  // 448
    return static_cast<std::uint8_t>(sign | (size > 0x7f800000 ? 0x7f : small_float<3, -6>(std::bit_cast<float>(most))));
}

HASTEN_INLINE std::uint16_t to_f16(float x) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    const std::uint32_t most = size < 0x477ff000 ? size : 0;  // 65520 and more is infinity
    const std::uint32_t finite = small_float<10, -14>(std::bit_cast<float>(most)), other = size > 0x7f800000 ? 0x7e00 : 0x7c00;
    return static_cast<std::uint16_t>(sign | (size < 0x477ff000 ? finite : other));
}

HASTEN_INLINE bf16 to_bf16_bits(float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
    return static_cast<bf16>((bits & 0x7fffffff) > 0x7f800000 ? quiet : nearest);
}

// Where k of channel c lies among the elements of a tile of int8 quadruples, or of 16-bit pairs.
HASTEN_INLINE int in_quads(int k, int c) { return k / 4 * 64 + c * 4 + k % 4; }
HASTEN_INLINE int in_pairs(int k, int c) { return k / 2 * 32 + c * 2 + k % 2; }

constexpr int kDeepest = 256;  // k of a tile
constexpr int kRun = 32;       // k of one group, at least

// The smallest and largest of some numbers and of 0, in the order of their bits: a NaN is outside of both infinities.
struct Range {
    std::int32_t low, high;

    static HASTEN_INLINE std::int32_t order(std::int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }
    static HASTEN_INLINE float value(std::int32_t order) { return std::bit_cast<float>(Range::order(order)); }
    bool finite() const { return high < 0x7f800000 && low > order(static_cast<std::int32_t>(0xff800000)); }
};

HASTEN_INLINE Range range_body(const float* from, int count) {
    Range range{-1, 0};  // -1 is -0
    for (int i = 0; i < count; ++i) {
        const std::int32_t order = Range::order(std::bit_cast<std::int32_t>(from[i]));
        range.low = range.low < order ? range.low : order;
        range.high = range.high > order ? range.high : order;
    }
    return range;
}

// q = clip(w / scale + zero) to [low, high]; 0 for what is not a number.
HASTEN_INLINE void quantize_body(const float* from, float scale, int zero, int low, int high, std::int8_t* q) {
    for (int i = 0; i < kRun; ++i) {
        float value = from[i] / scale;
        value = value == value ? value : 0.0f;
        value = value < 128.0f ? value : 128.0f;
        value = value > -128.0f ? value : -128.0f;
        // Adding 1.5 · 2²³ leaves the integer, half to even, in the low bits.
        int rounded = std::bit_cast<std::int32_t>(value + 0x1.8p23f) - 0x4b400000 + zero;
        rounded = rounded < high ? rounded : high;
        q[i] = static_cast<std::int8_t>(rounded > low ? rounded : low);
    }
}

// Quadruples of `from` to those of one channel.
HASTEN_INLINE void scatter_quads(const void* from, int count, std::byte* to) {
    for (int i = 0; i < count; i += 4) std::memcpy(to + i * kChannels, static_cast<const std::byte*>(from) + i, 4);
}

// One channel of a tile of integers.
HASTEN_INLINE void place_integers(WeightFormat format, const std::int8_t* q, std::byte* tile, int c) {
    std::uint8_t bytes[64];
    const auto joined = [&](int parts, int bits, int offset) __attribute__((always_inline)) {
        for (int i = 0; i < 64; ++i) {
            unsigned all = 0;
            for (int part = 0; part < parts; ++part) all |= (static_cast<unsigned>(q[part * 64 + i] + offset) & ((1u << bits) - 1)) << (part * bits);
            bytes[i] = static_cast<std::uint8_t>(all);
        }
        scatter_quads(bytes, 64, tile + 4 * c);
    };
    switch (format) {
        case WeightFormat::int8: return scatter_quads(q, 64, tile + 4 * c);
        case WeightFormat::int4:
        case WeightFormat::lut4: return joined(2, 4, 0);
        case WeightFormat::int2: return joined(4, 2, 2);
        default: break;
    }
    joined(4, 2, 4);
    for (int i = 0; i < 32; ++i) {  // the third bits
        unsigned all = 0;
        for (int eighth = 0; eighth < 8; ++eighth) all |= (static_cast<unsigned>(q[eighth * 32 + i] + 4) >> 2 & 1) << eighth;
        bytes[i] = static_cast<std::uint8_t>(all);
    }
    scatter_quads(bytes, 32, tile + kTileBytes + 4 * c);
}

// One channel of a tile of floats.
HASTEN_INLINE void place_floats(WeightFormat format, const float* from, std::byte* tile, int c) {
    if (format == WeightFormat::f32) {
        for (int k = 0; k < 16; ++k) std::memcpy(tile + (k * kChannels + c) * 4, from + k, 4);
    } else if (format == WeightFormat::fp8) {
        std::uint8_t bytes[64];
        for (int k = 0; k < 64; ++k) bytes[k] = to_fp8(from[k]);
        for (int k = 0; k < 64; k += 2) std::memcpy(tile + in_pairs(k, c), bytes + k, 2);
    } else {
        std::uint16_t halves[32];
        if (format == WeightFormat::f16)
            for (int k = 0; k < 32; ++k) halves[k] = to_f16(from[k]);
        else
            for (int k = 0; k < 32; ++k) halves[k] = to_bf16_bits(from[k]);
        for (int k = 0; k < 32; k += 2) std::memcpy(tile + in_pairs(k, c) * 2, halves + k, 4);
    }
}

// One channel of a panel, `row` filled up with zeros to whole tiles; scales and zeros are the channel's first, 16 apart.
HASTEN_INLINE void pack_channel_body(const PackedLinear& weight, const float* row, int c, std::byte* tiles, float* scales, std::int8_t* zeros) {
    const TileShape tile = tile_shape(weight.format);
    const int padded = weight.padded_in(), groups = scale_groups(weight), per_group = groups > 1 ? weight.group : padded;
    const int bits = bits_of(weight.format), lowest = -(1 << (bits - 1)), limit = static_cast<int>(largest_integer(weight.format));
    for (int g = 0; g < groups; ++g) {
        const Range its = range_body(row + g * per_group, std::min(per_group, padded - g * per_group));
        const float low = Range::value(its.low), high = Range::value(its.high);
        const float range = zeros ? (high - low) / static_cast<float>((1 << bits) - 1) : std::max(high, -low) / static_cast<float>(limit);
        const float scale = !its.finite() ? std::numeric_limits<float>::quiet_NaN() : range > 0 ? range : 1.0f;  // so that all products show it
        scales[g * kChannels] = scale;
        if (zeros)
            zeros[g * kChannels] = its.finite() ? static_cast<std::int8_t>(std::clamp(static_cast<int>(std::nearbyint(-low / scale)) + lowest, lowest, -lowest - 1)) : 0;
    }
    for (int t = 0; t < padded / tile.depth; ++t, tiles += tile.bytes) {
        const float* const from = row + t * tile.depth;
        if (!groups) {
            place_floats(weight.format, from, tiles, c);
            continue;
        }
        std::int8_t q[kDeepest];
        float floats[kDeepest];  // of fp8
        for (int k = 0; k < tile.depth; k += kRun) {
            const int g = std::min((t * tile.depth + k) / per_group, groups - 1);
            const float scale = scales[g * kChannels];
            if (weight.format == WeightFormat::fp8)
                for (int i = 0; i < kRun; ++i) floats[k + i] = from[k + i] / scale;
            else
                quantize_body(from + k, scale, zeros ? zeros[g * kChannels] : 0, zeros ? lowest : -limit, zeros ? -lowest - 1 : limit, q + k);
        }
        if (weight.format == WeightFormat::fp8)
            place_floats(weight.format, floats, tiles, c);
        else
            place_integers(weight.format, q, tiles, c);
    }
}

void pack_channel_generic(const PackedLinear& weight, const float* row, int c, std::byte* tiles, float* scales, std::int8_t* zeros) {
    pack_channel_body(weight, row, c, tiles, scales, zeros);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void pack_channel_avx2(const PackedLinear& weight, const float* row, int c, std::byte* tiles, float* scales,
                                                           std::int8_t* zeros) {
    pack_channel_body(weight, row, c, tiles, scales, zeros);
}
#endif

}  // namespace

int PackedLinear::padded_in() const {
    const int depth = tile_depth(format);
    return (in + depth - 1) / depth * depth;
}

void pack_linear(WeightFormat format, int out, int in, int group, const float* dense, int first, int last, std::byte* tiles, float* scales,
                 std::int8_t* zeros) {
    auto pack_channel = pack_channel_generic;
#if defined(__x86_64__)
    if (best_isa() >= Isa::avx2) pack_channel = pack_channel_avx2;
#endif
    const PackedLinear weight{format, out, in, group, tiles, scales, zeros};
    const TileShape tile = tile_shape(format);
    const std::ptrdiff_t groups = scale_groups(weight), panel_bytes = std::ptrdiff_t{weight.padded_in() / tile.depth} * tile.bytes;
    std::vector<float> row(static_cast<std::size_t>(weight.padded_in()));
    for (int panel = first; panel < last; ++panel)
        for (int c = 0; c < kChannels; ++c) {
            const int channel = panel * kChannels + c;
            if (channel < out)
                std::copy_n(dense + static_cast<std::ptrdiff_t>(channel) * in, in, row.begin());
            else
                std::fill(row.begin(), row.end(), 0.0f);
            const std::ptrdiff_t scale = panel * groups * kChannels + c;
            pack_channel(weight, row.data(), c, tiles + panel * panel_bytes, scales + scale, zeros ? zeros + scale : nullptr);
        }
}

void pack_codes(WeightFormat format, int out, int in, int group, const std::int8_t* codes, const float* code_scales, const std::int8_t* code_zeros,
                const std::int8_t* codebook, int first, int last, std::byte* tiles, float* scales, std::int8_t* zeros) {
    const PackedLinear weight{format, out, in, group, tiles, scales, zeros};
    const TileShape tile = tile_shape(format);
    const int padded = weight.padded_in();
    const std::ptrdiff_t groups = scale_groups(weight), panel_bytes = std::ptrdiff_t{padded / tile.depth} * tile.bytes;
    std::vector<std::int8_t> row(static_cast<std::size_t>(padded));
    const auto nothing = static_cast<std::int8_t>(codebook ? std::find(codebook, codebook + 16, 0) - codebook : 0);
    for (int panel = first; panel < last; ++panel)
        for (int c = 0; c < kChannels; ++c) {
            const std::ptrdiff_t channel = panel * kChannels + c;
            const bool exists = channel < out;
            for (std::ptrdiff_t g = 0; g < groups; ++g) {
                const std::ptrdiff_t to = (panel * groups + g) * kChannels + c, from = channel * groups + g;
                scales[to] = exists ? code_scales[from] : 1.0f;
                if (zeros) zeros[to] = exists ? code_zeros[from] : std::int8_t{0};
            }
            const std::int8_t padding = exists && zeros ? code_zeros[channel * groups + groups - 1] : nothing;  // which stands for 0
            std::fill(row.begin(), row.end(), padding);
            if (exists) std::copy_n(codes + channel * in, in, row.begin());
            std::byte* to = tiles + panel * panel_bytes;
            for (int k = 0; k < padded; k += tile.depth, to += tile.bytes) {
                const std::int8_t* const from = row.data() + k;
                if (format == WeightFormat::fp8)
                    for (int i = 0; i < tile.depth; i += 2) std::memcpy(to + in_pairs(i, c), from + i, 2);
                else
                    place_integers(format, from, to, c);
            }
        }
}

void unpack_linear(const PackedLinear& weight, float* dense) {
    const Feed feed = weight.format == WeightFormat::f32 || weight.format == WeightFormat::f16    ? Feed::f32
                      : weight.format == WeightFormat::bf16 || weight.format == WeightFormat::fp8 ? Feed::bf16
                                                                                                  : Feed::int8;
    const Units units(weight, feed);
    const int step = PanelReader::step(feed), padded = weight.padded_in();
    alignas(64) std::byte scratch[PanelReader::kScratch];
    for (int panel = 0; panel < weight.panels(); ++panel) {
        PanelReader reader(Isa::generic, weight, panel, feed, scratch);
        for (int begin = 0; begin < padded; begin += step) {
            const std::byte* const tiles = reader.next(step);
            for (int k = begin; k < std::min(weight.in, begin + step); ++k)
                for (int c = 0; c < panel_channels(weight, panel); ++c) {
                    const int at = k - begin;
                    float value;
                    if (feed == Feed::f32) {
                        std::memcpy(&value, tiles + (at * kChannels + c) * 4, sizeof value);
                    } else if (feed == Feed::bf16) {
                        bf16 bits;
                        std::memcpy(&bits, tiles + in_pairs(at, c) * 2, sizeof bits);
                        value = std::bit_cast<float>(std::uint32_t{bits} << 16);
                    } else {
                        value = static_cast<float>(static_cast<std::int8_t>(tiles[in_quads(at, c)]));
                    }
                    const int group = units.groups > 1 ? k / weight.group : 0;
                    const float scale = units.groups ? panel_scales(weight, panel)[group * kChannels + c] * units.fold : 1.0f;
                    dense[static_cast<std::ptrdiff_t>(panel * kChannels + c) * weight.in + k] = value * scale;
                }
        }
    }
}

}  // namespace hasten
