"""The bundled model's card, against `hasten eval`."""

import json
import os
import subprocess
import sys

from hasten.checkpoint import bundled_directory


def test_eval_gives_the_cards_figures():
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    result = subprocess.run(
        [sys.executable, "-m", "hasten.cli", "eval", "code-8m", "--json"], capture_output=True, text=True, env=environment, timeout=600
    )
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    card = json.loads((bundled_directory("code-8m") / "card.json").read_text())
    if facts["sha256"] != card["held_out_sha256"]:  # another Python's standard library: the command must say that it does not compare
        assert facts["card_text"] == "differs"
        assert "card_loss" not in facts
        return
    assert facts["documents"] == card["held_out_files"]
    assert facts["tokens"] == card["held_out_tokens"]
    assert abs(facts["loss"] - card["held_out_loss"]) <= 0.01
    assert abs(facts["top1"] - card["held_out_top1"]) <= 0.005
