"""What memory costs in a step: each bank's recall and observe on four ranks, against all-to-alls of the same bytes.

python -m tests.bench.bench_banks [--json PATH]

The yardstick is one uneven all-to-all that moves, between the same ranks, as many bytes as the bank's own collectives
did: they are counted where they are made. Both take turns, step by step; a ratio is the median over the steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.banks.keyed import KeyedBank
from dist_mlpl.banks.prototypes import Prototypes
from dist_mlpl.banks.ring import Ring
from tests.support.ranks import run_ranks

NUM_RANKS, STEPS, WARMUP = 4, 30, 5
BATCH, POSITIVES = 16, 3  # images on a rank, known positives of an image
C, K, P, D, N = 80, 100, 10, 1024, 10_000
BAR = 2.0

Step = Callable[[int], None]


def features(step: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Class ids, features and positions of a rank's known positives."""
    generator = torch.Generator().manual_seed(step * NUM_RANKS + comm.rank())
    classes = torch.randint(0, C, (rows,), generator=generator)
    positions = torch.arange(rows) + rows * comm.rank()
    return classes, torch.randn(rows, D, generator=generator), positions


def ring_step() -> Step:
    """SST: means of all classes before the step, known positives pushed after it."""
    ring = Ring("ring", C, K, D)
    given = [features(step, BATCH * POSITIVES) for step in range(8)]

    def step(number: int) -> None:
        ring.means()
        ring.push(*given[number % 8])

    return step


def prototype_step() -> Step:
    """SARB: a prototype for each image before the step, known positives added to the nearest after it."""
    bank = Prototypes("prototypes", C, P, D, seed=0)
    given = [features(step, BATCH * POSITIVES) for step in range(8)]

    def step(number: int) -> None:
        classes, vectors, positions = given[number % 8]
        bank.read(classes[:BATCH], positions[:BATCH] % P)
        bank.add(classes, vectors, position=positions)
        if number == 4:
            bank.renew()

    return step


def keyed_step() -> Step:
    """A row of D numbers an image, read before and written after."""
    bank = KeyedBank("rows", N, (D,), "f32")
    stamps = torch.ones(BATCH, dtype=torch.int32)
    rows = torch.randn(BATCH, D)

    def step(number: int) -> None:
        index = (torch.arange(BATCH) + BATCH * (comm.rank() + NUM_RANKS * number)) * 7919 % N
        bank.read(index)
        bank.write(index, {"rows": rows, "stamps": stamps})

    return step


CASES: dict[str, Callable[[], Step]] = {"ring": ring_step, "prototypes": prototype_step, "keyed": keyed_step}


class Counted:
    """Bytes that this rank sends to each rank, itself included, while collectives of `comm` run."""

    def __init__(self) -> None:
        self.sent = [0] * comm.world_size()

    def __enter__(self) -> Counted:
        self._before = dist.all_to_all_single, dist.all_gather

        def all_to_all(output: Tensor, given: Tensor, output_splits: Any = None, input_splits: Any = None) -> Any:
            row = given.numel() // max(1, given.shape[0]) * given.element_size()
            splits = input_splits or [given.shape[0] // comm.world_size()] * comm.world_size()
            self.sent = [total + rows * row for total, rows in zip(self.sent, splits, strict=True)]
            return self._before[0](output, given, output_splits, input_splits)

        def all_gather(outputs: list[Tensor], given: Tensor) -> Any:
            self.sent = [total + given.numel() * given.element_size() for total in self.sent]
            return self._before[1](outputs, given)

        dist.all_to_all_single, dist.all_gather = all_to_all, all_gather  # type: ignore[assignment]
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_to_all_single, dist.all_gather = self._before


def measure(rank: int, world_size: int) -> dict[str, tuple[list[float], list[float], int]]:
    """By case: seconds of the bank's steps, of the yardstick's, and bytes that this rank sends in a step."""
    found = {}
    for name, make in CASES.items():
        step = make()
        own: list[float] = []
        bare: list[float] = []
        for number in range(WARMUP + STEPS):
            with Counted() as counted:
                seconds = timed(lambda number=number, step=step: step(number))  # type: ignore[misc]
            own.append(seconds)
            received = comm.gather_objects(counted.sent)
            splits = [sent[rank] for sent in received]
            outgoing = torch.zeros(sum(counted.sent), dtype=torch.uint8)
            incoming = torch.empty(sum(splits), dtype=torch.uint8)
            bare.append(
                timed(lambda a=incoming, b=outgoing, c=splits, d=counted.sent: dist.all_to_all_single(a, b, c, d))  # type: ignore[misc]
            )
        found[name] = own[WARMUP:], bare[WARMUP:], sum(counted.sent)
    return found


def timed(work: Callable[[], Any]) -> float:
    """Seconds until the slowest rank is done."""
    dist.barrier()
    began = time.perf_counter()
    work()
    seconds = torch.tensor([time.perf_counter() - began])
    return float(comm.reduce_max(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    (first, *_) = run_ranks(measure, NUM_RANKS, timeout_seconds=600.0)
    record = {}
    print(f"{NUM_RANKS} ranks, {BATCH} images each, C = {C}, K = {K}, P = {P}, D = {D}")
    for name, (own, bare, num_bytes) in first.items():
        ratio = statistics.median(a / b for a, b in zip(own, bare, strict=True))
        record[name] = {"milliseconds": 1e3 * statistics.median(own), "ratio": ratio, "bytes_of_rank": num_bytes}
        print(
            f"{name:<11} {1e3 * statistics.median(own):7.2f} ms, all-to-all {1e3 * statistics.median(bare):7.2f} ms, "
            f"{num_bytes:>10,} bytes: {ratio:.2f} (bar {BAR}) {'met' if ratio <= BAR else 'not met'}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
