"""Recipes: transforms in order, each with its settings, as a list in YAML.

- awq: {weights: int4-g64}
- gptq:
    weights: int4-g64
    skip: ["blocks.0.*"]
"""

import dataclasses
import enum
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from hasten.base.errors import ConfigError, UnsupportedError, UserError, one_line
from hasten.compress.block_qat import BlockQat, block_qat, check_block_qat
from hasten.compress.cache import Cache, cache_transform, check_cache
from hasten.compress.codebook import Cluster, check_codebook, codebook
from hasten.compress.convert.heads import KvHeads, check_kv_heads, kv_heads
from hasten.compress.convert.latent import Latent, check_latent, latent
from hasten.compress.convert.linear import LinearLayers, check_linear_attention, linear_attention
from hasten.compress.convert.share import ShareKv, check_share_kv, share_kv
from hasten.compress.convert.window import Window, check_window, window
from hasten.compress.cut.heads import CutHeads, check_cut_heads, cut_heads
from hasten.compress.cut.layers import CutLayers, check_cut_layers, cut_layers
from hasten.compress.cut.neurons import CutNeurons, check_cut_neurons, cut_neurons
from hasten.compress.cut.width import CutWidth, check_cut_width, cut_width
from hasten.compress.data import Text
from hasten.compress.ends import forms_of_ends
from hasten.compress.heal import Heal, check_heal, heal
from hasten.compress.low_rank import Rank, check_rank, rank
from hasten.compress.mixed import Mixed, check_mixed, mixed
from hasten.compress.pruning import Magnitude, SparseGpt, Wanda, check_prune, prune
from hasten.compress.qat import Qat, check_qat, qat
from hasten.compress.rotate import Rotate, check_rotate, rotate
from hasten.compress.rounding import Gptq, Rounding, Rtn, Uniform, check_rounding, gptq_transform, rtn
from hasten.compress.scaling import Awq, SmoothQuant, awq, check_awq, check_smoothquant, smoothquant
from hasten.compress.share import Share, check_share, share
from hasten.compress.static import Static, check_static, fed_int8, static_transform
from hasten.compress.walk import Run
from hasten.model import Model

ENTRY_POINTS = "hasten.transforms"

RECIPE_LIMIT = 1 << 20
"""Bytes of a recipe that are read."""


class Stage(enum.IntEnum):
    """What a transform does to weights, which says where it may stand in a recipe. MARKS changes none; the others come in this order, but
    what TRAINS may stand anywhere before what ROUNDS."""

    MARKS = 0
    TRAINS = 1
    SHAPES = 2
    PRUNES = 3
    SCALES = 4
    ROUNDS = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Transform:
    """A transform by name: its ``settings`` type, ``apply`` (model, settings, text, run) → model, ``check`` (model, settings), which raises
    UserError for what cannot work, whether these settings look at text, and where it stands in a recipe."""

    name: str
    settings: type[msgspec.Struct]
    apply: Callable[[Model, Any, Any, Run], Model]
    check: Callable[[Model, Any], None]
    needs_text: Callable[[Any], bool] = lambda settings: True
    stage: Stage = Stage.SCALES


@dataclasses.dataclass(frozen=True, slots=True)
class Training:
    """A transform that learns, from text that its settings name, and from what the recipe began with: ``apply`` (model, settings,
    original, run) → model."""

    name: str
    settings: type[msgspec.Struct]
    apply: Callable[[Model, Any, Model, Run], Model]
    check: Callable[[Model, Any], None]
    stage: Stage = Stage.TRAINS


BUILT_IN: Mapping[str, Transform | Training] = {
    each.name: each
    for each in (
        Transform("rtn", Rtn, rtn, check_rounding, lambda settings: settings.clip == "outputs", stage=Stage.ROUNDS),
        Transform("gptq", Gptq, gptq_transform, check_rounding, stage=Stage.ROUNDS),
        Transform("codebook", Cluster, codebook, check_codebook, lambda settings: settings.needs_text, stage=Stage.ROUNDS),
        Transform("mixed", Mixed, mixed, check_mixed, stage=Stage.ROUNDS),
        Transform("magnitude", Magnitude, prune, check_prune, lambda settings: False, stage=Stage.PRUNES),
        Transform("wanda", Wanda, prune, check_prune, stage=Stage.PRUNES),
        Transform("sparsegpt", SparseGpt, prune, check_prune, stage=Stage.PRUNES),
        Transform("awq", Awq, awq, check_awq),
        Transform("smoothquant", SmoothQuant, smoothquant, check_smoothquant),
        Transform("cut_neurons", CutNeurons, cut_neurons, check_cut_neurons, stage=Stage.SHAPES),
        Transform("cut_heads", CutHeads, cut_heads, check_cut_heads, stage=Stage.SHAPES),
        Transform("cut_width", CutWidth, cut_width, check_cut_width, stage=Stage.SHAPES),
        Transform("cut_layers", CutLayers, cut_layers, check_cut_layers, stage=Stage.SHAPES),
        Transform("rotate", Rotate, rotate, check_rotate, lambda settings: False),
        Transform("kv_heads", KvHeads, kv_heads, check_kv_heads, stage=Stage.SHAPES),
        Transform("latent", Latent, latent, check_latent, stage=Stage.SHAPES),
        Transform("window", Window, window, check_window, lambda settings: False, stage=Stage.SHAPES),
        Transform("linear_attention", LinearLayers, linear_attention, check_linear_attention, stage=Stage.SHAPES),
        Transform("share_kv", ShareKv, share_kv, check_share_kv, stage=Stage.SHAPES),
        Transform("static", Static, static_transform, check_static, stage=Stage.MARKS),
        Transform("cache", Cache, cache_transform, check_cache, stage=Stage.MARKS),
        Transform("rank", Rank, rank, check_rank, stage=Stage.SHAPES),
        Transform("share", Share, share, check_share, lambda settings: False, stage=Stage.SHAPES),
        Training("heal", Heal, heal, check_heal),
        Transform("block_qat", BlockQat, block_qat, check_block_qat, stage=Stage.ROUNDS),
        Training("qat", Qat, qat, check_qat, Stage.ROUNDS),
    )
}


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One transform of a recipe with its settings."""

    transform: Transform | Training
    settings: Any

    @property
    def needs_text(self) -> bool:
        """Whether it looks at activations."""
        return isinstance(self.transform, Transform) and self.transform.needs_text(self.settings)


Recipe = tuple[Step, ...]


def find_transform(name: object) -> Transform | Training:
    """The transform of that name, built in or of the entry points ``hasten.transforms``. Raises UnsupportedError listing all."""
    if isinstance(name, str) and name in BUILT_IN:
        return BUILT_IN[name]
    entries = {entry.name: entry for entry in metadata.entry_points(group=ENTRY_POINTS)}
    if isinstance(name, str) and name in entries:
        found = entries[name].load()
        if not isinstance(found, Transform | Training):
            raise UnsupportedError(f"entry point {name} of {ENTRY_POINTS} is {one_line(found)}, which is no Transform; ask its author")
        return found
    raise UnsupportedError(f"no transform {one_line(name)}; there are {', '.join(sorted({*BUILT_IN, *entries}))}")


def read_recipe(path: Path) -> Recipe:
    """The recipe of a YAML file. Raises UserError for what is none."""
    import yaml

    try:
        data = path.read_bytes()[: RECIPE_LIMIT + 1]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; name a recipe, a YAML list of transforms") from None
    if len(data) > RECIPE_LIMIT or b"&" in data and b"*" in data and _has_aliases(data):
        raise UserError(f"{path} is longer than {RECIPE_LIMIT:,} bytes or has aliases, which no recipe needs; write it out")
    try:
        listed = yaml.safe_load(data)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is no YAML: {one_line(str(error))}") from None
    return recipe_of(listed, str(path))


def _has_aliases(data: bytes) -> bool:
    import yaml

    try:
        return any(isinstance(token, yaml.AliasToken) for token in yaml.scan(data))
    except (yaml.YAMLError, RecursionError):
        return False  # said when it is parsed


def recipe_of(listed: object, name: str = "recipe") -> Recipe:
    """The recipe of plain data: a list of objects with one key each, a transform's name, and its settings, or of names alone."""
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"{name}: a list of transforms is needed, as '- gptq: {{weights: int4-g64}}', not {one_line(listed)}")
    steps = []
    for number, item in enumerate(listed, 1):
        named = {item: {}} if isinstance(item, str) else item
        if not isinstance(named, dict) or len(named) != 1:
            raise ConfigError(f"{name}, item {number}: one transform with its settings is needed, not {one_line(item)}")
        ((key, given),) = named.items()
        transform = find_transform(key)
        try:
            settings = msgspec.convert(given or {}, transform.settings, strict=True)
        except msgspec.ValidationError as error:
            accepted = ", ".join(transform.settings.__struct_fields__)
            raise ConfigError(f"{name}, item {number}, {key}: {one_line(str(error), 300)}; settings are {accepted}") from None
        steps.append(Step(transform, settings))
    return tuple(steps)


def check_recipe(model: Model, recipe: Sequence[Step]) -> None:
    """Raise UserError, with the reason, for what cannot work, before anything is begun: of each step alone, and of their order."""
    for place, step in enumerate(recipe):
        before = recipe[:place]
        step.transform.check(model, step.settings)
        _refuse_order(before, step)
        if isinstance(step.settings, Static) and "int8" not in _fed(before) and not fed_int8(model):
            raise ConfigError("static finds no weights that are fed int8; put it behind a transform that rounds with activations: int8")
        if isinstance(step.settings, Qat) and not any(isinstance(each.settings, Rounding) for each in before):
            raise ConfigError("qat learns from the original what rounding took, so it stands behind a transform that rounds, as gptq")
        if step.needs_text and any(isinstance(each.settings, Share) for each in before):
            raise ConfigError(
                f"{step.transform.name} looks at activations block by block, and share has blocks be one; put it before, or round with rtn"
            )
        pruned = [each.transform.name for each in before if each.transform.stage is Stage.PRUNES]
        if pruned and isinstance(step.settings, Uniform):
            step.settings.form.as_sparse()
        if pruned and isinstance(step.settings, Mixed | BlockQat):
            raise ConfigError(f"{step.transform.name} stands after {pruned[0]}, whose zeros it would fill; round by rtn or gptq")
        for earlier in before:
            if isinstance(step.settings, Rounding) and isinstance(earlier.settings, Rounding):
                _refuse_twice(model, earlier, step)
    stages = {step.transform.stage for step in recipe}
    if stages & {Stage.SHAPES, Stage.PRUNES, Stage.ROUNDS} or stages == {Stage.MARKS}:
        return
    raise ConfigError(f"no transform of {', '.join(step.transform.name for step in recipe)} makes anything smaller; add rtn or gptq")


def _refuse_order(before: Sequence[Step], step: Step) -> None:
    name, stage = step.transform.name, step.transform.stage
    if stage is Stage.MARKS:
        return
    for earlier in before:
        other, what = earlier.transform.name, earlier.transform.stage
        if isinstance(earlier.settings, Cache) and stage is Stage.SHAPES:
            raise ConfigError(f"{name} stands after {other}, whose scales are for what it changes; put it before")
        if what is Stage.ROUNDS and stage is not Stage.ROUNDS:
            raise ConfigError(f"{name} stands after {other}, which rounds: it would change codes; put it before")
        if what is Stage.PRUNES and stage in {Stage.SHAPES, Stage.SCALES}:
            raise ConfigError(f"{name} stands after {other}, whose zeros it would fill or move; put it before")
        if what is Stage.SCALES and stage is Stage.SHAPES or isinstance(step.settings, Rotate) and what is Stage.SCALES:
            raise ConfigError(f"{name} stands after {other}, whose scales it would take back; put it before")


def _fed(steps: Sequence[Step]) -> set[str]:
    """What the weights that these round are multiplied with."""
    return {step.settings.activations for step in steps if isinstance(step.settings, Rounding)}


def _refuse_twice(model: Model, earlier: Step, later: Step) -> None:
    from hasten.compress.sites import Layers, sites_of
    from hasten.program import lower

    program = lower(model.spec)
    first, second = (
        {site.weight for site in sites_of(program, Layers(step.settings.layers, step.settings.skip))}
        | forms_of_ends(model.spec, step.settings.embedding, step.settings.head).keys()
        for step in (earlier, later)
    )
    if both := sorted(first & second):
        raise ConfigError(f"{both[0]} would be rounded by {earlier.transform.name} and by {later.transform.name}; skip it in one of them")


def carry_out(model: Model, recipe: Sequence[Step], text: Text | None, run: Run) -> Model:
    """``model`` through every step in order, each in a folder of its own below ``run.work``, other steps in other folders. Raises
    ConfigError as check_recipe does, and where a step needs text and there is none."""
    check_recipe(model, recipe)
    if text is None and (needing := [step.transform.name for step in recipe if step.needs_text]):
        raise ConfigError(f"{needing[0]} looks at activations, so it needs text to calibrate on")
    original, digest = model, hashlib.sha256(f"{model.name} {text and text.sha256}".encode())
    for number, step in enumerate(recipe):
        digest.update(step.transform.name.encode() + msgspec.json.encode(step.settings))
        part = run.part(f"{number}-{step.transform.name}-{digest.hexdigest()[:8]}")
        if number:
            step.transform.check(model, step.settings)  # again: an earlier step has changed it
        if isinstance(step.transform, Training):
            model = step.transform.apply(model, step.settings, original, part)
        else:
            model = step.transform.apply(model, step.settings, text if step.needs_text else None, part)
    return settled(model, original)


def settled(model: Model, original: Model) -> Model:
    """What was scaled and not rounded, in the dtype it came in."""
    from hasten.formats.quantized import QuantizedWeight
    from hasten.formats.weights import Weight, Weights

    made: dict[str, Weight] = {}
    for name, weight in model.weights.items():
        dtype = original.weights[name if name in original.weights else "embedding.weight"].dtype  # of a head that was tied
        plain = isinstance(weight, QuantizedWeight) or weight.dtype == dtype
        made[name] = weight if plain else Weight(weight.shape, dtype, _Cast(weight, dtype))
    return dataclasses.replace(model, weights=Weights(made))


@dataclasses.dataclass(frozen=True, slots=True)
class _Cast:
    weight: Any
    dtype: Any

    def __call__(self) -> Any:
        return self.weight.load().astype(self.dtype)
