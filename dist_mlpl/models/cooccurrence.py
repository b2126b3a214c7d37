"""Owns the pair head: from the features of two classes of an image, the logit that both are present in it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_mlpl.models.label_counts import LabelCounts
from dist_mlpl.models.recompute import blocks, linear
from dist_mlpl.settings import Settings

# Up to so many classes all pairs have weights by default: 32,640 pairs, 134 MB at `pair_width` 1,024.
_MOST_DENSE = 256
_NEIGHBOURS = 32


class PairSettings(Settings):
    """The sizes of the pair head, and which pairs have weights.

    Args:
        class_width: outputs of the layer applied to each class's feature.
        pair_width: outputs of the layer that joins two classes.
        num_neighbours: E, the number of classes that a class forms pairs with: those most often seen with it; null: all
            if there are at most 256 classes, else 32.
    """

    class_width: int = Field(512, ge=1)
    pair_width: int = Field(1024, ge=1)
    num_neighbours: int | None = Field(None, ge=1)


class Pairs(NamedTuple):
    """M pairs of classes in images."""

    image: Tensor  # (M,) int64, row in the batch
    first: Tensor  # (M,) int64, class i
    second: Tensor  # (M,) int64, class j
    slot: Tensor  # (M,) int64, row of the pair's weights

    def joined(self, other: Pairs) -> Pairs:
        """Concatenate these pairs and others."""
        return Pairs(*(torch.cat(columns) for columns in zip(self, other, strict=True)))


class PairHead(nn.Module):
    """Logits of pairs of classes, computed only for the pairs asked for.

        q_c = Wa f_c;  t_ij = relu(Wb [q_i; q_j]);  logit_ij = <w_ij, t_ij> + b_ij

    If `num_neighbours` allows all pairs, every pair i < j has weights w_ij (C (C - 1) / 2 rows). Otherwise a class has
    E rows, for its pairs with the E classes most often seen with it: (i, j) are then the weights that i has for j, and
    a pair without weights has no logit. Wb [q_i; q_j] = Wb1 q_i + Wb2 q_j is computed once per class, not per pair.

    Args:
        settings: sizes.
        width: D of the class features.
        num_classes: C.

    Source: SST (Chen et al., AAAI 2022), with its code.
    Differs: the code applies a linear layer Wc before w_ij, with no activation between; here w_ij stands for their
        product, and starts with its variance.
    """

    neighbours: Tensor

    def __init__(self, settings: PairSettings, width: int, num_classes: int) -> None:
        super().__init__()
        C, q, H = num_classes, settings.class_width, settings.pair_width
        self.num_classes = C
        E = settings.num_neighbours or (C if C <= _MOST_DENSE else _NEIGHBOURS)
        self.num_neighbours = None if E >= C - 1 else E  # None: every pair
        num_slots = C * (C - 1) // 2 if self.num_neighbours is None else C * self.num_neighbours
        self.class_weight = nn.Parameter(torch.empty(q, width))  # Wa
        self.first_weight = nn.Parameter(torch.empty(H, q))  # Wb, the columns of i
        self.second_weight = nn.Parameter(torch.empty(H, q))  # Wb, the columns of j
        self.joint_bias = nn.Parameter(torch.empty(H))
        self.pair_weight = nn.Parameter(torch.empty(num_slots, H))  # w
        self.pair_bias = nn.Parameter(torch.empty(num_slots))  # b
        for parameter, bound in (
            (self.class_weight, width**-0.5),
            (self.first_weight, (2 * q) ** -0.5),
            (self.second_weight, (2 * q) ** -0.5),
            (self.joint_bias, (2 * q) ** -0.5),
            (self.pair_weight, (3 * H) ** -0.5),  # variance of the product of two of the code's layers
            (self.pair_bias, H**-0.5),
        ):
            nn.init.uniform_(parameter, -bound, bound)
        if self.num_neighbours is not None:  # (C, E) int64; a class with itself is no pair
            self.register_buffer("neighbours", torch.arange(C)[:, None].repeat(1, self.num_neighbours))

    def set_cooccurrence(self, counts: LabelCounts) -> None:
        """Choose every class's E neighbours; no effect if all pairs have weights.

        Call it before training: weights belong to the neighbours chosen.

        Args:
            counts: those of the training labels, the same on every rank.
        """
        if self.num_neighbours is not None:
            self.neighbours.copy_(counts.neighbours(self.num_neighbours, with_self=False)[0])

    def kept_at_start(self, found: Collection[str]) -> dict[str, str]:
        """See `Method.kept_at_start`: row w_ij belongs to the neighbours it was trained with, taken over with it.

        Otherwise rows and neighbours stay this run's: neither means anything beside the other's counterpart.
        """
        own = {"pair_weight", "pair_bias"} | ({"neighbours"} if self.num_neighbours is not None else set())
        if own == {"pair_weight", "pair_bias", "neighbours"}.intersection(found):
            return {}
        return dict.fromkeys(sorted(own), "weights of other pairs than there")

    def pairs(self, is_first: Tensor, is_second: Tensor) -> Pairs:
        """Find the pairs of a class in `is_first` and a class in `is_second` that have weights. Reads no parameter.

        Args:
            is_first, is_second: (B, C) bool. If all pairs have weights, an unordered pair is returned once, even if it
                fits both ways, and its `first` is the lower of the two classes. With neighbours `first` is a class in
                `is_first`, and if two classes are each other's neighbours and fit both ways, both pairs are returned,
                each with its own weights.
        """
        images, classes = is_first.nonzero(as_tuple=True)  # (n,) each
        if self.num_neighbours is not None:
            others = self.neighbours[classes]  # (n, E)
            fits = is_second[images[:, None], others] & (others != classes[:, None])
            row, place = fits.nonzero(as_tuple=True)  # (M,) each
            slot = classes[row] * self.num_neighbours + place
            return Pairs(images[row], classes[row], others[row, place], slot)
        row, other = is_second[images].nonzero(as_tuple=True)
        image, one = images[row], classes[row]
        fits_both_ways = is_first[image, other] & is_second[image, one]
        kept = (one < other) | ((one > other) & ~fits_both_ways)
        image, first, second = image[kept], torch.minimum(one, other)[kept], torch.maximum(one, other)[kept]
        slot = first * (2 * self.num_classes - first - 1) // 2 + second - first - 1
        return Pairs(image, first, second, slot)

    @torch.compiler.disable  # M differs at each step, and each would be compiled anew
    def forward(self, class_features: Tensor, pairs: Pairs) -> Tensor:
        """Compute the logits (M,) of pairs from class features (B, C, D), in the features' type."""
        flat = class_features.flatten(0, 1)  # (B * C, D)
        first, of_first = (pairs.image * self.num_classes + pairs.first).unique(return_inverse=True)
        second, of_second = (pairs.image * self.num_classes + pairs.second).unique(return_inverse=True)
        from_first = linear(linear(flat[first], self.class_weight), self.first_weight, self.joint_bias)  # (m, H)
        from_second = linear(linear(flat[second], self.class_weight), self.second_weight)
        scores: Tensor = _PairScores.apply(from_first, from_second, self.pair_weight, of_first, of_second, pairs.slot)
        return scores + self.pair_bias[pairs.slot]


class _PairScores(torch.autograd.Function):
    """<w_slot, relu(u_i + v_j)> of M pairs, block by block; the backward pass recomputes each block."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, w: Tensor, i: Tensor, j: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(u, v, w, i, j, slot)
        scores = u.new_empty(len(slot))
        for part in blocks(len(slot), u.shape[1], u.device):
            scores[part] = (u[i[part]] + v[j[part]]).relu_().mul_(w[slot[part]]).sum(dim=1)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        u, v, w, i, j, slot = ctx.saved_tensors
        u_slope, v_slope, w_slope = torch.zeros_like(u), torch.zeros_like(v), torch.zeros_like(w)
        for part in blocks(len(slot), u.shape[1], u.device):
            joint = (u[i[part]] + v[j[part]]).relu_()  # (m, H)
            slope = grad_outputs[0][part, None]  # (m, 1)
            inner = torch.where(joint > 0, w[slot[part]], 0.0).mul_(slope)
            _add_rows(u_slope, i[part], inner)
            _add_rows(v_slope, j[part], inner)
            _add_rows(w_slope, slot[part], joint.mul_(slope))
        return u_slope, v_slope, w_slope, None, None, None


def _add_rows(totals: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows (m, H) to those at index (m,), which may repeat, in an order that is the same in every run."""
    if totals.is_cuda:  # where `index_add_` uses atomics; `index_put_` sorts
        totals.index_put_((index,), rows, accumulate=True)
    else:
        totals.index_add_(0, index, rows)
