// The decoder's kernels in plain C++, for any machine.
#include <cstddef>
#include <cstdint>

#include "attention.hpp"
#include "decoder_levels.hpp"

#define HASTEN_LEVEL level_generic
#include "decoder_vector.hpp"
#include "vector_steps.hpp"
#include "cache_vector.hpp"
#include "decoder_body.hpp"
#include "attention_turned.hpp"
#include "attention_body.hpp"
