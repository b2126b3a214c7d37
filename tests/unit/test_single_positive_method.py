"""Claims about the single-positive family as a method: which loss runs, on which rows, and what it remembers."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import tests.support.methods as contract
from dist_mlpl import keyed
from dist_mlpl.batch import Batch, Progress, StepOutput
from dist_mlpl.methods.base import Method
from dist_mlpl.methods.large_loss import LargeLoss
from dist_mlpl.methods.table import METHODS
from dist_mlpl.methods.unknown_loss import ValidRows
from tests.support.losses import (
    assume_negative_oracle,
    count_penalty_oracle,
    entropy_oracle,
    estimator_oracle,
    expected_negative_oracle,
    hill_oracle,
    large_loss_oracle,
    observed_oracle,
    random_targets,
    splc_oracle,
)
from tests.support.methods import CONTRACT, NUM_CLASSES, gradients, random_batch, tiny_method
from tests.support.single_positive import LATER, LOSSES

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("progress", [contract.PROGRESS, LATER], ids=["first epoch", "third epoch"])
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_keeps_the_contract(loss, check, progress, monkeypatch):
    monkeypatch.setattr(contract, "PROGRESS", progress)
    method = tiny_method("single_positive", loss=loss, **LOSSES[loss])
    for seed in (20, 21):
        step(method, random_batch(16, seed=seed), progress)  # so that there is something to remember
    check(method)


def step(method: Method, batch: Batch, progress: Progress = LATER) -> StepOutput:
    """One step without an update."""
    output = method(batch, method.recall(batch, progress))
    method.observe(batch, output)
    return output


def batch_with_padding(seed: int = 3) -> Batch:
    """16 rows, of which 2 are padding and 1 is undecodable; labels with pseudo-labels."""
    batch = random_batch(16, seed=seed, known_fraction=0.4)
    valid = batch.valid.clone()
    valid[[2, 9, 15]] = False
    index = batch.index.clone() + 40
    index[[9, 15]] = -1
    generator = torch.Generator().manual_seed(seed)
    pseudo = (torch.rand(16, NUM_CLASSES, generator=generator) < 0.3).to(torch.int8) * -1
    soft = torch.rand(16, NUM_CLASSES, generator=generator)
    return batch._replace(valid=valid, index=index, pseudo_targets=pseudo, soft_targets=soft)


def num_large(share: float, num_images: int, first_index: int, step: int, *, num_classes: int = NUM_CLASSES) -> int:
    """Losses of a group that are large, in a run with seed 0."""
    u = keyed.uniform(keyed.key("large losses", 0, step, first_index), 1)[0]
    return math.floor(num_images * num_classes * share + u)


def mean_over(batch: Batch, total: Tensor) -> float:
    return float(total) / (int(batch.valid.sum()) * NUM_CLASSES)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_the_one_named_over_valid_rows_alone(loss):
    """On a method's first visit in the third epoch."""
    method = tiny_method("single_positive", loss=loss, **LOSSES[loss]).eval()
    batch = batch_with_padding()
    recalled = method.recall(batch, LATER)
    output = method(batch, recalled)
    valid = batch.valid
    x = output.logits[valid].double()
    human = batch.targets[valid]
    believed = torch.where(human != 0, human, batch.pseudo_targets[valid])
    groups = [output.logits[start : start + 8][valid[start : start + 8]].double() for start in (0, 8)]
    if loss == "role":
        estimates = recalled["estimates"].double()  # in ascending order of the index, as the rows are
        of_groups = estimates.split([len(group) for group in groups])
        count = sum(len(part) * count_penalty_oracle(part, 1.5) for part in (*groups, *of_groups))
        expected = mean_over(batch, estimator_oracle(x, estimates, believed)) + 0.5 * float(count) / len(x)
    elif loss == "epr":
        count = sum(len(g) * count_penalty_oracle(g, 1.5) for g in groups)
        expected = mean_over(batch, observed_oracle(x, believed)) + float(count) / len(x)
    elif loss in ("ll_r", "ll_ct", "ll_cp"):
        share = LOSSES[loss]["large_fraction"] * (LATER.epoch if loss != "ll_cp" else 1)
        total, start = torch.zeros((), dtype=torch.float64), 0
        for group, first in zip(groups, (0, 8), strict=True):
            k = num_large(share, len(group), int(batch.index[first]), LATER.step)
            labels, start = believed[start : start + len(group)], start + len(group)
            fraction = (k - 0.5) / labels.numel()  # rounded up to k
            total += large_loss_oracle(
                group, labels, fraction=fraction, scheme="reject" if loss == "ll_r" else "correct"
            )
        expected = mean_over(batch, total)
    else:
        pseudo, soft = batch.pseudo_targets[valid], batch.soft_targets[valid].double()
        totals = {
            "an": lambda: assume_negative_oracle(x, believed),
            "an_ls": lambda: assume_negative_oracle(x, believed, smoothing=0.1),
            "wan": lambda: assume_negative_oracle(x, believed, unknown_weight=1 / (NUM_CLASSES - 1)),
            "en": lambda: expected_negative_oracle(x, believed, x, expected_positives=1.5),
            "em": lambda: entropy_oracle(x, believed, entropy_weight=0.1),
            "apl": lambda: entropy_oracle(
                x, human, entropy_weight=0.1, pseudo_targets=pseudo, soft_targets=soft, pseudo_weight=0.9
            ),
            "splc": lambda: splc_oracle(x, believed, is_correcting=True) * NUM_CLASSES,
            "hill": lambda: hill_oracle(x, believed) * NUM_CLASSES,
        }
        expected = mean_over(batch, totals[loss]())
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_apl_takes_soft_labels_from_the_code_where_a_round_has_none():
    method = tiny_method("single_positive", loss="apl").eval()
    batch = batch_with_padding()
    ones = (batch.pseudo_targets == 1).float()
    losses = [method(b, method.recall(b, LATER)).loss for b in (batch._replace(soft_targets=s) for s in (None, ones))]
    assert torch.equal(*losses)


# ROLE ----------------------------------------------------------------------------------------------------------------


def role(**keys: Any) -> Method:
    return tiny_method("single_positive", loss="role", expected_positives=1.5, **keys).eval()


def read(method: Method, name: str, index: Tensor) -> dict[str, Tensor]:
    return method.banks()[name].read(index)


def test_estimates_start_where_the_paper_puts_them_and_do_not_depend_on_who_asks():
    method, batch = role(), random_batch(32, seed=1, known_fraction=0.5)
    recalled = method.recall(batch, LATER)
    probs = torch.sigmoid(recalled["estimates"])
    targets = batch.targets
    torch.testing.assert_close(probs[targets == 1], torch.full_like(probs[targets == 1], 0.995))
    torch.testing.assert_close(probs[targets == -1], torch.full_like(probs[targets == -1], 0.005))
    unknown = probs[targets == 0]
    assert 0.4 <= float(unknown.min()) < 0.43
    assert 0.57 < float(unknown.max()) <= 0.6
    assert len(unknown.unique()) > 0.9 * len(unknown)
    shuffled = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    again = role().recall(Batch._make(None if f is None else f[shuffled] for f in batch), LATER)
    assert torch.equal(again["estimates"], recalled["estimates"])


def test_a_step_moves_the_estimates_of_its_valid_samples_along_their_own_gradient():
    method, batch = role(estimate_rate=0.7), batch_with_padding()
    before = method.recall(batch, LATER)["estimates"].double()  # ascending index
    output = step(method, batch)
    valid = batch.valid
    estimates = before.clone().requires_grad_()
    x = output.logits[valid].double()
    believed = torch.where(batch.targets != 0, batch.targets, batch.pseudo_targets)[valid]
    sizes = [int(valid[:8].sum()), int(valid[8:].sum())]
    count = sum(len(part) * count_penalty_oracle(part, 1.5) for part in estimates.split(sizes))
    loss = estimator_oracle(x, estimates, believed) + 0.5 * NUM_CLASSES * count  # of all rows, times n C
    (gradient,) = torch.autograd.grad(loss, estimates)
    read_back = read(method, "estimates", batch.index[valid])
    torch.testing.assert_close(read_back["rows"].double(), before - 0.7 * gradient, rtol=1e-5, atol=1e-6)
    assert read_back["stamps"].tolist() == [1] * int(valid.sum())
    others = [i for i in range(100) if i not in batch.index[valid].tolist()]
    assert read(method, "estimates", torch.tensor(others))["stamps"].max() == -1


def test_the_next_visit_begins_where_the_last_one_ended_and_estimates_do_not_reach_the_classifier_twice():
    method, batch = role(), random_batch(16, seed=1)
    step(method, batch)
    stored = read(method, "estimates", batch.index)["rows"]
    assert torch.equal(method.recall(batch, LATER)["estimates"], stored)
    first = gradients(method, batch)
    assert all(torch.equal(first[name], again) for name, again in gradients(method, batch).items())


# EN ------------------------------------------------------------------------------------------------------------------


def test_scores_are_the_mean_prediction_over_a_samples_visits():
    method = tiny_method("single_positive", loss="en", expected_positives=2.0).eval()
    batch, seen = batch_with_padding(), []
    for scale in (1.0, 0.5, 2.0):
        scaled = batch._replace(images=batch.images * scale)
        output = step(method, scaled)
        seen.append(torch.sigmoid(output.logits[batch.valid]))
    read_back = read(method, "scores", batch.index[batch.valid])
    assert read_back["stamps"].unique().tolist() == [2]
    torch.testing.assert_close(read_back["rows"].float(), torch.stack(seen).mean(0), rtol=0, atol=2e-3)


def test_expected_negatives_leaves_out_the_likeliest_by_earlier_scores_and_nothing_in_the_first_epoch():
    method = tiny_method("single_positive", loss="en", expected_positives=2.0).eval()
    batch = random_batch(16, seed=1, known_fraction=0.2)
    scores = torch.rand(16, NUM_CLASSES).half()
    method.banks()["scores"].write(batch.index, {"rows": scores, "stamps": torch.zeros(16, dtype=torch.int32)})
    for progress, k in ((LATER, 2.0), (Progress(), 0.0)):
        output = method(batch, method.recall(batch, progress))
        total = expected_negative_oracle(output.logits.double(), batch.targets, scores, expected_positives=k)
        assert float(output.loss.detach()) == pytest.approx(mean_over(batch, total), rel=1e-5)


# Large Loss ----------------------------------------------------------------------------------------------------------


LARGE = ("ll_r", "ll_ct", "ll_cp")


def large_loss_of(variant: str, *, num_classes: int, fraction: float, num_samples: int) -> LargeLoss:
    loss = LargeLoss(variant, num_classes=num_classes, fraction=fraction, folder=None)
    loss.begin_run(num_samples=num_samples, seed=0)
    return loss


def doubt(
    loss: LargeLoss, index: Tensor, logits: Tensor, targets: Tensor, progress: Progress, *, group_sizes: list[int],
    rank_index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(n, C) bool, the labels that a micro-batch rejects or takes as present, by their gradient; then observe.

    Args:
        loss: of the method.
        index: (n,) of the micro-batch; all its rows are valid.
        logits: (n, C).
        targets: (n, C).
        progress: where the run stands.
        group_sizes: of the micro-batch.
        rank_index: indices of the rank's share; None: those of the micro-batch.
    """
    share = index if rank_index is None else rank_index
    recalled = loss.recall(SimpleNamespace(index=share, valid=torch.ones(len(share), dtype=torch.bool)), progress)
    x = logits.clone().requires_grad_()
    rows = ValidRows(x, targets, targets, None, None, index, group_sizes, torch.tensor(float(len(index))))
    terms, extras = loss.losses(rows, recalled)
    (gradient,) = torch.autograd.grad(terms["large_loss"], x)
    loss.observe(index, logits, targets, extras)
    return (targets == 0) & (gradient <= 0)


@pytest.mark.parametrize("variant", LARGE)
def test_of_each_group_exactly_as_many_losses_are_large_as_asked_for_and_their_mean_is_the_share(variant):
    sizes, share, num_steps = [8, 5, 0, 3], 0.013, 600
    loss = large_loss_of(variant, num_classes=7, fraction=share, num_samples=16 * num_steps)
    generator = torch.Generator().manual_seed(0)
    made = []
    for step in range(num_steps):
        index = torch.randperm(16, generator=generator) + 16 * step  # in one epoch: a sample once
        logits = torch.randn(16, 7, generator=generator).round(decimals=1)
        targets = random_targets((16, 7), 0.4, generator)
        found = doubt(loss, index, logits, targets, Progress(epoch=1, step=step), group_sizes=sizes)
        for group, of_group, first in zip(found.split(sizes), logits.split(sizes), (0, 8, 13, 13), strict=True):
            expected = num_large(share, len(group), int(index[first]), step, num_classes=7)
            assert int(group.sum()) == expected
            unknown = targets[first : first + len(group)] == 0
            assert not group.any() or float(of_group[group].min()) >= float(of_group[unknown & ~group].max())
        made.append(int(found.sum()))
    asked = share * 16 * 7
    assert sum(made) / num_steps == pytest.approx(asked, abs=4 * math.sqrt(0.75 / num_steps))  # of three roundings
    assert set(made) == {0, 1, 2, 3}, "groups are rounded alike"


@pytest.mark.parametrize("variant", LARGE)
def test_neither_ranks_nor_micro_batches_nor_a_resume_change_which_losses_are_large(variant):
    num_groups, size, C, N = 6, 4, 9, 100
    generator = torch.Generator().manual_seed(1)
    index = torch.randperm(N, generator=generator)[: num_groups * size]
    logits, others = torch.randn(2, len(index), C, generator=generator)
    targets = random_targets(logits.shape, 0.4, generator)

    def fresh() -> LargeLoss:
        return large_loss_of(variant, num_classes=C, fraction=0.06, num_samples=N)

    before = fresh()
    doubt(before, index, others, targets, Progress(epoch=2, step=39), group_sizes=[size] * num_groups)

    def choose(rows: Tensor, share: Tensor) -> Tensor:
        loss = fresh()
        for name, bank in before.banks().items():  # all that a resumed run has
            loss.banks()[name].write(torch.arange(N), bank.read(torch.arange(N)))
        return doubt(
            loss, index[rows], logits[rows], targets[rows], Progress(epoch=2, step=40),
            group_sizes=[size] * (len(rows) // size), rank_index=index[share],
        )  # fmt: skip

    everything = torch.arange(len(index))
    whole = choose(everything, everything)
    assert 0 < int(whole.sum()) < int((targets == 0).sum())
    for num_ranks in (1, 2, 3):
        for micro_groups in (1, 2, 4):
            found = torch.zeros_like(whole)
            for rank in range(num_ranks):
                share = everything.view(num_groups, size)[rank::num_ranks].flatten()
                for rows in share.split(size * micro_groups):
                    found[rows] = choose(rows, share)
            assert torch.equal(found, whole), (num_ranks, micro_groups)


def test_a_learning_model_is_corrected_as_often_as_asked_for():
    """Corrected labels raise their own logits: a threshold of earlier steps falls behind, and takes in ever more."""
    num_samples, C, share, B = 640, 40, 0.002, 64
    torch.manual_seed(0)
    features = torch.randn(num_samples, 32)
    truth = (features @ torch.randn(32, C) / math.sqrt(32) > 1.5).to(torch.int8)
    targets = torch.where(torch.rand(num_samples, C) < 0.1, 2 * truth - 1, 0).to(torch.int8)
    loss = large_loss_of("ll_ct", num_classes=C, fraction=share, num_samples=num_samples)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, C))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    step, made, asked = 0, [], []
    for epoch in range(5):
        made.append(0)
        asked.append(share * epoch * num_samples * C)
        for index in torch.randperm(num_samples).split(B):
            logits, y = model(features[index]), targets[index]
            recalled = loss.recall(SimpleNamespace(index=index, valid=torch.ones(B, dtype=torch.bool), targets=y),
                                   Progress(epoch=epoch, step=step))  # fmt: skip
            rows = ValidRows(logits, y, y, None, None, index, [8] * (B // 8), torch.tensor(float(B)))
            terms, extras = loss.losses(rows, recalled)
            logits.retain_grad()
            optimizer.zero_grad()
            terms["large_loss"].backward()
            made[-1] += int(((y == 0) & (logits.grad < 0)).sum())
            optimizer.step()
            loss.observe(index, logits.detach(), y, extras)
            step += 1
    assert made[0] == asked[0] == 0
    assert all(k / 1.5 <= n <= 1.5 * k for n, k in zip(made, asked, strict=True)), (made, asked)


def test_corrections_last_and_grow_and_never_touch_a_known_label():
    method = tiny_method("single_positive", loss="ll_cp", large_fraction=0.1).eval()
    batch = random_batch(16, seed=1, known_fraction=0.3)
    kept = torch.zeros(16, NUM_CLASSES, dtype=torch.bool)
    for _ in range(4):
        step(method, batch)
        corrected = method.recall(batch, LATER)["corrections"]
        assert bool((corrected | ~kept).all())
        assert not bool((corrected & (batch.targets != 0)).any())
        kept = corrected
    assert 0 < int(kept.sum()) < int((batch.targets == 0).sum())
    absent = batch._replace(targets=torch.where(kept, -1, batch.targets).to(torch.int8))
    output = method(absent, method.recall(absent, LATER))  # a person has said no meanwhile: a known label always wins
    assert not bool((output.extras["corrections"] & ~kept & (absent.targets != 0)).any())
    plain = tiny_method("single_positive", loss="ll_cp", large_fraction=0.1).eval()
    plain.load_state_dict(method.state_dict())
    everything_known = absent._replace(targets=torch.where(absent.targets == 0, -1, absent.targets).to(torch.int8))
    losses = [float(m(everything_known, m.recall(everything_known, LATER)).loss.detach()) for m in (method, plain)]
    assert losses[0] == losses[1]


def test_lasting_corrections_are_about_the_share_of_all_labels_that_is_asked_for_however_long_a_run_goes_on():
    num_samples, C, share = 480, 40, 0.005
    generator = torch.Generator().manual_seed(0)
    answers = 1.5 * torch.randn(num_samples, C, generator=generator) - 3.0  # of a model that learns nothing
    loss = large_loss_of("ll_cp", num_classes=C, fraction=share, num_samples=num_samples)
    targets, num_corrected, step = torch.zeros(16, C, dtype=torch.int8), [], 0
    for epoch in range(7):
        for index in torch.randperm(num_samples, generator=generator).split(16):
            logits = answers[index] + 0.5 * torch.randn(16, C, generator=generator)
            doubt(loss, index, logits, targets, Progress(epoch=epoch, step=step), group_sizes=[8, 8])
            step += 1
        kept = loss.banks()["corrections"].read(torch.arange(num_samples))["rows"].numpy()
        num_corrected.append(int(np.unpackbits(kept, axis=1, count=C).sum()))
    asked = share * num_samples * C
    assert num_corrected[0] == 0
    made = [later - earlier for earlier, later in pairwise(num_corrected)]
    assert made == pytest.approx([asked] * 6, abs=4 * math.sqrt(0.25 * num_samples / 8))  # of one rounding a group


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"loss": "an", "smoothing": 0.2}, "smoothing"),
        ({"loss": "hill", "present_threshold": 0.7}, "present_threshold"),
        ({"loss": "em", "pseudo_weight": 0.1}, "pseudo_weight"),
        ({"loss": "ll_r", "bank_folder": "/tmp"}, "bank_folder"),
        ({"loss": "role"}, "expected_positives"),
        ({"loss": "en"}, "expected_positives"),
        ({"loss": "en", "expected_positives": 0.4}, "expected_positives"),
        ({"loss": "ROLE", "expected_positives": 2.0}, "loss"),
    ],
)
def test_a_key_that_would_do_nothing_or_is_missing_is_refused(keys, word):
    with pytest.raises(ValidationError, match=word):
        METHODS["single_positive"](backbone={"name": "resnet_small"}, **keys)
