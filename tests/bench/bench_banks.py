"""What memory costs in a step: each bank's recall and observe on four ranks, against all-to-alls of the same bytes.

python -m tests.bench.bench_banks [--ranks N] [--json PATH]

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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.banks.keyed import KeyedBank
from dist_mlpl.banks.prototypes import Prototypes
from dist_mlpl.banks.ring import Ring
from tests.support.ranks import run_ranks

STEPS, WARMUP = 100, 10
BATCHES, POSITIVES = (16, 64), 3  # images on a rank, known positives of an image
C, K, P, D, N = 80, 100, 10, 1024, 10_000
BAR = 2.0

Step = Callable[[int], None]


def features(step: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Class ids, features and positions of a rank's known positives."""
    generator = torch.Generator().manual_seed(step * comm.world_size() + comm.rank())
    classes = torch.randint(0, C, (rows,), generator=generator)
    positions = torch.arange(rows) + rows * comm.rank()
    return classes, torch.randn(rows, D, generator=generator), positions


def ring_step(batch: int) -> Step:
    """SST: means of all classes before the step, known positives pushed after it."""
    ring = Ring("ring", C, K, D)
    given = [features(step, batch * POSITIVES) for step in range(8)]

    def step(number: int) -> None:
        classes, vectors, positions = given[number % 8]
        ring.means(classes)
        ring.push(classes, vectors, positions)

    return step


def prototype_step(batch: int) -> Step:
    """SARB: a prototype for each image before the step, known positives added to the nearest after it."""
    bank = Prototypes("prototypes", C, P, D, seed=0)
    given = [features(step, batch * POSITIVES) for step in range(8)]

    def step(number: int) -> None:
        classes, vectors, positions = given[number % 8]
        bank.read(classes[:batch], positions[:batch] % P)
        bank.add(classes, vectors, position=positions)
        if number == 4:
            bank.renew()

    return step


def keyed_step(batch: int) -> Step:
    """A row of D numbers an image, read before and written after."""
    bank = KeyedBank("rows", N, (D,), "f32")
    stamps = torch.ones(batch, dtype=torch.int32)
    rows = torch.randn(batch, D)

    def step(number: int) -> None:
        index = (torch.arange(batch) + batch * (comm.rank() + comm.world_size() * number)) * 7919 % N
        bank.read(index)
        bank.write(index, {"rows": rows, "stamps": stamps})

    return step


CASES: dict[str, Callable[[int], Step]] = {"ring": ring_step, "prototypes": prototype_step, "keyed": keyed_step}


class Counted:
    """Collectives of `comm`, and the bytes that this rank sends in them to each rank, itself included."""

    def __init__(self) -> None:
        self.sent, self.number = [0] * comm.world_size(), 0

    def __enter__(self) -> Counted:
        self._before = dist.all_to_all_single, dist.all_gather

        def all_to_all(output: Tensor, given: Tensor, output_splits: Any = None, input_splits: Any = None) -> Any:
            row = given.numel() // max(1, given.shape[0]) * given.element_size()
            splits = input_splits or [given.shape[0] // comm.world_size()] * comm.world_size()
            self.sent = [total + rows * row for total, rows in zip(self.sent, splits, strict=True)]
            self.number += 1
            return self._before[0](output, given, output_splits, input_splits)

        def all_gather(outputs: list[Tensor], given: Tensor) -> Any:
            self.sent = [total + given.numel() * given.element_size() for total in self.sent]
            self.number += 1
            return self._before[1](outputs, given)

        dist.all_to_all_single, dist.all_gather = all_to_all, all_gather  # type: ignore[assignment]
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_to_all_single, dist.all_gather = self._before


class Measured(NamedTuple):
    """Of this rank's steps of a bank."""

    own: list[float]  # seconds
    bare: list[float]  # of the yardstick
    num_bytes: int  # sent in the last step
    num_collectives: int


def measure(rank: int, world_size: int, batch: int) -> dict[str, Measured]:
    """By case."""
    found = {}
    for name, make in CASES.items():
        step = make(batch)
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
        found[name] = Measured(own[WARMUP:], bare[WARMUP:], sum(counted.sent), counted.number)
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
    parser.add_argument("--ranks", type=int, default=4, help="four on two cores take turns; two have a core each")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    record = {}
    print(f"{arguments.ranks} ranks, C = {C}, K = {K}, P = {P}, D = {D}")
    for batch in BATCHES:
        (first, *_) = run_ranks(measure, arguments.ranks, batch, timeout_seconds=600.0)
        for name, found in first.items():
            ratio = statistics.median(a / b for a, b in zip(found.own, found.bare, strict=True))
            own, bare = (1e3 * statistics.median(seconds) for seconds in (found.own, found.bare))
            record[f"{name} {batch}"] = {"milliseconds": own, "ratio": ratio, "bytes_of_rank": found.num_bytes,
                                         "collectives": found.num_collectives}  # fmt: skip
            print(
                f"{name:<11} {batch} images: {own:7.2f} ms in {found.num_collectives} collectives of "
                f"{found.num_bytes:>9,} bytes, all-to-all {bare:6.2f} ms: {ratio:.2f} (bar {BAR}) "
                f"{'met' if ratio <= BAR else 'not met'}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
