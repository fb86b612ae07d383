"""Family: how one kind of checkpoint is read. A reader of its config, an invertible map of its tensor names, tiny examples for the tests.

A family is one file. Third parties add theirs as an entry point in the group ``hasten.families``, named after its `model_type`, whose
value is the Family; the generic family test then covers it through its ``examples``.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from hasten.base.errors import ConfigError
from hasten.families.config import ConfigReader
from hasten.formats.tensor_map import TensorMap
from hasten.spec import MixtureOfExperts, Spec

Config = Mapping[str, Any]

EXPERT_LIMIT = 1 << 16
"""Most experts over all layers of a model, since each may have a tensor of its own; twice what any published model has."""


@dataclasses.dataclass(frozen=True)
class Family:
    """``read`` turns a config into a Spec; ``tensors`` maps the checkpoint's names to canonical ones for that Spec.

    ``base_prefix`` begins the names of a full model's tensors, and is missing from checkpoints of the bare decoder. ``ignored`` are
    patterns (full match) of tensors that carry no weight; ``tied_head`` is the head's tensor, which some checkpoints repeat although
    it is the embedding. ``examples`` are small configs, at least two, with the family's oddities
    switched on, complete enough to build the model elsewhere."""

    name: str
    model_types: tuple[str, ...]
    read: Callable[[ConfigReader], Spec]
    tensors: Callable[[Spec, Config], TensorMap]
    examples: tuple[Config, ...]
    base_prefix: str = ""
    ignored: tuple[str, ...] = ()
    tied_head: str = "lm_head.weight"

    def spec(self, config: Config) -> Spec:
        """The checked Spec of ``config``. Raises ConfigError or UnsupportedError naming the key."""
        reader = ConfigReader(config)
        reader.must_be("is_causal", True)
        reader.must_be("is_encoder_decoder", False)
        reader.must_be("add_cross_attention", False)
        try:
            spec = self.read(reader)
        except ArithmeticError as error:
            raise ConfigError(f"config.json: a number is too large or too small to compute with ({error})") from None
        reader.finish()
        experts = sum(block.feed_forward.experts for block in spec.blocks if isinstance(block.feed_forward, MixtureOfExperts))
        if experts > EXPERT_LIMIT:
            raise ConfigError(f"config.json: {experts} experts over all layers are too many; at most {EXPERT_LIMIT} are read")
        return spec.checked()
