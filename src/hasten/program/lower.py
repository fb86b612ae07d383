"""Lowering: Spec → Program. The one definition of every model."""

import dataclasses
from collections.abc import Mapping
from functools import singledispatchmethod

from hasten.base.errors import ConfigError, UnsupportedError, one_line
from hasten.formats.cache import ROW_FORMATS
from hasten.program import ops
from hasten.program.ops import In, Op, Out, Param, ShardAxis, StateRef
from hasten.program.program import KvGroup, LatentGroup, Layer, Program, RecurrentGroup, RowSymbol, StateGroup, Value
from hasten.program.rotary import rotary_frequencies
from hasten.spec import (
    MLP,
    Activation,
    Alibi,
    Attention,
    Block,
    BranchNorm,
    Causal,
    ClampedSwiglu,
    CrossLayerAttention,
    Dtype,
    FeedForward,
    GatedDeltaNet,
    GatedMLP,
    Head,
    LatentAttention,
    LayerNorm,
    LinearAttention,
    Mamba,
    Mamba2,
    Mixer,
    MixtureOfExperts,
    Norm,
    Parallel,
    PostNorm,
    PreNorm,
    RelativeSinusoid,
    RMSNorm,
    Rotary,
    Sandwich,
    Spec,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Precision:
    """Dtypes of a Program's values: the residual stream, what linear layers and mixers work in, and the logits."""

    residual: Dtype = "float32"
    compute: Dtype = "float32"
    logits: Dtype = "float32"


@dataclasses.dataclass(frozen=True, slots=True)
class LinearFormats:
    """How linear layers are stored and fed, by weight name; names left out are dense with activations as they come. ``steps`` are the
    scales of int8 activations that have one for all tokens; others have each token's own."""

    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    activations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    steps: Mapping[str, float] = dataclasses.field(default_factory=dict)


def lower(
    spec: Spec,
    *,
    context: int | None = None,
    precision: Precision | None = None,
    formats: LinearFormats | None = None,
    cache: str | None = None,
) -> Program:
    """The Program of ``spec`` for sequences of up to ``context`` tokens (the Spec's own unless given).

    ``cache`` is the format of keys, values and latent rows (ROW_FORMATS); the compute dtype unless given. Raises ConfigError for a
    format that names no linear layer, UnsupportedError for one nobody has."""
    formats = formats or LinearFormats()
    if cache is not None and cache not in ROW_FORMATS:
        raise UnsupportedError(f"cache format {one_line(cache)} is not supported; accepted are {', '.join(ROW_FORMATS)}")
    builder = _Builder(spec, context or spec.context, precision or Precision(residual=spec.residual), formats, cache)
    program = builder.build()
    linear = {op.weight for op in program.ops if isinstance(op, ops.Linear | ops.HeadLinear | ops.ExpertLinear)}
    unknown = {*formats.weights, *formats.activations, *formats.steps} - linear
    if unknown:
        raise ConfigError(f"{one_line(sorted(unknown)[0])} is no weight of a linear layer, so it has no format; see inspect --program")
    return program


class _Builder:
    """Writes the ops of one Program in order. Value names are the path of what makes them, which is what taps are asked for by."""

    def __init__(self, spec: Spec, context: int, precision: Precision, formats: LinearFormats, cache: str | None) -> None:
        self.spec, self.context, self.precision, self.formats = spec, context, precision, formats
        self.cache = cache or precision.compute
        self.scan = "float64" if precision.compute == "float64" else "float32"  # sums over the whole past need the bits
        self.ops: list[Op] = []
        self.values: dict[str, Value] = {}
        self.params: dict[str, tuple[int, ...]] = {}
        self.fixed: dict[tuple[str, float], int] = {}  # rounded value, step → which of its roundings
        self.groups: dict[StateGroup, list[str]] = {}  # key with layers=0 → one entry per slot
        self.kept: dict[str, StateRef] = {}  # by the path of an attention: its keys and values
        self.owner: tuple[str, str] | None = None  # the path of the block being written, and of the one that has its matrices
        self.ranks = {f"blocks.{index}.{low.layer}": low.rank for index, block in enumerate(spec.blocks) for low in block.low_rank}

    def build(self) -> Program:
        layers: list[Layer] = []

        def layer(label: str, start: int) -> None:
            layers.append(Layer(label, start, len(self.ops)))

        x = self.embedding()
        layer("embedding", 0)
        outputs: list[str] = []
        for index, block in enumerate(self.spec.blocks):
            start, path = len(self.ops), f"blocks.{index}"
            self.owner = None if block.shares is None else (f"{path}.", f"blocks.{block.shares}.")
            x = self.block(path, block, x)
            layer(path, start)
            self.owner = None
            for number, early in enumerate(self.spec.exits):
                if early.after == index:
                    start = len(self.ops)
                    outputs.append(self.head(f"exits.{number}.", early.head, early.norm, x))
                    layer(f"exits.{number}", start)
        if unknown := sorted(name for name in self.ranks if f"{name}.a" not in self.values):
            raise ConfigError(f"{one_line(unknown[0])} is no linear layer, so it has no rank; see inspect --program")
        start = len(self.ops)
        outputs.append(self.head("", self.spec.head, self.spec.norm, x))
        layer("head", start)
        return Program(
            ops=tuple(self.ops), values=self.values, params=self.params, states=self.states(), layers=tuple(layers), inputs=(),
            outputs=tuple(reversed(outputs)), context=self.context,
        )  # fmt: skip

    def states(self) -> tuple[StateGroup, ...]:
        return tuple(dataclasses.replace(group, layers=len(slots)) for group, slots in self.groups.items())

    # --- small helpers: every one appends at most one op

    def value(self, name: str, features: int | tuple[int, ...], dtype: str, rows: RowSymbol = "T") -> Out:
        self.values[name] = Value(rows, features if isinstance(features, tuple) else (features,), dtype)
        return Out(name)

    def param(self, name: str, *shape: int) -> Param:
        if self.owner is not None and len(shape) > 1:
            name = self.owner[1] + name.removeprefix(self.owner[0])
        self.params[name] = shape
        return Param(name)

    def width(self, name: str) -> int:
        return self.values[name].features[-1]

    def state(self, group: StateGroup, path: str) -> StateRef:
        """The next slot of the group with this geometry; ``group.name`` is a stem that gets a number."""
        for known, slots in self.groups.items():
            if type(known) is type(group) and dataclasses.replace(known, name=group.name) == group:
                slots.append(path)
                return StateRef(known.name, len(slots) - 1)
        number = sum(known.name.startswith(group.name) for known in self.groups)
        named = dataclasses.replace(group, name=f"{group.name}{number}")
        self.groups[named] = [path]
        return StateRef(named.name, 0)

    def norm(self, name: str, norm: Norm, x: str, dtype: Dtype | None = None, group: int | None = None, full_weight: bool = False) -> Out:
        """Normalize runs of ``group`` features (all of them unless given); the weight covers one run, or the row with ``full_weight``."""
        width = self.width(x)
        group = group or width
        size = width if full_weight else group
        dtype = dtype or self.precision.compute
        y = self.value(name, width, dtype)
        weight = self.param(f"{name}.weight", size)
        match norm:
            case RMSNorm(eps=eps, offset=offset):
                self.ops.append(ops.RmsNorm(x=In(x), weight=weight, y=y, group=group, eps=eps, offset=offset, dtype=dtype))
            case LayerNorm(eps=eps, bias=has_bias):
                bias = self.param(f"{name}.bias", size) if has_bias else None
                self.ops.append(ops.LayerNorm(x=In(x), weight=weight, y=y, bias=bias, group=group, eps=eps, dtype=dtype))
        return y

    def linear(self, name: str, x: str, out: int, bias: bool = False, shard: ShardAxis | None = None) -> Out:
        if (rank := self.ranks.get(name)) is not None:
            low = self.product(f"{name}.a", x, self.param(f"{name}.a.weight", rank, self.width(x)), None, None)
            return self.product(name, low, self.param(f"{name}.b.weight", out, rank), f"{name}.bias" if bias else None, shard)
        return self.product(name, x, self.param(f"{name}.weight", out, self.width(x)), f"{name}.bias" if bias else None, shard)

    def product(self, name: str, x: str, weight: Param, bias: str | None, shard: ShardAxis | None, dtype: Dtype | None = None) -> Out:
        """x · weightᵀ + bias, named ``name``."""
        out = self.params[weight][0]
        fed, scale = self.fed(x, weight)
        y = self.value(name, out, dtype or self.precision.compute, self.values[x].rows)
        self.ops.append(
            ops.Linear(
                x=In(fed), weight=weight, y=y, scale=scale, bias=self.param(bias, out) if bias else None,
                weight_format=self.formats.weights.get(weight, "dense"), dtype=dtype or self.precision.compute, adapter=name, shard=shard,
            )
        )  # fmt: skip
        return y

    def fed(self, x: str, weight: Param) -> tuple[str, In | None]:
        """x as the product with ``weight`` reads it: in the compute dtype, rounded to bfloat16, or to int8 or fp8 with the rows' scales."""
        form = self.formats.activations.get(weight, "none")
        if form == "none":
            return self.cast(x, self.precision.compute), None
        if form == "bf16":
            return self.cast(x, "bfloat16"), None
        if form not in {"int8", "fp8"}:
            raise UnsupportedError(f"{weight}: activation format {one_line(form)} is not supported; accepted are none, bf16, int8, fp8")
        step = self.formats.steps.get(weight)
        stem = x if step is None else f"{x}.fixed{self.fixed.setdefault((x, step), sum(value == x for value, _ in self.fixed))}"
        rounded, its_scale = f"{stem}.{form}", f"{stem}.scale" if form == "int8" else f"{stem}.{form}.scale"
        if rounded not in self.values:  # several products may read one rounding
            features = self.values[x].features
            q = self.value(rounded, features, form, self.values[x].rows)
            precise = "float64" if self.values[x].dtype == "float64" else "float32"
            scale = self.value(its_scale, (*features[:-1], 1), precise, self.values[x].rows)
            of_each = ops.QuantizeRows(x=In(x), q=q, scale=scale) if form == "int8" else ops.QuantizeFp8(x=In(x), q=q, scale=scale)
            self.ops.append(of_each if step is None else ops.QuantizeFixed(x=In(x), q=q, scale=scale, step=step))
        return rounded, In(its_scale)

    def cast(self, x: str, dtype: Dtype) -> str:
        if self.values[x].dtype == dtype:
            return x
        name = f"{x}.{dtype}"
        if name not in self.values:  # several products may read one cast
            y = self.value(name, self.values[x].features, dtype, self.values[x].rows)
            self.ops.append(ops.Cast(x=In(x), y=y, dtype=dtype))
        return name

    def add(self, name: str, a: str, b: str) -> str:
        y = self.value(name, self.values[a].features, self.values[a].dtype)
        self.ops.append(ops.Add(a=In(a), b=In(b), y=y))
        return y

    def gate(self, name: str, gate: str, up: str, activation: Activation | ClampedSwiglu) -> Out:
        y = self.value(name, self.values[up].features, self.values[up].dtype)
        self.ops.append(ops.Gate(gate=In(gate), up=In(up), y=y, activation=activation))
        return y

    def split(self, stem: str, x: str, /, **sizes: int) -> list[Out]:
        outs = [self.value(f"{stem}.{name}", size, self.values[x].dtype) for name, size in sizes.items()]
        self.ops.append(ops.Split(x=In(x), ys=tuple(outs), sizes=tuple(sizes.values())))
        return outs

    def head_split(self, stem: str, x: str, heads: int, /, **sizes: int) -> list[Out]:
        outs = [self.value(f"{stem}.{name}", heads * size, self.values[x].dtype) for name, size in sizes.items()]
        self.ops.append(ops.HeadSplit(x=In(x), ys=tuple(outs), sizes=tuple(sizes.values()), heads=heads))
        return outs

    def concat(self, name: str, xs: list[str], heads: int) -> Out:
        y = self.value(name, sum(map(self.width, xs)), self.values[xs[0]].dtype)
        self.ops.append(ops.Concat(xs=tuple(map(In, xs)), y=y, heads=heads))
        return y

    def head_linear(self, name: str, x: str, heads: int, out: int) -> Out:
        weight = self.param(f"{name}.weight", heads, out, self.width(x) // heads)
        y = self.value(name, heads * out, self.precision.compute)
        self.ops.append(
            ops.HeadLinear(
                x=In(x), weight=weight, y=y, heads=heads, weight_format=self.formats.weights.get(weight, "dense"),
                dtype=self.precision.compute, adapter=name, shard="heads",
            )
        )  # fmt: skip
        return y

    def expert_linear(self, name: str, x: str, experts: str, count: int, out: int, bias: bool, shard: ShardAxis) -> Out:
        weight = self.param(f"{name}.weight", count, out, self.width(x))
        fed, scale = self.fed(x, weight)
        y = self.value(name, (self.width(experts), out), self.precision.compute)
        self.ops.append(
            ops.ExpertLinear(
                x=In(fed), experts=In(experts), weight=weight, y=y, scale=scale,
                bias=self.param(f"{name}.bias", count, out) if bias else None,
                weight_format=self.formats.weights.get(weight, "dense"), dtype=self.precision.compute, adapter=name, shard=shard,
            )
        )  # fmt: skip
        return y

    def rotate(self, name: str, x: str, heads: int, rotary: Rotary, start: int = 0) -> str:
        frequencies, magnitude = rotary_frequencies(rotary, self.context)
        y = self.value(name, self.width(x), self.values[x].dtype)
        self.ops.append(
            ops.Rotate(
                x=In(x), y=y, heads=heads, dims=rotary.dims, frequencies=frequencies, start=start, interleaved=rotary.interleaved,
                magnitude=magnitude,
            )
        )  # fmt: skip
        return y

    # --- ends

    def embedding(self) -> str:
        spec, residual = self.spec, self.precision.residual
        x = self.value("embedding", spec.width, residual)
        self.ops.append(
            ops.Embed(
                weight=self.param("embedding.weight", spec.vocab, spec.width), y=x, scale=spec.embedding.scale, dtype=residual, shard="rows"
            )
        )
        if (learned := spec.embedding.positions) is not None:
            rows = self.value("embedding.positions", spec.width, residual)
            table = self.param("embedding.positions.weight", learned.count, spec.width)
            self.ops.append(ops.EmbedPositions(weight=table, y=rows, offset=learned.offset, dtype=residual))
            x = Out(self.add("embedding.sum", x, rows))
        if spec.embedding.norm is not None:
            x = self.norm("embedding.norm", spec.embedding.norm, x, residual)
        return x

    def head(self, prefix: str, head: Head, norm: Norm | None, x: str) -> str:
        """Logits of the rows asked for: the rows are picked first, so that nothing is computed for the others."""
        spec, logits = self.spec, self.precision.logits
        rows = self.value(f"{prefix}rows", spec.width, self.values[x].dtype, "R")
        self.ops.append(ops.SelectRows(x=In(x), y=rows))
        y: str = rows
        if norm is not None:
            y = self.norm(f"{prefix}norm", norm, y)
            self.values[y] = dataclasses.replace(self.values[y], rows="R")
        name = "embedding.weight" if head.tied else f"{prefix}head.weight"
        weight = self.param(name, spec.vocab, spec.width)
        y = self.product(f"{prefix}head", y, weight, f"{prefix}head.bias" if head.bias else None, "out", logits)
        if head.scale != 1.0:
            scaled = self.value(f"{prefix}head.scaled", spec.vocab, logits, "R")
            self.ops.append(ops.Scale(x=In(y), y=scaled, factor=head.scale))
            y = scaled
        if head.softcap is not None:
            capped = self.value(f"{prefix}head.capped", spec.vocab, logits, "R")
            self.ops.append(ops.SoftCap(x=In(y), y=capped, cap=head.softcap))
            y = capped
        return self.rename_last(y, f"{prefix}logits")

    def rename_last(self, old: str, new: str) -> str:
        """Give the value that the last op made its public name."""
        self.values[new] = self.values.pop(old)
        self.ops[-1] = self.ops[-1].renamed(lambda name: new if name == old else name)
        return new

    # --- blocks

    def block(self, path: str, block: Block, x: str) -> str:
        match block.wiring:
            case PreNorm(mixer=mixer_norm, feed_forward=ff_norm):
                x = self.branch(path, "mixer", block.mixer, x, pre=mixer_norm)
                return self.branch(path, "feed_forward", block.feed_forward, x, pre=ff_norm)
            case Sandwich() as norms:
                x = self.branch(path, "mixer", block.mixer, x, pre=norms.mixer, post=norms.mixer_post)
                return self.branch(path, "feed_forward", block.feed_forward, x, pre=norms.feed_forward, post=norms.feed_forward_post)
            case BranchNorm() as norms:
                x = self.branch(path, "mixer", block.mixer, x, post=norms.mixer_post)
                return self.branch(path, "feed_forward", block.feed_forward, x, post=norms.feed_forward_post)
            case PostNorm(mixer=mixer_norm, feed_forward=ff_norm):
                x = self.branch(path, "mixer", block.mixer, x, after=mixer_norm)
                return self.branch(path, "feed_forward", block.feed_forward, x, after=ff_norm)
            case Parallel(mixer=mixer_norm, feed_forward=ff_norm):
                shared = self.norm(f"{path}.mixer_norm", mixer_norm, x)
                other = shared if ff_norm is None else self.norm(f"{path}.feed_forward_norm", ff_norm, x)
                if block.mixer is not None:
                    x = self.add(f"{path}.mixer_out", x, self.mixer(block.mixer, f"{path}.mixer", shared))
                if block.feed_forward is not None:
                    x = self.add(f"{path}.out", x, self.feed_forward(block.feed_forward, f"{path}.feed_forward", other))
                return x

    def branch(
        self, path: str, kind: str, part: Mixer | FeedForward | None, x: str, pre: Norm | None = None, post: Norm | None = None,
        after: Norm | None = None,
    ) -> str:  # fmt: skip
        """x + post(part(pre(x))), then ``after`` over the sum."""
        if part is None:
            return x
        residual = self.precision.residual
        y: str = x if pre is None else self.norm(f"{path}.{kind}_norm", pre, x)
        y = self.cast(y, self.precision.compute)
        y = self.part(part, f"{path}.{kind}", y)
        if post is not None:
            y = self.norm(f"{path}.{kind}_post_norm", post, y)
        x = self.add(f"{path}.out" if kind == "feed_forward" else f"{path}.mixer_out", x, y)
        return x if after is None else self.norm(f"{path}.{kind}_norm", after, x, residual)

    def part(self, part: Mixer | FeedForward, path: str, x: str) -> str:
        if isinstance(part, MLP | GatedMLP | MixtureOfExperts):
            return self.feed_forward(part, path, x)
        return self.mixer(part, path, x)

    # --- mixers

    @singledispatchmethod
    def mixer(self, mixer: Mixer, path: str, x: str) -> str:
        raise TypeError(f"no lowering for a {type(mixer).__name__}")

    @mixer.register
    def _(self, mixer: Attention, path: str, x: str) -> str:
        heads, kv_heads, dim = mixer.heads, mixer.kv_heads, mixer.head_dim
        q: str = self.linear(f"{path}.q", x, heads * dim, mixer.bias, "out")
        k: str = self.linear(f"{path}.k", x, kv_heads * dim, mixer.bias, "out")
        v: str = self.linear(f"{path}.v", x, kv_heads * mixer.value_dim, mixer.bias, "out")
        if mixer.clip is not None:
            q, k, v = (self.clip(f"{name}.clipped", name, mixer.clip) for name in (q, k, v))
        span = dim if mixer.norm_span == "head" else None
        if mixer.q_norm is not None:
            q = self.norm(f"{path}.q_norm", mixer.q_norm, q, group=span)
        if mixer.k_norm is not None:
            k = self.norm(f"{path}.k_norm", mixer.k_norm, k, group=span)
        if isinstance(mixer.position, Rotary):
            q = self.rotate(f"{path}.q_rotated", q, heads, mixer.position)
            k = self.rotate(f"{path}.k_rotated", k, kv_heads, mixer.position)
        state = self.state(KvGroup("kv", 0, kv_heads, dim, mixer.value_dim, mixer.visible, self.cache), path)
        self.ops.append(ops.AppendKv(k=In(k), v=In(v), state=state))
        self.kept[path] = state
        return self.attended(mixer, path, x, q, state)

    @mixer.register
    def _(self, mixer: CrossLayerAttention, path: str, x: str) -> str:
        its, state = mixer.attention, self.kept[f"blocks.{mixer.source}.mixer"]
        q: str = self.linear(f"{path}.q", x, its.heads * its.head_dim, its.bias, "out")
        if its.clip is not None:
            q = self.clip(f"{path}.q.clipped", q, its.clip)
        if its.q_norm is not None:
            q = self.norm(f"{path}.q_norm", its.q_norm, q, group=its.head_dim if its.norm_span == "head" else None)
        if isinstance(its.position, Rotary):
            q = self.rotate(f"{path}.q_rotated", q, its.heads, its.position)
        return self.attended(its, path, x, q, state)

    def attended(self, mixer: Attention, path: str, x: str, q: str, state: StateRef) -> str:
        """What queries ``q`` find in ``state``, through the gate and the output projection."""
        heads, kv_heads, dim = mixer.heads, mixer.kv_heads, mixer.head_dim
        y = self.value(f"{path}.attended", heads * mixer.value_dim, self.precision.compute)
        if isinstance(mixer.position, RelativeSinusoid):
            self.ops.append(
                ops.AttendRelative(
                    q=In(q), y=y, position_weight=self.param(f"{path}.position.weight", heads * dim, self.spec.width),
                    content_bias=self.param(f"{path}.content_bias", heads, dim),
                    position_bias=self.param(f"{path}.position_bias", heads, dim), state=state, heads=heads, head_dim=dim,
                    width=self.spec.width, scale=mixer.scale, visible=mixer.visible, clamp=mixer.position.clamp,
                )
            )  # fmt: skip
        else:
            self.ops.append(
                ops.Attend(
                    q=In(q), y=y, state=state, sinks=self.param(f"{path}.sinks", heads) if mixer.sinks else None, heads=heads,
                    kv_heads=kv_heads, head_dim=dim, value_dim=mixer.value_dim, scale=mixer.scale, visible=mixer.visible,
                    softcap=mixer.softcap, slopes=mixer.position.slopes if isinstance(mixer.position, Alibi) else None,
                )
            )  # fmt: skip
        if mixer.gate:
            gate = self.linear(f"{path}.gate", x, heads * mixer.value_dim, mixer.bias, "out")
            y = self.gate(f"{path}.gated", gate, y, "sigmoid")
        return self.linear(f"{path}.o", y, self.spec.width, mixer.out_bias, "in")

    @mixer.register
    def _(self, mixer: LatentAttention, path: str, x: str) -> str:
        # One form for every T: queries are brought into the latent space, where attention is multi-query over the cached rows.
        heads, nope, rope = mixer.heads, mixer.nope_dim, mixer.rope_dim
        q: str = x
        if mixer.q_rank is not None:
            q = self.linear(f"{path}.q_a", x, mixer.q_rank, mixer.bias)
            q = q if mixer.norm is None else self.norm(f"{path}.q_a_norm", mixer.norm, q)
        q = self.linear(f"{path}.q", q, heads * (nope + rope), False, "out")
        q_nope, q_rope = self.head_split(f"{path}.q", q, heads, nope=nope, rope=rope)
        rotated = self.rotate(f"{path}.q_rotated", q_rope, heads, mixer.rotary)
        in_latent = self.head_linear(f"{path}.k_up", q_nope, heads, mixer.kv_rank)
        q = self.concat(f"{path}.q_latent", [in_latent, rotated], heads)

        kv = self.linear(f"{path}.kv_a", x, mixer.kv_rank + rope, mixer.bias)
        latent, k_rope = self.split(f"{path}.kv_a", kv, latent=mixer.kv_rank, rope=rope)
        if mixer.norm is not None:
            latent = self.norm(f"{path}.kv_norm", mixer.norm, latent)
        k = self.concat(f"{path}.k_latent", [latent, self.rotate(f"{path}.k_rotated", k_rope, 1, mixer.rotary)], 1)
        state = self.state(LatentGroup("latent", 0, mixer.kv_rank + rope, mixer.kv_rank, Causal(), self.cache), path)
        self.ops.append(ops.AppendKv(k=In(k), v=None, state=state))
        y = self.value(f"{path}.attended", heads * mixer.kv_rank, self.precision.compute)
        self.ops.append(
            ops.Attend(
                q=In(q), y=y, state=state, heads=heads, kv_heads=1, head_dim=mixer.kv_rank + rope, value_dim=mixer.kv_rank,
                scale=mixer.scale, visible=Causal(),
            )
        )  # fmt: skip
        y = self.head_linear(f"{path}.v_up", y, heads, mixer.value_dim)
        return self.linear(f"{path}.o", y, self.spec.width, mixer.bias, "in")

    @mixer.register
    def _(self, mixer: Mamba, path: str, x: str) -> str:
        z = self.linear(f"{path}.z", x, mixer.inner, mixer.bias, "out")
        u = self.linear(f"{path}.x", x, mixer.inner, mixer.bias, "out")
        u = self.conv(path, u, mixer.conv, mixer.conv_bias)
        low = self.linear(f"{path}.dt_bc", u, mixer.dt_rank + 2 * mixer.state)
        dt_low, b, c = self.split(f"{path}.dt_bc", low, dt=mixer.dt_rank, b=mixer.state, c=mixer.state)
        dt = self.linear(f"{path}.dt", dt_low, mixer.inner, False, "out")
        y = self.value(f"{path}.scanned", mixer.inner, self.precision.compute)
        self.ops.append(
            ops.SelectiveScan(
                x=In(u), dt=In(dt), b=In(b), c=In(c), a_log=self.param(f"{path}.a_log", mixer.inner, mixer.state),
                d=self.param(f"{path}.d", mixer.inner), dt_bias=self.param(f"{path}.dt_bias", mixer.inner), y=y,
                state=self.state(RecurrentGroup("scan", 0, (mixer.inner, mixer.state), self.scan), path),
            )
        )  # fmt: skip
        return self.linear(f"{path}.o", self.gate(f"{path}.gated", z, y, "silu"), self.spec.width, mixer.bias, "in")

    @mixer.register
    def _(self, mixer: Mamba2, path: str, x: str) -> str:
        inner, shared = mixer.heads * mixer.head_dim, mixer.groups * mixer.state
        z = self.linear(f"{path}.z", x, inner, mixer.bias, "out")
        xbc = self.linear(f"{path}.xbc", x, inner + 2 * shared, mixer.bias)
        dt = self.linear(f"{path}.dt", x, mixer.heads, mixer.bias, "out")
        xbc = self.conv(path, xbc, mixer.conv, mixer.conv_bias)
        u, b, c = self.split(f"{path}.xbc", xbc, x=inner, b=shared, c=shared)
        y = self.value(f"{path}.scanned", inner, self.precision.compute)
        self.ops.append(
            ops.DualScan(
                x=In(u), dt=In(dt), b=In(b), c=In(c), a_log=self.param(f"{path}.a_log", mixer.heads),
                d=self.param(f"{path}.d", mixer.heads), dt_bias=self.param(f"{path}.dt_bias", mixer.heads), y=y,
                state=self.state(RecurrentGroup("scan", 0, (mixer.heads, mixer.head_dim, mixer.state), self.scan), path), heads=mixer.heads,
                groups=mixer.groups, dt_min=mixer.dt_min, dt_max=mixer.dt_max,
            )
        )  # fmt: skip
        gated = self.gate(f"{path}.gated", z, y, "silu")
        normed = self.norm(f"{path}.norm", mixer.norm, gated, group=inner // mixer.groups, full_weight=True)
        return self.linear(f"{path}.o", normed, self.spec.width, mixer.bias, "in")

    @mixer.register
    def _(self, mixer: GatedDeltaNet, path: str, x: str) -> str:
        keys, values = mixer.key_heads * mixer.key_dim, mixer.value_heads * mixer.value_dim
        qkv = self.conv(path, self.linear(f"{path}.qkv", x, 2 * keys + values), mixer.conv, False)
        z = self.linear(f"{path}.z", x, values, False, "out")
        b = self.linear(f"{path}.b", x, mixer.value_heads, False, "out")
        a = self.linear(f"{path}.a", x, mixer.value_heads, False, "out")
        q, k, v = self.split(f"{path}.qkv", qkv, q=keys, k=keys, v=values)
        y = self.value(f"{path}.scanned", values, self.precision.compute)
        self.ops.append(
            ops.GatedDeltaScan(
                q=In(q), k=In(k), v=In(v), a=In(a), b=In(b), a_log=self.param(f"{path}.a_log", mixer.value_heads),
                dt_bias=self.param(f"{path}.dt_bias", mixer.value_heads), y=y,
                state=self.state(RecurrentGroup("scan", 0, (mixer.value_heads, mixer.key_dim, mixer.value_dim), self.scan), path),
                key_heads=mixer.key_heads, value_heads=mixer.value_heads,
            )
        )  # fmt: skip
        normed = self.norm(f"{path}.norm", mixer.norm, y, group=mixer.value_dim)
        return self.linear(f"{path}.o", self.gate(f"{path}.gated", z, normed, "silu"), self.spec.width, False, "in")

    @mixer.register
    def _(self, mixer: LinearAttention, path: str, x: str) -> str:
        heads, kv_heads, dim, value_dim = mixer.heads, mixer.kv_heads, mixer.head_dim, mixer.value_dim
        q: str = self.linear(f"{path}.q", x, heads * dim, mixer.bias, "out")
        k: str = self.linear(f"{path}.k", x, kv_heads * dim, mixer.bias, "out")
        v = self.linear(f"{path}.v", x, kv_heads * value_dim, mixer.bias, "out")
        if mixer.q_norm is not None:
            q = self.norm(f"{path}.q_norm", mixer.q_norm, q, group=dim)
        if mixer.k_norm is not None:
            k = self.norm(f"{path}.k_norm", mixer.k_norm, k, group=dim)
        if mixer.position is not None:
            q = self.rotate(f"{path}.q_rotated", q, heads, mixer.position)
            k = self.rotate(f"{path}.k_rotated", k, kv_heads, mixer.position)
        q, k = self.head_linear(f"{path}.q_feature", q, heads, dim), self.head_linear(f"{path}.k_feature", k, kv_heads, dim)
        y = self.value(f"{path}.scanned", heads * value_dim, self.precision.compute)
        state = self.state(RecurrentGroup("linear", 0, (kv_heads, 2 * dim, value_dim + 1), self.scan), path)
        self.ops.append(
            ops.LinearScan(q=In(q), k=In(k), v=In(v), y=y, state=state, heads=heads, kv_heads=kv_heads, head_dim=dim, value_dim=value_dim)
        )
        return self.linear(f"{path}.o", y, self.spec.width, mixer.out_bias, "in")

    def conv(self, path: str, x: str, taps: int, bias: bool) -> Out:
        width = self.width(x)
        y = self.value(f"{path}.conv", width, self.precision.compute)
        self.ops.append(
            ops.CausalConv(
                x=In(x), weight=self.param(f"{path}.conv.weight", width, taps), y=y, activation="silu",
                bias=self.param(f"{path}.conv.bias", width) if bias else None,
                state=self.state(RecurrentGroup("conv", 0, (taps - 1, width), self.precision.compute), path),
            )
        )  # fmt: skip
        return y

    def clip(self, name: str, x: str, limit: float) -> Out:
        y = self.value(name, self.width(x), self.values[x].dtype)
        self.ops.append(ops.Clip(x=In(x), y=y, limit=limit))
        return y

    # --- feed-forwards

    @singledispatchmethod
    def feed_forward(self, part: FeedForward, path: str, x: str) -> str:
        raise TypeError(f"no lowering for a {type(part).__name__}")

    @feed_forward.register
    def _(self, part: MLP, path: str, x: str) -> str:
        up = self.linear(f"{path}.up", x, part.hidden, part.bias, "out")
        y = self.value(f"{path}.activated", part.hidden, self.precision.compute)
        self.ops.append(ops.Activate(x=In(up), y=y, activation=part.activation))
        return self.linear(f"{path}.down", y, self.spec.width, part.bias, "in")

    @feed_forward.register
    def _(self, part: GatedMLP, path: str, x: str) -> str:
        gate = self.linear(f"{path}.gate", x, part.hidden, part.bias, "out")
        up = self.linear(f"{path}.up", x, part.hidden, part.bias, "out")
        y = self.gate(f"{path}.activated", gate, up, part.activation)
        return self.linear(f"{path}.down", y, self.spec.width, part.bias, "in")

    @feed_forward.register
    def _(self, part: MixtureOfExperts, path: str, x: str) -> str:
        router, expert = part.router, part.expert
        logits = self.cast(self.linear(f"{path}.router", x, part.experts, router.bias), self.precision.logits)
        chosen = self.value(f"{path}.chosen", part.top_k, "int32")
        weights = self.value(f"{path}.weights", part.top_k, self.precision.logits)
        self.ops.append(
            ops.Route(
                logits=In(logits), experts=chosen, weights=weights,
                correction=self.param(f"{path}.router.correction", part.experts) if router.correction else None, top_k=part.top_k,
                score=router.score, normalize=router.normalize, scale=router.scale, groups=router.groups, top_groups=router.top_groups,
            )
        )  # fmt: skip
        gate = self.expert_linear(f"{path}.experts.gate", x, chosen, part.experts, expert.hidden, expert.bias, "out")
        up = self.expert_linear(f"{path}.experts.up", x, chosen, part.experts, expert.hidden, expert.bias, "out")
        hidden = self.gate(f"{path}.experts.activated", gate, up, expert.activation)
        down = self.expert_linear(f"{path}.experts.down", hidden, chosen, part.experts, self.spec.width, expert.bias, "in")
        y = self.value(f"{path}.routed", self.spec.width, self.precision.compute)
        self.ops.append(ops.Combine(x=In(down), weights=In(weights), y=y))
        if part.shared is None:
            return y
        shared = self.feed_forward(part.shared, f"{path}.shared", x)
        if part.shared_gate:
            score = self.linear(f"{path}.shared_gate", x, 1)
            shared = self.gate(f"{path}.shared.gated", score, shared, "sigmoid")
        return self.add(f"{path}.mixed", y, shared)
