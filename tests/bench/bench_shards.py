"""Packing against `tar cf` and against webdataset's ShardWriter, on the same photographs in one run.

python -m tests.bench.bench_shards [--gigabytes 2] [--rounds 5] [--workers 2] [--folder DIR] [--profile] [--json PATH]

Real JPEGs (coco256, repeated under names of their own) lie in the page cache. All three write to the same disk and take
turns; a ratio is the median over the rounds of the ratio within a round. Ours looks at every image's header and end
marker, computes digests and checksums, and writes indexes and the manifest; starting worker processes is not counted.
None of the three waits for the disk, as `tar` never does; what our waiting (an `fsync` of every shard, once, before
the manifest) takes is measured apart, beside an `fsync` of tar's output.

On a machine that does other work, two processes of ours get less than twice the time that one of tar's gets. So CPU
seconds are measured, too: theirs, over ours divided by the workers, is the ratio on idle cores that share nothing.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import platform
import pstats
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from dist_mlpl.data.manifest import ClassEntry
from shards.build import build
from shards.sources.base import Record, Records, Source

TAR_BAR, WEBDATASET_BAR = 0.7, 1.5
CLASSES = tuple(ClassEntry(id=f"/m/{number:05x}", name=f"class {number}") for number in range(80))


@dataclass(frozen=True)
class Photographs:
    """Images on disk, and what is said about them."""

    folder: Path
    source: Source
    num_bytes: int


def photographs(folder: Path, num_bytes: int) -> Photographs:
    """Repeat the photographs until there are so many bytes."""
    data = Path(os.environ.get("MLPL_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "coco256" / "images"
    contents = [path.read_bytes() for path in sorted(data.glob("*.jpg"))]
    (folder / "images").mkdir(parents=True)
    random, records, total = np.random.default_rng(0), [], 0
    while total < num_bytes:
        name, content = f"{len(records):012d}.jpg", contents[len(records) % len(contents)]
        (folder / "images" / name).write_bytes(content)
        classes = np.sort(random.permutation(len(CLASSES))[:7]).tolist()  # as many labels as Open Images V6 has
        positives, negatives = tuple(classes[:2]), tuple(classes[2:])
        records.append(Record(name, "train", positives, negatives, len(records)))
        total += len(content)
    source = Source("bench", str(folder / "images"), CLASSES, "unknown", {}, Records.of(records))
    return Photographs(folder, source, total)


class Seconds(NamedTuple):
    """What one run took."""

    packed: float  # until all was written, on the wall clock
    on_disk: float  # until the disk held it
    cpu: float  # of all processes that worked for it


def cpu_seconds(who: int) -> float:
    """User and system time."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def timed(task: Callable[..., Any], *call: Any) -> tuple[Any, float]:
    """A task's result, and what CPU time it took."""
    began = cpu_seconds(resource.RUSAGE_SELF)
    return task(*call), cpu_seconds(resource.RUSAGE_SELF) - began


def pack_ours(photos: Photographs, out: Path, pool: ProcessPoolExecutor) -> Seconds:
    """Our build, on processes that have started."""
    packed_at = cpu = 0.0

    def tell(doing: str, done: int, total: int, num_bytes: int = 0) -> None:
        nonlocal packed_at
        if doing == "packing" and done == total:
            packed_at = time.perf_counter()

    def mapper(task: Callable[..., Any], calls: Iterable[tuple[Any, ...]], /) -> Iterator[tuple[int, Any]]:
        nonlocal cpu
        for number, (result, seconds) in enumerate(pool.map(partial(timed, task), *zip(*calls, strict=True))):
            cpu += seconds
            yield number, result

    began, here = time.perf_counter(), time.process_time()
    build(photos.source, str(out), decode=False, mapper=mapper, on_progress=tell)
    ended = time.perf_counter()
    return Seconds(packed_at - began, ended - began, cpu + time.process_time() - here)


def pack_tar(photos: Photographs, out: Path) -> Seconds:
    """GNU tar."""
    out.mkdir()
    began, cpu = time.perf_counter(), cpu_seconds(resource.RUSAGE_CHILDREN)
    subprocess.run(["tar", "cf", str(out / "all.tar"), "-C", str(photos.folder), "images"], check=True)
    packed = time.perf_counter()
    with open(out / "all.tar", "rb") as file:
        os.fsync(file.fileno())
    cpu = cpu_seconds(resource.RUSAGE_CHILDREN) - cpu
    return Seconds(packed - began, time.perf_counter() - began, cpu)


def pack_webdataset(photos: Photographs, out: Path) -> Seconds:
    """The loop that webdataset's documentation shows."""
    import webdataset as wds  # here, for it brings torch, which our workers do without

    out.mkdir()
    ids = [entry.id for entry in CLASSES]
    began, cpu = time.perf_counter(), time.process_time()
    with wds.ShardWriter(str(out / "train-%06d.tar"), maxcount=10**9, maxsize=256 << 20, verbose=0) as sink:
        for row in range(len(photos.source.records)):
            record = photos.source.records.row(row)
            with open(f"{photos.source.images}/{record.image}", "rb") as file:
                content = file.read()
            labels = {"positives": [ids[c] for c in record.positives], "negatives": [ids[c] for c in record.negatives]}
            sink.write({"__key__": record.key, "jpg": content, "json": labels})
    packed = time.perf_counter() - began
    return Seconds(packed, packed, time.process_time() - cpu)


def profile_ours(photos: Photographs, out: Path, say: Console) -> None:
    """Where the time of one process goes."""
    profile = cProfile.Profile()
    profile.enable()
    build(photos.source, str(out), decode=False, workers=1)
    profile.disable()
    with open(os.devnull, "w") as nowhere:
        stats = pstats.Stats(profile, stream=nowhere).stats  # type: ignore[attr-defined]
    table = Table("function", "seconds", "calls")
    for (file, _, name), (_, calls, own, _, _) in sorted(stats.items(), key=lambda row: -row[1][2])[:16]:
        table.add_row(f"{Path(file).name}:{name}", f"{own:.2f}", f"{calls:,}")
    say.print(table)


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", help="where the files go, for as long as it runs; the system's temporary folder")
    parser.add_argument("--profile", action="store_true", help="profile one process instead")
    parser.add_argument("--json")
    asked = parser.parse_args()
    say = Console()
    with tempfile.TemporaryDirectory(prefix="mlpl-bench-", dir=asked.folder) as folder:
        photos = photographs(Path(folder), int(asked.gigabytes * 1e9))
        say.print(f"{len(photos.source.records):,} photographs, {photos.num_bytes / 1e9:.2f} GB", highlight=False)
        if asked.profile:
            profile_ours(photos, Path(folder, "out"), say)
            return
        rounds = measure(photos, asked.rounds, asked.workers, say)
    report(rounds, photos, asked.workers, asked.json, say)


def measure(photos: Photographs, num_rounds: int, workers: int, say: Console) -> list[dict[str, Seconds]]:
    """What each contestant took, for each round; the first round warms up and is dropped."""
    rounds = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        contestants = {
            "ours": partial(pack_ours, pool=pool),
            "tar cf": pack_tar,
            "webdataset": pack_webdataset,
        }
        for number in range(num_rounds + 1):
            seconds: dict[str, Seconds] = {}
            for name in [*contestants][number % 3 :] + [*contestants][: number % 3]:  # nobody is always first
                os.sync()  # what others wrote does not count for this one
                out = photos.folder / "out"
                seconds[name] = contestants[name](photos, out)
                shutil.rmtree(out)
            rounds.append(seconds)
            told = ", ".join(f"{name} {seconds[name].packed:.2f} s" for name in contestants)
            say.print(f"round {number}: {told}; load {os.getloadavg()[0]:.1f}", highlight=False, soft_wrap=True)
    return rounds[1:]


def report(rounds: list[dict[str, Seconds]], photos: Photographs, workers: int, path: str | None, say: Console) -> None:
    """A table of rates and ratios."""

    def median(of: Callable[[dict[str, Seconds]], float]) -> float:
        return statistics.median(of(seconds) for seconds in rounds)

    table = Table("contestant", "MB/s", "images/s", "MB/s, on disk", "CPU s / GB")
    gigabytes, num_images = photos.num_bytes / 1e9, len(photos.source.records)
    for name in rounds[0]:
        packed, on_disk, cpu = (median(lambda s, name=name, at=at: s[name][at]) for at in range(3))  # type: ignore[misc]
        table.add_row(
            name, f"{1e3 * gigabytes / packed:,.0f}", f"{num_images / packed:,.0f}",
            "" if name == "webdataset" else f"{1e3 * gigabytes / on_disk:,.0f}", f"{cpu / gigabytes:.2f}",
        )  # fmt: skip
    say.print(table)
    bars = {
        "ours / tar cf": (median(lambda s: s["tar cf"].packed / s["ours"].packed), TAR_BAR),
        "ours / tar cf, both on disk": (median(lambda s: s["tar cf"].on_disk / s["ours"].on_disk), TAR_BAR),
        "ours / tar cf, by CPU time": (median(lambda s: s["tar cf"].cpu / s["ours"].cpu * workers), TAR_BAR),
        "ours / webdataset": (median(lambda s: s["webdataset"].packed / s["ours"].packed), WEBDATASET_BAR),
        "ours / webdataset, by CPU time": (
            median(lambda s: s["webdataset"].cpu / s["ours"].cpu * workers), WEBDATASET_BAR
        ),
    }  # fmt: skip
    for what, (value, bar) in bars.items():
        say.print(f"{what}: {value:.2f} (asked for: {bar}; {'met' if value >= bar else 'NOT met'})", highlight=False)
    if path:
        document = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "load": os.getloadavg(),
            "workers": workers,
            "gigabytes": gigabytes,
            "ratios": {what: value for what, (value, _) in bars.items()},
            "rounds": [{name: took._asdict() for name, took in seconds.items()} for seconds in rounds],
        }
        Path(path).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
