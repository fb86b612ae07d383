"""A model on a device: its weights, its pages, and a tape for every bucket of batches that came."""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.backends.cuda.drawer import DeviceDrawer, DeviceLogits
from hasten.backends.cuda.graphs import Recorder, Recordings, Replay
from hasten.backends.cuda.inputs import MOST_SEQUENCES, SCORED_TOKENS, Bucket, pieces
from hasten.backends.cuda.kernels.cache import PAGE
from hasten.backends.cuda.kernels.sampling import feed
from hasten.backends.cuda.limits import Arithmetic, limits
from hasten.backends.cuda.moving import Moving
from hasten.backends.cuda.places import Room
from hasten.backends.cuda.tape import Device, Pool, Tape, compile_tape
from hasten.backends.cuda.weights import DeviceWeights
from hasten.base.errors import ConfigError
from hasten.program import Batch, Move, PageLists, Program, RecurrentGroup, StateLostError, first_pages, hidden_states, ops

STEP_TOKENS = 2048  # most tokens of one step; longer batches are played in several
HIDDEN_TOKENS = 128  # most of one step that gives hidden states
LARGEST = Bucket(STEP_TOKENS, MOST_SEQUENCES, SCORED_TOKENS)
NOBODY = Batch(*(np.zeros(count, np.int32) for count in (0, 0, 1, 0)))


class CudaSession:
    """One Program with its weights, and ``pools`` of pages of ``page`` tokens, of which ``pages`` says how many there are by state group.
    Which of them holds what is the caller's business.

    The first batch of a bucket waits until its kernels are compiled, and is launched kernel by kernel, as are those behind it until the
    ``recorder`` has made one thing of all launches, in the background; from then on that is replayed. Without one it stays as it is."""

    page = PAGE
    threads = None
    """Sampling has none of its own here."""

    def __init__(
        self, program: Program, weights: DeviceWeights, pools: Mapping[str, Pool], pages: Mapping[str, int], on: Device,
        recorder: Recorder | None,
    ) -> None:  # fmt: skip
        self.program, self.weights, self.pools, self.pages, self.on = program, weights, pools, pages, on
        self.isa = f"sm_{on.capability[0]}{on.capability[1]}"
        self._tapes: dict[tuple[str, Bucket], _Player] = {}
        self._recordings = Recordings(recorder)
        self.room = Room.of(program, LARGEST, on.device)
        self.drawer = DeviceDrawer(on)
        self._moving = Moving([pools[group.name] for group in program.states], on.device)
        self._recurrent = any(isinstance(group, RecurrentGroup) for group in program.states)
        self._scoring, self._playing = threading.Lock(), threading.Lock()
        embed = next((op for op in program.ops if isinstance(op, ops.Embed)), None)
        self._vocab = None if embed is None else program.params[embed.weight][0]

    @property
    def weight_bytes(self) -> int:
        """What a step reads of weights if it reads all experts: linear layers as they are packed."""
        return self.weights.linear_bytes

    def limits(self, arithmetic: Arithmetic, read_bytes: int) -> tuple[float, float]:
        """What the device can do at this moment (`limits.limits`)."""
        return limits(self.on.device, arithmetic, read_bytes)

    @property
    def step_bytes(self) -> int:
        """What steps take of the device by now: the room that all share, what each bucket's tape has besides, and what tokens are drawn
        with."""
        return self.room.nbytes + sum(player.tape.nbytes for player in self._tapes.values()) + self.drawer.nbytes

    @torch.inference_mode()
    def make_ready(self) -> None:
        """Bring the weights over, which the first step would do otherwise."""
        self._player("logits", Bucket(1, 1, 1))

    def settle(self) -> None:
        """Wait until every step that came can be replayed, as whoever measures must, or waits for the device as a whole."""
        self._recordings.settle()

    @torch.inference_mode()
    def carry_out(self, moves: Sequence[Move]) -> None:
        """Copy pages, swap them out and in, in this order. Whatever is raised, no page but the targets of those moves is written."""
        self._moving.carry_out(moves)

    def run(self, batch: Batch, pages: Sequence[PageLists]) -> DeviceLogits:
        """Logits float32 [R, vocab] of the rows asked for, on the device until the next step; what the batch's sequences keep goes to their
        ``pages``. Nothing is waited for. A token of −2 − i is the one that row i of the ``drawer``'s last draw gives.

        Raises ConfigError for tokens and positions that are out of range; nothing is changed then. Raises StateLostError where a model with
        recurrent state fails once its step has begun."""
        return DeviceLogits(self._play("logits", batch, pages))

    def hidden(self, batch: Batch, pages: Sequence[PageLists]) -> NDArray[np.float32]:
        """Hidden states float32 [R, width] after the last norm, of the rows asked for; kept is the same as by ``run``."""
        rows = DeviceLogits(self._play("hidden", batch, pages))
        with self._begun():
            return rows.numpy()

    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Logits float32 [R, vocab] of whole sequences, in pages from the first on: nothing that was kept in a page outlives this."""
        pages = first_pages(self.program, batch, PAGE, self.pages)
        with self._scoring:
            return self.run(batch, pages).numpy()

    @torch.inference_mode()
    def _play(self, what: str, batch: Batch, pages: Sequence[PageLists]) -> Tensor:
        self._check(batch)
        most = HIDDEN_TOKENS if what == "hidden" else STEP_TOKENS if len(batch.rows) <= SCORED_TOKENS else SCORED_TOKENS
        parts = pieces(batch, pages, most)
        with self._playing:
            players = [self._player(what, Bucket.of(part)) for part, _ in parts]  # all are there before one plays
            with self._begun():
                if len(parts) == 1:
                    return self._step(players[0], *parts[0])
                # Players share the memory of their results.
                return torch.cat([self._step(player, *part).clone() for player, part in zip(players, parts, strict=True)])

    def _step(self, player: "_Player", batch: Batch, pages: Sequence[PageLists]) -> Tensor:
        rows = player.play(batch, pages, self.drawer.drawn)
        self._recordings.add(player)  # once it has played: what never comes is not captured either
        return rows

    @contextlib.contextmanager
    def _begun(self) -> Iterator[None]:
        """What fails in here fails when states may have moved on."""
        try:
            yield
        except Exception as error:
            if self._recurrent:
                raise StateLostError(f"{type(error).__name__}: {error}") from error
            raise

    def _player(self, what: str, bucket: Bucket) -> "_Player":
        if (what, bucket) not in self._tapes:
            program = self.program if what == "logits" else hidden_states(self.program)
            tape = compile_tape(program, self.weights, self.pools, bucket, self.on, PAGE, self.room)
            self._tapes[what, bucket] = _Player(tape, tape.outputs[program.outputs[0]])
        return self._tapes[what, bucket]

    def _check(self, batch: Batch) -> None:
        if not batch.tokens.size:
            return
        drawn = (batch.tokens < -1) & (batch.tokens >= -1 - len(self.drawer.drawn))
        known = batch.tokens[~drawn]
        if self._vocab is not None and known.size and not 0 <= int(known.min()) <= int(known.max()) < self._vocab:
            wrong = known[(known < 0) | (known >= self._vocab)][0]
            raise ConfigError(f"token id {wrong} is outside the vocabulary; accepted are 0 to {self._vocab - 1}")
        if int(batch.positions.max()) >= (most := self.program.context):
            raise ConfigError(f"position {int(batch.positions.max())} is beyond the context of {most} tokens; shorten the input")


class _Player:
    """A tape that is ready: all that it launches on a device has been compiled before a batch is played. ``replay``, once it is there,
    launches all of it at once.

    So a step happens whole or, where nothing of it began, not at all: recurrent state that had moved on halfway could not be had back."""

    def __init__(self, tape: Tape, result: Tensor) -> None:
        self.tape, self.result = tape, result
        self.replay: Replay | None = None  # set by another thread
        if result.is_cuda:
            tape.inputs.fill(NOBODY, ())
            self.launch()

    def launch(self) -> None:
        """Launch kernel after kernel."""
        self.tape.play()

    def play(self, batch: Batch, pages: Sequence[PageLists], drawn: Tensor) -> Tensor:
        """One step: the rows asked for, until the next of any player that shares their memory. Tokens below −1 are taken from ``drawn``."""
        self.tape.inputs.fill(batch, pages)
        if batch.tokens.size and int(batch.tokens.min()) < -1:
            feed(self.tape.inputs.tokens, drawn)
        (self.replay or self.launch)()
        return self.result[: len(batch.rows)]
