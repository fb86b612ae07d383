"""The native backend: Programs compiled to a tape of kernels for this machine's instruction sets. Torch is never imported."""

from hasten.backends.cpu.backend import CpuBackend, CpuSession, native_program
from hasten.backends.cpu.compile import unsupported_ops

__all__ = ["CpuBackend", "CpuSession", "native_program", "unsupported_ops"]
