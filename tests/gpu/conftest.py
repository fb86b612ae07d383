"""Kernels run on the device where torch sees one, else in Triton's interpreter on the CPU; without torch or triton they are skipped."""

import importlib.util
import os

import pytest

SHOWN = os.environ.get("CUDA_VISIBLE_DEVICES")
"""As it was before any test."""
MISSING = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]

if not MISSING:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


class Skipped(pytest.Module):
    """A test file that cannot be imported here."""

    def collect(self):
        pytest.skip(f"{' and '.join(MISSING)} not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return Skipped.from_parent(parent, path=module_path) if MISSING else None


@pytest.fixture(scope="module", autouse=True)
def _shown():
    """The device, which other tests are kept from; torch looks for it again now and then."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if SHOWN is not None:
            patched.setenv("CUDA_VISIBLE_DEVICES", SHOWN)
        yield


@pytest.fixture(scope="session")
def device():
    """Where the tests' tensors lie: the device, or the CPU for the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _interpreter_put_right(monkeypatch, device):
    """On a device nothing is changed."""
    if device.type == "cpu":
        from tests.gpu.interpreter import put_right

        put_right(monkeypatch)
