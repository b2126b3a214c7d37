"""Owns slow oracles of SARB's and DSRB's blends: loops over images, classes and cells, as their papers print them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Mixed(NamedTuple):
    """Features, soft targets, and which entries a loss counts."""

    features: Tensor  # (B, C, D)
    targets: Tensor  # (B, C)
    is_counted: Tensor  # (B, C) bool


def mix_with_partners(
    features: Tensor, targets: Tensor, human: Tensor, valid: Tensor, alpha: Tensor, *, group_size: int
) -> Mixed:
    """ILRB: image n of a group with its mirror image, unknown label by unknown label."""
    B, C, _ = features.shape
    rows, soft, counted = [], targets.to(features.dtype).clone(), targets != 0
    for n in range(B):
        first = n // group_size * group_size
        m = first + group_size - 1 - (n - first)
        row = []
        for c in range(C):
            lends = bool(valid[m]) and bool(valid[n]) and int(targets[n, c]) == 0 and int(human[m, c]) == 1
            row.append(alpha * features[n, c] + (1 - alpha) * features[m, c] if lends else features[n, c])
            if lends:
                soft[n, c], counted[n, c] = 1 - float(alpha.detach()), True
        rows.append(torch.stack(row))
    return Mixed(torch.stack(rows), soft, counted)


def mix_with_prototypes(
    features: Tensor, targets: Tensor, chosen: dict[tuple[int, int], Tensor], beta: Tensor
) -> Mixed:
    """PLRB: chosen (image, class) entries with a prototype (D,) each."""
    B, C, _ = features.shape
    soft, counted = targets.to(features.dtype).clone(), targets != 0
    rows = []
    for n in range(B):
        row = []
        for c in range(C):
            if (n, c) in chosen:
                row.append(beta * features[n, c] + (1 - beta) * chosen[n, c])
                soft[n, c], counted[n, c] = 1 - float(beta.detach()), True
            else:
                row.append(features[n, c])
        rows.append(torch.stack(row))
    return Mixed(torch.stack(rows), soft, counted)


def quadrant_of_peak(evidence: Tensor) -> int:
    """Of a map (h, w), halves of h // 2 and w // 2 cells and the rest: rows and columns maximised apart, as coded."""
    h, w = evidence.shape
    row = int(evidence.amax(dim=1).argmax())
    column = int(evidence.amax(dim=0).argmax())
    return 2 * int(row >= h // 2) + int(column >= w // 2)


def weighted_maps(attention: Tensor, cells: Tensor) -> Tensor:
    """(B, C, h, w, D) of attention (B, C, h, w) and cells (B, D, h, w): what nobody should build."""
    return attention[..., None] * cells.permute(0, 2, 3, 1)[:, None]


def quadrant_maps(maps: Tensor, targets: Tensor, quadrants: Tensor, *, counts_start: bool = False) -> Tensor:
    """(C, 4, h, w, D) mean maps of known positives (N, C, h, w, D) by quadrant of the peak (N, C).

    An empty quadrant holds the mean over all; with `counts_start`, as coded, a mean counts the zeros it starts from.
    """
    N, C = targets.shape
    found = maps.new_zeros((C, 4, *maps.shape[2:]))
    for c in range(C):
        everything = [maps[n, c] for n in range(N) if int(targets[n, c]) == 1]
        for q in range(4):
            here = [maps[n, c] for n in range(N) if int(targets[n, c]) == 1 and int(quadrants[n, c]) == q]
            if here:
                found[c, q] = torch.stack(here).sum(dim=0) / (len(here) + counts_start)
            elif everything:
                found[c, q] = torch.stack(everything).mean(dim=0)
    return found


def soft_bce(logits: Tensor, targets: Tensor, is_counted: Tensor) -> Tensor:
    """Sum over counted entries of -(t log s + (1 - t) log(1 - s)) with t in [0, 1], absent being 0; by a loop."""
    total = logits.new_zeros(())
    for n, c in is_counted.nonzero().tolist():
        t, s = max(0.0, float(targets[n, c])), torch.sigmoid(logits[n, c])
        total = total - (t * torch.log(s) + (1 - t) * torch.log(1 - s))
    return total


def lloyd(features: Sequence[Tensor], centres: Tensor) -> Tensor:
    """One step of k-means: (P, D) means of the features nearest to each centre, which stays where it has none."""
    groups: list[list[Tensor]] = [[] for _ in range(len(centres))]
    for feature in features:
        groups[int((centres - feature).square().sum(dim=1).argmin())].append(feature)
    return torch.stack([torch.stack(g).mean(dim=0) if g else c for g, c in zip(groups, centres, strict=True)])
