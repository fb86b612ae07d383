"""What training buys back: a recipe of the tables applied to the bundled model, and how good, small and fast the result is.

    python -m benchmarks.smaller sparsegpt-50-healed

One JSON object. Losses and top-1 accuracy are of the whole held-out set; ``retained`` is top-1 over the original's. A recipe that was
interrupted goes on where it was, and one that is done is not made again until what runs changes."""

import argparse
import json
import sys
from pathlib import Path

import msgspec

from benchmarks.ledger import ROOT, source_digest

MODEL = "code-8m"
PRUNERS = ("magnitude", "wanda", "sparsegpt")


def heal(minutes, **settings):
    return {"heal": {"minutes": minutes, **settings}}


def recipes(minutes):
    """By name. ``minutes`` are those that each may heal for."""
    made = {f"{method}-{share}": [{method: {"sparsity": f"{share}%"}}] for method in PRUNERS for share in (50, 70, 90)}
    made |= {f"{method}-2of4": [{method: {"sparsity": "2:4"}}] for method in PRUNERS}
    made |= {f"{name}-healed": [*made[name], heal(minutes)] for name in ("sparsegpt-50", "sparsegpt-2of4")}
    cuts = {"neurons": "cut_neurons", "heads": "cut_heads", "width": "cut_width", "layers": "cut_layers"}
    for name, transform in cuts.items():
        made[f"{name}-25"] = [{transform: {"share": 0.25}}]
        made[f"{name}-25-healed"] = [*made[f"{name}-25"], heal(minutes)]
    for bits in ("int4-g64", "int3-g64"):
        made[f"rtn-{bits}"] = [{"rtn": {"weights": bits}}]
        made[f"gptq-{bits}"] = [{"gptq": {"weights": bits, "clip": "outputs"}}]
        made[f"qat-{bits}"] = [*made[f"gptq-{bits}"], {"qat": {"minutes": minutes}}]
    made["shared-pairs"] = ["share"]
    made["shared-pairs-healed"] = ["share", heal(minutes)]
    made["codebook-16"] = [{"codebook": {"weights": "lut4-g64"}}]
    made["codebook-16-nearest"] = [{"codebook": {"weights": "lut4-g64", "fit": "weights", "feedback": False}}]
    made["rank-30"] = [{"rank": {"share": 0.3}}]
    made["rank-30-healed"] = [*made["rank-30"], heal(minutes)]
    made["one-kv-head"] = [{"kv_heads": {"count": 1}}]
    made["one-kv-head-healed"] = [*made["one-kv-head"], heal(minutes)]
    made["latent"] = [{"latent": {"rank": 64}}]
    made["latent-healed"] = [*made["latent"], heal(minutes)]
    return made


def figures(original, made):
    """What is told of a result beside its original, both by `hasten eval` and `hasten inspect`."""
    from hasten.engine.backends import choose_backend
    from hasten.measure import Evaluation, cut_windows, held_out, score_windows
    from hasten.program import lower

    def of(model):
        windows = cut_windows(model, held_out(), 512)
        found = Evaluation.of([*score_windows(model, windows, window=512, backend=choose_backend(model)[0])])
        blocks = sum(weight.nbytes for name, weight in model.weights.items() if name.startswith("blocks."))
        return found, blocks, model.weights.nbytes, sum(group.bytes_per_token() for group in lower(model.spec).states)

    (first, *before), (second, *after) = of(original), of(made)
    blocks, whole, cache = (new / old for new, old in zip(after, before))
    return {
        "loss": second.loss, "base_loss": first.loss, "increase": second.loss / first.loss - 1, "top1": second.top1,
        "base_top1": first.top1, "retained": second.top1 / first.top1, "tokens": second.tokens, "bytes_of_blocks": blocks,
        "bytes_of_all": whole, "cache_bytes": cache,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smaller", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(recipes(10)))
    parser.add_argument("--minutes", type=float, default=10.0, help="that a recipe may heal for")
    parser.add_argument("--work", type=Path, default=ROOT / ".evidence" / "smaller", help="where results lie")
    given = parser.parse_args()
    from hasten.checkpoint import load
    from hasten.compress.evidence import Gate
    from hasten.compress.make import Calibration, make
    from hasten.compress.recipe import recipe_of
    from hasten.compress.walk import Run

    out = given.work / f"{given.name}-{given.minutes:g}-{source_digest()}"
    original = load(MODEL)
    if not (out / "config.json").is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        print(f"{given.name} → {out}", file=sys.stderr, flush=True)
        run = Run.at(out.with_name(f".{out.name}.work"))
        make(original, recipe_of(recipes(given.minutes)[given.name]), out, calibration=Calibration(), gate=Gate(None, None, 2000), run=run)
    made = load(str(out))
    seconds = sum(entry.evidence.get("seconds", 0.0) for entry in made.provenance)
    history = [{entry.transform: msgspec.to_builtins(entry.settings)} for entry in made.provenance if entry.transform != "measured"]
    print(json.dumps({"name": given.name, **figures(original, made), "seconds_of_training": seconds, "recipe": history}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
