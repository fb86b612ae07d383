"""What a user asks a session to store and feed, and what that makes of each linear layer of a Program."""

import dataclasses
from collections.abc import Collection, Mapping

from hasten.base.errors import UnsupportedError, one_line
from hasten.formats.cache import MeantCache
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import QuantizedWeight, StaticWeight
from hasten.formats.weights import Weight
from hasten.program import ops
from hasten.program.lower import LinearFormats
from hasten.program.program import Program

HEAD, BF16 = LinearFormat("int8"), LinearFormat("bf16")


@dataclasses.dataclass(frozen=True, slots=True)
class Formats:
    """By name: ``weights`` as in hasten.formats.linear (None: as they are stored), ``activations`` (bf16, int8 or fp8; None: what the
    weights are meant to be multiplied with) and ``cache`` (the format of keys and values; None: the backend's own)."""

    weights: str | None = None
    activations: str | None = None
    cache: str | None = None

    def meant_for(self, cache: MeantCache | None) -> "Formats":
        """The same for a model whose keys and values are meant to be kept as ``cache`` says, unless something else is asked for."""
        return self if self.cache is not None or cache is None else dataclasses.replace(self, cache=cache.format)


def linear_formats(
    program: Program, formats: Formats, weights: Mapping[str, Weight] | None = None, plain: str | None = None,
    without: Collection[str] = (),
) -> LinearFormats:  # fmt: skip
    """Every linear layer as ``formats`` asks, experts too; the head in int8 where that is narrower, routers in no less than bf16, the
    embedding as it is.

    Where no weights are asked for, those of ``weights`` that are stored quantized are played as they are stored, fed what they are to be
    multiplied with, in one scale for all tokens where they have one, unless activations are asked for; the others in ``plain``, or as they
    come without it. Activations that a backend is ``without`` are refused where they are asked for; weights that are stored to be fed them
    are fed what is usual. Raises UnsupportedError for weights nobody has, or activations they are not multiplied with."""
    if formats.activations in without:
        raise UnsupportedError(
            f"activations {formats.activations} have no kernels here: --backend cuda multiplies them, on a device that can, and --backend "
            "reference plays what they mean"
        )
    kept = {} if formats.weights is not None else _stored(weights or {})
    asked = formats.weights or plain or ("bf16" if formats.activations is not None else None)
    form = None if asked is None else LinearFormat.parse(asked)
    if form is not None and formats.activations is not None:
        every = (each for its in (form, *(weight.form for weight in kept.values())) for each in its.activations)
        accepted = dict.fromkeys(each for each in every if each not in without)
        if formats.activations not in accepted:
            raise UnsupportedError(
                f"activations {one_line(formats.activations)} do not go with weights in {form}; accepted are {', '.join(accepted)}"
            )
    routers: set[str] = {op.logits for op in program.ops if isinstance(op, ops.Route)}
    stored, fed, steps = dict[str, str](), dict[str, str](), dict[str, float]()
    for op in program.ops:
        if not isinstance(op, ops.Linear | ops.ExpertLinear):
            continue
        if (weight := kept.get(op.weight)) is not None:
            if isinstance(weight, StaticWeight) and formats.activations is None:
                steps[op.weight] = weight.input_scale
            its, activations = weight.form, formats.activations or _meant(weight, plain, without)
        elif form is not None:
            its = HEAD if op.y == "logits" and form.bits < HEAD.bits else BF16 if op.y in routers and form.bits < BF16.bits else form
            activations = formats.activations or form.activations[0]
        else:
            continue
        stored[op.weight] = "dense" if its == BF16 else str(its)
        fed[op.weight] = activations if activations in {*its.activations, "f32"} else its.activations[0]
    return LinearFormats(
        {name: its for name, its in stored.items() if its != "dense"}, {name: each for name, each in fed.items() if each != "f32"}, steps
    )


def _meant(weight: QuantizedWeight, plain: str | None, without: Collection[str]) -> str:
    """What a weight is stored to be multiplied with, or what is usual for it where a backend is without that."""
    if plain is None and weight.activations == "bf16":
        return "f32"
    return weight.form.activations[0] if weight.activations in without else weight.activations


def _stored(weights: Mapping[str, Weight]) -> dict[str, QuantizedWeight]:
    """Those that are stored in a format that has a name; what has none is played by what it means."""
    return {name: weight for name, weight in weights.items() if isinstance(weight, QuantizedWeight) and weight.form.has_name}
