"""llama.cpp through llama-cpp-python's plain bindings, which, unlike its class, can decode many sequences together.

The GGUF file is written from the checkpoint's bf16 weights; the other formats are made from it by llama.cpp's own quantizer."""

import ctypes
import json
from pathlib import Path

import numpy as np
import worker

NAME = "llama_cpp"
FORMATS = ("bf16", "q8_0", "q4_0", "q4_k_m")
INSTALL = (("install", "llama-cpp-python>=0.3.16", "gguf", "safetensors", "ml_dtypes"),)

BATCH = 512  # tokens of one call


def write_gguf(checkpoint: Path, path: Path) -> None:
    """The checkpoint (Llama layout) as GGUF: matrices in bf16, norms in float32, no vocabulary."""
    import gguf
    import ml_dtypes
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text())
    if config["model_type"] != "llama":
        raise SystemExit(f"only Llama shapes are written as GGUF here, not {config['model_type']}")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim") or width // heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    tops = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                array = tensors.get_tensor(name)
                if name in tops:
                    target = tops[name]
                else:
                    _, _, layer, rest = name.split(".", 3)
                    target = f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"
                if array.ndim == 1:
                    writer.add_tensor(target, array.astype(np.float32))
                    continue
                if ".attn_q." in target or ".attn_k." in target:  # llama.cpp rotates neighbours, Hugging Face halves
                    count = heads if ".attn_q." in target else kv_heads
                    array = array.reshape(count, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(array.shape)
                bits = np.ascontiguousarray(array.astype(ml_dtypes.bfloat16)).view(np.uint8)
                writer.add_tensor(target, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(checkpoint: Path, work: Path, form: str, threads: int, context: int, batch: int) -> tuple[str, worker.Generate]:
    import llama_cpp

    vocab_size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    plain, path = work / "bf16.gguf", work / f"{form}.gguf"
    llama_cpp.llama_backend_init()
    if not plain.is_file():
        write_gguf(checkpoint, work / "writing.gguf")
        (work / "writing.gguf").rename(plain)
    if not path.is_file():
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.nthread = threads
        settings.ftype = {
            "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
            "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
        }[form]  # fmt: skip
        half = work / "quantizing.gguf"
        if llama_cpp.llama_model_quantize(str(plain).encode(), str(half).encode(), ctypes.byref(settings)):
            raise SystemExit(f"llama.cpp could not quantize {plain} to {form}")
        half.rename(path)
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp could not load {path}")
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = context * batch
    settings.n_batch = settings.n_ubatch = BATCH
    settings.n_seq_max = batch
    settings.n_threads = settings.n_threads_batch = threads
    player = llama_cpp.llama_init_from_model(model, settings)
    if not player:
        raise SystemExit(f"llama.cpp has no room for {batch} sequences of {context} tokens")
    tokens = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def play(rows: list[tuple[int, int, int, bool]]) -> None:
        """Rows of (token, position, sequence, are its logits wanted)."""
        tokens.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            tokens.token[index], tokens.pos[index], tokens.logits[index] = token, position, wanted
            tokens.n_seq_id[index], tokens.seq_id[index][0] = 1, sequence
        if code := llama_cpp.llama_decode(player, tokens):
            raise RuntimeError(f"llama_decode returned {code}")

    def likeliest(rows: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """By sequence."""
        return {
            row[2]: int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(player, index), (vocab_size,)).argmax())
            for index, row in enumerate(rows)
            if row[3]
        }

    def generate(prompts: list[list[int]], new: int) -> list[int]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(player), True)
        rows = [(token, at, s, at == len(ids) - 1) for s, ids in enumerate(prompts) for at, token in enumerate(ids)]
        last = {}
        for begin in range(0, len(rows), BATCH):
            piece = rows[begin : begin + BATCH]
            play(piece)
            last.update(likeliest(piece))
        first = [last[s] for s in range(len(prompts))]
        for step in range(new - 1):
            piece = [(last[s], len(ids) + step, s, True) for s, ids in enumerate(prompts)]
            play(piece)
            last = likeliest(piece)
        return first

    return llama_cpp.__version__, generate


if __name__ == "__main__":
    worker.main(FORMATS, load)
