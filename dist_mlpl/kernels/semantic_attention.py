"""Owns the attention of every class over the cells of an image: a chunked form for all devices, a fused one for CUDA.

Most of the work is B * L * C * k hyperbolic tangents. They are never all in memory: both forms compute them a block at
a time, in the forward and again in the backward pass. The rest, a softmax over (B, C, L) scores and one product with
the cells, has k times fewer numbers and uses torch's own operations in both forms.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers in a block of tangents: on a CPU a block and what is computed from it stay in a core's cache.
_CPU_ENTRIES = 2**17
_DEVICE_ENTRIES = 2**24

Score = Callable[[Tensor, Tensor, Tensor], Tensor]  # projected (B, L, k), keys (C, k), query (k,) to scores (B, C, L)


class Attended(NamedTuple):
    """The result of `semantic_attention`."""

    class_features: Tensor  # (B, C, D), differentiable, in the cells' type or autocast's
    attention: Tensor  # (B, C, L) float32 (float64 for such inputs), detached; sums to 1 over the cells


def semantic_attention(cells: Tensor, keys: Tensor, projection: Tensor, query: Tensor) -> Attended:
    """Compute one feature per class: the sum of cells weighted by how much the class attends to each.

    u = W1 cell; s_lc = query . tanh(u_l * key_c); a = softmax of s over the cells; feature_c = sum_l a_lc cell_l.

    The fused form is used on CUDA, unless cells are float64 or there is a `fused_obstacle`; the chunked form elsewhere.
    Scores and softmax are float32 or wider under autocast too; both products run in autocast's type.

    Args:
        cells: (B, L, D), any floating type.
        keys: (C, k), W2 e of the class vectors e.
        projection: (k, D), W1.
        query: (k,), w4 @ W3: no activation lies between these two layers, and their biases cancel in the softmax.

    Source: SSGRL (Chen et al., ICCV 2019) and SST (Chen et al., AAAI 2022), semantic decoupling.
    """
    is_fused = cells.is_cuda and cells.dtype != torch.float64 and fused_obstacle() is None
    return (fused_attention if is_fused else chunked_attention)(cells, keys, projection, query)


@functools.cache
def fused_obstacle() -> str | None:
    """Why the fused form cannot be built on this machine; None where it can. Triton compiles its launchers in C."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton finds no C compiler (gcc, clang, or the one that CC names)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"triton finds no {header} (install Python's development files)"


def attention_notes() -> list[str]:
    """Notes to show before a run: one if there is a CUDA device but the fused form cannot be built, else none."""
    obstacle = fused_obstacle() if torch.cuda.is_available() else None
    return [] if obstacle is None else [f"semantic attention runs without its fused kernels, slower: {obstacle}"]


def chunked_attention(cells: Tensor, keys: Tensor, projection: Tensor, query: Tensor) -> Attended:
    """Compute `semantic_attention` by torch's own operations, on any device, in float32 or float64."""
    return _attend(_ChunkedScores.apply, cells, keys, projection, query)


def fused_attention(cells: Tensor, keys: Tensor, projection: Tensor, query: Tensor) -> Attended:
    """Compute `semantic_attention` by Triton kernels, which keep each tangent in a register, in float32.

    Differs: for float16 and bfloat16 inputs tanh is the device's own approximation (relative error 2**-11).

    Raises:
        ImportError: triton is not installed.
    """
    from dist_mlpl.kernels.triton_scores import FusedScores

    return _attend(FusedScores.apply, cells, keys, projection, query)


def _attend(score: Score, cells: Tensor, keys: Tensor, projection: Tensor, query: Tensor) -> Attended:
    projected = F.linear(cells, projection)  # (B, L, k)
    attention = score(projected, keys, query).softmax(dim=-1)  # (B, C, L)
    return Attended(attention.to(cells.dtype) @ cells, attention.detach())


class _ChunkedScores(torch.autograd.Function):
    """s_bcl = query . z, z = tanh(projected_bl * key_c), in blocks of cells and classes; backward recomputes z."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, keys: Tensor, query: Tensor) -> Tensor:
        ctx.save_for_backward(projected, keys, query)
        u, t, q = _flat(projected, keys, query)
        scores = u.new_empty(len(u), len(t))  # (B * L, C)
        with torch.autocast(u.device.type, enabled=False):
            for rows, columns in _blocks(u, t):
                z = (u[rows, None] * t[columns]).tanh_()  # (r, c, k)
                scores[rows, columns] = z @ q
        return scores.unflatten(0, projected.shape[:2]).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors
        u, t, q = _flat(*inputs)
        slopes = grad_outputs[0].transpose(1, 2).flatten(0, 1)  # (B * L, C)
        u_slope, t_slope, q_slope = torch.zeros_like(u), torch.zeros_like(t), torch.zeros_like(q)
        with torch.autocast(u.device.type, enabled=False):
            for rows, columns in _blocks(u, t):
                z = (u[rows, None] * t[columns]).tanh_()  # (r, c, k)
                slope = slopes[rows, columns].contiguous()  # (r, c)
                q_slope += slope.flatten() @ z.flatten(0, 1)
                inner = z.square_().neg_().add_(1).mul_(slope.unsqueeze(-1))  # gradient by u * t, without its factor q
                u_slope[rows] += (inner * t[columns]).sum(dim=1)
                t_slope[columns] += inner.mul_(u[rows, None]).sum(dim=0)
        found = (u_slope.mul_(q).view(inputs[0].shape), t_slope.mul_(q), q_slope)
        return tuple(slope.to(given.dtype) for slope, given in zip(found, inputs, strict=True))


def _flat(projected: Tensor, keys: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Projected cells (B * L, k), keys (C, k) and query (k,), in float32 or wider."""
    precise = torch.promote_types(projected.dtype, torch.float32)
    return projected.flatten(0, 1).to(precise), keys.to(precise), query.to(precise)


def _blocks(u: Tensor, t: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut cells (n, k) and classes (C, k) into pairs of slices that bound the memory of a block."""
    is_cached = u.device.type == "cpu" and type(u) is Tensor  # fake tensors hold shapes only: see tools/plan.py
    entries = max(1, (_CPU_ENTRIES if is_cached else _DEVICE_ENTRIES) // u.shape[1])
    num_columns = max(1, min(len(t), int(entries**0.5)))
    num_rows = max(1, min(len(u), entries // num_columns))
    for row in range(0, len(u), num_rows):
        for column in range(0, len(t), num_columns):
            yield slice(row, row + num_rows), slice(column, column + num_columns)
