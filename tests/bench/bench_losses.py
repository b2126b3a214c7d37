"""Losses of 256 x 9,605, forward and backward on one CPU thread: ours against the printed equations, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dist_mlpl.losses.partial_bce import partial_bce
from dist_mlpl.losses.selective import selective_loss
from tests.support.printed_losses import printed_partial_bce, printed_selective, stable_partial_bce

Loss = Callable[[Tensor, Tensor], Tensor]

B, C, TOP_K, ROUNDS = 256, 9605, 200, 11


def our_selective(logits: Tensor, targets: Tensor) -> Tensor:
    return selective_loss(logits, targets, mode="selective", gamma_pos=1, gamma_neg=2, gamma_unknown=7, top_k=TOP_K)


def plain_selective(logits: Tensor, targets: Tensor) -> Tensor:
    return printed_selective(logits, targets, top_k=TOP_K)


COMPARED: dict[str, tuple[Loss, Loss]] = {
    "partial BCE / as printed": (partial_bce, printed_partial_bce),
    "partial BCE / softplus form": (partial_bce, stable_partial_bce),
    "CSL / as printed": (our_selective, plain_selective),
}


def step_seconds(loss: Loss, logits: Tensor, targets: Tensor) -> float:
    """Processor time of one forward and backward: what other processes on the machine do counts little."""
    leaf = logits.detach().requires_grad_()
    began = time.process_time()
    loss(leaf, targets).backward()
    return time.process_time() - began


def extra_memory(loss: Loss, logits: Tensor, targets: Tensor) -> float:
    """Peak of what a forward and backward allocates, the gradient included, as a multiple of the logits."""
    leaf = logits.detach().requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        loss(leaf, targets).backward()
    held = peak = 0
    for event in sorted(_allocations(watched), key=lambda e: e[0]):
        held += event[1]
        peak = max(peak, held)
    return peak / (logits.numel() * logits.element_size())


def _allocations(watched: profile) -> list[tuple[int, int]]:
    """(time, bytes) of every allocation, negative when freed."""
    events = watched.profiler.kineto_results.events()  # type: ignore[union-attr]
    return [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, C, generator=generator) - 2
    names = ("known", "ours ms", "theirs ms", "ours / theirs", "our memory", "their memory")
    print(f"{'':30}" + "".join(f"{name:>15}" for name in names))
    for known_fraction in (0.00066, 0.1, 1.0):
        is_known = torch.rand(B, C, generator=generator) < known_fraction
        is_present = torch.rand(B, C, generator=generator) < 0.35
        targets = torch.where(is_known, torch.where(is_present, 1, -1), 0).to(torch.int8)
        for name, pair in COMPARED.items():
            times = [[step_seconds(loss, logits, targets) for loss in pair] for _ in range(ROUNDS)]
            ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
            ratio = statistics.median(mine / other for mine, other in times)
            memory = [extra_memory(loss, logits, targets) for loss in pair]
            numbers = (f"{1e3 * ours:.1f}", f"{1e3 * theirs:.1f}", f"{ratio:.2f}", *(f"{m:.1f} x" for m in memory))
            print(f"{name:30}{known_fraction:>15.2%}" + "".join(f"{text:>15}" for text in numbers))


if __name__ == "__main__":
    main()
