// What linear layers at AVX-512 multiply: one struct for each pairing of weights and activations. linear_avx512.cpp blocks them.
#pragma once

#include <cstring>

#include "linear.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")))
#define AVX512_INLINE AVX512 inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")  // early, or sums in arrays would go through memory

namespace hasten {
namespace {

// Weights are prefetched: for few rows far ahead and into the second-level cache, for the first has too few misses under way at once.
constexpr int kAheadBytes = 4096, kFarAheadBytes = 8192;

AVX512_INLINE __m512i words(const std::byte* at) { return _mm512_loadu_si512(at); }
constexpr int kMany = 16;  // rows, for what is done once for all

template <int rows>
AVX512_INLINE void ahead(const std::byte* at) {
    if constexpr (rows <= 4)
        _mm_prefetch(reinterpret_cast<const char*>(at) + kFarAheadBytes, _MM_HINT_T1);
    else
        _mm_prefetch(reinterpret_cast<const char*>(at) + kAheadBytes, _MM_HINT_T0);
}

// Weights that blocks of bytes ask for while they multiply others: where several blocks of rows multiply the same weights, those of the next
// stretch, or memory would be read by the first block alone and wait while the others multiply what it left in the caches.
struct Coming {
    const std::byte* line;     // of the first of two panels
    std::ptrdiff_t to_second;  // bytes to the second's
    int every, wait;           // steps from one line to the next, and till the next

    template <int panels>
    AVX512_INLINE void step() {
        if (--wait) return;
        wait = every;
        _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1);
        if (panels == 2) _mm_prefetch(reinterpret_cast<const char*>(line + to_second), _MM_HINT_T1);
        line += 64;
    }
};

constexpr int kQuad = 4;  // k that a product of bytes takes in a step
AVX512_INLINE __m512i quad(const std::int8_t* x) {
    std::int32_t bits;
    std::memcpy(&bits, x, sizeof bits);
    return _mm512_set1_epi32(bits);
}

AVX512_INLINE __m512 load(const float* at) { return _mm512_loadu_ps(at); }
AVX512_INLINE __m512i load(const std::int32_t* at) { return _mm512_loadu_si512(at); }
AVX512_INLINE void store(float* at, __m512 value) { _mm512_storeu_ps(at, value); }
AVX512_INLINE void store(std::int32_t* at, __m512i value) { _mm512_storeu_si512(at, value); }

// Σ x of `k` of one row.
AVX512 inline std::int32_t sum_of(const std::int8_t* x, int k) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i total = _mm512_setzero_si512();
    for (int i = 0; i < k; i += 64) {
        const __mmask64 run = k - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (k - i)) - 1;
        total = _mm512_dpbusd_epi32(total, ones, _mm512_maskz_loadu_epi8(run, x + i));
    }
    return _mm512_reduce_add_epi32(total);
}

// y of one row and panel = total · its scale + bias.
AVX512_INLINE void finish_exact(const PackedLinear& weight, int panel, __m512 total, float scale, const float* bias, float* y) {
    const auto real = static_cast<__mmask16>((1u << panel_channels(weight, panel)) - 1);
    const __m512 by = _mm512_set1_ps(scale);
    y += panel * kChannels;
    _mm512_mask_storeu_ps(y, real, bias ? _mm512_fmadd_ps(total, by, _mm512_maskz_loadu_ps(real, bias + panel * kChannels)) : _mm512_mul_ps(total, by));
}

// Sums of a register block: `panels` panels of 16 channels with `rows` rows of activations.
template <class Sum, int rows, int panels>
struct Block;
template <int rows, int panels>
struct Block<float, rows, panels> {
    __m512 at[panels][rows];
};
template <int rows, int panels>
struct Block<std::int32_t, rows, panels> {
    __m512i at[panels][rows];
};

// A block whose sums are exact, and so may be taken in several chains that are added at the end: with few sums, or a product
// would wait for the one before it.
template <int rows, int panels>
struct Chains {
    static constexpr int count = rows * panels <= 4 ? 4 : 1;
    Block<std::int32_t, rows, panels> block[count];

    AVX512_INLINE explicit Chains(const Block<std::int32_t, rows, panels>& first) {
        block[0] = first;
        UNROLLED for (int c = 1; c < count; ++c)
            UNROLLED for (int p = 0; p < panels; ++p)
                UNROLLED for (int r = 0; r < rows; ++r) block[c].at[p][r] = _mm512_setzero_si512();
    }
    AVX512_INLINE __m512i& at(int chain, int p, int r) { return block[chain % count].at[p][r]; }
    AVX512_INLINE Block<std::int32_t, rows, panels> sum() const {
        Block<std::int32_t, rows, panels> total = block[0];
        UNROLLED for (int c = 1; c < count; ++c)
            UNROLLED for (int p = 0; p < panels; ++p)
                UNROLLED for (int r = 0; r < rows; ++r) total.at[p][r] = _mm512_add_epi32(total.at[p][r], block[c].at[p][r]);
        return total;
    }
};

// What a product multiplies: X, activations as widened, kStretch k of each row apart; Sum, what sums are; add(), what `k` of some rows
// contribute to a block, with weights as PanelReader gives them, as expand() makes them (W), or, where there is nothing to decode them in,
// as they lie (`at` is where in the panel the k begin); of bytes, asking for what is coming meanwhile. kExcess, of products of bytes, whose one side has no sign: what weights have too much.

// Products with float32: of every line of 64 bytes, Weight::widened<j> is k j of all channels.
template <class Weight, int rows, int panels>
AVX512_INLINE void add_floats(const std::byte* const (&tiles)[panels], int k, const float* x, Block<float, rows, panels>& total) {
    const std::byte* w[panels];
    UNROLLED for (int p = 0; p < panels; ++p) w[p] = tiles[p];
    for (int i = 0; i < k; i += Weight::kPerLine, x += Weight::kPerLine) {
        __m512i line[panels];
        UNROLLED for (int p = 0; p < panels; ++p) ahead<rows>(w[p]), line[p] = words(w[p]), w[p] += 64;
        const auto one = [&]<int j>() AVX512 __attribute__((always_inline)) {
            __m512 q[panels];
            UNROLLED for (int p = 0; p < panels; ++p) q[p] = Weight::template widened<j>(line[p]);
            UNROLLED for (int r = 0; r < rows; ++r)
                UNROLLED for (int p = 0; p < panels; ++p)
                    total.at[p][r] = _mm512_fmadd_ps(_mm512_set1_ps(x[r * Weight::kStretch + j]), q[p], total.at[p][r]);
        };
        one.template operator()<0>();
        if constexpr (Weight::kPerLine > 1) one.template operator()<1>();
        if constexpr (Weight::kPerLine > 2) one.template operator()<2>(), one.template operator()<3>();
    }
}

// Rows of bf16 as float32.
AVX512_INLINE void widen_bf16(const void* row, int at, int k, float* to) {
    const bf16* const from = static_cast<const bf16*>(row) + at;
    for (int i = 0; i < k; i += 16)
        store(to + i, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))), 16)));
}

struct F32 {
    using X = float;
    using Sum = float;
    static constexpr Feed kFeed = Feed::f32;
    static constexpr int kStretch = 256, kPerLine = 1;

    AVX512 static void widen(const void* row, int at, int k, X* to) { std::memcpy(to, static_cast<const float*>(row) + at, static_cast<std::size_t>(k) * sizeof(X)); }

    template <int>
    AVX512_INLINE static __m512 widened(__m512i line) { return _mm512_castsi512_ps(line); }

    template <int rows, int panels>
    AVX512_INLINE static void add(const std::byte* const (&tiles)[panels], int, int k, const X* x, Block<float, rows, panels>& total) {
        add_floats<F32>(tiles, k, x, total);
    }
};

struct Bf16 {
    using X = float;
    using Sum = float;
    static constexpr Feed kFeed = Feed::bf16;
    static constexpr int kStretch = 256, kPerLine = 2;

    AVX512 static void widen(const void* row, int at, int k, X* to) { widen_bf16(row, at, k, to); }

    template <int j>
    AVX512_INLINE static __m512 widened(__m512i line) {
        return _mm512_castsi512_ps(j ? _mm512_and_si512(line, _mm512_set1_epi32(static_cast<int>(0xffff0000))) : _mm512_slli_epi32(line, 16));
    }

    template <int rows, int panels>
    AVX512_INLINE static void add(const std::byte* const (&tiles)[panels], int, int k, const X* x, Block<float, rows, panels>& total) {
        add_floats<Bf16>(tiles, k, x, total);
    }
};

// Bytes with activations in bf16, widened in registers.
struct Int8Bf16 {
    using X = float;
    using Sum = float;
    static constexpr Feed kFeed = Feed::bf16;
    static constexpr int kStretch = 256, kPerLine = 4;

    AVX512 static void widen(const void* row, int at, int k, X* to) { widen_bf16(row, at, k, to); }

    // Byte j of each channel's four.
    template <int j>
    AVX512_INLINE static __m512 widened(__m512i line) { return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(line, 24 - 8 * j), 24)); }

    template <int rows, int panels>
    AVX512_INLINE static void add(const std::byte* const (&panel)[panels], int at, int k, const X* x, Block<float, rows, panels>& total) {
        const std::byte* tiles[panels];
        UNROLLED for (int p = 0; p < panels; ++p) tiles[p] = panel[p] + static_cast<std::ptrdiff_t>(at) * kChannels;
        add_floats<Int8Bf16>(tiles, k, x, total);
    }

    // One float32 of each channel and k.
    AVX512 static void expand(const std::byte* panel, int at, int k, float* to) {
        const std::byte* w = panel + static_cast<std::ptrdiff_t>(at) * kChannels;
        for (int i = 0; i < k; i += 4, w += 64, to += 4 * kChannels) {
            ahead<kMany>(w);
            const __m512i line = words(w);
            store(to, widened<0>(line)), store(to + kChannels, widened<1>(line));
            store(to + 2 * kChannels, widened<2>(line)), store(to + 3 * kChannels, widened<3>(line));
        }
    }
};

// Where in a panel of nibbles 32 k lie, of which the first is k `at`: 8 lines, in the lower or the upper halves of their bytes.
constexpr int kNibbleUnit = 32;
struct NibbleUnit {
    const std::byte* lines;
    bool upper;

    NibbleUnit(const std::byte* panel, int at)
        : lines(panel + at / 128 * kTileBytes + at / kNibbleUnit % 2 * (kTileBytes / 2)), upper(at / kNibbleUnit & 2) {}
};

// Nibbles with activations in bf16, widened in registers.
struct Int4Bf16 {
    using X = float;
    using Sum = float;
    static constexpr Feed kFeed = Feed::bf16;
    static constexpr int kStretch = 256;

    AVX512 static void widen(const void* row, int at, int k, X* to) { widen_bf16(row, at, k, to); }

    template <int shift>
    struct Unit {
        static constexpr int kStretch = Int4Bf16::kStretch, kPerLine = 4;

        template <int j>
        AVX512_INLINE static __m512 widened(__m512i line) {
            return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(line, 28 - shift - 8 * j), 28));
        }
    };

    template <int rows, int panels>
    AVX512_INLINE static void add(const std::byte* const (&panel)[panels], int at, int k, const X* x, Block<float, rows, panels>& total) {
        for (int i = 0; i < k; i += kNibbleUnit, x += kNibbleUnit) {
            const std::byte* lines[panels];
            UNROLLED for (int p = 0; p < panels; ++p) lines[p] = NibbleUnit(panel[p], at + i).lines;
            if (NibbleUnit(panel[0], at + i).upper)
                add_floats<Unit<4>>(lines, kNibbleUnit, x, total);
            else
                add_floats<Unit<0>>(lines, kNibbleUnit, x, total);
        }
    }

    AVX512 static void expand(const std::byte* panel, int at, int k, float* to) {
        for (int i = 0; i < k; i += kNibbleUnit, to += kNibbleUnit * kChannels) {
            const NibbleUnit unit(panel, at + i);
            if (unit.upper)
                expand_unit<4>(unit.lines, to);
            else
                expand_unit<0>(unit.lines, to);
        }
    }

   private:
    template <int shift>
    AVX512 static void expand_unit(const std::byte* w, float* to) {
        for (int i = 0; i < kNibbleUnit; i += 4, w += 64, to += 4 * kChannels) {
            if (shift == 0) ahead<kMany>(w);
            const __m512i line = words(w);
            using Its = Unit<shift>;
            store(to, Its::template widened<0>(line)), store(to + kChannels, Its::template widened<1>(line));
            store(to + 2 * kChannels, Its::template widened<2>(line)), store(to + 3 * kChannels, Its::template widened<3>(line));
        }
    }
};

// The products of Weight, for more rows: a stretch of weights is expanded to float32 once.
template <class Weight>
struct Expanded {
    using X = float;
    using W = float;
    using Sum = float;
    static constexpr Feed kFeed = Feed::bf16;
    static constexpr int kStretch = Weight::kStretch;

    AVX512 static void widen(const void* row, int at, int k, X* to) { widen_bf16(row, at, k, to); }
    AVX512 static void expand(const std::byte* panel, int at, int k, W* to) { Weight::expand(panel, at, k, to); }

    template <int rows, int panels>
    AVX512_INLINE static void add(const std::byte* const (&tiles)[panels], int, int k, const X* x, Block<float, rows, panels>& total) {
        add_floats<F32>(tiles, k, x, total);
    }
};
static_assert(F32::kStretch == Int8Bf16::kStretch && F32::kStretch == Int4Bf16::kStretch);

// Rows of bytes, as they are.
AVX512_INLINE void copy_bytes(const void* row, int at, int k, std::int8_t* to) {
    std::memcpy(to, static_cast<const std::int8_t*>(row) + at, static_cast<std::size_t>(k));
}

// Lines of bytes, of which flip() makes numbers without a sign; `k` is a multiple of 32.
template <class Weight, int rows, int panels>
AVX512_INLINE void add_bytes(const std::byte* const (&tiles)[panels], int k, const std::int8_t* x, Block<std::int32_t, rows, panels>& total, Coming& coming) {
    constexpr int kLines = Chains<rows, panels>::count;
    Chains<rows, panels> sums(total);
    const std::byte* w[panels];
    UNROLLED for (int p = 0; p < panels; ++p) w[p] = tiles[p];
    for (int i = 0; i < k; i += 4 * kLines)
        UNROLLED for (int line = 0; line < kLines; ++line, x += 4) {
            if constexpr (rows <= 4)
                UNROLLED for (int p = 0; p < panels; ++p) ahead<rows>(w[p]);
            else
                coming.step<panels>();
            __m512i q[panels];
            UNROLLED for (int p = 0; p < panels; ++p) q[p] = Weight::flip(words(w[p])), w[p] += 64;
            UNROLLED for (int r = 0; r < rows; ++r)
                UNROLLED for (int p = 0; p < panels; ++p) sums.at(line, p, r) = _mm512_dpbusd_epi32(sums.at(line, p, r), q[p], quad(x + r * Weight::kStretch));
        }
    total = sums.sum();
}

struct Int8 {
    using X = std::int8_t;
    using Sum = std::int32_t;
    static constexpr Feed kFeed = Feed::int8;
    static constexpr int kStretch = 1024, kExcess = 128;

    AVX512 static void widen(const void* row, int at, int k, X* to) { copy_bytes(row, at, k, to); }
    AVX512_INLINE static __m512i flip(__m512i line) { return _mm512_xor_si512(line, _mm512_set1_epi8(static_cast<char>(0x80))); }

    template <int rows, int panels>
    AVX512_INLINE static void add(const std::byte* const (&tiles)[panels], int, int k, const X* x, Block<std::int32_t, rows, panels>& total, Coming& coming) {
        add_bytes<Int8>(tiles, k, x, total, coming);
    }
};

template <bool upper>
AVX512_INLINE __m512i half_bytes(__m512i both) {
    return _mm512_and_si512(upper ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(0x0f));
}

// Nibbles as q + 8.
struct PlusEight {
    static constexpr int kExcess = 8;
    template <bool upper>
    AVX512_INLINE __m512i of(__m512i both) const { return half_bytes<upper>(_mm512_xor_si512(both, _mm512_set1_epi8(static_cast<char>(0x88)))); }
};

// Int4: a stretch of nibbles is taken apart once, to bytes of q + 8.
struct Int4Expanded {
    using X = std::int8_t;
    using W = std::uint8_t;
    using Sum = std::int32_t;
    static constexpr Feed kFeed = Feed::int8;
    static constexpr int kStretch = 1024, kExcess = PlusEight::kExcess;

    AVX512 static void widen(const void* row, int at, int k, X* to) { copy_bytes(row, at, k, to); }
    AVX512_INLINE static __m512i flip(__m512i line) { return line; }

    // Quadruples of k for each channel, as bytes lie.
    AVX512 static void expand(const std::byte* panel, int at, int k, W* to) {
        const PlusEight meaning;
        for (int i = 0; i < k; i += kNibbleUnit) {
            const NibbleUnit unit(panel, at + i);
            for (int j = 0; j < kTileBytes / 2; j += 64, to += 64) {
                const __m512i both = words(unit.lines + j);
                _mm512_storeu_si512(to, unit.upper ? meaning.of<true>(both) : meaning.of<false>(both));
            }
        }
    }

    template <int rows, int panels>
    AVX512_INLINE static void add(const std::byte* const (&tiles)[panels], int, int k, const X* x, Block<std::int32_t, rows, panels>& total, Coming& coming) {
        add_bytes<Int4Expanded>(tiles, k, x, total, coming);
    }
};

}  // namespace
}  // namespace hasten

#endif
