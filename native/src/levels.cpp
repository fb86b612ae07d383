#include "levels.hpp"

#include <array>
#include <vector>

#include "cpu.hpp"

namespace hasten {
namespace {

constexpr std::array<Level, 4> kLevels = {{{"generic", Isa::generic}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}, {"amx", Isa::amx}}};

// What each level needs beyond the one below it.
std::vector<bool Features::*> needed(Isa isa) {
    switch (isa) {
        case Isa::generic: return {};
        case Isa::avx2: return {&Features::avx2, &Features::fma, &Features::f16c};
        case Isa::avx512:
            return {&Features::avx512f, &Features::avx512bw, &Features::avx512vl, &Features::avx512dq, &Features::avx512_vnni};
        case Isa::amx: return {&Features::amx_tile, &Features::amx_bf16, &Features::amx_int8, &Features::avx512_bf16};
    }
    return {};
}

// Of what `isa` itself needs.
std::string missing(Isa isa) {
    std::string names;
    for (const auto flag : needed(isa))
        for (const NamedFeature& feature : named_features())
            if (feature.flag == flag && !(cpu().features.*flag)) names += (names.empty() ? "" : ", ") + std::string(feature.name);
    return names;
}

}  // namespace

std::span<const Level> levels() { return kLevels; }

std::string refusal(Isa isa) {
#if !defined(__x86_64__)
    if (isa != Isa::generic) return "the processor is no x86-64";
#endif
    if (const std::string lacks = missing(isa); !lacks.empty()) return "this machine lacks " + lacks;
    for (const Level& level : kLevels)
        if (level.isa < isa && !missing(level.isa).empty()) return std::string("needs ") + level.name + " too";
    if (isa == Isa::amx && !amx_granted()) return "the kernel does not let this process use tiles";
    return "";
}

}  // namespace hasten
