"""What tests of training share."""

import pytest

from hasten.train import objectives


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch):
    """Losses come in several pieces, though vocabularies are small here."""
    monkeypatch.setattr(objectives, "PIECE", 500)
