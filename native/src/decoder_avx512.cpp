// The decoder's kernels with AVX-512 (F, BW, VL, DQ).
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
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#define HASTEN_LEVEL level_avx512
#define HASTEN_AVX512
#include "decoder_vector.hpp"
#include "vector_steps.hpp"
#include "cache_vector.hpp"
#include "decoder_body.hpp"
#include "attention_turned.hpp"
#include "attention_body.hpp"
#endif
