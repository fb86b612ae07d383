"""A small part of the soak of malformed requests, and that it can fail."""

import os
import random

import httpx
import pytest

from tests.soak import requests
from tests.soak.determinism import Difference
from tests.soak.requests import Asked


@pytest.fixture(scope="module")
def served():
    kept = os.environ["HASTEN_CACHE"]
    running = requests.Served()
    yield running
    running.end()
    os.environ["HASTEN_CACHE"] = kept  # which the soak sets


@pytest.mark.row("one fault for all", "malformed requests")
@pytest.mark.row("leaked pages", "after malformed requests")
def test_some_hundred_malformed_requests(served):
    found = requests.run_chunk(served, 0, 240, 0)
    assert found["requests"] > 200
    assert {path for path, _ in requests.VALID} | {"/health", "/metrics", "/v1/models"} <= {*found["paths"]}
    assert not any(int(status) >= 500 and int(status) not in {503, 504} for status in found["statuses"])


def test_what_must_not_be_answered_is_found(served, monkeypatch):
    asked, stream = Asked("POST", "/v1/completions", {}, b"{}"), {"content-type": "text/event-stream"}
    for answer, why in (
        (httpx.Response(500, json={"error": {"message": "x"}}), "status 500"), (httpx.Response(504, json={}), "status 504"),
        (httpx.Response(503, json={}), "Retry-After"), (httpx.Response(400, text="x"), "does not say"),
        (httpx.Response(200, headers=stream, text='data: {"error": {"type":"server_error"}}\n\n'), "ends with"),
    ):  # fmt: skip
        assert why in requests.wrong(asked, answer)
    for answer in (
        httpx.Response(200, text="x"),
        httpx.Response(503, headers={"retry-after": "1"}),
        httpx.Response(404, json={"error": {"message": "x"}}),
    ):
        assert not requests.wrong(asked, answer)
    monkeypatch.setattr(served, "answer", "another")
    with pytest.raises(Difference, match="before"):
        requests.run_chunk(served, 1, 20, 0)


def test_bodies_are_changed_in_many_ways():
    changed = [requests.mutated(random.Random(seed)) for seed in range(300)]
    assert {one.path for one in changed} == {path for path, _ in requests.VALID}
    assert len({one.body for one in changed}) > 280
