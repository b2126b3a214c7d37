"""Owns the trunk, which maps images to a feature map: torchvision's families and two small residual nets of our own."""

from __future__ import annotations

import io
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import safetensors.torch
import torch
import torchvision
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.vision_transformer import interpolate_embeddings
from torchvision.ops import StochasticDepth

from dist_mlpl import storage
from dist_mlpl.errors import ConfigError, StorageError, nearest_names
from dist_mlpl.settings import Settings

FAMILIES = ("resnet", "resnext", "wide_resnet", "convnext_", "vit_", "swin_")
OUR_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "resnet_small": nn.BatchNorm2d,
    "resnet_small_gn": partial(nn.GroupNorm, 8),
}


class BackboneSettings(Settings):
    """The trunk, the source of its weights, and which of them are frozen.

    Args:
        name: a torchvision name (resnet*, resnext*, wide_resnet*, convnext_*, vit_*, swin_*), or `resnet_small`
            (0.7 M weights, made for images of 48 to 64 pixels), or `resnet_small_gn` (the same with GroupNorm).
        weights: None for random ones; `torchvision` for its default ones; a name in torchvision's table such as
            `IMAGENET1K_V2`; or a local path or URL ending in .pt, .pth or .safetensors.
        freeze: prefixes of parameter names up to a dot (`layer1`, `features.0`), or `all`. A frozen BatchNorm
            also keeps its running statistics.
        drop: largest probability of skipping a residual branch (convnext, swin; grows linearly with depth), or of
            dropping a feature inside a block (vit); in [0, 1). The residual nets have neither: 0 only.
    """

    name: str
    weights: str | None = None
    freeze: tuple[str, ...] | Literal["all"] = ()
    drop: float = Field(default=0.0, ge=0.0, lt=1.0)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What happened to every tensor when weights were loaded; the caller prints it.

    Args:
        source: the settings' `weights`; None when all are random.
        loaded: names taken from the source.
        resized: those of them that are positional embeddings, interpolated to another image size.
        missing: names in the trunk but not in the source.
        unexpected: names in the source but not in the trunk, usually a classifier.
        other_shape: names present in both with different shapes, not loaded.
    """

    source: str | None
    loaded: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    other_shape: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.source is None:
            return "backbone: random weights"
        lines = [f"backbone: {len(self.loaded)} tensors loaded from {self.source}"]
        for label in ("resized", "missing", "unexpected", "other_shape"):
            names = getattr(self, label)
            more = f", and {len(names) - 8} more" if len(names) > 8 else ""
            if names:
                lines.append(f"  {label.replace('_', ' ')}: {len(names)} ({', '.join(names[:8])}{more})")
        return "\n".join(lines)


class Backbone(nn.Module):
    """A trunk that applies the given layers one after another, under the names torchvision gives them.

    Args:
        layers: in order of use.
        num_features: F, channels of the feature map.

    Differs: ConvNeXt's last norm acts on each cell; torchvision pools first.
    """

    num_features: int

    def __init__(self, layers: Mapping[str, nn.Module], num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W), normalised, to a feature map (B, F, h, w)."""
        feature_map = images.contiguous(memory_format=torch.channels_last)  # makes convolutions 10 to 30 % faster
        for layer in self.children():
            feature_map = layer(feature_map)
        return feature_map

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode as `nn.Module.train` does, except that a BatchNorm with frozen weights stays in eval mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.requires_grad:
                module.eval()
        return self


class ViTBackbone(Backbone):
    """A vision transformer: patch tokens become cells; the class token is computed but not returned.

    Args:
        model: torchvision's model, built for the image size in use.
    """

    conv_proj: nn.Module
    encoder: nn.Module

    def __init__(self, model: Any) -> None:
        super().__init__({"conv_proj": model.conv_proj, "encoder": model.encoder}, model.hidden_dim)
        self.class_token = model.class_token  # (1, 1, F)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W), H and W being the image size given at build, to a feature map (B, F, h, w)."""
        patches = self.conv_proj(images)  # (B, F, h, w)
        tokens = patches.flatten(2).transpose(1, 2)  # (B, L, F)
        class_token = self.class_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype)  # (B, 1, F)
        tokens = self.encoder(torch.cat([class_token, tokens], dim=1))[:, 1:]  # (B, L, F)
        return tokens.transpose(1, 2).reshape(patches.shape)


def build_backbone(settings: BackboneSettings, *, image_size: int) -> tuple[Backbone, LoadReport]:
    """Build a trunk, load its weights and freeze the parameters that the settings name; it is in training mode.

    Args:
        settings: which trunk.
        image_size: H = W in pixels; a vision transformer works at this size only.

    Returns:
        The trunk, and a report of what was loaded.

    Raises:
        ConfigError: unknown name, weights or prefix; weights of which no tensor fits; an image size or a `drop` that
            the trunk does not support.
        StorageError: the weights cannot be read.
    """
    backbone = _build(settings, image_size)
    report = LoadReport(source=None) if settings.weights is None else _load(backbone, settings)
    _freeze(backbone, settings.freeze)
    return backbone.train(), report


def backbone_names() -> list[str]:
    """Every name that `BackboneSettings` accepts, sorted."""
    theirs = torchvision.models.list_models(module=torchvision.models)
    return sorted([*OUR_NORMS, *(name for name in theirs if name.startswith(FAMILIES))])


def _build(settings: BackboneSettings, image_size: int) -> Backbone:
    name, drop = settings.name, settings.drop
    if name not in backbone_names():
        raise ConfigError(
            f"unknown backbone {name!r}",
            expected=nearest_names(name, backbone_names()),
            where="method.backbone.name",
            next_step="choose one of torchvision's residual, ConvNeXt, ViT or Swin nets, or resnet_small",
        )
    if drop > 0 and not name.startswith(("convnext_", "swin_", "vit_")):
        raise ConfigError(
            f"drop {drop} with backbone {name!r}",
            expected="drop 0 for residual nets, which have no such layers",
            where="method.backbone.drop",
            next_step="use method.dropout (pooled features), or a convnext, swin or vit backbone",
        )
    if name in OUR_NORMS:
        return _resnet_small(OUR_NORMS[name])
    build = partial(torchvision.models.get_model, name, weights=None, num_classes=1)
    if name.startswith("vit_"):
        patch_size = int(name.rsplit("_", 1)[1])
        if image_size % patch_size:
            raise ConfigError(
                f"image size {image_size} with backbone {name!r}",
                expected=f"a multiple of its patch size, {patch_size}",
                where="transform.size",
                next_step=f"use {image_size // patch_size * patch_size or patch_size} or another backbone",
            )
        return ViTBackbone(build(image_size=image_size, dropout=drop))
    layers = dict(build().named_children())
    if name.startswith("swin_"):
        kept = {key: layers[key] for key in ("features", "norm", "permute")}
        return Backbone(_with_stochastic_depth(kept, drop), layers["head"].in_features)
    if name.startswith("convnext_"):
        norm, _, linear = layers["classifier"]
        kept = {"features": layers["features"], "classifier": nn.Sequential(norm)}
        return Backbone(_with_stochastic_depth(kept, drop), linear.in_features)
    return Backbone({k: v for k, v in layers.items() if k not in ("avgpool", "fc")}, layers["fc"].in_features)


def _with_stochastic_depth(layers: dict[str, nn.Module], drop: float) -> dict[str, nn.Module]:
    """Replace the rates that torchvision's builders fix: linearly from 0 at the first block to `drop` at the last."""
    places = [m for m in layers["features"].modules() if isinstance(m, StochasticDepth)]
    for depth, place in enumerate(places):
        place.p = drop * depth / max(1, len(places) - 1)
    return layers


def _resnet_small(norm: Callable[[int], nn.Module]) -> Backbone:
    """Build three stages of two basic blocks each, with 32, 64 and 128 channels; 64 pixels give 8 x 8 cells."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(3, 32, kernel_size=3, stride=2, padding=1, bias=False), bn1=norm(32), relu=nn.ReLU(inplace=True)
    )
    width = 32
    for number, (planes, stride) in enumerate(((32, 2), (64, 2), (128, 1)), start=1):
        shortcut = nn.Sequential(nn.Conv2d(width, planes, kernel_size=1, stride=stride, bias=False), norm(planes))
        first = BasicBlock(width, planes, stride, shortcut, norm_layer=norm)
        layers[f"layer{number}"] = nn.Sequential(first, BasicBlock(planes, planes, norm_layer=norm))
        width = planes
    backbone = Backbone(layers, width)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, BasicBlock):
            nn.init.zeros_(module.bn2.weight)  # each block starts as its shortcut, which stabilises the first steps
    return backbone


def _load(backbone: Backbone, settings: BackboneSettings) -> LoadReport:
    """Copy every tensor that fits by name and shape, and report on the others.

    Raises:
        ConfigError: no tensor fits, or see `_read_weights`.
        StorageError: the weights cannot be read.
    """
    own = backbone.state_dict()
    found = _without_prefix(_read_weights(settings), own)
    resized = tuple(key for key in ("encoder.pos_embedding",) if _is_other_grid(own.get(key), found.get(key)))
    for key in resized:
        found = interpolate_embeddings(math.isqrt(own[key].shape[1] - 1), 1, OrderedDict(found))
    loaded = {key: found[key] for key in own if key in found and found[key].shape == own[key].shape}
    report = LoadReport(
        source=settings.weights,
        loaded=tuple(loaded),
        resized=resized,
        missing=tuple(key for key in own if key not in found),
        unexpected=tuple(key for key in found if key not in own),
        other_shape=tuple(key for key in own if key in found and key not in loaded),
    )
    if not loaded:
        raise ConfigError(
            f"no tensor of {settings.weights} fits; {report}",
            expected=f"names and shapes of {settings.name!r}, such as {next(iter(own))!r}",
            where="method.backbone.weights",
            next_step="check that the file holds this backbone's weights",
        )
    backbone.load_state_dict(loaded, strict=False)
    return report


def _is_other_grid(own: Tensor | None, found: Tensor | None) -> bool:
    """True for two positional embeddings (1, 1 + side * side, F) that differ only in `side`."""
    if own is None or found is None or own.shape == found.shape or found.dim() != 3 or own.shape[2] != found.shape[2]:
        return False
    num_cells = found.shape[1] - 1
    return math.isqrt(num_cells) ** 2 == num_cells


def _without_prefix(found: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefix, such as `backbone.` or `module.`, that files of whole models put before the trunk's names."""
    matches = Counter(key[: -len(name)] for key in found for name in own if key.endswith(name))
    prefixes = [prefix for prefix in matches if prefix == "" or prefix.endswith(".")]
    best = max(prefixes, key=lambda prefix: (matches[prefix], -len(prefix)), default="")
    return {key.removeprefix(best): tensor for key, tensor in found.items()}


def _read_weights(settings: BackboneSettings) -> dict[str, Tensor]:
    """Read tensors by name from a file, or from torchvision's table through its own download folder.

    Raises:
        ConfigError: unknown weights, or a file that does not hold tensors.
        StorageError: they cannot be read or downloaded.
    """
    weights = str(settings.weights)
    if weights.endswith((".pt", ".pth", ".safetensors")):
        return _read_file(weights)
    table: dict[str, Any] = {}
    if settings.name not in OUR_NORMS:
        table = dict(torchvision.models.get_model_weights(settings.name).__members__)
    entry = table.get("DEFAULT" if weights == "torchvision" else weights)
    if entry is None:
        raise ConfigError(
            f"unknown weights {weights!r} for backbone {settings.name!r}",
            expected=(nearest_names(weights, [*table, "torchvision"]) + ", or " if table else "")
            + "a path or URL ending in .pt, .pth or .safetensors",
            where="method.backbone.weights",
            next_step="choose one of these, or null for random weights",
        )
    try:
        return dict(entry.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise StorageError(
            f"downloading {entry.url} failed: {error}",
            expected="a network, or the file already in torch.hub's folder (TORCH_HOME)",
            where="method.backbone.weights",
            next_step="fetch the file by other means and give its path instead",
        ) from error


def _read_file(url: str) -> dict[str, Tensor]:
    try:
        content = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise storage.missing(url, what="the weights file", next_step="correct method.backbone.weights") from error
    try:
        if url.endswith(".safetensors"):
            return safetensors.torch.load(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        state = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), dict)), state)
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    except Exception as error:  # torch and safetensors raise a dozen kinds for a file that is not theirs
        raise ConfigError(
            f"{url} is not a file of weights: {type(error).__name__}: {error}",
            expected="a dictionary of tensors saved by torch.save or safetensors",
            where="method.backbone.weights",
            next_step="check the file; pickled code is never loaded, save its state_dict() instead",
        ) from error


def _freeze(backbone: Backbone, freeze: tuple[str, ...] | Literal["all"]) -> None:
    parameters = dict(backbone.named_parameters())
    for prefix in parameters if freeze == "all" else freeze:
        chosen = [parameter for name, parameter in parameters.items() if f"{name}.".startswith(f"{prefix}.")]
        if not chosen:
            parts = [name.split(".") for name in parameters]
            raise ConfigError(
                f"no parameter of the backbone is called {prefix!r}",
                expected=nearest_names(prefix, {".".join(p[:n]) for p in parts for n in range(1, len(p) + 1)}),
                where="method.backbone.freeze",
                next_step="give whole name parts up to a dot, such as 'layer1', or 'all'",
            )
        for parameter in chosen:
            parameter.requires_grad_(False)
