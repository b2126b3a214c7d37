"""Owns relabelling as slow loops over one dense float64 matrix of scores, and rounds made from such a matrix."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dist_mlpl import storage
from dist_mlpl.curriculum.parts import PartMaker, encode_part
from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.curriculum.select import SIGNED_WIDTH, rounded, value_of
from dist_mlpl.data.overlays import (
    RoundCommit,
    RoundModel,
    RoundPlan,
    document_bytes,
    newest_round,
    read_overlay,
    round_url,
)
from dist_mlpl.rounds.commit import RoundCommitter, part_url, pieces_of

BLOCK = 4  # rows that are handed to a part at once

Beliefs = dict[tuple[int, int], int]  # (sample, class) -> -1, 0 (proposed only) or +1


def split_of(shard_sizes: list[int], num_classes: int) -> Any:
    """As much of a split as a round needs, without files."""
    shards = [SimpleNamespace(num_samples=size) for size in shard_sizes]
    starts = np.concatenate([[0], np.cumsum(shard_sizes)])
    return SimpleNamespace(
        shards=shards, shard_sizes=shard_sizes, starts=starts, num_samples=sum(shard_sizes),
        manifest=SimpleNamespace(num_classes=num_classes),
    )  # fmt: skip


def round_from_table(
    run: Path,
    settings: CurriculumSettings,
    scores: torch.Tensor,
    targets: np.ndarray,
    *,
    shard_sizes: list[int],
    variances: torch.Tensor | None = None,
    valid: np.ndarray | None = None,
) -> RoundCommit:
    """The next round of a run whose model answers (N, C) `scores` about (N, C) int8 `targets`."""
    number = newest_round(str(run)) + 1
    plan = RoundPlan(
        round=number, parent=number - 1, split="train", manifest_digest="m", view_digest=None,
        strategy=settings.strategy, parameters=settings.parameters, models=(RoundModel(step=number, sha256="0"),),
        scored_with="s", seed=0,
    )  # fmt: skip
    storage.create_exclusive(round_url(str(run), number, "plan.json"), document_bytes(plan))
    origin = storage.sha256_of_bytes(document_bytes(plan))
    index = split_of(shard_sizes, targets.shape[1])
    is_valid = np.ones(len(targets), dtype=bool) if valid is None else valid
    for piece in pieces_of(index):
        maker = PartMaker(settings, targets.shape[1], first_row=piece.first)
        first, stop = (int(index.starts[piece.shard]) + row for row in (piece.first, piece.stop))
        for start in range(first, stop, BLOCK):
            rows = slice(start, min(start + BLOCK, stop))
            spread = None if variances is None else rounded(variances[rows])
            maker.add(rounded(scores[rows]), spread, targets[rows], is_valid[rows], len(targets[rows]))
        content = encode_part(maker.part(), origin=origin)
        storage.create_exclusive(part_url(str(run), number, origin, piece), content)
    return RoundCommitter(str(run), plan, origin=origin, settings=settings, index=index).commit()


def beliefs_of(run: Path, commit: RoundCommit, shard_sizes: list[int], num_classes: int) -> Beliefs:
    """Every entry of a round."""
    found: Beliefs = {}
    first = 0
    for shard, size in enumerate(shard_sizes):
        overlay = read_overlay(str(run), commit, shard, num_samples=size, num_classes=num_classes)
        for row, column, value in zip(overlay.rows, overlay.classes, overlay.values, strict=True):
            found[first + int(row), int(column)] = int(value)
        first += size
    return found


def expected_beliefs(
    settings: CurriculumSettings,
    scores: torch.Tensor,
    targets: np.ndarray,
    *,
    variances: torch.Tensor | None = None,
    valid: np.ndarray | None = None,
    earlier: list[dict[tuple[int, int], int]] = (),  # type: ignore[assignment]
    kept: Beliefs | None = None,
) -> Beliefs:
    """What a round must hold, entry by entry.

    Args:
        settings: of the curriculum.
        scores, variances: (N, C).
        targets: (N, C) int8.
        valid: (N,), images that could be decoded.
        earlier: proposals of earlier rounds with their signs, newest first.
        kept: beliefs of the round before, in a cumulative curriculum.
    """
    num_samples, num_classes = targets.shape
    x = scores.to(torch.float32).half().double().numpy()
    spread = None if variances is None else variances.to(torch.float32).half().double().numpy()
    is_valid = np.ones(num_samples, dtype=bool) if valid is None else valid
    unknown = [
        (i, c) for i in range(num_samples) for c in range(num_classes) if is_valid[i] and targets[i, c] == 0
    ]  # fmt: skip
    sign = {at: 1 if x[at] >= 0 else -1 for at in unknown}
    strength = {at: abs(x[at]) if spread is None else -spread[at] for at in unknown}
    # Thresholds that the whole split decides come after the cap on an image, others before.
    if settings.strategy == "score_fraction":
        proposed = _strongest_share(settings, x, unknown, _capped_by_image(settings, set(unknown), sign, strength))
    elif settings.strategy == "class_precision":
        capped = _capped_by_image(settings, set(unknown), sign, strength)
        proposed = {at for at in capped if _is_precise(settings, x, targets, is_valid, at)}
    else:
        proposed = {at for at in unknown if _is_proposed(settings, x, spread, at)}
        proposed = _capped_by_image(settings, proposed, sign, strength)
    kept = kept or {}
    proposed -= kept.keys()
    accepted = set(proposed)
    if len(earlier) < settings.agree_rounds - 1:
        accepted = set()
    for signs in earlier[: settings.agree_rounds - 1]:
        accepted = {at for at in accepted if signs.get(at) == sign[at]}
    accepted = _capped_by_class(settings, accepted, sign, strength, targets, is_valid, kept)
    found = {at: value for at, value in kept.items() if value != 0}
    found |= {at: sign[at] for at in accepted}
    if settings.agree_rounds > 1:
        found |= {at: 0 for at in proposed - accepted}
    return found


def _is_proposed(settings: CurriculumSettings, x: Any, spread: Any, at: tuple[int, int]) -> bool:
    theta = settings.logit_threshold
    if settings.strategy in ("score_threshold", "ensemble", "neighbours"):
        return bool(x[at] >= theta or x[at] < -theta)
    if settings.strategy == "positive_only":
        return bool(x[at] >= theta)
    return bool(spread[at] <= settings.max_variance)


def _strongest_share(settings: CurriculumSettings, x: Any, unknown: list, capped: set) -> set:
    """The share of all unknown labels decides where to cut; at the cut, the first that may be taken are."""
    ranked = sorted((abs(x[at]) for at in unknown), reverse=True)[: round(settings.fraction * len(unknown))]
    if not ranked:
        return set()
    at_cut = sorted(at for at in capped if abs(x[at]) == ranked[-1])
    return {at for at in capped if abs(x[at]) > ranked[-1]} | set(at_cut[: ranked.count(ranked[-1])])


def _is_precise(settings: CurriculumSettings, x: Any, targets: Any, valid: Any, at: tuple[int, int]) -> bool:
    """Whether the score reaches the lowest bin edge at which answers of its sign were right often enough."""
    sign = 1 if x[at] >= 0 else -1
    edges = [value_of(key) for key in range(0, 0x7C00, SIGNED_WIDTH)]

    def answers(classes: list[int]) -> list[tuple[float, bool]]:
        """(magnitude, was it right) of the answers of this sign about known labels."""
        return [
            (abs(x[i, c]), targets[i, c] == sign)
            for i in range(len(x)) for c in classes
            if valid[i] and targets[i, c] != 0 and (x[i, c] >= 0) == (sign > 0)
        ]  # fmt: skip

    told = answers([at[1]])
    if len(told) < settings.min_known:
        told = answers(list(range(x.shape[1])))
    for edge in edges:
        # Below zero a bin holds the magnitudes just above its edge: (edge, next edge].
        above = [right for size, right in told if (size >= edge if sign > 0 else size > edge or edge == 0)]
        if above and sum(above) >= settings.precision * len(above) and sum(above) > 0:
            return bool(abs(x[at]) >= edge if sign > 0 else abs(x[at]) > edge or edge == 0)
    return False


def _capped_by_image(settings: CurriculumSettings, chosen: set, sign: dict, strength: dict) -> set:
    if settings.max_per_image is None:
        return chosen
    kept = set()
    for sample in {at[0] for at in chosen}:
        for side in (1, -1):
            own = [at for at in chosen if at[0] == sample and sign[at] == side]
            kept |= set(sorted(own, key=lambda at: (-strength[at], at[1]))[: settings.max_per_image])
    return kept


def _capped_by_class(
    settings: CurriculumSettings, accepted: set, sign: dict, strength: dict, targets: Any, valid: Any, kept: Beliefs
) -> set:
    """The strongest of each class and sign; those of one strength stay or go together."""
    left = set(accepted)
    for column in range(targets.shape[1]):
        known = targets[valid, column]
        for side in (1, -1):
            limit = float("inf")
            if settings.max_per_class is not None:
                limit = settings.max_per_class
            if settings.prior_quota is not None and (targets[valid] != 0).any():
                overall = Fraction(int((targets[valid] == side).sum()), int((targets[valid] != 0).sum()))
                share = (int((known == side).sum()) + 4 * overall) / (int((known != 0).sum()) + 4)
                limit = min(limit, int(Fraction(str(settings.prior_quota)) * share * int((known == 0).sum())))
            limit = max(0, limit - sum(1 for at, value in kept.items() if at[1] == column and value == side))
            own = [at for at in accepted if at[1] == column and sign[at] == side]
            for level in {strength[at] for at in own}:
                if sum(strength[at] >= level for at in own) > limit:
                    left -= {at for at in own if strength[at] <= level}
    return left
