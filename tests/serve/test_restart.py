"""No request is lost where the engine is replaced under it, and a server that no engine can live in ends."""

import asyncio
import os
import random
import shutil
import signal
import time

import httpx
import pytest

from hasten.checkpoint import bundled_directory
from tests.serve.server import serving
from tests.serve.test_boundaries import GOOD


@pytest.mark.row("memory safety", "requests race a restart")
@pytest.mark.row("disconnects", "late news of nobody")
def test_requests_race_the_engines_restart():
    """Every route at once, some who leave, while the engine is killed: each is answered or sent away, and it answers on as before."""
    bodies = [
        *GOOD.items(), ("/v1/completions", {"prompt": "x", "max_tokens": 40, "stream": True}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 20, "regex": "[ab]{9}"}), ("/v1/embeddings", {"input": ["y" * 400] * 9}),
    ]  # fmt: skip

    async def races(server) -> dict[int, int]:
        statuses: dict[int, int] = {}
        over = asyncio.Event()

        async def keeps_asking(place: int) -> None:
            chance = random.Random(place)
            async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
                while not over.is_set():
                    path, body = chance.choice(bodies)
                    try:
                        async with asyncio.timeout(chance.choice((0.01, 30, 30))):
                            answer = await client.post(path, json=body)
                    except TimeoutError:
                        continue
                    statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                    assert answer.status_code in {200, 503}, (path, answer.text)
                    if answer.status_code == 503:
                        assert answer.headers["retry-after"]
                        await asyncio.sleep(0.02)

        asking = [asyncio.create_task(keeps_asking(place)) for place in range(12)]
        chance = random.Random(1)
        for _ in range(2):
            await asyncio.sleep(0.2 + chance.random() / 2)
            os.kill(server.engine_pid(), signal.SIGKILL)
            await asyncio.sleep(0.1)
            await asyncio.to_thread(server.until, server.ready, 30)
        over.set()
        await asyncio.gather(*asking)
        return statuses

    with serving("code-8m", "--max-sequences", "4", "--max-waiting", "256") as server:
        body = {"prompt": "def f(", "max_tokens": 12, "temperature": 0}
        before = server.post("/v1/completions", body).json()["choices"]
        statuses = asyncio.run(races(server))
        assert statuses[200] > 20
        assert statuses[503] > 5
        assert server.post("/v1/completions", body).json()["choices"] == before
        assert not any("Traceback" in line for line in server.lines)
        assert server.stop() == 0


@pytest.mark.row("exit code of a dead engine", "cannot live again")
def test_a_server_whose_model_is_gone_ends_and_says_so(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(bundled_directory("code-8m"), model)
    with serving(model) as server:
        shutil.rmtree(model)
        os.kill(server.engine_pid(), signal.SIGKILL)
        began = time.monotonic()
        code = server.process.wait(60)
        assert code == 2
        assert time.monotonic() - began < 30
        assert any(str(model) in line for line in server.lines[-3:]), server.lines[-5:]
