// Norms, pointwise ops and rotary embedding at one level, behind vector_steps.hpp. Outputs may be their inputs.

namespace hasten::HASTEN_LEVEL {
namespace {

// y = function(x) of `count` numbers.
template <class Function>
INLINE void mapped(const float* x, std::size_t count, float* y, Function function) {
    in_steps(count, [&](std::size_t i, int lanes) { put(y + i, function(get(x + i, lanes)), lanes); });
}

template <class Function>
INLINE void gated(const float* gate, const float* up, std::size_t count, float* y, Function function) {
    in_steps(count, [&](std::size_t i, int lanes) { put(y + i, V::mul(function(get(gate + i, lanes)), get(up + i, lanes)), lanes); });
}

// use(function) with the vector function of `activation`.
template <class Use>
INLINE void with_function(Activation activation, Use use) {
    const auto positive = [](F x) { return V::max(V::set(0.0f), x); };
    switch (activation) {
        case Activation::relu:
            return use(positive);
        case Activation::relu_squared:
            return use([&](F x) { return V::mul(positive(x), positive(x)); });
        case Activation::gelu:
            return use([](F x) { return V::mul(x, normal(x)); });
        case Activation::gelu_tanh:  // ½(1 + tanh u) = sigmoid(2u)
            return use([](F x) {
                const F twice = V::mul(V::set(1.5957691216057308f), V::fma(V::mul(V::set(0.044715f), V::mul(x, x)), x, x));
                return V::mul(x, sigmoid(twice));
            });
        case Activation::silu:
            return use([](F x) { return V::mul(x, sigmoid(x)); });
        case Activation::sigmoid:
            return use([](F x) { return sigmoid(x); });
        case Activation::tanh:
            return use([](F x) { return tanh(x); });
    }
}

}  // namespace

void rms_norm(const float* x, int rows, int n, int group, const float* weight, int weight_n, float eps, float offset, float* y) {
    for (int row = 0; row < rows; ++row)
        for (int begin = 0; begin < n; begin += group) {
            const float* from = x + static_cast<std::size_t>(row) * n + begin;
            float* to = y + static_cast<std::size_t>(row) * n + begin;
            const float* factor = weight + begin % weight_n;
            const float squares = sum_over(from, group, [](F v, F sum, int) { return V::fma(v, v, sum); });
            const F inverse = V::set(1.0f / __builtin_sqrtf(squares / static_cast<float>(group) + eps));
            in_steps(group, [&](std::size_t i, int lanes) {
                put(to + i, V::mul(V::mul(get(from + i, lanes), inverse), V::add(V::set(offset), get(factor + i, lanes))), lanes);
            });
        }
}

void layer_norm(const float* x, int rows, int n, int group, const float* weight, const float* bias, int weight_n, float eps, float* y) {
    for (int row = 0; row < rows; ++row)
        for (int begin = 0; begin < n; begin += group) {
            const float* from = x + static_cast<std::size_t>(row) * n + begin;
            float* to = y + static_cast<std::size_t>(row) * n + begin;
            const float *factor = weight + begin % weight_n, *shift = bias ? bias + begin % weight_n : nullptr;
            const F mean = V::set(sum_over(from, group, [](F v, F sum, int) { return V::add(sum, v); }) / static_cast<float>(group));
            const float squares = sum_over(from, group, [&](F v, F sum, int lanes) {
                F apart = V::sub(v, mean);
                if (lanes < V::width) apart = V::if_less(V::iota(), V::set(static_cast<float>(lanes)), apart, V::set(0.0f));
                return V::fma(apart, apart, sum);
            });
            const F inverse = V::set(1.0f / __builtin_sqrtf(squares / static_cast<float>(group) + eps));
            in_steps(group, [&](std::size_t i, int lanes) {
                const F normed = V::mul(V::mul(V::sub(get(from + i, lanes), mean), inverse), get(factor + i, lanes));
                put(to + i, shift ? V::add(normed, get(shift + i, lanes)) : normed, lanes);
            });
        }
}

void add(const float* a, const float* b, std::size_t count, float* y) {
    in_steps(count, [&](std::size_t i, int lanes) { put(y + i, V::add(get(a + i, lanes), get(b + i, lanes)), lanes); });
}

void activate(Activation activation, const float* x, std::size_t count, float* y) {
    with_function(activation, [&](auto function) { mapped(x, count, y, function); });
}

void gate(Activation activation, const float* gate, const float* up, std::size_t count, float* y) {
    with_function(activation, [&](auto function) { gated(gate, up, count, y, function); });
}

void gate_rows(Activation activation, const float* gate, const float* up, int rows, int n, float* y) {
    with_function(activation, [&](auto function) {
        for (int row = 0; row < rows; ++row, up += n, y += n) {
            const F factor = function(V::set(gate[row]));
            mapped(up, n, y, [&](F x) { return V::mul(factor, x); });
        }
    });
}

void clamped_swiglu(const float* gate, const float* up, std::size_t count, float alpha, float limit, float* y) {
    const F most = V::set(limit), least = V::set(-limit);
    in_steps(count, [&](std::size_t i, int lanes) {
        const F g = V::min(most, get(gate + i, lanes)), u = V::min(most, V::max(least, get(up + i, lanes)));
        put(y + i, V::mul(V::mul(g, sigmoid(V::mul(V::set(alpha), g))), V::add(u, V::set(1.0f))), lanes);
    });
}

void scale(const float* x, std::size_t count, float factor, float* y) {
    mapped(x, count, y, [&](F v) { return V::mul(v, V::set(factor)); });
}

void clip(const float* x, std::size_t count, float limit, float* y) {
    mapped(x, count, y, [&](F v) { return V::min(V::set(limit), V::max(V::set(-limit), v)); });
}

void soft_cap(const float* x, std::size_t count, float cap, float* y) {
    mapped(x, count, y, [&](F v) { return V::mul(V::set(cap), tanh(V::div(v, V::set(cap)))); });
}

void rotate(const float* x, int rows, int heads, int head_dim, int start, int dims, bool interleaved, const float* cos, const float* sin,
            float* y) {
    const int half = dims / 2;
    for (int row = 0; row < rows; ++row, cos += half, sin += half)
        for (int head = 0; head < heads; ++head, x += head_dim, y += head_dim) {
            if (x != y) {
                __builtin_memcpy(y, x, start * sizeof(float));
                __builtin_memcpy(y + start + dims, x + start + dims, (head_dim - start - dims) * sizeof(float));
            }
            const float* from = x + start;
            float* to = y + start;
            if (interleaved) {
#pragma GCC ivdep
                for (int i = 0; i < half; ++i) {
                    const float a = from[2 * i], b = from[2 * i + 1];
                    to[2 * i] = a * cos[i] - b * sin[i];
                    to[2 * i + 1] = b * cos[i] + a * sin[i];
                }
            } else {
                in_steps(half, [&](std::size_t i, int lanes) {
                    const F a = get(from + i, lanes), b = get(from + half + i, lanes), c = get(cos + i, lanes), s = get(sin + i, lanes);
                    put(to + i, V::sub(V::mul(a, c), V::mul(b, s)), lanes);
                    put(to + half + i, V::add(V::mul(b, c), V::mul(a, s)), lanes);
                });
            }
        }
}

}  // namespace hasten::HASTEN_LEVEL
