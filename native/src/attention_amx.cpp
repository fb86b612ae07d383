// Attention over a paged cache with AMX tiles of bf16: queries and softmax weights are rounded to bf16, sums are float32.
//
// 16 pairs (a query row and one of its heads) fill a tile's columns. Scores are K·Qᵀ, so that tiles of keys are read as they lie in
// the cache and a lane of the softmax is a pair; mixing is P·V with pairs of tokens interleaved. Every element of a tile product is one
// chain over k, whatever stands beside it, so fewer than 16 pairs are padded and give the same bits.
#include <cstddef>
#include <cstdint>

#include "attention.hpp"
#include "decoder_levels.hpp"

#if defined(__x86_64__)
// GCC 12 takes the undefined operand of many intrinsics for a mistake (GCC bug 105593), and lambdas' thunks, never called, for an ABI's.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,amx-tile,amx-bf16")
#define HASTEN_LEVEL level_amx
#define HASTEN_AVX512
#pragma GCC diagnostic ignored "-Wunused-function"
#include "decoder_vector.hpp"
#include "cache_vector.hpp"

namespace hasten::HASTEN_LEVEL {
namespace {

constexpr int kPairs = 16;  // pairs of a tile

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// What a tile of 16 pairs carries from block to block; lanes beyond its pairs have begin = end = 0.
struct Pairs {
    float *maxima, *sums, *mixed;  // [16], [16], [16, stride]
    const bf16* queries;           // [key_dim / 32][16 words][16 pairs] of two features each
};

// 16 float32 rows of up to 32 features → 16 words of two bf16 features, a lane a pair.
INLINE void pack_queries(const float* const (&rows)[kPairs], int d, int dim, bf16* packed) {
    __m512i words[16];
    const int left = lesser(dim - d, 32);
#pragma GCC unroll 16
    for (int i = 0; i < kPairs; ++i) {
        if (!rows[i]) {
            words[i] = _mm512_setzero_si512();
            continue;
        }
        const __m512 low = V::load_some(rows[i] + d, lesser(left, 16)),
                     high = left > 16 ? V::load_some(rows[i] + d + 16, left - 16) : V::set(0.0f);
        words[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }
    transpose(words);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(packed + 32 * i, words[i]);
}

// Elements [d, d + n) of a row as bf16, n ≤ 32, zeros behind: int8 and fp8 fit in bf16 as they are.
template <class E>
INLINE __m512i as_bf16(const std::byte* row, int d, int n) {
    if constexpr (E::bytes == sizeof(bf16)) {
        return n >= 32 ? _mm512_loadu_si512(halves(row) + d) : _mm512_maskz_loadu_epi16((1u << n) - 1, halves(row) + d);
    } else {
        const F low = n >= 16 ? E::load(row, d) : E::load_some(row, d, n);
        const F high = n >= 32 ? E::load(row, d + 16) : n > 16 ? E::load_some(row, d + 16, n - 16) : V::set(0.0f);
        return (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }
}

// interleaved[f / 16][t / 2][f % 16] = values f of tokens t and t + 1, zero for tokens that nobody sees.
template <class E>
void interleave_values(const BlockRows& found, const KeyBlock& block, int dim, const Ahead& ahead, bf16* interleaved) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3,
                                         34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_or_si512(low, _mm512_set1_epi16(16));
    const auto put = [&](bf16* to, __m512i even, __m512i odd, bool both) __attribute__((always_inline)) {
        _mm512_store_si512(to, _mm512_permutex2var_epi16(even, low, odd));
        if (both) _mm512_store_si512(to + 16 * kKeyBlock, _mm512_permutex2var_epi16(even, high, odd));
    };
    const int left = dim % 32;
    for (int t = 0; t < kKeyBlock; t += 2) {
        if (t % 4 == 0) ahead.ask(t / 4, t / 4 + 1);
        bf16* to = interleaved + 16 * t;
        const bool even_seen = t >= block.low && t < block.high, odd_seen = t + 1 >= block.low && t + 1 < block.high;
        const __m512i nothing = _mm512_setzero_si512();
        const std::byte *even = found.values[t], *odd = found.values[t + 1];
        if (even_seen && odd_seen)
            for (int f = 0; f + 32 <= dim; f += 32, to += 2 * 16 * kKeyBlock)
                put(to, as_bf16<E>(even, f, 32), as_bf16<E>(odd, f, 32), true);
        else
            for (int f = 0; f + 32 <= dim; f += 32, to += 2 * 16 * kKeyBlock)
                put(to, even_seen ? as_bf16<E>(even, f, 32) : nothing, odd_seen ? as_bf16<E>(odd, f, 32) : nothing, true);
        if (left)
            put(to, even_seen ? as_bf16<E>(even, dim - left, left) : nothing, odd_seen ? as_bf16<E>(odd, dim - left, left) : nothing,
                left > 16);
    }
}

// Rows of 16 keys each, `stride` bytes apart, for the tile products: in the cache where they can be read there, else in `copy`.
struct KeyTiles {
    const std::byte* rows[4];
    std::ptrdiff_t stride;
};

template <CacheFormat format>
KeyTiles key_tiles(const BlockRows& found, const KeyBlock& block, int page, int dim, bf16* copy) {
    if (format == CacheFormat::bf16 && dim % 32 == 0 && page % 16 == 0) {
        KeyTiles keys{{}, static_cast<std::ptrdiff_t>(dim * sizeof(bf16))};
        for (int i = 0; i < 4; ++i) {  // 16 of which nobody sees any may be any others: their scores are masked
            const int seen = lesser(greater(16 * i, block.low), block.high - 1);
            keys.rows[i] = found.keys[seen] - static_cast<std::ptrdiff_t>(seen % 16) * keys.stride;
        }
        return keys;
    }
    const int padded = up_to_multiple(dim, 32);
    for (int t = 0; t < kKeyBlock; ++t)
        for (int d = 0; d < padded; d += 32)
            _mm512_store_si512(copy + t * padded + d, as_bf16<Elements<format>>(found.keys[t], d, lesser(dim - d, 32)));
    KeyTiles keys{{}, static_cast<std::ptrdiff_t>(padded * sizeof(bf16))};
    for (int i = 0; i < 4; ++i) keys.rows[i] = reinterpret_cast<const std::byte*>(copy + i * 16 * padded);
    return keys;
}

// Keys where tiles can read them, values interleaved, of any format.
template <CacheFormat format>
KeyTiles prepare(const BlockRows& found, const KeyBlock& block, const AttendShape& shape, int page, const Ahead& ahead, bf16* copy,
                 bf16* values) {
    interleave_values<Elements<format>>(found, block, shape.value_dim, ahead, values);
    return key_tiles<format>(found, block, page, shape.key_dim, copy);
}

KeyTiles prepare(const PagedLayer& layer, const BlockRows& found, const KeyBlock& block, const AttendShape& shape, const Ahead& ahead,
                 bf16* copy, bf16* values) {
    switch (layer.format) {
        case CacheFormat::int8:
            return prepare<CacheFormat::int8>(found, block, shape, layer.page, ahead, copy, values);
        case CacheFormat::fp8:
            return prepare<CacheFormat::fp8>(found, block, shape, layer.page, ahead, copy, values);
        default:
            return prepare<CacheFormat::bf16>(found, block, shape, layer.page, ahead, copy, values);
    }
}

// scores[t · 16 + pair] of a block's 64 keys.
INLINE void score(const KeyTiles& keys, const bf16* queries, int dim, float* scores) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int d = 0; d < dim; d += 32) {
        const std::ptrdiff_t at = d * static_cast<std::ptrdiff_t>(sizeof(bf16));
        _tile_loadd(6, queries + 16 * d, 64);
        _tile_loadd(4, keys.rows[0] + at, keys.stride);
        _tile_loadd(5, keys.rows[1] + at, keys.stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(4, keys.rows[2] + at, keys.stride);
        _tile_loadd(5, keys.rows[3] + at, keys.stride);
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 5, 6);
    }
    _tile_stored(0, scores, 64);
    _tile_stored(1, scores + 256, 64);
    _tile_stored(2, scores + 512, 64);
    _tile_stored(3, scores + 768, 64);
}

// Two tokens' weights as words of two bf16, a lane a pair.
INLINE __m512i rounded_pair(F even, F odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                           18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// Scores → weights [2][16 pairs][32 tokens] in bf16, exactly zero where a pair does not see a key; new maxima and sums of the lanes in
// `active`, and the factors that what they summed before has to be faded by. With scales, a key's is taken to its scores, a value's to its
// weights, behind the sums.
template <bool masked>
INLINE void soften(const AttendShape& shape, const BlockScales* scales, F slopes, F to_query, __m512i low, __m512i high, __mmask16 active,
                   float* scores, Pairs& pairs, const Ahead& ahead, bf16* weights, float* fades) {
    const F nothing = V::set(-__builtin_inff());
    F most[4] = {nothing, nothing, nothing, nothing};
    for (int t = 0; t < kKeyBlock; t += 4) {
        ahead.ask(16 + t / 4, 17 + t / 4);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            F x = V::load(scores + (t + i) * kPairs);
            if (scales) x = V::mul(x, V::set(scales->keys[t + i]));
            x = V::mul(x, V::set(shape.scale));
            if (shape.softcap > 0) x = V::mul(V::set(shape.softcap), tanh(V::div(x, V::set(shape.softcap))));
            if (shape.slopes) x = V::fma(slopes, V::sub(V::set(static_cast<float>(t + i)), to_query), x);
            if constexpr (masked) {
                const __m512i key = _mm512_set1_epi32(t + i);
                x = _mm512_mask_mov_ps(nothing, _mm512_cmpge_epi32_mask(key, low) & _mm512_cmplt_epi32_mask(key, high), x);
            }
            V::store(scores + (t + i) * kPairs, x);
            most[i] = V::max(most[i], x);
        }
    }
    const F before = V::load(pairs.maxima);
    const F block = V::max(V::max(most[0], most[1]), V::max(most[2], most[3]));
    const F top = _mm512_mask_mov_ps(before, active, V::max(block, before));
    // Lanes that see nothing have no maximum: exp(−∞ − 0) is zero all the same.
    const F base = masked ? _mm512_mask_mov_ps(V::set(0.0f), active, top) : top;
    F sums[4] = {V::set(0.0f), V::set(0.0f), V::set(0.0f), V::set(0.0f)};
    for (int half = 0; half < 2; ++half) {
        __m512i words[16];
#pragma GCC unroll 8
        for (int i = 0; i < 16; i += 2) {
            const float* from = scores + (32 * half + 2 * i) * kPairs;
            ahead.ask(32 + 8 * half + i / 2, 33 + 8 * half + i / 2);
            F w[4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
                w[k] = exp(V::sub(V::load(from + k * kPairs), base));
                sums[k] = V::add(sums[k], w[k]);
                if (scales) w[k] = V::mul(w[k], V::set(scales->values[32 * half + 2 * i + k]));
            }
            words[i] = rounded_pair(w[0], w[1]);
            words[i + 1] = rounded_pair(w[2], w[3]);
        }
        transpose(words);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_store_si512(weights + (16 * half + i) * 32, words[i]);
    }
    const F fade = exp(V::sub(before, base)), old = V::load(pairs.sums);
    const F sum = V::fma(old, fade, V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
    V::store(pairs.maxima, top);
    V::store(pairs.sums, _mm512_mask_mov_ps(old, active, sum));
    V::store(fades, fade);
}

// mixed = mixed · fade + weights · values, for the pairs [begin, end) of a tile.
INLINE void mix(const bf16* weights, const float* fades, const bf16* values, int begin, int end, int stride, const Ahead& ahead,
                float* fresh, float* mixed) {
    constexpr int tile = 16 * kKeyBlock;  // a run of 16 features of the block's tokens: two tiles of 32 tokens
    _tile_loadd(4, weights, 64);
    _tile_loadd(5, weights + 512, 64);
    const std::ptrdiff_t bytes = stride * static_cast<std::ptrdiff_t>(sizeof(float));
    int f = 0;
    for (; f + 32 <= stride; f += 32, values += 2 * tile) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_loadd(6, values, 64);
        _tile_loadd(7, values + tile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, values + 512, 64);
        _tile_loadd(7, values + tile + 512, 64);
        _tile_dpbf16ps(0, 5, 6);
        _tile_dpbf16ps(1, 5, 7);
        _tile_stored(0, fresh + f, bytes);
        _tile_stored(1, fresh + f + 16, bytes);
    }
    if (f < stride) {
        _tile_zero(0);
        _tile_loadd(6, values, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, values + 512, 64);
        _tile_dpbf16ps(0, 5, 7);
        _tile_stored(0, fresh + f, bytes);
    }
    for (int pair = begin; pair < end; ++pair) {
        const F fade = V::set(fades[pair]);
        ahead.ask(48 + pair, pair + 1 < end ? 49 + pair : 64);
        for (f = 0; f < stride; f += 16) {
            float* at = mixed + pair * stride + f;
            V::store(at, V::fma(V::load(at), fade, V::load(fresh + pair * stride + f)));
        }
    }
}

}  // namespace

void attend(const AttendShape& shape, const PagedLayer& layer, const std::int32_t* table, const float* q, int first, int last, int position,
            int kv_head, float* y, float* scratch) {
    const int group = shape.heads / shape.kv_heads, together = rows_together(shape, last - first);
    const int tiles = (together * group + kPairs - 1) / kPairs, key_dim = up_to_multiple(shape.key_dim, 32);
    const int stride = up_to_multiple(shape.value_dim, 16);
    Scratch pieces(scratch);
    const auto size = [](int a, int b) { return static_cast<std::size_t>(a) * static_cast<std::size_t>(b); };
    bf16* queries = pieces.take<bf16>(size(tiles * kPairs, key_dim));
    bf16* copy = pieces.take<bf16>(size(kKeyBlock, key_dim));
    bf16* values = pieces.take<bf16>(size(kKeyBlock, stride));
    bf16* weights = pieces.take<bf16>(size(kKeyBlock, kPairs));
    float* scores = pieces.take(size(kKeyBlock, kPairs));
    float* fresh = pieces.take(size(kPairs, stride));
    float* mixed = pieces.take(size(tiles * kPairs, stride));
    float* maxima = pieces.take(size(tiles, kPairs));
    float* sums = pieces.take(size(tiles, kPairs));
    float* fades = pieces.take(kPairs);
    BlockScales wide;
    const TileConfig config;
    _tile_loadconfig(&config);

    for (int row = first; row < last; row += together) {
        const int count = lesser(together, last - row), at = position + row, pairs = count * group;
        for (int pair = 0; pair < pairs; pair += kPairs) {
            const float* rows[kPairs];
            for (int i = 0; i < kPairs; ++i) {
                const int head = kv_head * group + (pair + i) % group;
                rows[i] = pair + i < pairs
                              ? q + (static_cast<std::ptrdiff_t>(row + (pair + i) / group) * shape.heads + head) * shape.key_dim
                              : nullptr;
                maxima[pair + i] =
                    shape.sinks && rows[i] ? shape.sinks[head] : -__builtin_inff();  // a sink: a score before the first key, of no value
                sums[pair + i] = shape.sinks ? 1.0f : 0.0f;
            }
            for (int d = 0; d < key_dim; d += 32) pack_queries(rows, d, shape.key_dim, queries + size(pair, key_dim) + 16 * d);
        }
        for (int i = 0; i < up_to_multiple(pairs, kPairs) * stride; i += V::width) V::store(mixed + i, V::set(0.0f));

        for (Blocks blocks(shape, layer, table, kv_head, at, count); blocks.more(); blocks.next()) {
            const KeyBlock& block = blocks.block();
            const BlockRows& found = blocks.rows();
            Ahead ahead = blocks.ahead();
            const BlockScales* scales = widened(blocks.scales(), wide);
            const KeyTiles keys = prepare(layer, found, block, shape, ahead, copy, values);
            const int begin = block.begin * group, end = block.end * group;
            for (int pair = begin / kPairs * kPairs; pair < end; pair += kPairs) {
                Pairs tile{maxima + pair, sums + pair, mixed + size(pair, stride), queries + size(pair, key_dim)};
                score(keys, tile.queries, key_dim, scores);
                alignas(64) std::int32_t low[kPairs], high[kPairs];
                alignas(64) float slopes[kPairs], to_query[kPairs];
                bool whole = true;
                for (int i = 0; i < kPairs; ++i) {
                    const bool active = pair + i >= begin && pair + i < end;
                    const int seen_from = at + (pair + i) / group;
                    low[i] = active ? oldest_seen(shape, seen_from) - block.base : 0;
                    high[i] = active ? seen_from - block.base + 1 : 0;
                    to_query[i] = static_cast<float>(seen_from - block.base);
                    slopes[i] = shape.slopes && active ? shape.slopes[kv_head * group + (pair + i) % group] : 0.0f;
                    whole = whole && low[i] <= 0 && (high[i] >= kKeyBlock || pair + i >= pairs);
                }
                const __m512i lows = _mm512_load_si512(low), highs = _mm512_load_si512(high);
                const int from = greater(begin - pair, 0), to = lesser(end - pair, kPairs);
                const auto active = static_cast<__mmask16>(((1u << to) - 1) & ~((1u << from) - 1));
                const F tilts = V::load(slopes), distances = V::load(to_query);
                if (whole)
                    soften<false>(shape, scales, tilts, distances, lows, highs, active, scores, tile, ahead, weights, fades);
                else
                    soften<true>(shape, scales, tilts, distances, lows, highs, active, scores, tile, ahead, weights, fades);
                mix(weights, fades, values, from, to, stride, ahead, fresh, tile.mixed);
                ahead.rows = nullptr;
            }
        }

        for (int pair = 0; pair < pairs; ++pair) {
            float* to =
                y + (static_cast<std::ptrdiff_t>(row + pair / group) * shape.heads + kv_head * group + pair % group) * shape.value_dim;
            const F whole = V::set(1.0f / sums[pair]);
            for (int f = 0; f < shape.value_dim; f += V::width) {  // + 0: a zero's sign would tell how many masked keys were added
                const F out = V::add(V::mul(V::load(mixed + size(pair, stride) + f), whole), V::set(0.0f));
                shape.value_dim - f >= V::width ? V::store(to + f, out) : V::store_some(to + f, out, shape.value_dim - f);
            }
        }
    }
    _tile_release();
}

}  // namespace hasten::HASTEN_LEVEL
#endif
