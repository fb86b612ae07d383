// Attention over a paged cache in vectors of float32, at one level: see decoder_vector.hpp for what the includer defines, and
// attention_straight.hpp or attention_turned.hpp, which go before, for the products. A pair is a query row and one of its heads.

namespace hasten::HASTEN_LEVEL {
namespace {

// Scores of one pair over a block, scaled and capped and tilted, −∞ outside [low, high) where `masked`; gives the largest. With scales, a
// key's is taken to its score.
template <bool masked>
INLINE float prepare_scores(const AttendShape& shape, const BlockScales* scales, int head, int to_query, int low, int high, float* scores) {
    F most = V::set(-__builtin_inff());
    const F begin = V::set(static_cast<float>(low)), end = V::set(static_cast<float>(high));
    for (int t = 0; t < kKeyBlock; t += V::width) {
        const F key = V::add(V::iota(), V::set(static_cast<float>(t)));
        F x = V::load(scores + t);
        if (scales) x = V::mul(x, V::load(scales->keys + t));
        x = V::mul(x, V::set(shape.scale));
        if (shape.softcap > 0) x = V::mul(V::set(shape.softcap), tanh(V::div(x, V::set(shape.softcap))));
        if (shape.slopes) x = V::fma(V::set(shape.slopes[head]), V::sub(key, V::set(static_cast<float>(to_query))), x);
        if (masked) x = V::if_less(key, begin, V::set(-__builtin_inff()), V::if_less(key, end, x, V::set(-__builtin_inff())));
        V::store(scores + t, x);
        most = V::max(most, x);
    }
    return V::largest(most);
}

// Prepared scores of one pair → weights against the maximum; gives their sum. With scales, a value's is taken to its weight, behind the sum.
INLINE float soften(const BlockScales* scales, float maximum, float* scores) {
    const F top = V::set(maximum);
    F sums = V::set(0.0f);
#pragma GCC unroll 4
    for (int t = 0; t < kKeyBlock; t += V::width) {
        const F weight = exp(V::sub(V::load(scores + t), top));  // exactly zero of −∞
        V::store(scores + t, scales ? V::mul(weight, V::load(scales->values + t)) : weight);
        sums = V::add(sums, weight);
    }
    return V::sum(sums);
}

// x[i] → eˣ for i in [begin, end).
INLINE void exp_all(float* x, int begin, int end) {
    int i = begin;
    for (; i + V::width <= end; i += V::width) V::store(x + i, exp(V::load(x + i)));
    if (i < end) V::store_some(x + i, exp(V::load_some(x + i, end - i)), end - i);
}

}  // namespace

void attend(const AttendShape& shape, const PagedLayer& layer, const std::int32_t* table, const float* q, int first, int last, int position,
            int kv_head, float* y, float* scratch) {
    const int group = shape.heads / shape.kv_heads, together = rows_together(shape, last - first), stride = Products::stride_of(shape);
    Scratch pieces(scratch);
    Products products(shape, layer.format, together * group, pieces);
    float* weights = pieces.take(static_cast<std::size_t>(together) * group * kKeyBlock);
    float* mixed = pieces.take(static_cast<std::size_t>(together) * group * stride);
    float* maxima = pieces.take(static_cast<std::size_t>(together) * group);
    float* sums = pieces.take(static_cast<std::size_t>(together) * group);
    float* fades = pieces.take(static_cast<std::size_t>(together) * group);
    BlockScales wide_scales;

    for (int row = first; row < last; row += together) {
        const int count = lesser(together, last - row), at = position + row;
        for (int pair = 0; pair < count * group; ++pair) {  // a sink is a score that was there before the first key, of no value
            const int head = kv_head * group + pair % group;
            products.take_query(pair, q + (static_cast<std::ptrdiff_t>(row + pair / group) * shape.heads + head) * shape.key_dim);
            maxima[pair] = shape.sinks ? shape.sinks[head] : -__builtin_inff();
            sums[pair] = shape.sinks ? 1.0f : 0.0f;
        }
        for (int i = 0; i < count * group * stride; ++i) mixed[i] = 0.0f;

        Blocks blocks(shape, layer, table, kv_head, at, count);
        blocks.here().ask(0, kKeyBlock);
        for (; blocks.more(); blocks.next()) {
            const KeyBlock& block = blocks.block();
            const BlockRows& found = blocks.rows();
            const Ahead ahead = blocks.ahead();
            const BlockScales* scales = widened(blocks.scales(), wide_scales);
            const int begin = block.begin * group, end = block.end * group;
            products.score(found, block, begin, end, ahead, weights);
            for (int pair = begin; pair < end; ++pair) {
                const int to_query = at + pair / group - block.base, head = kv_head * group + pair % group,
                          low = greater(0, oldest_seen(shape, to_query + block.base) - block.base), high = lesser(to_query + 1, kKeyBlock);
                float* its = weights + pair * kKeyBlock;
                const float most = low == 0 && high == kKeyBlock ? prepare_scores<false>(shape, scales, head, to_query, low, high, its)
                                                                 : prepare_scores<true>(shape, scales, head, to_query, low, high, its);
                const float before = maxima[pair];
                maxima[pair] = most > before ? most : before;
                fades[pair] = before - maxima[pair];
            }
            exp_all(fades, begin, end);  // what was summed before is faded by
            for (int pair = begin; pair < end; ++pair)
                sums[pair] = sums[pair] * fades[pair] + soften(scales, maxima[pair], weights + pair * kKeyBlock);
            products.mix(found, block, weights, fades, begin, end, ahead, mixed);
        }

        for (int pair = 0; pair < count * group; ++pair) {
            const std::ptrdiff_t place = static_cast<std::ptrdiff_t>(row + pair / group) * shape.heads + kv_head * group + pair % group;
            products.finish(mixed + pair * stride, 1.0f / sums[pair], y + place * shape.value_dim);
        }
    }
}

}  // namespace hasten::HASTEN_LEVEL
