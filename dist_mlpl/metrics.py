"""Owns the evaluation metrics: average precision per class and its means, and precision, recall and F1 from counts.

Every number depends only on the known entries (target +1 or -1), so partially annotated test sets need no special
case, and only on counts and sorted scores, so neither the order of images nor the number of ranks changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, NoReturn, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.errors import ConfigError, DataError, RankMismatchError, RunError, nearest_names
from dist_mlpl.labels import PRESENT, UNKNOWN, check_codes

Interpolation = Literal["none", "voc12"]

_CLASS_BLOCK = 64  # classes transposed at a time: column reads of a wide row-major matrix miss the cache
_ROW_BLOCK = 4096  # images counted at a time


def average_precision(scores: Tensor, targets: Tensor, *, interpolation: Interpolation = "none") -> Tensor:
    """Average precision of each class over the images where it is annotated.

    Equal scores form one threshold, so the order of tied images cannot matter.

    Args:
        scores: (N, C) float, logits, probabilities or any increasing function of them; numpy arrays are accepted too.
        targets: (N, C) int8: -1 absent, 0 unknown (ignored), +1 present.
        interpolation: `none` for the step sum over thresholds (recall_n - recall_{n-1}) * precision_n; `voc12` replaces
            precision_n by the largest precision at that recall or any higher one (area under the monotone envelope).

    Returns:
        (C,) float64 in [0, 1] on the CPU; NaN where a class has no positive or no negative among its annotated images.

    Raises:
        ConfigError: an unknown interpolation.
        DataError: shapes differ (LabelCodeError: a target outside {-1, 0, +1}).
        RunError: a NaN among the scores of known entries.

    Source: scikit-learn's average_precision_score (`none`); Pascal VOC 2012 development kit (`voc12`).
    Differs: the authors' reference code breaks ties by an unstable sort and divides by zero without positives.
    """
    if interpolation not in get_args(Interpolation):
        raise ConfigError(
            f"interpolation {interpolation!r}",
            expected=nearest_names(interpolation, get_args(Interpolation)),
            where="average_precision",
            next_step="pass one of them",
        )
    return _dense_precision(*_as_matrices(scores, targets))[:, get_args(Interpolation).index(interpolation)]


def compute_metrics(logits: Tensor, targets: Tensor, *, top_k: int = 3, threshold: float = 0.0) -> dict[str, float]:
    """Compute all metrics of an evaluation that fits in memory; see `Evaluation.metrics` for the keys.

    Args:
        logits: (N, C) float.
        targets: (N, C) int8: -1 absent, 0 unknown (ignored), +1 present.
        top_k: classes per image that the `_top` variants may call present.
        threshold: a class is called present iff its logit >= threshold; 0 is probability 0.5.

    Raises:
        DataError: shapes differ (LabelCodeError: a target outside {-1, 0, +1}).
        RunError: a NaN among the logits of known entries.
    """
    logits, targets = _as_matrices(logits, targets)
    precision = _dense_precision(logits, targets)
    counts = Counts.zeros(logits.shape[1])
    for rows in zip(logits.split(_ROW_BLOCK), targets.split(_ROW_BLOCK), strict=True):
        counts = counts.plus(_count(*rows, top_k=top_k, threshold=threshold))
    return Evaluation(precision, counts, top_k).metrics()


class Counts(NamedTuple):
    """Counts over images of labels, of classes called present, and of both; (C,) fields count known entries only."""

    present: Tensor  # (C,) int64, labelled present: Ng
    absent: Tensor  # (C,) int64, labelled absent
    predicted: Tensor  # (C,) int64, called present: Np
    correct: Tensor  # (C,) int64, called present and labelled present: Nc
    predicted_top: Tensor  # (C,) int64, called present and among the image's top k
    correct_top: Tensor  # (C,) int64, the same and labelled present
    images: Tensor  # (3,) int64: images; those with a known label; those of them with all known labels right

    @classmethod
    def zeros(cls, num_classes: int) -> Counts:
        """Counts of no images."""
        return cls._make(torch.zeros(size, dtype=torch.int64) for size in [num_classes] * 6 + [3])

    def plus(self, other: Counts) -> Counts:
        """The counts of both sets of images together."""
        return Counts._make(mine + theirs for mine, theirs in zip(self, other, strict=True))


class ClassRow(NamedTuple):
    """One class in a report; NaN where a number is undefined."""

    name: str
    average_precision: float
    average_precision_voc12: float
    precision: float
    recall: float
    num_present: int
    num_absent: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The results of one evaluation, per class.

    Args:
        precision: (C, 2) float64, average precision without and with the `voc12` envelope; NaN for classes not scored.
        counts: sums over images.
        top_k: k of the `_top` counts.
    """

    precision: Tensor
    counts: Counts
    top_k: int

    def metrics(self) -> dict[str, float]:
        """Summarise the evaluation; metrics are fractions in [0, 1].

        Returns:
            mAP, mAP_voc12 (means over the scored classes); OP, OR, OF1 (all entries together), CP, CR, CF1 (classes
            averaged); these six again as `OP_top3` ... (3 being `top_k`), where only the k highest logits of an image
            may be called present; exact_match, the fraction of images with a known label whose known labels are all
            right; num_images; num_classes_scored. NaN where a number is undefined.

        Source: the HCP multi-label reference code: CF1 is the harmonic mean of CP and CR, not a mean of F1; a class
            that is never called present has precision 0.
        Differs: classes without a positive are left out of CP and CR (there NaN); OP's denominator is the number of
            entries called present (there one more for each class that never is); the top k are among known entries.
        """
        counts = self.counts
        scored = self.precision[~self.precision[:, 0].isnan()]  # (classes scored, 2)
        num_images, num_labelled, num_exact = counts.images.tolist()
        top = _precision_recall(counts.present, counts.predicted_top, counts.correct_top)
        return {
            "mAP": float(scored[:, 0].mean()),
            "mAP_voc12": float(scored[:, 1].mean()),
            **_precision_recall(counts.present, counts.predicted, counts.correct),
            **{f"{name}_top{self.top_k}": value for name, value in top.items()},
            "exact_match": num_exact / num_labelled if num_labelled else float("nan"),
            "num_images": num_images,
            "num_classes_scored": scored.shape[0],
        }

    def by_class(self, names: Sequence[str]) -> list[ClassRow]:
        """One row per class, in class order.

        Args:
            names: C display names.
        """
        counts = self.counts
        precision = counts.correct / counts.predicted.clamp(min=1)
        recall = counts.correct.double() / counts.present  # 0 / 0 is NaN
        columns = [*self.precision.T, precision, recall, counts.present, counts.absent]
        return [ClassRow(*row) for row in zip(names, *(column.tolist() for column in columns), strict=True)]

    def by_group(self, num_annotations: Tensor, *, num_groups: int = 5) -> list[float]:
        """mAP of equal-size groups of classes, from the rarest annotated to the most frequent.

        Args:
            num_annotations: (C,) integer, annotated images of each class, usually in the train split.
            num_groups: number of groups; sizes differ by at most one class.

        Returns:
            num_groups means over the scored classes of each group; NaN for a group without one.

        Source: the CSL and IMCL protocol on Open Images (groups G1 rarest .. G5 most frequent).
        Differs: classes that are not scored are left out of the mean (IMCL's code counts them as 0).
        """
        order = torch.argsort(num_annotations, stable=True)
        return [float(self.precision[group, 0].nanmean()) for group in order.tensor_split(num_groups)]


class Scores:
    """Collects one rank's part of an evaluation, block by block, and merges the ranks.

    Only known entries are kept, on the CPU: 9 bytes each, and 8 bytes per image. COCO (40,504 x 80, all known) takes
    29 MB over all ranks; a few million known entries of Open Images (125,436 x 9,605) take some 30 MB, where the matrix
    of logits would take 4.8 GB.

    Args:
        num_classes: C.
        top_k: classes per image that the `_top` variants may call present.
        threshold: a class is called present iff its logit >= threshold; 0 is probability 0.5.
    """

    def __init__(self, num_classes: int, *, top_k: int = 3, threshold: float = 0.0) -> None:
        self._num_classes, self._top_k, self._threshold = num_classes, top_k, threshold
        self._counts = Counts.zeros(num_classes)
        self._index = [torch.empty(0, dtype=torch.int64)]
        self._nan_index = [torch.empty(0, dtype=torch.int64)]  # refused in `merge`, where all ranks stop together
        self._classes = [torch.empty(0, dtype=torch.int32)]
        self._scores = [torch.empty(0, dtype=torch.float32)]
        self._targets = [torch.empty(0, dtype=torch.int8)]

    def add(self, logits: Tensor, targets: Tensor, index: Tensor, valid: Tensor) -> None:
        """Add one block of images, on any device; rows with `valid` False are dropped.

        Args:
            logits: (B, C) float; kept as float32.
            targets: (B, C) int8: -1 absent, 0 unknown (ignored), +1 present.
            index: (B,) int64, position in the manifest's split.
            valid: (B,) bool.

        Raises:
            DataError: shapes differ (LabelCodeError: a target outside {-1, 0, +1}).
        """
        kept = valid.cpu()
        logits, targets = _as_matrices(logits, targets, num_classes=self._num_classes)
        logits, targets, index = logits[kept].float(), targets[kept], index.cpu()[kept]
        known = targets != UNKNOWN
        self._nan_index.append(index[(known & logits.isnan()).any(dim=1)])
        self._counts = self._counts.plus(_count(logits, targets, top_k=self._top_k, threshold=self._threshold))
        self._index.append(index)
        self._classes.append(known.nonzero()[:, 1].int())
        self._scores.append(logits[known])
        self._targets.append(targets[known])

    def merge(self) -> Evaluation:
        """Evaluate all ranks' images; the result is bit-equal on every rank and for every number of ranks.

        Rank r sorts the scores of classes [r C / R, (r + 1) C / R); no rank holds all of them.

        Collective: all ranks; indices (8 bytes per image) to every rank, known entries (9 bytes each) to one rank, then
        counts and results (64 bytes per class). The tensors are on the CPU, so the process group must include gloo.

        Raises:
            RankMismatchError: an image was scored more than once; on all ranks.
            RunError: a NaN among the logits of known entries; on all ranks.
        """
        self._refuse_repeated_images()
        if (nan_index := comm.gather_rows(torch.cat(self._nan_index))).numel():
            _refuse_nan(f"{nan_index.numel()} images, first at index {int(nan_index.min())}")
        counts = Counts._make(comm.reduce_sum(count.clone()) for count in self._counts)
        size, rank = comm.world_size(), comm.rank()
        bounds = torch.arange(size + 1) * self._num_classes // size
        classes = torch.cat(self._classes)
        owner = torch.bucketize(classes, bounds[1:].int(), right=True)
        order = owner.argsort()
        num_sent = owner.bincount(minlength=size).tolist()
        columns = (classes, torch.cat(self._scores), torch.cat(self._targets))
        entries = [comm.exchange(column[order], num_sent)[0] for column in columns]
        block = _sparse_precision(*entries, start=int(bounds[rank]), stop=int(bounds[rank + 1]))
        return Evaluation(comm.gather_rows(block), counts, self._top_k)

    def _refuse_repeated_images(self) -> None:
        mine = torch.cat(self._index)
        index = comm.gather_rows(mine)
        values, times = index.unique(return_counts=True)
        if (repeated := values[times > 1]).numel():  # on all ranks, as all have the same `index`
            ranks = comm.gather_rows(torch.full_like(mine, comm.rank()))
            holders = ranks[index == repeated[0]].tolist()
            raise RankMismatchError(
                f"{repeated.numel()} of {values.numel()} images scored more than once",
                expected="every image of the split on exactly one rank, padding with `valid` False",
                where=f"first at index {int(repeated[0])}, on ranks {holders}",
                next_step="deal the evaluation split without repeating images; one Scores per evaluation",
            )


def _as_matrices(scores: Tensor, targets: Tensor, *, num_classes: int | None = None) -> tuple[Tensor, Tensor]:
    scores, targets = torch.as_tensor(scores).detach().cpu(), torch.as_tensor(targets).detach().cpu()
    columns = scores.shape[-1] if num_classes is None else num_classes
    if scores.ndim != 2 or scores.shape != targets.shape or scores.shape[1] != columns:
        raise DataError(
            f"scores {tuple(scores.shape)} and targets {tuple(targets.shape)}",
            expected=f"both (images, {columns if scores.ndim else 'classes'})",
            where="metrics",
            next_step="check that model and manifest have the same classes",
        )
    if scores.dtype in (torch.float16, torch.bfloat16):  # numpy has no bfloat16; widening is exact
        scores = scores.float()
    return scores, targets


def _refuse_nan(where: str) -> NoReturn:
    raise RunError(
        "a NaN among the scores of known entries",
        expected="numbers",
        where=where,
        next_step="evaluate an earlier checkpoint; train with a lower learning rate or clip_norm",
    )


def _class_precision(scores: npt.NDArray, present: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Both average precisions of one class from its (K,) known entries.

    Precision is needed only at the positives: recall does not change elsewhere, and a threshold that adds only
    negatives lowers precision, so it is never on the envelope. `sum` adds in an order that depends on the number of
    positives only.
    """
    positives = np.sort(scores[present])  # ascending
    num_positives, num_known = positives.size, scores.size
    if num_positives in (0, num_known):
        return float("nan"), float("nan")
    num_hits = num_positives - np.searchsorted(positives, positives, "left")  # positives scored as high or higher
    num_called = num_known - np.searchsorted(np.sort(scores), positives, "left")
    precision = num_hits / num_called  # (positives,) float64, from low score and high recall to high score
    envelope = np.maximum.accumulate(precision)
    return float(precision.sum() / num_positives), float(envelope.sum() / num_positives)


def _dense_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Both average precisions of each class, (C, 2) float64, from (N, C) matrices."""
    rows: list[tuple[float, float]] = []
    for block_scores, block_targets in zip(
        scores.split(_CLASS_BLOCK, dim=1), targets.split(_CLASS_BLOCK, dim=1), strict=True
    ):
        labels = check_codes(block_targets.T.contiguous().numpy(), where="targets of the metrics")  # (c, N)
        for label, column in zip(labels, block_scores.T.contiguous().numpy(), strict=True):
            known = label != UNKNOWN
            if np.isnan(column[known]).any():
                _refuse_nan(f"class {len(rows)}")
            rows.append(_class_precision(column[known], label[known] == PRESENT))
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)


def _sparse_precision(classes: Tensor, scores: Tensor, targets: Tensor, *, start: int, stop: int) -> Tensor:
    """Both average precisions of classes [start, stop), (stop - start, 2) float64, from known entries (n,)."""
    order = classes.argsort()
    cuts = torch.searchsorted(classes[order], torch.arange(start, stop + 1, dtype=classes.dtype)).tolist()
    columns, present = scores[order].numpy(), (targets[order] == PRESENT).numpy()
    rows = [_class_precision(columns[low:high], present[low:high]) for low, high in pairwise(cuts)]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)


def _count(logits: Tensor, targets: Tensor, *, top_k: int, threshold: float) -> Counts:
    """Count a block of (B, C) logits and targets."""
    targets = torch.from_numpy(check_codes(targets.numpy(), where="targets of the metrics"))
    known, present = targets != UNKNOWN, targets == PRESENT
    called = known & (logits >= threshold)
    called_top = called & _highest(logits.masked_fill(~known, float("-inf")), top_k)
    labelled = known.any(dim=1)
    right = (called == present).all(dim=1)  # unknown entries are False on both sides
    images = torch.stack([torch.tensor(len(known)), labelled.sum(), (labelled & right).sum()])
    masks = (present, known & ~present, called, called & present, called_top, called_top & present)
    return Counts._make([*(mask.sum(dim=0) for mask in masks), images])


def _highest(logits: Tensor, top_k: int) -> Tensor:
    """(B, C) bool, True at the top_k highest logits of each row; among equal ones the lower class wins."""
    lowest = logits.topk(min(top_k, logits.shape[1]), dim=1).values[:, -1:]
    above, tied = logits > lowest, logits == lowest
    num_free = top_k - above.sum(dim=1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=1) <= num_free))


def _precision_recall(present: Tensor, predicted: Tensor, correct: Tensor) -> dict[str, float]:
    """OP, OR, OF1, CP, CR, CF1 from (C,) int64 counts."""
    seen = present > 0
    overall = correct.sum().double() / torch.stack([predicted.sum().clamp(min=1), present.sum()])  # (2,)
    per_class = correct[seen].double() / torch.stack([predicted[seen].clamp(min=1), present[seen]])  # (2, classes)
    (OP, OR), (CP, CR) = overall.tolist(), per_class.mean(dim=1).tolist()
    return {"OP": OP, "OR": OR, "OF1": _harmonic(OP, OR), "CP": CP, "CR": CR, "CF1": _harmonic(CP, CR)}


def _harmonic(precision: float, recall: float) -> float:
    total = precision + recall
    return 2 * precision * recall / total if total != 0 else 0.0
