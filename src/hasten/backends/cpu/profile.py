"""Where the time of a native step goes."""

import dataclasses

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, slots=True)
class StepProfile:
    """One step of a session, in nanoseconds. A batch longer than a native step takes is played in several, whose times are added.

    ``names`` of the tape's ops in the order they play; ``op_ns`` [ops, threads] is each thread's time inside each op; ``tape_ns`` is the
    native step as a whole, with its barriers; ``step_ns`` the session's, with the work that Python does before and after."""

    names: tuple[str, ...]
    op_ns: NDArray[np.int64]
    tape_ns: int
    step_ns: int

    @property
    def kernel_ns(self) -> int:
        """What the thread that worked longest spent in kernels."""
        return int(self.op_ns.sum(axis=0).max())

    @property
    def overhead_ns(self) -> int:
        """What the step costs outside kernels: barriers, waking threads, filling batch arrays, Python."""
        return self.step_ns - self.kernel_ns
