"""Claims about SARB and DSRB as a method: its loss against loops, when it blends, what its prototypes are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tests.support.methods as contract
from dist_mlpl.batch import Batch, Progress
from dist_mlpl.losses.contrastive import contrastive_loss
from dist_mlpl.methods.base import training_targets
from dist_mlpl.methods.blending import Blending
from dist_mlpl.methods.costs import Scale
from dist_mlpl.methods.table import METHODS
from tests.support.blending import (
    lloyd,
    mix_with_partners,
    mix_with_prototypes,
    quadrant_of_peak,
    soft_bce,
    weighted_maps,
)
from tests.support.methods import CONTRACT, NUM_CLASSES, gradients, random_batch, tiny_method, trained

pytestmark = pytest.mark.unit

SMALL = {"head": {"attention_width": 8, "embedding_width": 6, "feature_width": 12}, "start_epoch": 1}
CASES: dict[str, dict[str, Any]] = {
    "sarb": {"prototypes": "kmeans", "num_prototypes": 3},
    "dsrb": {},
    "dsrb of two classes": {"blended_classes": 2},
    "sarb faithful": {"prototypes": "kmeans", "num_prototypes": 3, "faithful": True},
    "dsrb faithful": {"faithful": True},
}
BLENDING = Progress(epoch=1, step=9, samples_consumed=16, fraction=0.5)
NUM_IMAGES = 16


def blending(**keys: Any) -> Blending:
    method = tiny_method("blending", **SMALL | keys)
    assert isinstance(method, Blending)
    return method.eval()


def gather(method: Blending, *seeds: int, epoch: int = 0, known_fraction: float = 0.5) -> list[tuple[Batch, Tensor]]:
    """Steps of an epoch on random batches, then the beginning of the next; batches with their class features."""
    seen = []
    for step, seed in enumerate(seeds):
        batch = given_batch(seed, known_fraction)
        batch = batch._replace(index=batch.index + 100 * step)
        output = method(batch, method.recall(batch, Progress(epoch=epoch, step=step)))
        method.observe(batch, output)
        with torch.no_grad():
            seen.append((batch, method.head.decouple(method.backbone(batch.images)).class_features))
    method.begin_epoch(Progress(epoch=epoch + 1))
    return seen


def given_batch(seed: int, known_fraction: float = 0.5) -> Batch:
    batch = random_batch(NUM_IMAGES, seed=seed, known_fraction=known_fraction)
    return batch._replace(index=torch.randperm(90)[:NUM_IMAGES] if seed == 0 else batch.index * 7 % 97)


@pytest.mark.parametrize("progress", [Progress(), BLENDING], ids=["before", "while blending"])
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("case", CASES)
def test_every_form_keeps_the_contract(case, check, progress, monkeypatch):
    monkeypatch.setattr(contract, "PROGRESS", progress)
    method = blending(**CASES[case])
    gather(method, 30, 31)
    check(method)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_that_of_loops_over_images_and_classes(case, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    method = blending(**CASES[case], instance_weight=0.7, prototype_weight=1.3)
    gather(method, 30, 31)
    method = method.to(dtype)
    batch = given_batch(3, 0.4)
    all_known = torch.where(batch.targets == 0, 1, batch.targets).to(torch.int8)
    batch = batch._replace(
        targets=torch.where((torch.arange(NUM_IMAGES) == 7)[:, None], all_known, batch.targets),
        images=batch.images.to(dtype),
        valid=torch.arange(NUM_IMAGES) != 4,
        pseudo_targets=torch.where(torch.arange(NUM_IMAGES)[:, None] % 3 == 0, 1, 0).to(torch.int8).expand(-1, 5),
    )
    recalled = method.recall(batch, BLENDING)
    output = method(batch, recalled)
    output.loss.backward()
    slopes = {name: p.grad for name, p in trained(method).items()}
    method.zero_grad()
    expected = expected_terms(method, batch, recalled)
    assert len(expected["prototype entries"]) >= NUM_IMAGES // 2
    loss = 0.7 * expected["instance"] + 1.3 * expected["prototype"] + expected["bce"]
    loss = loss + share_of_contrastive(method, batch, recalled)
    torch.testing.assert_close(output.loss.detach(), loss.detach(), rtol=0, atol=tolerance)
    if method.settings.faithful:
        assert float(recalled["num_overwritten"]) > 0
        return  # its targets have slopes, which the loops leave out
    loss.backward()
    for name, p in trained(method).items():
        torch.testing.assert_close(slopes[name], p.grad, rtol=1e-3, atol=10 * tolerance, msg=name)


def expected_terms(method: Blending, batch: Batch, recalled: dict[str, Tensor]) -> dict[str, Any]:
    """The three losses of a step that is one batch."""
    f = method.head.decouple(method.backbone(batch.images)).class_features
    evidence = evidence_of(method, batch)
    human, valid = batch.targets, batch.valid
    y = torch.where(human != 0, human, batch.pseudo_targets)
    y = torch.where(valid[:, None], y, 0)
    table, _ = method.banks()["prototypes"].table()
    chosen = {}
    for place, index in enumerate(recalled["drawn_index"].tolist()):
        n = batch.index.tolist().index(index)
        for j, c in enumerate(recalled["drawn_classes"][place].tolist()):
            if c < 0:
                assert not (y[n] == 0).any() or recalled["drawn_classes"].shape[1] > 1
                continue
            assert int(y[n, c]) == 0 or (method.settings.faithful and c == 0 and not (y[n] == 0).any())
            if method.settings.prototypes == "kmeans":
                prototype = recalled["drawn_prototypes"][place, j, 0]
                assert bool((table[c] == prototype).all(dim=1).any())
            else:
                own = quadrant_of_peak(evidence[n, c])
                slot = (own - int(recalled["drawn_turn"][place, j])) % 4
                assert slot != own
                prototype = recalled["drawn_prototypes"][place, j, slot]
                assert method.settings.faithful or torch.equal(prototype, table[c, slot])
            chosen[n, c] = prototype.to(f)
    instance = mix_with_partners(f, y, human, valid, method.alpha(f), group_size=8)
    prototype = mix_with_prototypes(f, y, chosen, method.beta(f))
    known = int((y != 0).sum())
    terms: dict[str, Any] = {"bce": soft_bce(method.head.classify(f), y.to(f), y != 0) / known}
    for name, mixed in (("instance", instance), ("prototype", prototype)):
        logits = method.head.classify(mixed.features)
        terms[name] = soft_bce(logits, mixed.targets, mixed.is_counted) / int(mixed.is_counted.sum())
    return terms | {"prototype entries": chosen}


@torch.no_grad()
def evidence_of(method: Blending, batch: Batch) -> Tensor:
    """(B, C, h, w), in which a class is said to peak; as coded, of the attended maps, which nobody should build."""
    feature_map = method.backbone(batch.images)
    attention = method.head.decouple(feature_map, with_attention=True).attention
    assert attention is not None
    if not method.settings.faithful:
        return attention
    return weighted_maps(attention, method.head.decoupling.reduce(feature_map)).sum(dim=-1)


def share_of_contrastive(method: Blending, batch: Batch, recalled: dict[str, Tensor]) -> Tensor:
    f = method.head.decouple(method.backbone(batch.images)).class_features
    is_faithful = method.settings.faithful
    total = contrastive_loss(f, training_targets(batch), group_size=8, keep_negatives_alone=is_faithful)
    return method.settings.contrastive_weight * total / recalled["num_contrasted"].clamp(min=1).squeeze()


def test_a_fully_labelled_batch_is_classified_three_times():
    for case in ("sarb", "dsrb"):
        method = blending(**CASES[case])
        gather(method, 30, 31)
        batch = given_batch(3, 1.0)
        assert not (batch.targets == 0).any()
        recalled = method.recall(batch, BLENDING)
        assert float(recalled["num_lent"]) == float(recalled["num_drawn"]) == 0.0
        assert bool((recalled["drawn_classes"] == -1).all())
        terms = method(batch, recalled).terms
        for name in ("instance", "prototype"):
            torch.testing.assert_close(terms[name], terms["bce"], rtol=1e-6, atol=1e-6)


def test_faithful_overwrites_the_first_class_of_images_without_unknown_labels():
    method = blending(prototypes="kmeans", num_prototypes=3, faithful=True)
    gather(method, 30, 31)
    recalled = method.recall(given_batch(3, 1.0), BLENDING)
    assert recalled["drawn_classes"].tolist() == [[0]] * NUM_IMAGES
    assert float(recalled["num_overwritten"]) == float(recalled["num_drawn"]) == NUM_IMAGES
    rows = recalled["drawn_prototypes"].flatten(1)
    assert torch.equal(rows, rows[:1].expand_as(rows)), "one number of a prototype for the whole step"


def test_faithful_takes_peaks_of_the_attended_maps_in_place_of_the_attentions():
    batch, told = given_batch(3), {}
    for faithful in (False, True):
        method = blending(faithful=faithful)
        output = method(batch, method.recall(batch, Progress()))
        evidence = evidence_of(method, batch)
        expected = [quadrant_of_peak(evidence[n, c]) for n, c in (batch.targets == 1).nonzero().tolist()]
        told[faithful] = output.extras["positive_quadrant"].tolist()
        assert told[faithful] == expected
    assert told[False] != told[True]


def test_nothing_is_blended_before_the_start_or_without_prototypes():
    method = blending(start_epoch=2)
    batch = given_batch(3, 0.3)
    early = method(batch, method.recall(batch, Progress(epoch=1)))
    assert early.terms["instance"] == early.terms["prototype"] == 0.0
    assert "drawn_index" not in method.recall(batch, Progress(epoch=1))
    recalled = method.recall(batch, Progress(epoch=2))
    assert float(recalled["num_lent"]) > 0
    assert float(recalled["num_drawn"]) == 0.0
    terms = method(batch, recalled).terms
    torch.testing.assert_close(terms["prototype"], terms["bce"], rtol=1e-6, atol=1e-6)


def test_a_class_without_prototypes_is_never_mixed_with_any():
    method = blending()
    batch = given_batch(30)
    batch = batch._replace(
        targets=torch.where(torch.arange(NUM_CLASSES) == 2, batch.targets.clamp(max=0), batch.targets)
    )
    method.observe(batch, method(batch, method.recall(batch, Progress())))
    method.begin_epoch(Progress(epoch=1))
    drawn = set()
    for step in range(20):
        asked = given_batch(3, 0.0)
        drawn |= set(method.recall(asked, Progress(epoch=1, step=step))["drawn_classes"].flatten().tolist())
    assert drawn == {0, 1, 3, 4}


def test_prototypes_of_quadrants_are_means_of_known_positives_and_of_kmeans_their_centres():
    method = blending()
    seen = gather(method, 30, 31)
    table, counts = method.banks()["prototypes"].table()
    for c in range(NUM_CLASSES):
        by_quadrant: list[list[Tensor]] = [[], [], [], []]
        for batch, features in seen:
            evidence = evidence_of(method, batch)
            for n in range(NUM_IMAGES):
                if int(batch.targets[n, c]) == 1:
                    by_quadrant[quadrant_of_peak(evidence[n, c])].append(features[n, c])
        everything = [feature for part in by_quadrant for feature in part]
        for slot, part in enumerate(by_quadrant):
            mean = torch.stack(part or everything).mean(dim=0)
            torch.testing.assert_close(table[c, slot], mean, rtol=0, atol=1e-5)
            assert int(counts[c, slot]) == len(part or everything)

    method = blending(prototypes="kmeans", num_prototypes=3, start_epoch=3)
    gather(method, 30, 31)
    before, _ = method.banks()["prototypes"].table()
    seen = gather(method, 32, 33, epoch=1)
    after, _ = method.banks()["prototypes"].table()
    for c in range(NUM_CLASSES):
        features = [f[n, c] for batch, f in seen for n in range(NUM_IMAGES) if int(batch.targets[n, c]) == 1]
        expected = lloyd(features, before[c])
        stays = (expected == before[c]).all(dim=1)  # which the bank gives the class's mean
        torch.testing.assert_close(after[c][~stays], expected[~stays], rtol=0, atol=1e-5)


def test_prototypes_are_gathered_in_the_epoch_before_a_renewal_alone():
    settings = blending(start_epoch=2, renew_every_epochs=3).settings
    assert [epoch for epoch in range(12) if settings.is_renewing(epoch)] == [1, 2, 5, 8, 11]
    method, batch = blending(start_epoch=2, renew_every_epochs=3), given_batch(3)
    for epoch in range(8):
        output = method(batch, method.recall(batch, Progress(epoch=epoch)))
        assert ("positive_class" in output.extras) == settings.is_renewing(epoch + 1)


def test_pseudo_labels_neither_lend_nor_become_prototypes():
    method, batch = blending(), given_batch(3, 0.4)
    without = batch._replace(targets=batch.targets.clamp(max=0))
    believed = without._replace(pseudo_targets=torch.ones_like(batch.targets))
    output = method(believed, method.recall(believed, Progress()))
    assert len(output.extras["positive_class"]) == 0
    gather(method, 30, 31)
    recalled = method.recall(believed, BLENDING)
    assert float(recalled["num_lent"]) == float(recalled["num_drawn"]) == 0.0, "what is believed is not unknown"


def test_both_coefficients_learn_while_blending():
    method = blending()
    gather(method, 30, 31)
    batch = given_batch(3, 0.3)
    contract.PROGRESS, before = BLENDING, contract.PROGRESS
    try:
        slopes = gradients(method, batch)
    finally:
        contract.PROGRESS = before
    assert float(slopes["alpha.share"]) != 0.0
    assert float(slopes["beta.share"]) != 0.0


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"num_prototypes": 5}, "always four"),
        ({"pooling": "max"}, "pooling set, but"),
        ({"pooling": {"name": "weldon"}}, "pooling set, but"),
        ({"dropout": 0.5}, "dropout set, but"),
        ({"alpha": 1.0}, "less than 1"),
        ({"beta": 0.0}, "greater than 0"),
        ({"prototypes": "fifths"}, "kmeans"),
    ],
)
def test_settings_that_make_no_sense_are_refused(keys, word):
    with pytest.raises(ValidationError, match=word):
        METHODS["blending"](**{"name": "blending", "backbone": {"name": "resnet_small_gn"}, **keys})


def test_the_plan_says_what_classifying_mixtures_computes():
    method = tiny_method("blending", head={"feature_width": 64, "head_width": 48}, start_epoch=1)
    features = torch.randn(2, NUM_CLASSES, method.head.width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        method.head.classify(features).sum().backward()
    scale = Scale(world_size=1, global_batch=2, num_cells=1, targets=np.zeros((1, NUM_CLASSES), dtype=np.int8))
    (mixtures,) = (cost for cost in method.costs(scale) if cost.name == "mixtures")
    assert counter.get_total_flops() == pytest.approx(mixtures.flops, rel=0.1)  # two mixtures of an image; two images
