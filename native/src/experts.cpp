#include "experts.hpp"

#include "linear.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "thread_pool.hpp"

namespace hasten {
namespace {

// Index of the largest of `count` numbers that are not `taken` (the lowest of equals), which is taken with that. One of them must be free.
int take_best(const float* numbers, int count, float* taken) {
    int best = -1;
    for (int i = 0; i < count; ++i)
        if (taken[i] == 0.0f && (best < 0 || numbers[i] > numbers[best])) best = i;
    taken[best] = 1.0f;
    return best;
}

void scores_of(Score score, const float* logits, int count, float* scores) {
    if (score == Score::sigmoid) {
        for (int i = 0; i < count; ++i) scores[i] = 1.0f / (1.0f + std::exp(-logits[i]));
        return;
    }
    const float most = *std::max_element(logits, logits + count);
    float sum = 0.0f;
    for (int i = 0; i < count; ++i) sum += scores[i] = std::exp(logits[i] - most);
    for (int i = 0; i < count; ++i) scores[i] /= sum;
}

// Marks the experts of losing groups as taken. `sums` and `group_taken` have room for a number per group.
void leave_out_groups(const RouteShape& shape, const float* ranking, float* taken, float* sums, float* group_taken) {
    const int size = shape.experts / shape.groups;
    for (int group = 0; group < shape.groups; ++group) {
        const float* const its = ranking + group * size;
        float* const seen = taken + group * size;
        sums[group] = its[take_best(its, size, seen)];
        if (size > 1) sums[group] += its[take_best(its, size, seen)];
    }
    std::fill(taken, taken + shape.experts, 1.0f);
    std::fill(group_taken, group_taken + shape.groups, 0.0f);
    for (int i = 0; i < shape.top_groups; ++i) {
        const int group = take_best(sums, shape.groups, group_taken);
        std::fill(taken + group * size, taken + (group + 1) * size, 0.0f);
    }
}

}  // namespace

std::size_t route_scratch(const RouteShape& shape) { return static_cast<std::size_t>(shape.experts) * 3 + static_cast<std::size_t>(shape.groups) * 2; }

void route(const RouteShape& shape, const float* correction, const float* logits, int rows, float* scratch, std::int32_t* experts, float* weights) {
    const int count = shape.experts;
    float *const scores = scratch, *const ranking = scores + count, *const taken = ranking + count, *const sums = taken + count;
    for (int row = 0; row < rows; ++row, logits += count, experts += shape.top_k, weights += shape.top_k) {
        scores_of(shape.score, logits, count, scores);
        for (int i = 0; i < count; ++i) ranking[i] = correction ? scores[i] + correction[i] : scores[i];
        std::fill(taken, taken + count, 0.0f);
        if (shape.groups > 1) leave_out_groups(shape, ranking, taken, sums, sums + shape.groups);
        float sum = 0.0f;
        for (int a = 0; a < shape.top_k; ++a) {
            experts[a] = take_best(ranking, count, taken);
            sum += weights[a] = scores[experts[a]];
        }
        for (int a = 0; a < shape.top_k; ++a) weights[a] = (shape.normalize ? weights[a] / sum : weights[a]) * shape.scale;
    }
}

void group_by_expert(const std::int32_t* experts, int assignments, int count, std::int32_t* starts, std::int32_t* places) {
    std::fill(starts, starts + count + 1, 0);
    for (int i = 0; i < assignments; ++i) ++starts[experts[i] + 1];
    for (int e = 0; e < count; ++e) starts[e + 1] += starts[e];
    for (int i = 0; i < assignments; ++i) places[i] = starts[experts[i]]++;  // now every start is where the next expert's was
    std::memmove(starts + 1, starts, static_cast<std::size_t>(count) * sizeof *starts);
    starts[0] = 0;
}

void gather_rows(const std::byte* x, const float* scales, std::size_t row_bytes, const std::int32_t* places, int first, int last, int top_k,
                 std::byte* y, float* y_scales) {
    for (int token = first; token < last; ++token)
        for (int a = 0; a < top_k; ++a) {
            const auto place = static_cast<std::size_t>(places[static_cast<std::ptrdiff_t>(token) * top_k + a]);
            std::memcpy(y + place * row_bytes, x + static_cast<std::size_t>(token) * row_bytes, row_bytes);
            if (scales) y_scales[place] = scales[token];
        }
}

void expert_linear(Isa isa, const PackedLinear* weights, int count, const std::int32_t* starts, const Activations& x, unsigned thread,
                   unsigned threads, const float* bias, float* y) {
    for (int e = 0; e < count; ++e) {
        const std::ptrdiff_t begin = starts[e];
        const int rows = starts[e + 1] - starts[e];
        if (rows == 0) continue;
        const PackedLinear& weight = weights[e];
        const std::ptrdiff_t row_bytes = x.stride * element_bytes(feed_of(weight, x));
        const Activations its{static_cast<const std::byte*>(x.rows) + begin * row_bytes, x.scales ? x.scales + begin : nullptr, rows, x.stride};
        const Share panels = share(static_cast<std::size_t>(weight.panels()), thread, threads);
        linear(isa, weight, its, static_cast<int>(panels.begin), static_cast<int>(panels.end),
               bias ? bias + static_cast<std::ptrdiff_t>(e) * weight.out : nullptr, y + begin * weight.out, weight.out);
    }
}

void combine(const float* x, int n, const float* weights, const std::int32_t* places, int first, int last, int top_k, float* y) {
    for (int token = first; token < last; ++token) {
        const std::ptrdiff_t choice = static_cast<std::ptrdiff_t>(token) * top_k;
        float* const to = y + static_cast<std::ptrdiff_t>(token) * n;
        for (int a = 0; a < top_k; ++a) {
            const float* const from = x + static_cast<std::ptrdiff_t>(places[choice + a]) * n;
            const float weight = weights[choice + a];
            if (a == 0) std::fill(to, to + n, 0.0f);
#pragma GCC ivdep
            for (int i = 0; i < n; ++i) to[i] += weight * from[i];
        }
    }
}

}  // namespace hasten
