// Recurrences with AVX2 and fused multiply-add.
#include <cstddef>
#include <cstdint>

#include "decoder_levels.hpp"
#include "scan_levels.hpp"

#if defined(__x86_64__)
// See decoder_avx2.cpp.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c")
#define HASTEN_LEVEL level_avx2
#define HASTEN_AVX2
#include "decoder_vector.hpp"
#include "vector_steps.hpp"
#include "scan_body.hpp"
#endif
