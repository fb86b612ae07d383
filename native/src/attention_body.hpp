// Attention over a paged cache in vectors of float32, at one level: see decoder_vector.hpp for what the includer defines.
//
// A pair is a query row and one of its heads. Keys of a block are turned so that a lane is a key: a score is one chain of
// multiply-adds over the features in their order, a mixed value one chain over the keys in theirs, whatever the pairs beside it.

namespace hasten::HASTEN_LEVEL {
namespace {

constexpr int kColumns = 4;  // vectors a register tile is wide

// turned[d · 64 + t] = key d of token t, float32, for the vectors of tokens that [low, high) touches; lanes outside are some other token's.
#if defined(HASTEN_AVX512) || defined(HASTEN_AVX2)
template <class E, int j = 0>
INLINE void put_parts(Words words, int count, float* to) {
    constexpr int parts = 4 / E::bytes;
    if (j < count) V::store(to + j * kKeyBlock, E::template part<j>(words));
    if constexpr (j + 1 < parts) put_parts<E, j + 1>(words, count, to);
}

template <class E>
void turn_keys_of(const BlockRows& found, const KeyBlock& block, int dim, float* turned) {
    constexpr int w = V::width, parts = 4 / E::bytes, span = w * parts;  // features of a vector of words
    for (int t = block.low / w * w; t < block.high; t += w)
        for (int d = 0; d < dim; d += span) {
            const std::byte* const* rows = found.keys + t;
            const int left = dim - d;
            float* to = turned + static_cast<std::ptrdiff_t>(d) * kKeyBlock + t;
            Words words[w];
            if (left >= span) {
#pragma GCC unroll 16
                for (int i = 0; i < w; ++i) words[i] = load_words(rows[i] + d * E::bytes);
                transpose(words);
#pragma GCC unroll 16
                for (int i = 0; i < w; ++i) put_parts<E>(words[i], parts, to + i * parts * kKeyBlock);
            } else {
#pragma GCC unroll 16
                for (int i = 0; i < w; ++i) words[i] = load_some_words(rows[i] + d * E::bytes, left * E::bytes);
                transpose(words);
                alignas(64) Words kept[w];
                for (int i = 0; i < w; ++i) kept[i] = words[i];
                for (int i = 0; i * parts < left; ++i) put_parts<E>(kept[i], left - i * parts, to + i * parts * kKeyBlock);
            }
        }
}
#else
template <class E>
void turn_keys_of(const BlockRows& found, const KeyBlock& block, int dim, float* turned) {
    constexpr int w = V::width;
    for (int t = block.low / w * w; t < block.high; t += w)
        for (int i = 0; i < w; ++i)
            for (int d = 0; d < dim; d += w) {
                const F some = E::load_some(found.keys[t + i], d, lesser(dim - d, w));
                for (int k = 0; k < lesser(dim - d, w); ++k) turned[static_cast<std::ptrdiff_t>(d + k) * kKeyBlock + t + i] = some[k];
            }
}
#endif

// widened[t · stride + f] = value f of token t, float32, for the tokens that are seen; zero up to the stride.
template <class E>
void widen_values_of(const BlockRows& found, const KeyBlock& block, int dim, int stride, float* widened) {
    for (int t = block.low; t < block.high; ++t) {
        const std::byte* from = found.values[t];
        float* to = widened + static_cast<std::ptrdiff_t>(t) * stride;
        int f = 0;
        for (; f + V::width <= dim; f += V::width) V::store(to + f, E::load(from, f));
        for (; f < stride; f += V::width) V::store(to + f, f < dim ? E::load_some(from, f, dim - f) : V::set(0.0f));
    }
}

template <CacheFormat format>
void widen(const BlockRows& found, const KeyBlock& block, const AttendShape& shape, int stride, float* turned, float* widened) {
    turn_keys_of<Elements<format>>(found, block, shape.key_dim, turned);
    widen_values_of<Elements<format>>(found, block, shape.value_dim, stride, widened);
}

// Keys turned and values widened, of any format.
void widen(CacheFormat format, const BlockRows& found, const KeyBlock& block, const AttendShape& shape, int stride, float* turned,
           float* widened) {
    switch (format) {
        case CacheFormat::bf16:
            return widen<CacheFormat::bf16>(found, block, shape, stride, turned, widened);
        case CacheFormat::int8:
            return widen<CacheFormat::int8>(found, block, shape, stride, turned, widened);
        case CacheFormat::fp8:
            return widen<CacheFormat::fp8>(found, block, shape, stride, turned, widened);
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
// and sum, and gives the factor that what was summed before has to be faded by. With scales, a key's is taken to its score, a value's to
// its weight, behind the sum.
INLINE float soften(const AttendShape& shape, const BlockScales* scales, int head, int to_query, int low, int high, float* scores,
                    float& maximum, float& sum) {
    constexpr int count = kKeyBlock / V::width;
    F kept[count], most = V::set(-__builtin_inff());
    const F begin = V::set(static_cast<float>(low)), end = V::set(static_cast<float>(high));
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) {
        const F key = V::add(V::iota(), V::set(static_cast<float>(i * V::width)));
        F x = V::load(scores + i * V::width);
        if (scales) x = V::mul(x, V::load(scales->keys + i * V::width));
        x = V::mul(x, V::set(shape.scale));
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
        V::store(scores + i * V::width, scales ? V::mul(weight, V::load(scales->values + i * V::width)) : weight);
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
    BlockScales wide_scales;

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
            const BlockScales* scales = widened(blocks.scales(), wide_scales);
            widen(layer.format, found, block, shape, stride, turned, values);

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
                fades[pair] = soften(shape, scales, kv_head * group + pair % group, to_query, low, lesser(to_query + 1, kKeyBlock),
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
