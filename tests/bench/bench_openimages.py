"""Open Images' label files of 1.25, 2.5 and 5 million rows in their true form: rows a second, memory, against csv.

Three in four rows are a machine's, an image has 6.4 verified labels and 18.3 machine labels, and one row in ten is of a
class that is not asked for, about as in V6. Every reading is a process of its own, with a peak of memory of its own.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from shards.sources.image_ids import format_ids
from shards.sources.openimages import OpenImagesSettings, read_openimages

ROOT = Path(__file__).parents[2]
SIZES = (1_250_000, 2_500_000, 5_000_000)
ROUNDS = 5
NUM_CLASSES, NUM_OTHER_CLASSES = 9_605, 10_389
ROWS_PER_IMAGE, HUMAN_SHARE, CROWD_SHARE, PRESENT_SHARE = 24.7, 0.26, 0.05, 0.35
URL = "https://farm3.staticflickr.com/5310/5898076654_51085e157c_o.jpg"

OURS, SHUFFLED, PLAIN = "ours", "ours, rows shuffled", "csv and dict"


def write_files(folder: Path, num_rows: int) -> None:
    """Class list, image list and label files, labels once by image and once in no order."""
    random = np.random.default_rng(num_rows)
    mids = np.array([f"/m/0{number:05x}" for number in range(NUM_CLASSES + NUM_OTHER_CLASSES)])
    random.shuffle(mids)
    (folder / "classes.txt").write_text("".join(f"{mid}\n" for mid in sorted(mids[:NUM_CLASSES])))
    num_images = round(num_rows / ROWS_PER_IMAGE)
    ids = np.unique(random.integers(0, 1 << 63, num_images, dtype=np.uint64) * 2 + 1)
    write_images(folder / "images.csv", random.permutation(ids))
    num_human = round(num_rows * HUMAN_SHARE)
    for name, count in (("human", num_human), ("machine", num_rows - num_human)):
        rows = np.sort(random.integers(0, len(ids), count))
        is_other = random.random(count) < 0.1
        by_frequency = (NUM_CLASSES * random.random(count) ** 3).astype(np.int64)  # few classes have most labels
        other = NUM_CLASSES + random.integers(0, NUM_OTHER_CLASSES, count)
        columns = {
            "ImageID": format_ids(ids[rows]),
            "Source": pa.array(["machine"] * count),
            "LabelName": pa.array(mids[np.where(is_other, other, by_frequency)]),
            "Confidence": pa.array(np.char.mod("%.1f", random.integers(5, 11, count) / 10)),
        }
        if name == "human":
            sources = np.array(["verification", "crowdsource-verification"])
            columns["Source"] = pa.array(sources[(random.random(count) < CROWD_SHARE).astype(np.int64)])
            columns["Confidence"] = pa.array((random.random(count) < PRESENT_SHARE).astype(np.int8))
        table = pa.table(columns)
        write_csv(table, folder / f"{name}.csv")
        write_csv(table.take(pa.array(random.permutation(count))), folder / f"{name}-shuffled.csv")


def write_images(path: Path, ids: np.ndarray) -> None:
    """An image list with all its columns."""
    same = {
        "Subset": "train", "OriginalURL": URL, "OriginalLandingURL": URL, "License": URL, "AuthorProfileURL": URL,
        "Author": "Michael Beat", "Title": "...die FNF-Kerze", "OriginalSize": "4405052",
        "OriginalMD5": "KFukvivpCM5QXl5SqKe41g==", "Thumbnail300KURL": URL, "Rotation": "0.0",
    }  # fmt: skip
    write_csv(pa.table({"ImageID": format_ids(ids), **{k: pa.array([v] * len(ids)) for k, v in same.items()}}), path)


def write_csv(table: pa.Table, path: Path) -> None:
    """As published: no quotes, not around the header either."""
    with open(path, "wb") as stream:
        stream.write((",".join(table.column_names) + "\n").encode())
        options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="none")
        pyarrow.csv.write_csv(table, stream, options)


def read_ours(folder: Path, ending: str) -> int:
    """Rows read by the source."""
    source = read_openimages(
        OpenImagesSettings(
            images=str(folder),
            classes=str(folder / "classes.txt"),
            human=(str(folder / f"human{ending}.csv"),),
            machine=(str(folder / f"machine{ending}.csv"),),
            image_lists=(str(folder / "images.csv"),),
        )
    )
    rows = source.arguments["rows"]
    return int(rows["human"] + rows["machine"])


def read_plainly(folder: Path) -> int:
    """Rows read by the csv module into a dict of lists by image, with no rule for anything."""
    classes = {mid: column for column, mid in enumerate((folder / "classes.txt").read_text().split())}
    with open(folder / "images.csv", newline="") as stream:
        labels: dict[str, list[tuple[int, str]]] = {row[0]: [] for row in csv.reader(stream)}
    num_rows = 0
    for name in ("human", "machine"):
        with open(folder / f"{name}.csv", newline="") as stream:
            rows = csv.reader(stream)
            next(rows)
            for image, _, mid, confidence in rows:
                num_rows += 1
                if mid in classes:
                    labels[image].append((classes[mid], confidence))
    for listed in labels.values():
        listed.sort()
    return num_rows


def measured(contestant: str, folder: Path) -> dict[str, float]:
    """Seconds and peak memory of one reading, in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.bench_openimages", contestant, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def read_once(contestant: str, folder: Path) -> None:
    """Print what a reading took."""
    pa.array(np.zeros(1))  # pyarrow loads pandas here, where there is one: 0.2 s whatever the rows
    before = peak_mebibytes()
    began, began_work = time.perf_counter(), time.process_time()
    if contestant == PLAIN:
        num_rows = read_plainly(folder)
    else:
        num_rows = read_ours(folder, "-shuffled" if contestant == SHUFFLED else "")
    wall, work = time.perf_counter() - began, time.process_time() - began_work
    peak = peak_mebibytes()
    print(json.dumps({"rows": num_rows, "wall": wall, "work": work, "before": before, "peak": peak}))


def peak_mebibytes() -> float:
    """Most memory that this process has held; getrusage would count its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def main() -> None:
    names = ("rows", "seconds", "processor s", "million rows/s", "best", "MiB at start", "MiB at peak")
    print(f"{'':22}" + "".join(f"{name:>15}" for name in names))
    for size in SIZES:
        with tempfile.TemporaryDirectory() as name:
            write_files(Path(name), size)
            contestants = (OURS, SHUFFLED, PLAIN) if size == SIZES[0] else (OURS, SHUFFLED)
            rounds = [{who: measured(who, Path(name)) for who in contestants} for _ in range(ROUNDS)]
        for who in contestants:
            wall, work, peak = (
                statistics.median(taken[who][key] for taken in rounds) for key in ("wall", "work", "peak")
            )
            best = min(taken[who]["wall"] for taken in rounds)
            rates = (size / wall / 1e6, size / best / 1e6)
            numbers = (f"{size:,}", f"{wall:.2f}", f"{work:.2f}", f"{rates[0]:.2f}", f"{rates[1]:.2f}")
            memory = (f"{rounds[0][who]['before']:.0f}", f"{peak:.0f}")
            print(f"{who:22}" + "".join(f"{text:>15}" for text in (*numbers, *memory)))
        if PLAIN in contestants:
            ratio = statistics.median(taken[PLAIN]["wall"] / taken[OURS]["wall"] for taken in rounds)
            print(f"{'csv and dict / ours':22}{ratio:>30.1f}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        read_once(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
