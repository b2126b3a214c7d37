"""Owns the spatial regularisation branch (SRN): attention maps of each class, and logits from all maps together."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_mlpl.errors import ConfigError
from dist_mlpl.models.trunk_layers import MapShape
from dist_mlpl.settings import Settings

_MAP_ENTRIES: Final = 2**22  # entries of the maps that exist at a time: 16 MB in float32 for each kind of map
_FEWEST_CLASSES: Final = 64  # least number of classes at a time; fewer would make products too narrow


class SpatialSettings(Settings):
    """Sizes of the branch.

    Args:
        layer: the layer of a residual trunk from whose output the maps are computed; null: the last of any trunk.
        attention_width: channels of the two convolutions before the attention maps.
        mixed_width: number of maps into which the maps of all classes are mixed; each is then filtered by itself.
        kernels: filters of a mixed map, each as large as the map.
        grid: cells along a side of the mixed maps; larger maps are summed down to it, which keeps the attention's
            total. Null: the trunk's own.
        norm: in the regularising part: `none`, or `batch`, with which results depend on micro-batches and ranks. The
            maps that it normalises are nearly equal at first, so with few images it magnifies rounding by orders of
            magnitude.
        chunk: classes whose maps exist at a time; null: as many as take 16 MB for each kind of map, at least 64.

    Source: Zhu et al., CVPR 2017, for ResNet-101, as we recall it: layer3, 512, 512, 4, 14. Whether they normalise is
        not known; re-implementations differ.
    """

    layer: str | None = "layer3"
    attention_width: int = Field(512, ge=1)
    mixed_width: int = Field(512, ge=1)
    kernels: int = Field(4, ge=1)
    grid: int | None = Field(None, ge=1)
    norm: Literal["batch", "none"] = "none"
    chunk: int | None = Field(None, ge=1)


class SpatialOutput(NamedTuple):
    """The output of the branch; float32 (float64 in a float64 model)."""

    attended: Tensor  # (B, C) logits y_att: confidences averaged over the cells by attention
    regularised: Tensor | None  # (B, C) logits y_sr; None without the regularising part
    heatmaps: Tensor | None  # (B, C, h, w) in [0, L]: confidence-weighted attention times L; None unless asked for


class SpatialBranch(nn.Module):
    """The logits y_att of a feature map X and, with the regularising part, y_sr.

    Two convolutions map X to H. For every class l and cell i:

        A[l, i] = softmax over i of a_l . H[i]    attention; its sum over the cells is 1
        S[l, i] = w_l . X[i] + b_l                confidence
        y_att[l] = sum_i A[l, i] S[l, i]
        U[l, i] = sigmoid(S[l, i]) A[l, i]        mixed over classes, then filtered over cells: y_sr

    Args:
        settings: sizes.
        shape: the shape of the feature map.
        num_classes: C.
        is_regularising: True: there is the part that computes y_sr.
        use_scale: True: multiply U by the number of cells of the grid. Its values are of the order 1 / L; unscaled, the
            part that computes y_sr learns extremely slowly, and BatchNorm's epsilon exceeds their variance.

    Raises:
        ConfigError: a grid that does not divide the map.

    Source: Zhu et al., CVPR 2017.
    Differs: the bias of a_l is left out: it cancels in the softmax. Otherwise equal, to rounding, except `use_scale`.
    """

    def __init__(
        self, settings: SpatialSettings, shape: MapShape, num_classes: int, *, is_regularising: bool, use_scale: bool
    ) -> None:
        super().__init__()
        width, grid = settings.attention_width, _checked_grid(settings.grid, shape)
        first, second = nn.Conv2d(shape.num_features, width, 1), nn.Conv2d(width, width, 3, padding=1)
        for convolution in (first, second):
            _init_he(convolution.weight)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        self.hidden = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        self.maps = ClassMaps(settings, shape, num_classes, grid=grid, is_mixing=is_regularising, use_scale=use_scale)
        self.regularization = RegularizationNet(settings, grid, num_classes) if is_regularising else None

    def forward(self, feature_map: Tensor, *, with_heatmaps: bool = False) -> SpatialOutput:
        """Compute the branch's output for a feature map (B, F, h, w), any floating type, of the shape given at build.

        Raises:
            ConfigError: a single image in training with norm `batch`.
        """
        hidden = self.hidden(feature_map)  # (B, W, h, w)
        maps: PartOutput = self.maps(_cells(feature_map), _cells(hidden), with_heatmaps=with_heatmaps)
        regularised = None if self.regularization is None else self.regularization(maps.mixed)
        heatmaps = maps.weighted
        if heatmaps is not None:
            heatmaps = heatmaps.transpose(1, 2).unflatten(2, feature_map.shape[2:])  # (B, C, h, w)
        return SpatialOutput(maps.attended, regularised, heatmaps)


class PartWeights(NamedTuple):
    """The weights of c classes, W being `attention_width`."""

    attention: Tensor  # (c, W)
    confidence: Tensor  # (c, F)
    confidence_bias: Tensor  # (c,)
    mixing: Tensor | None  # (mixed_width, c)


class PartOutput(NamedTuple):
    """The results of c classes; float32 (float64 in a float64 model)."""

    attended: Tensor  # (B, c) logits y_att
    mixed: Tensor | None  # (B, cells of the grid, mixed_width), these classes' addend to the mixed maps
    weighted: Tensor | None  # (B, L, c), U times L; None unless asked for


class ClassMaps(nn.Module):
    """The maps of each class: attention, confidence, their product, and its mixing.

    Plainly, four maps (A, S, sigmoid(S), U) of an image are kept for the backward pass: at L = 14 * 14 in float32,
    0.25 MB for C = 80, 1.9 MB for 601, 30 MB for 9,605, which is 2.9 GB for 96 images, and as much again for their
    gradients. Here they exist for `chunk` classes at a time, by default 64 MB whatever B and C (more where 64 classes
    take more): the mixed maps are summed over parts, and the backward pass recomputes each part's maps. The numbers are
    the same to rounding; it takes one more forward of the maps. If all classes fit at once nothing is recomputed.
    Forward and backward of 32 images (F = 256, widths 128) took, besides weights and their gradients, 114 MB for 601
    classes and 160 MB for 9,605; these at once, 1.4 GB.

    The weights are this module's own parameters, not those of layers: they are used a part at a time, and under ZeRO-3
    a weight exists only inside the call of the module that owns it.

    Args:
        settings: sizes.
        shape: the shape of the feature map.
        num_classes: C.
        grid: cells of the mixed maps, (height, width).
        is_mixing: True: mix the maps of all classes.
        use_scale: see `SpatialBranch`.
    """

    def __init__(
        self,
        settings: SpatialSettings,
        shape: MapShape,
        num_classes: int,
        *,
        grid: tuple[int, int],
        is_mixing: bool,
        use_scale: bool,
    ) -> None:
        super().__init__()
        self._shape, self._grid, self._chunk = shape, grid, settings.chunk
        self._scale = float(grid[0] * grid[1]) if use_scale else 1.0
        self.attention_weight = nn.Parameter(torch.empty(num_classes, settings.attention_width).normal_(std=0.01))
        self.confidence_weight = nn.Parameter(torch.empty(num_classes, shape.num_features).normal_(std=0.01))
        self.confidence_bias = nn.Parameter(torch.zeros(num_classes))
        self.mixing_weight: nn.Parameter | None = None
        self.mixing_bias: nn.Parameter | None = None
        if is_mixing:
            self.mixing_weight = nn.Parameter(_init_he(torch.empty(settings.mixed_width, num_classes)))
            if settings.norm == "none":  # a norm has a bias of its own
                self.mixing_bias = nn.Parameter(torch.zeros(settings.mixed_width))

    def forward(self, cells: Tensor, hidden: Tensor, *, with_heatmaps: bool = False) -> PartOutput:
        """Compute the results of all classes, part by part.

        Args:
            cells: X (B, L, F).
            hidden: H (B, L, W).
            with_heatmaps: also return U times L.
        """
        parts = self._parts(num_cells=cells.shape[0] * cells.shape[1])
        outputs = []
        for weights in parts:
            if len(parts) == 1:
                outputs.append(self._part(cells, hidden, weights, with_heatmaps))
            else:
                outputs.append(
                    checkpoint(
                        self._part, cells, hidden, weights, with_heatmaps,
                        use_reentrant=False, preserve_rng_state=False,
                    )
                )  # fmt: skip
        attended, mixed, weighted = zip(*outputs, strict=True)
        total = None if mixed[0] is None else sum(mixed[1:], start=mixed[0])
        if total is not None and self.mixing_bias is not None:
            total = total + self.mixing_bias
        return PartOutput(torch.cat(attended, dim=1), total, torch.cat(weighted, dim=2) if with_heatmaps else None)

    def _parts(self, *, num_cells: int) -> list[PartWeights]:
        """Split the weights into parts of a few classes; `num_cells` counts the cells of all images."""
        size = self._chunk or max(_FEWEST_CLASSES, _MAP_ENTRIES // max(1, num_cells))
        attention, confidence = self.attention_weight.split(size), self.confidence_weight.split(size)
        bias = self.confidence_bias.split(size)
        mixing = [None] * len(bias) if self.mixing_weight is None else self.mixing_weight.split(size, dim=1)
        return list(map(PartWeights, attention, confidence, bias, mixing))

    def _part(self, cells: Tensor, hidden: Tensor, weights: PartWeights, with_heatmaps: bool) -> PartOutput:
        """Compute the results of c classes."""
        B, L, _ = cells.shape
        precise = torch.promote_types(cells.dtype, torch.float32)
        attention = _scores(hidden, weights.attention).to(precise).softmax(dim=1)  # (B, L, c)
        confidence = _scores(cells, weights.confidence, weights.confidence_bias).to(precise)  # (B, L, c)
        attended = (attention * confidence).sum(dim=1)  # (B, c)
        if weights.mixing is None and not with_heatmaps:
            return PartOutput(attended, None, None)
        weighted = confidence.sigmoid() * attention
        mixed = None
        if weights.mixing is not None:
            rows = (self._on_grid(weighted) * self._scale).to(cells.dtype).flatten(0, 1)  # (B * cells, c)
            mixed = torch.matmul(rows, weights.mixing.t()).to(precise).unflatten(0, (B, -1))
        return PartOutput(attended, mixed, weighted * L if with_heatmaps else None)

    def _on_grid(self, maps: Tensor) -> Tensor:
        """Sum maps (B, L, c) down to the cells of the grid."""
        (_, height, width), (high, wide) = self._shape, self._grid
        if (height, width) == (high, wide):
            return maps
        return maps.unflatten(1, (high, height // high, wide, width // wide)).sum(dim=(2, 4)).flatten(1, 2)


class RegularizationNet(nn.Module):
    """The logits y_sr of mixed maps: they are mixed once more, each is filtered over its whole extent, then classified.

    Args:
        settings: sizes.
        grid: cells of the maps, (height, width).
        num_classes: C.
    """

    def __init__(self, settings: SpatialSettings, grid: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        width, has_bias = settings.mixed_width, settings.norm == "none"
        num_filtered = width * settings.kernels
        self.norm1 = _norm(settings, width)
        self.mixing = nn.Linear(width, width, bias=has_bias)
        self.norm2 = _norm(settings, width)
        self.filters = MapFilters(width, settings.kernels, grid, has_bias=has_bias)
        self.norm3 = _norm(settings, num_filtered)
        self.linear = nn.Linear(num_filtered, num_classes)
        _init_he(self.mixing.weight)
        nn.init.normal_(self.linear.weight, std=0.01)
        for layer in (self.mixing, self.linear):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, mixed: Tensor) -> Tensor:
        """Compute logits (B, C) from mixed maps (B, cells, mixed_width).

        Raises:
            ConfigError: a single image in training with norm `batch`.
        """
        B = mixed.shape[0]
        if B == 1 and isinstance(self.norm3, nn.BatchNorm1d) and self.norm3.training:
            raise ConfigError(
                "a micro-batch of one image with BatchNorm over images",
                expected="two images or more in a micro-batch on every rank",
                where="engine.micro_batch, group_size, method.spatial.norm",
                next_step="raise engine.micro_batch or group_size, or set method.spatial.norm to none",
            )
        rows = self.norm1(mixed.flatten(0, 1)).relu()  # (B * cells, mixed_width)
        rows = self.norm2(self.mixing(rows)).relu()
        filtered = self.norm3(self.filters(rows.unflatten(0, (B, -1)))).relu()  # (B, mixed_width * kernels)
        with torch.autocast(filtered.device.type, enabled=False):  # see `PooledHead.forward`
            logits: Tensor = self.linear(filtered.to(self.linear.weight.dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class MapFilters(nn.Module):
    """Filters as large as the map, K for each map; equal to a grouped convolution with one group per map.

    The weight has the shape of a grouped convolution's, (M * K, 1, height, width); as filters are as large as the map,
    they are applied in one batched product.

    Args:
        num_maps: M.
        kernels: K.
        grid: cells, (height, width).
        has_bias: True: add one number to each result.
    """

    def __init__(self, num_maps: int, kernels: int, grid: tuple[int, int], *, has_bias: bool) -> None:
        super().__init__()
        self._shape = num_maps, kernels, grid[0] * grid[1]
        self.weight = nn.Parameter(_init_he(torch.empty(num_maps * kernels, 1, *grid)))
        self.bias = nn.Parameter(torch.zeros(num_maps * kernels)) if has_bias else None

    def forward(self, maps: Tensor) -> Tensor:
        """Filter maps (B, cells, M); (B, M * K), the results of a map side by side."""
        filtered = torch.einsum("blm,mkl->bmk", maps, self.weight.view(self._shape)).flatten(1)
        return filtered if self.bias is None else filtered + self.bias


def _checked_grid(grid: int | None, shape: MapShape) -> tuple[int, int]:
    if grid is None:
        return shape.height, shape.width
    if shape.height % grid or shape.width % grid:
        raise ConfigError(
            f"a grid of {grid} x {grid} for maps of {shape.height} x {shape.width} cells",
            expected=f"a divisor of {shape.height}" + (f" and {shape.width}" if shape.width != shape.height else ""),
            where="method.spatial.grid",
            next_step="change method.spatial.grid (null: as the trunk gives them) or transform.size",
        )
    return grid, grid


def _scores(cells: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply weights (c, n) to cells (B, L, n), (B, L, c); in two dimensions, or bf16 would round before the bias."""
    rows = cells.flatten(0, 1)
    scores = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
    return scores.unflatten(0, cells.shape[:2])


def _cells(feature_map: Tensor) -> Tensor:
    """Reshape (B, n, h, w) to (B, L, n)."""
    return feature_map.permute(0, 2, 3, 1).flatten(1, 2)


def _norm(settings: SpatialSettings, width: int) -> nn.Module:
    return nn.BatchNorm1d(width) if settings.norm == "batch" else nn.Identity()


def _init_he(weight: Tensor) -> Tensor:
    return nn.init.kaiming_normal_(weight, nonlinearity="relu")
