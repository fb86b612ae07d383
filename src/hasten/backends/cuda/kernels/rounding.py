"""Dense weights rounded to nearest where they lie, to the bit as LinearFormat.quantize does it on the host: plain functions on torch
tensors, once at load.

What differs between the two is what torch makes of a division by a Python number on a device, a product with its reciprocal; so whatever
is divided by is a tensor here."""

import torch
from torch import Tensor

from hasten.backends.cuda.kernels.pack import PLAIN, Stored
from hasten.base.errors import UnsupportedError
from hasten.formats.linear import NUMBERS, LinearFormat


def round_to_nearest(form: LinearFormat, dense: Tensor) -> Stored:
    """``dense`` [(count,) out, size] of any float dtype, as LinearFormat.quantize; of numbers that are not finite alike but for the sign of
    fp8's NaN. Takes some four times the float32 of ``dense`` beside it. Raises UnsupportedError for a codebook, which is fitted on the
    host."""
    if form.has_codebook:
        raise UnsupportedError(f"the codebook of weights in {form} is fitted on the host, not on a device")
    weight, size = dense.to(torch.float32), dense.shape[-1]
    bits, limit, _ = NUMBERS[form.number]
    if not limit:
        plain = weight.to(PLAIN[form.number])
        return Stored(plain + 0 if form.sparse else plain, None, None, 0)  # -0 + 0 is 0, which is left out
    group = form.group or size
    whole = torch.nn.functional.pad(weight, (0, -size % group)) if size % group else weight  # zeros change no group's range
    part = whole.unflatten(-1, (-1, group))
    zero = weight.new_zeros(())
    high, low = torch.maximum(part.amax(-1), zero), torch.minimum(part.amin(-1), zero)
    span = high - low if form.zero_points else torch.maximum(high, -low)
    span /= torch.full_like(span, 2**bits - 1 if form.zero_points else limit)
    scales = torch.where(span == 0, torch.ones_like(span), span)
    steps = (part / scales[..., None]).flatten(-2)[..., :size]
    if form.number == "fp8":
        return Stored(steps.clamp_(-limit, limit).to(torch.float8_e4m3fn), scales, None, group)
    if not form.zero_points:
        return Stored(steps.round_().clamp_(-limit, limit).nan_to_num_().to(torch.int8), scales, None, group)
    least = -(2 ** (bits - 1))
    zeros = ((-low / scales).nan_to_num_().round_().to(torch.int32) + least).clamp_(least, -least - 1)
    at = torch.arange(size, device=dense.device) // group
    rounded = (steps.round_() + zeros[..., at]).clamp_(least, -least - 1).nan_to_num_()
    return Stored(rounded.to(torch.int8), scales, zeros, group)
