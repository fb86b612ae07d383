"""Settings that must be made before torch is imported."""

import os

import pytest

# pytest-xdist runs one worker a core; a second thread in each would only wait for the first.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what reaches for the Hub says so itself

if not os.path.exists("/dev/nvidiactl"):  # tests/gpu decides by torch; by then another test's library may have imported triton
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _no_gpu():
    """'auto' is the CPU's backend wherever tests run, in processes they start too; tests/gpu shows the device again."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What hasten keeps on disk goes to this run's directory, that of processes the tests start too."""
    os.environ["HASTEN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("HASTEN_CACHE_SIZE", None)
