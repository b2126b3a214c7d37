"""Owns a slow oracle of the spatial regularisation branch: cell by cell, class by class, in float64, differentiable."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dist_mlpl.models.spatial import SpatialBranch

Vectors = dict[tuple[int, int], Tensor]  # one vector a (y, x)


class Printed(NamedTuple):
    """What the equations give."""

    attended: Tensor  # (B, C)
    regularised: Tensor | None  # (B, C)
    attention: Tensor  # (B, C, h, w)
    confidence: Tensor  # (B, C, h, w)
    weighted: Tensor  # (B, C, h, w)


def spatial_oracle(
    branch: SpatialBranch, feature_map: Tensor, *, grid: int | None = None, scale: bool = True
) -> Printed:
    """The branch's equations as printed, with its weights; the graph reaches them and the feature map.

    Args:
        branch: in float64, in training or evaluation mode.
        feature_map: (B, F, h, w) float64.
        grid: cells a side of the mixed maps; None: as many as the feature map's.
        scale: multiply the mixed maps by their number of cells.
    """
    B, _, h, w = feature_map.shape
    maps, net = branch.maps, branch.regularization
    C = maps.attention_weight.shape[0]
    places = [(y, x) for y in range(h) for x in range(w)]
    attention, confidence, weighted = (feature_map.new_zeros(B, C, h, w) for _ in range(3))
    attended = feature_map.new_zeros(B, C)
    for b in range(B):
        hidden = _hidden(branch.hidden, {(y, x): feature_map[b, :, y, x] for y, x in places})
        for c in range(C):
            exponents = {place: (maps.attention_weight[c] @ hidden[place]).exp() for place in places}
            total = sum(exponents.values())
            for y, x in places:
                A = exponents[y, x] / total
                S = maps.confidence_weight[c] @ feature_map[b, :, y, x] + maps.confidence_bias[c]
                attention[b, c, y, x], confidence[b, c, y, x] = A, S
                weighted[b, c, y, x] = A / (1.0 + torch.exp(-S))
                attended[b, c] += A * S
    if net is None:
        return Printed(attended, None, attention, confidence, weighted)
    assert maps.mixing_weight is not None
    high, wide = (h, w) if grid is None else (grid, grid)
    factor = high * wide if scale else 1
    rows = []  # of all images, cell after cell
    for b in range(B):
        for gy in range(high):
            for gx in range(wide):
                part = weighted[b, :, gy * h // high : (gy + 1) * h // high, gx * w // wide : (gx + 1) * w // wide]
                rows.append(_shifted(maps.mixing_weight @ part.sum(dim=(1, 2)) * factor, maps.mixing_bias))
    rows = [row.clamp(min=0) for row in _normalised(net.norm1, rows)]
    rows = [_shifted(net.mixing.weight @ row, net.mixing.bias) for row in rows]
    rows = [row.clamp(min=0) for row in _normalised(net.norm2, rows)]
    images = [_filtered(net.filters, rows[b * high * wide : (b + 1) * high * wide], wide) for b in range(B)]
    images = [image.clamp(min=0) for image in _normalised(net.norm3, images)]
    regularised = torch.stack([net.linear.weight @ image + net.linear.bias for image in images])
    return Printed(attended, regularised, attention, confidence, weighted)


def _hidden(layers: nn.Sequential, cells: Vectors) -> Vectors:
    """A 1x1 and a 3x3 convolution with zeros around the map, each followed by ReLU."""
    first, second = layers[0], layers[2]
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    assert first.bias is not None
    assert second.bias is not None
    inner = {place: (first.weight[:, :, 0, 0] @ cell + first.bias).clamp(min=0) for place, cell in cells.items()}
    outer = {}
    for y, x in cells:
        total = second.bias
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if (y + dy, x + dx) in inner:
                    total = total + second.weight[:, :, dy + 1, dx + 1] @ inner[y + dy, x + dx]
        outer[y, x] = total.clamp(min=0)
    return outer


def _filtered(filters: nn.Module, cells: list[Tensor], wide: int) -> Tensor:
    """Filter number k of map m sees that map alone."""
    weight: Tensor = filters.weight  # type: ignore[assignment]
    num_maps = cells[0].shape[0]
    kernels = weight.shape[0] // num_maps
    results = []
    for number in range(weight.shape[0]):
        seen = number // kernels
        terms = [weight[number, 0, n // wide, n % wide] * cell[seen] for n, cell in enumerate(cells)]
        results.append(torch.stack(terms).sum())
    return _shifted(torch.stack(results), filters.bias)  # type: ignore[arg-type]


def _normalised(norm: nn.Module, rows: list[Tensor]) -> list[Tensor]:
    """BatchNorm over rows, or nothing."""
    if isinstance(norm, nn.Identity):
        return rows
    assert isinstance(norm, nn.BatchNorm1d)
    mean, variance = norm.running_mean, norm.running_var
    if norm.training:
        mean = sum(rows[1:], start=rows[0]) / len(rows)
        variance = sum(((row - mean) ** 2 for row in rows[1:]), start=(rows[0] - mean) ** 2) / len(rows)
    assert mean is not None
    assert variance is not None
    return [(row - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias for row in rows]


def _shifted(values: Tensor, bias: Tensor | None) -> Tensor:
    return values if bias is None else values + bias
