// A vector of float32 at the level of the including file, and the functions that the kernels take of one. The includer defines
// HASTEN_LEVEL (its namespace) and, after the standard headers, the pragma that turns the instruction set on: everything here has
// internal linkage and names nothing of the standard library, so no code of one level can serve another.
//
// max and min give their second operand where one is NaN, so that NaN passes through a clamp max(low, x).

#define INLINE static inline __attribute__((always_inline))

namespace hasten::HASTEN_LEVEL {
namespace {

#if defined(HASTEN_AVX512)

struct V {
    using F = __m512;
    static constexpr int width = 16;
    static constexpr int score_rows = 4, mix_rows = 4;  // rows of a register tile, of 4 vectors each
    INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
    INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    INLINE __mmask16 lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
    INLINE F load_some(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
    INLINE void store_some(float* p, F x, int n) { _mm512_mask_storeu_ps(p, lanes(n), x); }
    INLINE F widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
    INLINE F load_bf16(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    INLINE F load_bf16_some(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(lanes(n), p)); }
    INLINE F set(float x) { return _mm512_set1_ps(x); }
    INLINE F iota() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
    INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
    INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
    INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
    INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
    INLINE F abs(F a) { return _mm512_abs_ps(a); }
    INLINE F if_less(F a, F b, F yes, F no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
    // 2ⁿ of n in the low bits of 1.5·2²³ + n.
    INLINE F power(F n) {
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(n), 23), _mm512_set1_epi32(127 << 23)));
    }
    INLINE float sum(F a) { return _mm512_reduce_add_ps(a); }
    INLINE float largest(F a) { return _mm512_reduce_max_ps(a); }
};

// 16 rows of 16 words each, turned.
INLINE void transpose(__m512i (&r)[16]) {
    __m512i a[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        a[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        a[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        a[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        a[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(a[i], a[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(a[i], a[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0xdd);
    }
}

#elif defined(HASTEN_AVX2)

struct V {
    using F = __m256;
    static constexpr int width = 8;
    INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
    INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    INLINE __m256i lanes(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
    INLINE F load_some(const float* p, int n) { return _mm256_maskload_ps(p, lanes(n)); }
    INLINE void store_some(float* p, F x, int n) { _mm256_maskstore_ps(p, lanes(n), x); }
    INLINE F load_bf16(const bf16* p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
    }
    INLINE F load_bf16_some(const bf16* p, int n) {
        bf16 lane[8] = {};
        for (int i = 0; i < n; ++i) lane[i] = p[i];
        return load_bf16(lane);
    }
    INLINE F set(float x) { return _mm256_set1_ps(x); }
    INLINE F iota() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
    INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
    INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
    INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
    INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
    INLINE F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    INLINE F if_less(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
    INLINE F power(F n) {
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(n), 23), _mm256_set1_epi32(127 << 23)));
    }
    INLINE float sum(F a) {
        __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
    }
    INLINE float largest(F a) {
        __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
    }
};

#else

// Four lanes in the compiler's own vectors: one register on any machine that has such, four numbers elsewhere.
struct V {
    using F __attribute__((vector_size(16))) = float;
    using I __attribute__((vector_size(16))) = std::int32_t;
    using U __attribute__((vector_size(16))) = std::uint32_t;
    static constexpr int width = 4;
    static constexpr int score_rows = 2, mix_rows = 2;
    INLINE F load(const float* p) {
        F x;
        __builtin_memcpy(&x, p, sizeof x);
        return x;
    }
    INLINE void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
    INLINE F load_some(const float* p, int n) {
        F x = {};
        for (int i = 0; i < n; ++i) x[i] = p[i];
        return x;
    }
    INLINE void store_some(float* p, F x, int n) {
        for (int i = 0; i < n; ++i) p[i] = x[i];
    }
    INLINE F load_bf16_some(const bf16* p, int n) {
        I x = {};
        for (int i = 0; i < n; ++i) x[i] = static_cast<std::int32_t>(std::uint32_t{p[i]} << 16);
        return reinterpret_cast<F>(x);
    }
    INLINE F load_bf16(const bf16* p) { return load_bf16_some(p, width); }
    INLINE F set(float x) { return F{x, x, x, x}; }
    INLINE F iota() { return F{0, 1, 2, 3}; }
    INLINE F add(F a, F b) { return a + b; }
    INLINE F sub(F a, F b) { return a - b; }
    INLINE F mul(F a, F b) { return a * b; }
    INLINE F div(F a, F b) { return a / b; }
    INLINE F fma(F a, F b, F c) { return a * b + c; }  // rounded twice: a fused one without hardware is a library call
    INLINE F max(F a, F b) { return a > b ? a : b; }
    INLINE F min(F a, F b) { return a < b ? a : b; }
    INLINE F abs(F a) { return reinterpret_cast<F>(reinterpret_cast<I>(a) & 0x7fffffff); }
    INLINE F if_less(F a, F b, F yes, F no) { return a < b ? yes : no; }
    INLINE F power(F n) { return reinterpret_cast<F>((reinterpret_cast<I>(n) << 23) + (127 << 23)); }
    INLINE float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
    INLINE float largest(F a) {
        const float even = a[0] > a[2] ? a[0] : a[2], odd = a[1] > a[3] ? a[1] : a[3];
        return even > odd ? even : odd;
    }
};

#endif

using F = V::F;

// Where x runs on from the coefficients given: c₀ + x(c₁ + x(c₂ + …)).
template <int count>
INLINE F polynomial(F x, const float (&c)[count]) {
    F y = V::set(c[count - 1]);
#pragma GCC unroll 16
    for (int i = count - 2; i >= 0; --i) y = V::fma(y, x, V::set(c[i]));
    return y;
}

// eˣ within 2e-7 of itself; 0 below e⁻⁸⁷, e⁸⁸ above; NaN of NaN. ln 2 in two parts, then the expansion by Cephes (Moshier 1992).
INLINE F exp(F x) {
    constexpr float kCoefficients[] = {
        1.0f, 1.0f, 5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f, 8.3334519073e-3f, 1.3981999507e-3f, 1.9875691500e-4f};
    const F low = V::set(-87.0f), magic = V::set(12582912.0f);
    const F inside = V::min(V::set(88.0f), V::max(low, x));
    const F shifted = V::fma(inside, V::set(1.44269504088896341f), magic);
    const F n = V::sub(shifted, magic);
    const F rest = V::fma(n, V::set(2.12194440e-4f), V::fma(n, V::set(-0.693359375f), inside));
    const F y = V::mul(polynomial(rest, kCoefficients), V::power(shifted));
    return V::if_less(x, low, V::set(0.0f), y);
}

INLINE F sigmoid(F x) { return V::div(V::set(1.0f), V::add(V::set(1.0f), exp(V::sub(V::set(0.0f), x)))); }

// Within 3e-7 of itself: Cephes' odd polynomial near zero, by eˣ elsewhere.
INLINE F tanh(F x) {
    constexpr float kCoefficients[] = {-3.33332819422e-1f, 1.33314422036e-1f, -5.37397155531e-2f, 2.06390887954e-2f, -5.70498872745e-3f};
    const F square = V::mul(x, x);
    const F near = V::fma(V::mul(polynomial(square, kCoefficients), square), x, x);
    const F far = V::sub(V::set(1.0f), V::div(V::set(2.0f), V::add(exp(V::add(x, x)), V::set(1.0f))));
    return V::if_less(V::abs(x), V::set(0.625f), near, far);
}

// The normal distribution up to x, ½ erfc(−x / √2), by the Chebyshev fit of Press et al. (Numerical Recipes, erfcc: 1.2e-7 of itself).
INLINE F normal(F x) {
    constexpr float kCoefficients[] = {-1.26551223f, 1.00002368f,  0.37409196f, 0.09678418f,  -0.18628806f,
                                       0.27886807f,  -1.13520398f, 1.48851587f, -0.82215223f, 0.17087277f};
    const F z = V::mul(V::abs(x), V::set(0.70710678118654752f));
    const F t = V::div(V::set(1.0f), V::fma(V::set(0.5f), z, V::set(1.0f)));
    const F tail = V::mul(V::mul(V::set(0.5f), t), exp(V::sub(polynomial(t, kCoefficients), V::mul(z, z))));
    return V::if_less(x, V::set(0.0f), tail, V::sub(V::set(1.0f), tail));
}

}  // namespace
}  // namespace hasten::HASTEN_LEVEL
