// Decoding, level by level: loops that the compiler vectorizes for each level's target, and expansion of sparse tiles by hand.
#include "weight_decode.hpp"

#include <bit>
#include <cstring>

#include "cpu.hpp"
#include "sparse_expand.hpp"

namespace hasten {
namespace {

#if defined(__x86_64__)
#define AVX2 HASTEN_EXPAND_AVX2
#define VBMI2 HASTEN_EXPAND_VBMI2

constexpr int kAheadBytes = 4096;  // of weights, prefetched
#endif

// --- lines of sparse tiles. Each returns the bytes taken.

HASTEN_INLINE std::ptrdiff_t sparse_bytes_body(const std::uint64_t* mask, int lines, const std::byte* from, std::byte* to) {
    std::ptrdiff_t taken = 0;
    for (int line = 0; line < lines; ++line, to += 64)
        for (int i = 0; i < 64; ++i) to[i] = mask[line] >> i & 1 ? from[taken++] : std::byte{0};
    return taken;
}

template <bool by_k>
HASTEN_INLINE std::ptrdiff_t sparse_halves_body(const std::uint64_t* mask, int lines, const std::byte* from, std::byte* to) {
    std::ptrdiff_t taken = 0;
    for (int line = 0; line < lines; ++line, to += 128)
        for (int i = 0; i < 64; ++i) {
            std::uint16_t value = 0;
            if (mask[line] >> i & 1) std::memcpy(&value, from + 2 * taken++, sizeof value);
            std::memcpy(to + half_place<by_k>(i), &value, sizeof value);
        }
    return 2 * taken;
}

// The bytes of `codebook` at the nibbles of `count` bytes, a multiple of 64: the low ones to `first`, the high ones to `second`.
HASTEN_INLINE void lookup_body(const std::int8_t* codebook, const std::byte* from, int count, std::int8_t* first, std::int8_t* second) {
    for (int i = 0; i < count; ++i) {
        const auto both = static_cast<std::uint8_t>(from[i]);
        first[i] = codebook[both & 0x0f];
        second[i] = codebook[both >> 4];
    }
}

struct Generic {
    static void lookup(const std::int8_t* codebook, const std::byte* from, int count, std::int8_t* first, std::int8_t* second) {
        lookup_body(codebook, from, count, first, second);
    }
    static std::ptrdiff_t sparse_bytes(const std::uint64_t* mask, int lines, const std::byte* from, std::byte* to) {
        return sparse_bytes_body(mask, lines, from, to);
    }
    template <bool by_k>
    static std::ptrdiff_t sparse_halves(const std::uint64_t* mask, int lines, const std::byte* from, std::byte* to) {
        return sparse_halves_body<by_k>(mask, lines, from, to);
    }
};

#if defined(__x86_64__)

struct Avx2 {
    AVX2 static void lookup(const std::int8_t* codebook, const std::byte* from, int count, std::int8_t* first, std::int8_t* second) {
        const __m256i low = _mm256_set1_epi8(0x0f), table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook)));
        for (int i = 0; i < count; i += 32) {
            _mm_prefetch(reinterpret_cast<const char*>(from + i) + kAheadBytes, _MM_HINT_T0);
            const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(first + i), _mm256_shuffle_epi8(table, _mm256_and_si256(both, low)));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(second + i), _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(both, 4), low)));
        }
    }
    AVX2 static std::ptrdiff_t sparse_bytes(const std::uint64_t* mask, int lines, const std::byte* from, std::byte* to) {
        const std::byte *const begin = from, *bits = reinterpret_cast<const std::byte*>(mask);
        for (int i = 0; i < 2 * lines; ++i, bits += 4, to += 32) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), ExpandAvx2::bytes(bits, from));
        return from - begin;
    }
    template <bool by_k>
    AVX2 static std::ptrdiff_t sparse_halves(const std::uint64_t* mask, int lines, const std::byte* from, std::byte* to) {
        const std::byte *const begin = from, *bits = reinterpret_cast<const std::byte*>(mask);
        for (int line = 0; line < lines; ++line, to += 128, bits += 8) {
            __m256i first[2], second[2];
            if constexpr (by_k)
                ExpandAvx2::halves_by_k(mask[line], from, first, second);
            else
                for (int half = 0; half < 2; ++half) ExpandAvx2::halves(bits + 4 * half, from, first[half], second[half]);
            for (int half = 0; half < 2; ++half) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * half), first[half]);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64 + 32 * half), second[half]);
            }
        }
        return from - begin;
    }
};

struct Vbmi2 {
    VBMI2 static void lookup(const std::int8_t* codebook, const std::byte* from, int count, std::int8_t* first, std::int8_t* second) {
        const __m512i low = _mm512_set1_epi8(0x0f), table = _mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook)));
        for (int i = 0; i < count; i += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(from + i) + kAheadBytes, _MM_HINT_T0);
            const __m512i both = _mm512_loadu_si512(from + i);
            _mm512_storeu_si512(first + i, _mm512_shuffle_epi8(table, _mm512_and_si512(both, low)));
            _mm512_storeu_si512(second + i, _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(both, 4), low)));
        }
    }
    VBMI2 static std::ptrdiff_t sparse_bytes(const std::uint64_t* mask, int lines, const std::byte* from, std::byte* to) {
        const std::byte* const begin = from;
        for (int line = 0; line < lines; ++line, to += 64) _mm512_storeu_si512(to, ExpandVbmi2::bytes(mask[line], from));
        return from - begin;
    }
    template <bool by_k>
    VBMI2 static std::ptrdiff_t sparse_halves(const std::uint64_t* mask, int lines, const std::byte* from, std::byte* to) {
        const std::byte* const begin = from;
        for (int line = 0; line < lines; ++line, to += 128) {
            __m512i first, second;
            if constexpr (by_k)
                ExpandVbmi2::halves_by_k(mask[line], from, first, second);
            else
                ExpandVbmi2::halves(mask[line], from, first, second);
            _mm512_storeu_si512(to, first);
            _mm512_storeu_si512(to + 64, second);
        }
        return from - begin;
    }
};

#endif

// --- dense tiles, each of `count` units

// 16 · q of the nibbles of `count` bytes: the low ones to `first`, the high ones to `second`.
HASTEN_INLINE void nibbles_body(const std::byte* from, int count, std::int8_t* first, std::int8_t* second) {
    for (int i = 0; i < count; ++i) {
        const auto both = static_cast<std::uint8_t>(from[i]);
        first[i] = static_cast<std::int8_t>(both << 4 & 0xf0);
        second[i] = static_cast<std::int8_t>(both & 0xf0);
    }
}

HASTEN_INLINE void int2_body(const std::byte* from, std::int8_t* to) {
    for (int tile = 0; tile < 4; ++tile)
        for (int i = 0; i < kTileBytes; ++i)
            to[tile * kTileBytes + i] = static_cast<std::int8_t>((static_cast<std::uint8_t>(from[i]) >> (2 * tile) & 3) - 2);
}

HASTEN_INLINE void int3_body(const std::byte* from, std::int8_t* to) {
    const std::byte* const third = from + kTileBytes;
    for (int tile = 0; tile < 4; ++tile)
        for (int half = 0; half < 2; ++half)
            for (int i = 0; i < kTileBytes / 2; ++i) {
                const int at = half * kTileBytes / 2 + i;
                const int low = static_cast<std::uint8_t>(from[at]) >> (2 * tile) & 3;
                const int high = static_cast<std::uint8_t>(third[i]) >> (2 * tile + half) & 1;
                to[tile * kTileBytes + at] = static_cast<std::int8_t>((low | high << 2) - 4);
            }
}

// bytes [k / 4][16][4] minus their group's zero points, `unit` k at a time; k starts at `at` of the panel. Padding has the last group's.
HASTEN_INLINE void subtract_zeros_body(const std::int8_t* zeros, int group, int groups, int at, int k, std::int8_t* bytes) {
    const int unit = group ? std::min(group, 128) : k;
    for (int begin = 0; begin < k; begin += unit) {
        const std::int8_t* const zero = zeros + (group ? std::min((at + begin) / group, groups - 1) : 0) * kChannels;
        alignas(64) std::int8_t line[64];
        for (int i = 0; i < 64; ++i) line[i] = zero[i / 4];
        for (int quad = begin; quad < std::min(k, begin + unit); quad += 4)
            for (int i = 0; i < 64; ++i) bytes[quad * kChannels + i] = static_cast<std::int8_t>(bytes[quad * kChannels + i] - line[i]);
    }
}

HASTEN_INLINE void halve_sixteenths_body(std::int8_t* bytes, int count) {
    for (int i = 0; i < count; ++i) bytes[i] = static_cast<std::int8_t>(bytes[i] >> 4);
}

// int8 quadruples → bf16 pairs; every integer of 8 bits is a bf16.
HASTEN_INLINE void widen_body(const std::int8_t* from, int k, std::uint32_t* to) {
    for (int quad = 0; quad < k / 4; ++quad, from += 64, to += 32)
        for (int c = 0; c < kChannels; ++c) {
            std::uint32_t four;
            std::memcpy(&four, from + 4 * c, sizeof four);
            const auto value = [&](int i) { return std::bit_cast<std::uint32_t>(static_cast<float>(static_cast<std::int32_t>(four << (24 - 8 * i)) >> 24)); };
            to[c] = value(0) >> 16 | (value(1) & 0xffff0000u);
            to[kChannels + c] = value(2) >> 16 | (value(3) & 0xffff0000u);
        }
}

// e4m3 → bf16, exactly: the exponent moves by 120; below it, where the exponent is 0, a value is m · 2⁻⁹.
HASTEN_INLINE void fp8_body(const std::byte* from, int count, bf16* to) {
    for (int i = 0; i < count; ++i) {
        const auto bits = static_cast<std::uint16_t>(from[i]);
        const auto magnitude = static_cast<std::uint16_t>(bits & 0x7f);
        const auto normal = static_cast<std::uint16_t>((magnitude << 4) + 0x3c00);
        // (1 + m / 8) · 2⁻⁶ less 2⁻⁶ is m · 2⁻⁹, exact in float32.
        const float tiny = std::bit_cast<float>(std::uint32_t{magnitude} << 20 | 0x3c800000u) - 0x1p-6f;
        const auto below = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(tiny) >> 16);
        const auto chosen = magnitude < 8 ? below : normal;
        to[i] = static_cast<bf16>(chosen | (bits & 0x80) << 8 | (magnitude == 0x7f ? 0x7fc0 : 0));
    }
}

// binary16 → float32, exactly; f16 pairs [k / 2][16][2] → [k][16].
HASTEN_INLINE float half_to_float(std::uint16_t bits) {
    const std::uint32_t magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
    if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
    const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(scaled) | sign);
}

HASTEN_INLINE void f16_body(const std::byte* from, int k, float* to) {
    for (int pair = 0; pair < k / 2; ++pair, from += 64, to += 2 * kChannels)
        for (int c = 0; c < kChannels; ++c) {
            std::uint16_t two[2];
            std::memcpy(two, from + 4 * c, sizeof two);
            to[c] = half_to_float(two[0]);
            to[kChannels + c] = half_to_float(two[1]);
        }
}

// What a level does, by function: each is compiled for its target.
#define HASTEN_DECODERS(LEVEL, TARGET)                                                                                                  \
    struct LEVEL##Decode : LEVEL {                                                                                                      \
        TARGET static void nibbles(const std::byte* from, int count, std::int8_t* first, std::int8_t* second) { nibbles_body(from, count, first, second); } \
        TARGET static void int2(const std::byte* from, std::int8_t* to) { int2_body(from, to); }                                        \
        TARGET static void int3(const std::byte* from, std::int8_t* to) { int3_body(from, to); }                                        \
        TARGET static void subtract_zeros(const std::int8_t* zeros, int group, int groups, int at, int k, std::int8_t* bytes) {         \
            subtract_zeros_body(zeros, group, groups, at, k, bytes);                                                                    \
        }                                                                                                                               \
        TARGET static void sixteenths(std::int8_t* bytes, int count) { halve_sixteenths_body(bytes, count); }                           \
        TARGET static void widen(const std::int8_t* from, int k, std::uint32_t* to) { widen_body(from, k, to); }                        \
        TARGET static void fp8(const std::byte* from, int count, bf16* to) { fp8_body(from, count, to); }                               \
        TARGET static void f16(const std::byte* from, int k, float* to) { f16_body(from, k, to); }                                          \
    }
#define HASTEN_NO_TARGET
HASTEN_DECODERS(Generic, HASTEN_NO_TARGET);
#if defined(__x86_64__)
HASTEN_DECODERS(Avx2, AVX2);
HASTEN_DECODERS(Vbmi2, VBMI2);
#endif

}  // namespace

PanelReader::PanelReader(Isa isa, const PackedLinear& weight, int panel, Feed feed, std::byte* scratch)
    : weight_(weight),
      feed_(feed),
      isa_(isa),
      panel_(panel),
      scratch_(scratch),
      elements_(weight.masks ? weight.tiles + weight.sparse_panels[panel].start : panel_tiles(weight, panel)) {
    const int depth = tile_depth(weight.format);
    if (weight.masks) mask_ = weight.masks + static_cast<std::ptrdiff_t>(panel) * (weight.padded_in() / depth) * (depth * kChannels / 64);
}

const std::byte* PanelReader::next(int k) {
    k = std::min(k, weight_.padded_in() - at_);
    const bool as_stored = feed_ == Feed::f32    ? weight_.format == WeightFormat::f32
                           : feed_ == Feed::bf16 ? weight_.format == WeightFormat::bf16
                                                 : weight_.format == WeightFormat::int8;
    const std::byte* tiles = elements_;
    if (as_stored && !weight_.masks) {
        elements_ += static_cast<std::ptrdiff_t>(k) * kChannels * element_bytes(feed_);
    } else {
#if defined(__x86_64__)
        static const bool vbmi2 = cpu().features.avx512_vbmi2;
        if (isa_ >= Isa::avx512 && vbmi2)
            tiles = decode<Vbmi2Decode>(k);
        else if (isa_ >= Isa::avx2)
            tiles = decode<Avx2Decode>(k);
        else
#endif
            tiles = decode<GenericDecode>(k);
    }
    at_ += k;
    return tiles;
}

template <class Level>
const std::byte* PanelReader::decode(int k) {
    switch (weight_.format) {
        case WeightFormat::f16:
            Level::f16(elements_, k, reinterpret_cast<float*>(scratch_));
            elements_ += static_cast<std::ptrdiff_t>(k) * kChannels * 2;
            break;
        case WeightFormat::fp8:
            Level::fp8(elements_, k * kChannels, reinterpret_cast<bf16*>(scratch_));
            elements_ += static_cast<std::ptrdiff_t>(k) * kChannels;
            break;
        case WeightFormat::bf16:
            elements_ += weight_.sparse_panels[panel_].two_of_four ? Level::template sparse_halves<false>(mask_, k / 4, elements_, scratch_)
                                                                   : Level::template sparse_halves<true>(mask_, k / 4, elements_, scratch_);
            mask_ += k / 4;
            break;
        default:
            if (feed_ == Feed::int8) {
                decode_bytes<Level>(k, reinterpret_cast<std::int8_t*>(scratch_));
            } else {
                alignas(64) std::int8_t bytes[kMost / 2 * kChannels + 64];
                const std::int8_t* from = bytes;
                if (weight_.format == WeightFormat::int8 && !weight_.masks) {
                    from = reinterpret_cast<const std::int8_t*>(elements_);
                    elements_ += static_cast<std::ptrdiff_t>(k) * kChannels;
                } else {
                    decode_bytes<Level>(k, bytes);
                }
                Level::widen(from, k, reinterpret_cast<std::uint32_t*>(scratch_));
            }
    }
    return scratch_;
}

template <class Level>
void PanelReader::decode_bytes(int k, std::int8_t* bytes) {
    constexpr int kTile = 64 * kChannels;  // elements of one int8 tile
    switch (weight_.format) {
        case WeightFormat::int8:
            elements_ += Level::sparse_bytes(mask_, k / 4, elements_, reinterpret_cast<std::byte*>(bytes));
            mask_ += k / 4;
            return;
        case WeightFormat::int4:
            for (int tile = 0; tile < k / 128; ++tile, bytes += 2 * kTile) {
                if (!weight_.masks) {
                    Level::nibbles(elements_, kTile, bytes, bytes + kTile);
                    elements_ += kTile;
                    continue;
                }
                int counts[2] = {};
                for (int i = 0; i < 32; ++i) counts[i / 16] += std::popcount(mask_[i]);
                const int taken = std::max(counts[0], counts[1]);
                alignas(64) std::int8_t halves[2][kTile + 64];
                Level::nibbles(elements_, taken, halves[0], halves[1]);
                for (int half = 0; half < 2; ++half)
                    Level::sparse_bytes(mask_ + 16 * half, 16, reinterpret_cast<const std::byte*>(halves[half]),
                                        reinterpret_cast<std::byte*>(bytes + half * kTile));
                elements_ += taken;
                mask_ += 32;
            }
            bytes -= k / 128 * 2 * kTile;
            if (weight_.zeros) Level::sixteenths(bytes, k * kChannels);
            break;
        case WeightFormat::lut4:
            for (int tile = 0; tile < k / 128; ++tile, bytes += 2 * kTile, elements_ += kTile)
                Level::lookup(weight_.codebook, elements_, kTile, bytes, bytes + kTile);
            return;
        case WeightFormat::int3:
        case WeightFormat::int2:
            for (int tile = 0; tile < k / 256; ++tile, elements_ += tile_shape(weight_.format).bytes)
                if (weight_.format == WeightFormat::int3)
                    Level::int3(elements_, bytes + tile * 4 * kTile);
                else
                    Level::int2(elements_, bytes + tile * 4 * kTile);
            break;
        default: break;
    }
    if (weight_.zeros)
        Level::subtract_zeros(panel_zeros(weight_, panel_), weight_.group, scale_groups(weight_), at_, k, bytes);
}

}  // namespace hasten
