// Runs of numbers taken vector by vector, behind decoder_vector.hpp: see there for what the includer defines.
//
// Sums run over 4 vectors of lanes in turn, are added pairwise, then folded in half until one is left.

namespace hasten::HASTEN_LEVEL {
namespace {

// The sum of term(vector) over `count` numbers; lanes beyond them are zero after `term`, which is told how many are real.
template <class Term>
INLINE float sum_over(const float* x, int count, Term term) {
    F sums[4] = {V::set(0.0f), V::set(0.0f), V::set(0.0f), V::set(0.0f)};
    int i = 0;
    for (; i + 4 * V::width <= count; i += 4 * V::width)
        for (int k = 0; k < 4; ++k) sums[k] = term(V::load(x + i + k * V::width), sums[k], V::width);
    for (; i + V::width <= count; i += V::width) sums[0] = term(V::load(x + i), sums[0], V::width);
    if (i < count) sums[0] = term(V::load_some(x + i, count - i), sums[0], count - i);
    return V::sum(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
}

// step(offset, lanes) over `count` numbers; lanes < width in the last step only.
template <class Step>
INLINE void in_steps(std::size_t count, Step step) {
    std::size_t i = 0;
    for (; i + V::width <= count; i += V::width) step(i, V::width);
    if (i < count) step(i, static_cast<int>(count - i));
}

INLINE F get(const float* p, int lanes) { return lanes == V::width ? V::load(p) : V::load_some(p, lanes); }
INLINE void put(float* p, F x, int lanes) { lanes == V::width ? V::store(p, x) : V::store_some(p, x, lanes); }

}  // namespace
}  // namespace hasten::HASTEN_LEVEL
