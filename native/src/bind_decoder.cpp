// The decoder's kernels over NumPy arrays, for tests and measurements: every argument is checked here. bf16 goes as uint16.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bind_arguments.hpp"
#include "bindings.hpp"
#include "cpu.hpp"
#include "kernels.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace hasten {
namespace {

template <class T, std::size_t dims>
using Array = nb::ndarray<T, nb::numpy, nb::ndim<dims>, nb::c_contig, nb::device::cpu>;
using Vector = Array<const float, 1>;
using Matrix = Array<const float, 2>;
using Output = Array<float, 2>;
using Cache = Array<std::uint8_t, 2>;

Activation activation_of(const std::string& name) {
    constexpr std::pair<const char*, Activation> kNames[] = {
        {"relu", Activation::relu}, {"relu_squared", Activation::relu_squared},
        {"gelu", Activation::gelu}, {"gelu_tanh", Activation::gelu_tanh},
        {"silu", Activation::silu}, {"sigmoid", Activation::sigmoid},
        {"tanh", Activation::tanh},
    };
    for (const auto& [known, activation] : kNames)
        if (name == known) return activation;
    refuse("activation is '" + name + "'; accepted: relu, relu_squared, gelu, gelu_tanh, silu, sigmoid, tanh");
}

template <class X, class Y>
void require_same(const X& x, const Y& y, const char* what) {
    require(x.ndim() == y.ndim() && std::equal(x.shape_ptr(), x.shape_ptr() + x.ndim(), y.shape_ptr()), what);
}

template <class T>
int rows_of(const T& x) {
    return static_cast<int>(x.shape(0));
}

template <class T>
int width_of(const T& x) {
    return static_cast<int>(x.shape(1));
}

void embed_rows(Array<const std::uint16_t, 2> table, Array<const std::int32_t, 1> tokens, float scale, Output y) {
    require(y.shape(0) == tokens.size() && y.shape(1) == table.shape(1), "y must be [tokens, width of table]");
    for (std::size_t i = 0; i < tokens.size(); ++i) require(tokens(i) >= 0 && tokens(i) < rows_of(table), "tokens must be rows of table");
    nb::gil_scoped_release unlocked;
    embed(table.data(), width_of(table), tokens.data(), rows_of(tokens), scale, y.data());
}

void check_norm(const Matrix& x, const Vector& weight, int group, const Output& y) {
    require_same(x, y, "y must have the shape of x");
    require(group > 0 && width_of(x) % group == 0, "group must divide the width of x");
    require(rows_of(weight) == group || rows_of(weight) == width_of(x), "weight must be [group] or [width of x]");
}

void rms_norm_rows(const std::string& isa, Matrix x, Vector weight, int group, float eps, float offset, Output y) {
    check_norm(x, weight, group, y);
    const Isa level = isa_of(isa);
    nb::gil_scoped_release unlocked;
    rms_norm(level, x.data(), rows_of(x), width_of(x), group, weight.data(), rows_of(weight), eps, offset, y.data());
}

void layer_norm_rows(const std::string& isa, Matrix x, Vector weight, std::optional<Vector> bias, int group, float eps, Output y) {
    check_norm(x, weight, group, y);
    if (bias) require_same(*bias, weight, "bias must have the shape of weight");
    const Isa level = isa_of(isa);
    nb::gil_scoped_release unlocked;
    layer_norm(level, x.data(), rows_of(x), width_of(x), group, weight.data(), bias ? bias->data() : nullptr, rows_of(weight), eps,
               y.data());
}

void add_numbers(const std::string& isa, Vector a, Vector b, Array<float, 1> y) {
    require_same(a, b, "a and b must have one shape");
    require_same(a, y, "y must have the shape of a");
    const Isa level = isa_of(isa);
    nb::gil_scoped_release unlocked;
    add(level, a.data(), b.data(), a.size(), y.data());
}

void gate_numbers(const std::string& isa, const std::string& activation, Vector gates, Vector up, Array<float, 1> y) {
    require_same(gates, up, "gate and up must have one shape");
    require_same(gates, y, "y must have the shape of gate");
    const Isa level = isa_of(isa);
    const Activation function = activation_of(activation);
    nb::gil_scoped_release unlocked;
    gate(level, function, gates.data(), up.data(), gates.size(), y.data());
}

void activate_numbers(const std::string& isa, const std::string& activation, Vector x, Array<float, 1> y) {
    require_same(x, y, "y must have the shape of x");
    const Isa level = isa_of(isa);
    const Activation function = activation_of(activation);
    nb::gil_scoped_release unlocked;
    activate(level, function, x.data(), x.size(), y.data());
}

void gate_whole_rows(const std::string& isa, const std::string& activation, Vector gates, Matrix up, Output y) {
    require(gates.size() == up.shape(0), "gate must have a number for each row of up");
    require_same(up, y, "y must have the shape of up");
    const Isa level = isa_of(isa);
    const Activation function = activation_of(activation);
    nb::gil_scoped_release unlocked;
    gate_rows(level, function, gates.data(), up.data(), rows_of(up), width_of(up), y.data());
}

void clamped_swiglu_numbers(const std::string& isa, Vector gates, Vector up, float alpha, float limit, Array<float, 1> y) {
    require_same(gates, up, "gate and up must have one shape");
    require_same(gates, y, "y must have the shape of gate");
    const Isa level = isa_of(isa);
    nb::gil_scoped_release unlocked;
    clamped_swiglu(level, gates.data(), up.data(), gates.size(), alpha, limit, y.data());
}

// scale, clip or soft_cap.
template <void (*kernel)(Isa, const float*, std::size_t, float, float*)>
void by_number(const std::string& isa, Vector x, float number, Array<float, 1> y) {
    require_same(x, y, "y must have the shape of x");
    const Isa level = isa_of(isa);
    nb::gil_scoped_release unlocked;
    kernel(level, x.data(), x.size(), number, y.data());
}

void rotate_rows(const std::string& isa, Matrix x, int heads, int start, int dims, bool interleaved, Matrix cos, Matrix sin, Output y) {
    require_same(x, y, "y must have the shape of x");
    require(heads > 0 && width_of(x) % heads == 0, "heads must divide the width of x");
    const int head_dim = width_of(x) / heads;
    require(start >= 0 && dims >= 0 && dims % 2 == 0 && dims <= head_dim && start <= head_dim - dims,
            "start and dims must lie in a head, dims even");
    require(rows_of(cos) == rows_of(x) && width_of(cos) == dims / 2, "cos must be [rows, dims / 2]");
    require_same(cos, sin, "sin must have the shape of cos");
    const Isa level = isa_of(isa);
    nb::gil_scoped_release unlocked;
    rotate(level, x.data(), rows_of(x), heads, head_dim, start, dims, interleaved, cos.data(), sin.data(), y.data());
}

PagedLayer layer_of(const Cache& cache, const std::string& format, int page, int kv_heads, int key_dim, int value_dim) {
    require(page > 0 && kv_heads > 0 && key_dim > 0 && value_dim > 0, "page, kv_heads, key_dim and value_dim must be positive");
    const PagedLayer layer{
        reinterpret_cast<std::byte*>(cache.data()), cache.shape(1), cache_format_named(format), page, kv_heads, key_dim, value_dim};
    require(layer.page_stride >= layer.bytes(), "a row of cache must hold the keys, values and scales of a page");
    require(layer.page_stride % element_bytes(layer.format) == 0, "a row of cache must hold whole elements");
    return layer;
}

void append_rows(Cache cache, const std::string& format, int page, int kv_heads, Matrix k, Matrix v, Array<const std::int64_t, 1> slots) {
    require(kv_heads > 0 && width_of(k) % kv_heads == 0 && width_of(v) % kv_heads == 0, "kv_heads must divide the widths of k and v");
    require(k.shape(0) == slots.size() && v.shape(0) == slots.size(), "k and v must have a row for each slot");
    const PagedLayer layer = layer_of(cache, format, page, kv_heads, width_of(k) / kv_heads, width_of(v) / kv_heads);
    const auto most = static_cast<std::int64_t>(cache.shape(0)) * page;
    for (std::size_t i = 0; i < slots.size(); ++i) require(slots(i) >= 0 && slots(i) < most, "slots must lie in the pages of cache");
    nb::gil_scoped_release unlocked;
    append_kv(layer, k.data(), v.data(), slots.data(), 0, rows_of(slots));
}

// What one thread does of attention: the rows in calls of `chunk`, for each key/value head.
void attend_rows(const std::string& isa, Cache cache, const std::string& format, int page, int kv_heads, int key_dim, int value_dim,
                 Array<const std::int32_t, 1> table, Matrix q, int position, float scale, Output y, int window, float softcap,
                 std::optional<Vector> slopes, std::optional<Vector> sinks, int chunk) {
    const PagedLayer layer = layer_of(cache, format, page, kv_heads, key_dim, value_dim);
    require(width_of(q) % key_dim == 0, "key_dim must divide the width of q");
    const int heads = width_of(q) / key_dim, rows = rows_of(q);
    require(heads > 0 && heads % kv_heads == 0, "kv_heads must divide the heads");
    require(y.shape(0) == q.shape(0) && y.shape(1) == static_cast<std::size_t>(heads) * static_cast<std::size_t>(value_dim),
            "y must be [rows, heads · value_dim]");
    require(!slopes || rows_of(*slopes) == heads, "slopes must be [heads]");
    require(!sinks || rows_of(*sinks) == heads, "sinks must be [heads]");
    require(window >= 0 && softcap >= 0, "window and softcap must not be negative");
    require(chunk >= 0, "chunk must not be negative");
    require(position >= 0 &&
                (static_cast<std::size_t>(position) + q.shape(0) + static_cast<std::size_t>(page) - 1) / static_cast<std::size_t>(page) <=
                    table.size(),
            "table must list the pages of every position");
    const int oldest = window > 0 ? std::max(0, position - window + 1) : 0;
    for (std::size_t i = static_cast<std::size_t>(oldest / page); i < table.size(); ++i)  // pages before them may be gone
        require(table(i) >= 0 && table(i) < rows_of(cache), "table must name pages of cache");
    const Isa level = isa_of(isa);
    const AttendShape shape{
        heads, kv_heads, key_dim, value_dim, scale, window, softcap, slopes ? slopes->data() : nullptr, sinks ? sinks->data() : nullptr};
    const int most = chunk ? chunk : std::max(rows, 1);
    std::vector<float> scratch(attend_scratch(shape, most));
    nb::gil_scoped_release unlocked;
    for (int first = 0; first < rows; first += most)
        for (int head = 0; head < kv_heads; ++head)
            attend(level, shape, layer, table.data(), q.data(), first, std::min(first + most, rows), position, head, y.data(),
                   scratch.data());
}

}  // namespace

void bind_decoder(nb::module_& m) {
    m.def("embed", embed_rows, "table"_a, "tokens"_a, "scale"_a, "y"_a.noconvert(), "y[t] = table[tokens[t]] · scale, of a bf16 table.");
    m.def("rms_norm", rms_norm_rows, "isa"_a, "x"_a, "weight"_a, "group"_a, "eps"_a, "offset"_a, "y"_a.noconvert(),
          "y = x / sqrt(mean(x²) + eps) · (offset + weight) over runs of `group` features.");
    m.def("layer_norm", layer_norm_rows, "isa"_a, "x"_a, "weight"_a, "bias"_a.none(), "group"_a, "eps"_a, "y"_a.noconvert(),
          "y = (x − mean) / sqrt(var + eps) · weight + bias over runs of `group` features.");
    m.def("add", add_numbers, "isa"_a, "a"_a, "b"_a, "y"_a.noconvert(), "y = a + b.");
    m.def("gate", gate_numbers, "isa"_a, "activation"_a, "gate"_a, "up"_a, "y"_a.noconvert(), "y = activation(gate) · up.");
    m.def("activate", activate_numbers, "isa"_a, "activation"_a, "x"_a, "y"_a.noconvert(), "y = activation(x).");
    m.def("gate_rows", gate_whole_rows, "isa"_a, "activation"_a, "gate"_a, "up"_a, "y"_a.noconvert(), "y[r] = activation(gate[r]) · up[r].");
    m.def("clamped_swiglu", clamped_swiglu_numbers, "isa"_a, "gate"_a, "up"_a, "alpha"_a, "limit"_a, "y"_a.noconvert(),
          "y = g · sigmoid(alpha·g) · (u + 1), g = min(gate, limit), u = clip(up, ±limit).");
    m.def("scale", by_number<scale>, "isa"_a, "x"_a, "factor"_a, "y"_a.noconvert(), "y = x · factor.");
    m.def("clip", by_number<clip>, "isa"_a, "x"_a, "limit"_a, "y"_a.noconvert(), "y = min(max(x, −limit), limit).");
    m.def("soft_cap", by_number<soft_cap>, "isa"_a, "x"_a, "cap"_a, "y"_a.noconvert(), "y = cap · tanh(x / cap).");
    m.def("rotate", rotate_rows, "isa"_a, "x"_a, "heads"_a, "start"_a, "dims"_a, "interleaved"_a, "cos"_a, "sin"_a, "y"_a.noconvert(),
          "Rotary embedding of `dims` features of every head from `start`; the others are copied.");
    m.def("append_kv", append_rows, "cache"_a.noconvert(), "format"_a, "page"_a, "kv_heads"_a, "k"_a, "v"_a, "slots"_a,
          "Round the rows of k and v to the cache's format and write them to their slots. A row of cache is a page's bytes.");
    m.def("attend", attend_rows, "isa"_a, "cache"_a.noconvert(), "format"_a, "page"_a, "kv_heads"_a, "key_dim"_a, "value_dim"_a, "table"_a, "q"_a,
          "position"_a, "scale"_a, "y"_a.noconvert(), "window"_a = 0, "softcap"_a = 0.0f, "slopes"_a = nb::none(), "sinks"_a = nb::none(),
          "chunk"_a = 0,
          "Attention of one sequence's rows, which are at `position` and on, over its cached pages; `chunk` rows a call, 0 for all.");
}

}  // namespace hasten
