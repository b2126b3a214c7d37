"""Claims about a run that is stopped: killed, asked, resumed, resumed wrongly."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_mlpl import storage
from dist_mlpl.chain import commit_url, read_chain, read_commit_at
from dist_mlpl.checkpoint import begin_attempt, read_state, take_over
from dist_mlpl.config import read_run_config
from dist_mlpl.errors import CheckpointError
from dist_mlpl.progress import Row, read_rows
from tests.support.runs import (
    assert_same_end,
    command,
    environment,
    rows_reach,
    run,
    run_command,
    run_until,
    tiny_config,
    tiny_shards,
    train_in_process,
    write_config,
)  # fmt: skip

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_shards(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def undisturbed(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain run on one rank, from start to end without a break."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_config(folder / "run.yaml", tiny_config(shards))
    run("train", config, "--local", "--out", str(folder / "run"))
    return folder / "run"


def test_two_runs_of_one_seed_end_in_bit_equal_weights(undisturbed: Path, shards: str, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_config(shards))
    run("train", config, "--local", "--out", str(tmp_path / "run"))
    assert_same_end(str(undisturbed), str(tmp_path / "run"))


def test_a_run_killed_between_commits_and_started_again_ends_bit_equal(
    undisturbed: Path, shards: str, tmp_path: Path
) -> None:
    config, out = write_config(tmp_path / "run.yaml", tiny_config(shards)), tmp_path / "run"
    run_until(rows_reach(out, 3), "train", config, "--local", "--out", str(out))
    run_until(rows_reach(out, 9), "train", config, "--local", "--out", str(out))
    run("train", config, "--local", "--out", str(out))
    assert_same_end(str(undisturbed), str(out))
    chain = read_chain(str(out))
    assert len({commit.attempt for commit in chain}) >= 2
    assert json.loads(run("audit", str(out), "--json").stdout)["is_exact"]
    losses = [
        [(row["step"], row["loss"]) for row in read_rows(str(folder)) if row["event"] == "step"]
        for folder in (undisturbed, out)
    ]
    assert losses[0] == losses[1]  # rows of steps that a kill threw away are not read


@pytest.mark.parametrize(
    ("stage", "num_ranks"),
    [*(pytest.param(stage, 2, marks=pytest.mark.long) for stage in (0, 1, 2)), (3, 2)],
)
def test_deepspeed_on_two_ranks_resumes_bit_equal_after_a_kill(
    stage: int, num_ranks: int, shards: str, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_config(shards, engine={"kind": "deepspeed", "zero_stage": stage}))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("train", config, "--local", "--out", str(whole), num_ranks=num_ranks)
    run_until(rows_reach(broken, 5), "train", config, "--local", "--out", str(broken), num_ranks=num_ranks)
    run("train", config, "--local", "--out", str(broken), num_ranks=num_ranks)
    assert_same_end(str(whole), str(broken))
    assert json.loads(run("audit", str(broken), "--json").stdout)["is_exact"]


def test_sigterm_commits_and_the_same_command_goes_on(shards: str, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_config(shards, save_every_steps=None))
    out = tmp_path / "run"
    child = run_until(rows_reach(out, 2), "train", config, "--local", "--out", str(out), with_signal=signal.SIGTERM)
    assert child.returncode == 130
    stopped = read_chain(str(out))[-1]
    assert 2 <= stopped.step < 12
    run("train", config, "--local", "--out", str(out))
    chain = read_chain(str(out))
    assert chain[-1].epoch == 2
    assert stopped in chain
    assert json.loads(run("audit", str(out), "--json").stdout)["is_exact"]


def test_the_batch_may_change_in_the_middle_of_an_epoch_when_allowed(shards: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = write_config(tmp_path / "first.yaml", tiny_config(shards))
    second = write_config(tmp_path / "second.yaml", tiny_config(shards, global_batch=24))
    run("train", first, "--local", "--out", str(out), "--max-steps", "3")
    refused = run("train", second, "--local", "--out", str(out), check=False)
    assert refused.returncode == 4
    assert "global_batch" in refused.stderr
    assert "--allow-change" in refused.stderr
    run_command("train", second, "--local", "--out", str(out), "--allow-change", num_ranks=2)
    proof = json.loads(run("audit", str(out), "--json").stdout)
    assert proof["is_exact"]
    assert proof["epochs"][0]["num_planned"] == 48 + 48  # 3 x 16, then 2 x 24 of the 56 left
    assert proof["epochs"][0]["num_dropped"] == 8


@pytest.mark.parametrize(
    ("sections", "word"),
    [({"seed": 1}, "seed"), ({"data": {"known_fraction": 0.5}}, "known_fraction"), ({"group_size": 4}, "group_size")],
)
def test_what_would_make_another_run_of_it_is_refused(
    sections: dict, word: str, undisturbed: Path, shards: str, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_config(shards, **sections))
    refused = run("train", config, "--local", "--out", str(undisturbed), "--allow-change", check=False)
    assert refused.returncode == 4
    assert word in refused.stderr


def test_resuming_on_another_class_list_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    other = tiny_shards(tmp_path / "other", num_classes=6)
    config = write_config(tmp_path / "run.yaml", tiny_config(other))
    refused = run("train", config, "--local", "--out", str(undisturbed), check=False)
    assert refused.returncode == 4
    assert "classes" in refused.stderr


def test_a_damaged_checkpoint_is_refused_by_name(shards: str, tmp_path: Path) -> None:
    config, out = write_config(tmp_path / "run.yaml", tiny_config(shards)), tmp_path / "run"
    run("train", config, "--local", "--out", str(out), "--max-steps", "2")
    model = next(out.glob("checkpoints/*/model.safetensors"))
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    refused = run("train", config, "--local", "--out", str(out), check=False)
    assert refused.returncode == 4
    assert "model.safetensors" in refused.stderr
    assert "commits/00000002.json" in refused.stderr


@pytest.mark.long
def test_a_run_whose_classes_cannot_be_scored_saves_and_resumes(tmp_path: Path) -> None:
    shards = tiny_shards(tmp_path / "shards", num_classes=1, num_test=1)
    config, out = write_config(tmp_path / "run.yaml", tiny_config(shards)), tmp_path / "run"
    run("train", config, "--local", "--out", str(out), "--max-steps", "7")
    assert json.loads((out / "evaluations" / "00000006.json").read_text())["mAP"] is None
    run("train", config, "--local", "--out", str(out))
    assert json.loads(run("evaluate", str(out), "--json").stdout)["mAP"] is None


def test_only_the_newest_checkpoints_keep_their_models_and_the_audit_still_reads_all(undisturbed: Path) -> None:
    chain = read_chain(str(undisturbed))
    kept = [commit.step for commit in chain if (undisturbed / commit.files[0].path).exists()]
    assert [commit.step for commit in chain] == [2, 4, 6, 8, 10, 12]
    assert kept == [8, 10, 12]
    assert json.loads(run("audit", str(undisturbed), "--json").stdout)["is_exact"]


def test_what_killed_attempts_and_a_lower_number_leave_behind_goes_with_the_next_save(
    shards: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train_in_process(tiny_config(shards, keep_checkpoints=5), out, max_steps=7)
    orphan, note = out / "checkpoints" / "00000099-0001" / "model.safetensors", out / "checkpoints" / "note.txt"
    orphan.parent.mkdir()
    orphan.write_bytes(b"written before a kill")
    note.write_text("a person's")
    steps = [commit.step for commit in read_chain(str(out))]
    train_in_process(tiny_config(shards, keep_checkpoints=2), out, max_steps=1)
    assert not orphan.exists()
    assert note.exists()
    steps.append(8)
    kept = [commit.step for commit in read_chain(str(out)) if (out / commit.files[0].path).exists()]
    assert [commit.step for commit in read_chain(str(out))] == steps
    assert kept == steps[-2:]
    assert json.loads(run("audit", str(out), "--json").stdout)["is_exact"]


def test_old_checkpoints_that_cannot_be_deleted_do_not_end_the_run(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remove = storage.remove

    def refuse(url: str) -> None:
        if "/checkpoints/" not in url:
            return remove(url)
        raise storage.missing(url, what="permission to delete", next_step="ask for it")

    monkeypatch.setattr(storage, "remove", refuse)
    train_in_process(tiny_config(shards, keep_checkpoints=1), tmp_path / "run", max_steps=4)
    assert read_chain(str(tmp_path / "run"))[-1].step == 4
    assert "could not be deleted" in caplog.text


def test_what_a_newer_attempt_may_be_loading_is_not_pruned(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, create, heads = str(tmp_path / "run"), storage.create_exclusive, []

    def taken_over_before(url: str, content: bytes) -> bool:
        if url == commit_url(out, 4):  # the older attempt has looked for newer ones for the last time
            monkeypatch.undo()
            heads.append(take_over(out, begin_attempt(out, "config")))
        return create(url, content)

    monkeypatch.setattr(storage, "create_exclusive", taken_over_before)
    train_in_process(tiny_config(shards, keep_checkpoints=1), tmp_path / "run", max_steps=4)
    assert read_chain(out)[-1].step == 4
    assert [head.step for head in heads] == [2]
    assert read_state(out, heads[0]).num_updates == 2


def test_what_stops_a_run_while_it_is_opened_stands_in_its_log(shards: str, tmp_path: Path) -> None:
    method = {"init_from": str(tmp_path / "nowhere")}
    with pytest.raises(CheckpointError, match="no commit"):
        train_in_process(tiny_config(shards, method=method), tmp_path / "run")
    log = (tmp_path / "run" / "logs" / "0001" / "rank-0.log").read_text()
    assert "the run stops" in log
    assert "nowhere" in log


@pytest.mark.parametrize("is_left", [False, True])
def test_an_evaluation_that_a_kill_cut_short_or_of_a_commit_moved_away_is_made_up_for(
    is_left: bool, undisturbed: Path, shards: str, tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(undisturbed, out)
    record = out / "evaluations" / "00000012.json"
    before = json.loads(record.read_text())
    if is_left:
        record.write_text(json.dumps(before | {"attempt": "0000", "mAP": 1.0}))
    else:
        record.unlink()
    run("train", write_config(tmp_path / "run.yaml", tiny_config(shards)), "--local", "--out", str(out))
    assert json.loads(record.read_text()) == before


def test_a_chain_that_left_an_epoch_early_is_not_exact(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(undisturbed, out)
    later = out / "commits" / "00000008.json"
    record = json.loads(later.read_text())
    later.write_text(json.dumps(record | {"parent": 4}))
    (out / "commits" / "00000006.json").unlink()
    audited = run("audit", str(out), "--json", check=False)
    assert audited.returncode == 4
    assert "epoch 0 was left with 40 samples still to come" in json.loads(audited.stdout)["faults"]


def test_a_newer_attempt_makes_an_older_one_give_way(shards: str, tmp_path: Path) -> None:
    config, out = write_config(tmp_path / "run.yaml", tiny_config(shards, num_epochs=200)), tmp_path / "run"
    older = subprocess.Popen(
        command("train", config, "--local", "--out", str(out)), env=environment(), stderr=subprocess.PIPE, text=True
    )
    while not rows_reach(out, 3)():
        time.sleep(0.005)  # between looks at the condition
    run("train", config, "--local", "--out", str(out), "--max-steps", "2")
    assert "OvertakenError" in older.communicate(timeout=120)[1]
    assert older.returncode == 4
    assert json.loads(run("audit", str(out), "--json").stdout)["is_exact"]


class AtStep:
    """A sink that does something at a step."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self._step, self._act = step, act

    def row(self, row: Row) -> None:
        if (row["event"], row.get("step")) == ("step", self._step):
            self._act()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_start_that_fails_leaves_the_run_that_goes_on_alone(shards: str, tmp_path: Path) -> None:
    config, out = tiny_config(shards), tmp_path / "run"
    bad = write_config(tmp_path / "bad.yaml", tiny_config(shards, engine={"micro_batch": 1}))
    elsewhere = write_config(tmp_path / "else.yaml", tiny_config(tiny_shards(tmp_path / "other", num_classes=6)))
    codes: list[int] = []

    def start_others() -> None:
        codes.extend(
            run("train", path, "--local", "--out", str(out), check=False).returncode for path in (bad, elsewhere)
        )

    train_in_process(config, out, AtStep(3, start_others))
    assert codes == [2, 4]
    assert [commit.attempt for commit in read_chain(str(out))] == ["0001"] * 6


def test_secrets_of_a_store_stay_out_of_the_run_folder_when_a_run_is_resumed(shards: str, tmp_path: Path) -> None:
    config = tiny_config(shards)
    config["data"]["storage_options"] = {"secret": "XYZZY", "client_kwargs": {"token": "PLUGH"}}
    for _ in range(2):
        train_in_process(config, tmp_path / "run", max_steps=1)
    files = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [content for content in files if b"XYZZY" in content or b"PLUGH" in content]


def test_a_run_that_committed_nothing_may_start_again_under_another_config(shards: str, tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("killed before the first commit")

    with pytest.raises(RuntimeError, match="killed"):
        train_in_process(tiny_config(shards, seed=3), tmp_path / "run", AtStep(1, fail))
    assert (tmp_path / "run" / "config.yaml").exists()
    train_in_process(tiny_config(shards), tmp_path / "run", max_steps=1)
    assert read_run_config(str(tmp_path / "run")).seed == 0


def test_a_step_without_a_commit_is_answered_with_those_that_have_one(undisturbed: Path) -> None:
    with pytest.raises(CheckpointError, match="no commit at step 5") as caught:
        read_commit_at(str(undisturbed), 5)
    assert "of the 6, the nearest: 2, 4, 6, 8, 10, 12" in caught.value.expected
    assert read_commit_at(str(undisturbed), 6).step == 6


def test_files_that_are_not_of_the_run_are_left_alone_in_its_folder(
    undisturbed: Path, shards: str, tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(undisturbed, out)
    newest = max((out / "commits").iterdir())
    shutil.copy(newest, newest.with_name(f"old-{newest.name}"))
    shutil.copy(newest, newest.with_name(f"{newest.name}.bak"))
    newest.unlink()
    (out / "attempts" / "0001.json.bak").write_text("{}")
    (out / "metrics" / "my.jsonl").write_text("{}")
    run("train", write_config(tmp_path / "run.yaml", tiny_config(shards)), "--local", "--out", str(out))
    assert read_chain(str(out))[-1].step == 12
    assert read_rows(str(out))[-1]["epoch"] == 2


def test_audit_finds_a_sample_that_was_not_the_planned_one(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(undisturbed, out)
    record = json.loads((out / "commits" / "00000004.json").read_text())
    entry = next(file for file in record["files"] if file["path"].endswith("consumed.npy"))
    indices = np.load(out / entry["path"])
    indices[3] = indices[2]
    np.save(out / entry["path"], indices)
    entry["sha256"] = hashlib.sha256((out / entry["path"]).read_bytes()).hexdigest()
    (out / "commits" / "00000004.json").write_text(json.dumps(record))
    audited = run("audit", str(out), "--json", check=False)
    assert audited.returncode == 4
    proof = json.loads(audited.stdout)
    assert not proof["is_exact"]
    assert "position 35" in proof["faults"][0]
    assert "consumed twice" in proof["faults"][1]


def test_evaluate_prints_one_json_object_with_the_metrics_of_the_last_epoch(undisturbed: Path) -> None:
    judged = json.loads(run("evaluate", str(undisturbed), "--json").stdout)
    last = [row for row in read_rows(str(undisturbed)) if row["event"] == "epoch"][-1]
    assert judged["mAP"] == pytest.approx(last["mAP"], abs=1e-6)
    assert judged["num_images"] == 40
    assert judged["step"] == 12
    assert judged["split"] == "test"
