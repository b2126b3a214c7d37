"""Claims about metrics, against scikit-learn, torchmetrics and slow float64 loops."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor
from torchmetrics.classification import MultilabelAveragePrecision

from dist_mlpl import comm
from dist_mlpl.errors import ConfigError, DataError, LabelCodeError, RankMismatchError, RunError
from dist_mlpl.metrics import Evaluation, Scores, average_precision, compute_metrics

pytestmark = pytest.mark.unit


def random_case(seed: int, *, num_images: int = 60, num_classes: int = 70, known: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits on a grid of 9 values (many ties) and targets with rare, common and empty classes."""
    generator = np.random.default_rng(seed)
    logits = generator.integers(-4, 5, (num_images, num_classes)) / 4
    rate = generator.random(num_classes) ** 3
    targets = np.where(generator.random((num_images, num_classes)) < rate, 1, -1)
    targets[generator.random(targets.shape) >= known] = 0
    targets[:, 0], targets[:, 1] = -1, 1
    return torch.from_numpy(logits).float(), torch.from_numpy(targets).to(torch.int8)


def loop_precision(scores: list[float], present: list[bool]) -> tuple[float, float]:
    """Raw and VOC12 average precision by thresholds, one class, plain loops."""
    points = []  # (recall, precision) from the highest threshold down
    for threshold in sorted(set(scores), reverse=True):
        called = [label for score, label in zip(scores, present, strict=True) if score >= threshold]
        points.append((sum(called) / sum(present), sum(called) / len(called)))
    raw = envelope = previous = 0.0
    for position, (recall, precision) in enumerate(points):
        raw += (recall - previous) * precision
        envelope += (recall - previous) * max(p for _, p in points[position:])
        previous = recall
    return raw, envelope


def loop_metrics(logits: Tensor, targets: Tensor, top_k: int) -> dict[str, float]:
    """OP .. CF1, top k and exact match by plain loops over entries."""
    found: dict[str, float] = {}
    rows, labels = logits.tolist(), targets.tolist()
    C = len(rows[0])
    for suffix, k in (("", C), (f"_top{top_k}", top_k)):
        Ng, Np, Nc = [0] * C, [0] * C, [0] * C
        for row, label in zip(rows, labels, strict=True):
            ranked = sorted((c for c in range(C) if label[c] != 0), key=lambda c: (-row[c], c))[:k]
            for c in range(C):
                called = c in ranked and row[c] >= 0
                Ng[c] += label[c] == 1
                Np[c] += called
                Nc[c] += called and label[c] == 1
        seen = [c for c in range(C) if Ng[c] > 0]
        P = (sum(Nc) / sum(Np), sum(Nc[c] / max(Np[c], 1) for c in seen) / len(seen))
        R = (sum(Nc) / sum(Ng), sum(Nc[c] / Ng[c] for c in seen) / len(seen))
        for letter, p, r in zip("OC", P, R, strict=True):
            found |= {f"{letter}P{suffix}": p, f"{letter}R{suffix}": r, f"{letter}F1{suffix}": 2 * p * r / (p + r)}
    judged = [
        all((x >= 0) == (y == 1) for x, y in zip(row, label, strict=True) if y != 0)
        for row, label in zip(rows, labels, strict=True)
        if any(label)
    ]
    return found | {"exact_match": sum(judged) / len(judged), "num_images": len(rows)}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("known", [1.0, 0.3])
def test_raw_precision_is_scikit_learns_with_many_ties(seed: int, known: float) -> None:
    logits, targets = random_case(seed, known=known)
    found = average_precision(logits, targets)
    assert found.dtype == torch.float64
    for c in range(targets.shape[1]):
        kept = targets[:, c] != 0
        present = (targets[kept, c] == 1).numpy()
        if 0 < present.sum() < len(present):
            expected = average_precision_score(present, logits[kept, c].numpy())
            assert float(found[c]) == pytest.approx(expected, abs=1e-14)
        else:
            assert found[c].isnan()


@pytest.mark.parametrize("seed", range(8))
def test_both_precisions_are_those_of_the_loop_over_thresholds(seed: int) -> None:
    logits, targets = random_case(seed, num_images=25, num_classes=9, known=0.8)
    raw, envelope = average_precision(logits, targets), average_precision(logits, targets, interpolation="voc12")
    for c in (~raw.isnan()).nonzero()[:, 0].tolist():
        kept = targets[:, c] != 0
        expected = loop_precision(logits[kept, c].tolist(), (targets[kept, c] == 1).tolist())
        assert (float(raw[c]), float(envelope[c])) == pytest.approx(expected, abs=1e-14)


def test_raw_precision_is_torchmetrics_without_ties() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(300, 12, generator=generator)
    present = torch.rand(300, 12, generator=generator) < 0.2
    oracle = MultilabelAveragePrecision(num_labels=12, average="none")(scores, present.int())
    found = average_precision(scores, torch.where(present, 1, -1))
    torch.testing.assert_close(found.float(), oracle, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("known", [1.0, 0.4])
def test_counted_metrics_are_those_of_the_loop_over_entries(seed: int, known: float) -> None:
    logits, targets = random_case(seed, num_images=40, num_classes=13, known=known)
    top_k = 3 + seed % 2
    logits[:5], targets[:5] = targets[:5].float(), targets[:5]  # some images are all right
    targets[5, :] = 0  # one has no label
    found = compute_metrics(logits, targets, top_k=top_k)
    for name, expected in loop_metrics(logits, targets, top_k).items():
        assert found[name] == pytest.approx(expected, abs=1e-14), name


def test_keys_and_means_are_the_published_ones() -> None:
    logits, targets = random_case(1)
    metrics = compute_metrics(logits, targets)
    names = ["OP", "OR", "OF1", "CP", "CR", "CF1"]
    tops = [f"{name}_top3" for name in names]
    assert list(metrics) == ["mAP", "mAP_voc12", *names, *tops, "exact_match", "num_images", "num_classes_scored"]
    raw, envelope = average_precision(logits, targets), average_precision(logits, targets, interpolation="voc12")
    assert metrics["mAP"] == pytest.approx(float(raw.nanmean()), abs=1e-14)
    assert metrics["mAP_voc12"] == pytest.approx(float(envelope.nanmean()), abs=1e-14)
    assert metrics["mAP_voc12"] >= metrics["mAP"]
    assert metrics["num_classes_scored"] == int((~raw.isnan()).sum())
    assert metrics["num_images"] == 60


@pytest.mark.parametrize("seed", range(10))
def test_scores_at_unknown_entries_change_no_bit(seed: int) -> None:
    logits, targets = random_case(seed, known=0.5)
    other = torch.where(targets == 0, torch.full_like(logits, [1e9, -1e9, math.inf, math.nan][seed % 4]), logits)
    assert str(compute_metrics(logits, targets)) == str(compute_metrics(other, targets))
    for interpolation in ("none", "voc12"):
        found = [average_precision(x, targets, interpolation=interpolation) for x in (logits, other)]
        torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("seed", range(10))
def test_order_of_images_and_monotone_rescaling_change_no_bit(seed: int) -> None:
    logits, targets = random_case(seed, known=0.7)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    expected = average_precision(logits, targets, interpolation="voc12")
    for scores, labels in ((logits[order], targets[order]), (logits.double().sigmoid(), targets)):
        found = average_precision(scores, labels, interpolation="voc12")
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("seed", range(10))
def test_blocks_with_padding_give_the_bits_of_the_whole_matrix(seed: int) -> None:
    logits, targets = random_case(seed, known=0.6)
    scores = Scores(logits.shape[1])
    for index in torch.arange(len(logits)).split(7):
        garbage, labels = torch.full((8, logits.shape[1]), math.nan), torch.ones(8, logits.shape[1], dtype=torch.int8)
        garbage[: len(index)], labels[: len(index)] = logits[index], targets[index]
        valid = torch.arange(8) < len(index)
        scores.add(garbage, labels, torch.nn.functional.pad(index, (0, 8 - len(index)), value=-1), valid)
    merged = scores.merge()
    assert merged.metrics() == compute_metrics(logits, targets)
    torch.testing.assert_close(
        merged.precision[:, 0], average_precision(logits, targets), rtol=0, atol=0, equal_nan=True
    )


def test_half_precision_logits_are_scored_as_they_are() -> None:
    logits, targets = random_case(2)
    assert compute_metrics(logits.bfloat16(), targets) == compute_metrics(logits, targets)


def test_numpy_arrays_are_taken() -> None:
    logits, targets = random_case(2)
    found = average_precision(logits.numpy(), targets.numpy())  # type: ignore[arg-type]
    torch.testing.assert_close(found, average_precision(logits, targets), equal_nan=True)


def test_a_class_never_called_has_precision_zero_and_does_not_inflate_the_overall_denominator() -> None:
    logits = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    metrics = compute_metrics(logits, torch.tensor([[1, 1], [-1, 1]]))
    assert (metrics["OP"], metrics["CP"], metrics["CR"]) == (0.5, 0.25, 0.5)


def test_a_class_without_positives_counts_in_the_overall_numbers_alone() -> None:
    logits = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
    metrics = compute_metrics(logits, torch.tensor([[1, -1], [-1, -1]]))
    assert (metrics["OP"], metrics["CP"], metrics["num_classes_scored"]) == (1 / 3, 1.0, 1)


def test_the_top_k_prefer_the_lower_class_among_equal_logits() -> None:
    metrics = compute_metrics(torch.zeros(1, 4), torch.tensor([[1, 1, -1, -1]]), top_k=2)
    assert (metrics["OP"], metrics["OP_top2"], metrics["OR_top2"]) == (0.5, 1.0, 1.0)


def test_the_threshold_is_inclusive() -> None:
    metrics = compute_metrics(torch.tensor([[0.5, 0.4]]), torch.tensor([[1, -1]]), threshold=0.5)
    assert (metrics["OP"], metrics["exact_match"]) == (1.0, 1.0)


def test_without_a_scored_class_the_means_are_nan_and_the_count_is_zero() -> None:
    metrics = compute_metrics(torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int8))
    assert metrics["num_classes_scored"] == 0
    assert metrics["num_images"] == 4
    assert all(math.isnan(metrics[name]) for name in ("mAP", "mAP_voc12", "OR", "CP", "CF1", "exact_match"))
    assert metrics == pytest.approx(Scores(2).merge().metrics() | {"num_images": 4}, nan_ok=True)


def test_rows_by_class_carry_names_and_numbers() -> None:
    logits, targets = random_case(4, num_classes=5)
    scores = Scores(5)
    scores.add(logits, targets, torch.arange(len(logits)), torch.ones(len(logits), dtype=torch.bool))
    merged = scores.merge()
    rows = merged.by_class(list("abcde"))
    assert [row.name for row in rows] == list("abcde")
    assert rows[4].average_precision == float(average_precision(logits, targets)[4])
    assert rows[4].average_precision_voc12 == float(average_precision(logits, targets, interpolation="voc12")[4])
    called, present = logits[:, 4] >= 0, targets[:, 4] == 1
    assert rows[4].precision == pytest.approx(float((called & present).sum() / called.sum()))
    assert rows[4].recall == pytest.approx(float((called & present).sum() / present.sum()))
    assert (rows[0].num_present, rows[0].num_absent, rows[1].num_absent) == (0, 60, 0)
    assert math.isnan(rows[0].average_precision)
    assert math.isnan(rows[0].recall)


def test_groups_run_from_rare_to_frequent_and_leave_out_classes_not_scored() -> None:
    precision = torch.tensor([0.1, math.nan, 0.3, 0.5, math.nan, 0.9], dtype=torch.float64)
    counts = Scores(6).merge().counts
    evaluation = Evaluation(torch.stack([precision, precision], dim=1), counts, 3)
    num_annotations = torch.tensor([60, 1, 20, 2, 50, 10])
    assert evaluation.by_group(num_annotations, num_groups=3) == pytest.approx([0.5, 0.6, 0.1])


def test_which_rank_has_an_image_is_gathered_only_to_word_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[list[int]] = []
    gather = comm.gather_rows
    monkeypatch.setattr(comm, "gather_rows", lambda rows: gathered.append(rows.tolist()) or gather(rows))
    logits, targets = random_case(0, num_images=3)
    for index, times in ((torch.tensor([7, 8, 9]), 0), (torch.tensor([7, 8, 8]), 1)):
        scores = Scores(70)
        scores.add(logits, targets, index, torch.ones(3, dtype=torch.bool))
        gathered.clear()
        with pytest.raises(RankMismatchError, match="on ranks") if times else nullcontext():
            scores.merge()
        assert gathered.count([0, 0, 0]) == times  # rank 0 has all three


def test_a_repeated_image_is_refused() -> None:
    scores = Scores(2)
    for index in (4, 9, 4):
        scores.add(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([index]), torch.tensor([True]))
    with pytest.raises(RankMismatchError, match=r"1 of 2 images [\s\S]*index 4, on ranks \[0, 0\]"):
        scores.merge()


def test_a_nan_at_a_known_entry_is_refused_and_named() -> None:
    logits, targets = random_case(0)
    logits[3, 5] = math.nan
    for call in (average_precision, compute_metrics):
        with pytest.raises(RunError, match="class 5"):
            call(logits, targets)
    scores = Scores(logits.shape[1])
    scores.add(logits, targets, torch.arange(len(logits)) + 100, torch.ones(len(logits), dtype=torch.bool))
    with pytest.raises(RunError, match="1 images, first at index 103"):
        scores.merge()


def test_wrong_arguments_are_refused() -> None:
    logits, targets = random_case(0, num_classes=4)
    with pytest.raises(ConfigError, match="voc12"):
        average_precision(logits, targets, interpolation="voc07")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="same classes"):
        average_precision(logits, targets[:, :3])
    with pytest.raises(DataError, match="same classes"):
        Scores(5).add(logits, targets, torch.arange(60), torch.ones(60, dtype=torch.bool))
    with pytest.raises(LabelCodeError):
        compute_metrics(logits, targets + 1)
