"""Owns oracles of the semantic models and of SST: everything built in full, or one class, pair and image at a time."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dist_mlpl.models.cooccurrence import PairHead, PairSettings
from dist_mlpl.models.gated_graph import GatedGraph, GatedGraphSettings
from dist_mlpl.models.label_counts import LabelCounts, count_cooccurrence
from dist_mlpl.models.semantic import SemanticDecoupling


def materialised_decoupling(decoupling: SemanticDecoupling, feature_map: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, C, D) and attention (B, C, L) as SSGRL's code has them: repeated, never folded, all kept."""
    cells = feature_map.flatten(2).transpose(1, 2)  # (B, L, D)
    B, L, D = cells.shape
    C = len(decoupling.embeddings)
    projected = (cells @ decoupling.cell_weight.T)[:, :, None].repeat(1, 1, C, 1)  # (B, L, C, k)
    keys = (decoupling.embeddings @ decoupling.class_weight.T).repeat(B, L, 1, 1)
    mixed = torch.tanh(projected * keys) @ decoupling.mixing_weight.T
    scores = (mixed @ decoupling.score_weight.T).squeeze(-1)  # (B, L, C)
    attention = scores.softmax(dim=1)
    weighted = attention[..., None].repeat(1, 1, 1, D) * cells[:, :, None].repeat(1, 1, C, 1)  # (B, L, C, D)
    return weighted.sum(dim=1), attention.transpose(1, 2)


class LabelsOf:
    """Labels of a matrix (N, C), read as a method reads those of a run."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix
        self.most_read = 0  # samples asked for at once

    def targets(self, indices: np.ndarray) -> np.ndarray:
        self.most_read = max(self.most_read, len(indices))
        return self.matrix[indices]


def random_labels(num_samples: int, num_classes: int, *, seed: int, known: float = 0.5, present: float = 0.3):
    """(N, C) int8: known with one probability, then present with the other; the last class is never present."""
    generator = np.random.default_rng(seed)
    labels = np.where(generator.random((num_samples, num_classes)) < present, 1, -1)
    labels[:, -1] = -1
    return np.where(generator.random(labels.shape) < known, labels, 0).astype(np.int8)


def counts_oracle(matrix: np.ndarray) -> dict[tuple[int, int], tuple[int, int]]:
    """(images with both present, images with i present and j known) by (i, j), image by image."""
    counts: dict[tuple[int, int], list[int]] = {}
    for row in matrix:
        for i in np.flatnonzero(row == 1):
            for j in np.flatnonzero(row != 0):
                both = counts.setdefault((int(i), int(j)), [0, 0])
                both[0] += int(row[j] == 1)
                both[1] += 1
    return {pair: (together, known) for pair, (together, known) in sorted(counts.items()) if together > 0}


def as_pairs(counts: LabelCounts) -> dict[tuple[int, int], tuple[int, int]]:
    """Counts in the oracle's form."""
    columns = (counts.first, counts.second, counts.together, counts.known)
    return {(i, j): (together, known) for i, j, together, known in zip(*(c.tolist() for c in columns), strict=True)}


def adjacency_oracle(matrix: np.ndarray, num_neighbours: int | None, *, is_biased: bool = False) -> Tensor:
    """(C, C) float64: P(j | i) over images where j is known, or over all with i; unseen classes hear themselves."""
    C = matrix.shape[1]
    table = torch.eye(C, dtype=torch.float64)
    counts = counts_oracle(matrix)
    for i in range(C):
        own = {j: pair for (first, j), pair in counts.items() if first == i and j != i}
        likely = {j: n / (counts[i, i][0] if is_biased else known) for j, (n, known) in own.items()}
        order = sorted(own, key=lambda j: (-own[j][0], -likely[j], j))
        for j in order if num_neighbours is None else order[: num_neighbours - 1]:
            table[i, j] = likely[j]
    return table


def random_gated_graph(
    num_classes: int, width: int, *, seed: int = 0, num_steps: int = 3, num_neighbours: int | None = None
) -> tuple[GatedGraph, Tensor]:
    """A graph with labels of its own, and the table that it stands for."""
    torch.manual_seed(seed)
    graph = GatedGraph(GatedGraphSettings(num_steps=num_steps, num_neighbours=num_neighbours), width, num_classes)
    matrix = random_labels(60, num_classes, seed=seed)
    graph.set_cooccurrence(count_cooccurrence(LabelsOf(matrix), len(matrix), num_classes))
    return graph, adjacency_oracle(matrix, num_neighbours)


def gated_graph_oracle(graph: GatedGraph, table: Tensor, features: Tensor) -> Tensor:
    """(B, C, D): the printed equations, one image, step and class at a time."""
    D = features.shape[-1]
    of_message, by_message = graph.message_weight.split(D), graph.message_bias.split(D)
    of_gate, by_gate = graph.gate_weight.split(D), graph.gate_bias.split(D)
    images = []
    for image in features:
        h = list(image)
        for _ in range(graph.num_steps):
            following = []
            for i in range(len(h)):
                into = sum((table[i, j] * h[j] for j in range(len(h))), torch.zeros_like(h[i]))
                back = sum((table[j, i] * h[j] for j in range(len(h))), torch.zeros_like(h[i]))
                m = torch.cat([into, back])
                z = torch.sigmoid(of_message[0] @ m + by_message[0] + of_gate[0] @ h[i] + by_gate[0])
                r = torch.sigmoid(of_message[1] @ m + by_message[1] + of_gate[1] @ h[i] + by_gate[1])
                heard = of_message[2] @ m + by_message[2]
                candidate = torch.tanh(heard + graph.candidate_weight @ (r * h[i]) + graph.candidate_bias)
                following.append((1 - z) * h[i] + z * candidate)
            h = following
        images.append(torch.stack(h))
    return torch.stack(images)


def random_pair_head(num_classes: int, width: int, *, seed: int = 0, num_neighbours: int | None = None) -> PairHead:
    """A pair head, its neighbours from labels of its own."""
    torch.manual_seed(seed)
    head = PairHead(PairSettings(class_width=6, pair_width=7, num_neighbours=num_neighbours), width, num_classes)
    matrix = random_labels(60, num_classes, seed=seed)
    head.set_cooccurrence(count_cooccurrence(LabelsOf(matrix), len(matrix), num_classes))
    return head


def pair_slots(head: PairHead) -> dict[tuple[int, int], int]:
    """Row of weights of every pair (i, j) that has one; i < j, or i and its neighbour j."""
    if head.num_neighbours is None:
        C = head.num_classes
        return {pair: slot for slot, pair in enumerate((i, j) for i in range(C) for j in range(i + 1, C))}
    rows = enumerate(head.neighbours.tolist())
    return {
        (i, j): i * head.num_neighbours + place for i, row in rows for place, j in enumerate(row) if j != i
    }  # fmt: skip


def pair_logit(head: PairHead, feature_i: Tensor, feature_j: Tensor, slot: int) -> Tensor:
    """() by the printed equations, Wb over the concatenation."""
    joint = torch.cat([head.class_weight @ feature_i, head.class_weight @ feature_j])
    hidden = torch.relu(torch.cat([head.first_weight, head.second_weight], dim=1) @ joint + head.joint_bias)
    return head.pair_weight[slot] @ hidden + head.pair_bias[slot]


def pair_loss_oracle(probabilities: list[float], together: list[bool]) -> float:
    """L_ist's sum, pair by pair."""
    total = 0.0
    for p, is_together in zip(probabilities, together, strict=True):
        if is_together:
            total -= (1 - p) * math.log(max(p, 1e-8))
        else:
            n = min(1 - p + 0.05, 1.0)
            total -= (1 - n) ** 2 * math.log(n)
    return total


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """() with a floor on both lengths."""
    return (a / a.norm().clamp(min=1e-9)) @ (b / b.norm().clamp(min=1e-9))


def contrastive_oracle(
    features: Tensor, targets: Tensor, group_size: int, *, keep_negatives_alone: bool = False
) -> tuple[Tensor, float]:
    """Weighted sum and count, group by group, class by class, pair by pair."""
    total, count = features.sum() * 0.0, 0.0
    for start in range(0, len(targets), group_size):
        kinds: dict[str, list[Tensor]] = {"present": [], "mixed": [], "absent": []}
        rows = range(start, start + group_size)
        for c in range(targets.shape[1]):
            for n in rows:
                for m in range(n + 1, start + group_size):
                    a, b = int(targets[n, c]), int(targets[m, c])
                    if a == 0 or b == 0:
                        continue
                    s = cosine(features[n, c], features[m, c])
                    kind = "present" if a == b == 1 else "absent" if a == b else "mixed"
                    kinds[kind].append(1 - s if kind == "present" else 1 + s)
        a = len(kinds["present"])
        total, count = total + sum(kinds["present"]), count + a
        for kind in ("mixed", "absent"):
            losses = kinds[kind]
            if a > 0 and losses:
                drawn, hardest = min(2 * a, len(losses)), min(a, len(losses))
                total = total + sum(losses) * drawn / len(losses)  # the expected value of `drawn` taken at random
                total = total + sum(sorted(losses, key=lambda loss: float(loss.detach()), reverse=True)[:hardest])
                count += drawn + hardest
            elif keep_negatives_alone:
                total, count = total + sum(losses), count + len(losses)
    return total, count
