// The Python face of the native code: every argument is checked here, and the interpreter lock is released for the work.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "cpu.hpp"
#include "roofline.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace hasten;

namespace {

using Rate = std::pair<double, std::string>;

constexpr long long kMostRepeats = 100;
constexpr double kMostSeconds = 60;

[[noreturn]] void refuse(const char* name, nb::handle value, const std::string& accepted) {
    throw nb::value_error((std::string(name) + " is " + nb::repr(value).c_str() + "; accepted: " + accepted).c_str());
}

// The value, or a ValueError that says what [low, high] is.
long long within(const char* name, nb::int_ value, long long low, long long high, const std::string& what) {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
    if (overflow || number < low || number > high)
        refuse(name, value, std::to_string(low) + " to " + std::to_string(high) + " (" + what + ")");
    return number;
}

unsigned thread_count(nb::int_ threads) {
    return static_cast<unsigned>(within("threads", threads, 1, allowed_threads(), "the CPUs this process may run on"));
}

Rate read_rate(nb::int_ bytes, nb::int_ threads, nb::int_ repeats, const std::string& isa) {
    const unsigned count = thread_count(threads);
    const auto least = static_cast<long long>(count * kLeastBytesPerThread), most = static_cast<long long>(available_memory());
    const auto size = static_cast<std::size_t>(within("bytes", bytes, least, most, "1 MiB per thread to the memory available"));
    const auto passes = static_cast<unsigned>(within("repeats", repeats, 1, kMostRepeats, "passes over the buffer"));
    nb::gil_scoped_release unlocked;
    const Measured measured = streaming_read(size, count, passes, isa);
    return {measured.rate, measured.isa};
}

template <std::vector<PeakKernel> (*kernels)()>
Rate peak_rate(nb::int_ threads, double seconds, const std::string& isa) {
    const unsigned count = thread_count(threads);
    if (!(seconds > 0 && seconds <= kMostSeconds)) refuse("seconds", nb::float_(seconds), "above 0, at most 60");
    nb::gil_scoped_release unlocked;
    const Measured measured = peak(kernels(), count, seconds, isa);
    return {measured.rate, measured.isa};
}

template <class Kernel>
std::vector<std::string> names(const std::vector<Kernel>& kernels) {
    std::vector<std::string> isas;
    for (const Kernel& kernel : kernels) isas.emplace_back(kernel.isa);
    return isas;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "hasten's native code: what the processor has, and how fast it is.";

    m.def("cpu_vendor", [] { return cpu().vendor; }, "The processor's maker as it names itself, 'GenuineIntel'; empty away from x86-64.");
    m.def("cpu_brand", [] { return cpu().brand; }, "The processor's model as it names itself; empty where it does not.");
    m.def(
        "cpu_features",
        [] {
            nb::dict found;
            for (const NamedFeature& feature : named_features()) found[feature.name] = cpu().features.*feature.flag;
            return found;
        },
        nb::sig("def cpu_features() -> dict[str, bool]"),
        "For each instruction set: does the processor have it, and does the system save its registers. All False away from x86-64.");
    m.def("amx_granted", amx_granted,
          "Ask the kernel to let this process use AMX tiles; True if it does, and the grant stays. False where there are none.");
    m.def(
        "instruction_sets",
        [] {
            nb::dict found;
            found["read"] = names(read_kernels());
            found["bf16"] = names(bf16_kernels());
            found["int8"] = names(int8_kernels());
            found["f32"] = names(f32_kernels());
            return found;
        },
        nb::sig("def instruction_sets() -> dict[str, list[str]]"),
        "The instruction sets that 'read', 'bf16', 'int8' and 'f32' can be measured with on this machine, best first, 'generic' last.");

    m.def("streaming_read", read_rate, "bytes"_a, "threads"_a, "repeats"_a, "isa"_a = kBest,
          "Read a freshly written buffer of `bytes` in huge pages, each pinned thread its own part, `repeats` times.\n\n"
          "Returns (rate, isa): the median rate over all threads, in GB/s (1e9 bytes a second), and the instruction set used.\n"
          "`bytes` is rounded down to 4 KiB per thread, and must be well above the last-level cache to show memory and not the cache.\n"
          "Raises ValueError for a value out of range or an isa this machine does not run, MemoryError if the buffer is refused.");
    m.def("bf16_peak", peak_rate<bf16_kernels>, "threads"_a, "seconds"_a, "isa"_a = kBest,
          "Multiply bf16 numbers from the first-level cache, and add the products in f32, for `seconds` on each pinned thread.\n\n"
          "Returns (rate, isa): the rate over all threads, in TFLOP/s (a multiply-add is two), and the instruction set used; one without\n"
          "bf16 in its name multiplies in f32.\n"
          "Raises ValueError for a value out of range or an isa this machine does not run.");
    m.def("int8_peak", peak_rate<int8_kernels>, "threads"_a, "seconds"_a, "isa"_a = kBest,
          "Multiply int8 numbers from the first-level cache, and add the products in int32, for `seconds` on each pinned thread.\n\n"
          "Returns (rate, isa): the rate over all threads, in TOP/s (a multiply-add is two), and the instruction set used.\n"
          "Raises ValueError for a value out of range or an isa this machine does not run.");
    m.def("f32_peak", peak_rate<f32_kernels>, "threads"_a, "seconds"_a, "isa"_a = kBest,
          "Multiply and add f32 numbers from the first-level cache, for `seconds` on each pinned thread.\n\n"
          "Returns (rate, isa): the rate over all threads, in TFLOP/s (a multiply-add is two), and the instruction set used.\n"
          "Raises ValueError for a value out of range or an isa this machine does not run.");

    bind_linear(m);
    bind_decoder(m);
    bind_executor(m);
    bind_experts(m);
}
