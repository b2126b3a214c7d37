"""Owns the label graph: classes exchange messages about their logits and correct them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_mlpl.errors import ConfigError
from dist_mlpl.models.recompute import add, linear, pull_back
from dist_mlpl.settings import Settings

# Entries of a block of nodes in its widest tensor; computing a block takes the memory of some fifteen such tensors.
_CPU_ENTRIES = 2**18
_DEVICE_ENTRIES = 2**22
_MOST_ONE_HOT = 1000  # up to so many classes `identity` is `one_hot` by default


class LabelGraphSettings(Settings):
    """The graph's sizes and forms; choices that the paper leaves open are keys with a default.

    Args:
        num_steps: T, rounds of messages.
        width: H, the width of a node's state; null: C with identity `one_hot`, else 128.
        message_width: M, the width of a message; null: H.
        messages: `sender`: a message is computed from the sender's state, and time and memory grow with C; `pair`: from
            both states, and time grows with the square of C: for a few hundred classes.
        identity: how a node's first state shows its class. `one_hot`: the logit is in a place of its own for each
            class, so H >= C; `learned`: a learned vector of H - 1 numbers per class beside the logit; `none`: the logit
            is in the middle, and classes with equal logits are treated alike. null: `one_hot` up to 1,000 classes (and
            up to `width`, if given), `learned` above.
        readout: the corrected logit. `both`: linear in the first and the last state; `last`: linear in the last only;
            `averaged`: the mean of `last` and the input logit.
        dropout: probability of dropping an entry of the last states before the readout, in [0, 1).
    """

    num_steps: int = Field(3, ge=1)
    width: int | None = Field(None, ge=2)
    message_width: int | None = Field(None, ge=1)
    messages: Literal["sender", "pair"] = "sender"
    identity: Literal["one_hot", "learned", "none"] | None = None
    readout: Literal["both", "last", "averaged"] = "both"
    dropout: float = Field(0.0, ge=0.0, lt=1.0)


class LabelGraph(nn.Module):
    """A gated graph network over a complete graph of C nodes, one per class, on top of the logits.

    A node's state starts as its logit in a vector of zeros (or see `identity`). T times every node takes the mean over
    all other nodes of relu(linear(state)) and updates its state by a GRU; all nodes share the weights. The readout
    gives the new logit.

    The mean over the others is (the sum over all - the own message) / (C - 1). Nodes are processed in blocks, whose
    activations the backward pass recomputes: T + 1 tensors (C, B, H) are kept, 39 MB each for 9,605 classes, width 128
    and 8 images. States, sums and readout are float32 under autocast too; the products run in its type.

    Args:
        settings: sizes and forms.
        num_classes: C.

    Raises:
        ConfigError: identity `one_hot` with a width below C.

    Source: Durand et al., CVPR 2019; the mean over the others equals the masked mean, to rounding.
    Differs: sizes, number of steps, identity, readout and the input of a message are choices of ours (see
        `LabelGraphSettings`). With readout `both` a new graph changes no logit, so that one may be put on top of a
        trained model. All parameters belong to this module itself: blocks and recomputation stay within its call, as
        ZeRO-3 requires.
    """

    def __init__(self, settings: LabelGraphSettings, num_classes: int) -> None:
        super().__init__()
        self.num_steps, self.readout = settings.num_steps, settings.readout
        self.identity, self.width = _identity_and_width(settings, num_classes)
        H, M = self.width, settings.message_width or self.width
        first = {"one_hot": 0, "learned": 0, "none": (H - 1) // 2}[self.identity]
        self._logit_places = slice(first, first + (num_classes if self.identity == "one_hot" else 1))
        self.message_weight = nn.Parameter(torch.empty(M, 2 * H if settings.messages == "pair" else H))
        self.message_bias = nn.Parameter(torch.empty(M))
        self.input_weight = nn.Parameter(torch.empty(3 * H, M))  # reset gate, update gate, candidate, like nn.GRUCell
        self.input_bias = nn.Parameter(torch.empty(3 * H))
        self.state_weight = nn.Parameter(torch.empty(3 * H, H))
        self.state_bias = nn.Parameter(torch.empty(3 * H))
        self.output_weight = nn.Parameter(torch.empty(1, 2 * H if self.readout == "both" else H))
        self.output_bias = nn.Parameter(torch.zeros(1))
        self.class_vectors = nn.Parameter(torch.randn(num_classes, H - 1)) if self.identity == "learned" else None
        self.dropout = nn.Dropout(settings.dropout)
        for weight in (*self._step_weights(), self.output_weight):
            nn.init.uniform_(weight, -(H**-0.5), H**-0.5)
        if self.readout == "both":
            with torch.no_grad():
                self.output_weight.zero_()[0, self._logit_places] = 1.0

    def forward(self, logits: Tensor) -> Tensor:
        """Correct the logits.

        Args:
            logits: (B, C), float32, or float64 for a module of that type.

        Returns:
            (B, C), same type. Images are independent of one another.
        """
        first = self._first_states(logits)  # (C, B, H)
        last: Tensor = _Propagation.apply(self.num_steps, torch.is_grad_enabled(), first, *self._step_weights())
        with torch.autocast(logits.device.type, enabled=False):
            parts = self.output_weight.split(self.width, dim=1)  # one or two of (1, H)
            new = F.linear(self.dropout(last), parts[-1], self.output_bias)  # (C, B, 1)
            if self.readout == "both":
                new = new + F.linear(first, parts[0])
        new = new.squeeze(-1).T
        return (logits + new) / 2 if self.readout == "averaged" else new

    def _first_states(self, logits: Tensor) -> Tensor:
        """Make the first states (C, B, H) from logits (B, C): each logit among zeros, or beside its class's vector."""
        column = logits.T.unsqueeze(-1)  # (C, B, 1)
        if self.class_vectors is not None:
            return torch.cat([column, self.class_vectors.unsqueeze(1).expand(-1, logits.shape[0], -1)], dim=-1)
        placed = torch.diag_embed(logits, dim1=0, dim2=2) if self.identity == "one_hot" else column
        return F.pad(placed, (self._logit_places.start, self.width - self._logit_places.stop))

    def _step_weights(self) -> tuple[Tensor, ...]:
        return (
            self.message_weight,
            self.message_bias,
            self.input_weight,
            self.input_bias,
            self.state_weight,
            self.state_bias,
        )


def _identity_and_width(settings: LabelGraphSettings, num_classes: int) -> tuple[str, int]:
    """Resolve null settings: the identity and width for C classes.

    Raises:
        ConfigError: identity `one_hot` with a width below C.
    """
    identity, width = settings.identity, settings.width
    if identity is None:
        fits = num_classes <= min(_MOST_ONE_HOT, width or _MOST_ONE_HOT)
        identity = "one_hot" if fits else "learned"
    if identity == "one_hot" and width is not None and width < num_classes:
        raise ConfigError(
            f"identity one_hot and width {width} with {num_classes} classes",
            expected="a width of at least the number of classes: each has a place of its own",
            where="method.graph.width",
            next_step="leave method.graph.width out, or set method.graph.identity to learned",
        )
    return identity, width or (max(2, num_classes) if identity == "one_hot" else 128)


class _Propagation(torch.autograd.Function):
    """T steps over all nodes, block by block; the backward pass recomputes each block."""

    @staticmethod
    def forward(ctx: Any, num_steps: int, is_kept: bool, states: Tensor, *weights: Tensor) -> Tensor:
        kept = []
        for _ in range(num_steps):
            offers = [_offer(states[block], *weights) for block in _blocks(states, weights)]
            offer = torch.cat(offers) if _is_pairwise(weights) else torch.stack(offers).sum(dim=0)
            if is_kept:
                kept += [states, offer]
            following = torch.empty_like(states)
            for block in _blocks(states, weights):
                following[block] = _update(len(states), states[block], offer, *weights)
            states = following
        ctx.num_weights = len(weights)
        ctx.save_for_backward(*weights, *kept)
        kind = states.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        weights, kept = ctx.saved_tensors[: ctx.num_weights], ctx.saved_tensors[ctx.num_weights :]
        (slope,) = grad_outputs  # (C, B, H), gradient by the states after a step, from the last back
        weight_slopes = [torch.zeros_like(weight) for weight in weights]
        kind, dtype, is_enabled = ctx.autocast
        # Uncached: each block has new leaves for the weights, and the casts of all blocks would be kept to the end.
        with torch.autocast(kind, dtype=dtype, enabled=is_enabled, cache_enabled=False):
            for states, offer in zip(kept[-2::-2], kept[::-2], strict=True):
                earlier, offer_slope = torch.empty_like(states), torch.zeros_like(offer)
                update = partial(_update, len(states))
                for block in _blocks(states, weights):
                    earlier[block], *others = pull_back(update, slope[block], states[block], offer, *weights)
                    add([offer_slope, *weight_slopes], others)
                for block in _blocks(states, weights):
                    by_block = offer_slope[block] if _is_pairwise(weights) else offer_slope
                    own, *others = pull_back(_offer, by_block, states[block], *weights)
                    add([earlier[block], *weight_slopes], [own, *others])
                slope = earlier
        return None, None, slope, *weight_slopes


def _offer(states: Tensor, *weights: Tensor) -> Tensor:
    """Compute what a block of nodes sends to all nodes.

    Args:
        states: (c, B, H).
        weights: see `LabelGraph._step_weights`.

    Returns:
        `sender`: (B, M), the sum of the block's messages. `pair`: (c, B, M), the senders' part of each message.
    """
    message_weight, message_bias, *_ = weights
    if _is_pairwise(weights):
        return linear(states, message_weight[:, : states.shape[-1]])
    return linear(states, message_weight, message_bias).relu().sum(dim=0)


def _update(num_classes: int, states: Tensor, offer: Tensor, *weights: Tensor) -> Tensor:
    """Compute the next states of a block of nodes.

    Args:
        num_classes: C.
        states: (c, B, H).
        offer: what all nodes send, see `_offer`; `sender`: (B, M), summed; `pair`: (C, B, M).
        weights: see `LabelGraph._step_weights`.

    Returns:
        (c, B, H).
    """
    message_weight, message_bias, input_weight, input_bias, state_weight, state_bias = weights
    if _is_pairwise(weights):
        senders, receivers = message_weight.split(states.shape[-1], dim=1)
        seen = linear(states, receivers, message_bias)  # (c, B, M)
        total = (offer + seen.unsqueeze(1)).relu().sum(dim=1)  # summed from (c, C, B, M)
        own = (linear(states, senders) + seen).relu()
    else:
        total, own = offer, linear(states, message_weight, message_bias).relu()
    mean = (total - own) / max(1, num_classes - 1)  # (c, B, M), over the other nodes; 0 for a single class

    inputs = linear(mean, input_weight, input_bias).chunk(3, dim=-1)  # three of (c, B, H)
    memory = linear(states, state_weight, state_bias).chunk(3, dim=-1)
    reset = torch.sigmoid(inputs[0] + memory[0])
    kept_share = torch.sigmoid(inputs[1] + memory[1])
    candidate = torch.tanh(inputs[2] + reset * memory[2])
    return candidate + kept_share * (states - candidate)


def _is_pairwise(weights: tuple[Tensor, ...]) -> bool:
    """True if a message is computed from both nodes' states."""
    message_weight, *_, state_weight, _ = weights
    return message_weight.shape[1] == 2 * state_weight.shape[1]


def _blocks(states: Tensor, weights: tuple[Tensor, ...]) -> Iterator[slice]:
    """Cut the nodes of states (C, B, H) into blocks that bound the memory of a step."""
    C, B, H = states.shape
    M = weights[0].shape[0]
    entries = _CPU_ENTRIES if states.device.type == "cpu" else _DEVICE_ENTRIES
    step = max(1, entries // max(1, B * (C * M if _is_pairwise(weights) else max(H, M))))
    return (slice(start, start + step) for start in range(0, C, step))
