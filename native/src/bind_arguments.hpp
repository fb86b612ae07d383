// What the bindings ask of what Python hands them.
#pragma once

#include <nanobind/nanobind.h>

#include <string>
#include <vector>

#include "kernels.hpp"

namespace hasten {

[[noreturn]] inline void refuse(const std::string& what) { throw nanobind::value_error(what.c_str()); }

template <class Text>
void require(bool holds, const Text& what) {
    if (!holds) refuse(what);
}

// "amx", and so on.
const char* name_of(Isa isa);

// Best first, of those that this machine runs.
std::vector<std::string> available_isas();

// The level of that name, or the best one for "best". Throws ValueError for one that is not known or does not run on this machine.
Isa isa_of(const std::string& name);

}  // namespace hasten
