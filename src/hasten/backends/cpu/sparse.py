"""Where sparse weights do not pay: what is said to a user who asks for them."""

import dataclasses

from hasten import _native
from hasten.formats.linear import LinearFormat


def slower_than_dense(form: LinearFormat, two_of_four: bool, isa: str) -> bool:
    """Whether a sparse weight decodes slower than the same one stored densely, at level ``isa`` of this machine.

    Expanding bytes costs more than reading them where no instruction does it (AVX-512 VBMI2), unless every four inputs have two."""
    if isa in {"avx512", "amx"} and _native.cpu_features()["avx512_vbmi2"]:
        return False
    return form.number == "int4" or (form.number == "int8" and not two_of_four)


def advice(form: LinearFormat) -> str:
    """One line for a user of weights that are slower than dense ones."""
    dense = dataclasses.replace(form, sparse=False)
    other = ", or prune every four inputs to two (2:4)" if form.number == "int8" else ""
    return f"{form} weights of this model are slower here than {dense}, as the processor has no AVX-512 VBMI2; use --weights {dense}{other}"
