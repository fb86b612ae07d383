// The products of attention with keys and values as they lie in the cache, for levels of 8 lanes: behind cache_vector.hpp.
//
// A lane is a feature. Elements become float32 in registers, in the order in which words of a row fall apart: vector j of a span has
// feature parts · i + j in lane i. Queries and mixed values keep that order, so nothing is turned but a pair's few features. A score is 8
// chains of multiply-adds over the spans, summed as a tree; a mixed value is one chain over the keys: whatever the pairs beside it.

namespace hasten::HASTEN_LEVEL {
namespace {

constexpr int kSpan = 32;  // features that are padded to: a multiple of every format's span

// Lane i is the sum of x[i]'s lanes: ((0 + 2) + (1 + 3)) + ((4 + 6) + (5 + 7)).
INLINE __m256 halves_summed(F a, F b, F c, F d) {  // lanes 0 to 3 of each in the lower half, 4 to 7 in the upper
    const F ab = V::add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const F cd = V::add(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256d x = _mm256_castps_pd(ab), y = _mm256_castps_pd(cd);
    return V::add(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
}
INLINE F lanes_summed(const F (&x)[8]) {
    const F low = halves_summed(x[0], x[1], x[2], x[3]), high = halves_summed(x[4], x[5], x[6], x[7]);
    return V::add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
INLINE __m128 lanes_summed(const F (&x)[4]) {
    const F both = halves_summed(x[0], x[1], x[2], x[3]);
    return _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
}

// A tile's scores to `to`, rows `kKeyBlock` apart.
INLINE void put_scores(const F (&sums)[8], float* to, int rows) {
    const F x = lanes_summed(sums);
    const __m128 low = _mm256_castps256_ps128(x), high = _mm256_extractf128_ps(x, 1);
    if (rows == 2) {
        _mm_storeu_ps(to, low);
        _mm_storeu_ps(to + kKeyBlock, high);
        return;
    }
    _mm_storel_pi(reinterpret_cast<__m64*>(to), low);
    _mm_storeh_pi(reinterpret_cast<__m64*>(to + kKeyBlock), low);
    _mm_storel_pi(reinterpret_cast<__m64*>(to + 2 * kKeyBlock), high);
    _mm_storeh_pi(reinterpret_cast<__m64*>(to + 3 * kKeyBlock), high);
}
INLINE void put_scores(const F (&sums)[4], float* to, int) { _mm_storeu_ps(to, lanes_summed(sums)); }

// sums[row · tokens + token] += vector j and those behind it of a span, query · key.
template <class E, int rows, int tokens, int j = 0>
INLINE void add_scores(const Words (&words)[tokens], const float* queries, int apart, F (&sums)[rows * tokens]) {
    F key[tokens];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) key[t] = E::template part<j>(words[t]);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
        const F query = V::load(queries + r * apart + j * V::width);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) sums[r * tokens + t] = V::fma(query, key[t], sums[r * tokens + t]);
    }
    if constexpr (j + 1 < 4 / E::bytes) add_scores<E, rows, tokens, j + 1>(words, queries, apart, sums);
}

// scores[r · 64 + t] = queries[r] · keys[t], queries `apart` floats apart.
template <class E, int rows, int tokens>
INLINE void score_tile(const float* queries, int apart, const std::byte* const* keys, int dim, float* scores) {
    constexpr int span = V::width * 4 / E::bytes;
    F sums[rows * tokens];
#pragma GCC unroll 8
    for (int i = 0; i < rows * tokens; ++i) sums[i] = V::set(0.0f);
    int d = 0;
    for (; d + span <= dim; d += span) {
        Words words[tokens];
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) words[t] = load_words(keys[t] + d * E::bytes);
        add_scores<E, rows, tokens>(words, queries + d, apart, sums);
    }
    if (d < dim) {
        Words words[tokens];
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) words[t] = load_some_words(keys[t] + d * E::bytes, (dim - d) * E::bytes);
        add_scores<E, rows, tokens>(words, queries + d, apart, sums);
    }
    put_scores(sums, scores, rows);
}

// How much of the next block is asked for at a time, so that it comes in evenly.
class Asking {
 public:
    Asking(const Ahead& ahead, int tiles) : ahead_(ahead), each_(ahead.rows ? (kKeyBlock + tiles - 1) / tiles : 0) {}
    __attribute__((always_inline)) void keys() {
        if (at_ < kKeyBlock && each_) ahead_.ask_keys(at_, lesser(at_ + each_, kKeyBlock)), at_ += each_;
    }
    __attribute__((always_inline)) void values() {
        if (at_ < kKeyBlock && each_) ahead_.ask_values(at_, lesser(at_ + each_, kKeyBlock)), at_ += each_;
    }

 private:
    const Ahead& ahead_;
    int each_, at_ = 0;
};

template <class E, int rows, int tokens>
INLINE void score_rows(const float* queries, int apart, const BlockRows& found, const KeyBlock& block, int dim, Asking& asking,
                       float* scores) {
    for (int t = block.low / tokens * tokens; t < block.high; t += tokens) {
        asking.keys();
        score_tile<E, rows, tokens>(queries, apart, found.keys + t, dim, scores + t);
    }
}

// weights[pair · 64 + t] = query of pair · key of t, for pairs [begin, end) and keys [low, high), and a few around them.
template <class E>
void score_block(const float* queries, int apart, const BlockRows& found, const KeyBlock& block, int dim, int begin, int end,
                 const Ahead& ahead, float* weights) {
    Asking asking(ahead, (end - begin) * (kKeyBlock / 8));
    const auto query = [&](int pair) { return queries + static_cast<std::ptrdiff_t>(pair) * apart; };
    int pair = begin;
    for (; pair + 4 <= end; pair += 4) score_rows<E, 4, 2>(query(pair), apart, found, block, dim, asking, weights + pair * kKeyBlock);
    if (pair + 2 <= end) {
        score_rows<E, 2, 4>(query(pair), apart, found, block, dim, asking, weights + pair * kKeyBlock);
        pair += 2;
    }
    if (pair < end) score_rows<E, 1, 4>(query(pair), apart, found, block, dim, asking, weights + pair * kKeyBlock);
}

// sums[(row · spans + span) · parts + j] += weight of row · vector j, and those behind it, of each span.
template <class E, int rows, int spans, int j = 0>
INLINE void add_values(const Words (&words)[spans], const F (&weight)[rows], F (&sums)[rows * spans * (4 / E::bytes)]) {
    constexpr int parts = 4 / E::bytes;
#pragma GCC unroll 4
    for (int s = 0; s < spans; ++s) {
        const F value = E::template part<j>(words[s]);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) sums[(r * spans + s) * parts + j] = V::fma(weight[r], value, sums[(r * spans + s) * parts + j]);
    }
    if constexpr (j + 1 < parts) add_values<E, rows, spans, j + 1>(words, weight, sums);
}

// mixed = mixed · fade[r] + Σₜ weights[r · 64 + t] · values of t, t in [low, high), for `spans` spans from feature f on of rows `stride`
// floats apart.
template <class E, int rows, int spans>
INLINE void mix_tile(const float* weights, const float* fade, const BlockRows& found, const KeyBlock& block, int f, int dim, int stride,
                     float* mixed) {
    constexpr int parts = 4 / E::bytes, span = V::width * parts, count = spans * parts;
    F sums[rows * count];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < count; ++i) sums[r * count + i] = V::mul(V::load(mixed + r * stride + f + i * V::width), V::set(fade[r]));
    const bool whole = f + spans * span <= dim;
    for (int t = block.low; t < block.high; ++t) {
        const std::byte* row = found.values[t] + f * E::bytes;
        Words words[spans];
        if (whole) {
#pragma GCC unroll 4
            for (int s = 0; s < spans; ++s) words[s] = load_words(row + s * 32);
        } else {
            words[0] = load_some_words(row, (dim - f) * E::bytes);
        }
        F weight[rows];
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) weight[r] = V::set(weights[r * kKeyBlock + t]);
        add_values<E, rows, spans>(words, weight, sums);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < count; ++i) V::store(mixed + r * stride + f + i * V::width, sums[r * count + i]);
}

template <class E, int rows>
INLINE void mix_rows(const float* weights, const float* fade, const BlockRows& found, const KeyBlock& block, int dim, int stride,
                     Asking& asking, float* mixed) {
    constexpr int parts = 4 / E::bytes, span = V::width * parts, most = rows * parts < 8 ? 8 / (rows * parts) : 1;
    int f = 0;
    for (; f + most * span <= dim; f += most * span) {
        asking.values();
        mix_tile<E, rows, most>(weights, fade, found, block, f, dim, stride, mixed);
    }
    for (; f < dim; f += span) {
        asking.values();
        mix_tile<E, rows, 1>(weights, fade, found, block, f, dim, stride, mixed);
    }
}

// For pairs [begin, end).
template <class E>
void mix_block(const float* weights, const float* fades, const BlockRows& found, const KeyBlock& block, int dim, int stride,
               int begin, int end, const Ahead& ahead, float* mixed) {
    constexpr int parts = 4 / E::bytes, rows = 8 / parts;
    Asking asking(ahead, greater(1, (end - begin) * dim / (8 * V::width)));
    const auto row = [&](int pair) { return mixed + static_cast<std::ptrdiff_t>(pair) * stride; };
    int pair = begin;
    for (; pair + rows <= end; pair += rows)
        mix_rows<E, rows>(weights + pair * kKeyBlock, fades + pair, found, block, dim, stride, asking, row(pair));
    for (; pair < end; ++pair)
        mix_rows<E, 1>(weights + pair * kKeyBlock, fades + pair, found, block, dim, stride, asking, row(pair));
}

// Calls put(at, f) for the places of a padded row in their order, with the feature that stands there among `parts` vectors a span.
template <class Put>
INLINE void each_place(int padded, int parts, Put put) {
    for (int at = 0, d = 0; d < padded; d += V::width * parts)
        for (int j = 0; j < parts; ++j)
            for (int i = 0; i < V::width; ++i) put(at++, d + parts * i + j);
}

// The products of a block's keys and values with queries and weights of up to `pairs` pairs.
class Products {
 public:
    Products(const AttendShape& shape, CacheFormat format, int pairs, Scratch& pieces)
        : shape_(shape),
          format_(format),
          parts_(static_cast<int>(4 / element_bytes(format))),
          apart_(up_to_multiple(shape.key_dim, kSpan)),
          queries_(pieces.take(static_cast<std::size_t>(pairs) * static_cast<std::size_t>(apart_))) {}

    static int stride_of(const AttendShape& shape) { return up_to_multiple(shape.value_dim, kSpan); }

    void take_query(int pair, const float* query) {
        float* to = queries_ + static_cast<std::ptrdiff_t>(pair) * apart_;
        each_place(apart_, parts_, [&](int at, int d) { to[at] = d < shape_.key_dim ? query[d] : 0.0f; });
    }

    void score(const BlockRows& found, const KeyBlock& block, int begin, int end, const Ahead& ahead, float* weights) {
        switch (format_) {
            case CacheFormat::bf16:
                return score_block<Elements<CacheFormat::bf16>>(queries_, apart_, found, block, shape_.key_dim, begin, end, ahead, weights);
            case CacheFormat::int8:
                return score_block<Elements<CacheFormat::int8>>(queries_, apart_, found, block, shape_.key_dim, begin, end, ahead, weights);
            case CacheFormat::fp8:
                return score_block<Elements<CacheFormat::fp8>>(queries_, apart_, found, block, shape_.key_dim, begin, end, ahead, weights);
        }
    }

    void mix(const BlockRows& found, const KeyBlock& block, const float* weights, const float* fades, int begin, int end,
             const Ahead& ahead, float* mixed) {
        const int dim = shape_.value_dim, stride = stride_of(shape_);
        switch (format_) {
            case CacheFormat::bf16:
                return mix_block<Elements<CacheFormat::bf16>>(weights, fades, found, block, dim, stride, begin, end, ahead, mixed);
            case CacheFormat::int8:
                return mix_block<Elements<CacheFormat::int8>>(weights, fades, found, block, dim, stride, begin, end, ahead, mixed);
            case CacheFormat::fp8:
                return mix_block<Elements<CacheFormat::fp8>>(weights, fades, found, block, dim, stride, begin, end, ahead, mixed);
        }
    }

    // to[f] = mixed value f · whole, of one pair's row.
    void finish(float* mixed, float whole, float* to) const {
        for (int f = 0; f < stride_of(shape_); f += V::width)  // + 0: a zero's sign would tell how many masked keys were added
            V::store(mixed + f, V::add(V::mul(V::load(mixed + f), V::set(whole)), V::set(0.0f)));
        each_place(stride_of(shape_), parts_, [&](int at, int f) {
            if (f < shape_.value_dim) to[f] = mixed[at];
        });
    }

 private:
    const AttendShape& shape_;
    CacheFormat format_;
    int parts_, apart_;
    float* queries_;
};

}  // namespace
}  // namespace hasten::HASTEN_LEVEL
