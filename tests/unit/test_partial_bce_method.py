"""Claims about the partial-BCE method beyond the contract: label graph, WELDON, solved normaliser, pseudo-labels."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.batch import Batch
from dist_mlpl.methods.base import HEATMAPS
from dist_mlpl.methods.partial_bce import PartialBce
from dist_mlpl.methods.table import METHODS
from dist_mlpl.models.classifier import WeldonSettings, pool_regions
from tests.support.losses import masked_mean_bce_oracle, partial_bce_oracle
from tests.support.methods import CONTRACT, NUM_CLASSES, PROGRESS, random_batch, tiny_method

pytestmark = pytest.mark.unit

WELDON = {"name": "weldon", "num_top": 2, "num_bottom": 2}
DURAND = {"dropout": 0.2, "pooling": WELDON, "graph": {"dropout": 0.1}}
VARIANTS: dict[str, dict[str, Any]] = {
    "weldon": {"pooling": "weldon"},
    "graph": {"graph": {}},
    "graph of pairs, learned": {"graph": {"messages": "pair", "identity": "learned", "width": 8}},
    "graph, last state": {"graph": {"readout": "last", "identity": "none", "width": 8}},
    "everything": {"pooling": WELDON, "graph": {"width": 16, "identity": "learned"}, "p0": 0.2, "g0": 4.0},
    "half a pseudo-label": {"pseudo_weight": 0.5, "normalization": "masked_mean"},
}
LOSSES: dict[str, dict[str, float]] = {
    "durand": {"alpha": -4.45, "beta": 5.45, "gamma": 1.0},
    "image_mean": {"alpha": 1.0, "beta": 0.0, "gamma": -1.0},
    "masked_mean": {},
    "assume_negative": {"alpha": 0.0, "beta": 1.0, "gamma": 1.0},
}


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_keeps_the_contract(variant, check):
    check(tiny_method("partial_bce", **VARIANTS[variant]))


def believed_batch(num_images: int) -> Batch:
    """Few human labels, and beliefs about most entries, known ones among them."""
    batch = random_batch(num_images, seed=1, known_fraction=0.3)
    valid = torch.arange(num_images) != 2
    return batch._replace(pseudo_targets=random_batch(num_images, seed=2, known_fraction=0.8).targets, valid=valid)


def loss_oracle(normalization: str, logits: Tensor, targets: Tensor) -> float:
    if normalization == "assume_negative":
        targets = torch.where(targets == 0, -1, targets)
    if normalization == "masked_mean":
        return masked_mean_bce_oracle(logits, targets)
    return partial_bce_oracle(logits, targets, **LOSSES[normalization])


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("normalization", LOSSES)
def test_the_loss_is_w_times_that_with_pseudo_labels_plus_the_rest_without(normalization, weight):
    method = tiny_method("partial_bce", normalization=normalization, pseudo_weight=weight)
    batch = believed_batch(8)
    output = method(batch, method.recall(batch, PROGRESS))
    logits, human = output.logits[batch.valid], batch.targets[batch.valid]
    believed = torch.where(human != 0, human, batch.pseudo_targets[batch.valid])
    expected = weight * loss_oracle(normalization, logits, believed)
    expected += (1 - weight) * loss_oracle(normalization, logits, human)
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("normalization", LOSSES)
def test_pseudo_labels_of_weight_zero_change_no_bit(normalization):
    batch = believed_batch(8)
    method = tiny_method("partial_bce", normalization=normalization, pseudo_weight=0.0)
    losses = [method(b, method.recall(b, PROGRESS)).loss for b in (batch, batch._replace(pseudo_targets=None))]
    assert torch.equal(losses[0], losses[1])


@pytest.mark.parametrize(("weight", "num_losses"), [(0.0, 1), (0.3, 2), (1.0, 1)])
def test_a_loss_of_weight_zero_is_not_computed(weight, num_losses, monkeypatch):
    method, batch = tiny_method("partial_bce", pseudo_weight=weight), believed_batch(8)
    calls, compute = [], PartialBce._loss
    monkeypatch.setattr(PartialBce, "_loss", lambda *args: calls.append(args) or compute(*args))
    method(batch, method.recall(batch, PROGRESS))
    assert len(calls) == num_losses
    calls.clear()
    method(batch._replace(pseudo_targets=None), method.recall(batch, PROGRESS))
    assert len(calls) == 1


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("normalization", LOSSES)
def test_with_pseudo_labels_too_the_shares_add_up_to_the_whole(normalization, weight):
    method = tiny_method("partial_bce", normalization=normalization, pseudo_weight=weight).eval()
    batch = believed_batch(32)
    recalled = method.recall(batch, PROGRESS)
    parts = [method(batch.rows(first, last), recalled).loss for first, last in itertools.pairwise([0, 8, 24, 32])]
    torch.testing.assert_close(sum(parts), method(batch, recalled).loss, rtol=1e-6, atol=1e-6)


def test_a_pseudo_label_against_a_human_one_is_not_heard():
    method = tiny_method("partial_bce", pseudo_weight=0.7)
    batch = random_batch(8, seed=3)
    against = batch._replace(pseudo_targets=-batch.targets)
    losses = [method(b, method.recall(b, PROGRESS)).loss for b in (against, batch)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


def test_an_image_that_beliefs_complete_weighs_as_one_with_all_labels_known():
    method = tiny_method("partial_bce")
    batch = random_batch(8, seed=4, known_fraction=0.2)
    complete = torch.where(batch.targets != 0, batch.targets, -1)
    batch = batch._replace(pseudo_targets=torch.full_like(batch.targets, -1))
    output = method(batch, method.recall(batch, PROGRESS))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, (complete > 0).float())
    torch.testing.assert_close(output.loss.detach(), expected)


def test_recall_counts_human_labels_over_all_ranks_where_the_loss_divides_by_them(monkeypatch):
    monkeypatch.setattr(comm, "reduce_sum", lambda tensor: tensor.mul_(3))
    batch = believed_batch(8)
    human = 3.0 * int((batch.targets[batch.valid] != 0).sum())
    recalled = tiny_method("partial_bce", normalization="masked_mean", pseudo_weight=0.5).recall(batch, PROGRESS)
    assert recalled["num_human"].tolist() == [human]
    assert recalled["num_known"].tolist() > [human]
    assert "num_human" not in tiny_method("partial_bce", pseudo_weight=0.5).recall(batch, PROGRESS)


def test_a_new_graph_changes_neither_scores_nor_loss():
    plain, graphed = tiny_method("partial_bce"), tiny_method("partial_bce", graph={})
    graphed.load_state_dict(plain.state_dict(), strict=False)
    batch = random_batch(8, seed=5)
    outputs = [method(batch, method.recall(batch, PROGRESS)) for method in (plain, graphed)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].loss, outputs[1].loss)


def test_loss_and_scores_are_of_the_corrected_logits_and_the_trunk_learns_through_them():
    method = tiny_method("partial_bce", graph={})
    batch = random_batch(8, seed=6)
    torch.nn.init.normal_(method.graph.output_weight)
    output = method(batch, method.recall(batch, PROGRESS))
    first = method.head(method.backbone(batch.images)).logits
    torch.testing.assert_close(output.logits, method.graph(first))
    expected = partial_bce_oracle(output.logits, batch.targets, **LOSSES["durand"])
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)
    output.loss.backward()
    assert bool(method.backbone.conv1.weight.grad.any())


def test_with_weldon_the_heatmaps_pool_to_the_logits():
    method = tiny_method("partial_bce", pooling=WELDON).eval()
    batch = random_batch(4, seed=7)
    with method.asking(HEATMAPS):
        output = method(batch, None)
    pooled = pool_regions(output.extras[HEATMAPS].permute(0, 2, 3, 1), WeldonSettings(**WELDON))
    torch.testing.assert_close(pooled, output.logits)


def test_only_dropout_makes_two_passes_in_training_mode_differ():
    batch = random_batch(4, seed=8)
    for keys, differs in ((DURAND, True), (DURAND | {"dropout": 0.0, "graph": {}}, False)):
        method = tiny_method("partial_bce", **keys).train()
        if method.graph.dropout.p > 0:
            torch.nn.init.normal_(method.graph.output_weight)
        assert (not torch.equal(method(batch, None).logits, method(batch, None).logits)) == differs
        method.eval()
        assert torch.equal(method(batch, None).logits, method(batch, None).logits)


def settings(**keys):
    return METHODS["partial_bce"](backbone={"name": "resnet_small"}, **keys)


def test_a_solved_normaliser_is_the_papers_before_rounding():
    assert settings(p0=0.1, g0=5.0).coefficients == (pytest.approx(-40 / 9), pytest.approx(49 / 9))
    assert settings().coefficients == (-4.45, 5.45)
    batch = random_batch(8, seed=9, known_fraction=0.4)
    method = tiny_method("partial_bce", p0=0.1, g0=5.0)
    output = method(batch, method.recall(batch, PROGRESS))
    expected = partial_bce_oracle(output.logits, batch.targets, alpha=-40 / 9, beta=49 / 9, gamma=1.0)
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "keys",
    [
        {"p0": 0.1},
        {"g0": 5.0},
        {"p0": 1.0, "g0": 5.0},
        {"p0": 0.1, "g0": 5.0, "gamma": 0.0},
        {"p0": 0.1, "g0": 5.0, "alpha": -4.0, "beta": 5.0},
        {"p0": 0.5, "g0": 0.2},
        {"p0": 0.1, "g0": 5.0, "normalization": "image_mean"},
        {"pseudo_weight": 1.5},
        {"graph": {"num_steps": 0}},
        {"graph": {"width": 1}},
    ],
)
def test_settings_that_would_not_do_what_they_say_are_refused(keys):
    with pytest.raises(ValidationError):
        settings(**keys)


def test_the_graph_counts_as_head():
    method = tiny_method("partial_bce", graph={"identity": "learned", "width": 8})
    head = {id(parameter) for parameter in method.parameter_groups()["head"]}
    assert {id(parameter) for parameter in method.graph.parameters()} <= head
    assert method.graph.class_vectors.shape == (NUM_CLASSES, 7)
