"""Owns the mixing of features of unknown classes with those of known positives: both blends, and their loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_mlpl.labels import UNKNOWN


class Blend(NamedTuple):
    """Class features, some of which are mixtures, and their targets."""

    features: Tensor  # (B, C, D)
    targets: Tensor  # (B, C) float: 1 present, -1 absent, 0 unknown, a probability in [0, 1] where blended
    is_counted: Tensor  # (B, C) bool, True for entries that the loss counts


class Coefficient(nn.Module):
    """The learnable share of its own feature that an image keeps in a mixture; a module, so that ZeRO-3 gathers it.

    Args:
        start: initial share, in (0, 1).
        is_clamped: True: the parameter is the share itself, clamped to [0, 1]. False: the share is its sigmoid, which
            reaches neither end: at 1 nothing would be blended, and no gradient could change that.

    Source: SARB's code, whose parameter is clamped in place.
    Differs: clamped on reading, with the gradient passed on unchanged; under ZeRO no parameter may change in a forward.
    """

    def __init__(self, start: float, *, is_clamped: bool) -> None:
        super().__init__()
        self.is_clamped = is_clamped
        share = torch.tensor([start])
        self.share = nn.Parameter(share if is_clamped else share.logit())

    def forward(self, features: Tensor) -> Tensor:
        """Return the share, (1,), in the type of `features`."""
        share = self.share.to(features.dtype)
        if not self.is_clamped:
            return share.sigmoid()
        return share + (share.clamp(0.0, 1.0) - share).detach()


def lendable(is_unknown: Tensor, is_source: Tensor, *, group_size: int) -> Tensor:
    """Find the unknown labels that an image's partner can complete; partners are first and last of a group and so on.

    Args:
        is_unknown: (B, C) bool, unknown labels of valid images; B is a multiple of `group_size`.
        is_source: (B, C) bool, known positives of valid images.
        group_size: number of consecutive images that may interact; the middle one of an odd group is its own partner.

    Returns:
        (B, C) bool.

    Source: SARB's code, which mirrors the whole batch.
    Differs: inside groups, so that partners do not depend on ranks or micro-batches.
    """
    rows = torch.arange(len(is_source), device=is_source.device)
    return is_unknown & is_source[_partner(rows, group_size)]


def instance_blend(
    features: Tensor,
    targets: Tensor,
    is_blended: Tensor,
    coefficient: Tensor,
    *,
    group_size: int,
    faithful: bool = False,
) -> Blend:
    """Mix features of unknown classes with the partner's, where the partner is known to show the class.

    Args:
        features: (B, C, D), before the graph.
        targets: (B, C) int8 in {-1, 0, 1}.
        is_blended: (B, C) bool, see `lendable`.
        coefficient: (1,) alpha in [0, 1], the share of the image's own feature.
        group_size: see `lendable`.
        faithful: see `_blended`.

    Source: SARB, section "instance-level representation blending"; IPRB of DSRB is the same, since of the maps it mixes
        only the sum over cells is used.
    """
    rows, classes = is_blended.nonzero(as_tuple=True)  # (n,) each
    sources = features[_partner(rows, group_size), classes]
    return _blended(features, targets, rows, classes, sources, coefficient, faithful=faithful)


def prototype_blend(
    features: Tensor,
    targets: Tensor,
    rows: Tensor,
    classes: Tensor,
    prototypes: Tensor,
    coefficient: Tensor,
    *,
    faithful: bool = False,
) -> Blend:
    """Mix chosen features with prototypes of their class, which are constants.

    Args:
        features: (B, C, D), before the graph.
        targets: (B, C) int8 in {-1, 0, 1}.
        rows, classes: (n,) int64, the chosen entries, each at most once.
        prototypes: (n, D).
        coefficient: (1,) beta in [0, 1], the share of the image's own feature.
        faithful: see `_blended`.

    Source: SARB, section "prototype-level representation blending"; PPRB of DSRB differs only in its prototypes.
    """
    return _blended(features, targets, rows, classes, prototypes.to(features), coefficient, faithful=faithful)


def _partner(rows: Tensor, group_size: int) -> Tensor:
    """(n,) the rows of the partners of `rows` (n,): their mirror images in their groups."""
    return rows + (group_size - 1 - 2 * (rows % group_size))


def _blended(
    features: Tensor,
    targets: Tensor,
    rows: Tensor,
    classes: Tensor,
    sources: Tensor,
    coefficient: Tensor,
    *,
    faithful: bool,
) -> Blend:
    """Put mixtures with sources (n, D) at entries (rows, classes).

    The target of a mixture is the share of its source, a constant: otherwise the coefficient could lower the loss by
    changing the label instead of the feature. With `faithful`, as in the code, the target has a gradient, and a target
    of exactly 0 is an unknown label.
    """
    mixed = coefficient * features[rows, classes] + (1 - coefficient) * sources  # (n, D)
    believed = (1 - coefficient).expand(len(rows))
    soft = targets.to(coefficient.dtype).index_put((rows, classes), believed if faithful else believed.detach())
    is_counted = targets != UNKNOWN
    if faithful:
        is_counted = soft.detach() != 0
    else:
        is_counted[rows, classes] = True
    return Blend(features.index_put((rows, classes), mixed), soft, is_counted)


def counted_bce(logits: Tensor, targets: Tensor, is_counted: Tensor) -> Tensor:
    """() sum of binary cross-entropy over counted entries, with soft targets where they are positive.

    Args:
        logits: (B, C).
        targets: (B, C) float; negative: absent; in [0, 1]: a probability.
        is_counted: (B, C) bool.
    """
    x = logits[is_counted]
    return F.binary_cross_entropy_with_logits(x, targets[is_counted].clamp(min=0).to(x.dtype), reduction="sum")


def quadrant(cell: Tensor, *, height: int, width: int) -> Tensor:
    """The quadrant of the map that a cell lies in, 2 * (is in the lower half) + (is in the right half), int64.

    The upper half has height // 2 rows, the left half width // 2 columns.

    Args:
        cell: any shape, int64, row * width + column.
        height: rows of the map.
        width: columns of the map.
    """
    row, column = cell.div(width, rounding_mode="floor"), cell % width
    return 2 * (row >= height // 2).long() + (column >= width // 2).long()
