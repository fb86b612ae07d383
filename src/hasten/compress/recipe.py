"""Recipes: transforms in order, each with its settings, as a list in YAML.

- awq: {weights: int4-g64}
- gptq:
    weights: int4-g64
    skip: ["blocks.0.*"]
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from hasten.base.errors import ConfigError, UnsupportedError, UserError, one_line
from hasten.compress.cache import Cache, cache_transform, check_cache
from hasten.compress.data import Text
from hasten.compress.ends import forms_of_ends
from hasten.compress.mixed import Mixed, check_mixed, mixed
from hasten.compress.pruning import Magnitude, SparseGpt, Wanda, check_prune, prune
from hasten.compress.rotate import Rotate, check_rotate, rotate
from hasten.compress.rounding import Gptq, Rounding, Rtn, check_rounding, gptq_transform, rtn
from hasten.compress.scaling import Awq, SmoothQuant, awq, check_awq, check_smoothquant, smoothquant
from hasten.compress.static import Static, check_static, fed_int8, static_transform
from hasten.compress.walk import Run
from hasten.model import Model

ENTRY_POINTS = "hasten.transforms"

RECIPE_LIMIT = 1 << 20
"""Bytes of a recipe that are read."""


@dataclasses.dataclass(frozen=True, slots=True)
class Transform:
    """A transform by name: its ``settings`` type, ``apply`` (model, settings, text, run) → model, ``check`` (model, settings), which raises
    UserError for what cannot work, whether these settings look at text, and whether it changes weights, so that it cannot follow one that
    rounds."""

    name: str
    settings: type[msgspec.Struct]
    apply: Callable[[Model, Any, Any, Run], Model]
    check: Callable[[Model, Any], None]
    needs_text: Callable[[Any], bool] = lambda settings: True
    changes_weights: bool = True


BUILT_IN: Mapping[str, Transform] = {
    each.name: each
    for each in (
        Transform("rtn", Rtn, rtn, check_rounding, lambda settings: settings.clip == "outputs"),
        Transform("gptq", Gptq, gptq_transform, check_rounding),
        Transform("mixed", Mixed, mixed, check_mixed),
        Transform("magnitude", Magnitude, prune, check_prune, lambda settings: False),
        Transform("wanda", Wanda, prune, check_prune),
        Transform("sparsegpt", SparseGpt, prune, check_prune),
        Transform("awq", Awq, awq, check_awq),
        Transform("smoothquant", SmoothQuant, smoothquant, check_smoothquant),
        Transform("rotate", Rotate, rotate, check_rotate, lambda settings: False),
        Transform("static", Static, static_transform, check_static, changes_weights=False),
        Transform("cache", Cache, cache_transform, check_cache, changes_weights=False),
    )
}


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One transform of a recipe with its settings."""

    transform: Transform
    settings: Any

    @property
    def needs_text(self) -> bool:
        """Whether it looks at activations."""
        return self.transform.needs_text(self.settings)


Recipe = tuple[Step, ...]


def find_transform(name: object) -> Transform:
    """The transform of that name, built in or of the entry points ``hasten.transforms``. Raises UnsupportedError listing all."""
    if isinstance(name, str) and name in BUILT_IN:
        return BUILT_IN[name]
    entries = {entry.name: entry for entry in metadata.entry_points(group=ENTRY_POINTS)}
    if isinstance(name, str) and name in entries:
        found = entries[name].load()
        if not isinstance(found, Transform):
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
    rounded: list[Step] = []
    for place, step in enumerate(recipe):
        step.transform.check(model, step.settings)
        scaled = [its for its in recipe[:place] if isinstance(its.settings, Awq | SmoothQuant)]
        if isinstance(step.settings, Rotate) and scaled:
            raise ConfigError(f"rotate stands after {scaled[0].transform.name}, whose scales it would take back; put it before")
        fed = {each.settings.activations for each in rounded}
        if isinstance(step.settings, Static) and "int8" not in fed and not fed_int8(model):
            raise ConfigError("static finds no weights that are fed int8; put it behind a transform that rounds with activations: int8")
        if rounded and step.transform.changes_weights and not isinstance(step.settings, Rounding):
            before = rounded[-1].transform.name
            raise ConfigError(f"{step.transform.name} stands after {before}, which rounds: it would scale codes; put it before")
        if isinstance(step.settings, Rounding):
            for earlier in rounded:
                _refuse_twice(model, earlier, step)
            rounded.append(step)
    if rounded or not any(step.transform.changes_weights for step in recipe):
        return
    raise ConfigError(f"no transform of {', '.join(step.transform.name for step in recipe)} makes anything smaller; add rtn or gptq")


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
