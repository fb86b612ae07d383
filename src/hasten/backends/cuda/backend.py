"""The CUDA backend as an engine sees it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.backends.cuda.candidates import LINEAR, LinearSite, choose
from hasten.backends.cuda.drawer import drawing_bytes
from hasten.backends.cuda.graphs import recorder_for
from hasten.backends.cuda.inputs import buckets
from hasten.backends.cuda.kernels.cache import PAGE, GroupCache
from hasten.backends.cuda.kernels.states import StatePool
from hasten.backends.cuda.limits import FP8_CAPABILITY, DeviceRoofline, graph_seconds, measure_roofline
from hasten.backends.cuda.op_times import OpCost, OpTime, op_names, op_times
from hasten.backends.cuda.places import Room
from hasten.backends.cuda.products import Product, products_of
from hasten.backends.cuda.recurrent import kept_here
from hasten.backends.cuda.session import HIDDEN_TOKENS, LARGEST, CudaSession
from hasten.backends.cuda.tape import Device, Pool, compile_tape, unsupported_ops
from hasten.backends.cuda.tuned import Tuned, path_of, read, write
from hasten.backends.cuda.tuning import ROWS, Tuning, tune
from hasten.backends.cuda.weights import DeviceWeights, Outlines
from hasten.base import hardware, settings
from hasten.base.errors import ConfigError, UnsupportedError, UserError
from hasten.formats.cache import cache_format
from hasten.formats.linear import LinearFormat
from hasten.model import Model
from hasten.program import (
    Batch,
    Formats,
    KvGroup,
    LatentGroup,
    Precision,
    Program,
    RecurrentGroup,
    StateGroup,
    hidden_states,
    linear_formats,
    lower,
    ops,
    page_counts,
)  # fmt: skip

LEAST_CAPABILITY = (8, 0)
PRODUCTS = (("bf16", "bf16"), ("int8", "bf16"), ("int4", "bf16"), ("fp8", "bf16"), ("int8", "int8"), ("int4", "int8"), ("fp8", "fp8"))
"""Kinds of products that `kernels` tells of: weights, activations."""
INTERPRETED = Device(torch.device("cpu"), (9, 0), Tuned("interpreter"))
"""Kernels in Triton's interpreter, on the CPU: what they compute, and nothing of how fast."""


class CudaBackend:
    """Plays Programs with Triton kernels on the first CUDA device, or ``on`` another; computed in bfloat16 with the Spec's residual
    dtype."""

    name = "cuda"
    page = PAGE

    def __init__(self, on: Device | None = None) -> None:
        self._on = on

    @functools.cached_property
    def on(self) -> Device:
        """The device. Raises UnsupportedError where there is none, or one that is too old."""
        return self._on or find_device()

    def described(self) -> str:
        """The device and what was measured there. Raises UnsupportedError where there is none."""
        major, minor = self.on.capability
        tuned = f"block sizes measured for {len(self.on.tuned.linear)} shapes" if self.on.tuned.linear else "block sizes are defaults"
        return f"{self.on.tuned.device}, compute capability {major}.{minor}, torch {torch.__version__}, {tuned}"

    def kernels(self) -> dict[str, str]:
        """By kind of product, as 'int8 × bf16' (weights × activations): the kernel it goes through, and why not those before it."""
        found = {}
        for form, fed in PRODUCTS:
            try:
                choice = choose(LINEAR, self._site(LinearFormat.parse(form), fed, 4096, 4096, torch.bfloat16))
            except UnsupportedError as error:
                found[f"{form} × {fed}"] = f"none: {error}"
            else:
                found[f"{form} × {fed}"] = "; ".join([choice.candidate.name, *(f"not {name}: {why}" for name, why in choice.refused)])
        return found

    def refusals(self, model: Model) -> tuple[str, ...]:
        """What of ``model`` has no CUDA kernel; empty where it runs here."""
        return unsupported_ops(lower(model.spec))

    def hindrance(self, model: Model, formats: Formats | None = None) -> str:
        """Why the device does not play ``model`` in ``formats``, in words; '' where it does. Raises UnsupportedError for formats that no
        backend has."""
        program = self.program(model, formats=formats)
        if refused := unsupported_ops(program):
            return f"the cuda backend has no kernel for {', '.join(refused)}"
        try:
            for product in products_of(program):
                choose(LINEAR, self._site(product.form, product.fed, product.out, product.size, product.dtype))
            needed, free = self._least_bytes(program), self.free_bytes()
        except UnsupportedError as error:
            return str(error)
        if needed > free:
            return f"its weights and a step take {needed:,} bytes, and the device has {free:,} free"
        return self._cache_refusal(program)

    def _least_bytes(self, program: Program) -> int:
        """What any session takes besides its cache: weights, and the room that all steps share."""
        return self.weight_bytes(program) + Room.of(program, LARGEST, torch.device("meta")).nbytes

    def _site(self, form: LinearFormat, fed: str, out: int, size: int, dtype: torch.dtype) -> LinearSite:
        return LinearSite(form, fed, 16, out, size, dtype, invariant=True, capability=self.on.capability)

    def _cache_refusal(self, program: Program) -> str:
        if self.on.capability < FP8_CAPABILITY and any(group.format == "fp8" for group in program.states):
            return f"{self.described()} keeps no fp8 cache, which takes compute capability 8.9; choose int8 or bf16"
        return ""

    def program(self, model: Model, context: int | None = None, formats: Formats | None = None) -> Program:
        """What a session would play."""
        formats, precision = (formats or Formats()).meant_for(model.cache), Precision(model.spec.residual, "bfloat16")
        linear = linear_formats(lower(model.spec, context=context), formats, model.weights, plain="bf16")
        program = lower(model.spec, context=context, precision=precision, formats=linear, cache=cache_format(formats.cache or "bf16"))
        states = [kept_here(program, group) if isinstance(group, RecurrentGroup) else group for group in program.states]
        return dataclasses.replace(program, states=tuple(states))

    def weight_bytes(self, program: Program) -> int:
        """Bytes that the weights of ``program`` take here: linear layers in their format, tables in bf16, all else in float32, biases
        too."""
        found: dict[tuple[str, str], float] = {}
        for op in program.ops:
            match op:
                case ops.Linear() | ops.HeadLinear() | ops.ExpertLinear() if op.weight_format != "dense":
                    form = LinearFormat.parse(op.weight_format)
                    bits = max(4, form.bits) + 32 / form.group if form.group else max(4, form.bits)
                    found[op.weight, str(form)] = math.prod(program.params[op.weight]) * bits / 8
                case ops.Linear() | ops.HeadLinear() | ops.ExpertLinear() | ops.Embed():
                    found[op.weight, "bf16"] = math.prod(program.params[op.weight]) * 2
            matrix = op.weight if isinstance(op, ops.Linear | ops.HeadLinear | ops.ExpertLinear | ops.Embed) else None
            found.update({(name, "float32"): math.prod(program.params[name]) * 4 for name in op.params if name != matrix})
        return round(sum(found.values()))

    def arena_bytes(self, program: Program, tokens: int) -> int:
        """Bytes that steps of up to ``tokens`` take: the room that all share, which is as large as the largest there is needs it, and what
        the tapes of all buckets that may come have besides, those for hidden states too. Logits as a host has them are left out."""
        on = dataclasses.replace(self.on, device=torch.device("meta"))
        room = Room.of(program, LARGEST, on.device)
        pools, weights = {group.name: _pool(group, 1, on.device) for group in program.states}, Outlines(program.params)
        played = [(program, bucket) for bucket in buckets(min(tokens, LARGEST.rows))]
        played += [(hidden_states(program), bucket) for bucket in buckets(min(HIDDEN_TOKENS, program.context))]
        return room.nbytes + sum(compile_tape(its, weights, pools, bucket, on, PAGE, room).nbytes for its, bucket in played)

    def drawing_bytes(self, program: Program, sequences: int) -> int:
        """Bytes of the device that drawing for up to ``sequences`` at once takes besides rows of logits."""
        return drawing_bytes(sequences, program.values["logits"].features[-1], self.on)

    def free_bytes(self) -> int:
        """Bytes of the device that weights, caches and arenas may take together."""
        if self.on.device.type != "cuda":
            return hardware.free_bytes()
        kept = torch.cuda.memory_reserved(self.on.device) - torch.cuda.memory_allocated(self.on.device)
        return int(torch.cuda.mem_get_info(self.on.device)[0]) + kept

    def session(
        self, model: Model, context: int | None = None, formats: Formats | None = None, cache_bytes: int | None = None
    ) -> CudaSession:
        """The model on the device, for sequences of up to ``context`` tokens; as its weights are stored, in bf16 where that is plainly,
        unless ``formats`` says otherwise.

        ``cache_bytes`` is how much its pages may take together: a quarter of the device's free memory unless given, or what weights and
        steps leave of it."""
        program = self.program(model, context, formats)
        if refused := unsupported_ops(program):
            raise UnsupportedError(f"the cuda backend has no kernel for {', '.join(refused)}; use backend 'reference'")
        if refusal := self._cache_refusal(program):
            raise UnsupportedError(refusal)
        if cache_bytes is None:
            free = self.free_bytes()
            cache_bytes = max(0, min(free // 4, free - self._least_bytes(program)))
        pages = page_counts(program, PAGE, cache_bytes)
        try:
            pools = {group.name: _pool(group, pages[group.name], self.on.device) for group in program.states}
            weights = DeviceWeights(model.weights, self.on.device)
            session = CudaSession(program, weights, pools, pages, self.on, recorder_for(self.on.device))
            session.make_ready()
        except torch.cuda.OutOfMemoryError:
            cache = sum(group.bytes_per_token() * PAGE * pages[group.name] for group in program.states)
            raise UserError(
                f"the device's memory does not hold {model.name}: weights take {self.weight_bytes(program):,} bytes, the cache {cache:,}, "
                f"a step {self.arena_bytes(program, LARGEST.rows):,}; give --memory, a smaller --max-model-len, or weights of fewer bits"
            ) from None
        return session

    def roofline(self, copied_bytes: int, repeats: int) -> DeviceRoofline:
        """What the device does at most: copying so many bytes, and multiplying."""
        return measure_roofline(self.on.device, self.on.tuned.device, self.on.capability, copied_bytes, repeats)

    def op_names(self, model: Model, formats: Formats | None = None) -> tuple[str, ...]:
        """The kernels of a step of ``model`` that can be timed alone."""
        return op_names(self.program(model, formats=formats))

    def op_times(
        self, session: CudaSession, rows: Sequence[int], contexts: Sequence[int], wanted: Callable[[OpCost], bool]
    ) -> Iterator[OpTime]:
        """Each of them on the device (`op_times.op_times`)."""
        return op_times(session, rows, contexts, wanted, graph_seconds)

    def products(self, model: Model, formats: Sequence[Formats]) -> tuple[Product, ...]:
        """The products of linear layers that a step of ``model`` is made of in each of ``formats``, each shape once."""
        found = {each.name: each for its in formats for each in products_of(self.program(model, formats=its))}
        return tuple(found.values())

    def tuned_path(self) -> Path:
        """Where ``tune`` keeps what it measures on this device. Raises ConfigError where there is no such place."""
        if (directory := tuned_directory()) is None:
            raise ConfigError("there is no directory to keep measured block sizes in; HASTEN_CACHE names one")
        return path_of(directory, self.on.tuned.device)

    def tune(self, products: Sequence[Product], rows: Sequence[int] = ROWS) -> Iterator[Tuning]:
        """Time block sizes for each of ``products``, and keep what was chosen, product by product, for backends that are made from then
        on. Raises ConfigError where there is no place for it, UnsupportedError where no block sizes fit this device."""
        directory, tuned = self.tuned_path().parent, self.on.tuned
        for product in products:
            found = tune(product, self.on, rows)
            tuned = tuned.having(product.name, found.chosen)
            write(directory, tuned)
            yield found

    def logits(self, model: Model, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits float32 [T, vocab] of one sequence."""
        batch = Batch.of([token_ids])
        if len(batch.tokens) > model.spec.context:
            raise ConfigError(f"{len(batch.tokens)} tokens are more than the model's context of {model.spec.context}; shorten the input")
        return self.session(model, len(batch.tokens)).score(batch)


def find_device() -> Device:
    """The first CUDA device that torch sees, with what was measured there. Raises UnsupportedError, saying what is missing."""
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        raise UnsupportedError(f"backend 'cuda' needs an NVIDIA GPU: {why}; --backend cpu or reference runs here")
    capability, name = torch.cuda.get_device_capability(0), torch.cuda.get_device_name(0)
    if capability < LEAST_CAPABILITY:
        told = ".".join(map(str, capability))
        raise UnsupportedError(
            f"backend 'cuda' needs a device of compute capability 8.0 or more; {name} has {told}: --backend cpu runs here"
        )
    directory = tuned_directory()
    tuned = Tuned(name) if directory is None else read(directory, name)
    return Device(torch.device("cuda", 0), capability, tuned, 2 * torch.cuda.get_device_properties(0).multi_processor_count)


def tuned_directory() -> Path | None:
    """Where files of what was measured lie, one a device; None for a user without a home."""
    directory = settings.cache_directory()
    return None if directory is None else directory / "tuned"


def _pool(group: StateGroup, pages: int, device: torch.device) -> Pool:
    match group:
        case KvGroup():
            return GroupCache.of(group.layers, pages, group.kv_heads, group.key_dim, group.value_dim, group.format, device)
        case LatentGroup():
            return GroupCache.of(group.layers, pages, 1, group.width, None, group.format, device)
        case RecurrentGroup():
            return StatePool.of(group.layers, pages, group.shape, device)
