// How a level reads a cache: elements as float32, without their row's scale. Behind decoder_vector.hpp, at the level of the includer.
//
// Elements<format>: load and load_some give V::width elements of a row from `at`; part<j> gives element j of each word, where a word
// is 32 bits of a row, and a lane a row. fp8 moved to float32's fields counts 2⁻¹²⁰, its subnormal numbers too. load_halves gives
// V::width scales.

namespace hasten::HASTEN_LEVEL {
namespace {

template <CacheFormat format>
struct Elements;

INLINE const bf16* halves(const std::byte* row) { return reinterpret_cast<const bf16*>(row); }

#if defined(HASTEN_AVX512)

using Words = __m512i;
INLINE Words load_words(const std::byte* row) { return _mm512_loadu_si512(row); }
INLINE Words load_some_words(const std::byte* row, int bytes) { return _mm512_maskz_loadu_epi8((1ull << bytes) - 1, row); }  // bytes < 64
INLINE __m512i load_bytes(const std::byte* row) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
}
INLINE __m512i load_some_bytes(const std::byte* row, int n) { return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(V::lanes(n), row)); }
template <int by>
INLINE __m512i up(__m512i x) {
    return _mm512_slli_epi32(x, by);
}
template <int by>
INLINE __m512i down(__m512i x) {
    return _mm512_srai_epi32(x, by);
}
INLINE F fields(__m512i x, std::uint32_t bits) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(bits)))); }
INLINE F converted(__m512i x) { return _mm512_cvtepi32_ps(x); }
INLINE F load_halves(const std::uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

#elif defined(HASTEN_AVX2)

using Words = __m256i;
INLINE Words load_words(const std::byte* row) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)); }
INLINE Words load_some_words(const std::byte* row, int bytes) {
    alignas(32) std::byte some[32] = {};
    __builtin_memcpy(some, row, static_cast<std::size_t>(bytes));
    return load_words(some);
}
INLINE __m256i load_bytes(const std::byte* row) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row)));
}
INLINE __m256i load_some_bytes(const std::byte* row, int n) {
    std::byte some[8] = {};
    __builtin_memcpy(some, row, static_cast<std::size_t>(n));
    return load_bytes(some);
}
template <int by>
INLINE __m256i up(__m256i x) {
    return _mm256_slli_epi32(x, by);
}
template <int by>
INLINE __m256i down(__m256i x) {
    return _mm256_srai_epi32(x, by);
}
INLINE F fields(__m256i x, std::uint32_t bits) { return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(bits)))); }
INLINE F converted(__m256i x) { return _mm256_cvtepi32_ps(x); }
INLINE F load_halves(const std::uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

#else

using Words = V::I;  // a lane is one element: there is no word to take apart
INLINE V::I load_some_bytes(const std::byte* row, int n) {
    V::I x = {};
    for (int i = 0; i < n; ++i) x[i] = static_cast<std::int8_t>(row[i]);
    return x;
}
INLINE V::I load_bytes(const std::byte* row) { return load_some_bytes(row, V::width); }
template <int by>
INLINE V::I up(V::I x) {
    return reinterpret_cast<V::I>(reinterpret_cast<V::U>(x) << by);
}
template <int by>
INLINE V::I down(V::I x) {
    return x >> by;
}
INLINE F fields(V::I x, std::uint32_t bits) { return reinterpret_cast<F>(x & static_cast<std::int32_t>(bits)); }
INLINE F converted(V::I x) { return __builtin_convertvector(x, F); }
// Scales have no sign and are no infinities: float32's fields count 2⁻¹¹², and what comes out too large is NaN.
INLINE F load_halves(const std::uint16_t* p) {
    V::I x = {};
    for (int i = 0; i < V::width; ++i) x[i] = (p[i] & 0x7fff) << 13;
    const F y = V::mul(reinterpret_cast<F>(x), V::set(0x1p112f));
    return V::if_less(V::set(65504.0f), y, V::set(__builtin_nanf("")), y);
}

#endif

template <>
struct Elements<CacheFormat::bf16> {
    static constexpr int bytes = 2;
    INLINE F load(const std::byte* row, int at) { return V::load_bf16(halves(row) + at); }
    INLINE F load_some(const std::byte* row, int at, int n) { return V::load_bf16_some(halves(row) + at, n); }
    template <int j>
    INLINE F part(Words x) {
        return fields(j ? x : up<16>(x), 0xffff0000);
    }
};

template <>
struct Elements<CacheFormat::int8> {
    static constexpr int bytes = 1;
    INLINE F load(const std::byte* row, int at) { return converted(load_bytes(row + at)); }
    INLINE F load_some(const std::byte* row, int at, int n) { return converted(load_some_bytes(row + at, n)); }
    template <int j>
    INLINE F part(Words x) {
        return converted(down<24>(up<24 - 8 * j>(x)));
    }
};

template <>
struct Elements<CacheFormat::fp8> {
    static constexpr int bytes = 1;
    static constexpr std::uint32_t kFields = 0x87f00000;  // sign, 4 bits of the exponent, 3 of the mantissa
    INLINE F load(const std::byte* row, int at) { return V::mul(fields(up<20>(load_bytes(row + at)), kFields), V::set(0x1p120f)); }
    INLINE F load_some(const std::byte* row, int at, int n) {
        return V::mul(fields(up<20>(load_some_bytes(row + at, n)), kFields), V::set(0x1p120f));
    }
    template <int j>
    INLINE F part(Words x) {
        return V::mul(fields(down<4>(up<24 - 8 * j>(x)), kFields), V::set(0x1p120f));
    }
};

// A block's scales as float32, in `wide`; null where there are none.
INLINE const BlockScales* widened(const HalfScales* halves, BlockScales& wide) {
    if (!halves) return nullptr;
    for (int t = 0; t < kKeyBlock; t += V::width) {
        V::store(wide.keys + t, load_halves(halves->keys + t));
        V::store(wide.values + t, load_halves(halves->values + t));
    }
    return &wide;
}

}  // namespace
}  // namespace hasten::HASTEN_LEVEL
