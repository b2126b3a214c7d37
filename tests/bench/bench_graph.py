"""The label graph, forward and backward on one CPU thread: how time and memory grow with C, and against other forms."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dist_mlpl.models.graph import LabelGraph, LabelGraphSettings

Form = Callable[[Tensor], Tensor]

B, WIDTH, NUM_STEPS = 8, 128, 3
ROUNDS = 3


class AutogradGraph(nn.Module):
    """The same step by torch's own layers, everything kept for the backward pass."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.class_vectors = nn.Parameter(torch.randn(num_classes, WIDTH - 1))
        self.message = nn.Linear(WIDTH, WIDTH)
        self.gru = nn.GRUCell(WIDTH, WIDTH)
        self.readout = nn.Linear(2 * WIDTH, 1)

    def forward(self, logits: Tensor) -> Tensor:
        B, C = logits.shape
        first = torch.cat([logits.unsqueeze(-1), self.class_vectors.expand(B, -1, -1)], dim=-1)  # (B, C, H)
        states = first
        for _ in range(NUM_STEPS):
            mean = self.mean_of_others(self.message(states).relu())
            states = self.gru(mean.flatten(0, 1), states.flatten(0, 1)).view(B, C, WIDTH)
        return self.readout(torch.cat([first, states], dim=-1)).squeeze(-1)

    def mean_of_others(self, messages: Tensor) -> Tensor:
        """Sum less own."""
        return (messages.sum(dim=1, keepdim=True) - messages) / (messages.shape[1] - 1)


class PrintedGraph(AutogradGraph):
    """The mean written out: every node's own copy of all messages, its own masked away."""

    def mean_of_others(self, messages: Tensor) -> Tensor:
        C = messages.shape[1]
        others = 1.0 - torch.eye(C)
        copies = messages.unsqueeze(1) * others.view(1, C, C, 1)  # (B, C, C, H)
        return copies.sum(dim=2) / (C - 1)


def cost(form: Form, logits: Tensor) -> tuple[float, float]:
    """Median processor seconds, and peak bytes allocated, of one forward and backward."""
    times = []
    for _ in range(ROUNDS):
        leaf = logits.clone().requires_grad_()
        began = time.process_time()
        form(leaf).sum().backward()
        times.append(time.process_time() - began)
    leaf = logits.clone().requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        form(leaf).sum().backward()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return statistics.median(times), peak


def our_graph(num_classes: int) -> Form:
    settings = LabelGraphSettings(num_steps=NUM_STEPS, width=WIDTH, identity="learned")
    graph = LabelGraph(settings, num_classes)
    torch.nn.init.normal_(graph.output_weight)
    return graph


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"width {WIDTH}, {NUM_STEPS} steps")
    print(
        "".join(f"{name:>18}" for name in ("form", "images x classes", "seconds", "peak GB", "us / node", "kB / node"))
    )

    def show(name: str, form: Form, num_images: int, num_classes: int) -> None:
        seconds, peak = cost(form, torch.randn(num_images, num_classes))
        nodes = num_images * num_classes
        numbers = (f"{seconds:.2f}", f"{peak / 1e9:.3f}", f"{seconds / nodes * 1e6:.1f}", f"{peak / nodes / 1e3:.2f}")
        print("".join(f"{text:>18}" for text in (name, f"{num_images} x {num_classes}", *numbers)))

    for num_classes in (601, 2401, 9605):
        show("ours", our_graph(num_classes), B, num_classes)
    show("plain autograd", AutogradGraph(9605), B, 9605)
    show("ours", our_graph(601), 1, 601)
    show("as printed", PrintedGraph(601), 1, 601)


if __name__ == "__main__":
    main()
