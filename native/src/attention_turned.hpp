// The products of attention with keys turned and values widened to float32 in near memory: behind cache_vector.hpp.
//
// Keys of a block are turned so that a lane is a key: a score is one chain of multiply-adds over the features in their order, a mixed
// value one chain over the keys in theirs, whatever the pairs beside it.

namespace hasten::HASTEN_LEVEL {
namespace {

constexpr int kColumns = 4;  // vectors a register tile is wide

// turned[d · 64 + t] = key d of token t, float32, for the vectors of tokens that [low, high) touches; lanes outside are some other token's.
#if defined(HASTEN_AVX512)
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

// The products of a block's keys and values with queries and weights of up to `pairs` pairs.
class Products {
 public:
    Products(const AttendShape& shape, CacheFormat format, int pairs, Scratch& pieces)
        : shape_(shape),
          format_(format),
          queries_(pieces.take<const float*>(static_cast<std::size_t>(pairs))),
          turned_(pieces.take(static_cast<std::size_t>(shape.key_dim) * kKeyBlock)),
          values_(pieces.take(static_cast<std::size_t>(kKeyBlock) * static_cast<std::size_t>(stride_of(shape)))) {}

    static int stride_of(const AttendShape& shape) { return up_to_multiple(shape.value_dim, 16); }

    void take_query(int pair, const float* query) { queries_[pair] = query; }

    // weights[pair · 64 + t] = query of pair · key of t, for pairs [begin, end) and keys [low, high), and a few around them.
    void score(const BlockRows& found, const KeyBlock& block, int begin, int end, Ahead ahead, float* weights) {
        widen(format_, found, block, shape_, stride_of(shape_), turned_, values_);
        constexpr int wide = kColumns * V::width, rows = V::score_rows;
        for (int t = block.low / wide * wide; t < block.high; t += wide) {
            int pair = begin;
            for (; pair + rows <= end; pair += rows)
                score_tile<rows, kColumns>(queries_ + pair, shape_.key_dim, turned_ + t, ahead, weights + pair * kKeyBlock + t);
            for (; pair < end; ++pair)
                score_tile<1, kColumns>(queries_ + pair, shape_.key_dim, turned_ + t, ahead, weights + pair * kKeyBlock + t);
        }
    }

    // mixed = mixed · fade + weights · values, for pairs [begin, end) of the block that was scored last.
    void mix(const BlockRows&, const KeyBlock& block, const float* weights, const float* fades, int begin, int end, Ahead ahead,
             float* mixed) {
        const int stride = stride_of(shape_);
        int pair = begin;
        for (; pair + V::mix_rows <= end; pair += V::mix_rows)
            mix_rows<V::mix_rows>(weights + pair * kKeyBlock, fades + pair, block, values_, stride, ahead, mixed + pair * stride);
        for (; pair < end; ++pair)
            mix_rows<1>(weights + pair * kKeyBlock, fades + pair, block, values_, stride, ahead, mixed + pair * stride);
    }

    // to[f] = mixed value f · whole, of one pair's row.
    void finish(const float* mixed, float whole, float* to) const {
        for (int f = 0; f < shape_.value_dim; f += V::width) {  // + 0: a zero's sign would tell how many masked keys were added
            const F out = V::add(V::mul(V::load(mixed + f), V::set(whole)), V::set(0.0f));
            shape_.value_dim - f >= V::width ? V::store(to + f, out) : V::store_some(to + f, out, shape_.value_dim - f);
        }
    }

 private:
    const AttendShape& shape_;
    CacheFormat format_;
    const float** queries_;
    float *turned_, *values_;
};

}  // namespace
}  // namespace hasten::HASTEN_LEVEL
