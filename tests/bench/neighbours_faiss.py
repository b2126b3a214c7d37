"""Exact search as users of faiss write it. Runs alone under the peer's interpreter, without dist_mlpl.

python neighbours_faiss.py version                                    as JSON
python neighbours_faiss.py run ROWS QUERIES K THREADS REPEATS OUT     seconds of each repeat, as JSON; indices in OUT

ROWS and QUERIES are .npy files of float32 unit vectors. The last line on standard output is the answer.
"""

from __future__ import annotations

import json
import sys
import time

import faiss
import numpy as np


def run(rows: str, queries: str, k: int, threads: int, repeats: int, out: str) -> list[float]:
    """Seconds of each search; rows are added before."""
    faiss.omp_set_num_threads(threads)
    vectors, asked = np.load(rows), np.load(queries)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    index.search(asked[:64], k)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        _, found = index.search(asked, k)
        seconds.append(time.perf_counter() - began)
    np.save(out, found)
    return seconds


if __name__ == "__main__":
    verb, *arguments = sys.argv[1:]
    if verb == "version":
        print(json.dumps(faiss.__version__))
    else:
        rows, queries, k, threads, repeats, out = arguments
        print(json.dumps(run(rows, queries, int(k), int(threads), int(repeats), out)))
