"""Images a second of our stream, of other loaders and of the bare decoder, in one run; and what a resume costs.

python -m tests.bench.bench_stream [--quick] [--only throughput resume position order] [--json PATH]

All contestants read the same JPEGs with the same augmentation, on as many workers, and deliver uint8 (B, 3, S, S) and
labels on the CPU; ours and `bare` with the defaults of `TransformSettings`, scaled decoding and all, and images laid
out in rows of pixels. Each measurement is a process of its own; contestants take turns, so that what else the machine
does meets all of them. A ratio is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_mlpl import storage
from dist_mlpl.tools.object_store import EmbeddedS3
from tests.bench.stream_sources import CHILD_ENVIRONMENT, ChildError, Peers, Photographs, call, install_peers
from tests.bench.stream_sources import photographs as photographs_of

BATCH, WORKERS = 64, 2
WARMUP_BATCHES, TAIL_BATCHES = 4, 4  # untimed: queues fill, queues drain
QUICK_BATCHES = 12
PEERS = [f"{tool}-{decoder}" for tool in ("webdataset", "mosaicml", "litdata") for decoder in ("pil", "torchvision")]
CONTESTANTS = ["ours", *PEERS, "bare"]
OPEN_IMAGES = (9_011_219, 9_000)  # samples, shards

# (source, size): ours / WebDataset with Pillow, ours / fastest peer
PEER_BARS = {("640", 224): (1.5, 1.15), ("1024", 224): (1.9, 1.3)}
BARE_BAR = 0.92
RESUME_BAR = 1.2  # first batch at 90 % of an epoch / first batch of a fresh start
ORDER_SECONDS_BAR, ORDER_BYTES_BAR = 0.050, 100e6


@dataclass(frozen=True)
class Bar:
    """A number held against what was asked for; `value` is None where it could not be measured."""

    what: str
    value: float | None
    limit: float
    is_upper: bool

    @property
    def verdict(self) -> str:
        """met, not met or not measured."""
        if self.value is None:
            return "not measured"
        return "met" if (self.value <= self.limit if self.is_upper else self.value >= self.limit) else "not met"

    def row(self) -> tuple[str, ...]:
        """For the table."""
        value = "-" if self.value is None else f"{self.value:.3g}"
        return self.what, value, f"{'<=' if self.is_upper else '>='} {self.limit:g}", self.verdict


@dataclass(frozen=True)
class Plan:
    """What was asked for on the command line."""

    sizes: list[int]
    sources: list[str]
    contestants: list[str]
    repeats: int
    is_quick: bool


def ours(verb: str, *arguments: object, **environment: str) -> Any:
    """One measurement of `stream_ours` in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.stream_ours", verb, *map(str, arguments)]
    return call(command, **environment)


def say(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


# Throughput.


def measure_throughput(plan: Plan, console: Console) -> tuple[dict[str, Any], list[Bar]]:
    """Images a second of every contestant, over all sources and sizes."""
    names = plan.contestants
    peers = install_peers() if set(names) & set(PEERS) else None
    records: list[dict[str, Any]] = []
    bars: list[Bar] = []
    for source in plan.sources:
        photos = photographs_of(source)
        failures = unusable(peers, photos, names)
        for size in plan.sizes:
            speeds = race(plan, peers, photos, size, failures)
            ratios = {name: paired_ratio(speeds["ours"], speeds[name]) for name in names} if "ours" in names else {}
            show_speeds(console, photos, size, names, speeds, ratios, failures)
            records += [
                {"source": source, "size": size, "contestant": name, "images_per_second": speeds[name],
                 "ours_over_it": ratios.get(name), "failure": failures.get(name)}
                for name in names
            ]  # fmt: skip
            bars += throughput_bars(source, size, names, speeds, ratios)
    about = {"peer_versions": peers.versions if peers else {}, "num_workers": WORKERS, "global_batch": BATCH}
    return {**about, "records": records}, bars


def unusable(peers: Peers | None, photos: Photographs, names: Sequence[str]) -> dict[str, str]:
    """Why a contestant cannot run: not installed, or its own writer failed."""
    found = {}
    for name in names:
        tool = name.split("-")[0]
        if peers is None or name not in PEERS:
            continue
        if tool in peers.failures:
            found[name] = peers.failures[tool]
            continue
        try:
            peers.data(tool, photos)
        except ChildError as error:
            found[name] = f"its data set was not written: {error}"
    return found


def race(
    plan: Plan, peers: Peers | None, photos: Photographs, size: int, failures: dict[str, str]
) -> dict[str, list[float]]:
    """Images a second by contestant, one number a round; who fails is out, and `failures` says why."""
    timed = photos.num_samples // BATCH - WARMUP_BATCHES - TAIL_BATCHES
    numbers = (size, BATCH, WORKERS, WARMUP_BATCHES, min(timed, QUICK_BATCHES) if plan.is_quick else timed)
    speeds: dict[str, list[float]] = {name: [] for name in plan.contestants}
    for turn in range(plan.repeats):
        shift = turn % len(plan.contestants)
        for name in plan.contestants[shift:] + plan.contestants[:shift]:
            if name in failures:
                continue
            say(f"{photos.name} px at {size}, round {turn + 1} of {plan.repeats}: {name}")
            try:
                if name in PEERS and peers is not None:
                    answer = peers.call("run", name, peers.data(name.split("-")[0], photos), *numbers)
                else:
                    answer = ours(name, photos.shards, *numbers)
                speeds[name].append(answer["images_per_second"])
            except ChildError as error:
                if name not in PEERS:
                    raise
                failures[name], speeds[name] = str(error), []
    return speeds


def paired_ratio(first: list[float], second: list[float]) -> float | None:
    """Median over rounds of first / second, or None where one of them did not run."""
    if not first or len(first) != len(second):
        return None
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def show_speeds(
    console: Console, photos: Photographs, size: int, names: list[str], speeds: dict[str, list[float]],
    ratios: dict[str, float | None], failures: dict[str, str],
) -> None:  # fmt: skip
    table = Table(title=f"{photos.name} px JPEGs to {size} x {size}, {WORKERS} workers, batch {BATCH}")
    table.add_column("contestant")
    for heading in ("images/s", "lowest", "highest", "ours / it"):
        table.add_column(heading, justify="right")
    for name in names:
        if name in failures:
            table.add_row(name, "-", "-", "-", failures[name])
            continue
        numbers = (statistics.median(speeds[name]), min(speeds[name]), max(speeds[name]))
        ratio = ratios.get(name)
        table.add_row(name, *(f"{number:.0f}" for number in numbers), "-" if ratio is None else f"{ratio:.2f}")
    console.print(table)


def throughput_bars(
    source: str, size: int, names: list[str], speeds: dict[str, list[float]], ratios: dict[str, float | None]
) -> list[Bar]:
    """The bars of one source and size."""
    where = f"{source} px at {size}: ours / "
    bars = []
    if (source, size) in PEER_BARS:
        pil_bar, fastest_bar = PEER_BARS[source, size]
        ran = [name for name in PEERS if speeds.get(name)]
        fastest = max(ran, key=lambda name: statistics.median(speeds[name]), default="")
        label = f"fastest peer ({fastest or 'none ran'})"
        bars += [
            Bar(f"{where}webdataset-pil", ratios.get("webdataset-pil"), pil_bar, is_upper=False),
            Bar(f"{where}{label}", ratios.get(fastest), fastest_bar, is_upper=False),
        ]
    return [*bars, Bar(f"{where}bare", ratios.get("bare"), BARE_BAR, is_upper=False)]


# What a resume costs.


def measure_resume(plan: Plan, console: Console) -> tuple[dict[str, Any], list[Bar]]:
    """Seconds to the first batch from an object store, cold cache: at 90 % of an epoch against a fresh start."""
    photos = photographs_of("640")
    repeats = 5 if plan.is_quick else 15
    seconds: dict[str, list[float]] = {"0.0": [], "0.9": []}
    with EmbeddedS3() as server:
        url = server.make_bucket("photographs")
        say(f"uploading {photos.shards} to {url}")
        for path in sorted(photos.shards.iterdir()):
            storage.upload(path, storage.join(url, path.name))
        for repeat in range(repeats):  # one epoch each: other shards come first
            say(f"first batch from {url}, repeat {repeat + 1} of {repeats}")
            for fraction in sorted(seconds, reverse=bool(repeat % 2)):
                with tempfile.TemporaryDirectory() as cache:
                    answer = ours("first", url, fraction, repeat, 1, MLPL_CACHE_DIR=cache)
                seconds[fraction] += answer[fraction]
    ratio = statistics.median(seconds["0.9"]) / statistics.median(seconds["0.0"])
    show_seconds(console, "First batch from S3, cold cache", {"fresh start": seconds["0.0"], "90 %": seconds["0.9"]})
    what = "first batch from S3, cold cache: at 90 % of an epoch / fresh"
    return {"seconds": seconds, "ratio": ratio}, [Bar(what, ratio, RESUME_BAR, is_upper=True)]


def measure_position(plan: Plan, console: Console) -> tuple[dict[str, Any], list[Bar]]:
    """Seconds to the first batch from local shards at 10, 50 and 90 % of an epoch."""
    seconds = ours("first", photographs_of("640").shards, "0.1,0.5,0.9", 0, 5 if plan.is_quick else 15)
    show_seconds(console, "First batch from local shards, by position in the epoch", seconds)
    medians = [statistics.median(times) for times in seconds.values()]
    spread = max(medians) / min(medians)
    console.print(f"Largest median / smallest: {spread:.2f}")
    return {"seconds": seconds, "largest_over_smallest": spread}, []


def show_seconds(console: Console, title: str, seconds: dict[str, list[float]]) -> None:
    table = Table(title=title)
    table.add_column("position")
    for heading in ("median ms", "lowest", "highest"):
        table.add_column(heading, justify="right")
    for name, times in seconds.items():
        table.add_row(name, *(f"{1000 * value:.0f}" for value in (statistics.median(times), min(times), max(times))))
    console.print(table)


def measure_order(plan: Plan, console: Console) -> tuple[dict[str, Any], list[Bar]]:
    """Time to a first index and memory of the order of an epoch as large as Open Images."""
    repeats = 3 if plan.is_quick else 9
    runs = {fraction: [ours("order", *OPEN_IMAGES, fraction) for _ in range(repeats)] for fraction in (0.0, 0.9)}
    table = Table(title=f"Order of {OPEN_IMAGES[0]:,} samples in {OPEN_IMAGES[1]:,} shards")
    table.add_column("position")
    for heading in ("first index ms", "traced peak MB", "process growth MB"):
        table.add_column(heading, justify="right")
    worst: dict[str, float] = {}
    for fraction, answers in runs.items():
        medians = {name: statistics.median(answer[name] for answer in answers) for name in answers[0]}
        worst = {name: max(value, worst.get(name, 0.0)) for name, value in medians.items()}
        shown = (medians["seconds"] * 1e3, medians["traced_bytes"] / 1e6, medians["resident_bytes"] / 1e6)
        table.add_row(f"{fraction:.0%}", *(f"{value:.1f}" for value in shown))
    console.print(table)
    num_bytes = max(worst["traced_bytes"], worst["resident_bytes"])
    return {"runs": {str(fraction): answers for fraction, answers in runs.items()}}, [
        Bar("order: ms to the first index", worst["seconds"] * 1e3, ORDER_SECONDS_BAR * 1e3, is_upper=True),
        Bar("order: peak MB", num_bytes / 1e6, ORDER_BYTES_BAR / 1e6, is_upper=True),
    ]


MEASUREMENTS: dict[str, Callable[[Plan, Console], tuple[dict[str, Any], list[Bar]]]] = {
    "throughput": measure_throughput,
    "resume": measure_resume,
    "position": measure_position,
    "order": measure_order,
}


def machine() -> dict[str, Any]:
    """Where and when."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--sources", nargs="+", choices=("640", "1024"), default=["640", "1024"])
    parser.add_argument("--sizes", nargs="+", type=int, help="pixels; default 224 448, with --quick 224")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--repeats", type=int, help="rounds of the throughput; default 3, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    given = parser.parse_args()
    plan = Plan(
        sizes=given.sizes or ([224] if given.quick else [224, 448]),
        sources=given.sources,
        contestants=given.contestants,
        repeats=given.repeats or (1 if given.quick else 3),
        is_quick=given.quick,
    )
    os.environ.update(CHILD_ENVIRONMENT)
    console = Console(width=None if sys.stdout.isatty() else 140)
    found: dict[str, Any] = {"machine": machine(), "quick": given.quick}
    bars: list[Bar] = []
    for name in given.only:
        found[name], new = MEASUREMENTS[name](plan, console)
        bars += new
    table = Table("what", "measured", "bar", "", title="Bars")
    for bar in bars:
        table.add_row(*bar.row())
    console.print(table)
    found["bars"] = [dict(zip(("what", "measured", "bar", "verdict"), bar.row(), strict=True)) for bar in bars]
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
