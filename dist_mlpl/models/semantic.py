"""Owns the semantic head: one feature per class by attention over cells, a graph between classes, a logit for each."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dist_mlpl import storage
from dist_mlpl.kernels.semantic_attention import semantic_attention
from dist_mlpl.models.class_embeddings import check_order, read_embeddings, unchecked_order
from dist_mlpl.models.gated_graph import GatedGraph, GatedGraphSettings
from dist_mlpl.models.label_counts import LabelCounts
from dist_mlpl.models.recompute import inner_products, linear
from dist_mlpl.settings import Location, Settings


class SemanticSettings(Settings):
    """The sizes of decoupling and classifier.

    Args:
        embeddings: URL of class vectors (C, W) in the order of the classes, .npy or .safetensors, which are not
            trained; null: learned ones. The order is checked if the file names the classes: see `read_embeddings`.
        embedding_width: W; null: 300 for learned vectors, any width for a file.
        attention_width: k, width of the layer that joins cells and classes.
        feature_width: D, to which a 1x1 convolution and a BatchNorm reduce the trunk's channels; null: neither, D = F.
        head_width: width of the layer before the logits; null: D.
        pool: True: average 2 x 2 cells first.
        shortcut: a plain classifier within the head that bypasses attention and graph, for trunks that start from
            random weights: the `average` or maximum (`max`) of each channel over the cells is added to every class's
            feature, and a linear function of that feature, 0 at first, to its logit. null: neither, as published.
    """

    embeddings: Location | None = None
    embedding_width: int | None = Field(None, ge=1)
    attention_width: int = Field(512, ge=1)
    feature_width: int | None = Field(None, ge=1)
    head_width: int | None = Field(None, ge=1)
    pool: bool = False
    shortcut: Literal["average", "max"] | None = None


class Decoupled(NamedTuple):
    """One feature per class and, if asked for, the attention behind it."""

    class_features: Tensor  # (B, C, D) float32 (float64 in a float64 model)
    attention: Tensor | None  # (B, C, h, w) in [0, 1], sums to 1 over the cells; detached
    cell_sums: Tensor | None  # (B, h, w), sum over the D channels of a cell, which may be negative; detached


class SemanticDecoupling(nn.Module):
    """The attention of each class over the cells; a class's feature is its weighted mean of the cells.

        u_l = W1 cell_l;  t_c = W2 e_c;  s_lc = w4 . (W3 tanh(u_l * t_c));  a = softmax over l;  f_c = sum_l a_lc cell_l

    No activation lies between W3 and w4: the tangents are multiplied by their product, a vector of k numbers. They stay
    two parameters, so that training takes the reference's path. Neither the weighted map (B, h, w, C, D) nor the
    tangents (B, L, C, k) are ever whole in memory.

    Args:
        settings: sizes.
        num_features: F of the trunk.
        num_classes: C.

    Attributes:
        width: D.

    Raises:
        ConfigError: the file of class vectors does not fit: see `read_embeddings`.
        StorageError: it cannot be read.

    Source: SSGRL (Chen et al., ICCV 2019) and SST (Chen et al., AAAI 2022) with its code.
    Differs: the biases of W3 and w4 are left out: they cancel in the softmax. Otherwise equal, to rounding. With
        `shortcut`, the cells' mean or maximum, the same for all classes, is added to f_c.
    """

    def __init__(self, settings: SemanticSettings, num_features: int, num_classes: int) -> None:
        super().__init__()
        k = settings.attention_width
        self.width = D = settings.feature_width or num_features
        self._pool, self._shortcut, self._url = settings.pool, settings.shortcut, settings.embeddings
        self._embedded_classes: tuple[str, ...] | None = None
        self.reduce = nn.Identity() if settings.feature_width is None else _reduction(num_features, D)
        if settings.embeddings is None:
            W = settings.embedding_width or 300
            self.embeddings: Tensor = nn.Parameter(torch.randn(num_classes, W))
        else:
            found = read_embeddings(settings.embeddings, num_classes=num_classes, width=settings.embedding_width)
            W = found.vectors.shape[1]
            self._embedded_classes = found.classes
            self.register_buffer("embeddings", found.vectors)
        self.cell_weight = nn.Parameter(torch.empty(k, D))  # W1
        self.class_weight = nn.Parameter(torch.empty(k, W))  # W2
        self.mixing_weight = nn.Parameter(torch.empty(k, k))  # W3
        self.score_weight = nn.Parameter(torch.empty(1, k))  # w4
        for weight in (self.cell_weight, self.class_weight, self.mixing_weight, self.score_weight):
            nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)  # as nn.Linear

    def forward(self, feature_map: Tensor, *, with_attention: bool = False) -> Decoupled:
        """Compute one feature per class from a feature map.

        Args:
            feature_map: (B, F, h, w), any floating type.
            with_attention: also return the attention, L = h * w numbers for each class of an image, and the cells'
                sums.
        """
        pooled = F.avg_pool2d(feature_map, 2) if self._pool else feature_map
        reduced: Tensor = self.reduce(pooled)  # (B, D, h, w)
        cells = reduced.flatten(2).transpose(1, 2)  # (B, L, D)
        keys = F.linear(self.embeddings, self.class_weight)  # (C, k)
        query = (self.score_weight @ self.mixing_weight).squeeze(0)  # (k,)
        found = semantic_attention(cells, keys, self.cell_weight, query)
        features = found.class_features.to(torch.promote_types(feature_map.dtype, torch.float32))
        if self._shortcut is not None:
            pooled_cells = cells.amax(dim=1) if self._shortcut == "max" else cells.mean(dim=1)  # (B, D)
            features = features + pooled_cells[:, None].to(features.dtype)
        if not with_attention:
            return Decoupled(features, None, None)
        attention = found.attention.unflatten(2, reduced.shape[2:])
        return Decoupled(features, attention, reduced.detach().sum(dim=1, dtype=attention.dtype))

    def kept_at_start(self, found: Collection[str]) -> dict[str, str]:
        """See `Method.kept_at_start`: class vectors stay those of the file; learned ones are taken over."""
        return {} if self._url is None else {"embeddings": f"the vectors in {storage.shown(self._url)}"}

    def check_classes(self, class_ids: tuple[str, ...]) -> list[str]:
        """Check that the rows of the file of class vectors are in the order of the data's classes.

        Returns:
            Notes for the user: one if the file does not name its classes, else none.

        Raises:
            ConfigError: the file names other classes, or another order.
        """
        if self._url is None:
            return []
        if self._embedded_classes is None:
            return [unchecked_order(self._url)]
        check_order(self._url, self._embedded_classes, class_ids)
        return []


class ClassClassifier(nn.Module):
    """o_c = tanh(Wo [h_c; f_c] + bo), Wo shared by classes; x_c = <w_c, o_c> + b_c, plus <v_c, f_c> with a shortcut.

    Args:
        width: D, width of h and f.
        head_width: width of o.
        num_classes: C.
        has_shortcut: True: there is v, (C, D), which starts at 0.

    Source: SSGRL and SST, with their code; the shortcut is ours.
    """

    def __init__(self, width: int, head_width: int, num_classes: int, *, has_shortcut: bool = False) -> None:
        super().__init__()
        self.shortcut_weight = nn.Parameter(torch.zeros(num_classes, width)) if has_shortcut else None
        self.joint_weight = nn.Parameter(torch.empty(head_width, 2 * width))
        self.joint_bias = nn.Parameter(torch.empty(head_width))
        self.class_weight = nn.Parameter(torch.empty(num_classes, head_width))
        self.class_bias = nn.Parameter(torch.empty(num_classes))
        for parameter, inputs in (
            (self.joint_weight, 2 * width),
            (self.joint_bias, 2 * width),
            (self.class_weight, head_width),
            (self.class_bias, head_width),
        ):
            nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5)

    def forward(self, propagated: Tensor, class_features: Tensor) -> Tensor:
        """Compute logits (B, C), float32 or wider, from h and f (B, C, D)."""
        of_graph, of_image = self.joint_weight.split(class_features.shape[-1], dim=1)  # (o, D) each: no [h; f] is built
        joint = (linear(propagated, of_graph) + linear(class_features, of_image, self.joint_bias)).tanh()  # (B, C, o)
        scores = inner_products(joint, self.class_weight)
        if self.shortcut_weight is not None:
            scores = scores + inner_products(class_features, self.shortcut_weight)
        return scores + self.class_bias


class SemanticHead(nn.Module):
    """Decoupling, graph and classifier. Call `decouple` and `classify` only inside a method's forward.

    Args:
        settings: settings of decoupling and classifier.
        graph: settings of the graph.
        num_features: F of the trunk.
        num_classes: C.

    Attributes:
        width: D.
    """

    def __init__(
        self, settings: SemanticSettings, graph: GatedGraphSettings, *, num_features: int, num_classes: int
    ) -> None:
        super().__init__()
        self.decoupling = SemanticDecoupling(settings, num_features, num_classes)
        self.width = self.decoupling.width
        self.graph = GatedGraph(graph, self.width, num_classes)
        self.classifier = ClassClassifier(
            self.width, settings.head_width or self.width, num_classes, has_shortcut=settings.shortcut is not None
        )

    def decouple(self, feature_map: Tensor, *, with_attention: bool = False) -> Decoupled:
        """See `SemanticDecoupling.forward`."""
        return self.decoupling(feature_map, with_attention=with_attention)

    def classify(self, class_features: Tensor) -> Tensor:
        """Compute logits (B, C) from class features (B, C, D) and the same features propagated over the graph."""
        return self.classifier(self.graph(class_features), class_features)

    def check_classes(self, class_ids: tuple[str, ...]) -> list[str]:
        """See `SemanticDecoupling.check_classes`."""
        return self.decoupling.check_classes(class_ids)

    def set_cooccurrence(self, counts: LabelCounts, *, is_biased: bool = False) -> None:
        """See `GatedGraph.set_cooccurrence`."""
        self.graph.set_cooccurrence(counts, is_biased=is_biased)


def _reduction(num_features: int, width: int) -> nn.Sequential:
    """The layers that reduce (B, F, h, w) to (B, D, h, w); without a ReLU, so features may be negative."""
    return nn.Sequential(nn.Conv2d(num_features, width, kernel_size=1, bias=False), nn.BatchNorm2d(width))
