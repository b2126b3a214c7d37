"""Owns slow oracles of the losses: plain loops over Python floats, which are float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def softplus(value: float) -> float:
    """log(1 + exp(value)) without overflow."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def partial_bce_oracle(logits: Tensor, targets: Tensor, *, alpha: float, beta: float, gamma: float) -> float:
    """Durand's eq. 1 image by image, label by label."""
    B, C = targets.shape
    total = 0.0
    for row in range(B):
        known = [c for c in range(C) if int(targets[row, c]) != 0]
        if known:
            g = alpha * (len(known) / C) ** gamma + beta
            total += g / C * sum(softplus(-int(targets[row, c]) * float(logits[row, c])) for c in known)
    return total / B


def partial_bce_gradient_oracle(logits: Tensor, targets: Tensor, *, alpha: float, beta: float, gamma: float) -> Tensor:
    """(B, C) float64: g(p_i) / (B C) * (sigmoid(x) - [y = +1]) where known, 0 elsewhere."""
    B, C = targets.shape
    gradient = torch.zeros(B, C, dtype=torch.float64)
    for row in range(B):
        num_known = sum(int(targets[row, c]) != 0 for c in range(C))
        for c in range(C):
            if int(targets[row, c]) != 0:
                g = alpha * (num_known / C) ** gamma + beta
                sigmoid = 1.0 / (1.0 + math.exp(-float(logits[row, c])))
                gradient[row, c] = g / (B * C) * (sigmoid - (int(targets[row, c]) == 1))
    return gradient


def masked_mean_bce_oracle(logits: Tensor, targets: Tensor) -> float:
    """Mean over every known label; 0 when there is none."""
    losses = [
        softplus(-int(targets[row, c]) * float(logits[row, c]))
        for row in range(targets.shape[0])
        for c in range(targets.shape[1])
        if int(targets[row, c]) != 0
    ]
    return sum(losses) / len(losses) if losses else 0.0


def random_targets(shape: tuple[int, int], known_fraction: float, generator: torch.Generator) -> Tensor:
    """(B, C) int8: each label known with this probability, then present with probability 0.3."""
    is_known = torch.rand(shape, generator=generator) < known_fraction
    is_present = torch.rand(shape, generator=generator) < 0.3
    return torch.where(is_known, torch.where(is_present, 1, -1), 0).to(torch.int8)


# Below: one loop over entries for each loss, as printed, on 0-dim float64 tensors, so that autograd of a loop is the
# oracle of the gradient. What a paper holds constant is detached.

Cell = tuple[int, int]


def cells(targets: Tensor) -> list[tuple[Cell, int]]:
    """Every (row, column) with its label."""
    return [((b, c), int(targets[b, c])) for b in range(targets.shape[0]) for c in range(targets.shape[1])]


def gradient_of(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and its gradient."""
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def random_case(
    seed: int, shape: tuple[int, int], known_fraction: float = 0.4, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    """(B, C) float32 logits and int8 targets."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator), random_targets(shape, known_fraction, generator)


def assert_agrees(loss: Callable[[Tensor], Tensor], oracle: Callable[[Tensor], Tensor], logits: Tensor) -> None:
    """Value and gradient are the oracle's: in float64 to its rounding, in float32 to 1e-6."""
    expected = gradient_of(oracle, logits.double())
    torch.testing.assert_close(gradient_of(loss, logits.double()), expected, rtol=1e-8, atol=1e-9)
    value, gradient = gradient_of(loss, logits)
    assert value.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-6, atol=1e-6)


def probability(logit: Tensor) -> Tensor:
    return 1.0 / (1.0 + torch.exp(-logit))


def nl(value: Tensor) -> Tensor:
    """Minus the logarithm of Cole's and Zhou's code."""
    return -torch.log(value + 1e-5)


def selective_oracle(
    logits: Tensor,
    targets: Tensor,
    *,
    mode: str,
    gamma_pos: float,
    gamma_neg: float,
    gamma_unknown: float,
    clip: float = 0.0,
    top_k: int = 0,
    scope: str = "image",
    prior: Tensor | None = None,
    prior_threshold: float = 0.0,
    exclude_prior_ignored: bool = True,
) -> Tensor:
    """The CSL code's loss; ASL is its mode `negative` with gamma_unknown = gamma_neg."""
    ignored: set[Cell] = set()
    candidates: list[tuple[float, Cell]] = []
    for (b, c), y in cells(targets):
        if y == 0:
            is_frequent = prior is not None and float(prior[c]) > prior_threshold
            if mode == "ignore" or (mode == "selective" and is_frequent):
                ignored.add((b, c))
            if not (is_frequent and exclude_prior_ignored):
                candidates.append((float(logits[b, c].detach()), (b, c)))
    if mode == "selective":
        candidates.sort(reverse=True)
        if scope == "batch":
            ignored |= {cell for _, cell in candidates[: top_k * len(targets)]}
        for row in range(len(targets)) if scope == "image" else ():
            ignored |= {cell for _, cell in [found for found in candidates if found[1][0] == row][:top_k]}
    total = 0.0 * logits.sum()  # connected, whatever the labels
    for cell, y in cells(targets):
        p = probability(logits[cell])
        q = (1 - p + clip).clamp(max=1) if clip > 0 else 1 - p
        likelihood = p if y == 1 else q
        gamma = {1: gamma_pos, -1: gamma_neg, 0: gamma_unknown}[y]
        weight = (1 - likelihood.detach()) ** gamma
        if cell not in ignored:
            total = total - torch.log(likelihood.clamp(min=1e-8)) * weight
    return total


def assume_negative_oracle(
    logits: Tensor, targets: Tensor, *, smoothing: float = 0.0, unknown_weight: float = 1.0
) -> Tensor:
    """AN, AN-LS, WAN; a known absent label costs nl(1 - p)."""
    total = 0.0 * logits.sum()  # connected, whatever the labels
    for cell, y in cells(targets):
        p = probability(logits[cell])
        if y == 1:
            total = total + (1 - smoothing) * nl(p) + smoothing * nl(1 - p)
        elif y == 0:
            total = total + unknown_weight * ((1 - smoothing) * nl(1 - p) + smoothing * nl(p))
        else:
            total = total + nl(1 - p)
    return total


def observed_oracle(logits: Tensor, targets: Tensor) -> Tensor:
    """The part of EPR and ROLE that known labels have."""
    total = 0.0 * logits.sum()  # connected, whatever the labels
    for cell, y in cells(targets):
        p = probability(logits[cell])
        total = total + (nl(p) if y == 1 else nl(1 - p) if y == -1 else 0 * p)
    return total


def count_penalty_oracle(logits: Tensor, expected_positives: float) -> Tensor:
    """R(p) of EPR and ROLE."""
    B, C = logits.shape
    count = sum((probability(logits[b, c]) for b in range(B) for c in range(C)), start=logits.new_zeros(()))
    return (count / B - expected_positives) ** 2 / C**2


def estimator_oracle(logits: Tensor, estimates: Tensor, targets: Tensor) -> Tensor:
    """ROLE without R."""
    total = 0.5 * (observed_oracle(logits, targets) + observed_oracle(estimates, targets))
    for cell, _ in cells(targets):
        p, t = probability(logits[cell]), probability(estimates[cell])
        for learner, teacher in ((p, t.detach()), (t, p.detach())):
            total = total + 0.5 * (teacher * nl(learner) + (1 - teacher) * nl(1 - learner))
    return total


def expected_negative_oracle(logits: Tensor, targets: Tensor, scores: Tensor, *, expected_positives: float) -> Tensor:
    """EN with E_n = V_n and U_n less the first max(0, round(K) - |P_n|) by score."""
    total = 0.0 * logits.sum()  # connected, whatever the labels
    for b in range(len(targets)):
        row = [int(y) for y in targets[b]]
        order = sorted((c for c, y in enumerate(row) if y == 0), key=lambda c, b=b: -float(scores[b, c]))
        kept_out = set(order[: max(0, round(expected_positives) - row.count(1))])
        for c, y in enumerate(row):
            p = probability(logits[b, c])
            if y == 1:
                total = total - torch.log(p)
            elif c not in kept_out:
                total = total - torch.log(1 - p)
    return total


def entropy_oracle(
    logits: Tensor,
    targets: Tensor,
    *,
    entropy_weight: float,
    pseudo_targets: Tensor | None = None,
    soft_targets: Tensor | None = None,
    pseudo_weight: float = 1.0,
) -> Tensor:
    """EM, and APL's term where a pseudo-label stands."""
    total = observed_oracle(logits, targets)
    for cell, y in cells(targets):
        p = probability(logits[cell])
        if y == 0 and pseudo_targets is not None and soft_targets is not None and int(pseudo_targets[cell]) != 0:
            s = float(soft_targets[cell])
            total = total + pseudo_weight * (s * nl(p) + (1 - s) * nl(1 - p))
        elif y == 0:
            total = total - entropy_weight * (p * nl(p) + (1 - p) * nl(1 - p))
    return total


def large_loss_oracle(logits: Tensor, targets: Tensor, *, fraction: float, scheme: str) -> Tensor:
    """LL-R and LL-Ct: the k-th largest of the losses of unknown entries, the others counting as 0."""
    B, C = targets.shape
    losses = {cell: (F.softplus(-logits[cell]) if y == 1 else F.softplus(logits[cell])) for cell, y in cells(targets)}
    doubted = {cell: float(losses[cell].detach()) if y == 0 else 0.0 for cell, y in cells(targets)}
    k = math.ceil(B * C * fraction)
    threshold = sorted(doubted.values(), reverse=True)[k - 1] if k > 0 else math.inf
    total = 0.0 * logits.sum()  # connected, whatever the labels
    for cell, y in cells(targets):
        if not (y == 0 and doubted[cell] >= threshold):
            total = total + losses[cell]
        elif scheme == "correct":
            total = total + F.softplus(-logits[cell])
    return total


def hill_oracle(logits: Tensor, targets: Tensor) -> Tensor:
    """m = 1, gamma = 2, lambda = 1.5; a known absent label has a plain focal loss."""
    total = 0.0 * logits.sum()  # connected, whatever the labels
    for cell, y in cells(targets):
        p, p_m = probability(logits[cell]), probability(logits[cell] - 1)
        if y == 1:
            total = total - (1 - p_m) ** 2 * torch.log(p_m)
        elif y == 0:
            total = total + (1.5 - p) * p**2
        else:
            total = total - p**2 * torch.log(1 - p)
    return total


def splc_oracle(logits: Tensor, targets: Tensor, *, is_correcting: bool) -> Tensor:
    """m = 1, gamma = 2, tau = 0.6; a known absent label is never corrected."""
    total = 0.0 * logits.sum()  # connected, whatever the labels
    for cell, y in cells(targets):
        p = probability(logits[cell] - (1 if y == 1 else 0))
        is_positive = y == 1 or (y == 0 and is_correcting and float(p.detach()) > 0.6)
        z = 1.0 if is_positive else 0.0
        weight = (z * (1 - p) + (1 - z) * p) ** 2
        total = total + weight * -(z * torch.log(p) + (1 - z) * torch.log(1 - p))
    return total
