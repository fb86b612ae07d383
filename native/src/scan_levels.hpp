// The recurrences once for each instruction-set level; scan.cpp picks one.
#pragma once

#include "scan.hpp"

namespace hasten {

namespace level_generic {
extern const ScanKernels kScans;
}
#if defined(__x86_64__)
namespace level_avx2 {
extern const ScanKernels kScans;
}
namespace level_avx512 {
extern const ScanKernels kScans;
}
#endif

}  // namespace hasten
