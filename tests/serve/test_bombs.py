"""What is made to burst the server, on every route, and a share of the fields."""

import pytest

from tests.serve.server import serving
from tests.soak import bombs

pytestmark = pytest.mark.timed


def test_bombs_are_refused_and_forgotten():
    with serving(*bombs.ARGUMENTS) as server:
        found = bombs.run(server, 0.04, 0, 0.05)
        assert server.stop() == 0
    print(bombs.told(found))
    assert found["bombs"] > 150
