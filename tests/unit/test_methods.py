from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError

from dist_mlpl import comm
from dist_mlpl.methods.base import Method, images_alone, training_targets
from dist_mlpl.methods.table import METHODS, AnyMethodSettings
from tests.support.losses import masked_mean_bce_oracle, partial_bce_oracle
from tests.support.methods import (
    CONTRACT,
    NUM_CLASSES,
    PROGRESS,
    check_shares_add_up,
    gradients,
    random_batch,
    tiny_method,
)

pytestmark = pytest.mark.unit

NORMALIZATIONS = ["durand", "image_mean", "masked_mean", "assume_negative"]


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_contract(name, check):
    check(tiny_method(name))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__.removeprefix("check_"))
def test_every_loss_of_partial_bce_keeps_the_contract(normalization, check):
    check(tiny_method("partial_bce", normalization=normalization))


def test_the_table_is_sorted_and_each_row_answers_to_its_own_name():
    assert list(METHODS) == sorted(METHODS)
    for name, kind in METHODS.items():
        assert kind.model_fields["name"].default == name


def test_the_union_of_settings_knows_every_row_and_no_other():
    union = TypeAdapter(AnyMethodSettings)
    for name, kind in METHODS.items():
        assert type(union.validate_python({"name": name, "backbone": {"name": "resnet_small"}})) is kind
    with pytest.raises(ValidationError):
        union.validate_python({"name": "partial_bec", "backbone": {"name": "resnet_small"}})


def test_an_unknown_key_is_refused():
    with pytest.raises(ValidationError, match="normalisation"):
        METHODS["partial_bce"](backbone={"name": "resnet_small"}, normalisation="durand")


@pytest.mark.parametrize(
    ("name", "keys"),
    [*((name, {}) for name in METHODS), *((name, {"faithful": True}) for name in METHODS
       if "faithful" in METHODS[name].model_fields), ("srn", {"stage": "main"}), ("csl", {"mode": "ignore"}),
     ("spatial_consistency", {"expected_positives": 2.0, "spatial_weight": 0.0, "consistency_weight": 0.0})],
    ids=str,
)  # fmt: skip
def test_settings_that_a_run_saved_with_all_their_defaults_are_accepted_again(name, keys):
    settings = METHODS[name](backbone={"name": "resnet_small"}, **keys)
    assert METHODS[name].model_validate(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(
    "keys",
    [
        {"alpha": -4.0},
        {"alpha": float("nan")},
        {"alpha": 2.0, "beta": -1.0},
        {"alpha": -1.0, "beta": 2.0, "gamma": -1.0},
        {"normalization": "masked_mean", "gamma": 2.0},
    ],
)
def test_a_normaliser_that_would_not_do_what_it_says_is_refused(keys):
    with pytest.raises(ValidationError):
        METHODS["partial_bce"](backbone={"name": "resnet_small"}, **keys)


def test_recall_counts_valid_images_and_known_labels_over_all_ranks(monkeypatch):
    method = tiny_method("partial_bce")
    batch = random_batch(8, seed=0)
    batch = batch._replace(valid=torch.arange(8) < 6)
    monkeypatch.setattr(comm, "reduce_sum", lambda tensor: tensor.mul_(3))
    recalled = method.recall(batch, PROGRESS)
    assert recalled["num_valid"].tolist() == [18.0]
    assert recalled["num_known"].tolist() == [3.0 * int((batch.targets[:6] != 0).sum())]


def test_a_known_label_wins_over_a_belief_and_padding_knows_nothing():
    batch = random_batch(3, seed=0)._replace(
        targets=torch.tensor([[1, -1, 0, 0, 0]] * 3, dtype=torch.int8),
        pseudo_targets=torch.tensor([[-1, 1, 1, -1, 0]] * 3, dtype=torch.int8),
        valid=torch.tensor([True, True, False]),
    )
    targets = training_targets(batch)
    assert targets.dtype == torch.int8
    assert targets.tolist() == [[1, -1, 1, -1, 0], [1, -1, 1, -1, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_beliefs_count_as_known_in_the_loss(normalization):
    method = tiny_method("partial_bce", normalization=normalization)
    batch = random_batch(8, seed=1)
    beliefs = random_batch(8, seed=2).targets
    believed = batch._replace(pseudo_targets=beliefs)
    merged = batch._replace(targets=torch.where(batch.targets != 0, batch.targets, beliefs))
    losses = [method(b, method.recall(b, PROGRESS)).loss for b in (believed, merged)]
    assert torch.equal(losses[0], losses[1])


def test_the_loss_is_the_one_named_over_valid_rows_alone():
    batch = random_batch(8, seed=3)
    batch = batch._replace(valid=torch.arange(8) != 2)
    kept = batch.targets[batch.valid]
    for normalization in NORMALIZATIONS:
        method = tiny_method("partial_bce", normalization=normalization)
        output = method(batch, method.recall(batch, PROGRESS))
        logits = output.logits[batch.valid]
        expected = {
            "durand": partial_bce_oracle(logits, kept, alpha=-4.45, beta=5.45, gamma=1.0),
            "image_mean": partial_bce_oracle(logits, kept, alpha=1.0, beta=0.0, gamma=-1.0),
            "masked_mean": masked_mean_bce_oracle(logits, kept),
            "assume_negative": float(F.binary_cross_entropy_with_logits(logits, (kept == 1).float())),
        }
        assert float(output.loss.detach()) == pytest.approx(expected[normalization], rel=1e-5)


def test_gradients_of_the_parts_add_up_to_the_gradient_of_the_whole():
    method = tiny_method("partial_bce").double()
    batch = random_batch(16, seed=4)
    batch = batch._replace(images=batch.images.double())
    whole = {name: gradient.clone() for name, gradient in gradients(method, batch).items()}
    recalled = method.recall(batch, PROGRESS)
    method.zero_grad()
    for start in (0, 8):
        method(batch.rows(start, start + 8), recalled).loss.backward()
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-6, atol=1e-9)


def test_the_contract_catches_a_mean_where_a_share_is_due():
    class Mean(type(tiny_method("partial_bce"))):
        def _share(self, logits, batch, recalled):
            return super()._share(logits, batch, self.recall(batch, PROGRESS))

    method = tiny_method("partial_bce")
    method.__class__ = Mean
    with pytest.raises(AssertionError):
        check_shares_add_up(method)


def test_frozen_parameters_are_in_no_group():
    method: Method = tiny_method("partial_bce", backbone={"name": "resnet_small_gn", "freeze": "all"})
    groups = method.parameter_groups()
    assert groups["backbone"] == []
    assert len(groups["head"]) == 2


def test_asking_ends_with_its_block_even_after_an_error():
    method = tiny_method("partial_bce")
    with method.asking("heatmaps"), pytest.raises(RuntimeError), method.asking("other"):
        raise RuntimeError
    assert not method.is_asked("other")
    assert not method.is_asked("heatmaps")


def test_images_alone_are_valid_and_unlabelled():
    batch = images_alone(torch.zeros(4, 3, 8, 8), NUM_CLASSES)
    assert bool(batch.valid.all())
    assert not batch.targets.any()
    assert batch.index.dtype == torch.int64
    assert batch.rows(1, 3).num_images == 2
