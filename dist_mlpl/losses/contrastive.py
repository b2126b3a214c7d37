"""Owns the contrastive loss: a class's features in two images are pulled together or pushed apart by their labels."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_mlpl.labels import ABSENT, PRESENT, UNKNOWN

_EPSILON = 1e-9  # lower bound of a feature's length when it is divided by it


def contrastive_loss(
    class_features: Tensor, targets: Tensor, *, group_size: int, keep_negatives_alone: bool = False
) -> Tensor:
    """Weighted sum, over classes and over pairs of images of a group, of 1 - s (both present) or 1 + s (otherwise).

    s is the cosine of the class's features in the two images; both labels must be known. In a group with `a` pairs of
    present labels, the paper's code keeps 2 a pairs of absent labels drawn at random and the `a` of largest loss, and
    likewise of the mixed pairs. Here all pairs share the weight of the drawn ones evenly, which is the draw's expected
    value: it needs no random numbers and is less noisy.

    Args:
        class_features: (B, C, D), any floating type; computed in float32, or float64 if given so.
        targets: (B, C) int8 in {-1, 0, 1}; B is a multiple of `group_size`.
        group_size: number of consecutive images that are paired with one another.
        keep_negatives_alone: True: a group without a pair of present labels counts all its other pairs, as in the
            paper's code, whose loss then jumps; False: it counts none.

    Returns:
        () non-negative, connected to `class_features` whatever the labels. The method's loss is this sum divided by the
        `num_contrasted` of the global batch.

    Source: SST (Chen et al., AAAI 2022), and its code for the pairs of absent labels and the sampling.
    Differs: pairs are formed in groups of images, not in a rank's batch; the draw is replaced by its expected value;
        see `keep_negatives_alone`.
    """
    in_groups = targets.unflatten(0, (-1, group_size))  # (n, g, C)
    present_pairs, other_pairs = _pair_counts(in_groups)  # (n,), (n, 2)
    is_met = ((in_groups != UNKNOWN).sum(dim=1) >= 2) & (keep_negatives_alone | (present_pairs > 0))[:, None]
    group, column = is_met.nonzero(as_tuple=True)  # (S,) each: a class in a group

    precise = torch.promote_types(class_features.dtype, torch.float32)
    features = class_features.unflatten(0, (-1, group_size))[group, :, column].to(precise)  # (S, g, D)
    unit = features / torch.linalg.vector_norm(features, dim=-1, keepdim=True).clamp(min=_EPSILON)
    i, j = torch.triu_indices(group_size, group_size, 1, device=targets.device)
    cosines = (unit @ unit.transpose(1, 2))[:, i, j]  # (S, g (g - 1) / 2)
    labels = in_groups[group, :, column]  # (S, g)
    first, second = labels[:, i], labels[:, j]
    is_present, is_absent = (first == PRESENT) & (second == PRESENT), (first == ABSENT) & (second == ABSENT)
    is_mixed = first * second == -1

    total = (1.0 - cosines)[is_present].sum()
    sizes = is_met.sum(dim=1).tolist()  # classes of each group
    num_present, num_others = present_pairs.tolist(), other_pairs.tolist()  # read once: each read waits for the device
    for kind, is_kind in enumerate((is_mixed, is_absent)):
        parts = zip((1.0 + cosines).split(sizes), is_kind.split(sizes), strict=True)
        for place, (losses, is_own) in enumerate(parts):
            total = total + _thinned(losses[is_own], num_present[place], num_others[place][kind])
    return total


def num_contrasted(targets: Tensor, *, group_size: int, keep_negatives_alone: bool = False) -> Tensor:
    """The number of pairs that `contrastive_loss` counts, () int64; it depends on labels only.

    Args:
        targets: (B, C) int8 in {-1, 0, 1}; B is a multiple of `group_size`.
        group_size, keep_negatives_alone: see `contrastive_loss`.
    """
    present_pairs, other_pairs = _pair_counts(targets.unflatten(0, (-1, group_size)))
    a = present_pairs[:, None]
    counted = torch.minimum(2 * a, other_pairs) + torch.minimum(a, other_pairs)  # (n, 2)
    if keep_negatives_alone:
        counted = torch.where(a > 0, counted, other_pairs)
    return present_pairs.sum() + counted.sum()


def _thinned(losses: Tensor, num_present: int, num_losses: int) -> Tensor:
    """() the weighted sum of the losses of one group's pairs of one kind; the plain sum if no pair is present."""
    if num_losses == 0 or num_present == 0:
        return losses.sum()
    shared = losses.sum() * min(1.0, 2 * num_present / num_losses)
    return shared + losses.topk(min(num_present, num_losses)).values.sum()


def _pair_counts(in_groups: Tensor) -> tuple[Tensor, Tensor]:
    """Count the pairs in targets (n, g, C): (n,) of present labels; (n, 2) mixed ones, and those of absent labels."""
    present, absent = (in_groups == PRESENT).sum(dim=1), (in_groups == ABSENT).sum(dim=1)  # (n, C) images
    mixed = (present * absent).sum(dim=1)
    return (present * (present - 1) // 2).sum(dim=1), torch.stack([mixed, (absent * (absent - 1) // 2).sum(dim=1)], 1)
