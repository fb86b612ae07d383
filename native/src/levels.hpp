// Why a kernel level does not run on this machine.
#pragma once

#include <span>
#include <string>

#include "kernels.hpp"

namespace hasten {

struct Level {
    const char* name;
    Isa isa;
};

// Worst first.
std::span<const Level> levels();

// In words, what this machine lacks for kernels at `isa`; empty where they run.
std::string refusal(Isa isa);

}  // namespace hasten
