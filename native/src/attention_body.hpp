// Attention over a paged cache in vectors of float32, at one level: see decoder_vector.hpp for what the includer defines.
//
// A pair is a query row and one of its heads. Keys of a block are turned so that a lane is a key: a score is one chain of
// multiply-adds over the features in their order, a mixed value one chain over the keys in theirs, whatever the pairs beside it.

namespace hasten::HASTEN_LEVEL {
namespace {

constexpr int kColumns = 4;  // vectors a register tile is wide

// turned[d · 64 + t] = key d of token t, float32, for the vectors of tokens that [low, high) touches; lanes outside are some other token's.
#if defined(HASTEN_AVX512)
void turn_keys(const BlockRows& found, const KeyBlock& block, int dim, float* turned) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    for (int t = block.low / 16 * 16; t < block.high; t += 16) {
        const bf16* const* rows = found.keys + t;
        for (int d = 0; d < dim; d += 32) {
            __m512i words[16];
            const int left = dim - d;
            if (left >= 32) {
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) words[i] = _mm512_loadu_si512(rows[i] + d);
            } else {
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) words[i] = _mm512_maskz_loadu_epi16((1u << left) - 1, rows[i] + d);
            }
            transpose(words);
            float* to = turned + static_cast<std::ptrdiff_t>(d) * kKeyBlock + t;
            if (left >= 32) {
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i, to += 2 * kKeyBlock) {
                    _mm512_store_si512(to, _mm512_slli_epi32(words[i], 16));
                    _mm512_store_si512(to + kKeyBlock, _mm512_and_si512(words[i], upper));
                }
            } else {
                alignas(64) __m512i kept[16];
                for (int i = 0; i < 16; ++i) kept[i] = words[i];
                for (int i = 0; i < left; ++i, to += kKeyBlock)
                    _mm512_store_si512(to, i % 2 ? _mm512_and_si512(kept[i / 2], upper) : _mm512_slli_epi32(kept[i / 2], 16));
            }
        }
    }
}
#else
void turn_keys(const BlockRows& found, const KeyBlock& block, int dim, float* turned) {
    constexpr int w = V::width;
    for (int t = block.low / w * w; t < block.high; t += w) {
        const bf16* const* rows = found.keys + t;
        int d = 0;
#if defined(HASTEN_AVX2)
        for (; d + 16 <= dim; d += 16) {  // 8 rows of 8 words, each two features
            __m256i a[8], b[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i] + d));
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
            }
#pragma GCC unroll 2
            for (int i = 0; i < 8; i += 4) {
                a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
                a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
                a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
                a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                b[i] = _mm256_permute2x128_si256(a[i], a[4 + i], 0x20);
                b[4 + i] = _mm256_permute2x128_si256(a[i], a[4 + i], 0x31);
            }
            float* to = turned + static_cast<std::ptrdiff_t>(d) * kKeyBlock + t;
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i, to += 2 * kKeyBlock) {
                V::store(to, _mm256_castsi256_ps(_mm256_slli_epi32(b[i], 16)));
                V::store(to + kKeyBlock, _mm256_castsi256_ps(_mm256_and_si256(b[i], _mm256_set1_epi32(static_cast<int>(0xffff0000)))));
            }
        }
#endif
        for (; d < dim; ++d) {
            float* to = turned + static_cast<std::ptrdiff_t>(d) * kKeyBlock + t;
            for (int i = 0; i < w; ++i) {
                const std::uint32_t bits = std::uint32_t{rows[i][d]} << 16;
                __builtin_memcpy(to + i, &bits, sizeof bits);
            }
        }
    }
}
#endif

// widened[t · stride + f] = value f of token t, float32, for the tokens that are seen; zero up to the stride.
void widen_values(const BlockRows& found, const KeyBlock& block, int dim, int stride, float* widened) {
    for (int t = block.low; t < block.high; ++t) {
        const bf16* from = found.values[t];
        float* to = widened + static_cast<std::ptrdiff_t>(t) * stride;
        int f = 0;
        for (; f + V::width <= dim; f += V::width) V::store(to + f, V::load_bf16(from + f));
        for (; f < stride; f += V::width) V::store(to + f, f < dim ? V::load_bf16_some(from + f, dim - f) : V::set(0.0f));
    }
}

// scores[r · 64 + t] = queries[r] · keys of t, `columns` vectors of t.
template <int rows, int columns, bool asks>
INLINE void score_tile_that(const float* const* queries, int dim, const float* turned, const Ahead& ahead, float* scores) {
    F sums[rows][columns];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) sums[r][c] = V::set(0.0f);
    const float* from[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) from[r] = queries[r];
    for (int d = 0; d < dim; ++d, turned += kKeyBlock) {
        if constexpr (asks)
            if (d < kKeyBlock) ahead.ask_keys(d, d + 1 < dim ? d + 1 : kKeyBlock);
        F keys[columns];
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) keys[c] = V::load(turned + c * V::width);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const F feature = V::set(from[r][d]);
#pragma GCC unroll 8
            for (int c = 0; c < columns; ++c) sums[r][c] = V::fma(feature, keys[c], sums[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) V::store(scores + r * kKeyBlock + c * V::width, sums[r][c]);
}

template <int rows, int columns>
INLINE void score_tile(const float* const* queries, int dim, const float* turned, Ahead& ahead, float* scores) {
    if (ahead.rows)
        score_tile_that<rows, columns, true>(queries, dim, turned, ahead, scores);
    else
        score_tile_that<rows, columns, false>(queries, dim, turned, ahead, scores);
    ahead.rows = nullptr;  // asked once
}

// mixed[r · stride + f] = mixed · fade[r] + Σₜ weights[r · 64 + t] · values[t · stride + f], t in [low, high).
template <int rows, int columns, bool asks>
INLINE void mix_tile_that(const float* weights, const float* fade, int low, int high, const float* values, int stride, const Ahead& ahead,
                     float* mixed) {
    F sums[rows][columns];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) sums[r][c] = V::mul(V::load(mixed + r * stride + c * V::width), V::set(fade[r]));
    values += static_cast<std::ptrdiff_t>(low) * stride;
    for (int t = low; t < high; ++t, values += stride) {
        if constexpr (asks) ahead.ask_values(t, t + 1);
        F value[columns];
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) value[c] = V::load(values + c * V::width);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const F weight = V::set(weights[r * kKeyBlock + t]);
#pragma GCC unroll 8
            for (int c = 0; c < columns; ++c) sums[r][c] = V::fma(weight, value[c], sums[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) V::store(mixed + r * stride + c * V::width, sums[r][c]);
}

template <int rows, int columns>
INLINE void mix_tile(const float* weights, const float* fade, int low, int high, const float* values, int stride, Ahead& ahead,
                     float* mixed) {
    if (ahead.rows)
        mix_tile_that<rows, columns, true>(weights, fade, low, high, values, stride, ahead, mixed);
    else
        mix_tile_that<rows, columns, false>(weights, fade, low, high, values, stride, ahead, mixed);
    ahead.rows = nullptr;  // asked once
}

template <int rows>
INLINE void mix_rows(const float* weights, const float* fade, const KeyBlock& block, const float* values, int stride, Ahead& ahead,
                     float* mixed) {
    int f = 0;
    for (; f + kColumns * V::width <= stride; f += kColumns * V::width)
        mix_tile<rows, kColumns>(weights, fade, block.low, block.high, values + f, stride, ahead, mixed + f);
    for (; f < stride; f += V::width) mix_tile<rows, 1>(weights, fade, block.low, block.high, values + f, stride, ahead, mixed + f);
}

// Scores of one pair over a block → weights against the new maximum, exactly zero outside [low, high). Updates the pair's maximum
// and sum, and gives the factor that what was summed before has to be faded by.
INLINE float soften(const AttendShape& shape, int head, int to_query, int low, int high, float* scores, float& maximum, float& sum) {
    constexpr int count = kKeyBlock / V::width;
    F kept[count], most = V::set(-__builtin_inff());
    const F begin = V::set(static_cast<float>(low)), end = V::set(static_cast<float>(high));
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) {
        const F key = V::add(V::iota(), V::set(static_cast<float>(i * V::width)));
        F x = V::mul(V::load(scores + i * V::width), V::set(shape.scale));
        if (shape.softcap > 0) x = V::mul(V::set(shape.softcap), tanh(V::div(x, V::set(shape.softcap))));
        if (shape.slopes) x = V::fma(V::set(shape.slopes[head]), V::sub(key, V::set(static_cast<float>(to_query))), x);
        kept[i] = V::if_less(key, begin, V::set(-__builtin_inff()), V::if_less(key, end, x, V::set(-__builtin_inff())));
        most = V::max(most, kept[i]);
    }
    const float before = maximum, block = V::largest(most);
    maximum = block > before ? block : before;
    const F top = V::set(maximum);
    F sums = V::set(0.0f);
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) {
        const F weight = exp(V::sub(kept[i], top));  // exactly zero of −∞
        V::store(scores + i * V::width, weight);
        sums = V::add(sums, weight);
    }
    float lane[V::width];
    V::store(lane, exp(V::set(before - maximum)));
    sum = sum * lane[0] + V::sum(sums);
    return lane[0];
}

}  // namespace

void attend(const AttendShape& shape, const PagedLayer& layer, const std::int32_t* table, const float* q, int first, int last, int position,
            int kv_head, float* y, float* scratch) {
    const int group = shape.heads / shape.kv_heads, together = rows_together(shape, last - first),
              stride = up_to_multiple(shape.value_dim, 16);
    Scratch pieces(scratch);
    float* turned = pieces.take(static_cast<std::size_t>(shape.key_dim) * kKeyBlock);
    float* values = pieces.take(static_cast<std::size_t>(kKeyBlock) * stride);
    float* weights = pieces.take(static_cast<std::size_t>(together) * group * kKeyBlock);
    float* mixed = pieces.take(static_cast<std::size_t>(together) * group * stride);
    float* maxima = pieces.take(static_cast<std::size_t>(together) * group);
    float* sums = pieces.take(static_cast<std::size_t>(together) * group);
    float* fades = pieces.take(static_cast<std::size_t>(together) * group);

    for (int row = first; row < last; row += together) {
        const int count = lesser(together, last - row), at = position + row;
        const auto query = [&](int pair) {
            return q + (static_cast<std::ptrdiff_t>(row + pair / group) * shape.heads + kv_head * group + pair % group) * shape.key_dim;
        };
        for (int pair = 0; pair < count * group; ++pair) {  // a sink is a score that was there before the first key, of no value
            maxima[pair] = shape.sinks ? shape.sinks[kv_head * group + pair % group] : -__builtin_inff();
            sums[pair] = shape.sinks ? 1.0f : 0.0f;
        }
        for (int i = 0; i < count * group * stride; ++i) mixed[i] = 0.0f;

        for (Blocks blocks(shape, layer, table, kv_head, at, count); blocks.more(); blocks.next()) {
            const KeyBlock& block = blocks.block();
            const BlockRows& found = blocks.rows();
            Ahead keys_ahead = blocks.ahead(), values_ahead = keys_ahead;
            turn_keys(found, block, shape.key_dim, turned);
            widen_values(found, block, shape.value_dim, stride, values);

            constexpr int wide = kColumns * V::width, rows = V::score_rows;
            const int begin = block.begin * group, end = block.end * group;
            for (int t = block.low / wide * wide; t < block.high; t += wide) {
                int pair = begin;
                for (; pair + rows <= end; pair += rows) {
                    const float* queries[rows];
                    for (int r = 0; r < rows; ++r) queries[r] = query(pair + r);
                    score_tile<rows, kColumns>(queries, shape.key_dim, turned + t, keys_ahead, weights + pair * kKeyBlock + t);
                }
                for (; pair < end; ++pair) {
                    const float* one = query(pair);
                    score_tile<1, kColumns>(&one, shape.key_dim, turned + t, keys_ahead, weights + pair * kKeyBlock + t);
                }
            }
            for (int pair = begin; pair < end; ++pair) {
                const int to_query = at + pair / group - block.base,
                          low = greater(0, oldest_seen(shape, to_query + block.base) - block.base);
                fades[pair] = soften(shape, kv_head * group + pair % group, to_query, low, lesser(to_query + 1, kKeyBlock),
                                     weights + pair * kKeyBlock, maxima[pair], sums[pair]);
            }
            int pair = begin;
            for (; pair + V::mix_rows <= end; pair += V::mix_rows)
                mix_rows<V::mix_rows>(weights + pair * kKeyBlock, fades + pair, block, values, stride, values_ahead, mixed + pair * stride);
            for (; pair < end; ++pair)
                mix_rows<1>(weights + pair * kKeyBlock, fades + pair, block, values, stride, values_ahead, mixed + pair * stride);
        }

        for (int pair = 0; pair < count * group; ++pair) {
            float* to =
                y + (static_cast<std::ptrdiff_t>(row + pair / group) * shape.heads + kv_head * group + pair % group) * shape.value_dim;
            const F whole = V::set(1.0f / sums[pair]);
            for (int f = 0; f < shape.value_dim; f += V::width) {  // + 0: a zero's sign would tell how many masked keys were added
                const F out = V::add(V::mul(V::load(mixed + pair * stride + f), whole), V::set(0.0f));
                shape.value_dim - f >= V::width ? V::store(to + f, out) : V::store_some(to + f, out, shape.value_dim - f);
            }
        }
    }
}

}  // namespace hasten::HASTEN_LEVEL
