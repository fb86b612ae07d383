"""What this machine is, what this process may use of it, and how fast it can be at most.

A file of /proc or /sys that is absent, as on another system than Linux, means "not known" and never an error.
Every reader of them takes the directory that stands for ``/``.
"""

import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hasten.base.errors import UserError, one_line

GIB = 1 << 30
ROOT = Path("/")


@dataclass(frozen=True)
class Cpu:
    """The processor, and what this process may use of it."""

    vendor: str  # "GenuineIntel"; empty where it does not say
    brand: str  # the model as it names itself, or the architecture where it does not
    features: frozenset[str]  # instruction sets it has and the system supports: "avx2", "avx512_vnni", "amx_int8" …
    amx_granted: bool  # the kernel lets this process use AMX tiles
    affinity: int  # CPUs this process may be scheduled on
    quota: float | None  # CPU seconds a second that its control group grants; None for no limit

    @property
    def cores(self) -> int:
        """How many threads can run at full speed at once: the affinity, or the whole cores of the quota if fewer; at least 1."""
        return self.affinity if self.quota is None else max(1, min(self.affinity, int(self.quota)))


@dataclass(frozen=True)
class Memory:
    """Main memory, in bytes; None where it is not known."""

    total: int | None
    available: int | None  # what can be allocated without swapping, within the limit of the control group
    limit: int | None  # of the control group; None for no limit
    huge_pages: str | None  # the mode of transparent huge pages: "always", "madvise" or "never"


@dataclass(frozen=True)
class Machine:
    """What ``detect`` found."""

    cpu: Cpu
    memory: Memory


@dataclass(frozen=True)
class Roofline:
    """The most that ``threads`` threads together can do, each rate with the instruction set that reached it."""

    threads: int
    read_gb_per_s: float  # 1e9 bytes a second, from main memory
    read_isa: str
    bf16_tflops: float  # 1e12 operations a second, a multiply-add being two
    bf16_isa: str
    int8_tops: float
    int8_isa: str
    f32_tflops: float
    f32_isa: str


def detect(root: Path = ROOT) -> Machine:
    """Describe this machine. Raises UserError if the native extension is missing."""
    with _explained():
        import hasten._native as native
    cpu = Cpu(
        vendor=native.cpu_vendor(),
        brand=native.cpu_brand() or platform.machine(),
        features=frozenset(name for name, present in native.cpu_features().items() if present),
        amx_granted=native.amx_granted(),
        affinity=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        quota=cpu_quota(root),
    )
    return Machine(cpu, memory(root))


def measure_roofline(
    threads: int | None = None,
    *,
    read_bytes: int = GIB,
    repeats: int = 5,
    seconds: float = 0.25,
    root: Path = ROOT,
) -> Roofline:
    """Measure what ``threads`` threads (by default, as many as there are granted cores) reach together.

    ``read_bytes`` are read ``repeats`` times, and must be well above the last-level cache; at most half of the memory available is
    taken. Each peak takes ``seconds``. The whole takes one to five seconds with the defaults, as memory new to the process is slow.
    Raises UserError for a value out of range, or if the native extension is missing.
    """
    with _explained():
        import hasten._native as native
    if threads is None:
        threads = detect(root).cpu.cores
    available = memory(root).available
    if available is not None:
        read_bytes = min(read_bytes, available // 2)
    try:
        read, read_isa = native.streaming_read(read_bytes, threads, repeats)
        bf16, bf16_isa = native.bf16_peak(threads, seconds)
        int8, int8_isa = native.int8_peak(threads, seconds)
        f32, f32_isa = native.f32_peak(threads, seconds)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Roofline(threads, read, read_isa, bf16, bf16_isa, int8, int8_isa, f32, f32_isa)


def memory(root: Path = ROOT) -> Memory:
    """Main memory as /proc/meminfo and the control group of this process tell it."""
    sizes = {key: 1024 * int(kib) for key, kib in re.findall(r"^(\w+):\s+(\d+) kB$", _read(root / "proc/meminfo") or "", re.MULTILINE)}
    total = sizes.get("MemTotal")
    groups = [(limit, used) for limit, used in _memory_groups(root) if total is None or limit < total]
    rooms = [max(0, limit - used) for limit, used in groups]
    if "MemAvailable" in sizes:
        rooms.append(sizes["MemAvailable"])
    mode = re.search(r"\[(\w+)\]", _read(root / "sys/kernel/mm/transparent_hugepage/enabled") or "")
    return Memory(
        total=total,
        available=min(rooms, default=None),
        limit=min((limit for limit, _ in groups), default=None),
        huge_pages=mode.group(1) if mode else None,
    )


def free_bytes() -> int:
    """Bytes of main memory that can be allocated without swapping; 8 GiB where that is not known."""
    return memory(ROOT).available or 8 << 30


def may_have_gpu(root: Path = ROOT, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether NVIDIA's driver shows a device here, on Linux or in its Windows subsystem, and CUDA_VISIBLE_DEVICES does not hide it; what
    it can do, torch alone tells."""
    shown = environment.get("CUDA_VISIBLE_DEVICES", "0").strip() not in {"", "-1"}
    return shown and any((root / name).exists() for name in ("dev/nvidiactl", "dev/dxg"))


def free_disk(path: Path) -> int | None:
    """Bytes free where ``path`` lies, or would; None where it is not known."""
    try:
        return shutil.disk_usage(next(each for each in (path, *path.absolute().parents) if each.exists())).free
    except (OSError, StopIteration):
        return None


def resident_bytes(root: Path = ROOT) -> int | None:
    """Main memory that this process takes now; None where it is not known."""
    found = re.search(r"^VmRSS:\s+(\d+) kB$", _read(root / "proc/self/status") or "", re.MULTILINE)
    return 1024 * int(found.group(1)) if found else None


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPU seconds a second that the control group of this process grants: the least of it and its ancestors; None for no limit."""
    quotas = []
    for group in _groups(root, "cpu"):
        v2 = (_read(group / "cpu.max") or "").split()
        v1 = [_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")]
        quota, period = (_integer(text) for text in (v2 if len(v2) == 2 else v1))
        if quota is not None and period is not None and quota > 0 and period > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def _memory_groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes used) of each control group that has a limit; file pages that the kernel can drop do not count as used."""
    for group in _groups(root, "memory"):
        for limit_file, used_file, droppable_key in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _integer(_read(group / limit_file))
            if limit is not None:
                droppable = re.search(rf"^{droppable_key} (\d+)$", _read(group / "memory.stat") or "", re.MULTILINE)
                yield limit, (_integer(_read(group / used_file)) or 0) - (int(droppable.group(1)) if droppable else 0)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The directories that may hold limits of ``controller`` for this process: its control group and every ancestor, versions 2 and 1."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        group = top / path.lstrip("/")
        # Inside a container the path may be the host's and lead nowhere here; the top then is the container's own group.
        yield from (group, *(parent for parent in group.parents if parent.is_relative_to(top)))


def _integer(text: str | None) -> int | None:
    """The number in ``text``; None if it is absent, or a word such as "max"."""
    try:
        return int(text or "")
    except ValueError:
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


@contextmanager
def _explained() -> Iterator[None]:
    """Turn a failure to import the native extension into a UserError."""
    try:
        yield
    except ImportError as error:
        reason = one_line(str(error))
        raise UserError(
            f"hasten's native extension cannot be loaded ({reason}); rebuild it: pip install --force-reinstall --no-deps hasten,"
            " or pip install . in a checkout"
        ) from error
