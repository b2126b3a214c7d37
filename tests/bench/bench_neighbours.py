"""Exact search for similar images over two ranks, held against faiss's flat search on the same cores, and its recall.

python -m tests.bench.bench_neighbours [--quick] [--queries N] [--rounds N] [--json PATH]

Rows are float32 unit vectors, half of them in clusters of near ones. Ours runs on two processes of one thread, each
with half of the rows and half of the queries; faiss in one process of two threads. They take turns; a ratio is the
median over the rounds. faiss lives in an environment of its own, made once, in BENCH_DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_mlpl import comm
from dist_mlpl.banks.neighbours import Neighbours, unit_vectors
from tests.bench.stream_sources import ROOT, bench_folder, call
from tests.support.ranks import run_ranks

FAISS = "faiss-cpu==1.15.1"
WIDTH, K, NUM_RANKS, NUM_CHECKED = 256, 100, 2, 64
SPEED_BAR, RECALL_BAR = 0.5, 1.0
_HALF_HOUR = 1800.0


def write_vectors(folder: Path, num_rows: int, num_queries: int) -> tuple[str, str]:
    """Unit vectors, and queries that are near some of them, as .npy files."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num_rows, WIDTH, generator=generator)
    centres = torch.randn(1000, WIDTH, generator=generator)
    half = num_rows // 2
    rows[:half] = 0.5 * rows[:half] + centres[torch.randint(0, 1000, (half,), generator=generator)]
    places = torch.randint(0, num_rows, (num_queries,), generator=generator)
    queries = rows[places] + 0.3 * torch.randn(num_queries, WIDTH, generator=generator)
    paths = folder / "rows.npy", folder / "queries.npy"
    for path, vectors in zip(paths, (rows, queries), strict=True):
        np.save(path, unit_vectors(vectors).numpy())
    return str(paths[0]), str(paths[1])


def search(rank: int, world_size: int, rows: str, queries: str, repeats: int) -> tuple[list[float], Any]:
    """Seconds of each search, and on every rank the indices of all queries, in order."""
    vectors, asked = np.load(rows, mmap_mode="r"), np.load(queries)
    bank = Neighbours("bench", len(vectors), WIDTH)
    own = np.array_split(np.arange(len(vectors)), world_size)[rank]
    bank.write(
        torch.from_numpy(own),
        {"rows": torch.from_numpy(vectors[own]), "stamps": torch.ones(len(own), dtype=torch.int32)},
    )
    mine = torch.from_numpy(np.array_split(asked, world_size)[rank])
    bank.search(mine[:32], K)
    seconds = []
    for _ in range(repeats):
        comm.gather_objects(None)
        began = time.perf_counter()
        _, found = bank.search(mine, K)
        comm.gather_objects(None)
        seconds.append(time.perf_counter() - began)
    return seconds, comm.gather_rows(found).numpy()


def peer() -> Path:
    """The interpreter that has faiss.

    Raises:
        CalledProcessError: it cannot be installed.
    """
    folder = bench_folder() / "faiss"
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing {FAISS} into {folder}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", FAISS]
        subprocess.run(pip, check=True)
    return python


def brute_force(rows: str, queries: str) -> np.ndarray:
    """Indices of the nearest of the first queries, by cosines in float64, (NUM_CHECKED, K)."""
    vectors, asked = np.load(rows, mmap_mode="r"), np.load(queries)[:NUM_CHECKED].astype(np.float64)
    scores = np.concatenate(
        [asked @ vectors[first : first + 65536].astype(np.float64).T for first in range(0, len(vectors), 65536)], axis=1
    )
    return np.argsort(-scores.astype(np.float32), axis=1, kind="stable")[:, :K]


def recall(found: np.ndarray, expected: np.ndarray) -> float:
    """Share of the expected that were found."""
    pairs = zip(found[: len(expected)], expected, strict=True)
    return sum(len(np.intersect1d(*pair)) for pair in pairs) / expected.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="100,000 rows")
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    num_rows, num_queries = 100_000 if arguments.quick else 1_000_000, arguments.queries
    script = [str(peer()), str(ROOT / "tests" / "bench" / "neighbours_faiss.py")]
    version = call([*script, "version"])
    with tempfile.TemporaryDirectory() as name:
        rows, queries = write_vectors(Path(name), num_rows, num_queries)
        expected = brute_force(rows, queries)
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(arguments.rounds):
            threads = {"OMP_NUM_THREADS": str(NUM_RANKS)}
            theirs += call(
                [*script, "run", rows, queries, str(K), str(NUM_RANKS), "1", f"{name}/theirs.npy"], **threads
            )
            results = run_ranks(search, NUM_RANKS, rows, queries, 1, timeout_seconds=_HALF_HOUR)
            ours.append(max(seconds[0] for seconds, _ in results))
        found, peer_found = results[0][1], np.load(f"{name}/theirs.npy")
    speed = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    own_recall, peer_recall = recall(found, expected), recall(peer_found, expected)
    is_ordered = bool((found[:NUM_CHECKED] == expected).all())
    print(f"{num_rows:,} x {WIDTH}, k = {K}, {num_queries:,} queries, {NUM_RANKS} cores, faiss {version}")
    print(f"ours    {num_queries / statistics.median(ours):9.1f} queries/s   recall {own_recall:.6f}")
    print(f"faiss   {num_queries / statistics.median(theirs):9.1f} queries/s   recall {peer_recall:.6f}")
    print(f"speed / faiss's {speed:.3f} (bar {SPEED_BAR}): {'met' if speed >= SPEED_BAR else 'not met'}")
    print(f"recall {own_recall:.6f} (bar {RECALL_BAR}): {'met' if own_recall >= RECALL_BAR else 'not met'}, "
          f"in the same order: {is_ordered}")  # fmt: skip
    if arguments.json:
        record = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.platform(),
            "num_cores": os.cpu_count(), "load": os.getloadavg(), "torch": torch.__version__, "faiss": version,
            "num_rows": num_rows, "num_queries": num_queries, "ours_seconds": ours, "faiss_seconds": theirs,
            "speed": speed, "recall": own_recall, "faiss_recall": peer_recall,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
