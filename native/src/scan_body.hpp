// Recurrences over time at one level, behind vector_steps.hpp. What a part of a state is, and where it lies, is written in scan.hpp.
//
// A part is taken as whole vectors of columns side by side, or, where it is the last and narrower, vector by vector: each column has one
// place, and so one order of sums.

namespace hasten::HASTEN_LEVEL {
namespace {

// log(1 + u) of u from 0 to 1, within 2e-7 of itself: 2 artanh(u / (2 + u)), whose series is then cut at 1e-9.
INLINE F log_of_one_and(F u) {
    constexpr float kCoefficients[] = {2.0f, 2.0f / 3, 2.0f / 5, 2.0f / 7, 2.0f / 9, 2.0f / 11, 2.0f / 13, 2.0f / 15};
    const F s = V::div(u, V::add(V::set(2.0f), u));
    return V::mul(s, polynomial(V::mul(s, s), kCoefficients));
}

// log(1 + eˣ); 0 below −87.
INLINE F softplus(F x) {
    return V::add(V::max(V::set(0.0f), x), log_of_one_and(exp(V::sub(V::set(0.0f), V::abs(x)))));
}

INLINE void clear(float* p, std::size_t count) { __builtin_memset(p, 0, count * sizeof(float)); }

// Numbers of a part: those from `first` on, `most` or what is left of `all`.
INLINE int width_of(int part, int most, int all) {
    const int left = all - part * most;
    return left < most ? left : most;
}

template <int n>
struct Vectors {
    static constexpr int count = n;
};

// take(Vectors<n>, offset, lanes) of a part `width` wide, of at most `most`: once for all of it where it is whole, else vector by vector.
template <int most, class Take>
INLINE void in_vectors(int width, Take take) {
    if (width == most)
        take(Vectors<most / V::width>{}, 0, V::width);
    else
        for (int i = 0; i < width; i += V::width) take(Vectors<1>{}, i, width - i < V::width ? width - i : V::width);
}

void causal_conv(const ConvShape& shape, int part, Span span, const float* x, float* state, float* y) {
    const std::size_t n = shape.channels;
    const int first = part * kConvPart, width = width_of(part, kConvPart, shape.channels), past = shape.taps - 1;
    const float *weight = shape.weight + first, *bias = shape.bias ? shape.bias + first : nullptr;
    x += first, state += first, y += first;
    if (span.begins)
        for (int i = 0; i < past; ++i) clear(state + i * n, width);
    const auto row = [&](int t) { return t < 0 ? state + (t + past) * n : x + t * n; };
    for (int t = 0; t < span.rows; ++t) {
        float* const to = y + t * n;
        in_steps(width, [&](std::size_t i, int lanes) {
            F sum = bias ? get(bias + i, lanes) : V::set(0.0f);
            for (int tap = 0; tap <= past; ++tap) sum = V::fma(get(weight + tap * n + i, lanes), get(row(t - past + tap) + i, lanes), sum);
            put(to + i, sum, lanes);
        });
        if (shape.activated) activate(shape.activation, to, width, to);
    }
    for (int i = 0; i < past; ++i) __builtin_memcpy(state + i * n, row(span.rows - past + i), width * sizeof(float));  // from later rows on
}

void selective_scan(const SelectiveShape& shape, int part, Span span, const float* x, const float* dt, const float* b, const float* c,
                    float* state, float* y) {
    const std::size_t n = shape.channels, first = static_cast<std::size_t>(part) * kChannelPart;
    const int width = width_of(part, kChannelPart, shape.channels), states = shape.states;
    state += first * states;
    if (span.begins) clear(state, static_cast<std::size_t>(width) * states);
    in_vectors<kChannelPart>(width, [&](auto vectors, int offset, int lanes) __attribute__((always_inline)) {
        constexpr int count = decltype(vectors)::count;
        const float* const decay = shape.decay + first * states + offset;
        float* const kept = state + offset;
        for (int t = 0; t < span.rows; ++t) {
            const std::size_t at = t * n + first + offset;
            F rate[count], in[count], sum[count];
            for (int v = 0; v < count; ++v) {
                const F u = get(x + at + v * V::width, lanes);
                rate[v] = softplus(V::add(get(dt + at + v * V::width, lanes), get(shape.dt_bias + first + offset + v * V::width, lanes)));
                in[v] = V::mul(rate[v], u);
                sum[v] = V::mul(get(shape.skip + first + offset + v * V::width, lanes), u);
            }
            for (int s = 0; s < states; ++s) {
                const F into = V::set(b[static_cast<std::size_t>(t) * states + s]), out = V::set(c[static_cast<std::size_t>(t) * states + s]);
                for (int v = 0; v < count; ++v) {
                    float* const h = kept + s * width + v * V::width;
                    const F keep = exp(V::mul(rate[v], get(decay + s * width + v * V::width, lanes)));
                    const F next = V::fma(in[v], into, V::mul(keep, get(h, lanes)));
                    put(h, next, lanes);
                    sum[v] = V::fma(out, next, sum[v]);
                }
            }
            for (int v = 0; v < count; ++v) put(y + at + v * V::width, sum[v], lanes);
        }
    });
}

void dual_scan(const DualShape& shape, int head, int part, Span span, const float* x, const float* dt, const float* b, const float* c,
               float* state, float* y) {
    const int width = width_of(part, kColumnPart, shape.head_dim), states = shape.states;
    const std::size_t n = static_cast<std::size_t>(shape.heads) * shape.head_dim, shared = static_cast<std::size_t>(shape.groups) * states;
    const std::size_t column = static_cast<std::size_t>(head) * shape.head_dim + part * kColumnPart;
    const std::size_t group = static_cast<std::size_t>(head / (shape.heads / shape.groups)) * states;
    state += column * states;
    if (span.begins) clear(state, static_cast<std::size_t>(width) * states);
    const F decay = V::set(shape.decay[head]), skip = V::set(shape.skip[head]), bias = V::set(shape.dt_bias[head]);
    const F least = V::set(shape.dt_min), most = V::set(shape.dt_max);
    in_vectors<kColumnPart>(width, [&](auto vectors, int offset, int lanes) __attribute__((always_inline)) {
        constexpr int count = decltype(vectors)::count;
        float* const kept = state + offset;
        for (int t = 0; t < span.rows; ++t) {
            const std::size_t at = t * n + column + offset;
            const float *into = b + t * shared + group, *out = c + t * shared + group;
            const F rate = V::min(most, V::max(least, softplus(V::add(V::set(dt[static_cast<std::size_t>(t) * shape.heads + head]), bias))));
            const F keep = exp(V::mul(rate, decay));
            F in[count], sum[count];
            for (int v = 0; v < count; ++v) {
                const F u = get(x + at + v * V::width, lanes);
                in[v] = V::mul(rate, u);
                sum[v] = V::mul(skip, u);
            }
            for (int s = 0; s < states; ++s) {
                const F weighed = V::set(into[s]), read = V::set(out[s]);
                for (int v = 0; v < count; ++v) {
                    float* const h = kept + s * width + v * V::width;
                    const F next = V::fma(in[v], weighed, V::mul(keep, get(h, lanes)));
                    put(h, next, lanes);
                    sum[v] = V::fma(read, next, sum[v]);
                }
            }
            for (int v = 0; v < count; ++v) put(y + at + v * V::width, sum[v], lanes);
        }
    });
}

// y = x / sqrt(|x|² + 1e-6) · factor, of n numbers.
INLINE void unit(const float* x, int n, float factor, float* y) {
    const float squares = sum_over(x, n, [](F v, F sum, int) { return V::fma(v, v, sum); });
    const F inverse = V::set(factor / __builtin_sqrtf(squares + 1e-6f));
    in_steps(n, [&](std::size_t i, int lanes) { put(y + i, V::mul(get(x + i, lanes), inverse), lanes); });
}

INLINE float dot(const float* a, const float* b, int n) {
    F sum = V::set(0.0f);
    in_steps(n, [&](std::size_t i, int lanes) { sum = V::fma(get(a + i, lanes), get(b + i, lanes), sum); });
    return V::sum(sum);
}

void gated_delta_scan(const DeltaShape& shape, int head, int part, Span span, const float* q, const float* k, const float* v, const float* a,
                      const float* b, float* state, float* y, float* scratch) {
    const int width = width_of(part, kColumnPart, shape.value_dim), keys = shape.key_dim;
    const std::size_t n = static_cast<std::size_t>(shape.value_heads) * shape.value_dim, wide = static_cast<std::size_t>(shape.key_heads) * keys;
    const std::size_t column = static_cast<std::size_t>(head) * shape.value_dim + part * kColumnPart;
    const std::size_t shared = static_cast<std::size_t>(head / (shape.value_heads / shape.key_heads)) * keys;
    const float shrink = 1.0f / __builtin_sqrtf(static_cast<float>(keys));
    float *const query = scratch, *const key = scratch + keys;
    state += column * keys;
    if (span.begins) clear(state, static_cast<std::size_t>(width) * keys);
    const F decay = V::set(shape.decay[head]), bias = V::set(shape.dt_bias[head]);
    in_vectors<kColumnPart>(width, [&](auto vectors, int offset, int lanes) __attribute__((always_inline)) {
        constexpr int count = decltype(vectors)::count;
        float* const kept = state + offset;
        for (int t = 0; t < span.rows; ++t) {
            const std::size_t at = t * n + column + offset, gate = static_cast<std::size_t>(t) * shape.value_heads + head;
            unit(q + t * wide + shared, keys, shrink, query);
            unit(k + t * wide + shared, keys, 1.0f, key);
            const F keep = exp(V::mul(decay, softplus(V::add(V::set(a[gate]), bias)))), beta = sigmoid(V::set(b[gate]));
            const F both = V::set(dot(query, key, keys));
            F seen[count], sum[count];  // Sᵀk and Sᵀq of what was: one pass, and what S becomes is not waited for
            for (int i = 0; i < count; ++i) seen[i] = sum[i] = V::set(0.0f);
            for (int s = 0; s < keys; ++s) {
                const F its = V::set(key[s]), asked = V::set(query[s]);
                for (int i = 0; i < count; ++i) {
                    const F old = get(kept + s * width + i * V::width, lanes);
                    seen[i] = V::fma(its, old, seen[i]);
                    sum[i] = V::fma(asked, old, sum[i]);
                }
            }
            F change[count];
            for (int i = 0; i < count; ++i) {
                change[i] = V::mul(beta, V::sub(get(v + at + i * V::width, lanes), V::mul(keep, seen[i])));
                sum[i] = V::fma(both, change[i], V::mul(keep, sum[i]));
            }
            for (int s = 0; s < keys; ++s) {
                const F its = V::set(key[s]);
                for (int i = 0; i < count; ++i) {
                    float* const h = kept + s * width + i * V::width;
                    put(h, V::fma(its, change[i], V::mul(keep, get(h, lanes))), lanes);
                }
            }
            for (int i = 0; i < count; ++i) put(y + at + i * V::width, sum[i], lanes);
        }
    });
}

// softmax(sign · x) of n numbers, none below `floor`.
INLINE void softmax(const float* x, int n, float sign, float floor, float* y) {
    const F least = V::set(-__builtin_inff());
    const auto real = [](F v, int lanes, F other) {
        return lanes == V::width ? v : V::if_less(V::iota(), V::set(static_cast<float>(lanes)), v, other);
    };
    F tops = least, sums = V::set(0.0f);
    in_steps(n, [&](std::size_t i, int lanes) { tops = V::max(tops, real(V::mul(V::set(sign), get(x + i, lanes)), lanes, least)); });
    const F top = V::set(V::largest(tops));
    in_steps(n, [&](std::size_t i, int lanes) {
        const F e = exp(V::sub(V::mul(V::set(sign), get(x + i, lanes)), top));
        put(y + i, e, lanes);
        sums = V::add(sums, real(e, lanes, V::set(0.0f)));
    });
    const F inverse = V::set(1.0f / V::sum(sums));
    in_steps(n, [&](std::size_t i, int lanes) { put(y + i, V::max(V::set(floor), V::mul(get(y + i, lanes), inverse)), lanes); });
}

// What a head of n numbers is weighed by: y [2 · n].
INLINE void features(const float* x, int n, float floor, float* y) {
    softmax(x, n, 1.0f, floor, y);
    softmax(x, n, -1.0f, floor, y + n);
}

void linear_scan(const LinearScanShape& shape, int kv_head, Span span, const float* q, const float* k, const float* v, float* state, float* y,
                 float* scratch) {
    const int dim = shape.head_dim, count_of = 2 * dim, values = shape.value_dim, ratio = shape.ratio();
    const std::size_t features_of = count_of, keys = static_cast<std::size_t>(shape.kv_heads) * dim, n = static_cast<std::size_t>(shape.heads) * values;
    const std::size_t first = static_cast<std::size_t>(kv_head) * ratio;
    state += features_of * (values + 1) * kv_head;
    if (span.begins) clear(state, features_of * (values + 1));
    float *const sums = state + features_of * values, *const key = scratch, *const queries = scratch + features_of;
    for (int t = 0; t < span.rows; ++t) {
        features(k + t * keys + static_cast<std::size_t>(kv_head) * dim, dim, shape.floor, key);
        in_steps(features_of, [&](std::size_t i, int lanes) { put(sums + i, V::add(get(sums + i, lanes), get(key + i, lanes)), lanes); });
        const float* const value = v + (static_cast<std::size_t>(t) * shape.kv_heads + kv_head) * values;
        for (int head = 0; head < ratio; ++head) {
            float* const query = queries + head * features_of;
            features(q + (static_cast<std::size_t>(t) * shape.heads + first + head) * dim, dim, shape.floor, query);
            const F whole = V::set(dot(query, sums, count_of));
            float* const to = y + t * n + (first + head) * values;
            for (int part = 0; part * kColumnPart < values; ++part) {
                const int width = width_of(part, kColumnPart, values);
                in_vectors<kColumnPart>(width, [&](auto vectors, int offset, int lanes) __attribute__((always_inline)) {
                    constexpr int count = decltype(vectors)::count;
                    const std::size_t column = static_cast<std::size_t>(part) * kColumnPart + offset;
                    float* const kept = state + part * kColumnPart * features_of + offset;
                    F own[count], sum[count];
                    for (int i = 0; i < count; ++i) own[i] = get(value + column + i * V::width, lanes), sum[i] = V::set(0.0f);
                    for (int f = 0; f < count_of; ++f) {
                        const F its = V::set(key[f]), asked = V::set(query[f]);
                        for (int i = 0; i < count; ++i) {
                            float* const h = kept + f * width + i * V::width;
                            F s = get(h, lanes);
                            if (head == 0) {  // the others find it done
                                s = V::fma(its, own[i], s);
                                put(h, s, lanes);
                            }
                            sum[i] = V::fma(asked, s, sum[i]);
                        }
                    }
                    for (int i = 0; i < count; ++i) put(to + column + i * V::width, V::div(sum[i], whole), lanes);
                });
            }
        }
    }
}

}  // namespace

const ScanKernels kScans = {causal_conv, selective_scan, dual_scan, gated_delta_scan, linear_scan};

}  // namespace hasten::HASTEN_LEVEL
