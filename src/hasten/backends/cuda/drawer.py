"""Drawing on the device for an engine: whose history lies in which slot, and the tokens on their way to the host."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.backends.cuda.drawing import changes, drawing, refused
from hasten.backends.cuda.kernels.history import History
from hasten.backends.cuda.kernels.sampling import Scratch, default_parts, sample
from hasten.backends.cuda.tape import Device
from hasten.program import Logits, Wanted


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class DeviceLogits:
    """Rows of logits float32 [R, vocab] on the device, until the session's next step."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and the vocabulary's ids."""
        return self.values.shape[0], self.values.shape[1]

    def numpy(self, rows: Sequence[int] | None = None) -> NDArray[np.float32]:
        """These rows, copied over; all of them unless given. Waits for the step."""
        fetched: NDArray[np.float32] = self.at(rows).to("cpu", torch.float32, copy=True).numpy()
        return fetched

    def at(self, rows: Sequence[int] | None = None) -> Tensor:
        """These rows on the device; not copied where they lie together, in their order."""
        if rows is None:
            return self.values
        if len(rows) and list(rows) == [*range(rows[0], rows[0] + len(rows))]:
            return self.values[rows[0] : rows[0] + len(rows)]
        return self.values[torch.tensor(list(rows), dtype=torch.int64, device=self.values.device)]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class DeviceDrawn:
    """Tokens on their way from the device; ``left`` says of which rows they are not, and why."""

    left: Mapping[int, str]
    _there: Tensor  # int32 [R] on the host, once the event has come
    _copied: torch.cuda.Event | None

    def tokens(self) -> list[int]:
        """One a row, waited for: −1 where none was drawn."""
        if self._copied is not None:
            self._copied.synchronize()
        tokens: list[int] = self._there.tolist()
        return tokens


@dataclasses.dataclass(slots=True)
class _Kept:
    """A slot of the history, and the place of the token that it waits for."""

    slot: int
    position: int


class DeviceDrawer:
    """Draws from the rows that the session's last step left on the device ``on``. ``drawn`` int32 [R] is what the last draw gave."""

    def __init__(self, on: Device) -> None:
        self._on = on
        self.drawn = torch.empty(0, dtype=torch.int32, device=on.device)
        self._kept: dict[Hashable, _Kept] = {}
        self._history: History | None = None
        self._scratch: dict[int, Scratch] = {}  # by the rows that there is room for

    @property
    def nbytes(self) -> int:
        """What drawing keeps on the device by now."""
        history = 0 if self._history is None else self._history.nbytes
        return history + sum(each.nbytes for each in self._scratch.values())

    @torch.inference_mode()
    def draw(self, logits: Logits, rows: Sequence[int], wanted: Sequence[Wanted]) -> DeviceDrawn:
        """Begin to draw one token from each of ``rows``; nothing is waited for. Keys that are not among ``wanted`` are forgotten."""
        if not isinstance(logits, DeviceLogits):
            self._kept.clear()
            return self._none(len(rows), "its logits lie on the host")
        vocab = logits.shape[1]
        slots = self._slots(wanted, vocab)
        made = drawing(wanted, slots, len(wanted), vocab)
        noted, self._kept = self._kept, {}  # what fails halfway has noted who knows what
        if len(made.left) == len(wanted):
            self.drawn = torch.full((len(wanted),), -1, dtype=torch.int32, device=self._on.device)
        else:
            self.drawn = self._launched(logits.at(rows), made.settings, made.masks, made.top_k, made.top_p)
        for place, each in enumerate(wanted):
            if place not in made.left and each.key in noted:
                self._kept[each.key] = _Kept(noted[each.key].slot, each.position + 1)
        return self._under_way(made.left)

    def _launched(
        self, values: Tensor, settings: NDArray[np.int64], masks: NDArray[np.int32] | None, top_k: bool, top_p: bool
    ) -> Tensor:  # fmt: skip
        rows, vocab = values.shape
        device, words = self._on.device, -(-vocab // 32)
        masks_there = torch.empty((rows, words), dtype=torch.int32, device=device) if masks is None else self._over(masks)
        tokens = torch.empty(rows, dtype=torch.int32, device=device)
        most = _rounded(rows)
        if most not in self._scratch:
            self._scratch[most] = _scratch(most, vocab, self._on, device)
        scratch = self._scratch[most].first(rows)
        sample(values.float(), masks_there, self._over(settings), tokens, scratch, self._history, top_k=top_k, top_p=top_p)
        return tokens

    def _over(self, array: NDArray[np.int64] | NDArray[np.int32]) -> Tensor:
        """A copy on the device, which is made when the device comes to it."""
        here = torch.from_numpy(array)
        if self._on.device.type != "cuda":
            return here.clone()
        return here.pin_memory().to(self._on.device, non_blocking=True)

    def _under_way(self, left: Mapping[int, str]) -> DeviceDrawn:
        if self._on.device.type != "cuda":
            return DeviceDrawn(left, self.drawn, None)
        there = torch.empty(self.drawn.shape, dtype=torch.int32, pin_memory=True)
        there.copy_(self.drawn, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return DeviceDrawn(left, there, copied)

    def _none(self, rows: int, why: str) -> DeviceDrawn:
        return DeviceDrawn(dict.fromkeys(range(rows), why), torch.full((rows,), -1, dtype=torch.int32), None)

    def _slots(self, wanted: Sequence[Wanted], vocab: int) -> list[int | None]:
        """The slots of those that need one, which hold all of their tokens; None where the host does not know them all."""
        need = {each.key: each for each in wanted if changes(each) and refused(each, 0, vocab) is None}
        self._kept = {key: kept for key, kept in self._kept.items() if key in need}
        if not need:
            return [None] * len(wanted)
        history = self._history = self._room(len(need), vocab)
        free = [slot for slot in range(len(history.words)) if slot not in {kept.slot for kept in self._kept.values()}]
        found: dict[Hashable, int | None] = {}
        for key, each in need.items():
            kept = self._kept.get(key)
            if kept is None or kept.position != each.position:
                if len(each.prompt) + len(each.output) != each.position:
                    found[key] = None
                    continue
                self._kept.pop(key, None)
                kept = _Kept(free.pop(0) if kept is None else kept.slot, each.position)
                history.begin(kept.slot, each.prompt, each.output, each.bias)
                self._kept[key] = kept
            found[key] = kept.slot
        return [found.get(each.key) if changes(each) else None for each in wanted]

    def _room(self, slots: int, vocab: int) -> History:
        """A history of so many slots or more, with all that it held."""
        before = self._history
        if before is not None and len(before.words) >= slots:
            return before
        wider = History.of(_rounded(slots), vocab, self._on.device)
        if before is not None:
            for old, new in ((before.words, wider.words), (before.biases, wider.biases)):
                new[: len(old)].copy_(old)
        return wider


def drawing_bytes(rows: int, vocab: int, on: Device) -> int:
    """What drawing for up to ``rows`` rows at once keeps on the device at its most: all of them with penalties, whose histories are copied
    over as they come to be twice as many. What a single draw takes is less than a row of logits for each of its rows."""
    meta, sizes = torch.device("meta"), [1 << power for power in range(_rounded(rows).bit_length())]
    histories = sum(History.of(size, vocab, meta).nbytes for size in sizes[-2:])
    return histories + sum(_scratch(size, vocab, on, meta).nbytes for size in sizes)


def _rounded(rows: int) -> int:
    """The power of two that takes so many."""
    return 1 << (rows - 1).bit_length()


def _scratch(rows: int, vocab: int, on: Device, device: torch.device) -> Scratch:
    return Scratch.of(rows, default_parts(rows, vocab, on.programs), device)
