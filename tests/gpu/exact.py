"""bfloat16 in Triton's interpreter as a device has it.

The interpreter keeps bfloat16 as integers of 16 bits: it cuts float32 off where a device rounds half to even, and takes the integers for
numbers in block products and where whole numbers are cast. And numpy's products, which it hands blocks to, sum a row in an order that
depends on where in the block it stands; a device's do not."""

import ml_dtypes
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def exact(monkeypatch, device):
    """Import it into a test file; on a device nothing is changed."""
    if device.type == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder

        monkeypatch.setattr(InterpreterBuilder, "cast_impl", casting(InterpreterBuilder.cast_impl))
        monkeypatch.setattr(InterpreterBuilder, "create_dot", product)


def casting(cast_impl):
    """InterpreterBuilder.cast_impl with casts to bfloat16 that round."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def cast(self, source, kind):
        if kind.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            rounded = source.data.astype(np.float32).astype(ml_dtypes.bfloat16)
            return TensorHandle(rounded.view(np.uint16), kind.scalar)
        return cast_impl(self, source, kind)

    return cast


def product(self, a, b, d, input_precision, max_num_imprecise_acc):
    """d + a · b, k by k; in place of InterpreterBuilder.create_dot."""
    from triton.runtime.interpreter import TensorHandle

    total = d.data.copy()
    for column, row in zip(numbers(a).T, numbers(b)):
        total += column[:, None] * row
    return TensorHandle(total, d.dtype.scalar)


def numbers(handle):
    """A tile as float32."""
    import triton.language as tl

    data = handle.data.view(ml_dtypes.bfloat16) if handle.dtype.scalar == tl.bfloat16 else handle.data
    return data.astype(np.float32)
