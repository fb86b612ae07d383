"""What training buys back: a recipe of the tables applied to the bundled model, and how good, small and fast the result is.

    python -m benchmarks.smaller sparsegpt-50-healed [--minutes 4 | --steps 100]

One JSON object. Losses and top-1 accuracy are of the whole held-out set; ``retained`` is top-1 over the original's, ``bytes`` and
``cache_bytes`` (of a sequence as long as the context) are shares of the original's, ``decode`` is tokens a second at batch 1 over the
original's, in turn, with the interval that it lies in. A recipe that was interrupted goes on where it was, and one that is done is not made
again until what runs changes."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import msgspec

from benchmarks.ledger import ROOT, Ledger, source_digest

MODEL = "code-8m"
PRUNERS = ("magnitude", "wanda", "sparsegpt")
CUT = "neurons-69"
"""What students are before they learn: 240 of 768 feed-forward neurons, which leaves less than half of what blocks have."""


MINUTES = {"minutes": 10.0}


def recipes(budget):
    """By name. ``budget`` is how long each may heal: minutes, or steps."""
    heal = {"heal": budget}
    made = {f"{method}-{share}": [{method: {"sparsity": f"{share}%"}}] for method in PRUNERS for share in (50, 70, 90)}
    made |= {f"wanda-matrix-{share}": [{"wanda": {"sparsity": f"{share}%", "among": "matrix"}}] for share in (50, 70, 90)}
    made |= {f"{method}-2of4": [{method: {"sparsity": "2:4"}}] for method in PRUNERS}
    made |= {f"{name}-healed": [*made[name], heal] for name in ("sparsegpt-50", "sparsegpt-2of4")}
    cuts = {
        "neurons": ("cut_neurons", {}), "heads": ("cut_heads", {}), "kv-heads": ("cut_heads", {"kind": "kv"}), "width": ("cut_width", {}),
        "layers": ("cut_layers", {}),
    }  # fmt: skip
    for name, (transform, settings) in cuts.items():
        made[f"{name}-25"] = [{transform: {"share": 0.25, **settings}}]
        made[f"{name}-25-healed"] = [*made[f"{name}-25"], heal]
    made[CUT] = [{"cut_neurons": {"share": 0.6875}}]
    for bits in ("int4-g64", "int3-g64"):
        made[f"rtn-{bits}"] = [{"rtn": {"weights": bits}}]
        made[f"gptq-{bits}"] = [{"gptq": {"weights": bits, "clip": "outputs"}}]
        made[f"qat-{bits}"] = [*made[f"gptq-{bits}"], {"qat": {**budget, "labels": 0.75}}]
    made["shared-pairs"] = ["share"]
    made["shared-pairs-healed"] = ["share", heal]
    made["codebook-16"] = [{"codebook": {"weights": "lut4-g64"}}]
    made["codebook-16-nearest"] = [{"codebook": {"weights": "lut4-g64", "fit": "weights", "feedback": False}}]
    made["rank-30"] = [{"rank": {"share": 0.3}}]
    made["rank-30-healed"] = [*made["rank-30"], heal]
    made["one-kv-head"] = [{"kv_heads": {"count": 1}}]
    made["one-kv-head-healed"] = [*made["one-kv-head"], heal]
    made["latent"] = [{"latent": {"rank": 96}}]
    made["latent-healed"] = [*made["latent"], heal]
    made["linear"] = [{"linear_attention": {}}]
    made["linear-healed"] = [*made["linear"], heal]
    return made


STUDENT = "--tokens 2048 --rate 1e-3 --decay 0.8 --weight-decay 0"
BOTH = "--soft 0.25 --labels 0.75"
STUDENTS = {
    "student": f"{BOTH} --teacher-weights int8", "student-labels": "--soft 0 --labels 1", "student-features": f"{BOTH} --hidden 1",
    "student-online": "--soft 0.5 --labels 0.5 --online", "student-mutual": "--soft 0.5 --labels 1 --mutual",
}  # fmt: skip
"""What `hasten distill` is given, beside STUDENT."""


def apply(name, out, budget):
    """Make the result of a recipe in ``out``."""
    from hasten.checkpoint import load
    from hasten.compress.evidence import Gate
    from hasten.compress.make import Calibration, make
    from hasten.compress.recipe import recipe_of
    from hasten.compress.walk import Run

    run = Run.at(out.with_name(f".{out.name}.work"))
    make(load(MODEL), recipe_of(recipes(budget)[name]), out, calibration=Calibration(), gate=Gate(None, None, 2000), run=run)


def distill(name, out, budget):
    """Make a student in ``out``."""
    cut = out.with_name(f"{CUT}-{source_digest()}")
    if not (cut / "config.json").is_file():
        apply(CUT, cut, budget)
    (length,) = (f"--{unit} {amount}" for unit, amount in budget.items())
    words = f"distill {MODEL} {out} --student {cut} {STUDENT} {STUDENTS[name]} {length} --eval-tokens 2000 --json".split()
    subprocess.run([sys.executable, "-m", "hasten.cli", *words], check=True, stdout=subprocess.DEVNULL)


def quality(model):
    """Loss and top-1 accuracy over the whole held-out set, and its tokens."""
    from hasten.engine.backends import choose_backend
    from hasten.measure import Evaluation, cut_windows, held_out, score_windows

    windows = cut_windows(model, held_out(), 512)
    found = Evaluation.of([*score_windows(model, windows, window=512, backend=choose_backend(model)[0])])
    return {"loss": found.loss, "top1": found.top1, "tokens": found.tokens}


def figures(original, made, first):
    """What is told of a result beside its original, whose quality is ``first``."""
    from hasten.measure.speed import SpeedTest, measure_speeds
    from hasten.program import lower
    from hasten.program.pages import sequence_bytes

    def size(model, part=""):
        return sum(weight.nbytes for name, weight in model.weights.items() if part in name)

    def cache(model):
        return sequence_bytes(lower(model.spec, cache="bfloat16"), 16)

    second = quality(made)
    shares = {what or "all": size(made, what) / size(original, what) for what in ("", "blocks.", ".mixer.", ".feed_forward.")}
    _, speeds = measure_speeds(original, [made], SpeedTest((1,), prompt=64, new=32))
    return {
        **second, "base_loss": first["loss"], "increase": second["loss"] / first["loss"] - 1, "base_top1": first["top1"],
        "retained": second["top1"] / first["top1"],
        "bytes": {what.strip("."): share for what, share in shares.items()}, "cache_bytes": cache(made) / cache(original),
        "decode": msgspec.to_builtins(speeds.rows[0].decode),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smaller", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted({*recipes(MINUTES), *STUDENTS}))
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=MINUTES["minutes"], help="that a recipe may train for")
    length.add_argument("--steps", type=int, help="that it may train for")
    parser.add_argument("--work", type=Path, default=ROOT / ".evidence" / "smaller", help="where results lie")
    given = parser.parse_args()
    from hasten.checkpoint import load

    budget = {"minutes": given.minutes} if given.steps is None else {"steps": given.steps}
    long = f"{given.minutes:g}" if given.steps is None else f"{given.steps}-steps"
    out = given.work / f"{given.name}-{long}-{source_digest()}"
    if not (out / "config.json").is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        print(f"{given.name} → {out}", file=sys.stderr, flush=True)
        (distill if given.name in STUDENTS else apply)(given.name, out, budget)
    made, original, ledger = load(str(out)), load(MODEL), Ledger(given.work / "originals.jsonl")
    first = ledger.get(MODEL, source_digest())
    if first is None:
        first = quality(original)
        ledger.note(MODEL, source_digest(), value=first)
    seconds = sum(entry.evidence.get("seconds", 0.0) for entry in made.provenance)
    history = [{entry.transform: msgspec.to_builtins(entry.settings)} for entry in made.provenance if entry.transform != "measured"]
    print(json.dumps({"name": given.name, **figures(original, made, first), "seconds_of_training": seconds, "recipe": history}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
