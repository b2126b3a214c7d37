"""Claims about SRN as a method: which parts a stage trains, on which loss, and what it starts from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from dist_mlpl.errors import CheckpointError
from dist_mlpl.methods.srn import Srn
from dist_mlpl.methods.table import METHODS
from tests.support.losses import masked_mean_bce_oracle, softplus
from tests.support.methods import CONTRACT, PROGRESS, gradients, random_batch, tiny_method, trained

pytestmark = pytest.mark.unit

STAGES = ("main", "attention", "branch", "joint")
SPATIAL = {"layer": "layer2", "attention_width": 16, "mixed_width": 8, "kernels": 2}
TRAINED = {
    "main": ("backbone.", "head."),
    "attention": ("spatial.hidden.", "spatial.maps.attention_weight", "spatial.maps.confidence_"),
    "branch": ("spatial.maps.mixing_", "spatial.regularization."),
    "joint": ("backbone.", "head.", "spatial."),
}


def srn(stage: str, *, spatial: dict[str, Any] | None = None, **keys: Any) -> Srn:
    start = {} if stage in ("main", "joint") else {"init_from": "elsewhere"}
    method = tiny_method("srn", stage=stage, spatial=SPATIAL | (spatial or {}), **(start | keys))
    assert isinstance(method, Srn)
    return method


def names_of(method: Srn) -> list[str]:
    return list(method.state_dict())


@pytest.mark.parametrize(
    "keys",
    [*({"stage": stage} for stage in STAGES), {"stage": "joint", "spatial": {"norm": "batch", "chunk": 2, "grid": 2}},
     {"stage": "branch", "faithful": True, "dropout": 0.3}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__.removeprefix("check_"))
def test_every_stage_keeps_the_contract(keys: dict[str, Any], check: Any) -> None:
    check(srn(**keys))


@pytest.mark.parametrize("stage", STAGES)
def test_exactly_the_parameters_of_the_stage_get_gradients(stage: str) -> None:
    method = srn(stage)
    assert set(trained(method)) == {n for n, _ in method.named_parameters() if n.startswith(TRAINED[stage])}
    found = gradients(method, random_batch(8, seed=0))
    assert set(found) == set(trained(method))
    own = [name for name in found if not name.startswith("backbone.")]  # whose blocks start as their shortcuts
    assert all(bool(found[name].any()) for name in own)
    assert all(p.grad is None for p in method.parameters() if not p.requires_grad)


def test_the_stages_parts_are_all_parameters_and_do_not_overlap() -> None:
    every = [n for n, _ in srn("joint").named_parameters()]
    for name in every:
        assert sum(name.startswith(TRAINED[stage]) for stage in ("main", "attention", "branch")) == 1, name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("faithful", [False, True])
def test_losses_and_logits_are_those_of_the_stage_over_known_labels(stage: str, faithful: bool) -> None:
    method = srn(stage, faithful=faithful, **({} if stage == "main" else {"alpha": 0.3})).eval()
    batch = random_batch(8, seed=1)
    batch = batch._replace(valid=torch.arange(8) < 6)
    targets = torch.where(batch.valid[:, None], batch.targets, 0)
    output = method(batch, method.recall(batch, PROGRESS))
    tapped = batch.images
    for name, layer in method.backbone.named_children():
        tapped = layer(tapped)
        if name == "layer2":
            of_layer2 = tapped
    main = method.head(tapped).logits
    terms: dict[str, torch.Tensor] = {"main": main}
    logits = main
    if method.spatial is not None:
        spatial = method.spatial(of_layer2)
        second = spatial.attended if stage == "attention" else spatial.regularised
        logits = 0.3 * main + 0.7 * second
        terms = {
            "attention": {"attention": spatial.attended},
            "branch": {"branch": spatial.regularised},
            "joint": {"final": logits, "attention": spatial.attended},
        }[stage]
    torch.testing.assert_close(output.logits, logits)
    expected = {name: loss_oracle(value.detach(), targets, faithful, num_images=6) for name, value in terms.items()}
    assert {name: float(term) for name, term in output.terms.items()} == pytest.approx(expected, rel=1e-5)


def loss_oracle(logits: torch.Tensor, targets: torch.Tensor, faithful: bool, *, num_images: int) -> float:
    if not faithful:
        return masked_mean_bce_oracle(logits, targets)
    rows, columns = targets.nonzero(as_tuple=True)
    return (
        sum(softplus(-int(targets[b, c]) * float(logits[b, c])) for b, c in zip(rows, columns, strict=True))
        / num_images
    )


def test_stage_main_is_the_masked_mean_method_bit_for_bit() -> None:
    one, other = srn("main"), tiny_method("partial_bce", normalization="masked_mean")
    assert names_of(one) == list(other.state_dict())
    batch = random_batch(8, seed=2)
    found, expected = gradients(one, batch), gradients(other, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_frozen_main_part_keeps_its_statistics_and_drops_nothing() -> None:
    for stage in ("attention", "branch"):
        method = srn(stage, backbone={"name": "resnet_small"}, dropout=0.5).train()
        before = {name: buffer.clone() for name, buffer in method.backbone.named_buffers()}
        batch = random_batch(8, seed=3)
        outputs = [method(batch, method.recall(batch, PROGRESS)) for _ in range(2)]
        assert torch.equal(outputs[0].logits, outputs[1].logits)
        assert all(torch.equal(before[name], buffer) for name, buffer in method.backbone.named_buffers())


def test_each_stage_holds_all_tensors_of_the_one_before_and_only_adds() -> None:
    previous: set[str] = set()
    for stage in STAGES:
        names = set(names_of(srn(stage)))
        assert previous <= names
        assert (previous == names) == (stage == "joint")  # branch is whole
        previous = names


@pytest.mark.parametrize("stage", ["attention", "branch"])
def test_a_stage_that_freezes_parts_needs_a_run_to_take_them_from(stage: str) -> None:
    with pytest.raises(ValidationError, match="needs init_from, a run of stage"):
        METHODS["srn"](backbone={"name": "resnet_small"}, stage=stage)


def test_a_share_of_the_main_classifier_is_refused_where_there_is_no_other() -> None:
    with pytest.raises(ValidationError, match="alpha set, but stage 'main'"):
        METHODS["srn"](backbone={"name": "resnet_small"}, stage="main", alpha=0.1)


def test_a_start_without_a_part_that_was_trained_before_is_refused() -> None:
    taken = names_of(srn("main"))
    srn("main").check_start("run", [])
    srn("attention").check_start("run", taken)
    with pytest.raises(CheckpointError, match=r"expected: a run of stage 'attention'"):
        srn("branch").check_start("run", taken)
    with pytest.raises(CheckpointError, match=r"first 'spatial.maps.mixing_weight'"):
        srn("joint").check_start("run", names_of(srn("attention")))
    srn("joint").check_start("run", names_of(srn("branch")))
    other_width = [name for name in names_of(srn("attention")) if not name.startswith("spatial.hidden.2")]
    with pytest.raises(CheckpointError, match=r"2 of .* first 'spatial.hidden.2.weight'"):
        srn("branch").check_start("run", other_width)


def test_beliefs_count_as_known_labels() -> None:
    method = srn("joint").eval()
    batch, beliefs = random_batch(8, seed=4), random_batch(8, seed=5).targets
    merged = batch._replace(targets=torch.where(batch.targets != 0, batch.targets, beliefs))
    found, expected = (
        method(b, method.recall(b, PROGRESS)).loss for b in (batch._replace(pseudo_targets=beliefs), merged)
    )
    assert torch.equal(found, expected)


def test_scaling_weighted_attention_is_scaling_the_mixing_weights() -> None:
    method, faithful = srn("joint").eval(), srn("joint", faithful=True).eval()
    faithful.load_state_dict(method.state_dict())
    with torch.no_grad():
        faithful.spatial.maps.mixing_weight.mul_(16)  # 4 x 4 cells
    batch = random_batch(8, seed=6)
    torch.testing.assert_close(method(batch, None).logits, faithful(batch, None).logits)


def test_heatmaps_are_weighted_attention_and_in_stage_main_activation_maps() -> None:
    images = random_batch(4, seed=7).images
    for stage in STAGES:
        heatmaps = srn(stage).eval().explain(images)
        assert heatmaps.shape == (4, 5, 4, 4)
        if stage != "main":
            assert float(heatmaps.min()) >= 0.0
            assert float(heatmaps.mean(dim=(2, 3)).max()) <= 1.0
