"""Owns a slow oracle of the label graph: neighbour by neighbour, over Python floats, which are float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dist_mlpl.models.graph import LabelGraph

Vector = list[float]
Matrix = list[Vector]


def graph_oracle(graph: LabelGraph, logits: Tensor) -> Tensor:
    """(B, C) float64: the logits after T rounds of messages in a graph where every node hears every other one."""
    return torch.tensor([_one_image(graph, row) for row in logits.tolist()], dtype=torch.float64)


def _one_image(graph: LabelGraph, logits: Vector) -> Vector:
    weights = {name: parameter.tolist() for name, parameter in graph.named_parameters()}
    first = [_first_state(graph, weights, logits, node) for node in range(len(logits))]
    states = first
    for _ in range(graph.num_steps):
        states = [_next_state(graph, weights, states, node) for node in range(len(states))]
    result = []
    for node, logit in enumerate(logits):
        seen = first[node] + states[node] if graph.readout == "both" else states[node]
        new = weights["output_bias"][0] + sum(w * x for w, x in zip(weights["output_weight"][0], seen, strict=True))
        result.append((logit + new) / 2 if graph.readout == "averaged" else new)
    return result


def _first_state(graph: LabelGraph, weights: dict, logits: Vector, node: int) -> Vector:
    if graph.identity == "learned":
        return [logits[node], *weights["class_vectors"][node]]
    place = node if graph.identity == "one_hot" else (graph.width - 1) // 2
    return [logits[node] if k == place else 0.0 for k in range(graph.width)]


def _next_state(graph: LabelGraph, weights: dict, states: Matrix, node: int) -> Vector:
    is_pairwise = len(weights["message_weight"][0]) == 2 * graph.width
    heard = [0.0] * len(weights["message_bias"])
    for other in range(len(states)):
        if other != node:
            seen = states[other] + states[node] if is_pairwise else states[other]
            message = _linear(weights["message_weight"], weights["message_bias"], seen)
            heard = [total + max(0.0, value) for total, value in zip(heard, message, strict=True)]
    mean = [total / max(1, len(states) - 1) for total in heard]
    H = graph.width
    a = _linear(weights["input_weight"], weights["input_bias"], mean)
    b = _linear(weights["state_weight"], weights["state_bias"], states[node])
    following = []
    for k in range(H):
        reset, kept_share = _sigmoid(a[k] + b[k]), _sigmoid(a[H + k] + b[H + k])
        candidate = math.tanh(a[2 * H + k] + reset * b[2 * H + k])
        following.append((1.0 - kept_share) * candidate + kept_share * states[node][k])
    return following


def _linear(weight: Matrix, bias: Vector, vector: Vector) -> Vector:
    return [b + sum(w * x for w, x in zip(row, vector, strict=True)) for row, b in zip(weight, bias, strict=True)]


def _sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))
