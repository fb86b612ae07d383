#include "sampling_levels.hpp"

// Vectors go only between functions that are inlined, so no ABI is concerned. The others are GCC bug 105593, as in decoder_avx512.cpp.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#if defined(__x86_64__)
#include <immintrin.h>
#endif


namespace hasten {

namespace sampling_generic {
#define HASTEN_BYTES 16
#include "sampling_body.hpp"
#undef HASTEN_BYTES
}

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2")
namespace sampling_avx2 {
#define HASTEN_BYTES 32
#include "sampling_body.hpp"
#undef HASTEN_BYTES
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
namespace sampling_avx512 {
#define HASTEN_BYTES 64
#include "sampling_body.hpp"
#undef HASTEN_BYTES
}
#pragma GCC pop_options
#endif

SamplingPasses sampling_passes(Isa isa) {
#if defined(__x86_64__)
    if (isa >= Isa::avx512) return sampling_avx512::kPasses;
    if (isa == Isa::avx2) return sampling_avx2::kPasses;
#endif
    static_cast<void>(isa);
    return sampling_generic::kPasses;
}

}  // namespace hasten
