"""What every kernel shares: tensors with their strides, sizes, loads, stores and dot products."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
_LONGEST_STRIDE = 2**31 // (2 * 256)  # of rows and of columns together


class Strided(NamedTuple):
    """A tensor ``[B, T, H, D]`` with its strides in elements, passed to a kernel as one argument.

    Triton compiles a variant for strides that are 1 or multiples of 16, which is what makes loads
    wide, and takes any others without a copy.
    """

    ptr: Any
    batch: int
    time: int
    head: int
    dim: int | None  # None for a tensor [B, T, H]


def strided(x: Any) -> Strided:
    """Bundles a tensor ``[B, T, H, D]`` or ``[B, T, H]`` with its strides.

    Offsets inside a tile of up to 256 rows are 32 bits wide, which saves registers. Where strides
    are too long for that, as in a view of time across a large image, the tensor is copied.
    """
    if max((x.stride(1), *x.stride()[3:])) > _LONGEST_STRIDE:
        x = x.contiguous()
    return Strided(x, *x.stride(), *(None,) * (4 - x.dim()))


def odd(size: int) -> int:
    """A size on its way into a kernel, which takes it apart with ``size >> 1``.

    Triton compiles a kernel anew for arguments that are 1 or multiples of 16. Lengths and batch
    sizes change from call to call and gain nothing by it, so they travel as ``2 size + 1``.
    """
    return 2 * size + 1


@triton.jit
def locate(x, i_b, i_h, first):
    """The address of row ``first`` of one batch entry and head of a ``Strided``, in 64 bits."""
    start = tl.cast(i_b, tl.int64) * x.batch + tl.cast(i_h, tl.int64) * x.head
    return x.ptr + start + tl.cast(first, tl.int64) * x.time


@triton.jit
def load_rows(p_x, x, rows, live, D: tl.constexpr, BD: tl.constexpr):
    """Loads ``[rows, BD]`` from address ``p_x``, zero where not ``live`` and beyond ``D``.

    ``live`` is a mask over the rows, or ``None`` where all of them exist.
    """
    cols = tl.arange(0, BD)
    p_tile = p_x + rows[:, None] * x.time + cols[None, :] * x.dim
    if D == BD:
        if live is None:
            b_x = tl.load(p_tile)
        else:
            b_x = tl.load(p_tile, mask=live[:, None], other=0.0)
    else:
        if live is None:
            b_x = tl.load(p_tile, mask=cols[None, :] < D, other=0.0)
        else:
            b_x = tl.load(p_tile, mask=live[:, None] & (cols[None, :] < D), other=0.0)
    return b_x


@triton.jit
def load_slice(p_x, x, rows, live, first, D: tl.constexpr, BD: tl.constexpr):
    """Loads the columns ``[first, first + BD)`` of ``[rows, D]``, zero where there is nothing."""
    cols = first + tl.arange(0, BD)
    p_tile = p_x + rows[:, None] * x.time + cols[None, :] * x.dim
    mask = live[:, None]
    if D % BD != 0:
        mask = mask & (cols[None, :] < D)
    return tl.load(p_tile, mask=mask, other=0.0)


@triton.jit
def store_slice(p_x, x, rows, live, b_x, first, D: tl.constexpr, BD: tl.constexpr):
    """Stores ``b_x [rows, BD]`` to the columns from ``first`` on, rounded once."""
    cols = first + tl.arange(0, BD)
    p_tile = p_x + rows[:, None] * x.time + cols[None, :] * x.dim
    mask = live[:, None]
    if D % BD != 0:
        mask = mask & (cols[None, :] < D)
    tl.store(p_tile, cast(b_x, x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(p_x, x, rows, live, b_x, D: tl.constexpr, BD: tl.constexpr):
    """Stores ``b_x [rows, BD]`` to address ``p_x``, rounded once to the dtype of ``x``."""
    cols = tl.arange(0, BD)
    p_tile = p_x + rows[:, None] * x.time + cols[None, :] * x.dim
    mask = live[:, None] & (cols[None, :] < D)
    tl.store(p_tile, cast(b_x, x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """``x`` rounded to the nearest number of ``dtype``, in the interpreter too."""
    if INTERPRETED and x.dtype == tl.float32 and dtype == tl.bfloat16:  # it cuts bits off
        x = round_bf16(x)
    return x.to(dtype)


@triton.jit
def round_bf16(x):
    """float32 rounded to the nearest numbers that bf16 has."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def power(x, NATURAL: tl.constexpr):
    """``exp(x)``, or ``2 ** x``, which saves a product per element.

    Logits to base 2 are multiplied by a rounded log2(e). A large logit of float32 inputs would
    notice; half precision does not.
    """
    if NATURAL:
        y = tl.exp(x)
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def dot(a, b, acc=None):
    """``acc + a @ b`` in float32; float32 operands are not rounded to TF32."""
    if INTERPRETED:  # the interpreter multiplies bf16 by its bits
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def product(a, b, like):
    """``a @ b`` in float32, of computed operands in a precision that suits the dtype of ``like``.

    ``like`` is a ``Strided`` input. bf16 operands go with bf16 inputs. With float16 inputs they are
    cut to TF32, which has as many digits and cannot overflow; with float32 inputs not at all.
    """
    dtype: tl.constexpr = like.ptr.dtype.element_ty
    PRECISION: tl.constexpr = "tf32" if dtype == tl.float16 else "ieee"
    return tl.dot(_operand(a, dtype), _operand(b, dtype), input_precision=PRECISION)


@triton.jit
def _operand(x, dtype: tl.constexpr):
    """``x`` for a tensor core; in the interpreter, float32 with the digits that one would see."""
    if INTERPRETED:
        x = x.to(tl.float32)
        if dtype == tl.bfloat16:
            x = round_bf16(x)
        elif dtype == tl.float16:
            x = (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
    elif dtype == tl.bfloat16:
        x = x.to(tl.bfloat16)
    else:
        x = x.to(tl.float32)
    return x
