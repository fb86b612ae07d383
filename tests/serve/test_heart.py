"""What tells a long step from a hung loop, and a stopped process from a sleeping one: by a clock of the test's."""

import os

import msgspec
import pytest

from hasten.base.errors import UserError
from hasten.engine import BeamSearch, Grammar, SamplingParams, TokenLogprob
from hasten.serve.heart import READ, Beat, Heart, Patience, Pulse, read_beats
from hasten.serve.messages import Abort, Begin, Frames, News, Order, Piece, Report, Submit, frame

PATIENCE = Patience(unready_s=4.0, replaced_s=30.0, step_s=600.0)


def felt(seconds: float, beats) -> tuple[Pulse, float]:
    """A pulse after so many seconds of ``beats(at)``, one every half second."""
    pulse, now = Pulse(PATIENCE, 100.0), 100.0
    while now < 100.0 + seconds:
        now += 0.5
        if (beat := beats(now - 100.0)) is not None:
            pulse.feel(beat, now)
    return pulse, now


@pytest.mark.row("lying health", "a step while work waits")
@pytest.mark.parametrize(
    ("seconds", "beats", "well", "lost"),
    [
        (3600, lambda at: Beat(7, 1.0, False), True, ""),  # asleep
        (3600, lambda at: Beat(int(at), at / 2, True), True, ""),  # at work
        (500, lambda at: Beat(7, at, True), True, ""),  # in one long step
        (601, lambda at: Beat(7, at, True), True, "same step for 60"),  # in one that never ends
        (5, lambda at: Beat(7, 1.0, True), False, ""),  # has work and does nothing
        (31, lambda at: Beat(7, 1.0, True), False, "has work and does nothing"),
        (5, lambda at: None, False, ""),  # stopped
        (31, lambda at: None, False, "does not run"),
        (3600, lambda at: Beat(0, 1.0, False) if at < 3590 else Beat(1, 1.1, True), False, ""),  # began to work long after it slept
    ],
)
def test_what_beats_say(seconds, beats, well, lost):
    pulse, now = felt(seconds, beats)
    assert pulse.well(now) is well
    assert pulse.lost(now).find(lost) >= 0
    assert bool(pulse.lost(now)) is bool(lost)


def test_beats_cross_a_pipe_whole_however_long_nobody_reads():
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    heart, pulse = Heart(writer), Pulse(PATIENCE, 0.0)
    heart.turns, heart.busy = 41, True
    for _ in range(5000):  # more than a pipe holds
        heart.beat()
    found = []
    while data := _read(reader):
        found += read_beats(data)
    assert 3000 < len(found) < 5000
    assert {(beat.turns, beat.busy) for beat in found} == {(41, True)}
    pulse.feel(found[-1], 1.0)
    assert pulse.well(1.0)
    os.close(reader)
    os.close(writer)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, READ)
    except BlockingIOError:
        return b""


MESSAGES = [
    Begin(
        model="m", backend="auto", weights=None, activations=None, cache=None, context=None, max_sequences=4, memory=None, swap_bytes=0,
        prefixes=True,
    ),
    Submit(1, [1, 2], SamplingParams(stop="a", logit_bias={3: 1.5}, grammar=Grammar.json_object(), seed=5, logprobs=2), "tenant"),
    Submit(2, [0], SamplingParams(beam=BeamSearch(width=3, early_stopping="never")), ""),
    Abort(2**40),
]  # fmt: skip


def test_messages_come_through_any_portions():
    data = b"".join(map(frame, MESSAGES))
    for size in (1, 3, 7, len(data)):
        frames: Frames[Order] = Frames(Order)
        found = [one for at in range(0, len(data), size) for one in frames.feed(data[at : at + size])]
        assert found == MESSAGES
    news = News([Piece(1, 0, "é", (5,), "stop", None, "", (TokenLogprob(5, -0.5, ((5, -0.5),)),), None)])
    assert list(Frames[Report](Report).feed(frame(news))) == [news]


@pytest.mark.row("pickles on sockets", "a canary at every socket")
@pytest.mark.parametrize(
    "body",
    [b"\x80\x04\x95.", b"cposix\nsystem\n(S'id'\ntR.", b"\xc1", msgspec.msgpack.encode({"type": "Eval", "code": "1"}), b"\x91" * 5000],
)
def test_what_is_no_message_is_refused(body):
    with pytest.raises((msgspec.DecodeError, RecursionError)):
        list(Frames[Order](Order).feed(len(body).to_bytes(4, "little") + body))
    with pytest.raises(UserError, match="bytes between"):
        list(Frames[Order](Order).feed(b"\xff\xff\xff\xff"))


def test_params_are_checked_again_on_arrival():
    raw = msgspec.msgpack.decode(msgspec.msgpack.encode(MESSAGES[1]))
    raw["params"]["temperature"] = -1.0
    body = msgspec.msgpack.encode(raw)
    with pytest.raises(msgspec.ValidationError, match="temperature is"):
        list(Frames[Order](Order).feed(len(body).to_bytes(4, "little") + body))
