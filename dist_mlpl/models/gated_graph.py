"""Owns the gated graph: class features propagate along a graph of classes that are seen together."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_mlpl.models.label_counts import LabelCounts
from dist_mlpl.models.recompute import add, blocks, linear, pull_back
from dist_mlpl.settings import Settings

_MOST_DENSE = 512  # up to so many classes the graph is complete by default
_NEIGHBOURS = 32


class GatedGraphSettings(Settings):
    """The number of steps and edges of the gated graph.

    Args:
        num_steps: T, rounds of messages.
        num_neighbours: E, the number of classes that a class receives from, itself included: those most often seen with
            it; null: all if there are at most 512 classes, else 32.
    """

    num_steps: int = Field(3, ge=1)
    num_neighbours: int | None = Field(None, ge=1)


class Edges(NamedTuple):
    """The edges of one direction: a table over all classes, or a list of neighbours."""

    weights: Tensor  # (C, C), or (C * E,)
    classes: Tensor | None = None  # (C * E,) int64, the neighbours, class by class
    starts: Tensor | None = None  # (C + 1,) int64, where each class begins in `classes`, and the end

    def sums(self, states: Tensor) -> Tensor:
        """Sum the states (C, B, D) of each class's neighbours, weighted; (C, B, D)."""
        flat = states.flatten(1)
        weights = self.weights.to(states.dtype)
        if self.classes is None:
            return (weights @ flat).view_as(states)
        found = F.embedding_bag(
            self.classes, flat, self.starts, mode="sum", per_sample_weights=weights, include_last_offset=True
        )
        return found.view_as(states)


class GatedGraph(nn.Module):
    """T steps of a gated graph network between the classes of an image; all nodes share the weights.

        m = [A h; A' h];  z = sigmoid(Wz m + Uz h);  r = sigmoid(Wr m + Ur h);  h~ = tanh(Wh m + Uh (r * h))
        h <- (1 - z) * h + z * h~

    A_ij is the probability of class j given class i; A' is A transposed. The graph is set by `set_cooccurrence`; until
    then, and for classes never seen, a class receives only from itself. The graph is part of the model's state.

    Nodes are processed in blocks that the backward pass recomputes: T tensors (C, B, D) are kept.

    Args:
        settings: steps and edges.
        width: D.
        num_classes: C.

    Source: SSGRL (Chen et al., ICCV 2019) and SST (Chen et al., AAAI 2022), with its code.
    Differs: rows of classes never seen are those of the identity (0/0 in the code); A is estimated over images where j
        is known (see `LabelCounts.conditional`); by default, above 512 classes only edges to E neighbours are kept.
    """

    neighbours: Tensor
    weights: Tensor
    senders: Tensor
    sender_weights: Tensor
    sender_starts: Tensor
    adjacency: Tensor

    def __init__(self, settings: GatedGraphSettings, width: int, num_classes: int) -> None:
        super().__init__()
        self.num_steps, self.num_classes, D, C = settings.num_steps, num_classes, width, num_classes
        E = settings.num_neighbours or (C if C <= _MOST_DENSE else _NEIGHBOURS)
        self.num_neighbours = min(E, C)
        self.message_weight = nn.Parameter(torch.empty(3 * D, 2 * D))  # Wz, Wr, Wh
        self.message_bias = nn.Parameter(torch.empty(3 * D))
        self.gate_weight = nn.Parameter(torch.empty(2 * D, D))  # Uz, Ur
        self.gate_bias = nn.Parameter(torch.empty(2 * D))
        self.candidate_weight = nn.Parameter(torch.empty(D, D))  # Uh
        self.candidate_bias = nn.Parameter(torch.empty(D))
        for weight, bias in (
            (self.message_weight, self.message_bias),
            (self.gate_weight, self.gate_bias),
            (self.candidate_weight, self.candidate_bias),
        ):
            nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)  # as nn.Linear
            nn.init.uniform_(bias, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
        if self.is_dense:
            self.register_buffer("adjacency", torch.eye(C))  # (C, C)
            return
        self.register_buffer("neighbours", torch.arange(C)[:, None].repeat(1, E))  # (C, E) int64
        self.register_buffer("weights", torch.eye(1, E).repeat(C, 1))  # (C, E)
        self.register_buffer("senders", torch.arange(C).repeat_interleave(E))  # (C * E,) int64, receivers of each class
        self.register_buffer("sender_weights", self.weights.flatten().clone())  # (C * E,)
        self.register_buffer("sender_starts", torch.arange(C + 1) * E)  # (C + 1,) int64

    @property
    def is_dense(self) -> bool:
        """True if the graph is complete: every class receives from every other."""
        return self.num_neighbours == self.num_classes

    def set_cooccurrence(self, counts: LabelCounts, *, is_biased: bool = False) -> None:
        """Set the graph from the training labels.

        Args:
            counts: those of the training labels, the same on every rank.
            is_biased: see `LabelCounts.conditional`.
        """
        if self.is_dense:
            table = torch.eye(self.num_classes)
            likely = torch.from_numpy(counts.conditional(is_biased=is_biased)).float()
            table[torch.from_numpy(counts.first), torch.from_numpy(counts.second)] = likely
            self.adjacency.copy_(table)
            return
        neighbours, weights = counts.neighbours(self.num_neighbours, with_self=True, is_biased=is_biased)
        heard, order = neighbours.flatten().sort(stable=True)  # (C * E,) edges sorted by sender
        self.neighbours.copy_(neighbours)
        self.weights.copy_(weights)
        self.senders.copy_(order // self.num_neighbours)
        self.sender_weights.copy_(weights.flatten()[order])
        self.sender_starts.copy_(torch.searchsorted(heard, torch.arange(self.num_classes + 1)))

    def kept_at_start(self, found: Collection[str]) -> dict[str, str]:
        """See `Method.kept_at_start`: the graph is that of this run's labels; the weights do not depend on it."""
        return dict.fromkeys((name for name, _ in self.named_buffers()), "the graph of this run's labels")

    def forward(self, class_features: Tensor) -> Tensor:
        """Propagate class features over the graph.

        Args:
            class_features: (B, C, D), float32, or float64 for a module of that type.

        Returns:
            (B, C, D), same type. Images are independent of one another.
        """
        states = class_features.transpose(0, 1).contiguous()  # (C, B, D)
        last: Tensor = _Propagation.apply(
            self.num_steps, torch.is_grad_enabled(), self._edges(), states,
            self.message_weight, self.message_bias, self.gate_weight, self.gate_bias,
            self.candidate_weight, self.candidate_bias,
        )  # fmt: skip
        return last.transpose(0, 1)

    def _edges(self) -> tuple[Edges, Edges]:
        """The edges of A and of A transposed."""
        if self.is_dense:
            return Edges(self.adjacency), Edges(self.adjacency.T)
        starts = torch.arange(self.num_classes + 1, device=self.neighbours.device) * self.num_neighbours
        return (
            Edges(self.weights.flatten(), self.neighbours.flatten(), starts),
            Edges(self.sender_weights, self.senders, self.sender_starts),
        )


class _Propagation(torch.autograd.Function):
    """T steps over all nodes, block by block; the backward pass recomputes each block."""

    @staticmethod
    def forward(
        ctx: Any, num_steps: int, is_kept: bool, edges: tuple[Edges, Edges], states: Tensor, *weights: Tensor
    ) -> Tensor:
        kept = []
        kind = states.device.type
        for _ in range(num_steps):
            if is_kept:
                kept.append(states)
            messages = _messages(edges, states)
            following = torch.empty_like(states)
            for block in _blocks(states):
                following[block] = _update(states[block], *(message[block] for message in messages), *weights)
            states = following
        ctx.edges, ctx.num_weights = edges, len(weights)
        ctx.save_for_backward(*weights, *kept)
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        weights, kept = ctx.saved_tensors[: ctx.num_weights], ctx.saved_tensors[ctx.num_weights :]
        slope = grad_outputs[0].contiguous()  # (C, B, D), gradient by the states after a step, from the last back
        weight_slopes = [torch.zeros_like(weight) for weight in weights]
        kind, dtype, is_enabled = ctx.autocast
        # Uncached: each block has new leaves for the weights, and the casts of all blocks would be kept to the end.
        with torch.autocast(kind, dtype=dtype, enabled=is_enabled, cache_enabled=False):
            for states in reversed(kept):
                messages = _messages(ctx.edges, states)
                earlier, into, back = torch.empty_like(states), torch.empty_like(states), torch.empty_like(states)
                for block in _blocks(states):
                    inputs = (states[block], *(message[block] for message in messages))
                    found = pull_back(_update, slope[block], *inputs, *weights)
                    earlier[block], into[block], back[block] = found[:3]
                    add(weight_slopes, found[3:])
                with torch.autocast(kind, enabled=False):
                    slope = earlier + ctx.edges[1].sums(into) + ctx.edges[0].sums(back)
        return None, None, None, slope, *weight_slopes


def _messages(edges: tuple[Edges, Edges], states: Tensor) -> tuple[Tensor, Tensor]:
    """Compute A h and A' h, (C, B, D) each, in the states' own type under autocast too."""
    with torch.autocast(states.device.type, enabled=False):
        return edges[0].sums(states), edges[1].sums(states)


def _update(states: Tensor, into: Tensor, back: Tensor, *weights: Tensor) -> Tensor:
    """Compute the next states of a block of nodes; states, both halves of their messages and result are (c, B, D)."""
    message_weight, message_bias, gate_weight, gate_bias, candidate_weight, candidate_bias = weights
    of_into, of_back = message_weight.split(states.shape[-1], dim=1)  # (3 D, D) each
    heard = linear(into, of_into, message_bias) + linear(back, of_back)  # (c, B, 3 D)
    to_update, to_reset, to_candidate = heard.chunk(3, dim=-1)
    own_update, own_reset = linear(states, gate_weight, gate_bias).chunk(2, dim=-1)
    update = torch.sigmoid(to_update + own_update)
    reset = torch.sigmoid(to_reset + own_reset)
    candidate = torch.tanh(to_candidate + linear(reset * states, candidate_weight, candidate_bias))
    return states + update * (candidate - states)


def _blocks(states: Tensor) -> Iterator[slice]:
    C, B, D = states.shape
    return blocks(C, B * D, states.device)
