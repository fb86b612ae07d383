// Attention over a paged cache in vectors of float32, at one level: see decoder_vector.hpp for what the includer defines, and
// attention_straight.hpp or attention_turned.hpp, which go before, for the products. A pair is a query row and one of its heads.

namespace hasten::HASTEN_LEVEL {
namespace {

// Scores of one pair over a block → weights against the new maximum, exactly zero outside [low, high) where `masked`. Updates the pair's
// maximum and sum, and gives the factor that what was summed before has to be faded by. With scales, a key's is taken to its score, a
// value's to its weight, behind the sum.
template <bool masked>
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
        if (masked) x = V::if_less(key, begin, V::set(-__builtin_inff()), V::if_less(key, end, x, V::set(-__builtin_inff())));
        kept[i] = x;
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
                fades[pair] = low == 0 && high == kKeyBlock
                                  ? soften<false>(shape, scales, head, to_query, low, high, its, maxima[pair], sums[pair])
                                  : soften<true>(shape, scales, head, to_query, low, high, its, maxima[pair], sums[pair]);
            }
            products.mix(found, block, weights, fades, begin, end, ahead, mixed);
        }

        for (int pair = 0; pair < count * group; ++pair) {
            const std::ptrdiff_t place = static_cast<std::ptrdiff_t>(row + pair / group) * shape.heads + kv_head * group + pair % group;
            products.finish(mixed + pair * stride, 1.0f / sums[pair], y + place * shape.value_dim);
        }
    }
}

}  // namespace hasten::HASTEN_LEVEL
