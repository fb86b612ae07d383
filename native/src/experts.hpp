// Mixture of experts: choosing experts, laying rows out expert by expert, their products, and the weighted sum of what they gave.
//
// Choice a of token t is assignment t · top_k + a. From the gathering to the sum, every value [tokens, top_k, n] lies expert by
// expert: assignment i is row places[i], and expert e has the rows starts[e] to starts[e + 1], earlier tokens first. So an expert's
// rows are one run, its weight is read once a step, and nothing is sorted back. The places depend on the batch, the numbers do not.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

namespace hasten {

enum class Score { softmax, sigmoid };

struct RouteShape {
    int experts, top_k;
    Score score;
    bool normalize;  // weights are divided by their sum
    float scale;
    int groups, top_groups;  // of `groups` equal runs of experts, only those `top_groups` compete whose two best score highest
};

// Whether there are groups as said, and enough experts in the best of them.
inline bool can_route(const RouteShape& shape) {
    return shape.groups >= 1 && shape.experts >= 1 && shape.experts % shape.groups == 0 && shape.top_groups >= 1 &&
           shape.top_groups <= shape.groups && shape.top_k >= 1 && shape.top_k <= shape.top_groups * (shape.experts / shape.groups);
}

// Of logits [rows, experts]: experts [rows, top_k], falling in score, ties to the lower index, and their weights [rows, top_k].
// `correction` [experts], or null, is added to the scores for choosing only. The same bits at every instruction set; the experts are
// distinct and within range whatever the logits are, NaN included. `scratch` has route_scratch(shape) floats or more.
std::size_t route_scratch(const RouteShape& shape);
void route(const RouteShape& shape, const float* correction, const float* logits, int rows, float* scratch, std::int32_t* experts, float* weights);

// A stable counting sort of `assignments` chosen experts out of `count`: starts [count + 1], places [assignments].
void group_by_expert(const std::int32_t* experts, int assignments, int count, std::int32_t* starts, std::int32_t* places);

// Copy the rows of tokens [first, last), `row_bytes` apart in x and in y, to the places of their assignments; so too their scales, where
// there are any. Whole rows are copied, padding included.
void gather_rows(const std::byte* x, const float* scales, std::size_t row_bytes, const std::int32_t* places, int first, int last, int top_k,
                 std::byte* y, float* y_scales);

// y[r] = x[r] · weightᵀ + bias with the weight of the expert that has row r, for share `thread` of `threads` of every expert's panels, as
// linear() has it. Experts without rows are not read. x and y lie expert by expert; bias is [experts, out] or null.
void expert_linear(Isa isa, const PackedLinear* weights, int count, const std::int32_t* starts, const Activations& x, unsigned thread,
                   unsigned threads, const float* bias, float* y);

// y[t] = Σₐ weights[t, a] · x[places[t · top_k + a]] for tokens [first, last), added in the order of choice; x [·, n], y [tokens, n]. The
// same bits at every instruction set.
void combine(const float* x, int n, const float* weights, const std::int32_t* places, int first, int last, int top_k, float* y);

}  // namespace hasten
