"""Claims about jobs that share a run folder: which errors a restarted group of workers could get past."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_mlpl.checkpoint import begin_attempt, newest_job, take_over
from dist_mlpl.errors import ConfigError, OvertakenError, StorageError

pytestmark = pytest.mark.integration


def fault(kind: type[OvertakenError | StorageError | ConfigError]) -> Exception:
    return kind("found", expected="expected", where="where", next_step="do")


def test_a_job_gives_way_to_another_one_but_not_to_its_own_older_workers(tmp_path: Path) -> None:
    from dist_mlpl.cluster import is_final  # imports Ray

    run = str(tmp_path)

    def start(job: str | None) -> None:
        take_over(run, begin_attempt(run, "config", job=job))

    start("this")
    start("this")  # the group of workers, started again
    begin_attempt(run, "config", job="one that fails before it takes over")
    assert newest_job(run) == "this"
    assert not is_final(fault(OvertakenError), run, "this")
    start(None)  # --local, by hand
    assert newest_job(run) is None
    assert is_final(fault(OvertakenError), run, "this")
    start("other")
    assert is_final(fault(OvertakenError), run, "this")
    assert not is_final(fault(OvertakenError), run, None), "a round of labels: the faster job commits it"


def test_a_restart_may_help_against_storage_and_lost_peers_alone(tmp_path: Path) -> None:
    from dist_mlpl.cluster import is_final  # imports Ray

    assert is_final(fault(ConfigError), str(tmp_path), "this")
    assert not is_final(fault(StorageError), str(tmp_path), "this")
    assert not is_final(RuntimeError("connection closed by peer"), str(tmp_path), "this")
