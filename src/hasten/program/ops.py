"""The op set: what a Program may say, one frozen class per op, each with its contract.

Shape legend: T tokens of the batch (sequences laid end to end), S sequences, R rows whose logits were asked for, D width, H heads,
K key/value heads, N features in general, E experts, A experts chosen per token. Every value is [rows, features] unless its line says
otherwise; heads lie side by side in the features. Norms, softmax and scans compute in float32 at least, whatever the dtypes around
them.

Fields are typed by role: ``In`` and ``Out`` name values, ``Param`` names a weight, ``StateRef`` names one layer's place in a state
group; everything else is an attribute. A pass reads the roles from the class, so a new op needs no visitor.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, NewType, TypeVar, get_args

import msgspec

from hasten.spec import Activation, ClampedSwiglu, Dtype, Visibility

In = NewType("In", str)
Out = NewType("Out", str)
Param = NewType("Param", str)

ShardAxis = Literal["out", "in", "heads", "rows"]


class StateRef(msgspec.Struct, frozen=True):
    """Layer ``slot`` of state group ``group``."""

    group: str
    slot: int


class Contract(msgspec.Struct, frozen=True):
    """What any backend must keep to, against ``reference`` in float64 on the same inputs.

    ``tolerance`` is the largest |difference| over the largest |reference value|, for float32 then bfloat16 outputs (0 = exact).
    ``state`` says what the op does to its state group."""

    tolerance: tuple[float, float]
    differentiable: bool = True
    state: Literal["none", "reads", "writes", "reads and writes"] = "none"


_ROUNDING = (2e-6, 1e-2)
_REDUCTION = (2e-5, 2e-2)
_EXACT = (0.0, 0.0)
FEATURE_FLOOR = 1e-12
"""The least a feature of LinearScan is, so that what it divides by is never zero."""

_ONE_STEP = (1 / 127, 1 / 127)  # half a step rounds either way: max|x| / 2 is 63.5 steps in float64, a hair beside it in float32
_ONE_STEP_FP8 = (1 / 14, 1 / 14)  # the same of e4m3, whose steps are 32 from 256 to 448


class Op(msgspec.Struct, frozen=True, kw_only=True):
    """Base of every op. ``roles`` maps field names to 'in', 'out', 'param' or 'state'."""

    contract: ClassVar[Contract]
    roles: ClassVar[dict[str, str]]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values read, in field order."""
        return tuple(self._names("in"))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the values made, in field order."""
        return tuple(self._names("out"))

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the weights read, in field order."""
        return tuple(self._names("param"))

    @property
    def state_refs(self) -> tuple[StateRef, ...]:
        """The places in state groups this op touches."""
        return tuple(getattr(self, name) for name, role in self.roles.items() if role == "state")

    @property
    def attributes(self) -> dict[str, Any]:
        """Every field that is neither a value, a weight nor a state."""
        return {name: getattr(self, name) for name in self.__struct_fields__ if name not in self.roles}

    @classmethod
    def default(cls, name: str) -> object:
        """What field ``name`` is unless given; msgspec.NODEFAULT for one that must be given."""
        from_the_end = cls.__struct_fields__[::-1].index(name)
        return cls.__struct_defaults__[-1 - from_the_end] if from_the_end < len(cls.__struct_defaults__) else msgspec.NODEFAULT

    def renamed(self, rename: Callable[[str], str]) -> "Op":
        """The same op with every value name passed through ``rename``."""
        changes: dict[str, Any] = {}
        for name, role in self.roles.items():
            value = getattr(self, name)
            if role in {"in", "out"} and value is not None:
                changes[name] = tuple(map(rename, value)) if isinstance(value, tuple) else rename(value)
        return msgspec.structs.replace(self, **changes)

    def with_state(self, place: Callable[[StateRef], StateRef]) -> "Op":
        """The same op with every state reference passed through ``place``."""
        changes: dict[str, Any] = {name: place(getattr(self, name)) for name, role in self.roles.items() if role == "state"}
        return msgspec.structs.replace(self, **changes) if changes else self

    def _names(self, role: str) -> Iterator[str]:
        for name, its_role in self.roles.items():
            value = getattr(self, name)
            if its_role == role and value is not None:
                yield from value if isinstance(value, tuple) else (value,)


_Kind = TypeVar("_Kind", bound=Op)

_ROLE_OF_TYPE: dict[Any, str] = {In: "in", Out: "out", Param: "param", StateRef: "state"}


def _op(tolerance: tuple[float, float], *, differentiable: bool = True, state: Any = "none") -> Callable[[type[_Kind]], type[_Kind]]:
    def decorate(cls: type[_Kind]) -> type[_Kind]:
        cls.contract = Contract(tolerance, differentiable, state)
        cls.roles = {
            name: _ROLE_OF_TYPE[candidate]
            for name, given in cls.__annotations__.items()
            for candidate in (given, *get_args(given))
            if candidate in _ROLE_OF_TYPE
        }
        return cls

    return decorate


# --- rows in and out


@_op(_ROUNDING)
class Embed(Op, frozen=True, kw_only=True):
    """y[T, D] = weight[tokens] · scale, in ``dtype``. weight [V, D]. Token ids come from the batch."""

    weight: Param
    y: Out
    scale: float = 1.0
    dtype: Dtype = "float32"
    shard: ShardAxis | None = None


@_op(_EXACT)
class EmbedPositions(Op, frozen=True, kw_only=True):
    """y[T, D] = weight[positions + offset], in ``dtype``. weight [count, D]. Positions come from the batch."""

    weight: Param
    y: Out
    offset: int = 0
    dtype: Dtype = "float32"


@_op(_EXACT)
class SelectRows(Op, frozen=True, kw_only=True):
    """y[R, N] = x[rows]. The rows whose logits are wanted come from the batch."""

    x: In
    y: Out


@_op(_EXACT)
class Split(Op, frozen=True, kw_only=True):
    """x[T, sum(sizes)] cut along its features into ``ys`` of the given sizes."""

    x: In
    ys: tuple[Out, ...]
    sizes: tuple[int, ...]


@_op(_EXACT)
class Concat(Op, frozen=True, kw_only=True):
    """``xs`` laid side by side, head by head: with ``heads`` H each x is [T, H·nᵢ] and y is [T, H·Σnᵢ]."""

    xs: tuple[In, ...]
    y: Out
    heads: int = 1


@_op(_EXACT)
class HeadSplit(Op, frozen=True, kw_only=True):
    """The inverse of Concat: x[T, H·Σsizes] cut inside every head into ``ys`` of [T, H·size]."""

    x: In
    ys: tuple[Out, ...]
    sizes: tuple[int, ...]
    heads: int


# --- dtypes


@_op(_EXACT)
class Cast(Op, frozen=True, kw_only=True):
    """y = x in another dtype, round to nearest even."""

    x: In
    y: Out
    dtype: Dtype


@_op(_ONE_STEP, differentiable=False)
class QuantizeRows(Op, frozen=True, kw_only=True):
    """Symmetric int8 per row: scale[T, 1] = max|x| / 127 (1 where the row is zero), q[T, N] = round_half_even(x / scale).

    Of x [T, A, N] every one of the T·A rows has its own scale."""

    x: In
    q: Out
    scale: Out


@_op(_ONE_STEP_FP8, differentiable=False)
class QuantizeFp8(Op, frozen=True, kw_only=True):
    """fp8 (e4m3) per row: scale[T, 1] = max|x| / 448 (1 where that is zero), q[T, N] = the e4m3 nearest to x / scale, half to even, within
    ±448.

    Of x [T, A, N] every one of the T·A rows has its own scale."""

    x: In
    q: Out
    scale: Out


@_op(_ONE_STEP, differentiable=False)
class QuantizeFixed(Op, frozen=True, kw_only=True):
    """int8 of one scale for all: q = round_half_even(x / step) within ±127 (NaN: 127), scale[T, 1] = step, whatever x is.

    Of x [T, A, N] scale is [T, A, 1]. ``step`` comes from calibration; nothing is summed or compared over a row."""

    x: In
    q: Out
    scale: Out
    step: float


# --- linear


@_op(_REDUCTION)
class Linear(Op, frozen=True, kw_only=True):
    """y[T, out] = x[T, in] · weightᵀ + bias, in ``dtype``. weight [out, in], bias [out].

    ``weight_format`` names how the weight is stored. How x is fed is another choice: with ``scale`` [T, 1], x is int8 as QuantizeRows
    makes it, or fp8 as QuantizeFp8 does, and stands for x · scale. ``adapter`` names the slot a low-rank adapter plugs into; it reads
    what the product reads. ``shard`` is the axis tensor parallelism may cut."""

    x: In
    weight: Param
    y: Out
    scale: In | None = None
    bias: Param | None = None
    weight_format: str = "dense"
    dtype: Dtype = "float32"
    adapter: str | None = None
    shard: ShardAxis | None = None


@_op(_REDUCTION)
class HeadLinear(Op, frozen=True, kw_only=True):
    """One product per head, in ``dtype``: y[T, H·out] from x[T, H·in], weight [H, out, in]."""

    x: In
    weight: Param
    y: Out
    heads: int
    weight_format: str = "dense"
    dtype: Dtype = "float32"
    adapter: str | None = None
    shard: ShardAxis | None = None


@_op(_REDUCTION)
class ExpertLinear(Op, frozen=True, kw_only=True):
    """y[T, A, out] = x · weight[expert]ᵀ + bias[expert], in ``dtype``. weight [E, out, in], bias [E, out].

    x is [T, in] (every chosen expert reads the token) or [T, A, in] (each reads its own row), int8 or fp8 where ``scale`` (x's shape, 1
    in place of its last size) is given. ``experts`` is [T, A] int32."""

    x: In
    experts: In
    weight: Param
    y: Out
    scale: In | None = None
    bias: Param | None = None
    weight_format: str = "dense"
    dtype: Dtype = "float32"
    adapter: str | None = None
    shard: ShardAxis | None = None


@_op(_REDUCTION)
class Route(Op, frozen=True, kw_only=True):
    """Choose experts from router logits [T, E]: experts[T, A] int32, falling in score (corrected), ties to the lower index; weights[T, A].

    See hasten.spec.Router for the attributes. ``correction`` [E] is added to the scores for choosing only."""

    logits: In
    experts: Out
    weights: Out
    correction: Param | None = None
    top_k: int
    score: Literal["softmax", "sigmoid"]
    normalize: bool
    scale: float
    groups: int = 1
    top_groups: int = 1


@_op(_REDUCTION)
class Combine(Op, frozen=True, kw_only=True):
    """y[T, N] = Σₐ weights[T, a] · x[T, a, N], summed in the order the experts were chosen."""

    x: In
    weights: In
    y: Out


# --- norms and pointwise


@_op(_REDUCTION)
class RmsNorm(Op, frozen=True, kw_only=True):
    """y = x / sqrt(mean(x²) + eps) · (offset + weight) over each run of ``group`` features. weight [group] or [N]; y in ``dtype``."""

    x: In
    weight: Param
    y: Out
    group: int
    eps: float
    offset: float = 0.0
    dtype: Dtype = "float32"


@_op(_REDUCTION)
class LayerNorm(Op, frozen=True, kw_only=True):
    """y = (x − mean) / sqrt(var + eps) · weight + bias over each run of ``group`` features. weight, bias [group] or [N]; y in ``dtype``."""

    x: In
    weight: Param
    y: Out
    bias: Param | None = None
    group: int
    eps: float
    dtype: Dtype = "float32"


@_op(_ROUNDING)
class Add(Op, frozen=True, kw_only=True):
    """y = a + b, in a's dtype (b may be narrower)."""

    a: In
    b: In
    y: Out


@_op(_ROUNDING)
class Scale(Op, frozen=True, kw_only=True):
    """y = x · factor."""

    x: In
    y: Out
    factor: float


@_op(_ROUNDING)
class Clip(Op, frozen=True, kw_only=True):
    """y = min(max(x, −limit), limit)."""

    x: In
    y: Out
    limit: float


@_op(_ROUNDING)
class SoftCap(Op, frozen=True, kw_only=True):
    """y = cap · tanh(x / cap)."""

    x: In
    y: Out
    cap: float


@_op(_ROUNDING)
class Activate(Op, frozen=True, kw_only=True):
    """y = activation(x)."""

    x: In
    y: Out
    activation: Activation


@_op(_ROUNDING)
class Gate(Op, frozen=True, kw_only=True):
    """y = activation(gate) · up, or hasten.spec.ClampedSwiglu of both. ``gate`` may be [T, 1], one number for the whole row."""

    gate: In
    up: In
    y: Out
    activation: Activation | ClampedSwiglu


# --- positions and attention


@_op(_ROUNDING)
class Rotate(Op, frozen=True, kw_only=True):
    """Rotary embedding of ``dims`` features of every head, from feature ``start``.

    Angles are position · frequencies[i] (float32), cosines and sines are multiplied by ``magnitude``. Pairs are (i, i + dims/2), or
    (2i, 2i + 1) where ``interleaved``. Positions come from the batch."""

    x: In
    y: Out
    heads: int
    dims: int
    frequencies: tuple[float, ...]
    start: int = 0
    interleaved: bool = False
    magnitude: float = 1.0


@_op(_EXACT, state="writes")
class AppendKv(Op, frozen=True, kw_only=True):
    """Adds each token's key [T, K·dk] and value [T, K·dv] to its sequence's cache. A latent group takes one row and no value."""

    k: In
    v: In | None
    state: StateRef


@_op(_REDUCTION, state="reads")
class Attend(Op, frozen=True, kw_only=True):
    """y[T, H·dv] = softmax(q·k·scale + bias) v over what ``visible`` lets each query see in its sequence's cache.

    ``slopes`` adds slope[h] · (key position − query position) (ALiBi); ``softcap`` squashes the scores before any bias; ``sinks`` [H]
    joins the softmax's denominator and takes no value. In a latent group the values are the first ``value_dim`` features of the keys.
    Appends of the same step are visible; masked lanes are exactly zero."""

    q: In
    y: Out
    state: StateRef
    sinks: Param | None = None
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    visible: Visibility
    softcap: float | None = None
    slopes: tuple[float, ...] | None = None


@_op(_REDUCTION, state="reads")
class AttendRelative(Op, frozen=True, kw_only=True):
    """Transformer-XL attention: score(i, j) = ((qᵢ + u)·kⱼ + (qᵢ + w)·(position_weight · R[i − j])) · scale.

    R is the sinusoid of the distance, sines then cosines of distance / 10000^(2i/width); distances above ``clamp`` read as ``clamp``.
    position_weight [H·d, width]; u, w [H, d]. Shapes as in Attend, with as many key/value heads as heads."""

    q: In
    y: Out
    position_weight: Param
    content_bias: Param
    position_bias: Param
    state: StateRef
    heads: int
    head_dim: int
    width: int
    scale: float
    visible: Visibility
    clamp: int | None = None


@_op(_REDUCTION, state="reads")
class AttentionMap(Op, frozen=True, kw_only=True):
    """The probabilities of the Attend that names the same state: y[T, H, context], the cache's oldest kept position first.

    Made only where a tap asks for it. Rows of shorter sequences end in zeros."""

    q: In
    y: Out
    state: StateRef
    sinks: Param | None = None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    visible: Visibility
    softcap: float | None = None
    slopes: tuple[float, ...] | None = None


@_op(_REDUCTION, state="reads")
class AttentionMapRelative(Op, frozen=True, kw_only=True):
    """The probabilities of the AttendRelative that names the same state, laid out as AttentionMap's. Made only where a tap asks."""

    q: In
    y: Out
    position_weight: Param
    content_bias: Param
    position_bias: Param
    state: StateRef
    heads: int
    head_dim: int
    width: int
    scale: float
    visible: Visibility
    clamp: int | None = None


# --- recurrences


@_op(_REDUCTION, state="reads and writes")
class CausalConv(Op, frozen=True, kw_only=True):
    """Depthwise convolution over time: y[t] = activation(Σᵢ weight[:, i] · x[t − taps + 1 + i] + bias).

    weight [N, taps], bias [N]. The state keeps the last taps − 1 rows of each sequence."""

    x: In
    weight: Param
    y: Out
    state: StateRef
    bias: Param | None = None
    activation: Activation | None = None


@_op(_REDUCTION, state="reads and writes")
class SelectiveScan(Op, frozen=True, kw_only=True):
    """Mamba's recurrence, per channel n and state s: h = exp(dt·A)·h + dt·b·x; y = Σₛ c·h + d·x, with dt = softplus(dt + dt_bias).

    x, dt, y [T, N]; b, c [T, states]; A = −exp(a_log) with a_log [N, states]; d, dt_bias [N]. The state is h [N, states]."""

    x: In
    dt: In
    b: In
    c: In
    a_log: Param
    d: Param
    dt_bias: Param
    y: Out
    state: StateRef


@_op(_REDUCTION, state="reads and writes")
class DualScan(Op, frozen=True, kw_only=True):
    """Mamba-2's recurrence, per head: h = exp(dt·A)·h + dt·x⊗b; y = h·c + d·x, with dt = clip(softplus(dt + dt_bias), dt_min, dt_max).

    x, y [T, H·P]; dt [T, H]; b, c [T, groups·states]; A = −exp(a_log), a_log, d, dt_bias [H]. The state is h [H, P, states]."""

    x: In
    dt: In
    b: In
    c: In
    a_log: Param
    d: Param
    dt_bias: Param
    y: Out
    state: StateRef
    heads: int
    groups: int
    dt_min: float = 0.0
    dt_max: float | None = None


@_op(_REDUCTION, state="reads and writes")
class GatedDeltaScan(Op, frozen=True, kw_only=True):
    """Gated delta rule, per value head: S = exp(g)·S; S += k ⊗ beta·(v − Sᵀk); y = Sᵀq.

    q and k are first divided by sqrt(|·|² + 1e-6), then q by sqrt(key_dim).

    g = −exp(a_log)·softplus(a + dt_bias), beta = sigmoid(b). q, k [T, key_heads·key_dim]; v, y [T, value_heads·value_dim];
    a, b [T, value_heads]; a_log, dt_bias [value_heads]. Value head h reads key head h // (value_heads / key_heads).
    The state is S [value_heads, key_dim, value_dim]."""

    q: In
    k: In
    v: In
    a: In
    b: In
    a_log: Param
    dt_bias: Param
    y: Out
    state: StateRef
    key_heads: int
    value_heads: int


@_op(_REDUCTION, state="reads and writes")
class LinearScan(Op, frozen=True, kw_only=True):
    """Linear attention, per key/value head: S += φ(k) ⊗ [v, 1]; with z = Sᵀφ(q), y = z[:value_dim] / z[value_dim].

    φ(x) = [softmax(x), softmax(−x)] over the features of a head, none below 1e-12 (FEATURE_FLOOR). q [T, heads·head_dim]; k
    [T, kv_heads·head_dim]; v [T, kv_heads·value_dim]; y [T, heads·value_dim]. Query head h reads key/value head
    h // (heads / kv_heads). The state is S [kv_heads, 2·head_dim, value_dim + 1]."""

    q: In
    k: In
    v: In
    y: Out
    state: StateRef
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


OPS: tuple[type[Op], ...] = (
    Embed, EmbedPositions, SelectRows, Split, Concat, HeadSplit, Cast, QuantizeRows, QuantizeFp8, QuantizeFixed, Linear, HeadLinear,
    ExpertLinear, Route, Combine, RmsNorm, LayerNorm, Add, Scale, Clip, SoftCap, Activate, Gate, Rotate, AppendKv, Attend, AttendRelative,
    AttentionMap, AttentionMapRelative, CausalConv, SelectiveScan, DualScan, GatedDeltaScan, LinearScan,
)  # fmt: skip
"""Every op there is. The generic tests walk this list: an op without a case fails them."""
