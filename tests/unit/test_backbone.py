from __future__ import annotations

import copy
import functools
import urllib.error
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from pydantic import ValidationError
from torch import nn

from dist_mlpl.errors import ConfigError, StorageError
from dist_mlpl.models.backbone import BackboneSettings, LoadReport, backbone_names, build_backbone

pytestmark = pytest.mark.unit

# name: image size, F, cells a side
FAMILIES = {
    "resnet18": (64, 512, 2),
    "convnext_tiny": (64, 768, 2),
    "vit_b_16": (32, 768, 2),
    "swin_t": (64, 768, 2),
    "resnet_small": (64, 128, 8),
    "resnet_small_gn": (64, 128, 8),
}


@functools.cache
def family(name: str):
    """One trunk of each family, in evaluation mode; tests only read it."""
    torch.manual_seed(0)
    return build_backbone(BackboneSettings(name=name), image_size=FAMILIES[name][0])[0].eval()


def small(**keys):
    torch.manual_seed(1)
    return build_backbone(BackboneSettings(**({"name": "resnet_small"} | keys)), image_size=32)


def save(state: dict[str, torch.Tensor], path: Path) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_a_feature_map_and_trains_every_parameter(name):
    size, num_features, side = FAMILIES[name]
    backbone = copy.deepcopy(family(name)).train()
    feature_map = backbone(torch.randn(2, 3, size, size))
    assert feature_map.shape == (2, num_features, side, side)
    assert backbone.num_features == num_features
    assert all(p.dim() > 0 for p in backbone.parameters())
    feature_map.square().mean().backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "vit_b_16", "swin_t"])
def test_the_trunk_computes_what_torchvisions_model_computes(name):
    """Tensors keep torchvision's names, and pooling the feature map gives the features before its classifier."""
    size, num_features, _ = FAMILIES[name]
    backbone = family(name)
    kwargs = {"image_size": size} if name.startswith("vit") else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=num_features, **kwargs).eval()
    left_out = model.load_state_dict(backbone.state_dict(), strict=False)
    assert left_out.unexpected_keys == []
    assert all(key.split(".")[0] in ("fc", "classifier", "head", "heads") for key in left_out.missing_keys)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    caught: list[torch.Tensor] = []
    linear.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        feature_map = backbone(images)
        if name.startswith("vit"):  # it classifies the class token; look at the patch tokens instead
            model.encoder.register_forward_hook(lambda _m, _i, tokens: caught.append(tokens[:, 1:].mean(1)))
            model(images)
            caught = caught[:1]
        else:
            model(images)
    pooled = feature_map.mean((2, 3))
    if name == "convnext_tiny":  # torchvision pools before its norm, the trunk norms each cell
        trunk = backbone.features(images).mean((2, 3), keepdim=True)
        pooled = backbone.classifier(trunk).flatten(1)
    torch.testing.assert_close(pooled, caught[0], rtol=1e-4, atol=1e-5)


def test_vit_cells_keep_the_place_of_their_patches():
    """With attention and MLPs silenced a cell depends on its own patch alone."""
    backbone = copy.deepcopy(family("vit_b_16"))
    with torch.no_grad():
        for block in backbone.encoder.layers:
            block.self_attention.out_proj.weight.zero_()
            block.mlp[3].weight.zero_()
    images = torch.randn(1, 3, 32, 32)
    changed = images.clone()
    changed[:, :, 16:, :16] += 1.0  # lower left
    with torch.no_grad():
        moved = (backbone(images) != backbone(changed)).any(dim=1)[0]
    assert moved.tolist() == [[False, False], [True, False]]


def test_the_small_nets_differ_in_their_norm_alone():
    plain, groups = family("resnet_small"), family("resnet_small_gn")
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in groups.named_parameters()}
    assert sum(p.numel() for p in plain.parameters()) == 696_416
    assert any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in groups.modules())


@pytest.mark.parametrize(
    ("name", "nearest"), [("resnet81", "resnet18"), ("vit_b16", "vit_b_16"), ("alexnet", "nearest")]
)
def test_an_unknown_name_is_told_the_nearest(name, nearest):
    with pytest.raises(ConfigError, match=nearest):
        build_backbone(BackboneSettings(name=name), image_size=64)


def test_names_are_sorted_and_cover_the_families():
    names = backbone_names()
    assert names == sorted(set(names))
    assert {
        "resnet152",
        "resnext50_32x4d",
        "wide_resnet50_2",
        "convnext_large",
        "vit_h_14",
        "swin_v2_b",
        *FAMILIES,
    } <= set(names)


def test_a_vit_refuses_a_size_its_patches_do_not_tile():
    with pytest.raises(ConfigError, match="multiple of its patch size, 16"):
        build_backbone(BackboneSettings(name="vit_b_16"), image_size=50)


def test_drop_rises_with_depth_and_is_refused_where_there_is_no_place_for_it():
    backbone, _ = build_backbone(BackboneSettings(name="swin_t", drop=0.3), image_size=64)
    rates = [m.p for m in backbone.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0.0, pytest.approx(0.3))
    assert {m.p for m in family("convnext_tiny").modules() if isinstance(m, torchvision.ops.StochasticDepth)} == {0.0}
    with pytest.raises(ConfigError, match="drop"):
        small(drop=0.1)
    with pytest.raises(ValidationError):
        BackboneSettings(name="swin_t", drop=1.0)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
def test_weights_round_trip_through_a_file_whatever_prefix_it_carries(tmp_path, suffix, prefix):
    source, _ = small()
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    state["head.linear.weight"] = torch.zeros(5, 128)
    torch.manual_seed(7)
    loaded, report = build_backbone(
        BackboneSettings(name="resnet_small", weights=save(state, tmp_path / f"w{suffix}")), image_size=32
    )
    for name, tensor in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert set(report.loaded) == set(source.state_dict())
    assert report.missing == report.other_shape == report.resized == ()
    assert report.unexpected == ("head.linear.weight",)


def test_what_did_not_fit_is_reported_and_left_as_it_was(tmp_path):
    source, _ = small()
    state = source.state_dict()
    del state["layer3.1.conv2.weight"]
    state["conv1.weight"] = torch.zeros(32, 3, 5, 5)
    state["fc.bias"] = torch.zeros(3)
    path = save({"state_dict": state, "epoch": 3}, tmp_path / "w.pt")
    fresh, _ = small()
    loaded, report = small(weights=path)
    assert report.missing == ("layer3.1.conv2.weight",)
    assert report.other_shape == ("conv1.weight",)
    assert report.unexpected == ("fc.bias",)
    assert len(report.loaded) == len(state) - 2
    assert torch.equal(loaded.conv1.weight, fresh.conv1.weight)
    text = str(report)
    assert all(name in text for name in ("layer3.1.conv2.weight", "conv1.weight", "fc.bias", path))


def test_random_weights_say_so():
    assert str(small()[1]) == "backbone: random weights"
    assert small()[1] == LoadReport(source=None)


def test_a_file_of_which_nothing_fits_is_an_error(tmp_path):
    path = save({"encoder.w": torch.zeros(3)}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="no tensor of"):
        small(weights=path)


def test_a_missing_or_broken_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(StorageError, match=r"absent\.pt"):
        small(weights=str(tmp_path / "absent.pt"))
    for name in ("broken.pt", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(ConfigError, match=name):
            small(weights=str(tmp_path / name))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ConfigError, match=r"list\.pt"):
        small(weights=str(tmp_path / "list.pt"))


@pytest.mark.parametrize("weights", ["torchvision", "IMAGENET1K_V1"])
def test_torchvisions_weights_come_from_its_download_folder(tmp_path, monkeypatch, weights):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    entry = torchvision.models.get_model_weights("resnet18")["IMAGENET1K_V1"]
    file = tmp_path / "hub" / "checkpoints" / entry.url.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    source = {n: t.clone() for n, t in family("resnet18").state_dict().items()}
    torch.save(source | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, file)
    backbone, report = build_backbone(BackboneSettings(name="resnet18", weights=weights), image_size=64)
    assert torch.equal(backbone.layer4[1].conv2.weight, source["layer4.1.conv2.weight"])
    assert report.unexpected == ("fc.weight", "fc.bias")
    assert report.missing == ()


def test_a_failed_download_is_a_storage_error_with_a_way_out(tmp_path, monkeypatch):
    def refuse(*_args, **_keys):
        raise urllib.error.URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(StorageError, match="no route"):
        build_backbone(BackboneSettings(name="resnet18", weights="torchvision"), image_size=64)


@pytest.mark.parametrize(("name", "weights"), [("resnet18", "IMAGENET1K_V9"), ("resnet_small", "torchvision")])
def test_unknown_weights_are_told_the_known_ones(name, weights):
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        build_backbone(BackboneSettings(name=name, weights=weights), image_size=64)


def test_positions_of_another_image_size_are_interpolated_and_reported(tmp_path):
    state = {
        n: t for n, t in family("vit_b_16").state_dict().items() if n.startswith("encoder.pos") or n == "class_token"
    }
    path = save(state, tmp_path / "w.safetensors")
    backbone, report = build_backbone(BackboneSettings(name="vit_b_16", weights=path), image_size=64)
    assert report.resized == ("encoder.pos_embedding",)
    assert set(report.loaded) == {"encoder.pos_embedding", "class_token"}
    assert backbone.encoder.pos_embedding.shape == (1, 17, 768)
    assert torch.equal(backbone.encoder.pos_embedding[:, 0], state["encoder.pos_embedding"][:, 0])


def test_frozen_parameters_get_no_gradient_and_frozen_batchnorm_keeps_its_statistics():
    backbone, _ = small(freeze=["conv1", "bn1", "layer1"])
    assert {n.split(".")[0] for n, p in backbone.named_parameters() if not p.requires_grad} == {
        "conv1",
        "bn1",
        "layer1",
    }
    before = {n: b.clone() for n, b in backbone.named_buffers()}
    backbone.train()(torch.randn(4, 3, 32, 32)).mean().backward()
    changed = {n.split(".")[0] for n, b in backbone.named_buffers() if not torch.equal(b, before[n])}
    assert changed == {"layer2", "layer3"}
    assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())


def test_freezing_all_leaves_nothing_to_train():
    backbone, _ = small(freeze="all")
    assert not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize(
    ("prefix", "nearest"), [("layer9", "layer1"), ("layer", "layer1"), ("layer1.0.convl", "layer1.0.conv1")]
)
def test_an_unknown_prefix_to_freeze_is_told_the_nearest(prefix, nearest):
    with pytest.raises(ConfigError, match=nearest):
        small(freeze=[prefix])
