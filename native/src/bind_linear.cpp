// Linear layers for Python: a packed weight and the kernels on it, each argument checked. For tests and measurements.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "bind_arguments.hpp"
#include "bindings.hpp"
#include "linear.hpp"
#include "tape.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace hasten {
namespace {

constexpr std::pair<const char*, WeightFormat> kFormats[] = {
    {"f32", WeightFormat::f32},   {"f16", WeightFormat::f16},   {"bf16", WeightFormat::bf16}, {"fp8", WeightFormat::fp8},
    {"int8", WeightFormat::int8}, {"int4", WeightFormat::int4}, {"int3", WeightFormat::int3}, {"int2", WeightFormat::int2},
    {"lut4", WeightFormat::lut4}};

WeightFormat format_of(const std::string& wanted) {
    std::string accepted;
    for (const auto& [name, format] : kFormats) {
        if (wanted == name) return format;
        accepted += (accepted.empty() ? "" : ", ") + std::string(name);
    }
    refuse("format is '" + wanted + "'; accepted: " + accepted);
}

const char* name(WeightFormat format) {
    for (const auto& [name, its] : kFormats)
        if (its == format) return name;
    return "";
}

using Array = nb::ndarray<nb::ro, nb::device::cpu>;
using Output = nb::ndarray<nb::device::cpu>;

// The data of a C-contiguous array of T with `dimensions`, or ValueError.
template <class T, class Any>
T* data(const char* what, const Any& array, std::size_t dimensions, const char* type) {
    bool contiguous = true;
    std::int64_t stride = 1;
    for (std::size_t i = array.ndim(); i-- > 0;) {
        contiguous = contiguous && (array.shape(i) <= 1 || array.stride(i) == stride);
        stride *= static_cast<std::int64_t>(array.shape(i));
    }
    if (array.dtype() != nb::dtype<std::remove_const_t<T>>() || array.ndim() != dimensions || (!contiguous && stride))
        refuse(std::string(what) + " must be a C-contiguous " + type + " array of " + std::to_string(dimensions) + " dimensions");
    return static_cast<T*>(const_cast<void*>(static_cast<const void*>(array.data())));
}

int extent(const char* what, std::size_t size, std::size_t least, std::size_t most) {
    if (size < least || size > most)
        refuse(std::string(what) + " is " + std::to_string(size) + "; accepted: " + std::to_string(least) + " to " + std::to_string(most));
    return static_cast<int>(size);
}

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<std::byte, Free>;

// At cache lines; in huge pages where it fills them.
Memory allocate(std::size_t bytes) {
    constexpr std::size_t kLine = 64, kPage = std::size_t{2} << 20;
    const std::size_t align = bytes >= kPage ? kPage : kLine;
    void* const memory = std::aligned_alloc(align, std::max(bytes + align - 1, align) / align * align);
    if (!memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (align == kPage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return Memory(static_cast<std::byte*>(memory));
}

// A new array that owns `memory`.
template <class T>
nb::object array_of(Memory memory, std::initializer_list<std::size_t> shape) {
    auto* const values = reinterpret_cast<T*>(memory.get());
    nb::capsule owner(memory.get(), [](void* p) noexcept { std::free(p); });
    memory.release();
    return nb::cast(nb::ndarray<nb::numpy, T>(values, shape, owner));
}

// Raises ValueError for what no weight is stored as.
WeightLayout checked_layout(const std::string& format, std::int64_t out, std::int64_t in, int group, bool zero_points, bool sparse) {
    const WeightFormat its = format_of(format);
    if (out < 1 || out > 1 << 24) refuse("the number of output channels is " + std::to_string(out) + "; accepted: 1 to " + std::to_string(1 << 24));
    if (in < 1 || in > kMostIn) refuse("the number of inputs is " + std::to_string(in) + "; accepted: 1 to " + std::to_string(kMostIn));
    const bool multiple = group == 0 || group == 32 || group == 64 || (group % 128 == 0 && group >= 0 && group <= 1024);
    if (has_scales(its) ? !multiple : group != 0)
        refuse("group is " + std::to_string(group) + "; accepted: " +
               (has_scales(its) ? "0 (a scale per channel), 32, 64 or a multiple of 128 up to 1024" : "0, as " + format + " has no scales"));
    if (zero_points && (!is_integer(its) || its == WeightFormat::int8 || its == WeightFormat::lut4)) refuse("zero points go with int4, int3 and int2, not " + format);
    if (sparse && its != WeightFormat::bf16 && its != WeightFormat::int8 && its != WeightFormat::int4)
        refuse("sparse weights are bf16, int8 or int4, not " + format);
    if (sparse && zero_points) refuse("a sparse weight has no zero points: what is left out stands for 0");
    return {its, static_cast<int>(out), static_cast<int>(in), group, zero_points, sparse};
}

void pack(WeightBuffer& weight, ThreadPool& pool, const Array& dense) {
    const PackedLinear& packed = weight.packed();
    if (packed.masks) refuse("a sparse weight is packed once");
    if (packed.codebook) refuse("a weight with a codebook is packed from codes alone");
    const bool halves = dense.dtype() == nb::dtype<bf16>();
    const char* const type = "float32 (or uint16, bits of bf16)";
    const void* const values = halves ? static_cast<const void*>(data<const bf16>("dense", dense, 2, type)) : data<const float>("dense", dense, 2, type);
    if (dense.shape(0) != static_cast<std::size_t>(packed.out) || dense.shape(1) != static_cast<std::size_t>(packed.in))
        refuse("dense must be [" + std::to_string(packed.out) + ", " + std::to_string(packed.in) + "]");
    if (halves && packed.zeros) refuse("zero points need dense in float32");
    nb::gil_scoped_release unlocked;
    if (halves)
        weight.pack(pool, static_cast<const bf16*>(values));
    else
        weight.pack(pool, static_cast<const float*>(values));
}

// The codebook of a weight that has one. Raises ValueError for one that it cannot have, or lacks.
const std::int8_t* checked_codebook(const PackedLinear& packed, const std::optional<Array>& codebook) {
    if (!codebook != !packed.codebook) refuse(packed.codebook ? "the weight has a codebook; give it" : "the weight has no codebook");
    if (!codebook) return nullptr;
    const auto* const its = data<const std::int8_t>("codebook", *codebook, 1, "int8");
    const auto count = static_cast<std::ptrdiff_t>(codebook->shape(0));
    if (count != 16 || its[0] == -128 || std::adjacent_find(its, its + count, std::greater_equal<>()) != its + count || std::find(its, its + count, 0) == its + count)
        refuse("codebook must have 16 numbers from -127 to 127, ascending, 0 among them");
    return its;
}

void take_codes(WeightBuffer& weight, ThreadPool& pool, const Array& codes, const Array& scales, const std::optional<Array>& zeros,
                const std::optional<Array>& codebook) {
    const PackedLinear& packed = weight.packed();
    const auto out = static_cast<std::size_t>(packed.out), in = static_cast<std::size_t>(packed.in), groups = static_cast<std::size_t>(scale_groups(packed));
    if (packed.masks) refuse("a sparse weight is packed once");
    if (!has_scales(packed.format)) refuse("codes are of a weight with scales, not of " + std::string(name(packed.format)));
    const auto* const its = data<const std::int8_t>("codes", codes, 2, "int8");
    const auto* const its_scales = data<const float>("scales", scales, 2, "float32");
    const auto* const its_zeros = zeros ? data<const std::int8_t>("zeros", *zeros, 2, "int8") : nullptr;
    if (codes.shape(0) != out || codes.shape(1) != in) refuse("codes must be [" + std::to_string(out) + ", " + std::to_string(in) + "]");
    if (!its_zeros != !packed.zeros) refuse(packed.zeros ? "the weight has zero points; give them" : "the weight has no zero points");
    const std::string shape = " must be [" + std::to_string(out) + ", " + std::to_string(groups) + "]";
    if (scales.shape(0) != out || scales.shape(1) != groups) refuse("scales" + shape);
    if (zeros && (zeros->shape(0) != out || zeros->shape(1) != groups)) refuse("zeros" + shape);
    const std::int8_t* const its_codebook = checked_codebook(packed, codebook);
    const int bits = packed.format == WeightFormat::int4 || its_codebook ? 4 : packed.format == WeightFormat::int3 ? 3 : packed.format == WeightFormat::int2 ? 2 : 8;
    const int least = its_codebook ? 0 : -(1 << (bits - 1)) + (weight.sparse() && bits == 8);  // see PackedLinear
    const auto fit = [&](const std::int8_t* from, std::size_t count) {
        int low = 0, high = 0;
        for (std::size_t i = 0; i < count; ++i) low = std::min<int>(low, from[i]), high = std::max<int>(high, from[i]);
        if (low < least || high >= 1 << (bits - !its_codebook))
            refuse("codes from " + std::to_string(low) + " to " + std::to_string(high) + " do not fit into " + std::to_string(bits) + " bits" +
                   (weight.sparse() && bits == 8 ? ", -128 left out" : ""));
    };
    fit(its, out * in);
    if (its_zeros) fit(its_zeros, out * groups);
    nb::gil_scoped_release unlocked;
    weight.pack_codes(pool, its, its_scales, its_zeros, its_codebook);
}

nb::object unpack(const WeightBuffer& weight) {
    const PackedLinear& packed = weight.packed();
    const auto out = static_cast<std::size_t>(packed.out), in = static_cast<std::size_t>(packed.in);
    Memory dense = allocate(out * in * sizeof(float));
    unpack_linear(packed, reinterpret_cast<float*>(dense.get()));
    return array_of<float>(std::move(dense), {out, in});
}

std::size_t size(int value) { return static_cast<std::size_t>(value); }

void run_linear(const std::string& isa_name, const WeightBuffer& packed, const Array& x, const std::optional<Array>& bias, int first, int last,
                const Output& out, const std::optional<Array>& scales, const std::optional<std::string>& activations) {
    const Isa isa = isa_of(isa_name);
    const PackedLinear& weight = packed.packed();
    const bool quantized = x.dtype() == nb::dtype<std::int8_t>();
    const void* const values = quantized ? static_cast<const void*>(data<const std::int8_t>("x", x, 2, "int8"))
                                         : static_cast<const void*>(data<const float>("x", x, 2, "float32 (or int8, with scales)"));
    const int rows = extent("the number of rows", x.shape(0), 0, 1u << 20);
    if (x.shape(1) != size(weight.in)) refuse("x has " + std::to_string(x.shape(1)) + " columns; the weight has " + std::to_string(weight.in) + " inputs");
    if (quantized && (!is_integer(weight.format) || !scales)) refuse("x of int8 needs scales, and a weight of integers");
    if (!quantized && scales) refuse("scales go with x of int8 only");
    if (quantized && std::find(static_cast<const std::int8_t*>(values), static_cast<const std::int8_t*>(values) + x.size(), -128) != static_cast<const std::int8_t*>(values) + x.size())
        refuse("x has -128; accepted: -127 to 127, which is what quantize_rows makes");
    const float* const given_scales = scales ? data<const float>("scales", *scales, 1, "float32") : nullptr;
    if (scales && scales->shape(0) != size(rows)) refuse("scales must have one value for each row of x");
    const float* const bias_values = bias ? data<const float>("bias", *bias, 1, "float32") : nullptr;
    if (bias && bias->shape(0) != size(weight.out)) refuse("bias must have one value for each output channel");
    float* const y = data<float>("out", out, 2, "float32");
    if (out.shape(0) != size(rows) || out.shape(1) != size(weight.out)) refuse("out must be [rows of x, output channels of the weight]");
    if (first < 0 || last < first || last > weight.panels())
        refuse("the panels are [" + std::to_string(first) + ", " + std::to_string(last) + "); accepted: within [0, " + std::to_string(weight.panels()) + ")");
    const std::string natural = !has_scales(weight.format) && weight.format != WeightFormat::bf16 ? "f32" : is_integer(weight.format) ? "int8" : "bf16";
    const std::string fed = activations.value_or(natural);
    if (fed != natural && !(natural == "int8" && fed == "bf16" && !quantized))
        refuse("activations are '" + fed + "'; " + name(weight.format) + " weights accept " + (natural == "int8" ? "int8 (and bf16 for x of float32)" : natural));

    nb::gil_scoped_release unlocked;
    const int in = weight.in, padded = weight.padded_in();
    const std::size_t element = fed == "f32" ? sizeof(float) : fed == "bf16" ? sizeof(bf16) : 1;
    const Memory buffer = allocate(size((rows + 15) / 16 * 16) * size(padded) * element);
    std::vector<float> row_scales(size(rows));
    if (fed == "f32") {
        auto* to = reinterpret_cast<float*>(buffer.get());
        const auto* from = static_cast<const float*>(values);
        for (int r = 0; r < rows; ++r, to += padded, from += in) std::fill(std::copy_n(from, in, to), to + padded, 0.0f);
    } else if (fed == "bf16") {
        to_bf16(isa, static_cast<const float*>(values), in, rows, in, padded, reinterpret_cast<bf16*>(buffer.get()), padded);
    } else if (!quantized) {
        quantize_rows(isa, static_cast<const float*>(values), in, rows, in, padded, reinterpret_cast<std::int8_t*>(buffer.get()), padded, row_scales.data());
    } else {
        auto* q = reinterpret_cast<std::int8_t*>(buffer.get());
        const auto* from = static_cast<const std::int8_t*>(values);
        for (int r = 0; r < rows; ++r, q += padded, from += in) std::fill(std::copy_n(from, in, q), q + padded, std::int8_t{0});
    }
    const Activations given{buffer.get(), quantized ? given_scales : fed == "int8" ? row_scales.data() : nullptr, rows, padded};
    linear(isa, weight, given, first, last, bias_values, y, weight.out);
}

nb::object run_to_bf16(const std::string& isa, const Array& x, int padded) {
    const float* const values = data<const float>("x", x, 2, "float32");
    const int rows = extent("the number of rows", x.shape(0), 0, 1u << 20), n = extent("the number of columns", x.shape(1), 0, 1u << 24);
    if (padded < n) refuse("padded is " + std::to_string(padded) + "; accepted: at least the " + std::to_string(n) + " columns of x");
    Memory y = allocate(size(rows) * size(padded) * sizeof(bf16));
    to_bf16(isa_of(isa), values, n, rows, n, padded, reinterpret_cast<bf16*>(y.get()), padded);
    return array_of<bf16>(std::move(y), {size(rows), size(padded)});
}

nb::object run_quantize_rows(const std::string& isa, const Array& x, int padded) {
    const float* const values = data<const float>("x", x, 2, "float32");
    const int rows = extent("the number of rows", x.shape(0), 0, 1u << 20), n = extent("the number of columns", x.shape(1), 0, 1u << 24);
    if (padded < n) refuse("padded is " + std::to_string(padded) + "; accepted: at least the " + std::to_string(n) + " columns of x");
    Memory q = allocate(size(rows) * size(padded)), scales = allocate(size(rows) * sizeof(float));
    quantize_rows(isa_of(isa), values, n, rows, n, padded, reinterpret_cast<std::int8_t*>(q.get()), padded, reinterpret_cast<float*>(scales.get()));
    return nb::make_tuple(array_of<std::int8_t>(std::move(q), {size(rows), size(padded)}), array_of<float>(std::move(scales), {size(rows)}));
}

nb::object run_quantize_fixed(const std::string& isa, const Array& x, int padded, float step) {
    const float* const values = data<const float>("x", x, 2, "float32");
    const int rows = extent("the number of rows", x.shape(0), 0, 1u << 20), n = extent("the number of columns", x.shape(1), 0, 1u << 24);
    if (padded < n) refuse("padded is " + std::to_string(padded) + "; accepted: at least the " + std::to_string(n) + " columns of x");
    Memory q = allocate(size(rows) * size(padded));
    quantize_fixed(isa_of(isa), values, n, rows, n, padded, step, reinterpret_cast<std::int8_t*>(q.get()), padded);
    return array_of<std::int8_t>(std::move(q), {size(rows), size(padded)});
}

}  // namespace

void bind_linear(nb::module_& m) {
    m.def("available_isas", available_isas, "The instruction-set levels of the kernels that this machine runs, best first: amx, avx512, avx2, generic.");

    nb::class_<WeightBuffer>(m, "WeightBuffer",
                             "A linear layer's weight [out, in_] in panels of 16 output channels, as the kernels read it: reserved, then packed.\n\n"
                             "`format` is f32, f16, bf16, fp8, int8, int4, int3, int2 or lut4; `group` is the number of inputs that share a scale, 0 for one\n"
                             "scale per channel (or none). Integers of up to four bits may have zero points; bf16, int8 and int4 may be sparse: only\n"
                             "elements that are not zero are stored. Raises ValueError for what cannot be packed, MemoryError if there is no room.")
        .def("__init__",
             [](WeightBuffer* self, const std::string& format, std::int64_t out, std::int64_t in, int group, bool zero_points, bool sparse) {
                 new (self) WeightBuffer(checked_layout(format, out, in, group, zero_points, sparse));
             },
             "format"_a, "out"_a, "in_"_a, "group"_a = 0, "zero_points"_a = false, "sparse"_a = false)
        .def("pack", pack, "pool"_a, "dense"_a,
             "Fill it from `dense` [out, in_], float32 or the bits of bf16 numbers as uint16, on the pool's threads.\n\n"
             "Raises ValueError for an array that does not fit.")
        .def("pack_codes", take_codes, "pool"_a, "codes"_a, "scales"_a, "zeros"_a = nb::none(), "codebook"_a = nb::none(),
             "Fill it from what is quantized already, as it is: `codes` int8 [out, in_] (of fp8 their bytes), `scales` float32 and, with zero\n"
             "points, `zeros` int8 [out, groups]; of lut4 places in `codebook` int8 [16]; a sparse weight leaves out codes of 0. Raises\n"
             "ValueError for arrays that do not fit.")
        .def("parts",
             [](nb::handle self) {
                 nb::list found;
                 for (std::span<std::byte> part : nb::cast<WeightBuffer&>(self).parts())
                     found.append(nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>(part.data(), {part.size()}, self));
                 return found;
             },
             nb::sig("def parts(self) -> list[object]"),
             "All the memory that packing fills, as views, in an order that stays; not of a sparse weight, which has its own once packed.")
        .def("lie_in",
             [](WeightBuffer& self, std::shared_ptr<MappedFile> file, const std::vector<std::size_t>& offsets) {
                 self.lie_in(std::move(file), offsets);
             },
             "file"_a, "offsets"_a,
             "Take the numbers from a file instead, where `parts` begin at these offsets. Raises ValueError for parts it does not hold.")
        .def("unpack", unpack, "The value of each element as the product sees it: float32 [out, in_].")
        .def_prop_ro("format", [](const WeightBuffer& self) { return name(self.packed().format); }, nb::sig("def format(self) -> str"))
        .def_prop_ro("group", [](const WeightBuffer& self) { return self.packed().group; })
        .def_prop_ro("out", [](const WeightBuffer& self) { return self.packed().out; })
        .def_prop_ro("in_", [](const WeightBuffer& self) { return self.packed().in; })
        .def_prop_ro("padded_in", [](const WeightBuffer& self) { return self.packed().padded_in(); })
        .def_prop_ro("panels", [](const WeightBuffer& self) { return self.packed().panels(); })
        .def_prop_ro("two_of_four", &WeightBuffer::two_of_four, "Whether it is sparse with two elements in every four inputs, which kernels need not look for.")
        .def_prop_ro("nbytes", &WeightBuffer::bytes);

    m.def("linear", run_linear, "isa"_a, "weight"_a, "x"_a, "bias"_a.none(), "first_panel"_a, "last_panel"_a, "out"_a, "scales"_a = nb::none(),
          "activations"_a = nb::none(),
          "out[:, c] = x · weightᵀ + bias for the channels c of the panels [first_panel, last_panel); other channels stay.\n\n"
          "x float32 [rows, in] is rounded to bf16 or to int8 as the weight's format asks (integers take bf16 if `activations` says so;\n"
          "f32 and f16 take float32); or it is int8 with float32 `scales` [rows].\n"
          "bias float32 [out] or None, out float32 [rows, out]; all C-contiguous. Runs on this thread without the interpreter lock.\n"
          "Raises ValueError for an isa this machine does not run, or an array or panel that does not fit.");
    m.def("to_bf16", run_to_bf16, "isa"_a, "x"_a, "padded"_a,
          "x float32 [rows, n] as the bits of bf16 numbers, rounded to nearest even: uint16 [rows, padded], zeros from n on.\n\n"
          "Raises ValueError for an isa this machine does not run, or a shape that does not fit.");
    m.def("quantize_fixed", run_quantize_fixed, "isa"_a, "x"_a, "padded"_a, "step"_a, nb::sig("def quantize_fixed(isa: str, x: object, padded: int, step: float) -> object"),
          nb::rv_policy::automatic);
    m.def("quantize_rows", run_quantize_rows, "isa"_a, "x"_a, "padded"_a, nb::sig("def quantize_rows(isa: str, x: object, padded: int) -> tuple[object, object]"),
          "x float32 [rows, n] as (int8 [rows, padded], scales float32 [rows]): x · (127 / max|x|) rounded half to even, scale max|x| / 127.\n\n"
          "Raises ValueError for an isa this machine does not run, or a shape that does not fit.");
}

}  // namespace hasten
