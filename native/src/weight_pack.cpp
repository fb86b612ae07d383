// From numbers to the stored form of every weight format, and back: written to be read; what is made at every start is in linear.cpp.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "weight_decode.hpp"

namespace hasten {
namespace {

float largest_integer(WeightFormat format) {
    switch (format) {
        case WeightFormat::fp8: return 448.0f;
        case WeightFormat::int8: return 127.0f;
        case WeightFormat::int4: return 7.0f;
        case WeightFormat::int3: return 3.0f;
        default: return 1.0f;
    }
}

int bits_of(WeightFormat format) { return format == WeightFormat::int8 ? 8 : format == WeightFormat::int4 ? 4 : format == WeightFormat::int3 ? 3 : 2; }

// To the nearest value of `mantissa` bits (half to even) with exponents from `least` on, as its bits without a sign: what IEEE 754 has
// for small formats. `x` is not negative, and no larger than the format's largest value.
std::uint32_t small_float(float x, int mantissa, int least) {
    if (x == 0) return 0;
    const int exponent = std::max(std::ilogb(x), least);
    const float steps = std::nearbyint(std::ldexp(x, mantissa - exponent));  // of the last bit; a carry runs into the exponent
    return static_cast<std::uint32_t>(steps) + (static_cast<std::uint32_t>(exponent - least) << mantissa);
}

std::uint8_t to_fp8(float x) {
    const std::uint8_t sign = std::signbit(x) ? 0x80 : 0;
    if (std::isnan(x)) return sign | 0x7f;
    return static_cast<std::uint8_t>(sign | small_float(std::min(std::fabs(x), 448.0f), 3, -6));
}

std::uint16_t to_f16(float x) {
    const auto sign = static_cast<std::uint16_t>(std::signbit(x) ? 0x8000 : 0);
    if (std::isnan(x)) return sign | 0x7e00;
    const float size = std::fabs(x);
    return static_cast<std::uint16_t>(sign | (size >= 65520.0f ? 0x7c00 : small_float(size, 10, -14)));
}

bf16 to_bf16_bits(float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    if (std::isnan(x)) return static_cast<bf16>(bits >> 16 | 0x40);
    return static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Where k of channel c lies among the elements of a tile of int8 quadruples, or of 16-bit pairs.
int in_quads(int k, int c) { return k / 4 * 64 + c * 4 + k % 4; }
int in_pairs(int k, int c) { return k / 2 * 32 + c * 2 + k % 2; }

// Writes element k of channel c into a tile that was zeros; `q` is a number of the format, or an integer.
void place(WeightFormat format, std::byte* tile, int k, int c, float value, int q) {
    const auto merge = [](std::byte& to, int bits, int shift) { to |= static_cast<std::byte>(bits << shift & 0xff); };
    const int at = in_quads(k % 64, c), part = k / 64;  // of integers
    switch (format) {
        case WeightFormat::f32: std::memcpy(tile + (k * kChannels + c) * 4, &value, sizeof value); return;
        case WeightFormat::f16: {
            const std::uint16_t bits = to_f16(value);
            std::memcpy(tile + in_pairs(k, c) * 2, &bits, sizeof bits);
            return;
        }
        case WeightFormat::bf16: {
            const bf16 bits = to_bf16_bits(value);
            std::memcpy(tile + in_pairs(k, c) * 2, &bits, sizeof bits);
            return;
        }
        case WeightFormat::fp8: tile[in_pairs(k, c)] = static_cast<std::byte>(to_fp8(value)); return;
        case WeightFormat::int8: tile[at] = static_cast<std::byte>(q); return;
        case WeightFormat::int4: return merge(tile[at], q & 0xf, 4 * part);
        case WeightFormat::int2: return merge(tile[at], (q + 2) & 3, 2 * part);
        case WeightFormat::int3:
            merge(tile[at], (q + 4) & 3, 2 * part);
            merge(tile[kTileBytes + at % 512], (q + 4) >> 2 & 1, 2 * part + at / 512);
            return;
    }
}

}  // namespace

int PackedLinear::padded_in() const {
    const int depth = tile_depth(format);
    return (in + depth - 1) / depth * depth;
}

void pack_linear(WeightFormat format, int out, int in, int group, const float* dense, int first, int last, std::byte* tiles, float* scales,
                 std::int8_t* zeros) {
    const PackedLinear weight{format, out, in, group, tiles, scales, zeros};
    const TileShape tile = tile_shape(format);
    const int groups = scale_groups(weight), count = weight.padded_in() / tile.depth, lowest = has_scales(format) ? -(1 << (bits_of(format) - 1)) : 0;
    const float limit = largest_integer(format);
    std::vector<float> scale(static_cast<std::size_t>(groups));
    std::vector<int> zero(static_cast<std::size_t>(groups));
    for (int panel = first; panel < last; ++panel) {
        std::byte* const to = tiles + static_cast<std::ptrdiff_t>(panel) * count * tile.bytes;
        std::memset(to, 0, static_cast<std::size_t>(count) * static_cast<std::size_t>(tile.bytes));
        for (int c = 0; c < kChannels; ++c) {
            const int channel = panel * kChannels + c;
            const float* const row = channel < out ? dense + static_cast<std::ptrdiff_t>(channel) * in : nullptr;
            const auto group_of = [&](int k) { return groups > 1 ? k / group : 0; };
            for (int g = 0; g < groups; ++g) {
                float low = 0, high = 0;
                bool numbers = true;
                for (int k = groups > 1 ? g * group : 0; row && k < (groups > 1 ? std::min(in, (g + 1) * group) : in); ++k) {
                    low = std::min(low, row[k]);
                    high = std::max(high, row[k]);
                    numbers = numbers && std::isfinite(row[k]);
                }
                const auto at = static_cast<std::size_t>(g);
                const std::ptrdiff_t place_of = (static_cast<std::ptrdiff_t>(panel) * groups + g) * kChannels + c;
                const float range = zeros ? (high - low) / static_cast<float>((1 << bits_of(format)) - 1) : std::max(high, -low) / limit;
                scale[at] = !numbers ? std::numeric_limits<float>::quiet_NaN() : range > 0 ? range : 1.0f;  // so that all products show it
                scales[place_of] = scale[at];
                if (!zeros) continue;
                zero[at] = numbers ? std::clamp(static_cast<int>(std::nearbyint(-low / scale[at])) + lowest, lowest, -lowest - 1) : 0;
                zeros[place_of] = static_cast<std::int8_t>(zero[at]);
            }
            // Padding of formats that store q with an offset must be written too.
            for (int k = 0; k < count * tile.depth; ++k) {
                const bool inside = row && k < in;
                const auto g = static_cast<std::size_t>(groups ? std::min(group_of(k), groups - 1) : 0);
                const float value = inside ? (groups ? row[k] / scale[g] : row[k]) : 0.0f;
                int q = 0;
                if (groups && format != WeightFormat::fp8) {
                    const float rounded = std::isnan(value) ? 0.0f : std::nearbyint(value);
                    q = zeros ? std::clamp(static_cast<int>(std::clamp(rounded, -64.0f, 64.0f)) + zero[g], lowest, -lowest - 1)
                              : static_cast<int>(std::clamp(rounded, -limit, limit));
                }
                place(format, to + static_cast<std::ptrdiff_t>(k / tile.depth) * tile.bytes, k % tile.depth, c, value, q);
            }
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

// --- sparse

namespace {

int mask_words(const PackedLinear& weight) { return tile_depth(weight.format) * kChannels / 64; }

// Whether the elements of 4 k of 16 channels are not zero.
std::uint64_t line_mask(WeightFormat format, const std::byte* tile, int line) {
    std::uint64_t mask = 0;
    if (format == WeightFormat::bf16) {
        const auto* const first = reinterpret_cast<const std::uint16_t*>(tile) + line * 64;  // k 0 and 1 of each channel; 32 on, k 2 and 3
        for (int i = 0; i < 64; ++i) mask |= std::uint64_t{(first[i % 4 / 2 * 32 + i / 4 * 2 + i % 2] & 0x7fff) != 0} << i;  // -0 adds nothing
    } else {
        const int shift = format == WeightFormat::int4 && line >= 16 ? 4 : 0;
        const unsigned bits = format == WeightFormat::int4 ? 0xf : 0xff;
        for (int i = 0; i < 64; ++i) mask |= std::uint64_t{(static_cast<unsigned>(tile[line % 16 * 64 + i]) >> shift & bits) != 0} << i;
    }
    return mask;
}

// Bytes that the elements of a tile take.
int element_count_bytes(WeightFormat format, const std::uint64_t* mask, int words) {
    int counts[2] = {};
    for (int i = 0; i < words; ++i) counts[i * 2 / words] += std::popcount(mask[i]);
    return format == WeightFormat::bf16 ? 2 * (counts[0] + counts[1]) : format == WeightFormat::int8 ? counts[0] + counts[1] : std::max(counts[0], counts[1]);
}

constexpr std::uint64_t kFirstOfFour = 0x1111111111111111u;

// The number of bits in each four.
std::uint64_t in_fours(std::uint64_t mask) {
    mask -= mask >> 1 & 5 * kFirstOfFour;
    return (mask & 3 * kFirstOfFour) + (mask >> 2 & 3 * kFirstOfFour);
}

// Adds the first of each four's zeros while the four has less than two bits.
std::uint64_t filled_to_two(std::uint64_t mask) {
    for (int bit = 0; bit < 4; ++bit) {
        const std::uint64_t count = in_fours(mask), lacking = ~(count >> 1 | count >> 2) & kFirstOfFour;
        mask |= lacking << bit;
    }
    return mask;
}

}  // namespace

std::size_t sparse_mask_count(const PackedLinear& dense) {
    return static_cast<std::size_t>(dense.panels()) * static_cast<std::size_t>(dense.padded_in() / tile_depth(dense.format) * mask_words(dense));
}

void sparse_masks(const PackedLinear& dense, int first, int last, std::uint64_t* masks, SparsePanel* panels) {
    const int tiles = dense.padded_in() / tile_depth(dense.format), words = mask_words(dense);
    for (int panel = first; panel < last; ++panel) {
        std::uint64_t* const mask = masks + static_cast<std::ptrdiff_t>(panel) * tiles * words;
        std::int64_t present = 0;
        bool most_two = true;
        for (int word = 0; word < tiles * words; ++word) {
            mask[word] = line_mask(dense.format, panel_tiles(dense, panel) + static_cast<std::ptrdiff_t>(word / words) * kTileBytes, word % words);
            const std::uint64_t count = in_fours(mask[word]);
            most_two = most_two && !(((count & count >> 1) | count >> 2) & kFirstOfFour);
            present += std::popcount(mask[word]);
        }
        // Not where that adds more than an eighth.
        const bool regular = dense.format != WeightFormat::int4 && most_two && present * 9 >= std::int64_t{tiles} * words * 32 * 8;
        panels[panel] = {0, regular};
        for (int t = 0; t < tiles; ++t) {
            std::uint64_t* const its = mask + static_cast<std::ptrdiff_t>(t) * words;
            if (regular)
                for (int word = 0; word < words; ++word) its[word] = filled_to_two(its[word]);
            panels[panel].start += static_cast<std::uint64_t>(element_count_bytes(dense.format, its, words));
        }
    }
}

void sparse_elements(const PackedLinear& dense, const std::uint64_t* masks, const SparsePanel* panels, int first, int last, std::byte* elements) {
    const int tiles = dense.padded_in() / tile_depth(dense.format), words = mask_words(dense);
    for (int panel = first; panel < last; ++panel) {
        std::byte* to = elements + panels[panel].start;
        for (int t = 0; t < tiles; ++t) {
            const std::uint64_t* const mask = masks + (static_cast<std::ptrdiff_t>(panel) * tiles + t) * words;
            const std::byte* const tile = panel_tiles(dense, panel) + static_cast<std::ptrdiff_t>(t) * kTileBytes;
            if (dense.format == WeightFormat::int4) {
                const int bytes = element_count_bytes(dense.format, mask, words);
                std::memset(to, 0, static_cast<std::size_t>(bytes));
                for (int half = 0; half < 2; ++half) {
                    int taken = 0;
                    for (int word = 0; word < 16; ++word)
                        for (std::uint64_t left = mask[16 * half + word]; left; left &= left - 1)
                            to[taken++] |= tile[word * 64 + std::countr_zero(left)] & static_cast<std::byte>(half ? 0xf0 : 0x0f);
                }
                to += bytes;
                continue;
            }
            for (int word = 0; word < words; ++word)
                for (std::uint64_t left = mask[word]; left; left &= left - 1) {
                    const int i = std::countr_zero(left);
                    if (dense.format == WeightFormat::bf16) {
                        std::memcpy(to, tile + word * 128 + i % 4 / 2 * 64 + i / 4 * 4 + i % 2 * 2, 2);
                        to += 2;
                    } else {
                        *to++ = tile[word * 64 + i];
                    }
                }
        }
    }
}

}  // namespace hasten
