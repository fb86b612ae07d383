// Sums run in k order with one rounding each, as in linear_generic.cpp; a zero left out would have added nothing to a finite row.
#include "linear_sparse.hpp"

#if defined(__x86_64__)

#include <cmath>
#include <cstring>

#include "cpu.hpp"
#include "sparse_expand.hpp"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // the headers' undefined vectors (gcc bug 105593)
#endif

namespace hasten {
namespace {

#define AVX2 HASTEN_EXPAND_AVX2
#define VBMI2 HASTEN_EXPAND_VBMI2
#define FLATTEN __attribute__((flatten))
#define UNROLLED HASTEN_UNROLLED

constexpr int kAheadBytes = 4096;  // of elements, prefetched

using Floats = float (*)[kChannels];
using Exacts = std::int32_t (*)[kChannels];

template <class T>
HASTEN_INLINE T load(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

HASTEN_INLINE void prefetch(const std::byte* from) { _mm_prefetch(reinterpret_cast<const char*>(from) + kAheadBytes, _MM_HINT_T0); }

// Into the second-level cache, for the first has too few misses under way at once; see linear_avx512_products.hpp.
HASTEN_INLINE void far_prefetch(const std::byte* from) { _mm_prefetch(reinterpret_cast<const char*>(from) + 2 * kAheadBytes, _MM_HINT_T1); }

// Each adds to the sums of `rows` rows what `lines` lines of 4 k contribute, and returns where the elements after theirs begin.
struct Avx2 {
    static constexpr int kRows = 4, kExactRows = 4;

    template <int rows>
    AVX2 static const std::byte* add_bf16(const std::uint64_t* mask, int lines, const std::byte* from, const bf16* x, std::ptrdiff_t stride, Floats sums) {
        const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
        __m256 total[rows][2];
        for (int r = 0; r < rows; ++r)
            for (int half = 0; half < 2; ++half) total[r][half] = _mm256_loadu_ps(sums[r] + 8 * half);
        for (int line = 0; line < lines; ++line, x += 4) {
            prefetch(from);
            std::size_t taken = 0;
            UNROLLED for (int pair = 0; pair < 2; ++pair) {
                __m256 each[2][rows];
                UNROLLED for (int r = 0; r < rows; ++r) {
                    const __m256i two = _mm256_set1_epi32(load<std::int32_t>(x + r * stride + 2 * pair));
                    each[0][r] = _mm256_castsi256_ps(_mm256_slli_epi32(two, 16)), each[1][r] = _mm256_castsi256_ps(_mm256_and_si256(two, upper));
                }
                UNROLLED for (int odd = 0; odd < 2; ++odd)
                    UNROLLED for (int half = 0; half < 2; ++half) {
                        const __m256 w = _mm256_castsi256_ps(ExpandAvx2::floats(mask[line], 4 * pair + 2 * odd + half, from, taken));
                        UNROLLED for (int r = 0; r < rows; ++r) total[r][half] = _mm256_fmadd_ps(each[odd][r], w, total[r][half]);
                    }
            }
            from += 2 * taken;
        }
        for (int r = 0; r < rows; ++r)
            for (int half = 0; half < 2; ++half) _mm256_storeu_ps(sums[r] + 8 * half, total[r][half]);
        return from;
    }

    // Two elements in every four k: nothing to expand, for each takes its own activation. The lower two bits of a four's mask say which is
    // the first (01 or 11: k 0, 10: k 1, 00: k 2), the upper two which is the second (00: k 1, 01: k 2, 10 or 11: k 3).
    template <int rows>
    AVX2 static const std::byte* add_bf16_pairs(const std::uint64_t* mask, int lines, const std::byte* from, const bf16* x, std::ptrdiff_t stride,
                                                Floats sums) {
        const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000)), shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
        const __m256i firsts = _mm256_set_epi64x(0x0100'8080'0302'8080, 0x0100'8080'0504'8080, 0x0100'8080'0302'8080, 0x0100'8080'0504'8080);
        const __m256i seconds = _mm256_set_epi64x(0x0706'8080'0706'8080, 0x0504'8080'0302'8080, 0x0706'8080'0706'8080, 0x0504'8080'0302'8080);
        __m256 total[rows][2];
        for (int r = 0; r < rows; ++r)
            for (int half = 0; half < 2; ++half) total[r][half] = _mm256_loadu_ps(sums[r] + 8 * half);
        const auto* bits = reinterpret_cast<const std::byte*>(mask);
        for (int line = 0; line < lines; ++line, bits += 8, x += 4, from += 64) {
            prefetch(from);
            __m256i w[2], first[2], second[2];
            for (int half = 0; half < 2; ++half) {
                w[half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * half));
                first[half] = _mm256_srlv_epi32(_mm256_set1_epi32(load<std::int32_t>(bits + 4 * half)), shifts);
                second[half] = _mm256_srli_epi32(first[half], 2);
            }
            for (int r = 0; r < rows; ++r) {
                const __m256i four = _mm256_set1_epi64x(load<std::int64_t>(x + r * stride));
                const __m256 a = _mm256_castsi256_ps(_mm256_shuffle_epi8(four, firsts)), b = _mm256_castsi256_ps(_mm256_shuffle_epi8(four, seconds));
                for (int half = 0; half < 2; ++half) {
                    total[r][half] = _mm256_fmadd_ps(_mm256_permutevar_ps(a, first[half]), _mm256_castsi256_ps(_mm256_slli_epi32(w[half], 16)), total[r][half]);
                    total[r][half] = _mm256_fmadd_ps(_mm256_permutevar_ps(b, second[half]), _mm256_castsi256_ps(_mm256_and_si256(w[half], upper)), total[r][half]);
                }
            }
        }
        for (int r = 0; r < rows; ++r)
            for (int half = 0; half < 2; ++half) _mm256_storeu_ps(sums[r] + 8 * half, total[r][half]);
        return from;
    }

    // |x| · (w with the sign of x) keeps within 16 bits: 2 · 128 · 127, as no weight is -128.
    AVX2 HASTEN_INLINE static __m256i products(__m256i x, __m256i w) { return _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x)); }

    template <int rows>
    AVX2 static const std::byte* add_int8(const std::uint64_t* mask, int lines, const std::byte* from, const std::int8_t* x, std::ptrdiff_t stride, Exacts sums) {
        const __m256i ones = _mm256_set1_epi16(1);
        __m256i total[rows][2];
        for (int r = 0; r < rows; ++r)
            for (int half = 0; half < 2; ++half) total[r][half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums[r] + 8 * half));
        const auto* bits = reinterpret_cast<const std::byte*>(mask);
        for (int line = 0; line < lines; ++line, bits += 8, x += 4) {
            prefetch(from);
            const __m256i low = ExpandAvx2::bytes(bits, from), high = ExpandAvx2::bytes(bits + 4, from);
            for (int r = 0; r < rows; ++r) {
                const __m256i four = _mm256_set1_epi32(load<std::int32_t>(x + r * stride));
                total[r][0] = _mm256_add_epi32(total[r][0], _mm256_madd_epi16(products(four, low), ones));
                total[r][1] = _mm256_add_epi32(total[r][1], _mm256_madd_epi16(products(four, high), ones));
            }
        }
        for (int r = 0; r < rows; ++r)
            for (int half = 0; half < 2; ++half) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums[r] + 8 * half), total[r][half]);
        return from;
    }

    // As add_bf16_pairs, four lines at a time: 0 and 1 in the lower lanes, 2 and 3 in the upper ones. A four's mask chooses from the 16 it may be.
    template <int rows>
    AVX2 static const std::byte* add_int8_pairs(const std::uint64_t* mask, int lines, const std::byte* from, const std::int8_t* x, std::ptrdiff_t stride,
                                                Exacts sums) {
        const __m256i ones = _mm256_set1_epi16(1), nibble = _mm256_set1_epi8(0xf), next = _mm256_set1_epi8(4);
        // The first and the second k of masks 3, 5, 6, 9, 10 and 12; no other comes up.
        const __m128i first = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 2, 0, 0, 0), second = _mm_setr_epi8(0, 0, 0, 1, 0, 2, 2, 0, 0, 3, 3, 0, 3, 0, 0, 0);
        const __m256i upper = _mm256_setr_epi64x(0, 0, 0x0808080808080808, 0x0808080808080808);
        const __m256i firsts = _mm256_add_epi8(_mm256_broadcastsi128_si256(first), upper), seconds = _mm256_add_epi8(_mm256_broadcastsi128_si256(second), upper);
        __m256i total[rows][4];
        for (auto& row : total)
            for (auto& sum : row) sum = _mm256_setzero_si256();
        for (int line = 0; line < lines; line += 4, mask += 4, x += 16, from += 128) {
            prefetch(from), prefetch(from + 64);
            const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask));
            const __m256i even = _mm256_and_si256(bits, nibble), odd = _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble);
            const __m256i chosen[2] = {_mm256_unpacklo_epi8(even, odd), _mm256_unpackhi_epi8(even, odd)};
            for (int r = 0; r < rows; ++r) {
                const __m256i sixteen = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + r * stride)));
                __m256i pairs[2][2];  // of a line, channels 0 to 7, and 8 to 15: sums of two products
                for (int i = 0; i < 2; ++i) {
                    const __m256i a = _mm256_shuffle_epi8(_mm256_shuffle_epi8(sixteen, i ? _mm256_add_epi8(firsts, next) : firsts), chosen[i]);
                    const __m256i b = _mm256_shuffle_epi8(_mm256_shuffle_epi8(sixteen, i ? _mm256_add_epi8(seconds, next) : seconds), chosen[i]);
                    for (int half = 0; half < 2; ++half) {
                        const std::byte* const at = from + 32 * i + 16 * half;
                        const __m256i w = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))),
                                                                  _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 64)), 1);
                        pairs[i][half] = products(half ? _mm256_unpackhi_epi8(a, b) : _mm256_unpacklo_epi8(a, b), w);
                    }
                }
                for (int half = 0; half < 2; ++half) {
                    const __m256i low = _mm256_unpacklo_epi16(pairs[0][half], pairs[1][half]), high = _mm256_unpackhi_epi16(pairs[0][half], pairs[1][half]);
                    total[r][2 * half] = _mm256_add_epi32(total[r][2 * half], _mm256_madd_epi16(low, ones));
                    total[r][2 * half + 1] = _mm256_add_epi32(total[r][2 * half + 1], _mm256_madd_epi16(high, ones));
                }
            }
        }
        for (int r = 0; r < rows; ++r)
            for (int four = 0; four < 4; ++four) {
                auto* const to = reinterpret_cast<__m128i*>(sums[r] + 4 * four);
                const __m128i both = _mm_add_epi32(_mm256_castsi256_si128(total[r][four]), _mm256_extracti128_si256(total[r][four], 1));
                _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), both));
            }
        return from;
    }
};

struct Vbmi2 {
    static constexpr int kRows = 4, kExactRows = 4;
    static constexpr bool kTogether = true;  // two panels of bf16: a row's sum of a channel waits for the one before it
    static constexpr int kHalfTile = 16;     // lines of 4 k of either half of int4

    VBMI2 HASTEN_INLINE static __m512i quad(const std::int8_t* x) { return _mm512_set1_epi32(load<std::int32_t>(x)); }

    template <int rows>
    VBMI2 static const std::byte* add_bf16(const std::uint64_t* mask, int lines, const std::byte* from, const bf16* x, std::ptrdiff_t stride, Floats sums) {
        const std::byte* at[] = {from};
        return add_bf16_of<rows, 1, true>({mask}, lines, at, x, stride, sums), at[0];
    }

    // What the elements of `panels` panels, from at[p] on, add to sums [panels][rows]; moves at[p] on.
    template <int rows, int panels, bool by_k>
    VBMI2 static void add_bf16_of(const std::uint64_t* const (&mask)[panels], int lines, const std::byte* (&at)[panels], const bf16* x, std::ptrdiff_t stride,
                                  Floats sums) {
        const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
        __m512 total[panels][rows];
        UNROLLED for (int p = 0; p < panels; ++p)
            UNROLLED for (int r = 0; r < rows; ++r) total[p][r] = _mm512_loadu_ps(sums[p * rows + r]);
        for (int line = 0; line < lines; ++line, x += 4) {
            __m512i w[panels][2];
            UNROLLED for (int p = 0; p < panels; ++p) {
                far_prefetch(at[p]);
                if constexpr (by_k)
                    ExpandVbmi2::halves_by_k(mask[p][line], at[p], w[p][0], w[p][1]);
                else
                    ExpandVbmi2::halves(mask[p][line], at[p], w[p][0], w[p][1]);
            }
            UNROLLED for (int pair = 0; pair < 2; ++pair)
                UNROLLED for (int odd = 0; odd < 2; ++odd) {
                    __m512 q[panels];
                    UNROLLED for (int p = 0; p < panels; ++p)
                        q[p] = _mm512_castsi512_ps(odd ? _mm512_and_si512(w[p][pair], upper) : _mm512_slli_epi32(w[p][pair], 16));
                    UNROLLED for (int r = 0; r < rows; ++r) {
                        const __m512i two = _mm512_set1_epi32(load<std::int32_t>(x + r * stride + 2 * pair));
                        const __m512 each = _mm512_castsi512_ps(odd ? _mm512_and_si512(two, upper) : _mm512_slli_epi32(two, 16));
                        UNROLLED for (int p = 0; p < panels; ++p) total[p][r] = _mm512_fmadd_ps(each, q[p], total[p][r]);
                    }
                }
        }
        UNROLLED for (int p = 0; p < panels; ++p)
            UNROLLED for (int r = 0; r < rows; ++r) _mm512_storeu_ps(sums[p * rows + r], total[p][r]);
    }

    // Activations + 128, for one side of the product of bytes has no sign; 128 · (sum of the weights) comes off at the end. Sums are exact, so
    // that few rows take theirs in two chains: a product would wait for the one before it. `lines` is even, as those of every group are.
    template <int rows>
    VBMI2 static const std::byte* add_int8(const std::uint64_t* mask, int lines, const std::byte* from, const std::int8_t* x, std::ptrdiff_t stride, Exacts sums) {
        constexpr int chains = rows <= 2 ? 2 : 1;
        const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
        __m512i total[chains][rows], excess[chains];
        UNROLLED for (int c = 0; c < chains; ++c) {
            excess[c] = _mm512_setzero_si512();
            UNROLLED for (int r = 0; r < rows; ++r) total[c][r] = c ? _mm512_setzero_si512() : _mm512_loadu_si512(sums[r]);
        }
        for (int line = 0; line < lines; line += chains, x += 4 * chains)
            UNROLLED for (int c = 0; c < chains; ++c) {
                far_prefetch(from);
                const __m512i w = ExpandVbmi2::bytes(mask[line + c], from);
                excess[c] = _mm512_dpbusd_epi32(excess[c], offset, w);
                UNROLLED for (int r = 0; r < rows; ++r) total[c][r] = _mm512_dpbusd_epi32(total[c][r], _mm512_xor_si512(quad(x + r * stride + 4 * c), offset), w);
            }
        UNROLLED for (int c = 1; c < chains; ++c) {
            excess[0] = _mm512_add_epi32(excess[0], excess[c]);
            UNROLLED for (int r = 0; r < rows; ++r) total[0][r] = _mm512_add_epi32(total[0][r], total[c][r]);
        }
        UNROLLED for (int r = 0; r < rows; ++r) _mm512_storeu_si512(sums[r], _mm512_sub_epi32(total[0][r], excess[0]));
        return from;
    }

    // What `lines` lines of a tile's lower half, and as many of its upper one, add to the sums of either; low and high are where their elements
    // lie, and move on. A weight counts as q + 8, one that is left out too, so that weights have no sign. `lines` is even.
    template <int rows, bool two_of_four>
    VBMI2 HASTEN_INLINE static void add_nibbles(const std::uint64_t* mask, int lines, const std::byte*& low, const std::byte*& high, const std::int8_t* x,
                                                std::ptrdiff_t stride, __m512i (&sums)[2][rows]) {
        const __m512i nibble = _mm512_set1_epi8(0x0f), eights = _mm512_set1_epi8(8);
        for (int line = 0; line < lines; line += 2)
            UNROLLED for (int odd = 0; odd < 2; ++odd, ++mask, x += 4) {
                __m512i w[2];
                far_prefetch(low);
                if constexpr (two_of_four) {  // both move on by as much
                    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
                    w[0] = _mm512_castsi256_si512(both), w[1] = _mm512_castsi256_si512(_mm256_srli_epi16(both, 4));
                    low += 32, high += 32;
                } else {
                    w[0] = _mm512_loadu_si512(low), w[1] = _mm512_srli_epi16(_mm512_loadu_si512(high), 4);
                    low += std::popcount(mask[0]), high += std::popcount(mask[kHalfTile]);
                }
                UNROLLED for (int half = 0; half < 2; ++half) {
                    const __m512i plus_eight = _mm512_xor_si512(_mm512_and_si512(w[half], nibble), eights);
                    w[half] = _mm512_mask_expand_epi8(eights, mask[kHalfTile * half], plus_eight);
                    UNROLLED for (int r = 0; r < rows; ++r)
                        sums[half][r] = _mm512_dpbusd_epi32(sums[half][r], w[half], quad(x + r * stride + 4 * kHalfTile * half));
                }
            }
    }

    // Σ x of k, a multiple of 32.
    VBMI2 static std::int32_t sum_of(const std::int8_t* x, int k) {
        __m256i total = _mm256_setzero_si256();
        for (int i = 0; i < k; i += 32) total = _mm256_dpbusd_epi32(total, _mm256_set1_epi8(1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)));
        return _mm512_reduce_add_epi32(_mm512_zextsi256_si512(total));
    }

    // The groups' sums, scaled and added up, of a panel of int4. A tile at a time, for its halves lie in the same bytes: a group is some tiles, or
    // a half of one, or half of that. A group's sums begin with what `beginnings` [groups][rows] says.
    template <int rows, bool two_of_four>
    VBMI2 static void add_int4(const PackedLinear& weight, int panel, const Activations& x, const std::int32_t* beginnings, Floats totals) {
        constexpr int kTile = 2 * kHalfTile;
        const int lines = weight.padded_in() / 4, groups = scale_groups(weight), per_group = groups > 1 ? weight.group / 4 : lines;
        const std::uint64_t* mask = weight.masks + static_cast<std::ptrdiff_t>(panel) * lines;
        const std::byte *low = weight.tiles + weight.sparse_panels[panel].start, *high = low;
        const std::int8_t* from = static_cast<const std::int8_t*>(x.rows);
        const float* scales = panel_scales(weight, panel);
        __m512 total[rows];
        UNROLLED for (int r = 0; r < rows; ++r) total[r] = _mm512_setzero_ps();
        const auto begin = [&](int group, int r) VBMI2 __attribute__((always_inline)) { return _mm512_set1_epi32(beginnings[group * rows + r]); };
        const auto fold = [&](const __m512i (&sums)[rows], int group) VBMI2 __attribute__((always_inline)) {
            const __m512 scale = _mm512_loadu_ps(scales + group * kChannels);
            UNROLLED for (int r = 0; r < rows; ++r) total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r]), scale, total[r]);
        };
        if (per_group >= kTile) {
            for (int group = 0, line = 0; group < groups; ++group) {
                __m512i sums[2][rows];
                UNROLLED for (int r = 0; r < rows; ++r) sums[0][r] = begin(group, r), sums[1][r] = _mm512_setzero_si512();
                for (const int end = std::min(line + per_group, lines); line < end; line += kTile, mask += kTile, from += 4 * kTile) {
                    add_nibbles<rows, two_of_four>(mask, kHalfTile, low, high, from, x.stride, sums);
                    low = high = std::max(low, high);
                }
                UNROLLED for (int r = 0; r < rows; ++r) sums[0][r] = _mm512_add_epi32(sums[0][r], sums[1][r]);
                fold(sums[0], group);
            }
        } else {
            const int parts = kHalfTile / per_group;  // of a half
            for (int group = 0; group < groups; group += 2 * parts, mask += kTile, from += 4 * kTile) {
                __m512i sums[2][2][rows];
                for (int part = 0; part < parts; ++part) {
                    UNROLLED for (int half = 0; half < 2; ++half)
                        UNROLLED for (int r = 0; r < rows; ++r) sums[part][half][r] = begin(std::min(group + half * parts + part, groups - 1), r);
                    add_nibbles<rows, two_of_four>(mask + part * per_group, per_group, low, high, from + 4 * part * per_group, x.stride, sums[part]);
                }
                low = high = std::max(low, high);
                for (int i = 0; i < std::min(2 * parts, groups - group); ++i) fold(sums[i % parts][i / parts], group + i);  // in k order
            }
        }
        UNROLLED for (int r = 0; r < rows; ++r) _mm512_storeu_ps(totals[r], total[r]);
    }

    // Expanding costs no more than choosing activations.
    template <int rows>
    VBMI2 static const std::byte* add_bf16_pairs(const std::uint64_t* mask, int lines, const std::byte* from, const bf16* x, std::ptrdiff_t stride,
                                                 Floats sums) {
        const std::byte* at[] = {from};
        return add_bf16_of<rows, 1, false>({mask}, lines, at, x, stride, sums), at[0];
    }
    template <int rows>
    VBMI2 static const std::byte* add_int8_pairs(const std::uint64_t* mask, int lines, const std::byte* from, const std::int8_t* x, std::ptrdiff_t stride,
                                                 Exacts sums) {
        return add_int8<rows>(mask, lines, from, x, stride, sums);
    }
};

template <class Level, int rows>
HASTEN_INLINE void product_bf16(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride) {
    const int lines = weight.padded_in() / 4;
    const auto* const from = static_cast<const bf16*>(x.rows);
    const auto mask_of = [&](int panel) { return weight.masks + static_cast<std::ptrdiff_t>(panel) * lines; };
    const auto elements_of = [&](int panel) { return weight.tiles + weight.sparse_panels[panel].start; };
    const auto finish = [&](int panel, Floats sums) __attribute__((always_inline)) {
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < panel_channels(weight, panel); ++c)
                y[r * y_stride + panel * kChannels + c] = sums[r][c] + (bias ? bias[panel * kChannels + c] : 0.0f);
    };
    for (int panel = first; panel < last;) {
        alignas(64) float sums[2 * rows][kChannels] = {};
        const bool fours = weight.sparse_panels[panel].two_of_four;
        if constexpr (requires { Level::kTogether; })
            if (panel + 1 < last && fours == weight.sparse_panels[panel + 1].two_of_four) {
                const std::byte* at[] = {elements_of(panel), elements_of(panel + 1)};
                if (fours)
                    Level::template add_bf16_of<rows, 2, false>({mask_of(panel), mask_of(panel + 1)}, lines, at, from, x.stride, sums);
                else
                    Level::template add_bf16_of<rows, 2, true>({mask_of(panel), mask_of(panel + 1)}, lines, at, from, x.stride, sums);
                finish(panel, sums), finish(panel + 1, sums + rows);
                panel += 2;
                continue;
            }
        if (fours)
            Level::template add_bf16_pairs<rows>(mask_of(panel), lines, elements_of(panel), from, x.stride, sums);
        else
            Level::template add_bf16<rows>(mask_of(panel), lines, elements_of(panel), from, x.stride, sums);
        finish(panel++, sums);
    }
}

HASTEN_INLINE void finish_exact(const PackedLinear& weight, const Activations& x, int rows, int panel, Floats total, const float* bias, float* y,
                                std::ptrdiff_t y_stride) {
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < panel_channels(weight, panel); ++c) {
            const int channel = panel * kChannels + c;
            y[r * y_stride + channel] = bias ? std::fma(total[r][c], x.scales[r], bias[channel]) : total[r][c] * x.scales[r];
        }
}

template <class Level, int rows>
HASTEN_INLINE void product_int8(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride) {
    const int lines = weight.padded_in() / 4, groups = scale_groups(weight), per_group = groups > 1 ? weight.group / 4 : lines;
    for (int panel = first; panel < last; ++panel) {
        alignas(64) float total[rows][kChannels] = {};
        const std::uint64_t* mask = weight.masks + static_cast<std::ptrdiff_t>(panel) * lines;
        const SparsePanel& its = weight.sparse_panels[panel];
        const std::byte* elements = weight.tiles + its.start;
        const float* const scales = panel_scales(weight, panel);
        for (int group = 0, line = 0; group < groups; ++group, line += per_group) {
            alignas(64) std::int32_t sums[rows][kChannels] = {};
            const int count = std::min(per_group, lines - line);
            const std::int8_t* const from = static_cast<const std::int8_t*>(x.rows) + 4 * line;
            if (its.two_of_four)
                elements = Level::template add_int8_pairs<rows>(mask + line, count, elements, from, x.stride, sums);
            else
                elements = Level::template add_int8<rows>(mask + line, count, elements, from, x.stride, sums);
            for (int r = 0; r < rows; ++r)
                for (int c = 0; c < kChannels; ++c) total[r][c] = std::fma(static_cast<float>(sums[r][c]), scales[group * kChannels + c], total[r][c]);
        }
        finish_exact(weight, x, rows, panel, total, bias, y, y_stride);
    }
}

template <class Level, int rows>
HASTEN_INLINE void product_int4(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride) {
    const int k = weight.padded_in(), groups = scale_groups(weight), per_group = groups > 1 ? weight.group : k;
    const auto* const from = static_cast<const std::int8_t*>(x.rows);
    std::int32_t beginnings[kMostIn / 32 * rows];  // [groups][rows]: 8 · (sum of a group's activations) less, for weights count as q + 8
    for (int group = 0; group < groups; ++group)
        for (int r = 0; r < rows; ++r)
            beginnings[group * rows + r] = -8 * Level::sum_of(from + r * x.stride + group * per_group, std::min(per_group, k - group * per_group));
    for (int panel = first; panel < last; ++panel) {
        alignas(64) float total[rows][kChannels];
        if (weight.sparse_panels[panel].two_of_four)
            Level::template add_int4<rows, true>(weight, panel, x, beginnings, total);
        else
            Level::template add_int4<rows, false>(weight, panel, x, beginnings, total);
        finish_exact(weight, x, rows, panel, total, bias, y, y_stride);
    }
}

// One function a number of rows, so that sums stay in registers.
template <class Level>
HASTEN_INLINE bool product(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride) {
    const bool exact = x.scales && (weight.format == WeightFormat::int8 || (weight.format == WeightFormat::int4 && requires { Level::kHalfTile; }));
    if (!weight.masks || !(exact || weight.format == WeightFormat::bf16) || x.count > (exact ? Level::kExactRows : Level::kRows)) return false;
    const auto play = [&]<int rows>() __attribute__((always_inline)) {
        if constexpr (rows <= Level::kExactRows)
            if (exact) {
                if constexpr (requires { Level::kHalfTile; })
                    if (weight.format == WeightFormat::int4) return product_int4<Level, rows>(weight, x, first, last, bias, y, y_stride);
                return product_int8<Level, rows>(weight, x, first, last, bias, y, y_stride);
            }
        if constexpr (rows <= Level::kRows) product_bf16<Level, rows>(weight, x, first, last, bias, y, y_stride);
    };
    switch (x.count) {
        case 1: return play.template operator()<1>(), true;
        case 2: return play.template operator()<2>(), true;
        case 3: return play.template operator()<3>(), true;
        case 4: return play.template operator()<4>(), true;
        default: return false;
    }
}

}  // namespace

AVX2 FLATTEN bool linear_sparse_avx2(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y,
                                     std::ptrdiff_t y_stride) {
    return product<Avx2>(weight, x, first, last, bias, y, y_stride);
}

VBMI2 FLATTEN static bool linear_sparse_vbmi2(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y,
                                       std::ptrdiff_t y_stride) {
    return product<Vbmi2>(weight, x, first, last, bias, y, y_stride);
}

bool linear_sparse_avx512(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride) {
    static const bool vbmi2 = cpu().features.avx512_vbmi2;
    return vbmi2 && linear_sparse_vbmi2(weight, x, first, last, bias, y, y_stride);
}

}  // namespace hasten

#endif
