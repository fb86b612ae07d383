// The passes of sampling_levels.hpp, for the level whose namespace and target pragma this is included under. Vectors are the compiler's
// own, of the HASTEN_BYTES that the level's registers have. Nothing of the standard library is named here, so that no code of one level
// can serve another.

using Floats = float __attribute__((vector_size(HASTEN_BYTES)));
using Ints = std::int32_t __attribute__((vector_size(HASTEN_BYTES)));
using HalfFloats = float __attribute__((vector_size(HASTEN_BYTES / 2)));
using Doubles = double __attribute__((vector_size(HASTEN_BYTES)));
using HalfWords = std::uint32_t __attribute__((vector_size(HASTEN_BYTES / 2)));
using Words = std::uint64_t __attribute__((vector_size(HASTEN_BYTES)));

constexpr int kFloats = HASTEN_BYTES / 4, kWords = HASTEN_BYTES / 8, kRun = 4 * kFloats;

#define INLINE static inline __attribute__((always_inline))

INLINE Floats load(const float* x) {
    Floats y;
    __builtin_memcpy(&y, x, sizeof y);
    return y;
}

template <class To, class From>
inline __attribute__((always_inline)) To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From));
    return (To)x;  // of vectors: the same bits
}

INLINE bool any(Ints mask) {
    const Words words = bits_as<Words>(mask);
    std::uint64_t all = 0;
    for (int lane = 0; lane < kWords; ++lane) all |= words[lane];
    return all != 0;
}

static void scan(const float* x, int n, float* largest, bool* has_nan) {
    const Floats low = Floats{} - __builtin_inff();
    Floats a = low, b = low, c = low, d = low;
    Ints nan{};
    int i = 0;
    for (; i + kRun <= n; i += kRun) {
        const Floats p = load(x + i), q = load(x + i + kFloats), r = load(x + i + 2 * kFloats), s = load(x + i + 3 * kFloats);
        a = p > a ? p : a;
        b = q > b ? q : b;
        c = r > c ? r : c;
        d = s > d ? s : d;
        nan |= ((p != p) | (q != q)) | ((r != r) | (s != s));
    }
    a = b > a ? b : a;
    c = d > c ? d : c;
    a = c > a ? c : a;
    float found = -__builtin_inff();
    for (int lane = 0; lane < kFloats; ++lane) found = a[lane] > found ? a[lane] : found;
    bool wrong = any(nan);
    for (; i < n; ++i) {
        found = x[i] > found ? x[i] : found;
        wrong |= x[i] != x[i];
    }
    *largest = found;
    *has_nan = wrong;
}

static int gather_above(const float* x, int n, float low, std::int32_t* ids) {
    const Floats bound = Floats{} + low;
    int count = 0, i = 0;
    for (; i + kRun <= n; i += kRun) {
        const Floats p = load(x + i), q = load(x + i + kFloats), r = load(x + i + 2 * kFloats), s = load(x + i + 3 * kFloats);
        if (!any(((p > bound) | (q > bound)) | ((r > bound) | (s > bound)))) continue;
        for (int j = i; j < i + kRun; ++j) {
            ids[count] = j;
            count += x[j] > low;
        }
    }
    for (; i < n; ++i) {
        ids[count] = i;
        count += x[i] > low;
    }
    return count;
}

// Log-weights of kWords logits, none below -40, where mass is long 0. What is missing of them is as -inf.
INLINE Doubles log_weights(const float* x, int n, Scale scale) {
    HalfFloats part;
    if (n >= kWords) {
        __builtin_memcpy(&part, x, sizeof part);
    } else {
        for (int lane = 0; lane < kWords; ++lane) part[lane] = lane < n ? x[lane] : -__builtin_inff();
    }
    const Doubles t = (__builtin_convertvector(part, Doubles) - scale.largest) * scale.inverse;
    const Doubles least = Doubles{} - 40.0;
    return t > least ? t : least;
}

constexpr double kInteger = 0x1p52;  // added to 0 … 2⁵¹ leaves the nearest integer in the low bits

INLINE Words nearest(Doubles x) {
    return bits_as<Words>(x + kInteger) & ((std::uint64_t{1} << 52) - 1);
}

// eᵗ · kMassOne to the nearest integer, for -40 ≤ t ≤ 0. With n = t / ln 2 to the nearest, r = t − n · ln 2 is at most 0.35, where
// Taylor's polynomial of degree 9 is within 1e-11 of eʳ.
INLINE Words mass_of(Doubles t) {
    constexpr double kShift = 0x1.8p52;
    const Doubles shifted = t * 0x1.71547652b82fep0 + kShift, n = shifted - kShift;
    const Doubles r = (t - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;  // ln 2 in two parts; n times the first is exact
    Doubles y = Doubles{} + 1.0 / 362880.0;
    y = y * r + 1.0 / 40320.0;
    y = y * r + 1.0 / 5040.0;
    y = y * r + 1.0 / 720.0;
    y = y * r + 1.0 / 120.0;
    y = y * r + 1.0 / 24.0;
    y = y * r + 1.0 / 6.0;
    y = y * r + 0.5;
    y = y * r + 1.0;
    y = y * r + 1.0;
    const Words power = (bits_as<Words>(shifted) + (1023 + kMassBits)) << 52;  // 2ⁿ · kMassOne: n is in the low bits, the others go
    return nearest(y * bits_as<Doubles>(power));
}

INLINE Words bucket_of(Doubles t) {
    const Doubles place = t * -16.0, last = Doubles{} + (kBuckets - 1);
    return nearest(place < last ? place : last);
}

static void bucket_masses(const float* x, int n, Scale scale, std::uint64_t* buckets) {
    for (int i = 0; i < n; i += kWords) {
        const Doubles t = log_weights(x + i, n - i, scale);
        const Words mass = mass_of(t), bucket = bucket_of(t);
        std::uint64_t its_mass[kWords], its_bucket[kWords];
        __builtin_memcpy(its_mass, &mass, sizeof mass);
        __builtin_memcpy(its_bucket, &bucket, sizeof bucket);
        for (int lane = 0; lane < kWords; ++lane) buckets[its_bucket[lane]] += its_mass[lane];
    }
}

static int gather_bucket(const float* x, int n, Scale scale, int bucket, std::int32_t* ids) {
    const Words wanted = Words{} + static_cast<std::uint64_t>(bucket);
    int count = 0;
    for (int i = 0; i < n; i += kWords) {
        const auto inside = bucket_of(log_weights(x + i, n - i, scale)) == wanted;
        if (!any(bits_as<Ints>(inside))) continue;
        for (int lane = 0; lane < kWords && i + lane < n; ++lane)
            if (inside[lane]) ids[count++] = i + lane;
    }
    return count;
}

static void masses(const float* x, int n, Scale scale, std::uint64_t* out) {
    for (int i = 0; i < n; i += kWords) {
        const Words mass = mass_of(log_weights(x + i, n - i, scale));
        for (int lane = 0; lane < kWords && i + lane < n; ++lane) out[i + lane] = mass[lane];
    }
}

// The product of the lower halves of a's words and m.
INLINE Words product(Words a, std::uint32_t m) {
#if !defined(__x86_64__)
    return (a & 0xffffffff) * m;
#elif HASTEN_BYTES == 64
    return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)(Words{} + m));
#elif HASTEN_BYTES == 32
    return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)(Words{} + m));
#else
    return (Words)_mm_mul_epu32((__m128i)a, (__m128i)(Words{} + m));
#endif
}

// The upper halves of the noise of 4 · kWords ids from `first`, a multiple of 4: philox() of a block in each lane, of whose words only
// the lower halves count.
INLINE void upper_noise(const NoiseKey& key, std::uint32_t first, std::uint32_t* out) {
    Words c0{}, c1 = Words{} + key.position, c2 = Words{} + key.choice, c3 = Words{} + key.purpose;
    for (int lane = 0; lane < kWords; ++lane) c0[lane] = first / 4 + lane;
    std::uint32_t k0 = static_cast<std::uint32_t>(key.seed), k1 = static_cast<std::uint32_t>(key.seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const Words a = product(c0, kPhiloxMultipliers[0]), b = product(c2, kPhiloxMultipliers[1]);
        c0 = (b >> 32) ^ c1 ^ k0;
        c1 = b;
        c2 = (a >> 32) ^ c3 ^ k1;
        c3 = a;
        k0 += kPhiloxWeyl[0];
        k1 += kPhiloxWeyl[1];
    }
    const Words low = (c0 & 0xffffffff) | c1 << 32, high = (c2 & 0xffffffff) | c3 << 32;
    for (int lane = 0; lane < kWords; ++lane) {
        const std::uint64_t words[2] = {low[lane], high[lane]};
        __builtin_memcpy(out + 4 * lane, words, sizeof words);
    }
}

// An id wins against a score only if its noise is at most e^(w − score). With y = (w − score) / ln 2, 2ʸ ≤ 2^⌊y⌋ · (1 + y − ⌊y⌋), whose
// bits are those of (1023 + y) · 2⁵²: of these the upper half, which a sum with 1.5 · 2³² leaves in the lower. 1e-6 makes good what
// rounding may take away.
static int contenders(const float* x, int n, Scale scale, double score, const NoiseKey& key, std::uint32_t first, std::int32_t* ids) {
    constexpr int kIds = 4 * kWords;
    const Doubles all = Doubles{} + 1e-6;
    int count = 0;
    for (int i = 0; i < n; i += kIds) {
        Doubles y[4];
        Ints wide{};
        for (int part = 0; part < 4; ++part) {
            const int at = i + part * kWords;
            y[part] = (log_weights(x + at, n - at, scale) - score) * 0x1.71547652b82fep0 + 1e-6;
            y[part] = y[part] < all ? y[part] : all;
            wide |= bits_as<Ints>(y[part] > -54.0);
        }
        if (!any(wide)) continue;  // no noise is so small
        std::uint32_t noise[kIds];
        upper_noise(key, first + static_cast<std::uint32_t>(i), noise);
        for (int part = 0; part < 4; ++part) {
            const Doubles bound = bits_as<Doubles>(bits_as<Words>((y[part] + 1023.0) + 0x1.8p32) << 32) * 0x1p32 + kInteger;
            HalfWords halves;
            __builtin_memcpy(&halves, noise + part * kWords, sizeof halves);
            const Doubles its = bits_as<Doubles>(__builtin_convertvector(halves, Words) | (std::uint64_t{0x433} << 52));  // + kInteger
            const auto wins = its <= bound;
            if (!any(bits_as<Ints>(wins))) continue;
            for (int lane = 0; lane < kWords && i + part * kWords + lane < n; ++lane)
                if (wins[lane]) ids[count++] = i + part * kWords + lane;
        }
    }
    return count;
}

#undef INLINE

constexpr SamplingPasses kPasses{scan, gather_above, bucket_masses, gather_bucket, masses, contenders};
