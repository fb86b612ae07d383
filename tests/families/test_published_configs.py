"""Configs as they were published, with older key names and without defaults: same logits as transformers reading the same file."""

import json

import numpy as np
import pytest

from hasten.base.errors import UserError
from hasten.checkpoint import load
from hasten.families import find_family
from tests.families.oracles import make_checkpoint, read_checkpoint

_LLAMA = {"model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}  # fmt: skip
_GEMMA3 = {"model_type": "gemma3_text", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 4,
           "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
           "sliding_window": 7}  # fmt: skip

CONFIGS = {
    "llama-3.1": {**_LLAMA, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 16}, "torch_dtype": "float32", "pretraining_tp": 1},
    "llama-yarn-type": {**_LLAMA, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "llama-linear": {**_LLAMA, "rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama-no-kv-heads": {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    "gemma3-local-base": {**_GEMMA3, "rope_theta": 1000000.0, "rope_local_base_freq": 5000.0, "sliding_window_pattern": 2,
                          "query_pre_attn_scalar": 8, "hidden_activation": "gelu_pytorch_tanh"},
    "qwen2-plain": {**_LLAMA, "model_type": "qwen2", "rope_theta": 1000000.0, "sliding_window": 32, "use_sliding_window": False,
                    "max_window_layers": 1, "hidden_act": "silu"},
    "gpt-neox": {"model_type": "gpt_neox", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "rotary_pct": 0.5, "rotary_emb_base": 500, "max_position_embeddings": 64, "hidden_act": "gelu"},
    "mistral": {**_LLAMA, "model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 6},
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits(config, tmp_path):
    make_checkpoint(config, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["X"]}))
    ids = np.random.default_rng(0).integers(0, 97, 37).tolist()
    expected = read_checkpoint(tmp_path)(ids)
    assert np.abs(load(tmp_path).logits(ids) - expected).max() <= 1e-4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "yarn"}, "original_max_position_embeddings": 16, "hidden_size": "32"}, "hidden_size"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"num_key_value_heads": 3}, "3"),
        ({"surprise": 1}, "surprise"),
        ({"surprise": False}, "surprise"),
        ({"surprise": 0}, "surprise"),
        ({"is_causal": False}, "is_causal"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, "both"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"original_max_position_embeddings": 8, "rope_scaling": {"rope_type": "yarn", "factor": 2.0,
          "original_max_position_embeddings": 16}}, "original_max_position_embeddings"),
        ({"head_dim": 7}, "7"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(change, named):
    with pytest.raises(UserError, match=named) as error:
        find_family("llama").spec({**_LLAMA, **change})
    assert "\n" not in str(error.value)
