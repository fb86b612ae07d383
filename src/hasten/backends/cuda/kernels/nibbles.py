"""Words of four nibbles taken apart in registers.

From capability 9.0 on, two words become two bfloat16 in three instructions: a shift, one that masks and sets the exponent of 128 beside
the nibble (0x4300 | n is 128 + n), and a subtraction of 136. The compiler makes about five for each number of what is plain; at the rate
at which memory gives four-bit weights, that is more than there is time for. The interpreter knows no machine code and takes the plain
way. Both are exact, so no bit depends on which it was."""

import triton
import triton.language as tl
from triton.language import constexpr, tensor
from triton.language.target_info import cuda_capability_geq

_FIRST = constexpr(
    "{ .reg .b32 t, c; lop3.b32 t, $1, 0x000F000F, 0x43004300, 0xEA; mov.b32 c, 0x43084308; sub.rn.bf16x2 $0, t, c; }"
)  # fmt: skip
_SECOND = constexpr(
    "{ .reg .b32 t, c; shr.u32 t, $1, 4; lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA; mov.b32 c, 0x43084308; sub.rn.bf16x2 $0, t, c; }"
)
_THIRD = constexpr(
    "{ .reg .b32 t, c; shr.u32 t, $1, 8; lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA; mov.b32 c, 0x43084308; sub.rn.bf16x2 $0, t, c; }"
)
_FOURTH = constexpr(
    "{ .reg .b32 t, c; shr.u32 t, $1, 12; lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA; mov.b32 c, 0x43084308; sub.rn.bf16x2 $0, t, c; }"
)


@triton.jit
def quarter(words: tensor, NUMBER: constexpr, KIND: constexpr) -> tensor:
    """Nibble NUMBER of every word int16, less 8: bfloat16 where that is KIND and the device can, else int16."""
    if tl.bfloat16 == KIND and cuda_capability_geq(9, 0):
        if NUMBER == 0:
            return tl.inline_asm_elementwise(_FIRST, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        elif NUMBER == 1:
            return tl.inline_asm_elementwise(_SECOND, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        elif NUMBER == 2:
            return tl.inline_asm_elementwise(_THIRD, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(_FOURTH, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return ((words >> (4 * NUMBER)) & 15) - 8
