"""Owns slow forms of what heatmaps are read and written by: loops over rectangles in float64, one image at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_mlpl.banks.heatmaps import CellGrid, HeatmapBank, Slots

Interval = tuple[float, float]


def view_cells(G: int, start: float, length: float, *, mirrored: bool, grid: CellGrid | None) -> list[Interval]:
    """Which part of the full image each cell of a view looks at, along one side."""
    side, stride, first = grid or CellGrid(G, 1.0, 0.5)
    cells = []
    for number in range(G):
        low = 0.0 if number == 0 else min(max(first + stride * number - stride / 2, 0.0), side)
        high = side if number == G - 1 else min(max(first + stride * number + stride / 2, 0.0), side)
        if mirrored:
            low, high = side - high, side - low
        cells.append((start + length * low / side, start + length * high / side))
    return cells


def shared(one: Interval, other: Interval) -> float:
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0]))


def image_cells(W: int) -> list[Interval]:
    return [(number / W, (number + 1) / W) for number in range(W)]


def read_oracle(heatmap: Tensor, crop: Tensor, flipped: bool, G: int, grid: CellGrid | None = None) -> Tensor:
    """One map (W, W) through one crop (4,)."""
    left, top, width, height = crop.double().tolist()
    columns = view_cells(G, left, width, mirrored=flipped, grid=grid)
    rows = view_cells(G, top, height, mirrored=False, grid=grid)
    cells = image_cells(len(heatmap))
    read = torch.full((G, G), torch.nan, dtype=torch.float64)
    for a, row in enumerate(rows):
        for b, column in enumerate(columns):
            total = known = value = 0.0
            for i, y in enumerate(cells):
                for j, x in enumerate(cells):
                    area = shared(row, y) * shared(column, x)
                    total += area
                    if not math.isnan(float(heatmap[i, j])):
                        known += area
                        value += area * float(heatmap[i, j])
            if known >= (0.5 - 1e-9) * total:
                read[a, b] = value / known
    return read


def write_oracle(
    heatmap: Tensor, evidence: Tensor, crop: Tensor, flipped: bool, momentum: float, grid: CellGrid | None = None
) -> tuple[Tensor, Tensor]:
    """One map (W, W) after evidence (G, G), and the covered share of each cell."""
    left, top, width, height = crop.double().tolist()
    G, W = len(evidence), len(heatmap)
    columns = view_cells(G, left, width, mirrored=flipped, grid=grid)
    rows = view_cells(G, top, height, mirrored=False, grid=grid)
    written, covered = heatmap.double().clone(), torch.zeros(W, W, dtype=torch.float64)
    for i, y in enumerate(image_cells(W)):
        for j, x in enumerate(image_cells(W)):
            area = value = 0.0
            for a, row in enumerate(rows):
                for b, column in enumerate(columns):
                    part = shared(row, y) * shared(column, x)
                    area += part
                    value += part * float(evidence[a, b])
            covered[i, j] = area * W * W
            if area == 0:
                continue
            shown, old = value / area, float(heatmap[i, j])
            if math.isnan(old):
                written[i, j] = shown if covered[i, j] >= 0.5 else torch.nan
            else:
                written[i, j] = old + (1 - momentum) * float(covered[i, j]) * (shown - old)
    return written, covered


def slots_oracle(slots: Slots, probs: Tensor, targets: Tensor, *, margin: float) -> list[dict[int, float | None]]:
    """Who holds a slot afterwards, image by image: the running score, or None for who just moved in."""
    found = []
    for classes, scores, own, labels in zip(slots.classes, slots.scores, probs, targets, strict=True):
        held: dict[int, float] = {
            c: s for c, s in zip(classes.tolist(), scores.tolist(), strict=True) if c >= 0 and int(labels[c]) != -1
        }
        new: set[int] = set()
        candidates = [c for c in range(len(own)) if c not in held and int(labels[c]) != -1]
        candidates.sort(key=lambda c: (int(labels[c]) != 1, -float(own[c])))
        for candidate in candidates:
            if len(held) < len(classes):
                held[candidate] = float(own[candidate])
                new.add(candidate)
                continue
            others = [c for c in held if int(labels[c]) != 1]
            if not others:
                break
            weakest = min(others, key=lambda c: held[c])
            if int(labels[candidate]) != 1 and float(own[candidate]) <= held[weakest] + margin:
                break
            del held[weakest]
            new.discard(weakest)
            held[candidate] = float(own[candidate])
            new.add(candidate)
        found.append({c: None if c in new else s for c, s in held.items()})
    return found


def faulty_maps(bank: HeatmapBank) -> list[Callable[[bool], Any]]:
    """Calls that must raise BankError on all ranks: logits for maps, a score that is not a number."""
    num_slots, W = bank.spec.columns["heatmaps"].shape[:2]
    good = Slots(
        torch.arange(num_slots).repeat(2, 1), torch.full((2, num_slots), 0.5), torch.full((2, num_slots, W, W), 0.5),
        torch.ones(2, dtype=torch.int64),
    )  # fmt: skip
    wrong = [good._replace(heatmaps=good.heatmaps - 3.0), good._replace(scores=good.scores * torch.nan)]
    return [
        lambda is_faulty, bad=bad: bank.write_slots(torch.tensor([0, 1]), bad if is_faulty else good) for bad in wrong
    ]
