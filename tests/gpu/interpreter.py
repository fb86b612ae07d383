"""What Triton's interpreter does with bfloat16, fp8 and block products, put right, so that kernels are tested as they stand.

It keeps bfloat16 as integers of 16 bits, takes them for integers in a block product and where whole numbers are cast, and cuts float32
off where a device rounds to nearest even. Float32 on its way to fp8 it rounds half away from zero, and below the least exponent wrongly;
fp8 in a block product it takes for float16, without NaN. And it hands products to numpy, whose sums of floats depend on how many
columns there are; a device's do not: an element of a tile is summed over K in one order, whatever the tile's other sizes. Of what a
kernel sums in which order only such a product can tell.

It also puts its own functions into the language anew wherever a kernel calls another function, which takes longer than most functions;
here it does so where they are not there."""

import functools

import ml_dtypes
import numpy as np


def put_right(monkeypatch):
    """Products, casts and calls of the interpreter, until ``monkeypatch`` is undone."""
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    monkeypatch.setattr(InterpretedFunction, "__call__", called)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", product)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", casting(InterpreterBuilder.cast_impl))
    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", narrowing(InterpreterBuilder.create_fp_to_fp))


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


def narrowing(create_fp_to_fp):
    """InterpreterBuilder.create_fp_to_fp, but of float32 to fp8 to nearest even."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def narrow(self, source, kind, rounding):
        if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.float8e4nv):
            return create_fp_to_fp(self, source, kind, rounding)
        with np.errstate(invalid="ignore"):
            return TensorHandle(source.data.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), tl.float8e4nv)

    return narrow


def called(self, *args, **kwargs):
    """In place of InterpretedFunction.__call__: a function called by a kernel."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    if any(is_builtin(language.load) for language in _languages(self.fn)):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


@functools.cache
def _languages(fn):
    """What the function knows the language as."""
    import triton.language as tl

    return [each for each in fn.__globals__.values() if each is tl or each is tl.core]


def _numbers(handle):
    """A tile's numbers as numpy has them."""
    import triton.language as tl

    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    if handle.dtype.scalar == tl.float8e4nv:
        return handle.data.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return handle.data
