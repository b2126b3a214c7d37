"""Owns access to layers inside a trunk: their names, the shapes of their outputs, and an inner layer's output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dist_mlpl.errors import ConfigError, nearest_names
from dist_mlpl.models.backbone import Backbone


class MapShape(NamedTuple):
    """The shape of the feature map of one image."""

    num_features: int  # F
    height: int  # h
    width: int  # w


def tapped_maps(backbone: Backbone, images: Tensor, layer: str | None) -> tuple[Tensor, Tensor]:
    """Compute the outputs of one layer of a trunk and of its last.

    Args:
        backbone: the trunk.
        images: (B, 3, H, W), normalised.
        layer: its name, one of `layer_names`; None: the last, which then is returned twice.

    Returns:
        Two feature maps (B, F, h, w), whose F, h and w may differ.
    """
    if layer is None:
        feature_map = backbone(images)
        return feature_map, feature_map
    feature_map = images.contiguous(memory_format=torch.channels_last)  # as the trunk does
    tapped = feature_map
    for name, module in backbone.named_children():
        feature_map = module(feature_map)
        if name == layer:
            tapped = feature_map
    return tapped, feature_map


def map_shape(backbone: Backbone, layer: str | None, *, image_size: int) -> MapShape:
    """The shape of the layer's output in `tapped_maps`, found without computing it.

    Args:
        backbone: the trunk.
        layer: its name; None for the last.
        image_size: H = W in pixels.

    Raises:
        ConfigError: no such layer, or a trunk whose layers are not run one after another.
    """
    part: nn.Module = backbone
    if layer is not None:
        names = layer_names(backbone)
        if layer not in names:
            raise ConfigError(
                f"no layer {layer!r} in this trunk to make maps of",
                expected=f"{nearest_names(layer, names)}, or null" if names else "null, the output of the whole trunk",
                where="method.spatial.layer",
                next_step="set method.spatial.layer to one of these; null works with every trunk",
            )
        children = dict(backbone.named_children())
        part = nn.Sequential(*(children[name] for name in list(children)[: list(children).index(layer) + 1]))
    tensors = {name: tensor.to("meta") for name, tensor in (*part.named_parameters(), *part.named_buffers())}
    with torch.no_grad():
        found = functional_call(part, tensors, (torch.empty(2, 3, image_size, image_size, device="meta"),))
    return MapShape(*found.shape[1:])


def layer_names(backbone: Backbone) -> list[str]:
    """Names of the layers whose output is a feature map and which run one after another: stages of residual nets."""
    return [name for name, _ in backbone.named_children() if name.startswith("layer")]
