"""One point of the soak that kills `hasten quantize`, and that it can fail."""

import pytest

from tests.soak.determinism import Difference
from tests.soak.quantize import Runs


def test_a_point_and_a_difference(tmp_path):
    runs = Runs(tmp_path, 4, 64, "--skip", "blocks.[2-7].*", "--gate-tokens", "100")
    whole = runs.whole()
    assert "model.safetensors" in whole.digests
    found = runs.cut(whole, 6, 10, 0)
    assert found["killed_s"] < whole.seconds
    (runs.out("cut-6") / "config.json").write_text("{}")
    with pytest.raises(Difference, match="config.json are others"):
        runs.require_same("cut-6", whole)
