"""Owns the Triton kernels of the semantic attention's scores; imported only where they are used.

A program keeps its tile of tangents in registers and loads only one vector of each operand per tile, so that the rate
of the tanh unit is the bound. No atomics: every sum has a fixed order, and the same inputs give the same bits.

Under TRITON_INTERPRET=1, set before this module is imported, the kernels run on CPU tensors.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable

CELLS, CLASSES = 64, 32  # a tile of scores
ROWS, WIDTH = 32, 64  # a tile of gradients
_PROGRAMS = 1024  # programs wanted, where the work allows: a few for each multiprocessor of a large device
_SHORTEST = 64  # a sum is not cut into parts of fewer terms to get more programs


@triton.jit
def add(x, y):  # type: ignore[no-untyped-def]
    """Add, for the sum of a tile's rows: triton's own `sum` and `zeros` fail if the interpreter is switched on late."""
    return x + y


@triton.jit
def tanh(x, IS_FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """tanh of float32: the device's own approximation if IS_FAST, else with float32's absolute error near 1."""
    if IS_FAST:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def score_kernel(  # type: ignore[no-untyped-def]
    projected, keys, query, scores, num_cells, num_classes, width,
    CELLS: tl.constexpr, CLASSES: tl.constexpr, IS_FAST: tl.constexpr,
):  # fmt: skip
    """scores (C, n) = sum_k query_k tanh(keys_kc projected_kn) of `projected` (k, n), `keys` (k, C), `query` (k,)."""
    cells = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    classes = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    is_cell, is_class = cells < num_cells, classes < num_classes
    projected += cells
    keys += classes
    total = tl.full([CLASSES, CELLS], 0.0, dtype=tl.float32)
    for _ in range(width):
        u = tl.load(projected, mask=is_cell, other=0.0).to(tl.float32)
        t = tl.load(keys, mask=is_class, other=0.0).to(tl.float32)
        q = tl.load(query).to(tl.float32)
        total += q * tanh(t[:, None] * u[None, :], IS_FAST)
        projected += num_cells
        keys += num_classes
        query += 1
    places = classes[:, None].to(tl.int64) * num_cells + cells[None, :]
    tl.store(scores + places, total, mask=is_class[:, None] & is_cell[None, :])


@triton.jit
def slope_kernel(  # type: ignore[no-untyped-def]
    own, others, query, slopes, own_slope, query_slope, num_rows, num_others, others_each, width,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, IS_FAST: tl.constexpr, HAS_QUERY: tl.constexpr,
):  # fmt: skip
    """Gradients with respect to one operand of the scores, cells or classes, which enter them symmetrically.

    own_slope (S, R, k) = query_k sum_j slopes_jr (1 - z_jrk^2) others_jk with z = tanh(own_rk others_jk), j running
    over each of the S parts of the J others. query_slope (S, blocks of rows, k) = sum_jr slopes_jr z_jrk, r running
    over each block.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    part = tl.program_id(2).to(tl.int64)
    is_row, is_column = rows < num_rows, columns < width
    is_inside = is_row[:, None] & is_column[None, :]
    places = rows[:, None].to(tl.int64) * width + columns[None, :]
    x = tl.load(own + places, mask=is_inside, other=0.0).to(tl.float32)
    first = tl.program_id(2) * others_each
    others += part * others_each * width + columns
    slopes += part * others_each * num_rows + rows
    total = tl.full([ROWS, WIDTH], 0.0, dtype=tl.float32)
    query_total = tl.full([ROWS, WIDTH], 0.0, dtype=tl.float32)
    for _ in range(first, tl.minimum(first + others_each, num_others)):
        y = tl.load(others, mask=is_column, other=0.0).to(tl.float32)[None, :]
        slope = tl.load(slopes, mask=is_row, other=0.0).to(tl.float32)[:, None]
        z = tanh(x * y, IS_FAST)
        total += (slope * y) * (1.0 - z * z)
        if HAS_QUERY:
            query_total += slope * z
        others += width
        slopes += num_rows
    q = tl.load(query + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    tl.store(own_slope + part * num_rows * width + places, total * q, mask=is_inside)
    if HAS_QUERY:
        block = (part * tl.num_programs(0) + tl.program_id(0)) * width + columns
        tl.store(query_slope + block, tl.reduce(query_total, 0, add), mask=is_column)


class FusedScores(torch.autograd.Function):
    """s_bcl = query . z, z = tanh(projected_bl * key_c), float32; z is computed twice more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, keys: Tensor, query: Tensor) -> Tensor:
        ctx.save_for_backward(projected, keys, query)
        u = projected.flatten(0, 1)  # (n, k)
        (n, width), num_classes = u.shape, len(keys)
        scores = u.new_empty(num_classes, n, dtype=torch.float32)
        grid = (triton.cdiv(n, CELLS), triton.cdiv(num_classes, CLASSES))
        score_kernel[grid](
            u.t().contiguous(), keys.t().contiguous(), query.contiguous(), scores, n, num_classes, width,
            CELLS=CELLS, CLASSES=CLASSES, IS_FAST=_is_fast(u),
        )  # fmt: skip
        return scores.unflatten(1, projected.shape[:2]).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        inputs = projected, keys, query = ctx.saved_tensors
        u = projected.flatten(0, 1).contiguous()
        slopes = grad_outputs[0].transpose(0, 1).flatten(1).contiguous()  # (C, n)
        u_slope, q_slope = _slope(u, keys.contiguous(), query.contiguous(), slopes)
        keys_slope, _ = _slope(keys.contiguous(), u, query.contiguous(), slopes.t().contiguous(), has_query=False)
        found = (u_slope.view(projected.shape), keys_slope, q_slope)
        return tuple(slope.to(given.dtype) for slope, given in zip(found, inputs, strict=True))


def _slope(
    own: Tensor, others: Tensor, query: Tensor, slopes: Tensor, *, has_query: bool = True
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to `own` (R, k) and `query` (k,), from those of the scores, `slopes` (J, R).

    Args:
        own: (R, k), cells or classes.
        others: (J, k), the other operand.
        query: (k,).
        slopes: (J, R) gradient with respect to the scores.
        has_query: False: the second result is zeros.
    """
    (num_rows, width), num_others = own.shape, len(others)
    blocks = triton.cdiv(num_rows, ROWS), triton.cdiv(width, WIDTH)
    num_parts = min(triton.cdiv(_PROGRAMS, blocks[0] * blocks[1]), triton.cdiv(num_others, _SHORTEST))
    others_each = triton.cdiv(num_others, num_parts)
    num_parts = triton.cdiv(num_others, others_each)
    own_slope = own.new_empty(num_parts, num_rows, width, dtype=torch.float32)
    query_slope = own.new_zeros(num_parts, blocks[0], width, dtype=torch.float32)
    slope_kernel[(*blocks, num_parts)](
        own, others, query, slopes, own_slope, query_slope, num_rows, num_others, others_each, width,
        ROWS=ROWS, WIDTH=WIDTH, IS_FAST=_is_fast(own), HAS_QUERY=has_query,
    )  # fmt: skip
    return own_slope.sum(dim=0), query_slope.sum(dim=(0, 1))


def _is_fast(operand: Tensor) -> bool:
    """True where the device has a tanh instruction and operands are too coarse for its error to matter."""
    is_coarse = operand.dtype in (torch.float16, torch.bfloat16)
    return (
        is_coarse
        and operand.is_cuda
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(operand.device) >= (7, 5)
    )
