// Mixture-of-experts kernels over NumPy arrays, for tests: every argument is checked here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "bind_arguments.hpp"
#include "bindings.hpp"
#include "experts.hpp"
#include "linear.hpp"
#include "tape_experts.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace hasten {
namespace {

template <class T, std::size_t dims>
using Array = nb::ndarray<T, nb::numpy, nb::ndim<dims>, nb::c_contig, nb::device::cpu>;

void run_route(Array<const float, 2> logits, std::optional<Array<const float, 1>> correction, bool sigmoid, bool normalize, float scale, int groups,
               int top_groups, Array<std::int32_t, 2> experts, Array<float, 2> weights) {
    const RouteShape shape{static_cast<int>(logits.shape(1)), static_cast<int>(experts.shape(1)), sigmoid ? Score::sigmoid : Score::softmax,
                           normalize, scale, groups, top_groups};
    require(can_route(shape), "as many experts cannot be chosen of these groups");
    require(experts.shape(0) == logits.shape(0) && weights.shape(0) == logits.shape(0) && weights.shape(1) == experts.shape(1),
            "experts and weights must be [rows of logits, top_k]");
    require(!correction || correction->size() == logits.shape(1), "correction must have a number for each expert");
    std::vector<float> scratch(route_scratch(shape));
    route(shape, correction ? correction->data() : nullptr, logits.data(), static_cast<int>(logits.shape(0)), scratch.data(), experts.data(),
          weights.data());
}

// Starts and places of choices [tokens, top_k] out of `count`.
struct Grouping {
    std::vector<std::int32_t> starts, places;

    Grouping(const Array<const std::int32_t, 2>& experts, int count) : starts(static_cast<std::size_t>(count) + 1), places(experts.size()) {
        for (std::size_t i = 0; i < experts.size(); ++i) require(experts.data()[i] >= 0 && experts.data()[i] < count, "experts must be in range");
        group_by_expert(experts.data(), static_cast<int>(experts.size()), count, starts.data(), places.data());
    }
};

void run_expert_linear(const std::string& isa_name, unsigned threads, const ExpertWeights& weights, Array<const float, 2> x,
                       Array<const std::int32_t, 2> experts, std::optional<Array<const float, 2>> bias, Array<float, 2> y) {
    const Isa isa = isa_of(isa_name);
    const std::vector<PackedLinear> packed = weights.packed();
    const PackedLinear& first = packed.front();
    const std::size_t tokens = experts.shape(0), top_k = experts.shape(1), rows = x.shape(0), in = x.shape(1);
    const auto out = static_cast<std::size_t>(first.out);
    require(threads >= 1, "at least one share is needed");
    require(in == static_cast<std::size_t>(first.in) && (rows == tokens || rows == tokens * top_k), "x must be [tokens or tokens · top_k, in]");
    require(y.shape(0) == tokens * top_k && y.shape(1) == out, "y must be [tokens · top_k, out]");
    require(!bias || (bias->shape(0) == packed.size() && bias->shape(1) == out), "bias must be [experts, out]");
    const Grouping grouping(experts, static_cast<int>(packed.size()));

    const bool quantized = is_integer(first.format);
    const int stride = first.padded_in();
    const std::size_t row_bytes = static_cast<std::size_t>(stride) * (quantized ? 1 : sizeof(bf16));
    std::vector<std::byte> fed(rows * row_bytes), gathered(tokens * top_k * row_bytes);
    std::vector<float> scales(rows), gathered_scales(tokens * top_k), made(y.shape(0) * out);
    std::copy(y.data(), y.data() + y.size(), made.begin());  // a product that leaves a number out leaves the caller's
    const int count = static_cast<int>(rows), n = static_cast<int>(in);
    if (quantized)
        quantize_rows(isa, x.data(), n, count, n, stride, reinterpret_cast<std::int8_t*>(fed.data()), stride, scales.data());
    else
        to_bf16(isa, x.data(), n, count, n, stride, reinterpret_cast<bf16*>(fed.data()), stride);
    const int each = static_cast<int>(rows == tokens ? top_k : 1);  // own rows are laid out by gathering one place a row
    for (std::size_t t = 0; t < rows; ++t)
        gather_rows(fed.data(), quantized ? scales.data() : nullptr, row_bytes, grouping.places.data(), static_cast<int>(t),
                    static_cast<int>(t + 1), each, gathered.data(), gathered_scales.data());
    const Activations its{gathered.data(), quantized ? gathered_scales.data() : nullptr, static_cast<int>(tokens * top_k), stride};
    for (unsigned thread = 0; thread < threads; ++thread)
        expert_linear(isa, packed.data(), static_cast<int>(packed.size()), grouping.starts.data(), its, thread, threads,
                      bias ? bias->data() : nullptr, made.data());
    for (std::size_t i = 0; i < tokens * top_k; ++i) {
        const float* const from = made.data() + static_cast<std::size_t>(grouping.places[i]) * out;
        std::copy(from, from + out, y.data() + i * out);
    }
}

void run_combine(Array<const float, 3> x, Array<const float, 2> weights, Array<const std::int32_t, 2> experts, int count, Array<float, 2> y) {
    const std::size_t tokens = x.shape(0), top_k = x.shape(1), n = x.shape(2);
    require(weights.shape(0) == tokens && weights.shape(1) == top_k && experts.shape(0) == tokens && experts.shape(1) == top_k,
            "weights and experts must be [tokens, top_k]");
    require(y.shape(0) == tokens && y.shape(1) == n, "y must be [tokens, n]");
    const Grouping grouping(experts, count);
    std::vector<float> laid(x.size());
    for (std::size_t i = 0; i < tokens * top_k; ++i)
        std::copy(x.data() + i * n, x.data() + (i + 1) * n, laid.data() + static_cast<std::size_t>(grouping.places[i]) * n);
    combine(laid.data(), static_cast<int>(n), weights.data(), grouping.places.data(), 0, static_cast<int>(tokens), static_cast<int>(top_k), y.data());
}

nb::tuple run_group_by_expert(Array<const std::int32_t, 2> experts, int count) {
    const Grouping grouping(experts, count);
    nb::list starts, places;
    for (const std::int32_t start : grouping.starts) starts.append(start);
    for (const std::int32_t its : grouping.places) places.append(its);
    return nb::make_tuple(starts, places);
}

}  // namespace

void bind_experts(nb::module_& m) {
    m.def("route", run_route, "logits"_a, "correction"_a.none(), "sigmoid"_a, "normalize"_a, "scale"_a, "groups"_a, "top_groups"_a, "experts"_a,
          "weights"_a, "Choose experts [rows, top_k] and their weights from logits [rows, experts], as program.ops.Route has it.");
    m.def("group_by_expert", run_group_by_expert, "experts"_a, "count"_a, nb::sig("def group_by_expert(experts: object, count: int) -> tuple[list[int], list[int]]"),
          "(starts, places) of choices [tokens, top_k] out of ``count`` experts.");
    m.def("expert_linear", run_expert_linear, "isa"_a, "threads"_a, "weights"_a, "x"_a, "experts"_a, "bias"_a.none(), "y"_a,
          "y[t · top_k + a] = x · weightᵀ + bias of expert experts[t, a], cut as for ``threads`` threads, on this one. x [tokens, in] or\n"
          "[tokens · top_k, in] is rounded as the weights' format asks.");
    m.def("combine", run_combine, "x"_a, "weights"_a, "experts"_a, "count"_a, "y"_a,
          "y[t] = the sum of weights[t, a] · x[t, a] in the order of choice, where the rows lie as the choices of ``experts`` out of ``count`` lay them.");
}

}  // namespace hasten
