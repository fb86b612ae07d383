// Recurrences in plain C++, for any machine.
#include <cstddef>
#include <cstdint>

#include "decoder_levels.hpp"
#include "scan_levels.hpp"

#define HASTEN_LEVEL level_generic
#include "decoder_vector.hpp"
#include "vector_steps.hpp"
#include "scan_body.hpp"
