"""Claims about checkpoints on several ranks: what stops one rank stops all, by the same error."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dist_mlpl import comm
from dist_mlpl.batch import Progress, RunLength
from dist_mlpl.chain import RunIdentity, commit_url
from dist_mlpl.checkpoint import Checkpoint, begin_attempt
from dist_mlpl.data.delivery import Consumed
from dist_mlpl.errors import MlplError, RankMismatchError
from dist_mlpl.run import check_same_data
from tests.support.ranks import run_ranks
from tests.support.training import make_engine, train

pytestmark = pytest.mark.distributed

GLOBAL_BATCH = 16


def stopped_by(rank: int, world_size: int, out: str, fault: str, verb: str) -> str:
    """The error of a save, or of asking for the head, of which rank 0 or the last rank alone can see what is wrong."""
    attempt = begin_attempt(out, "config")
    engine = make_engine("plain", global_batch=GLOBAL_BATCH)
    train(engine, 1)
    positions = np.arange(rank, GLOBAL_BATCH, world_size)
    if fault == "positions" and rank == world_size - 1:
        positions[0] += 1
    stream: Any = SimpleNamespace(take_consumed=lambda: Consumed([positions], [positions], []))
    saved = Checkpoint(
        out, engine, stream,
        identity=RunIdentity(global_batch=GLOBAL_BATCH, num_lanes=1, window_samples=1, group_size=4, digests={}),
        attempt=attempt, length=RunLength(1, 10 * GLOBAL_BATCH), keep_checkpoints=1,
    )  # fmt: skip
    saved.restore()
    if rank == 0 and "attempt" in fault:
        has_taken_over = fault == "attempt"
        Path(out, "attempts", "0002.json").write_text(json.dumps({"has_taken_over": has_taken_over}))
    if rank == 0 and fault == "commit":
        Path(commit_url(out, 1)).parent.mkdir(exist_ok=True)
        Path(commit_url(out, 1)).write_text("not a record")
    comm.gather_objects(None)  # the fault is there before anyone saves
    try:
        if verb == "head":
            saved.newest_head()
        else:
            saved.save(Progress(samples_consumed=GLOBAL_BATCH, step=1))
    except MlplError as error:
        return type(error).__name__
    return "saved"  # or its own head stands


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("none", "saved"),
        ("attempt that has not taken over", "saved"),
        ("attempt", "OvertakenError"),
        ("commit", "CheckpointError"),
        ("positions", "RankMismatchError"),
    ],
)
def test_what_stops_a_save_on_one_rank_stops_it_on_all(fault: str, expected: str, tmp_path: Path) -> None:
    assert run_ranks(stopped_by, 3, str(tmp_path), fault, "save") == [expected] * 3


@pytest.mark.parametrize(("fault", "expected"), [("none", "saved"), ("attempt", "OvertakenError")])
def test_no_rank_takes_a_newer_attempts_head_for_its_own(fault: str, expected: str, tmp_path: Path) -> None:
    assert run_ranks(stopped_by, 2, str(tmp_path), fault, "head") == [expected] * 2


def told_of_the_data(rank: int, world_size: int, digests: list[str]) -> str:
    try:
        check_same_data(digests[rank])
    except RankMismatchError as error:
        return error.found
    return "same"


@pytest.mark.parametrize(
    ("digests", "expected"),
    [(["a" * 64, "a" * 64], "same"), (["a" * 64, "b" * 64], f"manifests of {'a' * 16}, {'b' * 16}")],
)
def test_ranks_that_read_different_manifests_are_refused_on_all_of_them(digests: list[str], expected: str) -> None:
    assert run_ranks(told_of_the_data, 2, digests) == [expected] * 2
