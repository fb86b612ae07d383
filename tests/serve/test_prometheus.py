"""A real Prometheus scrapes a real server: what it then says is what clients were told, and it understands the dashboard's questions."""

import asyncio
import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.cli import ROOT
from tests.serve.scrape import scrape
from tests.serve.test_metrics import load, settled

BOARD = json.loads((ROOT / "deploy" / "grafana" / "hasten.json").read_text())
SCRAPES_S = 0.25


def found(name: str) -> str:
    """A program of Prometheus', installed or unpacked by the Makefile; the test is skipped where neither was possible."""
    beside = Path(sys.executable).parent / name
    if (path := str(beside) if beside.is_file() else shutil.which(name)) is None:
        pytest.skip(f"no {name} here: `make test` unpacks Debian's package into .venv where apt-get can download it")
    return path


class Prometheus:
    """Scrapes one server, four times a second."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=10)

    def ask(self, expression: str) -> list[dict]:
        answer = self._client.get("/api/v1/query", params={"query": expression})
        said = answer.json()
        assert said["status"] == "success", (expression, said)
        return said["data"]["result"]

    def value(self, expression: str) -> float | None:
        """The one value of an expression, None where there is none yet."""
        result = self.ask(expression)
        assert len(result) <= 1, result
        return float(result[0]["value"][1]) if result else None

    def until(self, expression: str, wanted: float) -> None:
        end = time.monotonic() + 10
        while (value := self.value(expression)) != wanted:
            assert time.monotonic() < end, (expression, value, wanted)
            time.sleep(0.1)

    def up(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self._client.get("/-/ready").status_code == 200 and self.value("up") == 1
        return False


@pytest.fixture(scope="module")
def prometheus(server, tmp_path_factory):
    program, directory = found("prometheus"), tmp_path_factory.mktemp("prometheus")
    job = {"job_name": "hasten", "static_configs": [{"targets": [server.url.removeprefix("http://")]}]}
    timing = {"scrape_interval": "250ms", "scrape_timeout": "250ms"}
    (directory / "config.yml").write_text(json.dumps({"global": timing, "scrape_configs": [job]}))  # JSON is YAML
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        program, f"--config.file={directory}/config.yml", f"--storage.tsdb.path={directory}/data", f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with open(directory / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        running, end = Prometheus(f"http://127.0.0.1:{port}"), time.monotonic() + 30
        while not running.up():
            assert process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < end, (directory / "log").read_text()
            time.sleep(0.1)
        yield running
    finally:
        process.kill()
        process.wait()


def test_values_are_right(server, prometheus):
    before = settled(server)
    bodies = [{"prompt": "import os\n" + "#" * i, "max_tokens": 3 + i, "seed": i, "n": 1 + i % 2} for i in range(20)]
    told = [usage for usage, _ in asyncio.run(load(server, bodies))]
    assert httpx.get(f"{server.url}/v1/models/nothing").status_code == 404
    wanted = {
        "hasten_prompt_tokens_total": sum(one["prompt_tokens"] for one in told),
        "hasten_generation_tokens_total": sum(one["completion_tokens"] for one in told),
        "hasten_request_generation_tokens_sum": sum(one["completion_tokens"] for one in told),
        "sum(hasten_request_success_total)": 30,
        "hasten_e2e_request_latency_seconds_count": 30,
        'hasten_time_to_first_token_seconds_bucket{le="+Inf"}': 30,
        'hasten_http_requests_total{route="/v1/completions",status="200"}': 20,
        'hasten_http_requests_total{route="/v1/models/{name:path}",status="404"}': 1,
        "hasten_engine_restarts_total": 0,
    }
    assert wanted["hasten_generation_tokens_total"] > 100
    for expression, more in wanted.items():
        name, _, labels = expression.removeprefix("sum(").rstrip(")").partition("{")
        chosen = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        prometheus.until(expression, (before.of(name, **chosen) if chosen else before[name]) + more)
    time.sleep(2 * SCRAPES_S)
    assert (
        prometheus.value("hasten_generation_tokens_total")
        == before["hasten_generation_tokens_total"] + wanted["hasten_generation_tokens_total"]
    )
    assert prometheus.value("hasten_engine_up") == 1
    assert prometheus.value("histogram_quantile(0.99, sum by (le) (hasten_e2e_request_latency_seconds_bucket))") > 0
    (series,) = prometheus.ask("hasten_generation_tokens_total")
    assert series["metric"]["model_name"] == "code-8m"
    assert series["metric"]["job"] == "hasten"


def expressions() -> list[tuple[str, str]]:
    panels = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]


def names_in(expression: str) -> set[str]:
    """Metrics that an expression is of."""
    plain = re.sub(r"\{[^}]*\}|\[[^]]*\]|\bby \([^)]*\)", "", expression)
    return {word for word in re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", plain) if "_" in word and word != "histogram_quantile"}


def test_the_dashboard_asks_for_what_there_is(server):
    samples = scrape(server.url)
    known = {name for name, _ in samples.samples} | set(samples.kinds)
    asked = {name for _, expression in expressions() for name in names_in(expression)}
    assert len(asked) > 25
    assert asked <= known, asked - known
    variables = {one["name"]: one for one in BOARD["templating"]["list"]}
    for name in ("job", "model_name"):
        assert re.fullmatch(r"label_values\((\w+), " + name + r"\)", variables[name]["query"]["query"])[1] in known
    used = set(re.findall(r"\$\{?(\w+)", " ".join(expression for _, expression in expressions())))
    assert used <= {*variables, "__rate_interval"}


def test_the_dashboard_is_one():
    assert BOARD["schemaVersion"] >= 39
    assert BOARD["title"]
    assert BOARD["uid"]
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    places = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] <= place["x"] + place["w"] <= 24
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & places, panel["title"]
        places |= cells
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"]


def test_prometheus_understands_every_expression(server, prometheus):
    asyncio.run(load(server, [{"prompt": "x", "max_tokens": 30, "ignore_eos": True}] * 4))
    time.sleep(3 * SCRAPES_S)
    answered = 0
    for title, expression in expressions():
        asked = expression.replace("$__rate_interval", "1m").replace("$model_name", ".*").replace("$job", ".*")
        assert "$" not in asked, title
        answered += bool(prometheus.ask(asked))
    assert answered > 0.8 * len(expressions())


def test_promtool_has_nothing_to_say(server):
    promtool = found("promtool")
    said = subprocess.run(
        [promtool, "check", "metrics"], input=httpx.get(f"{server.url}/metrics").text, capture_output=True, text=True, check=False
    )
    assert (said.returncode, said.stdout + said.stderr) == (0, "")
    planted = subprocess.run(
        [promtool, "check", "metrics"], input="bad_total 1\nbad_total 2\n", capture_output=True, text=True, check=False
    )
    assert planted.returncode != 0
