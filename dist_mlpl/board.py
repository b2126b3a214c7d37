"""Owns communication between workers on Ray and the driver, which shows and stops them."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.train import TrainingFailedError, UserCallback
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dist_mlpl import comm
from dist_mlpl.errors import MlplError, RunError
from dist_mlpl.progress import Action, Row

_MOST_FRUITLESS = 10  # groups of workers in a row that may be lost without anything saved
_CLOSE_SECONDS = 5.0  # longest wait for the last rows to arrive
_PUSH_SECONDS = 0.3  # shortest time between two pushes of step rows


class Board:
    """An actor between workers and the driver: rows go one way, stop requests the other.

    Ray's trainer runs in it too, concurrently with the other calls: only the owner of Ray's controller can end it, so
    killing this actor ends the trainer and the workers. From a thread of the driver it could not be ended at all.
    """

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._action = Action.GO_ON
        self._fatal: MlplError | None = None
        self._is_running = False
        self._num_fruitless = 0  # groups of workers that ended in an error since the last commit

    @ray.method(concurrency_group="fit")
    def fit(self, trainer: TorchTrainer) -> Exception | None:
        """Run workers until they end; returns Ray's error if it gave up on them, else None."""
        try:
            trainer.fit()
        except TrainingFailedError as error:
            return error
        return None

    def push(self, rows: list[Row]) -> Action:
        """Rank 0: add rows, and return the action that the driver wants."""
        self._rows.extend(rows)
        if any(row["event"] in ("commit", "scoring") for row in rows):
            self._num_fruitless = 0
        return self._action

    def open(self) -> MlplError | None:
        """A worker: note that workers run, and return the error that would only repeat, if there is one."""
        self._is_running = True
        return self._fatal

    def lose(self) -> None:
        """Note that a group of workers has ended in an error; Ray may start another when it finds room for one."""
        self._is_running = False
        self._num_fruitless += 1
        if self._num_fruitless >= _MOST_FRUITLESS:  # with cluster.max_failures -1 Ray would go on for ever
            self.give_up(
                RunError(
                    f"{self._num_fruitless} groups of workers in a row ended in an error before they saved anything",
                    expected="a commit now and then",
                    where="the workers",
                    next_step="read the last notes and RUN/logs; if nodes are lost faster than the run commits, lower "
                    "save_every_steps; then start again, it resumes",
                )
            )

    def take(self) -> tuple[list[Row], bool]:
        """The driver: take the rows, and return whether workers are running."""
        rows, self._rows = self._rows, []
        return rows, self._is_running

    def ask_stop(self) -> None:
        """The driver: ask the workers to commit and stop."""
        self._action = Action.STOP

    def give_up(self, error: MlplError) -> None:
        """A worker: report an error that a restart would only repeat; the first one is kept."""
        self._fatal = self._fatal or error

    def fatal(self) -> MlplError | None:
        """The error reported to `give_up`, or None."""
        return self._fatal


def make_board() -> Any:
    """Start the actor, on the driver's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, concurrency_groups={"fit": 1}, scheduling_strategy=here)(Board)
    return actor.remote()


class BoardSink:
    """A sink that pushes rank 0's rows to the board; it never waits for it."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._rows: list[Row] = []
        self._answer: Any = None
        self._pushed = 0.0
        self.action = Action.GO_ON

    def row(self, row: Row) -> None:
        self._rows.append(row)
        if row["event"] != "step" or time.monotonic() - self._pushed > _PUSH_SECONDS:
            self._push()

    def ask(self) -> Action:
        """The action that the driver wanted at the last answer, at most a moment ago."""
        self._listen()
        if self._answer is None and comm.rank() == 0 and time.monotonic() - self._pushed > _PUSH_SECONDS:
            self._push()  # otherwise a stop would go unnoticed while there are no rows
        return self.action

    def _listen(self) -> None:
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self.action = max(self.action, Action(ray.get(self._answer)))
            self._answer = None

    def _push(self) -> None:
        self._listen()  # read the answer to the last push before the next one replaces it
        self._answer = self._board.push.remote(self._rows)
        self._rows, self._pushed = [], time.monotonic()

    def flush(self) -> None:
        self._push()

    def close(self) -> None:
        self._push()
        ray.wait([self._answer], timeout=_CLOSE_SECONDS)  # rows of a process that ends at once would be lost


class LostWorkers(UserCallback):
    """Tells the board, from Ray's own process, that a group of workers has ended in an error.

    Args:
        board: the actor.
    """

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray; see `ray.train.UserCallback`."""
        ray.get(self._board.lose.remote())
