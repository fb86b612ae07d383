#include "bind_arguments.hpp"

namespace hasten {

const char* name_of(Isa isa) {
    switch (isa) {
        case Isa::generic: return "generic";
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
        case Isa::amx: return "amx";
    }
    return "?";
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (Isa isa : {Isa::amx, Isa::avx512, Isa::avx2, Isa::generic})
        if (best_isa(isa) == isa) names.emplace_back(name_of(isa));
    return names;
}

Isa isa_of(const std::string& name) {
    if (name == "best") return best_isa();
    for (Isa isa : {Isa::amx, Isa::avx512, Isa::avx2, Isa::generic})
        if (name == name_of(isa) && best_isa(isa) == isa) return isa;
    std::string accepted = "best";
    for (const std::string& each : available_isas()) accepted += ", " + each;
    refuse("isa '" + name + "' is not known or does not run on this machine; accepted: " + accepted);
}

}  // namespace hasten
