"""The supervisor by itself: engines that cannot start, and what it tells of them."""

import asyncio
import math
import os
import signal
import sys

import msgspec
import pytest

from hasten.engine import SamplingParams
from hasten.serve.engine_process import open_llm
from hasten.serve.mailbox import EngineGoneError, Mailbox
from hasten.serve.messages import Begin
from hasten.serve.supervisor import Restarts, Supervisor

BEGIN = Begin(
    model="code-8m", backend="auto", weights=None, activations=None, cache=None, context=None, max_sequences=4, memory=None, swap_bytes=0,
    prefixes=True,
)  # fmt: skip


def supervised(begin: Begin, task, restarts: Restarts | None = None) -> tuple[list[str], list[int]]:
    """Run ``task(supervisor, gave_up)`` over one."""
    told, codes = [], []

    async def run() -> None:
        over = asyncio.Event()
        supervisor = Supervisor(begin, told=told.append, gave_up=lambda code: (codes.append(code), over.set()), restarts=restarts)
        await supervisor.start()
        try:
            async with asyncio.timeout(60):
                await task(supervisor, over)
        finally:
            await supervisor.stop()
        assert supervisor.pid is None or not os.path.exists(f"/proc/{supervisor.pid}")

    asyncio.run(run())
    return told, codes


async def gives_up(supervisor: Supervisor, over: asyncio.Event) -> None:
    assert not supervisor.able
    await over.wait()
    assert supervisor.state == "failed"
    with pytest.raises(EngineGoneError):
        supervisor.submit([1], SamplingParams(), "", Mailbox())


def test_a_users_mistake_ends_it_with_2():
    told, codes = supervised(Begin(**{name: getattr(BEGIN, name) for name in BEGIN.__struct_fields__} | {"memory": 10**6}), gives_up)
    assert codes == [2]
    assert "1,000,000 bytes of memory are not enough" in told[-1]


@pytest.mark.row("exit code of a dead engine", "never could live")
def test_a_process_that_cannot_run_ends_it_with_1(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    told, codes = supervised(BEGIN, gives_up, Restarts(first_s=0.01))
    assert codes == [1]
    assert "giving up" in told[-1]


def test_no_process_at_all_is_tried_again(monkeypatch):
    async def task(supervisor: Supervisor, over: asyncio.Event) -> None:
        while not supervisor.able:
            await asyncio.sleep(0.02)
        with monkeypatch.context() as none:
            none.setattr(sys, "executable", "/nonexistent")
            os.kill(supervisor.pid, signal.SIGKILL)
            while not any("no process can begin" in line for line in told):
                await asyncio.sleep(0.02)
        while not supervisor.able:
            await asyncio.sleep(0.02)
        mailbox = Mailbox()
        id = supervisor.submit([5, 6], SamplingParams(max_tokens=2, ignore_eos=True), "", mailbox)
        pieces = []
        while not pieces or pieces[-1].finish_reason is None:
            pieces += await mailbox.take()
        assert {piece.id for piece in pieces} == {id}
        assert supervisor.deaths == 1

    told: list[str] = []

    async def run() -> None:
        supervisor = Supervisor(BEGIN, told=told.append, gave_up=lambda code: None, restarts=Restarts(0.01, 0.05, 100))
        await supervisor.start()
        try:
            async with asyncio.timeout(60):
                await task(supervisor, asyncio.Event())
        finally:
            await supervisor.stop()

    asyncio.run(run())


def test_waits_double_and_end():
    waits = [Restarts(0.1, 3.0, 9).wait_s(deaths) for deaths in range(1, 9)]
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.0, 3.0, 3.0])


@pytest.mark.parametrize(("said", "planned"), [(None, math.inf), (1.8, 1.8)])
def test_the_stretch_that_is_asked_for_is_planned_with(said, planned):
    scheduling = open_llm(msgspec.structs.replace(BEGIN, stretch=said)).scheduling
    assert (scheduling.stretch, scheduling.batching.slots) == (planned, BEGIN.max_sequences)
