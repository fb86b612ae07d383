// The products of attention with keys and values as they lie in the cache, for levels of 8 lanes: behind cache_vector.hpp.
//
// A lane is a feature. Elements become float32 in registers, in the order in which words of two fall apart: of every 16 features first the
// even ones, then the odd. Queries and mixed values keep that order. A score is 8 chains of multiply-adds over the features, summed as a
// tree; a mixed value one chain over the keys: whatever the pairs beside it. int8 and fp8 fit in bf16 as they are: where many pairs will
// read them they are copied so, which changes no bit.

namespace hasten::HASTEN_LEVEL {
namespace {

constexpr int kSpan = 16;  // features that are loaded together: a lane has two
constexpr int kMany = 8;   // pairs for which a copy of int8 or fp8 pays

// load and load_some give features [at, at + 16) and [at, at + n) of a row, zeros behind.
template <CacheFormat format>
struct Twos;

template <>
struct Twos<CacheFormat::bf16> {
    INLINE __m256i load(const std::byte* row, int at) { return load_words(row + 2 * at); }
    INLINE __m256i load_some(const std::byte* row, int at, int n) { return load_some_words(row + 2 * at, 2 * n); }
    INLINE F even(__m256i x) { return _mm256_castsi256_ps(up<16>(x)); }
    INLINE F odd(__m256i x) { return fields(x, 0xffff0000); }
};

struct TwoBytes {
    INLINE __m256i load(const std::byte* row, int at) {
        return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + at)));
    }
    INLINE __m256i load_some(const std::byte* row, int at, int n) {
        std::byte some[16] = {};
        __builtin_memcpy(some, row + at, static_cast<std::size_t>(n));
        return load(some, 0);
    }
};

template <>
struct Twos<CacheFormat::int8> : TwoBytes {
    INLINE F even(__m256i x) { return converted(down<24>(up<24>(x))); }
    INLINE F odd(__m256i x) { return converted(down<8>(x)); }
};

template <>
struct Twos<CacheFormat::fp8> : TwoBytes {
    INLINE F even(__m256i x) { return value_of(up<24>(x)); }
    INLINE F odd(__m256i x) { return value_of(up<16>(x)); }
    INLINE F value_of(__m256i top) { return V::mul(fields(down<4>(top), Elements<CacheFormat::fp8>::kFields), V::set(0x1p120f)); }
};

// x, loaded once: left to itself the compiler loads it anew for every use.
INLINE F held(F x) {
    __asm__("" : "+x"(x));
    return x;
}

// Sums of the lanes ((0 + 2) + (1 + 3)) of each in the lower half, ((4 + 6) + (5 + 7)) in the upper.
INLINE F halves_summed(F a, F b, F c, F d) {
    const F ab = V::add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const F cd = V::add(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256d x = _mm256_castps_pd(ab), y = _mm256_castps_pd(cd);
    return V::add(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
}

// The sums of each vector's lanes to `scores`: sums[row · tokens + token], rows kKeyBlock apart.
template <int rows>
INLINE void put_scores(const F (&sums)[8], float* scores) {
    const F a = halves_summed(sums[0], sums[1], sums[2], sums[3]), b = halves_summed(sums[4], sums[5], sums[6], sums[7]);
    const F x = V::add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    const __m128 low = _mm256_castps256_ps128(x), high = _mm256_extractf128_ps(x, 1);
    if constexpr (rows == 2) {
        _mm_storeu_ps(scores, low);
        _mm_storeu_ps(scores + kKeyBlock, high);
    } else {
        _mm_storel_pi(reinterpret_cast<__m64*>(scores), low);
        _mm_storeh_pi(reinterpret_cast<__m64*>(scores + kKeyBlock), low);
        _mm_storel_pi(reinterpret_cast<__m64*>(scores + 2 * kKeyBlock), high);
        _mm_storeh_pi(reinterpret_cast<__m64*>(scores + 3 * kKeyBlock), high);
    }
}
template <int rows>
INLINE void put_scores(const F (&sums)[4], float* scores) {
    const F both = halves_summed(sums[0], sums[1], sums[2], sums[3]);
    _mm_storeu_ps(scores, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
}

template <class E, int rows, int tokens>
INLINE void add_scores(const __m256i (&words)[tokens], const float* queries, int apart, F (&sums)[rows * tokens]) {
    F key[tokens];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) key[t] = E::even(words[t]);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
        const F query = held(V::load(queries + r * apart));
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) sums[r * tokens + t] = V::fma(query, key[t], sums[r * tokens + t]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) key[t] = E::odd(words[t]);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
        const F query = held(V::load(queries + r * apart + V::width));
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) sums[r * tokens + t] = V::fma(query, key[t], sums[r * tokens + t]);
    }
}

// scores[r · 64 + t] = queries[r] · keys[t], queries `apart` floats apart.
template <class E, int rows, int tokens>
INLINE void score_tile(const float* queries, int apart, const std::byte* const* keys, int dim, float* scores) {
    F sums[rows * tokens];
#pragma GCC unroll 8
    for (int i = 0; i < rows * tokens; ++i) sums[i] = V::set(0.0f);
    const std::byte* from[tokens];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) from[t] = keys[t];
    __m256i words[tokens];
    int d = 0;
    for (; d + kSpan <= dim; d += kSpan) {
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) words[t] = E::load(from[t], d);
        add_scores<E, rows, tokens>(words, queries + d, apart, sums);
    }
    if (d < dim) {
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) words[t] = E::load_some(from[t], d, dim - d);
        add_scores<E, rows, tokens>(words, queries + d, apart, sums);
    }
    put_scores<rows>(sums, scores);
}

// Asks for the next block in `times` parts, so that it comes in evenly.
class Asking {
 public:
    Asking(const Ahead& ahead, int times) : ahead_(ahead), at_(ahead.rows ? 0 : kKeyBlock), each_((kKeyBlock + times - 1) / times) {}
    __attribute__((always_inline)) void keys() {
        if (at_ < kKeyBlock) ahead_.ask_keys(at_, lesser(at_ + each_, kKeyBlock)), at_ += each_;
    }
    __attribute__((always_inline)) void values() {
        if (at_ < kKeyBlock) ahead_.ask_values(at_, lesser(at_ + each_, kKeyBlock)), at_ += each_;
    }

 private:
    const Ahead& ahead_;
    int at_, each_;
};

template <class E, int rows, int tokens>
INLINE void score_rows(const float* queries, int apart, const BlockRows& found, const KeyBlock& block, int dim, Asking& asking,
                       float* scores) {
    for (int first = block.low / 8 * 8; first < block.high; first += 8) {
        asking.keys();
        for (int t = first; t < first + 8; t += tokens) score_tile<E, rows, tokens>(queries, apart, found.keys + t, dim, scores + t);
    }
}

// weights[pair · 64 + t] = query of pair · key of t, for pairs [begin, end) and keys [low, high), and a few around them.
template <class E>
void score_block(const float* queries, int apart, const BlockRows& found, const KeyBlock& block, int dim, int begin, int end,
                 const Ahead& ahead, float* weights) {
    const int left = (end - begin) % 4;
    Asking asking(ahead, ((end - begin) / 4 + left / 2 + left % 2) * (kKeyBlock / 8));
    const auto query = [&](int pair) { return queries + static_cast<std::ptrdiff_t>(pair) * apart; };
    int pair = begin;
    for (; pair + 4 <= end; pair += 4) score_rows<E, 4, 2>(query(pair), apart, found, block, dim, asking, weights + pair * kKeyBlock);
    if (pair + 2 <= end) {
        score_rows<E, 2, 4>(query(pair), apart, found, block, dim, asking, weights + pair * kKeyBlock);
        pair += 2;
    }
    if (pair < end) score_rows<E, 1, 4>(query(pair), apart, found, block, dim, asking, weights + pair * kKeyBlock);
}

// mixed = mixed · fade[r] + Σₜ weights[r · 64 + t] · values of t, t in [low, high), for `spans` spans from feature f on of rows `stride`
// floats apart.
template <class E, int rows, int spans>
INLINE void mix_tile(const float* weights, const float* fade, const BlockRows& found, const KeyBlock& block, int f, int dim, int stride,
                     float* mixed) {
    F even[rows * spans], odd[rows * spans];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int s = 0; s < spans; ++s) {
            const float* at = mixed + r * stride + f + s * kSpan;
            even[r * spans + s] = V::mul(V::load(at), V::set(fade[r]));
            odd[r * spans + s] = V::mul(V::load(at + V::width), V::set(fade[r]));
        }
    const bool whole = f + spans * kSpan <= dim;
    for (int t = block.low; t < block.high; ++t) {
        F weight[rows];
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) weight[r] = V::set(weights[r * kKeyBlock + t]);
#pragma GCC unroll 4
        for (int s = 0; s < spans; ++s) {
            const __m256i words = whole ? E::load(found.values[t], f + s * kSpan) : E::load_some(found.values[t], f, dim - f);
            const F first = E::even(words), second = E::odd(words);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) {
                even[r * spans + s] = V::fma(weight[r], first, even[r * spans + s]);
                odd[r * spans + s] = V::fma(weight[r], second, odd[r * spans + s]);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int s = 0; s < spans; ++s) {
            float* at = mixed + r * stride + f + s * kSpan;
            V::store(at, even[r * spans + s]);
            V::store(at + V::width, odd[r * spans + s]);
        }
}

template <class E, int rows>
INLINE void mix_rows(const float* weights, const float* fade, const BlockRows& found, const KeyBlock& block, int dim, int stride,
                     Asking& asking, float* mixed) {
    constexpr int spans = 4 / rows;
    int f = 0;
    for (; f + spans * kSpan <= dim; f += spans * kSpan) {
        asking.values();
        mix_tile<E, rows, spans>(weights, fade, found, block, f, dim, stride, mixed);
    }
    for (; f < dim; f += kSpan) {
        asking.values();
        mix_tile<E, rows, 1>(weights, fade, found, block, f, dim, stride, mixed);
    }
}

// For pairs [begin, end).
template <class E>
void mix_block(const float* weights, const float* fades, const BlockRows& found, const KeyBlock& block, int dim, int stride, int begin,
               int end, const Ahead& ahead, float* mixed) {
    Asking asking(ahead, greater(1, (end - begin) * dim / (4 * kSpan)));
    const auto row = [&](int pair) { return mixed + static_cast<std::ptrdiff_t>(pair) * stride; };
    int pair = begin;
    for (; pair + 4 <= end; pair += 4)
        mix_rows<E, 4>(weights + pair * kKeyBlock, fades + pair, found, block, dim, stride, asking, row(pair));
    for (; pair < end; ++pair) mix_rows<E, 1>(weights + pair * kKeyBlock, fades + pair, found, block, dim, stride, asking, row(pair));
}

// Rows of the tokens [low, high) as bf16 in `copy`, `padded` elements apart, and where they lie now; others lie where the nearest does.
template <class E>
void copy_rows(const std::byte* const* rows, const KeyBlock& block, int dim, int padded, bf16* copy, const std::byte** now) {
    for (int t = block.low; t < block.high; ++t) {
        bf16* to = copy + t * padded;
        now[t] = reinterpret_cast<const std::byte*>(to);
        for (int d = 0; d < dim; d += kSpan, to += kSpan) {
            const __m256i words = dim - d >= kSpan ? E::load(rows[t], d) : E::load_some(rows[t], d, dim - d);
            const __m256i even = _mm256_srli_epi32(_mm256_castps_si256(E::even(words)), 16), odd = _mm256_castps_si256(E::odd(words));
            _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_blend_epi16(even, odd, 0xaa));
        }
    }
    for (int t = 0; t < block.low; ++t) now[t] = now[block.low];
    for (int t = block.high; t < kKeyBlock; ++t) now[t] = now[block.high - 1];
}

// The products of a block's keys and values with queries and weights of up to `pairs` pairs.
class Products {
 public:
    Products(const AttendShape& shape, CacheFormat format, int pairs, Scratch& pieces)
        : shape_(shape),
          format_(format),
          apart_(up_to_multiple(shape.key_dim, kSpan)),
          queries_(pieces.take(static_cast<std::size_t>(pairs) * static_cast<std::size_t>(apart_))),
          keys_(pieces.take<bf16>(static_cast<std::size_t>(kKeyBlock) * static_cast<std::size_t>(apart_))),
          values_(pieces.take<bf16>(static_cast<std::size_t>(kKeyBlock) * static_cast<std::size_t>(stride_of(shape)))) {}

    static int stride_of(const AttendShape& shape) { return up_to_multiple(shape.value_dim, kSpan); }

    void take_query(int pair, const float* query) {
        float* to = queries_ + static_cast<std::ptrdiff_t>(pair) * apart_;
        for (int d = 0; d < apart_; d += kSpan)
            for (int i = 0; i < kSpan; ++i) {
                const int from = d + 2 * (i % V::width) + i / V::width;
                to[d + i] = from < shape_.key_dim ? query[from] : 0.0f;
            }
    }

    // weights[pair · 64 + t] = query of pair · key of t, for pairs [begin, end) and keys [low, high), and a few around them.
    void score(const BlockRows& found, const KeyBlock& block, int begin, int end, const Ahead& ahead, float* weights) {
        many_ = end - begin >= kMany;
        switch (format_) {
            case CacheFormat::bf16:
                return score_block<Twos<CacheFormat::bf16>>(queries_, apart_, found, block, shape_.key_dim, begin, end, ahead, weights);
            case CacheFormat::int8:
                return score_bytes<Twos<CacheFormat::int8>>(found, block, begin, end, ahead, weights);
            case CacheFormat::fp8:
                return score_bytes<Twos<CacheFormat::fp8>>(found, block, begin, end, ahead, weights);
        }
    }

    // mixed = mixed · fade + weights · values, for pairs [begin, end) of the block that was scored last.
    void mix(const BlockRows& found, const KeyBlock& block, const float* weights, const float* fades, int begin, int end,
             const Ahead& ahead, float* mixed) {
        const int dim = shape_.value_dim, stride = stride_of(shape_);
        if (format_ == CacheFormat::bf16 || many_) {
            const BlockRows& rows = format_ == CacheFormat::bf16 ? found : copied_;
            mix_block<Twos<CacheFormat::bf16>>(weights, fades, rows, block, dim, stride, begin, end, ahead, mixed);
        } else if (format_ == CacheFormat::int8) {
            mix_block<Twos<CacheFormat::int8>>(weights, fades, found, block, dim, stride, begin, end, ahead, mixed);
        } else {
            mix_block<Twos<CacheFormat::fp8>>(weights, fades, found, block, dim, stride, begin, end, ahead, mixed);
        }
    }

    // to[f] = mixed value f · whole, of one pair's row.
    void finish(const float* mixed, float whole, float* to) const {
        for (int f = 0; f < shape_.value_dim; f += kSpan)
            for (int i = 0; i < lesser(shape_.value_dim - f, kSpan); ++i)  // + 0: a zero's sign would tell how many masked keys were added
                to[f + i] = mixed[f + i % 2 * V::width + i / 2] * whole + 0.0f;
    }

 private:
    template <class E>
    void score_bytes(const BlockRows& found, const KeyBlock& block, int begin, int end, const Ahead& ahead, float* weights) {
        if (!many_) return score_block<E>(queries_, apart_, found, block, shape_.key_dim, begin, end, ahead, weights);
        copy_rows<E>(found.keys, block, shape_.key_dim, apart_, keys_, copied_.keys);
        copy_rows<E>(found.values, block, shape_.value_dim, stride_of(shape_), values_, copied_.values);
        score_block<Twos<CacheFormat::bf16>>(queries_, apart_, copied_, block, shape_.key_dim, begin, end, ahead, weights);
    }

    const AttendShape& shape_;
    CacheFormat format_;
    int apart_;
    float* queries_;
    bf16 *keys_, *values_;
    BlockRows copied_;
    bool many_ = false;
};

}  // namespace
}  // namespace hasten::HASTEN_LEVEL
