// Recurrences with AVX-512 (F, BW, VL, DQ).
#include <cstddef>
#include <cstdint>

#include "decoder_levels.hpp"
#include "scan_levels.hpp"

#if defined(__x86_64__)
// See decoder_avx512.cpp.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#define HASTEN_LEVEL level_avx512
#define HASTEN_AVX512
#include "decoder_vector.hpp"
#include "vector_steps.hpp"
#include "scan_body.hpp"
#endif
