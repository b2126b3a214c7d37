"""A sweep makes what is missing and nothing else, whatever ended it before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_mlpl.chain import read_head
from dist_mlpl.data.held_out import HELD_OUT, hold_out
from dist_mlpl.data.manifest import load_manifest
from dist_mlpl.errors import ConfigError, RunError
from dist_mlpl.tools.audit import audit
from dist_mlpl.tools.sweep import PlannedRun, plan_sweep
from dist_mlpl.tools.sweep_queue import Outcome, check_outcome, make_sweep
from tests.support.held_out import possible_fraction
from tests.support.runs import run, run_until, tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_shards(tmp_path_factory.mktemp("shards"), num_train=64, num_test=24)


def write_configs(folder: Path, shards: str, *methods: str, **sections: object) -> list[str]:
    """A config for each way of counting unknown labels."""
    folder.mkdir(exist_ok=True)
    return [
        write_config(
            folder / f"{method}.yaml",
            tiny_config(shards, method={"normalization": method}, save_every_steps=1, **sections),
        )
        for method in methods
    ]


def some_run_has_committed(out: Path) -> Callable[[], bool]:
    return lambda: any(out.glob("*/commits/*.json"))


def make(runs: list[PlannedRun], *, is_asked: Callable[[], bool] = lambda: False) -> Outcome:
    """Make a sweep from this process; what it says goes nowhere."""
    out = str(Path(runs[0].folder).parent)
    return make_sweep(
        runs, out=out, num_jobs=2, baseline=None, is_asked=is_asked, tell=lambda *_: None, say=lambda _: None
    )


def num_attempts(out: Path) -> dict[str, int]:
    return {folder.parent.name: len(list(folder.iterdir())) for folder in out.glob("*/attempts")}


def test_a_sweep_killed_in_the_middle_finishes_what_is_missing_and_makes_no_run_twice(
    tmp_path: Path, shards: str
) -> None:
    (config,) = write_configs(tmp_path / "configs", shards, "masked_mean")
    out = tmp_path / "sweep"
    command = ["sweep", config, "--out", str(out), "--known", "0.3", "single", "--json"]
    run_until(some_run_has_committed(out), *command)
    assert not (out / "table.csv").exists()

    table = json.loads(run(*command).stdout)
    assert [(row["known"], row["num_seeds"]) for row in table["rows"]] == [("0.3", 1), ("single", 1)]
    assert table["failed"] == []
    names = {"masked_mean-0.3-0", "masked_mean-single-0"}
    before = num_attempts(out)
    assert set(before) == names
    assert sorted(before.values()) in ([1, 1], [1, 2])  # none but the run that was killed began twice
    for name in names:
        proof = audit(str(out / name))
        assert proof.faults == []
        assert proof.head.epoch == 2
    assert len((out / "results.csv").read_text().splitlines()) == 3

    again = make(plan_sweep([config], out=str(out), known=["0.3", "single"]))
    assert (len(again.results), again.failures, again.num_left) == (2, [], 0)
    assert num_attempts(out) == before, "a finished run was begun again"


def test_a_failing_run_is_reported_and_stops_no_other_one(tmp_path: Path, shards: str) -> None:
    (good,) = write_configs(tmp_path, shards, "masked_mean")
    gone = {"init_from": str(tmp_path / "nothing")}
    broken = write_config(tmp_path / "broken.yaml", tiny_config(shards, method=gone))
    out = tmp_path / "sweep"

    outcome = make(plan_sweep([broken, good], out=str(out)))
    assert [result.method for result in outcome.results] == ["masked_mean"]
    assert [failure.run.name for failure in outcome.failures] == ["broken-0.6-0"]
    kept = (out / "failures" / "broken-0.6-0.txt").read_text()
    assert "no commit" in kept
    assert "--set seed=0" in kept, "the command to try it alone"
    with pytest.raises(RunError, match=r"1 run failed: broken-0\.6-0; the first: .*no commit") as raised:
        check_outcome(outcome, str(out))
    assert raised.value.expected == "every run to end in a result; 1 did"
    assert str(raised.value).count("expected:") == 1, "the run's own error is not shown inside this one"

    write_config(tmp_path / "broken.yaml", tiny_config(shards))
    outcome = make(plan_sweep([broken, good], out=str(out)))
    assert [result.method for result in outcome.results] == ["broken", "masked_mean"]
    assert outcome.failures == []
    assert list((out / "failures").iterdir()) == []

    changed = plan_sweep([good], out=str(out), overrides=["optimizer.learning_rate=0.5"])
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate") as refused:
        make(changed)
    assert "--allow-change" not in str(refused.value), "sweep has no such option"
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert set(before) == {"results.csv", "table.csv", "index.html"}

    (chain,) = (out / "masked_mean-0.6-0").glob("commits/*8.json")
    chain.write_text("{")
    assert make(plan_sweep([good], out=str(out))).results == []
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before, "old tables stay"


def test_choices_are_judged_on_a_part_of_train_and_a_stop_commits_first(tmp_path: Path, shards: str) -> None:
    fraction = possible_fraction(shards)
    num_held = hold_out(load_manifest(shards), "train", fraction).split(HELD_OUT).num_samples
    (config,) = write_configs(tmp_path, shards, "masked_mean")
    out = tmp_path / "sweep"
    runs = plan_sweep(
        [config], out=str(out), is_choosing=True, overrides=[f"data.held_out_fraction={fraction}", "num_epochs=8"]
    )
    stopped = make(runs, is_asked=some_run_has_committed(out))
    assert (stopped.results, stopped.failures, stopped.num_left) == ([], [], 1)
    (folder,) = [run.folder for run in runs]
    head = read_head(folder)
    assert head is not None
    assert head.epoch < 8

    (result,) = make(runs).results
    assert result.split == HELD_OUT
    assert result.metrics["num_images"] == num_held
    assert len(list((out / "masked_mean-0.6-0" / "evaluations").iterdir())) == 1, "judged once"
    proof = audit(folder)
    assert proof.faults == []
    assert {epoch.num_planned for epoch in proof.epochs} == {(64 - num_held) // 16 * 16}


@pytest.mark.parametrize(
    ("paths", "known", "place"),
    [([], [], "CONFIG"), (["a/x.yaml", "b/x.yaml"], [], "CONFIG"), (["x"], ["2"], "--known")],
)
def test_a_sweep_that_cannot_be_meant_is_refused(paths: list[str], known: list[str], place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_sweep(paths, out="unused", known=known)
    assert caught.value.where == place


def test_methods_share_the_seeds_of_training_and_view(tmp_path: Path, shards: str) -> None:
    configs = write_configs(tmp_path, shards, "masked_mean", "assume_negative")
    runs = plan_sweep(configs, out="unused", known=["0.3"], num_seeds=2)
    assert [(run.method, run.seed, run.config.seed, run.config.data.known_seed) for run in runs] == [
        ("masked_mean", 0, 0, 0), ("assume_negative", 0, 0, 0), ("masked_mean", 1, 1, 1), ("assume_negative", 1, 1, 1),
    ]  # fmt: skip
    assert {run.config.evaluation.every_epochs for run in runs} == {1000000}
