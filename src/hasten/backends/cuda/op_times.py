"""Each kernel of a step alone: the launches that a tape has for it, one a layer, so that every one reads weights of its own."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from hasten.backends.cuda.inputs import Bucket
from hasten.backends.cuda.kernels.cache import PAGE
from hasten.backends.cuda.kernels.experts import tell_apart
from hasten.backends.cuda.limits import Arithmetic
from hasten.backends.cuda.places import DTYPES
from hasten.backends.cuda.products import FEEDS
from hasten.backends.cuda.session import STEP_TOKENS, CudaSession
from hasten.backends.cuda.tape import Launch, Tape, compile_tape
from hasten.backends.cuda.units import units_of
from hasten.base.errors import ConfigError
from hasten.program import Batch, Fused, KvGroup, LatentGroup, Program, RecurrentGroup, ops
from hasten.spec import SlidingWindow

Clock = Callable[[torch.device, Callable[[], object]], float]
TELL_APART = "tell_apart"
"""What finds the rows of each expert, once for all products of a choice."""
_PEAKS: dict[str, Arithmetic] = {"bf16": "bf16", "int8": "int8", "fp8": "fp8"}


@dataclasses.dataclass(frozen=True, slots=True)
class OpCost:
    """What a launch must read, write and compute, on ``rows`` rows (of what only logits need, one); attention at a ``context``.
    ``arithmetic`` is what its peak is of."""

    op: str
    format: str
    shape: str
    rows: int
    context: int | None
    bytes: int
    operations: int
    arithmetic: Arithmetic


@dataclasses.dataclass(frozen=True, slots=True)
class OpTime:
    """Seconds of one launch, the mean over ``copies`` of them, which read ``distinct`` bytes between them."""

    cost: OpCost
    seconds: float
    copies: int

    @property
    def distinct(self) -> int:
        """Bytes of all copies."""
        return self.cost.bytes * self.copies


def op_names(program: Program) -> tuple[str, ...]:
    """What can be timed of ``program``, as `op_times` calls it; pieces of values are not copied."""
    names = dict.fromkeys(_name(unit) for unit in units_of(program) if not isinstance(unit.parts[0], ops.Split))
    if any(isinstance(op, ops.ExpertLinear) for op in program.ops):
        names[TELL_APART] = None
    return tuple(names)


def op_times(
    session: CudaSession, rows: Sequence[int], contexts: Sequence[int], wanted: Callable[[OpCost], bool], clock: Clock
) -> Iterator[OpTime]:
    """Every kernel of the session's Program on each of ``rows`` rows of one sequence that begins there; attention on 1 and the most of
    them that end at each of ``contexts``; experts as if the rows had chosen them evenly. Of what ``wanted`` says yes to, each once. Raises
    ConfigError for more rows than a step has."""
    if max(rows) > STEP_TOKENS:
        raise ConfigError(f"rows are {max(rows)}; a step on a GPU has at most {STEP_TOKENS}")
    session.settle()  # what is captured now would share the device with what is timed
    seen = set[OpCost]()
    for count in rows:
        for found in _timed(session, count, None, lambda cost: cost not in seen and wanted(cost), clock):
            seen.add(found.cost)
            yield found
    for count, context in ((count, context) for count in dict.fromkeys((1, max(rows))) for context in contexts if count <= context):
        yield from _timed(session, count, context, wanted, clock)


def _timed(session: CudaSession, rows: int, context: int | None, wanted: Callable[[OpCost], bool], clock: Clock) -> Iterator[OpTime]:
    """Of one batch: attention where there is a context, everything else where there is none."""
    tape, groups = _filled(session, rows, rows if context is None else context), dict[OpCost, list[Launch]]()
    for unit, launch in tape.units:
        attends = isinstance(unit.parts[0], ops.Attend)
        if attends == (context is not None):
            groups.setdefault(_cost(session, unit, rows, context), []).append(launch)
    with torch.inference_mode():
        tape.play()
        if context is None:
            for cost, launch in _told_apart(session, tape, rows):
                groups.setdefault(cost, []).append(launch)
        for cost, launches in groups.items():
            if not wanted(cost):
                continue

            def work(launches: list[Launch] = launches) -> None:
                for launch in launches:
                    launch()

            yield OpTime(cost, clock(session.on.device, work) / len(launches), len(launches))


def _filled(session: CudaSession, rows: int, end: int) -> Tape:
    """A tape, told of the last ``rows`` tokens of one sequence of ``end``."""
    vocab = next((session.program.params[op.weight][0] for op in session.program.ops if isinstance(op, ops.Embed)), 1)
    batch = Batch.of([(np.arange(rows) % vocab).tolist()], [end - rows], rows="last")
    page = math.ceil(end / PAGE)
    pages = [[[0] if isinstance(group, RecurrentGroup) else [*range(page)] for group in session.program.states]]
    if end > session.program.context:
        raise ConfigError(f"context is {end}; the session was opened for {session.program.context} tokens")
    tape = compile_tape(session.program, session.weights, session.pools, Bucket.of(batch), session.on, PAGE, session.room)
    tape.inputs.fill(batch, pages)
    return tape


def _told_apart(session: CudaSession, tape: Tape, rows: int) -> Iterator[tuple[OpCost, Launch]]:
    """What tells ``rows`` rows apart that choose experts evenly, one after the other; it has done so once. Products of experts read what it
    wrote, wherever the values lie that experts were chosen by."""
    for name, blocks in tape.blocks.items():
        (chosen,) = session.program.values[name].features
        for each in blocks:
            count = len(each.counts)
            choice = torch.full((tape.inputs.bucket.rows, chosen), -1, dtype=torch.int32, device=session.on.device)
            choice[:rows] = torch.arange(rows * chosen, device=session.on.device).view(rows, chosen) % count
            tell_apart(choice, each)
            written = 4 * (min(rows * chosen, len(each.places)) + 2 * min(rows * chosen, count))
            cost = OpCost(TELL_APART, "int32", f"{count} top {chosen}", rows, None, 4 * rows * chosen + written, 0, "f32")
            yield cost, functools.partial(tell_apart, choice, each)


def _cost(session: CudaSession, unit: Fused, rows: int, context: int | None) -> OpCost:
    program, first, main = session.program, unit.parts[0], unit.parts[-1]
    count = {"T": rows, "R": 1, "S": 1}
    its_rows = max(count[program.values[name].rows] for name in unit.outputs) if unit.outputs else rows
    touched, operations = 0, 0
    for name in (*unit.inputs, *unit.outputs):
        value = program.values[name]
        touched += min(its_rows, count[value.rows]) * math.prod(value.features) * DTYPES[value.dtype].itemsize
    dtypes = [_short(program.values[name].dtype) for name in (*unit.inputs[:1], *unit.outputs[-1:])]
    form, fed = " → ".join(dict.fromkeys(dtypes)), "f32"  # of row-wise ops, which multiply in float32
    shape = "x".join(map(str, program.values[unit.outputs[0] if unit.outputs else unit.inputs[0]].features))
    match first:
        case ops.Linear() | ops.HeadLinear():
            names = tuple(op.weight for op in unit.parts if isinstance(op, ops.Linear | ops.HeadLinear))
            x = DTYPES[program.values[first.x].dtype]
            weight = session.weights.linear(names, first.weight_format, x)
            heads = weight.codes.shape[0] if weight.codes.dim() == 3 else 1
            fed = FEEDS[x]
            form, shape = f"{fed if first.weight_format == 'dense' else first.weight_format} × {fed}", f"{weight.out}x{weight.size}"
            shape = shape if heads == 1 else f"{heads}x{shape}"
            touched += weight.nbytes
            operations = 2 * heads * weight.out * weight.size * count[program.values[first.y].rows]
        case ops.ExpertLinear():
            x, chosen = DTYPES[program.values[first.x].dtype], program.values[first.experts].features[-1]
            weight = session.weights.linear((first.weight,), first.weight_format, x)
            experts, fed = weight.codes.shape[0], FEEDS[x]
            form = f"{fed if first.weight_format == 'dense' else first.weight_format} × {fed}"
            shape = f"{experts}x{weight.out}x{weight.size} top {chosen}"
            touched += min(experts, rows * chosen) * weight.nbytes // experts
            operations = 2 * rows * chosen * weight.out * weight.size
        case ops.Route():
            shape = f"{program.values[first.logits].features[-1]} top {first.top_k}"
        case ops.Attend() if context is not None:
            group = program.state(first.state.group)
            window = first.visible.size if isinstance(first.visible, SlidingWindow) else context
            seen = [min(position + 1, window) for position in range(context - rows, context)]
            oldest = max(0, context - rows + 1 - window)
            touched += (context - oldest) * group.bytes_per_token() // group.layers
            operations = 2 * first.heads * (first.head_dim + first.value_dim) * sum(seen)
            form, fed = f"{_short(group.format)} cache", "bf16"
            shape = f"{first.heads}/{first.kv_heads}x{first.head_dim}{f' window {window}' if window < context else ''}"
        case ops.Embed():
            touched += rows * math.prod(program.values[first.y].features) * 2
            form = "bf16 table"
    if isinstance(main, ops.AppendKv) and isinstance(group := program.state(main.state.group), KvGroup | LatentGroup):
        touched += rows * group.bytes_per_token() // group.layers
        form = f"{_short(group.format)} cache"
    for reference in unit.state_refs:
        if isinstance(group := program.state(reference.group), RecurrentGroup):
            touched += 2 * group.bytes_per_sequence() // group.layers
    return OpCost(_name(unit), form, shape, its_rows, context, touched, operations, _PEAKS.get(fed, "f32"))


def _name(unit: Fused) -> str:
    """As "add+rms_norm": its ops, each once."""
    return "+".join(dict.fromkeys(re.sub(r"(?<!^)(?=[A-Z])", "_", type(part).__name__).lower() for part in unit.parts))


def _short(dtype: str) -> str:
    return {"bfloat16": "bf16", "float16": "f16"}.get(dtype, dtype)
