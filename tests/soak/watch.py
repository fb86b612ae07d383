"""What is looked at while a server is loaded: its own account of its event loop, its memory, and whether it is at rest."""

import asyncio
import dataclasses
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from tests.serve.scrape import Scrape, scrape
from tests.serve.server import Server
from tests.soak.determinism import Difference

LATE_S = 0.1
"""An event loop that is later than this stalls."""
LATE_SHARE = 0.001
"""Of the moments it is looked at."""
GROWTH_BYTES = 64 << 20


def require(holds: bool, otherwise: str) -> None:
    """Raises Difference, saying what is wrong."""
    if not holds:
        raise Difference(otherwise)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share is not above."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


class Stalls:
    """Of the server's event loop, from now on."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._before = self._read()

    def _read(self) -> tuple[float, float]:
        found = scrape(self._server.url)
        ticks = found["hasten_event_loop_lag_seconds_count"]
        return ticks, ticks - found.of("hasten_event_loop_lag_seconds_bucket", le=str(LATE_S))

    def told(self, share: float) -> dict:
        """How often it was looked at, and how often it was late. Raises Difference for more than ``share`` of that."""
        ticks, late = (int(now - before) for now, before in zip(self._read(), self._before))
        require(ticks > 0, "the event loop was never looked at")
        require(late <= share * ticks, f"the event loop was over {ms(LATE_S)} late at {late} of {ticks} moments, {share:.1%} are allowed")
        return {"ticks": ticks, "late": late}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that the server's two processes hold."""

    front: int
    engine: int

    def growth(self, before: "Memory", planned: int = 0, passing: int = 0) -> dict:
        """Since then. Raises Difference for more than GROWTH_BYTES and ``passing``; the engine may besides take what it was given, if
        ``planned``, for its cache's pages are there only once they are used."""
        grown = {"front": self.front - before.front, "engine": self.engine - before.engine}
        for name, size in grown.items():
            most = GROWTH_BYTES + passing + (planned if name == "engine" else 0)
            require(size <= most, f"the {name}'s process grew by {size >> 20} MiB, {most >> 20} are allowed")
        return {f"{name}_growth_mib": round(size / 2**20, 1) for name, size in grown.items()}


def memory(server: Server, field: str = "VmRSS") -> Memory:
    """As the kernel counts it; VmHWM is the most since `forget_peaks`."""
    return Memory(*(_status(pid, field) for pid in (server.process.pid, server.engine_pid())))


def forget_peaks(server: Server) -> None:
    for pid in (server.process.pid, server.engine_pid()):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def _status(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) << 10


def open_files(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def at_rest(found: Scrape) -> bool:
    """No request, and no page in anybody's hands."""
    return not (found["hasten_num_requests_running"] + found["hasten_num_requests_waiting"] + found["hasten_kv_cache_usage_perc"])


async def until_rest(server: Server, most_s: float) -> float:
    """Seconds until it is at rest. Raises Difference where it is not by then."""
    began = time.monotonic()
    while True:
        found = await asyncio.to_thread(scrape, server.url)
        since = time.monotonic() - began
        if at_rest(found):
            return since
        if since > most_s:
            left = {name: found[f"hasten_{name}"] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")}
            raise Difference(f"not at rest {since:.2f} s after the last client left: {left}")
        await asyncio.sleep(0.02)
