"""Owns which classes of an image a heatmap bank holds: those annotated present for good, then the likeliest unknown."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_mlpl.banks.heatmaps import EMPTY, Slots
from dist_mlpl.labels import ABSENT, PRESENT

_ALWAYS = 2.0  # exceeds every probability by more than any margin


def renew_slots(slots: Slots, probs: Tensor, targets: Tensor, *, margin: float) -> Slots:
    """Let the likeliest classes of the newest predictions move into slots; a class that moves in has no history.

    A class annotated present holds a slot for good; one annotated absent never gets or keeps one. Any other class moves
    in where a slot is empty, or where its probability exceeds the smallest score held by more than `margin`; the class
    with that score moves out. Candidates are taken in order of probability.

    Args:
        slots: those of n images, M classes each.
        probs: (n, C) in [0, 1], newest predictions.
        targets: (n, C) int8, human labels.
        margin: in [0, 1).

    Returns:
        Slots of the same shape: a class that stays keeps place, score and map; one that moves in has its probability
        as score and a map of NaN; an empty slot has score 0. `visits` is unchanged.
    """
    is_held = (slots.classes != EMPTY) & (targets.gather(1, slots.classes.clamp(min=0)) != ABSENT)
    held = slots.classes.masked_fill(~is_held, EMPTY)  # (n, M)
    is_annotated = is_held & (targets.gather(1, held.clamp(min=0)) == PRESENT)

    wish = probs + _ALWAYS * (targets == PRESENT)  # (n, C), how much each class wants a slot
    holder = torch.zeros_like(targets).scatter_add(1, held.clamp(min=0), is_held.to(targets.dtype)) > 0
    wish = wish.masked_fill(holder | (targets == ABSENT), -1.0)
    value, newcomer = wish.topk(min(held.shape[1], wish.shape[1]), dim=1)  # (n, m), m = min(M, C)

    bar = (slots.scores + margin).masked_fill(is_annotated, 2 * _ALWAYS).masked_fill(~is_held, -0.5)
    weakest = bar.argsort(dim=1, stable=True)[:, : value.shape[1]]  # (n, m): the i-th newcomer meets the i-th weakest
    moves_in = value > bar.gather(1, weakest)

    classes = held.scatter(1, weakest, torch.where(moves_in, newcomer, held.gather(1, weakest)))
    stays = is_held & (classes == held)
    scores = torch.where(classes == EMPTY, 0.0, probs.gather(1, classes.clamp(min=0)))
    return Slots(
        classes=classes,
        scores=torch.where(stays, slots.scores, scores),
        heatmaps=slots.heatmaps.masked_fill(~stays[:, :, None, None], torch.nan),
        visits=slots.visits,
    )
