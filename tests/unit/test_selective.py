"""Claims about the asymmetric and the selective loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_mlpl.errors import ConfigError
from dist_mlpl.losses.asymmetric import asymmetric_loss
from dist_mlpl.losses.selective import selective_loss
from tests.support.losses import assert_agrees, gradient_of, random_case, selective_oracle

pytestmark = pytest.mark.unit

LOGITS = torch.tensor([[2, -1, 0.5, 1], [0, 1.5, -2, 0.25]], dtype=torch.float64)
TARGETS = torch.tensor([[1, -1, 0, 0], [0, 1, 0, -1]], dtype=torch.int8)
PLAIN, MIDDLE, PAPER = (0, 0, 0), (0, 1, 4), (1, 2, 7)
PRIOR_RULE = {"prior": torch.tensor([0.6, 0.2, 0.3, 0.6]), "prior_threshold": 0.5}


def exponents(gammas):
    return dict(zip(("gamma_pos", "gamma_neg", "gamma_unknown"), gammas, strict=True))


@pytest.mark.parametrize(
    ("gammas", "keys", "expected"),
    [
        (PLAIN, {"mode": "ignore"}, 1.467542),
        (MIDDLE, {"mode": "ignore"}, 0.876914),
        (PAPER, {"mode": "ignore"}, 0.335563),
        (PLAIN, {"mode": "negative"}, 4.574956),
        (MIDDLE, {"mode": "negative"}, 1.441603),
        (PAPER, {"mode": "negative"}, 0.522806),
        (MIDDLE, {"mode": "negative", "clip": 0.05}, 1.111714),
        (PLAIN, {"mode": "selective", "top_k": 1, "scope": "batch"}, 2.287618),
        (MIDDLE, {"mode": "selective", "top_k": 1, "scope": "batch"}, 0.920261),
        (PAPER, {"mode": "selective", "top_k": 1, "scope": "batch"}, 0.340978),
        (MIDDLE, {"mode": "selective", "top_k": 1}, 1.023170),
    ],
)
def test_the_loss_takes_the_published_values(gammas, keys, expected):
    assert float(selective_loss(LOGITS, TARGETS, **exponents(gammas), **keys)) == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize(("excludes", "expected"), [(True, 0.876914), (False, 0.876940)])
def test_labels_that_the_prior_ignores_use_up_the_top_k_only_in_the_released_codes_way(excludes, expected):
    value = selective_loss(
        LOGITS,
        TARGETS,
        mode="selective",
        top_k=1,
        scope="batch",
        exclude_prior_ignored=excludes,
        **exponents(MIDDLE),
        **PRIOR_RULE,
    )
    assert float(value) == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize(
    ("gammas", "clip", "expected"),
    [((0, 0), 0.0, 3.310282), ((0, 4), 0.05, 0.494074), ((1, 4), 0.05, 0.217606), ((0, 7), 0.05, 0.354337)],
)
def test_asl_takes_the_published_values(gammas, clip, expected):
    logits = torch.tensor([[2, -1, 0.5, -3], [0, 1.5, -2, 0.25]], dtype=torch.float64)
    targets = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.int8)
    value = asymmetric_loss(
        logits, targets, gamma_pos=gammas[0], gamma_neg=gammas[1], gamma_unknown=gammas[1], clip=clip
    )
    assert float(value) == pytest.approx(expected, abs=6e-7)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 7)),
    known_fraction=st.sampled_from([0.0, 0.2, 0.6, 1.1]),
    gammas=st.sampled_from([PLAIN, MIDDLE, PAPER, (0.5, 2.5, 1.5)]),
    clip=st.sampled_from([0.0, 0.05, 0.3]),
    mode=st.sampled_from(["ignore", "negative", "selective", "selective", "selective"]),
    top_k=st.sampled_from([0, 1, 2, 9]),
    scope=st.sampled_from(["image", "batch"]),
    has_prior=st.booleans(),
    exclude=st.booleans(),
)
def test_value_and_gradient_agree_with_loops_in_float64(
    seed, shape, known_fraction, gammas, clip, mode, top_k, scope, has_prior, exclude
):
    logits, targets = random_case(seed, shape, known_fraction)
    keys = {"mode": mode, "clip": clip, "top_k": top_k, "scope": scope, "exclude_prior_ignored": exclude}
    keys |= exponents(gammas)
    if has_prior:
        prior = torch.rand(shape[1], generator=torch.Generator().manual_seed(seed))
        keys |= {"prior": prior, "prior_threshold": 0.5}
    assert_agrees(lambda x: selective_loss(x, targets, **keys), lambda x: selective_oracle(x, targets, **keys), logits)


def test_three_equal_exponents_and_no_margin_are_plain_focal_loss_and_zero_is_cross_entropy():
    logits, targets = random_case(1, (5, 6))
    everything = torch.where(targets == 0, -1, targets)
    value = asymmetric_loss(logits, targets, gamma_pos=0, gamma_neg=0, gamma_unknown=0)
    expected = torch.nn.functional.softplus(-everything * logits).sum()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


def test_the_focal_weight_is_a_constant_for_the_gradient():
    logits = torch.tensor([[0.7, -0.4, 1.1]], dtype=torch.float64)
    targets = torch.tensor([[1, -1, 0]], dtype=torch.int8)
    _, gradient = gradient_of(lambda x: asymmetric_loss(x, targets, **exponents(PAPER)), logits)
    p = torch.sigmoid(logits[0])
    expected = torch.stack([-((1 - p[0]) ** 2), p[1] ** 3, p[2] ** 8])
    torch.testing.assert_close(gradient[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_second_derivatives_are_those_of_the_printed_loss(clip):
    logits, targets = random_case(4, (3, 5))
    keys = {"mode": "selective", "top_k": 1, "clip": clip} | exponents(PAPER)
    found = []
    for loss in (selective_loss, selective_oracle):
        leaf = logits.double().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf, targets, **keys), leaf, create_graph=True)
        found.append(torch.autograd.grad(slope.pow(2).sum(), leaf)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_ignored_labels_have_no_part_and_known_ones_always_take_part(scope):
    logits, targets = random_case(2, (6, 9), known_fraction=0.3)
    keys = {"mode": "selective", "top_k": 2, "scope": scope} | exponents(MIDDLE)
    prior = torch.tensor([0.9, 0.1] * 4 + [0.9])
    _, gradient = gradient_of(
        lambda x: selective_loss(x, targets, prior=prior, prior_threshold=0.5, **keys), logits.double()
    )
    assert gradient[targets != 0].all()
    assert not gradient[(targets == 0) & (prior > 0.5)].any()
    rare = (targets == 0) & (prior <= 0.5)
    num_left_out = int((rare & (gradient == 0)).sum())
    per_image = [min(2, int(row.sum())) for row in rare]
    assert num_left_out == (sum(per_image) if scope == "image" else min(12, int(rare.sum())))


def test_the_top_k_of_an_image_does_not_depend_on_its_batch():
    logits, targets = random_case(3, (8, 20), known_fraction=0.2)
    keys = {"mode": "selective", "top_k": 3} | exponents(PAPER)
    parts = sum(selective_loss(logits[i : i + 1], targets[i : i + 1], **keys) for i in range(8))
    torch.testing.assert_close(selective_loss(logits, targets, **keys), parts, rtol=1e-6, atol=0)


def test_all_labels_that_equal_the_last_of_the_batchs_top_k_are_ignored():
    logits = torch.tensor([[1.0, 3.0, 1.0, 0.0, 1.0]])
    targets = torch.zeros(1, 5, dtype=torch.int8)
    keys = {"mode": "selective", "top_k": 2, "scope": "batch"} | exponents(PLAIN)
    _, gradient = gradient_of(lambda x: selective_loss(x, targets, **keys), logits)
    assert gradient[0].nonzero()[:, 0].tolist() == [3]


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"mode": "selektive"}, "selective"),
        ({"mode": "ignore", "scope": "rank"}, "image"),
        ({"mode": "selective", "prior": torch.zeros(4)}, "prior_threshold"),
        ({"mode": "selective", "prior_threshold": 0.5}, "prior"),
        ({"mode": "selective", "prior": torch.zeros(3), "prior_threshold": 0.5}, r"\(4,\)"),
        ({"mode": "negative", "clip": 1.0}, "clip"),
    ],
)
def test_settings_that_mean_nothing_are_refused(keys, match):
    with pytest.raises(ConfigError, match=match):
        selective_loss(LOGITS, TARGETS, **exponents(PAPER), **keys)


def test_a_negative_exponent_is_refused():
    with pytest.raises(ConfigError, match="gamma_neg -1"):
        asymmetric_loss(LOGITS, TARGETS, gamma_pos=0, gamma_neg=-1, gamma_unknown=0)
