"""The family's config of a model whose sizes have changed: keys edited until the family reads the new Spec from it."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from hasten.base.errors import UserError
from hasten.families import find_family
from hasten.model import Source
from hasten.spec import Spec

KEYS: Mapping[str, tuple[str, ...]] = {
    "width": ("hidden_size", "n_embd", "d_model"),
    "hidden": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "expert_hidden": ("moe_intermediate_size", "intermediate_size"),
    "shared_hidden": ("shared_expert_intermediate_size",),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "inner": ("intermediate_size",),
    "dt_rank": ("time_step_rank",),
    "layer_types": ("layer_types",),
}  # fmt: skip
"""What families' configs call a size."""


def described(source: Source | None, spec: Spec, changes: Mapping[str, Any]) -> Source | None:
    """``source`` with a config from which its family reads ``spec``, where ``changes`` (names of KEYS → their new values) can say it; else
    as it is, so that the model is written in hasten's own layout."""
    if source is None:
        return None
    for edits in _ways(source.config, changes):
        config = {**source.config, **edits}
        try:
            if find_family(config.get("model_type")).spec(config) == spec:
                return Source(source.family, config)
        except UserError:
            continue
    return source


def _ways(config: Mapping[str, Any], changes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every way to say all of ``changes``: each under a key that is there, or not at all, where it follows from the others, or under a key
    that is not there yet."""
    options = []
    for name, value in changes.items():
        there, new = ([{key: value} for key in KEYS[name] if (key in config) == known] for known in (True, False))
        options.append([*there, {}, *new])
    for chosen in itertools.product(*options):
        yield {key: value for each in chosen for key, value in each.items()}
