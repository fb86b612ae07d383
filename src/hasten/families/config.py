"""Typed, complete reading of a foreign ``config.json``: every key is used, declared neutral, or refused by name."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from hasten.base.errors import ConfigError, UnsupportedError, one_line
from hasten.spec import BLOCK_LIMIT, SIZE_LIMIT

_T = TypeVar("_T")

PARTS_LIMIT = BLOCK_LIMIT
"""Most layers, or experts of a layer, that a config may ask for."""

# Keys that change no logit: training, generation defaults, bookkeeping. Everything else must be read by the family.
NEUTRAL_KEYS = frozenset([
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout",
    "attn_implementation", "attn_pdrop", "auto_map", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "cache_implementation", "chunk_size_feed_forward", "classifier_dropout", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping", "embd_pdrop", "embedding_dropout",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "head_pruning", "hidden_dropout", "id2label", "init_std", "initializer_range",
    "is_decoder", "keys_to_ignore_at_inference", "label2id", "length_penalty", "max_length", "max_new_tokens", "min_length",
    "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_router_logits", "output_scores", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
    "pruned_heads", "remove_invalid_values", "repetition_penalty", "resid_pdrop", "return_dict", "return_dict_in_generate",
    "router_aux_loss_coef", "router_jitter_noise", "sep_token_id", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "unk_token_id", "use_bfloat16", "use_cache", "use_flash_attn", "use_return_dict",
])  # fmt: skip


class ConfigReader:
    """Reads one JSON object key by key. Every accessor checks type and range and remembers the key; ``finish`` refuses what is left."""

    def __init__(self, data: Mapping[str, Any], where: str = "config.json") -> None:
        self._data, self._where, self._seen = data, where, set[str]()

    def has(self, key: str) -> bool:
        """Whether ``key`` is there with a value other than null. Does not count as reading it."""
        return self._data.get(key) is not None

    def absent(self, key: str) -> bool:
        """Whether ``key`` is not there at all; a null is there, and means 'none' where the default is something."""
        return key not in self._data

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        return self._whole(key, default, 1, SIZE_LIMIT)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 0."""
        return self._whole(key, default, 0)

    def parts(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A number of things that are spelled out one by one: layers, experts, ALiBi heads. At least ``least``, at most PARTS_LIMIT."""
        return self._whole(key, default, least, PARTS_LIMIT)

    def signed(self, key: str, default: int | None = None) -> int:
        """A whole number of either sign."""
        return self._whole(key, default, -(1 << 31))

    def optional_size(self, key: str) -> int | None:
        """A whole number of at least 1, or None where the key is absent or null."""
        return self._whole(key, None, 1, SIZE_LIMIT) if self._peek(key) is not None else None

    def size_under(self, *keys: str) -> int:
        """A whole number of at least 1 that checkpoints have called by several names; where several are given they must agree."""
        return self._under(keys, self.size)

    def parts_under(self, *keys: str) -> int:
        """The same for a number of ``parts``."""
        return self._under(keys, self.parts)

    def size_or_auto(self, key: str, auto: int) -> int:
        """A whole number of at least 1; ``auto`` where the key is absent, null or "auto"."""
        return auto if self._peek(key) == "auto" else self.size(key, auto)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._take(key, default)
        if not _is_finite(value):
            raise self.wrong(key, value, "a finite number is needed")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.number(key, default)
        if value <= 0:
            raise self.wrong(key, value, "a number above 0 is needed")
        return value

    def optional_positive(self, key: str) -> float | None:
        """A finite number above 0, or None where the key is absent or null."""
        return self.positive(key) if self._peek(key) is not None else None

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false is needed")
        return value

    def choice(self, key: str, choices: Mapping[str, _T], default: str | None = None) -> _T:
        """One of the named choices, translated."""
        value = self._take(key, default)
        if not isinstance(value, str) or value not in choices:
            raise UnsupportedError(
                f"{self._where}: {key!r} is {one_line(value)}, which is not supported; supported are {', '.join(choices)}"
            )
        return choices[value]

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        value = self._take(key, None)
        if not isinstance(value, list) or not all(_is_finite(v) for v in value):
            raise self.wrong(key, value, "a list of finite numbers is needed")
        return tuple(float(v) for v in value)

    def pair(self, key: str) -> tuple[float, float | None] | None:
        """[low, high], or None where the key is absent or null; an infinite high (also as {"__float__": "Infinity"}) is None."""
        value = self._peek(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2:
            raise self.wrong(key, value, "two numbers are needed")
        low, high = (math.inf if v == {"__float__": "Infinity"} else v for v in value)
        if not _is_finite(low) or not (_is_finite(high) or high == math.inf) or not 0 <= low <= high:
            raise self.wrong(key, value, "two numbers are needed, low ≤ high")
        return float(low), None if math.isinf(high) else float(high)

    def names(self, key: str) -> tuple[str, ...] | None:
        """A list of strings, or None where the key is absent or null."""
        value = self._peek(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.wrong(key, value, "a list of strings is needed")
        return tuple(value)

    def whole_numbers(self, key: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """A list of whole numbers, ``default`` where absent or null."""
        value = self._peek(key)
        if value is None:
            return default
        if not isinstance(value, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise self.wrong(key, value, "a list of whole numbers is needed")
        return tuple(value)

    def section(self, key: str) -> "ConfigReader | None":
        """A reader of the object under ``key``, or None where it is absent, null or empty. Call its ``finish`` too."""
        value = self._peek(key)
        if value in (None, {}):
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, value, "an object is needed")
        return ConfigReader(value, f"{self._where}: {key}")

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuse every value of ``key`` but these; absent and null pass."""
        value = self._peek(key)
        if value is not None and not any(value == good and isinstance(value, bool) == isinstance(good, bool) for good in allowed):
            accepted = ", ".join(one_line(good) for good in allowed) or "null"
            raise UnsupportedError(f"{self._where}: {key!r} is {one_line(value)}, which is not supported; supported: {accepted}")

    def neutral(self, *keys: str) -> None:
        """Declare that these keys change no logit."""
        self._seen.update(keys)

    def finish(self) -> None:
        """Refuse keys nobody read. Null and empty values say nothing, and pass; false and 0 may say something."""
        for key, value in self._data.items():
            if key not in self._seen and key not in NEUTRAL_KEYS and value is not None and value not in ([], {}, ""):
                raise UnsupportedError(
                    f"{self._where}: {key!r} = {one_line(value)} is not understood by this family; remove the key if it changes no logit"
                )

    def wrong(self, key: str, value: object, needed: str) -> ConfigError:
        """The error for a bad value."""
        return ConfigError(f"{self._where}: {key!r} is {one_line(value)}; {needed}")

    def _peek(self, key: str) -> Any:
        self._seen.add(key)
        return self._data.get(key)

    def _take(self, key: str, default: Any) -> Any:
        value = self._peek(key)
        if value is not None:
            return value
        if default is None:
            raise ConfigError(f"{self._where}: {key!r} is missing; this family needs it")
        return default

    def _under(self, keys: tuple[str, ...], read: Callable[[str], int]) -> int:
        given = [key for key in keys if self._peek(key) is not None]
        value = read(given[0] if given else keys[0])
        for key in given[1:]:
            if read(key) != value:
                raise self.wrong(key, self._data[key], f"{given[0]!r} is another name of it and says {value}; the two must agree")
        return value

    def _whole(self, key: str, default: int | None, least: int, most: int = (1 << 31) - 1) -> int:
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(key, value, f"a whole number from {least} to {most} is needed")
        return value


def _is_finite(value: object) -> bool:
    """Whether ``value`` is a number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_layer_types(reader: ConfigReader, kinds: tuple[str, ...] | None, layers: int, known: Iterable[str]) -> None:
    """Refuse a ``layer_types`` list of a wrong length or with unknown entries."""
    if kinds is None:
        return
    if len(kinds) != layers:
        raise reader.wrong("layer_types", list(kinds), f"{layers} entries are needed, one a layer")
    unknown = set(kinds) - set(known)
    if unknown:
        raise UnsupportedError(
            f"config.json: 'layer_types' has {sorted(unknown)[0]!r}, which is not supported; supported are {', '.join(known)}"
        )
