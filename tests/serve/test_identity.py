"""The response cache is open for the model that the engine plays, and for no other."""

import asyncio
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from hasten import load
from hasten.program import Formats
from hasten.serve.identity import Identity
from hasten.serve.messages import Begin, Ready
from hasten.serve.responses import Limits, MemoryStore, Played, ResponseCache, model_digest


@pytest.fixture
def model(tmp_path):
    """A copy to change."""
    folder = Path(load("code-8m").weights.origin.files[0].path).parent
    for file in folder.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    return tmp_path


def ready() -> Ready:
    return Ready(backend="cpu", context=512, plan="", notice="", seconds=1.0, read_bytes_s=None)


def begin(model: Path) -> Begin:
    return Begin(
        model=str(model), backend="auto", weights="int8", activations=None, cache=None, context=512, max_sequences=4, memory=None,
        swap_bytes=0, prefixes=True,
    )  # fmt: skip


async def settled(identity: Identity) -> bool:
    """Whether it holds, once that was looked at."""
    if not identity.holds:
        while identity._task is not None:
            await asyncio.sleep(0.01)
    return identity.holds


def touch(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))


def edit(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 7}))


def test_open_once_an_engine_plays_what_was_there_before_it(model):
    cache, told, supervisor = ResponseCache(MemoryStore(Limits()), 1000), [], SimpleNamespace(ready=None)

    async def run() -> None:
        identity = Identity(cache, begin(model), supervisor, told.append)
        finding = asyncio.create_task(identity.find())
        await asyncio.sleep(0.3)
        assert not identity.holds
        assert cache.model is None
        supervisor.ready = ready()
        await asyncio.wait_for(finding, 10)
        assert identity.holds
        assert cache.model == model_digest(load(str(model)), Played.here("cpu", Formats("int8", None, None), 512))
        supervisor.ready = ready()
        assert not identity.holds  # another engine, which nobody has looked at
        assert await settled(identity)

    asyncio.run(run())
    assert len(told) == 1
    assert "open" in told[0]


@pytest.mark.parametrize("first", [True, False], ids=["before it is known", "while it is open"])
@pytest.mark.parametrize(
    ("file", "change"),
    [("model.safetensors", touch), ("tokenizer.json", touch), ("config.json", edit), ("generation_config.json", edit)],
)
def test_closed_for_good_where_files_were_changed(model, file, change, first):
    if not (model / file).exists():
        (model / file).write_text("{}")
    cache, told, supervisor = ResponseCache(MemoryStore(Limits()), 1000), [], SimpleNamespace(ready=None)

    async def run() -> None:
        identity = Identity(cache, begin(model), supervisor, told.append)
        if not first:
            supervisor.ready = ready()
            assert await settled(identity)
        change(model / file)
        supervisor.ready = ready()
        assert not await settled(identity)
        supervisor.ready = ready()
        assert not await settled(identity)

    asyncio.run(run())
    assert told[-1].startswith("the response cache is closed until the server starts again: ")
    assert "changed" in told[-1]
