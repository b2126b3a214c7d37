"""Claims about CSL as a method: which unknown labels take part, and where the class prior comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import tests.support.methods as contract
from dist_mlpl.batch import Progress
from dist_mlpl.errors import BankError
from dist_mlpl.methods.csl import Csl
from dist_mlpl.methods.table import METHODS
from tests.support.losses import selective_oracle
from tests.support.methods import CONTRACT, NUM_CLASSES, random_batch, tiny_method

pytestmark = pytest.mark.unit

FOCUS = {"gamma_pos": 1.0, "gamma_neg": 2.0, "gamma_unknown": 3.0}
CASES: dict[str, dict[str, Any]] = {
    "ignore": {"mode": "ignore"},
    "negative": {"mode": "negative", "clip": 0.05},
    "likelihood": {"top_k": 2},
    "prior": {"top_k": 1, "prior_threshold": 0.5, "ignore_epochs": 1},
}
LATER = Progress(epoch=1, step=5)


def csl(**keys: Any) -> Csl:
    focus = {name: gamma for name, gamma in FOCUS.items() if keys.get("mode") != "ignore" or name != "gamma_unknown"}
    method = tiny_method("csl", **focus | keys).eval()
    assert isinstance(method, Csl)
    return method


def predict_for_prior(method: Csl, *seeds: int, unlabelled: Sequence[int] = ()) -> torch.Tensor:
    """Steps of an epoch that ignores unknown labels; returns the probabilities of their valid rows.

    Args:
        method: takes the steps.
        seeds: of the batches.
        unlabelled: classes without a known label.
    """
    seen = []
    method.begin_epoch(Progress())
    for seed in seeds:
        batch = random_batch(16, seed=seed)
        batch.targets[:, list(unlabelled)] = 0
        batch = batch._replace(valid=torch.arange(16) % 5 != 2)
        output = method(batch, method.recall(batch, Progress()))
        method.observe(batch, output)
        seen.append(torch.sigmoid(output.logits[batch.valid]))
    return torch.cat(seen)


@pytest.mark.parametrize("progress", [Progress(), LATER], ids=["first epoch", "second epoch"])
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("case", CASES)
def test_every_mode_keeps_the_contract(case, check, progress, monkeypatch):
    monkeypatch.setattr(contract, "PROGRESS", progress)
    method = csl(**CASES[case])
    predict_for_prior(method, 30, 31)
    check(method)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_mean_over_valid_images_of_the_sum_over_classes(case):
    method = csl(**CASES[case])
    prior = predict_for_prior(method, 30).mean(dim=0)
    batch = random_batch(16, seed=3, known_fraction=0.3)
    batch = batch._replace(valid=torch.arange(16) != 4)
    output = method(batch, method.recall(batch, LATER))
    keys = {key: CASES[case][key] for key in ("clip", "prior_threshold", "top_k") if key in CASES[case]}
    if "prior_threshold" in keys:
        assert 0 < int((prior > 0.5).sum()) < NUM_CLASSES, "the threshold must part the classes"
    expected = selective_oracle(
        output.logits[batch.valid].double(),
        batch.targets[batch.valid],
        mode=CASES[case].get("mode", "selective"),
        prior=prior if case == "prior" else None,
        **FOCUS,
        **keys,
    )
    assert float(output.loss.detach()) == pytest.approx(float(expected) / 15, rel=1e-5)


def test_the_first_epochs_ignore_and_their_last_one_gives_the_prior():
    method = csl(top_k=1, prior_threshold=0.5, ignore_epochs=2)
    batch = random_batch(16, seed=3, known_fraction=0.3)
    predict_for_prior(method, 7, 8)  # the first of the two
    method.begin_epoch(Progress(epoch=1))
    with pytest.raises(BankError, match="no predictions"):
        method.prior()
    seen = predict_for_prior(method, 9, 10)
    ignoring = csl(mode="ignore")
    losses = [float(m(batch, m.recall(batch, Progress(epoch=1))).loss.detach()) for m in (method, ignoring)]
    assert losses[0] == losses[1]
    frozen = method.prior()
    torch.testing.assert_close(frozen, seen.mean(dim=0), rtol=0, atol=1e-6)
    method.begin_epoch(Progress(epoch=2))
    for _ in range(2):
        output = method(batch, method.recall(batch, Progress(epoch=2)))
        method.observe(batch, output)
    assert torch.equal(method.prior(), frozen)


def test_unknown_labels_of_a_class_that_nobody_ever_labelled_are_weak_negatives():
    """Its predictions are those of the first weights, here 0.7; a class with labels that is as likely stays out."""
    method = csl(top_k=0, prior_threshold=0.5, ignore_epochs=1)
    with torch.no_grad():
        method.head.linear.weight.zero_()
        method.head.linear.bias.copy_(torch.tensor([0.7, 0.3, 0.6, 0.2, 0.9]).logit())
    predict_for_prior(method, 7, 8, unlabelled=[0, 3])
    torch.testing.assert_close(method.prior(), torch.tensor([0.0, 0.3, 0.6, 0.0, 0.9]))
    batch = random_batch(16, seed=3)
    batch = batch._replace(targets=torch.zeros_like(batch.targets))
    method(batch, method.recall(batch, LATER)).loss.backward()
    assert (method.head.linear.bias.grad > 0).tolist() == [True, True, False, True, False]


def test_a_prior_is_a_whole_number_of_parts_so_that_the_order_of_steps_does_not_matter():
    one, other = csl(mode="ignore"), csl(mode="ignore")
    predict_for_prior(one, 1, 2, 3)
    predict_for_prior(other, 3, 1, 2)
    tables = [method.banks()["prior"].read(torch.arange(NUM_CLASSES)) for method in (one, other)]
    assert all(torch.equal(tables[0][name], tables[1][name]) for name in ("sums", "counts", "known"))


def test_a_prior_of_another_run_is_asked_for_by_name():
    method = csl(prior_threshold=0.05, prior_from="runs/ignore")
    assert method.bank_sources() == {"prior": "runs/ignore"}
    assert list(method.banks()) == ["prior"]
    assert csl(mode="ignore").bank_sources() == {}
    assert csl(mode="negative").banks() == {}


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"prior_threshold": 0.05}, "no prior"),
        ({"prior_from": "runs/ignore"}, "prior_threshold None"),
        ({"prior_threshold": 0.05, "prior_from": "x", "ignore_epochs": 2}, "prior_from and ignore_epochs"),
        ({"mode": "ignore", "ignore_epochs": 2}, "does not use it"),
        ({"mode": "negative", "top_k": 3}, "top_k"),
        ({"mode": "ignore", "gamma_unknown": 9.0}, "gamma_unknown set, but mode 'ignore'"),
        ({"gamma_pos": -1.0}, "gamma_pos"),
    ],
)
def test_half_a_prior_or_a_key_that_would_do_nothing_is_refused(keys, word):
    with pytest.raises(ValidationError, match=word):
        METHODS["csl"](backbone={"name": "resnet_small"}, **keys)
