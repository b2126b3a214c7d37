"""Claims about jobs that share a run folder: which errors a restarted group of workers could get past."""

from __future__ import annotations

import errno
import pickle
import tempfile
from pathlib import Path

import pytest
from botocore.exceptions import NoCredentialsError

from dist_mlpl.checkpoint import begin_attempt, newest_job, take_over
from dist_mlpl.errors import ConfigError, OvertakenError, RunError, StorageError
from dist_mlpl.retry import failure

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


@pytest.mark.parametrize(
    ("fault", "is_lasting"),
    [
        (PermissionError("no"), True),
        (OSError(errno.ENOSPC, "full"), False),
        (ConnectionResetError("cut"), False),
        (TypeError("unexpected keyword argument 'regoin_name'"), True),
        (NoCredentialsError(), False),
    ],
)
def test_what_a_store_would_answer_again_is_not_asked_again(fault: Exception, is_lasting: bool, tmp_path: Path) -> None:
    from dist_mlpl.cluster import is_final  # imports Ray

    error = failure(fault, url="s3://bucket/x", doing="reading", tries=1, waited=0.0)
    assert is_final(error, str(tmp_path), "this") == is_lasting
    assert is_final(pickle.loads(pickle.dumps(error)), str(tmp_path), "this") == is_lasting


def test_groups_of_workers_that_save_nothing_are_given_up_in_the_end() -> None:
    from dist_mlpl.board import Board  # imports Ray

    board = Board()
    for _ in range(2):
        for _ in range(9):
            assert board.open() is None
            board.push([{"event": "start"}, {"event": "step"}])
            board.lose()
        assert board.fatal() is None
        board.push([{"event": "commit"}])  # nodes are lost often, but the run gets on
    for _ in range(10):
        board.lose()
    error = board.open()
    assert isinstance(error, RunError)
    assert "10 groups of workers" in str(error)


def test_a_long_temporary_folder_is_not_where_a_local_cluster_puts_its_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_mlpl.cluster import _socket_folder  # imports Ray

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "local_scratch_slurm_job_1234567"))
    folder = Path(_socket_folder())
    session = "session_2026-11-30_12-26-55_123456_4194304/sockets/plasma_store"
    assert len(str(folder / session)) <= 107
    folder.rmdir()
