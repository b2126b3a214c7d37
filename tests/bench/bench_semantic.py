"""The semantic models on one CPU thread: decoupling against the form that builds everything, similarity against single
cosines, and the heads at 9,605 classes."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_mlpl.methods.sst import mean_similarity
from dist_mlpl.models.cooccurrence import PairHead, PairSettings
from dist_mlpl.models.gated_graph import GatedGraphSettings
from dist_mlpl.models.label_counts import count_cooccurrence
from dist_mlpl.models.semantic import SemanticDecoupling, SemanticHead, SemanticSettings
from tests.support.losses import random_targets
from tests.support.semantic import LabelsOf, materialised_decoupling, random_labels

ROUNDS = 3
MEGABYTE = 1e6


def median_seconds(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Of processor time, after one call that does not count."""
    call()
    times = []
    for _ in range(rounds):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return statistics.median(times)


def peak_bytes() -> int:
    """Most memory that this process held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(part: str) -> tuple[float, float]:
    """Seconds and peak bytes, beyond those before, of one part in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.bench.bench_semantic", part], capture_output=True, text=True, check=True
    )
    seconds, num_bytes = found.stdout.split()
    return float(seconds), float(num_bytes)


def decouple(is_materialised: bool) -> Callable[[], object]:
    torch.manual_seed(0)
    decoupling = SemanticDecoupling(SemanticSettings(), 1024, 80)
    feature_map = torch.randn(4, 1024, 7, 7)

    def step() -> None:
        leaf = feature_map.clone().requires_grad_()
        found = materialised_decoupling(decoupling, leaf)[0] if is_materialised else decoupling(leaf).class_features
        found.square().sum().backward()

    return step


def heads(num_classes: int) -> Callable[[], object]:
    """Decoupling, graph, classifier and pair head, forward and backward, of two maps of 512 x 7 x 7."""
    torch.manual_seed(0)
    head = SemanticHead(SemanticSettings(), GatedGraphSettings(), num_features=512, num_classes=num_classes)
    pair_head = PairHead(PairSettings(), 512, num_classes)
    matrix = random_labels(2000, num_classes, seed=0, known=20 / num_classes, present=0.5)
    counts = count_cooccurrence(LabelsOf(matrix), *matrix.shape)
    head.set_cooccurrence(counts)
    pair_head.set_cooccurrence(counts)
    feature_map = torch.randn(2, 512, 7, 7)
    known = random_targets((2, num_classes), 0.1, torch.Generator().manual_seed(0)) != 0

    def step() -> None:
        leaf = feature_map.clone().requires_grad_()
        features = head.decouple(leaf).class_features
        loss = head.classify(features).square().sum() + pair_head(features, pair_head.pairs(known, known)).sum()
        loss.backward()

    return step


PARTS: dict[str, Callable[[], Callable[[], object]]] = {
    "materialised": lambda: decouple(True),
    "decoupling": lambda: decouple(False),
    **{f"heads-{C}": lambda C=C: heads(C) for C in (80, 601, 9605)},  # type: ignore[misc]
}


def report_decoupling() -> None:
    printed, ours = measured("materialised"), measured("decoupling")
    print("decoupling, 4 images, C = 80, 7 x 7 x 1024, k = 512, forward + backward")
    for name, (seconds, num_bytes) in (("materialised", printed), ("ours", ours)):
        print(f"  {name:13} {seconds * 1e3:8.1f} ms  {num_bytes / MEGABYTE:8.1f} MB")
    print(f"  {printed[0] / ours[0]:.1f} x faster (bar 3.5), {ours[1] / printed[1]:.3f} of the memory (bar 0.2)")


def report_similarity() -> None:
    features, bank = torch.randn(8, 80, 1024), torch.randn(80, 100, 1024)
    means = F.normalize(bank, dim=2).mean(dim=1)

    def single_cosines() -> Tensor:
        return F.cosine_similarity(features[:, :, None], bank[None], dim=-1, eps=1e-9).mean(dim=2)

    difference = float((single_cosines() - mean_similarity(features, means)).abs().max())
    ratio = median_seconds(single_cosines) / median_seconds(lambda: mean_similarity(features, means), rounds=51)
    print(
        f"similarity, B = 8, C = 80, K = 100, D = 1024: {ratio:.0f} x faster (bar 100), {difference:.1e} apart (1e-6)"
    )


def report_classes() -> None:
    print("heads, 2 images, 7 x 7 x 512, forward + backward")
    for num_classes in (80, 601, 9605):
        seconds, num_bytes = measured(f"heads-{num_classes}")
        each = f"{seconds / num_classes * 1e3:.2f} ms, {num_bytes / num_classes / MEGABYTE:.2f} MB a class"
        print(f"  C = {num_classes:5}: {seconds:7.2f} s  {num_bytes / 1e9:6.2f} GB  ({each})")


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        before = peak_bytes()
        step = PARTS[sys.argv[1]]()
        if not sys.argv[1].startswith("heads"):  # weights count for heads, and not where forms are compared
            before = peak_bytes()
        step()
        print(median_seconds(step, rounds=1 if sys.argv[1] == "heads-9605" else ROUNDS), peak_bytes() - before)
        return
    report_decoupling()
    report_similarity()
    report_classes()


if __name__ == "__main__":
    main()
