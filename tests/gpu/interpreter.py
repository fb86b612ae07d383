"""What Triton's interpreter does with bfloat16 and with block products, put right, so that kernels are tested as they stand.

It keeps bfloat16 as integers of 16 bits, takes them for integers in a block product and where whole numbers are cast, and cuts float32
off where a device rounds to nearest even. And it hands products to numpy, whose sums of floats depend on how many columns there are; a
device's do not: an element of a tile is summed over K in one order, whatever the tile's other sizes. Of what a kernel sums in which
order only such a product can tell. Calls of one device function from another cost a search through all of triton's names each; here one
search a launch."""

import ml_dtypes
import numpy as np


def put_right(monkeypatch):
    """Products and casts of the interpreter, until ``monkeypatch`` is undone."""
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_dot", product)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", casting(InterpreterBuilder.cast_impl))
    launch, ready = GridExecutor.__call__, set()

    def launched(self, *arguments, **named):
        ready.clear()
        launch(self, *arguments, **named)

    def called(self, *arguments, **named):
        if (module := id(self.fn.__globals__)) not in ready:
            interpreter._patch_lang(self.fn)
            ready.add(module)
        return self.rewrite()(*arguments, **named)

    monkeypatch.setattr(GridExecutor, "__call__", launched)
    monkeypatch.setattr(InterpretedFunction, "__call__", called)


def product(self, a, b, d, input_precision, max_num_imprecise_acc):
    """d + a · b, k by k; in place of InterpreterBuilder.create_dot."""
    from triton.runtime.interpreter import TensorHandle

    left, right = (_numbers(each) for each in (a, b))
    if d.data.dtype == np.int32:
        exact = left.astype(np.float64) @ right.astype(np.float64)
        return TensorHandle(d.data + exact.astype(np.int32), d.dtype.scalar)
    left, right, total = left.T.astype(d.data.dtype), right.astype(d.data.dtype), d.data.copy()
    with np.errstate(invalid="ignore"):
        for k in range(len(left)):
            total += left[k, :, None] * right[k]
    return TensorHandle(total, d.dtype.scalar)


def casting(cast_impl):
    """InterpreterBuilder.cast_impl, but to bfloat16 by way of float32 and to nearest even."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def cast(self, source, kind):
        if kind.scalar != tl.bfloat16 or source.dtype.scalar not in {tl.float32, tl.int8, tl.int16, tl.int32}:
            return cast_impl(self, source, kind)
        nearest = source.data.astype(np.float32).astype(ml_dtypes.bfloat16)
        return TensorHandle(nearest.view(np.uint16), tl.bfloat16)

    return cast


def _numbers(handle):
    """A tile's numbers as numpy has them."""
    import triton.language as tl

    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data
