// What each part of the extension adds to the module.
#pragma once

#include <nanobind/nanobind.h>

namespace hasten {

void bind_linear(nanobind::module_& module);
void bind_decoder(nanobind::module_& module);
void bind_executor(nanobind::module_& module);
void bind_experts(nanobind::module_& module);  // after the executor, whose types it takes

}  // namespace hasten
