// The decoder's kernels with AVX2, fused multiply-add and float16 conversion.
#include <cstddef>
#include <cstdint>

#include "attention.hpp"
#include "decoder_levels.hpp"

#if defined(__x86_64__)
// GCC 12 takes the undefined operand of many intrinsics for a mistake (GCC bug 105593), and lambdas' thunks, never called, for an ABI's.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c")
#define HASTEN_LEVEL level_avx2
#define HASTEN_AVX2
#include "decoder_vector.hpp"
#include "vector_steps.hpp"
#include "cache_vector.hpp"
#include "decoder_body.hpp"
#include "attention_straight.hpp"
#include "attention_body.hpp"
#endif
