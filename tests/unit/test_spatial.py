"""Claims about the spatial regularisation branch: its numbers, its exact simplifications, its sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_mlpl.errors import ConfigError
from dist_mlpl.models.backbone import BackboneSettings, build_backbone
from dist_mlpl.models.spatial import MapFilters, SpatialBranch, SpatialSettings
from dist_mlpl.models.trunk_layers import MapShape, map_shape, tapped_maps
from tests.support.spatial import Printed, spatial_oracle

pytestmark = pytest.mark.unit

TINY = {"attention_width": 5, "mixed_width": 4, "kernels": 2}
SHAPE = MapShape(6, 4, 4)
NUM_CLASSES = 7


def branch_of(*, shape: MapShape = SHAPE, num_classes: int = NUM_CLASSES, seed: int = 0, **keys: Any) -> SpatialBranch:
    """Tiny, in float64, its weights far from their start."""
    torch.manual_seed(seed)
    flags = {"is_regularising": True, "use_scale": True} | {
        k: keys.pop(k) for k in list(keys) if k[:3] in ("is_", "use")
    }
    branch = SpatialBranch(SpatialSettings(**(TINY | keys)), shape, num_classes, **flags).double()
    with torch.no_grad():
        for name, parameter in branch.named_parameters():
            parameter.normal_(std=0.5)
            if name.endswith("bias") and not name.startswith("maps.confidence"):
                parameter.abs_()  # or all that is behind a ReLU might be 0
        for name, buffer in branch.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 2.0) if name.endswith("var") else buffer.normal_()
    return branch


def random_map(num_images: int = 3, *, seed: int = 1, shape: MapShape = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, *shape, generator=generator, dtype=torch.float64)


def sure(branch: SpatialBranch) -> SpatialBranch:
    """Every cell certain of every class: U is then A."""
    with torch.no_grad():
        branch.maps.confidence_weight.zero_()
        branch.maps.confidence_bias.fill_(50.0)
    return branch


def attention_of(branch: SpatialBranch, feature_map: Tensor) -> Tensor:
    """(B, C, h, w) A, by the oracle."""
    return spatial_oracle(branch, feature_map, grid=2).attention


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("grid", [None, 2])
@pytest.mark.parametrize("keys", [{"norm": "none"}, {"norm": "none", "use_scale": False}, {"norm": "batch"}, "eval"])
def test_values_and_gradients_equal_the_equations_in_loops(chunk: int | None, grid: int | None, keys: Any) -> None:
    branch = branch_of(chunk=chunk, grid=grid, **({"norm": "batch"} if keys == "eval" else keys)).train(keys != "eval")
    feature_map = random_map().requires_grad_()
    leaves = {"feature_map": feature_map, **dict(branch.named_parameters())}
    expected: Printed = spatial_oracle(branch, feature_map, grid=grid, scale=branch.maps._scale != 1.0)
    found = branch(feature_map, with_heatmaps=True)
    assert expected.regularised is not None
    assert float(expected.regularised.detach().std(dim=0).max()) > 1e-3  # ReLUs let something through
    torch.testing.assert_close(found.attended, expected.attended, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.regularised, expected.regularised, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.heatmaps, expected.weighted * 16, rtol=1e-10, atol=1e-10)
    slopes = random_targets(found.attended), random_targets(found.regularised)
    gradients = [
        torch.autograd.grad((of.attended * slopes[0]).sum() + (of.regularised * slopes[1]).sum(), list(leaves.values()))
        for of in (found, expected)
    ]
    for name, one, other in zip(leaves, *gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def random_targets(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(2), dtype=like.dtype)


def test_attention_sums_to_one_over_the_cells_of_each_class_and_image() -> None:
    branch = sure(branch_of()).eval()
    heatmaps = branch(random_map(), with_heatmaps=True).heatmaps
    torch.testing.assert_close(heatmaps.mean(dim=(2, 3)), torch.ones(3, NUM_CLASSES, dtype=torch.float64))


def test_weighted_attention_never_exceeds_attention() -> None:
    branch, feature_map = branch_of().eval(), random_map()
    weighted = branch(feature_map, with_heatmaps=True).heatmaps
    attention = sure(branch)(feature_map, with_heatmaps=True).heatmaps
    assert bool((weighted <= attention + 1e-12).all())


def test_the_attended_logit_is_the_confidence_layer_on_attention_pooled_features() -> None:
    branch, feature_map = branch_of().eval(), random_map()
    pooled = torch.einsum("bcyx,bfyx->bcf", attention_of(branch, feature_map), feature_map)
    expected = (pooled * branch.maps.confidence_weight).sum(dim=2) + branch.maps.confidence_bias
    torch.testing.assert_close(branch(feature_map).attended, expected, rtol=1e-10, atol=1e-10)


def test_without_attention_the_attended_logit_is_that_of_average_pooling() -> None:
    branch, feature_map = branch_of().eval(), random_map()
    with torch.no_grad():
        branch.maps.attention_weight.zero_()
    maps = branch.maps
    expected = F.linear(feature_map.mean(dim=(2, 3)), maps.confidence_weight, maps.confidence_bias)
    torch.testing.assert_close(branch(feature_map).attended, expected, rtol=1e-10, atol=1e-10)


def test_swapping_two_cells_swaps_the_maps_but_not_what_regularises() -> None:
    branch, feature_map = branch_of().eval(), random_map()
    with torch.no_grad():
        keep = torch.zeros(3, 3, dtype=torch.float64)
        keep[1, 1] = 1.0  # without its neighbours, a cell's attention is its own
        branch.hidden[2].weight.mul_(keep)
    swapped = feature_map.clone()
    swapped[:, :, 0, 1], swapped[:, :, 2, 3] = feature_map[:, :, 2, 3], feature_map[:, :, 0, 1]
    one, other = branch(feature_map, with_heatmaps=True), branch(swapped, with_heatmaps=True)
    torch.testing.assert_close(one.attended, other.attended)
    torch.testing.assert_close(one.heatmaps[:, :, 0, 1], other.heatmaps[:, :, 2, 3])
    torch.testing.assert_close(one.heatmaps[:, :, 1, 1], other.heatmaps[:, :, 1, 1])
    assert float((one.regularised - other.regularised).detach().abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("num_classes", "millions"),
    [
        (80, (2.93, 0.08, 0.04, 0.26, 0.40, 0.16)),
        (601, (3.19, 0.62, 0.31, 0.26, 0.40, 1.23)),
        (7186, (6.57, 7.37, 3.68, 0.26, 0.40, 14.7)),
        (9605, (7.81, 9.85, 4.92, 0.26, 0.40, 19.7)),
    ],
)
def test_parameters_are_as_many_as_the_paper_s_layers_have(num_classes: int, millions: tuple[float, ...]) -> None:
    with torch.device("meta"):
        shape = MapShape(1024, 14, 14)
        branch = SpatialBranch(SpatialSettings(), shape, num_classes, is_regularising=True, use_scale=True)
    counts = {name: p.numel() for name, p in branch.named_parameters()}

    def count(*prefixes: str) -> int:
        return sum(number for name, number in counts.items() if name.startswith(prefixes))

    found = (
        count("hidden.", "maps.attention_") + num_classes,  # and the bias that cancels in the softmax
        count("maps.confidence_"),
        count("maps.mixing_"),
        count("regularization.mixing."),
        count("regularization.filters."),
        count("regularization.linear."),
    )
    assert sum(found) - num_classes == sum(counts.values())
    for number, expected in zip(found, millions, strict=True):
        assert number / 1e6 == pytest.approx(expected, abs=0.051 if expected > 10 else 0.0051)
    assert branch.regularization is not None
    assert branch.regularization.filters.weight.shape == (2048, 1, 14, 14)


def test_filters_are_a_convolution_with_a_group_for_each_map() -> None:
    torch.manual_seed(0)
    filters = MapFilters(5, 4, (3, 2), has_bias=True).double()
    maps = torch.randn(2, 5, 3, 2, dtype=torch.float64)
    expected = F.conv2d(maps, filters.weight, filters.bias, groups=5).flatten(1)
    torch.testing.assert_close(filters(maps.flatten(2).transpose(1, 2)), expected)


def kept_numbers(branch: SpatialBranch, feature_map: Tensor) -> int:
    """How many numbers besides the weights a forward keeps for its backward, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in branch.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        tensors.append(tensor)  # so that no storage is used twice
        return tensor

    tensors: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = branch(feature_map)
    del output
    return sum(number for pointer, number in kept.items() if pointer not in own)


def test_what_is_kept_for_the_backward_pass_holds_no_maps_of_the_classes() -> None:
    shape, sizes = MapShape(4, 8, 8), (100, 400)
    feature_map = random_map(2, shape=shape)
    whole, cut = (
        [kept_numbers(branch_of(shape=shape, num_classes=C, chunk=chunk), feature_map) for C in sizes]
        for chunk in (1000, 25)
    )
    cells = 2 * 64
    assert whole[1] - whole[0] > 3 * 300 * cells  # several maps of each class
    assert cut[1] - cut[0] < 300 * cells / 4  # no map of any; logits of each class and image
    assert cut[1] < whole[1] / 10


def test_by_default_maps_of_few_classes_are_kept_and_those_of_many_come_in_parts() -> None:
    for num_classes, num_parts in ((80, 1), (601, 1), (9605, 4)):
        with torch.device("meta"):
            shape = MapShape(1024, 14, 14)
            branch = SpatialBranch(SpatialSettings(), shape, num_classes, is_regularising=True, use_scale=True)
        parts = branch.maps._parts(num_cells=8 * 196)
        assert len(parts) == num_parts
        assert sum(part.attention.shape[0] for part in parts) == num_classes


@pytest.mark.parametrize("chunk", [None, 3])
def test_under_autocast_logits_stay_float32_and_near(chunk: int | None) -> None:
    branch, feature_map = branch_of(chunk=chunk).float(), random_map().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = branch(feature_map)
    expected = branch(feature_map)
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.2)
    (found.attended.sum() + found.regularised.sum()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in branch.parameters())


def test_a_grid_that_does_not_divide_the_map_is_refused() -> None:
    with pytest.raises(ConfigError, match="grid of 3 x 3 for maps of 4 x 4"):
        branch_of(grid=3)


def test_a_norm_over_images_refuses_one_image_in_training_alone() -> None:
    branch = branch_of(norm="batch")
    with pytest.raises(ConfigError, match="micro-batch of one image"):
        branch(random_map(1))
    assert branch.eval()(random_map(1)).regularised.shape == (1, NUM_CLASSES)


@pytest.mark.parametrize("name", ["resnet18", "resnet_small", "resnet_small_gn"])
def test_a_layer_s_map_has_the_shape_foretold_and_the_trunk_s_output_stays(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneSettings(name=name), image_size=32)[0]
    before = {key: buffer.clone() for key, buffer in backbone.named_buffers()}
    shapes = {layer: map_shape(backbone, layer, image_size=32) for layer in ("layer1", "layer3", None)}
    assert all(torch.equal(before[key], buffer) for key, buffer in backbone.named_buffers())
    backbone.eval()
    images = torch.randn(2, 3, 32, 32)
    for layer, shape in shapes.items():
        tapped, last = tapped_maps(backbone, images, layer)
        assert tapped.shape[1:] == shape
        assert torch.equal(last, backbone(images))


@pytest.mark.parametrize("name", ["convnext_tiny", "vit_b_16", "swin_t"])
def test_trunks_without_stages_give_their_last_map_alone(name: str) -> None:
    backbone = build_backbone(BackboneSettings(name=name), image_size=32)[0]
    assert map_shape(backbone, None, image_size=32).num_features == backbone.num_features
    with pytest.raises(ConfigError, match="null, the output of the whole trunk"):
        map_shape(backbone, "layer3", image_size=32)


def test_an_unknown_layer_lists_the_known_ones() -> None:
    backbone = build_backbone(BackboneSettings(name="resnet_small"), image_size=32)[0]
    with pytest.raises(ConfigError, match="one of 'layer1', 'layer2', 'layer3'"):
        map_shape(backbone, "layer4", image_size=32)
