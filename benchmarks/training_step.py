"""A training step of code-8m (forward + backward, bf16, 16 × 512 tokens): the Program on `reference` against a hand-written torch module.

The two are timed in turn, A B A B …, in one process; the ratio is taken pair by pair. Prints one JSON object."""

import argparse
import json
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hasten
from hasten.backends.reference import play, weights_of
from hasten.program import Batch, Precision, lower


class HandWritten(nn.Module):
    """The same model as one would write it by hand: bf16 weights, bf16 activations, fused attention."""

    def __init__(self, vocab: int, width: int, heads: int, kv_heads: int, hidden: int, layers: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(HandWrittenBlock(width, heads, kv_heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        dim = width // heads
        angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        self.register_buffer("cos", angles.cos().repeat(1, 2).bfloat16())
        self.register_buffer("sin", angles.sin().repeat(1, 2).bfloat16())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.linear(self.norm(x), self.embedding.weight)


class HandWrittenBlock(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.q = nn.Linear(width, heads * self.dim, bias=False)
        self.k = nn.Linear(width, kv_heads * self.dim, bias=False)
        self.v = nn.Linear(width, kv_heads * self.dim, bias=False)
        self.o = nn.Linear(heads * self.dim, width, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.norm1(x)
        q = rotate(self.q(y).view(b, t, self.heads, self.dim).transpose(1, 2), cos, sin)
        k = rotate(self.k(y).view(b, t, self.kv_heads, self.dim).transpose(1, 2), cos, sin)
        v = self.v(y).view(b, t, self.kv_heads, self.dim).transpose(1, 2)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).reshape(b, t, -1))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--residual", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    model = hasten.load("code-8m")
    tokens = np.random.default_rng(0).integers(0, model.spec.vocab, (arguments.batch, arguments.length + 1))
    inputs, targets = torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy()).flatten()

    program = lower(model.spec, context=arguments.length, precision=Precision(arguments.residual, "bfloat16", "float32"))
    weights = {name: w.clone().requires_grad_() for name, w in weights_of(program, model.weights).items()}
    batch = Batch.of(tokens[:, :-1].tolist())
    mixer, feed_forward = model.spec.blocks[0].mixer, model.spec.blocks[0].feed_forward
    by_hand = HandWritten(
        model.spec.vocab, model.spec.width, mixer.heads, mixer.kv_heads, feed_forward.hidden, len(model.spec.blocks), arguments.length
    ).bfloat16()  # fmt: skip
    copy_weights(by_hand, weights)

    def with_program() -> float:
        for weight in weights.values():
            weight.grad = None
        loss = F.cross_entropy(play(program, weights, batch)[0]["logits"], targets)
        loss.backward()
        return loss.item()

    def with_module() -> float:
        by_hand.zero_grad(set_to_none=True)
        loss = F.cross_entropy(by_hand(inputs).flatten(0, 1).float(), targets)
        loss.backward()
        return loss.item()

    losses = with_program(), with_module()  # also the warm-up
    if abs(losses[0] - losses[1]) > 0.05:
        raise SystemExit(f"the two models disagree: losses {losses}")
    times: list[tuple[float, float]] = []
    for _ in range(arguments.runs):
        marks = [time.perf_counter()]
        for step in (with_program, with_module):
            step()
            marks.append(time.perf_counter())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    print(
        json.dumps(
            {
                "program_s": statistics.median(a for a, _ in times), "module_s": statistics.median(b for _, b in times),
                "speed_ratio": statistics.median(b / a for a, b in times), "worst": min(b / a for a, b in times),
                "best": max(b / a for a, b in times), "runs": arguments.runs, "losses": losses, "threads": torch.get_num_threads(),
            },
            indent=2,
        )
    )  # fmt: skip


def copy_weights(module: HandWritten, weights: dict[str, Tensor]) -> None:
    """The program's numbers into the module."""
    names = {"norm1": "mixer_norm", "norm2": "feed_forward_norm"}
    with torch.no_grad():
        module.embedding.weight.copy_(weights["embedding.weight"])
        module.norm.weight.copy_(weights["norm.weight"])
        for index, block in enumerate(module.blocks):
            for name in ("norm1", "norm2", "q", "k", "v", "o", "gate", "up", "down"):
                part = names.get(name) or f"{'mixer' if name in 'qkvo' else 'feed_forward'}.{name}"
                getattr(block, name).weight.copy_(weights[f"blocks.{index}.{part}.weight"])


if __name__ == "__main__":
    main()
