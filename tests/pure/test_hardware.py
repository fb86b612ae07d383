"""What `hasten.base.hardware` reads from /proc and /sys, on trees written for the test; the native extension is a stand-in."""

import sys
from dataclasses import FrozenInstanceError
from types import ModuleType

import pytest

import hasten
from hasten.base import hardware
from hasten.base.errors import UserError
from tests.cli import ENVIRONMENT

GIB = 1 << 30
MEMINFO = """\
MemTotal:       16777216 kB
MemFree:         1000000 kB
MemAvailable:    8388608 kB
HugePages_Total:       0
"""


@pytest.fixture
def tree(tmp_path):
    """Writes files below a fresh root, and returns that root."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


@pytest.fixture
def native(monkeypatch):
    """A stand-in for the extension that records what it is asked to measure."""
    module = ModuleType("hasten._native")
    module.calls = []
    module.cpu_vendor = lambda: "Maker"
    module.cpu_brand = lambda: ""
    module.cpu_features = lambda: {"avx2": True, "amx_tile": False}
    module.amx_granted = lambda: False

    def measure(name, rate):
        def call(*arguments):
            module.calls.append((name, *arguments))
            if arguments[0] == -1:
                raise ValueError("threads is -1; accepted: 1 to 2")
            return rate, f"isa of {name}"

        return call

    for rate, name in enumerate(("streaming_read", "bf16_peak", "int8_peak", "f32_peak"), start=1):
        setattr(module, name, measure(name, float(rate)))
    monkeypatch.setitem(sys.modules, "hasten._native", module)
    monkeypatch.setattr(hasten, "_native", module, raising=False)
    return module


def test_nothing_is_known_of_a_system_without_proc_and_sys(tmp_path):
    assert hardware.memory(tmp_path) == hardware.Memory(total=None, available=None, limit=None, huge_pages=None)
    assert hardware.cpu_quota(tmp_path) is None


@pytest.mark.parametrize("mode", ["always", "madvise", "never"])
def test_memory_without_a_control_group(tree, mode):
    modes = " ".join(f"[{name}]" if name == mode else name for name in ("always", "madvise", "never"))
    root = tree({"proc/meminfo": MEMINFO, "sys/kernel/mm/transparent_hugepage/enabled": modes + "\n"})
    assert hardware.memory(root) == hardware.Memory(total=16 * GIB, available=8 * GIB, limit=None, huge_pages=mode)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5),
        ({"sys/fs/cgroup/a/b/cpu.max": "50000 100000\n"}, 0.5),
        ({"sys/fs/cgroup/a/cpu.max": "300000 100000\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 3.0),
        ({"sys/fs/cgroup/a/cpu.max": "300000 100000\n", "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n"}, 3.0),
        ({"sys/fs/cgroup/other/cpu.max": "100000 100000\n"}, None),
        ({"sys/fs/cgroup/cpu.max": "garbage\n"}, None),
        ({"sys/fs/cgroup/cpu.max": "100000 0\n"}, None),
    ],
)
def test_cpu_quota_of_version_2(tree, files, quota):
    assert hardware.cpu_quota(tree({"proc/self/cgroup": "0::/a/b\n", **files})) == quota


@pytest.mark.parametrize(("microseconds", "quota"), [("-1", None), ("150000", 1.5)])
def test_cpu_quota_of_version_1(tree, microseconds, quota):
    group = "sys/fs/cgroup/cpu/job"
    files = {f"{group}/cpu.cfs_quota_us": microseconds + "\n", f"{group}/cpu.cfs_period_us": "100000\n"}
    assert hardware.cpu_quota(tree({"proc/self/cgroup": "7:memory:/\n4:cpu,cpuacct:/job\n", **files})) == quota


def test_memory_limit_of_version_2_is_that_of_the_nearest_bound(tree):
    root = tree({
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/a/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/a/memory.stat": f"anon 5\nfile 7\ninactive_file {2 * GIB}\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
    })
    memory = hardware.memory(root)
    assert (memory.limit, memory.available) == (4 * GIB, 3 * GIB)


def test_memory_limit_of_version_1(tree):
    group = "sys/fs/cgroup/memory/job"
    files = {f"{group}/memory.limit_in_bytes": f"{2 * GIB}\n", f"{group}/memory.usage_in_bytes": f"{GIB}\n"}
    memory = hardware.memory(tree({"proc/meminfo": MEMINFO, "proc/self/cgroup": "7:memory:/job\n", **files}))
    assert (memory.limit, memory.available) == (2 * GIB, GIB)


def test_a_memory_limit_above_the_machine_is_no_limit(tree):
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    memory = hardware.memory(tree({"proc/meminfo": MEMINFO, "proc/self/cgroup": "7:memory:/\n", **files}))
    assert (memory.limit, memory.available) == (None, 8 * GIB)


def test_a_group_over_its_limit_leaves_nothing(tree):
    files = {"sys/fs/cgroup/memory.max": f"{GIB}\n", "sys/fs/cgroup/memory.current": f"{GIB + 4096}\n"}
    assert hardware.memory(tree({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", **files})).available == 0


@pytest.mark.parametrize(("affinity", "quota", "cores"), [(8, None, 8), (8, 2.5, 2), (8, 0.5, 1), (2, 6.0, 2)])
def test_cores_are_the_affinity_within_the_quota(affinity, quota, cores):
    cpu = hardware.Cpu(vendor="", brand="", features=frozenset(), amx_granted=False, affinity=affinity, quota=quota)
    assert cpu.cores == cores


def test_detect_names_the_features_that_are_present(native, tree):
    machine = hardware.detect(tree({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}))
    assert machine.cpu.features == {"avx2"}
    assert machine.cpu.vendor == "Maker"
    assert machine.cpu.brand != ""
    assert machine.cpu.affinity >= 1
    assert machine.cpu.quota == 0.5
    with pytest.raises(FrozenInstanceError):
        machine.cpu.quota = 4.0


def test_measure_roofline_puts_each_rate_in_its_place(native, tree):
    roofline = hardware.measure_roofline(2, read_bytes=GIB, repeats=3, seconds=0.5, root=tree({"proc/meminfo": MEMINFO}))
    assert roofline == hardware.Roofline(
        2, 1.0, "isa of streaming_read", 2.0, "isa of bf16_peak", 3.0, "isa of int8_peak", 4.0, "isa of f32_peak"
    )
    peaks = [(name, 2, 0.5) for name in ("bf16_peak", "int8_peak", "f32_peak")]
    assert native.calls == [("streaming_read", GIB, 2, 3), *peaks]


def test_measure_roofline_takes_the_granted_cores_and_half_of_the_memory(native, tree):
    files = {"sys/fs/cgroup/cpu.max": "100000 100000\n", "sys/fs/cgroup/memory.max": f"{GIB}\n"}
    roofline = hardware.measure_roofline(root=tree({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", **files}))
    assert roofline.threads == 1
    assert native.calls[0][:3] == ("streaming_read", GIB // 2, 1)


def test_what_the_extension_refuses_is_the_users_to_mend(native, tmp_path):
    with pytest.raises(UserError, match="^threads is -1; accepted: 1 to 2$"):
        hardware.measure_roofline(2, read_bytes=-1, root=tmp_path)


@pytest.mark.parametrize("function", [hardware.detect, hardware.measure_roofline])
def test_a_missing_extension_is_explained_in_one_line(monkeypatch, function):
    monkeypatch.setitem(sys.modules, "hasten._native", None)
    with pytest.raises(UserError, match=r"native extension cannot be loaded \(.*\); rebuild it: pip install") as caught:
        function()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("file", "there"), [("dev/nvidiactl", True), ("dev/dxg", True), ("dev/dri/card0", False)])
def test_a_gpu_shows_by_its_drivers_file(tree, file, there):
    root = tree({file: ""})
    assert hardware.may_have_gpu(root, {}) == there
    assert hardware.may_have_gpu(root, {"CUDA_VISIBLE_DEVICES": "1"}) == there
    for hidden in ("", "-1"):
        assert not hardware.may_have_gpu(root, {"CUDA_VISIBLE_DEVICES": hidden})


def test_tests_see_no_gpu(tmp_path):
    """Whatever the machine has, so that 'auto' is the CPU's backend in them, and in processes they start; those in tests/gpu look for
    themselves."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert hardware.may_have_gpu(tmp_path, {})
    assert not hardware.may_have_gpu(tmp_path)
    assert not hardware.may_have_gpu(tmp_path, ENVIRONMENT)
