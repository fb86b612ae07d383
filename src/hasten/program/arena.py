"""Where the values of a step lie: fixed places in one arena, shared by values that never live at the same time."""

import dataclasses

ALIGNMENT = 64  # a cache line, and an AMX tile's row


@dataclasses.dataclass(slots=True)
class Arena:
    """First-fit places for values that come and go in a known order. ``size`` is the most bytes ever taken."""

    size: int = 0
    _free: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # (offset, bytes), by offset
    _taken: dict[int, int] = dataclasses.field(default_factory=dict)

    def take(self, count: int) -> int:
        """The offset of ``count`` bytes that nobody else has."""
        count = -(-max(count, 1) // ALIGNMENT) * ALIGNMENT
        for index, (offset, room) in enumerate(self._free):
            if room >= count:
                self._free[index : index + 1] = [(offset + count, room - count)] if room > count else []
                break
        else:
            offset, self.size = self.size, self.size + count
        self._taken[offset] = count
        return offset

    def give_back(self, offset: int) -> None:
        """Let others have these bytes."""
        self._free = sorted([*self._free, (offset, self._taken.pop(offset))])
        merged: list[tuple[int, int]] = []
        for start, room in self._free:
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((start, room))
        self._free = merged
