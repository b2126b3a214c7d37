"""Claims about relabelling in a whole run: due rounds, kills, adopted rounds, hidden truth, the verbs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from PIL import Image
from typer.testing import CliRunner

from dist_mlpl import storage
from dist_mlpl.build import build_view
from dist_mlpl.chain import read_chain, read_model
from dist_mlpl.cli import app
from dist_mlpl.config import check_config
from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.data.label_store import LabelStore
from dist_mlpl.data.manifest import load_manifest
from dist_mlpl.data.overlays import newest_round, read_round, round_url
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.errors import CheckpointError, ConfigError, MlplError, OvertakenError, StorageError
from dist_mlpl.methods.base import training_targets
from dist_mlpl.progress import Action, Row
from dist_mlpl.rounds.relabel import _clearing
from dist_mlpl.tools.audit import audit
from dist_mlpl.tools.label_rounds import DIFFERENCES, class_counts, differences, open_split, roll_back, rounds_of
from dist_mlpl.tools.relabel_job import job_config, relabel_run
from tests.support.forks import Verb
from tests.support.relabelling import beliefs_of, round_from_table
from tests.support.runs import (
    assert_same_end,
    environment,
    rows_reach,
    run,
    run_until,
    tiny_config,
    tiny_shards,
    train_in_process,
    write_config,
)
from tests.support.sets import order_over, stream_over
from tests.support.views import random_targets

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

CURRICULUM = {"strategy": "score_threshold", "threshold": 0.05, "every_epochs": 1}


class Rows:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def row(self, row: Row) -> None:
        self.rows.append(row)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def rounds(self) -> list[Row]:
        return [row for row in self.rows if row["event"] == "round"]


def train_here(config: dict[str, Any], out: Path, **options: Any) -> Rows:
    rows = Rows()
    train_in_process(config, out, rows, **options)
    return rows


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_shards(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trained(shards: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """Three epochs, a round before the second and the third."""
    out = tmp_path_factory.mktemp("trained") / "run"
    return out, train_here(config_of(shards), out)


def config_of(shards: str, **sections: Any) -> dict[str, Any]:
    return tiny_config(shards, **({"num_epochs": 3, "keep_checkpoints": 9, "curriculum": CURRICULUM} | sections))


def test_rounds_come_at_the_start_of_their_epochs_and_every_commit_names_its_round(trained: tuple[Path, Rows]) -> None:
    out, rows = trained
    assert [(row["epoch"], row["round"]) for row in rows.rounds()] == [(1, 1), (2, 2)]
    rounds = [(commit.epoch, commit.samples_consumed, commit.round) for commit in read_chain(str(out))]
    assert rounds == [(0, 32, 0), (0, 64, 0), (1, 0, 0), (1, 32, 1), (1, 64, 1), (2, 0, 1), (2, 32, 2), (2, 64, 2),
                      (3, 0, 2)]  # fmt: skip
    first, second = read_round(str(out), 1), read_round(str(out), 2)
    assert (first.parent, second.parent) == (0, 1)
    assert [commit.models[0].step for commit in (first, second)] == [6, 12]


def test_hidden_labels_say_how_many_beliefs_are_right(trained: tuple[Path, Rows], shards: str) -> None:
    out, rows = trained
    index = SplitIndex(load_manifest(shards), "train")
    view = build_view(check_config(config_of(shards), where="test").data, index)
    assert view is not None
    everyone = np.arange(index.num_samples)
    truth, told = index.targets(everyone), LabelStore(index, view).at(0).targets(everyone)
    before: dict[tuple[int, int], int] = {}
    for row in rows.rounds():
        beliefs = beliefs_of(out, read_round(str(out), row["round"]), index.shard_sizes, 5)
        assert all(told[at] == 0 for at in beliefs)  # every label of this set is known, so what is not told is hidden
        for sign, value in (("present", 1), ("absent", -1)):
            own = [at for at, belief in beliefs.items() if belief == value]
            num_right = sum(truth[at] == value for at in own)
            num_hidden = int(((told == 0) & (truth == value)).sum())
            assert row[f"num_{sign}"] == len(own)
            assert row[f"hidden_precision_{sign}"] == pytest.approx(num_right / len(own), nan_ok=True)
            assert row[f"hidden_recall_{sign}"] == pytest.approx(num_right / num_hidden)
        flipped = [at for at, belief in beliefs.items() if before.get(at, belief) != belief]
        assert row["num_flipped"] == len(flipped)
        assert row["num_flipped_right"] == sum(truth[at] == beliefs[at] for at in flipped)
        assert row["num_flipped_right"] + row["num_flipped_wrong"] == len(flipped)
        before = beliefs


def test_training_is_bit_equal_with_and_without_looking_at_hidden_labels(
    trained: tuple[Path, Rows], shards: str, tmp_path: Path
) -> None:
    rows = train_here(config_of(shards, curriculum=CURRICULUM | {"measure_hidden": False}), tmp_path / "run")
    assert_same_end(str(trained[0]), str(tmp_path / "run"))
    assert not any(name.startswith("hidden") for row in rows.rounds() for name in row)
    for number in (1, 2):
        assert_same_round(trained[0], tmp_path / "run", number)


def assert_same_round(one: Path, other: Path, number: int) -> None:
    folders = [run / "rounds" / f"{number:06d}" for run in (one, other)]
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]


def test_beliefs_change_what_is_learned(trained: tuple[Path, Rows], shards: str, tmp_path: Path) -> None:
    train_here(config_of(shards, curriculum=None), tmp_path / "run")
    models = [read_model(str(out), read_chain(str(out))[-1]) for out in (trained[0], tmp_path / "run")]
    assert not all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize("keep_soft", [False, True])
def test_batches_bring_the_beliefs_of_the_round_and_no_known_label_changes(
    keep_soft: bool, trained: tuple[Path, Rows], tmp_path: Path
) -> None:
    out = copy_of(trained, tmp_path)
    made = relabel_run(job_config(str(out), ["threshold=0.1", f"keep_soft={keep_soft}"], None))
    assert made is not None
    index = open_split(str(out))
    store = LabelStore(
        index, build_view(check_config(config_of(index.manifest.url), where="").data, index), run=str(out)
    )
    everyone = np.arange(index.num_samples)
    told, dense = store.at(0).targets(everyone), np.zeros((index.num_samples, 5), dtype=np.int8)
    for at, value in beliefs_of(out, made.commit, index.shard_sizes, 5).items():
        dense[at] = value
    assert dense.any()
    assert not dense[told != 0].any()
    stream = stream_over(index)
    try:
        batches = [*stream.train_batches(order_over(index), store.at(3), epoch=0, start=0, global_batch=40)]
        blind = [*stream.train_batches(order_over(index), store.at(0), epoch=0, start=0, global_batch=40)]
        judged = [*stream.evaluation_batches(store.at(3))]
    finally:
        stream.close()
    assert all(batch.pseudo_targets is None and batch.soft_targets is None for batch in blind)
    assert len(judged) == 4
    for batch in [*batches, *judged]:
        rows = batch.index[batch.valid].numpy()
        assert batch.pseudo_targets is not None
        assert np.array_equal(batch.targets[batch.valid], told[rows])
        assert np.array_equal(batch.pseudo_targets[batch.valid], dense[rows])
        assert not batch.pseudo_targets[~batch.valid].any()
        both = np.where(told[rows] != 0, told[rows], dense[rows])
        assert np.array_equal(training_targets(batch)[batch.valid], both)
        assert (batch.soft_targets is not None) == keep_soft
        if batch.soft_targets is not None:
            soft = batch.soft_targets[batch.valid].numpy()
            assert np.array_equal(np.sign(soft - 0.5), both)
            assert (batch.soft_targets[~batch.valid] == 0.5).all()
    assert judged[-1].valid.sum() == 104 - 3 * 32


SLOW = {"strategy": "uncertainty", "num_passes": 100, "every_epochs": 1, "max_variance": 0.02}


def has_parts(out: Path) -> Callable[[], bool]:
    """A condition: two shards of the first round are scored."""
    return lambda: len(list(out.glob("rounds/000001/parts/*/*.safetensors"))) >= 2


def test_a_run_killed_in_a_round_and_stopped_in_an_epoch_under_it_ends_bit_equal(shards: str, tmp_path: Path) -> None:
    document, whole, out = config_of(shards, curriculum=SLOW, num_epochs=2), tmp_path / "whole", tmp_path / "run"
    train_here(document, whole)
    run_until(has_parts(out), "train", write_config(tmp_path / "run.yaml", document), "--local", "--out", str(out))
    assert (newest_round(str(out)), read_chain(str(out))[-1].step) == (0, 6)
    train_here(document, out, max_steps=3)
    assert (newest_round(str(out)), read_chain(str(out))[-1].round) == (1, 1)
    train_here(document, out)
    assert_same_end(str(whole), str(out))
    assert_same_round(whole, out, 1)


@pytest.mark.long
@pytest.mark.parametrize("engine", [{"kind": "plain"}, {"kind": "deepspeed", "zero_stage": 3}])
def test_a_run_killed_in_a_round_and_in_an_epoch_ends_bit_equal_on_two_ranks(
    engine: dict[str, Any], shards: str, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", config_of(shards, curriculum=SLOW, engine=engine))
    whole, out = tmp_path / "whole", tmp_path / "run"
    run("train", config, "--local", "--out", str(whole), num_ranks=2)
    run_until(has_parts(out), "train", config, "--local", "--out", str(out), num_ranks=2)
    run_until(rows_reach(out, 9), "train", config, "--local", "--out", str(out), num_ranks=2)
    assert newest_round(str(out)) >= 1  # torchrun's ranks may outlive it for a moment
    run("train", config, "--local", "--out", str(out), num_ranks=2)
    assert_same_end(str(whole), str(out))
    for number in (1, 2):
        assert_same_round(whole, out, number)


class Killed(BaseException):
    """The process ends here."""


def test_a_round_killed_before_or_after_any_write_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CurriculumSettings(strategy="score_fraction", fraction=0.5, max_per_class=3)
    targets, sizes = random_targets(12, 4, seed=1, unknown=0.7), [5, 3, 4]
    scores = torch.randn(12, 4, generator=torch.Generator().manual_seed(2))

    def make(run: Path) -> dict[str, bytes]:
        round_from_table(run, settings, scores, targets, shard_sizes=sizes)
        return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}

    expected, create = make(tmp_path / "whole"), storage.create_exclusive
    monkeypatch.setattr(storage, "create_exclusive", create_quickly(create))
    for last in range(8):  # the plan, three parts, three overlays, the commit
        for is_before in (True, False):
            run = tmp_path / f"{last}-{is_before}"
            with monkeypatch.context() as patch:
                patch.setattr(storage, "create_exclusive", dying(storage.create_exclusive, last, is_before))
                with pytest.raises(Killed):
                    make(run)
            if newest_round(str(run)) == 0:  # else it was made; whoever asks finds that out first
                make(run)
            found = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
            assert {name: found[name] for name in found if "parts" not in name} == expected


def create_quickly(create: Callable[..., bool]) -> Callable[[str, bytes], bool]:
    return lambda url, content: create(url, content, durable=False)


def dying(create: Callable[[str, bytes], bool], last: int, is_before: bool) -> Callable[[str, bytes], bool]:
    calls = iter(range(1000))

    def create_or_die(url: str, content: bytes) -> bool:
        is_last = next(calls) == last
        if is_last and is_before:
            raise Killed
        made = create(url, content)
        if is_last:
            raise Killed
        return made

    return create_or_die


def test_a_run_asked_to_stop_in_a_round_stops_there_and_goes_on(
    trained: tuple[Path, Rows], shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_mlpl.rounds.relabel._LOOK_BLOCKS", 2)
    out = tmp_path / "run"
    rounds = out / "rounds" / "000001"
    rows = train_here(config_of(shards), out, ask=lambda: Action.STOP if rounds.exists() else Action.GO_ON)
    assert rows.rows[-1]["event"] == "stopped"
    assert (newest_round(str(out)), read_chain(str(out))[-1].step) == (0, 6)
    assert list(rounds.glob("parts/*/*"))
    train_here(config_of(shards), out)
    assert_same_end(str(trained[0]), str(out))


def copy_of(trained: tuple[Path, Rows], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "copy"))


def test_a_round_of_another_job_waits_for_the_next_epoch(shards: str, tmp_path: Path) -> None:
    out, plain = tmp_path / "run", config_of(shards, curriculum=None)
    train_here(plain, out, max_steps=8)  # in the middle of the second epoch
    made = relabel_run(job_config(str(out), ["strategy=score_fraction", "fraction=0.4"], None))
    assert made is not None
    assert made.metrics["num_present"] + made.metrics["num_absent"] == round(0.4 * made.metrics["num_unknown"])
    rows = train_here(plain, out)
    assert [(row["epoch"], row["round"]) for row in rows.rounds()] == [(2, 1)]
    assert {(commit.epoch, commit.round) for commit in read_chain(str(out)) if commit.step >= 8} == {
        (1, 0), (2, 0), (2, 1), (3, 1),
    }  # fmt: skip
    assert audit(str(out)).faults == []


def test_a_job_makes_what_a_due_round_makes_and_nothing_twice(trained: tuple[Path, Rows], tmp_path: Path) -> None:
    out = copy_of(trained, tmp_path)
    shutil.rmtree(out / "rounds" / "000002")
    config = job_config(str(out), [], None)
    made, again = relabel_run(config, step=12), relabel_run(config, step=12)
    assert made is not None
    assert again is not None
    assert made.commit == again.commit
    assert_same_round(trained[0], out, 2)


def test_a_second_job_from_other_settings_is_refused_until_the_first_is_done_or_dropped(
    trained: tuple[Path, Rows], tmp_path: Path
) -> None:
    out = copy_of(trained, tmp_path)
    assert relabel_run(job_config(str(out), ["threshold=0.01"], None)) is not None
    (out / "rounds" / "000003" / "commit.json").unlink()  # as if it were still at work
    with pytest.raises(CheckpointError, match="being made from something else") as refused:
        relabel_run(job_config(str(out), ["threshold=0.02"], None))
    assert type(refused.value) is CheckpointError, "OvertakenError is for jobs that a restart would find done"
    assert [one.state for one in rounds_of(str(out))] == ["committed", "in force", "unfinished"]
    assert "never finished" in roll_back(str(out))
    made = relabel_run(job_config(str(out), ["threshold=0.02"], None))
    assert made is not None
    assert made.commit.round == 3


def test_an_ensemble_of_other_models_or_other_classes_is_refused(
    trained: tuple[Path, Rows], shards: str, tmp_path: Path
) -> None:
    wider = tmp_path / "gn"
    train_here(config_of(shards, curriculum=None, method={"backbone": {"name": "resnet_small_gn"}}), wider, max_steps=1)
    others = tmp_path / "others"
    train_here(config_of(tiny_shards(tmp_path / "set", num_classes=6), curriculum=None), others, max_steps=1)
    out = copy_of(trained, tmp_path)
    for member, word in ((wider, "tensors"), (others, "classes"), (tmp_path / "nowhere", "no commit")):
        with pytest.raises(CheckpointError, match=word):
            relabel_run(job_config(str(out), ["strategy=ensemble", f"runs=['{member}']"], None))
    assert newest_round(str(out)) == 2
    assert relabel_run(job_config(str(out), ["strategy=ensemble", f"runs=['{trained[0]}@14']"], None)) is not None
    assert [model.step for model in read_round(str(out), 3).models] == [18, 16, 14, 14]
    for _ in range(2):  # of fewer members it is another round; of the same, the same one
        fewer = relabel_run(job_config(str(out), ["strategy=ensemble", "checkpoints=2"], None))
        assert fewer is not None
        assert fewer.commit.round == 4
    assert [model.step for model in read_round(str(out), 4).models] == [18, 16]


def test_uncertainty_of_a_model_without_dropout_is_refused_before_training(shards: str, tmp_path: Path) -> None:
    document = config_of(shards, curriculum={"strategy": "uncertainty"}, method={"dropout": 0.0})
    with pytest.raises(ConfigError, match="dropout"):
        train_here(document, tmp_path / "run")
    assert not (tmp_path / "run" / "commits").exists()


def test_a_damaged_round_stops_the_run_that_needs_it(trained: tuple[Path, Rows], shards: str, tmp_path: Path) -> None:
    out = copy_of(trained, tmp_path)
    path = next((out / "rounds" / "000002").glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="missing or damaged"):
        train_here(config_of(shards, num_epochs=4), out, allow_change=True)


def test_rounds_are_listed_compared_and_restored(trained: tuple[Path, Rows], tmp_path: Path) -> None:
    out = copy_of(trained, tmp_path)
    index, first, second = open_split(str(out)), read_round(str(out), 1), read_round(str(out), 2)
    entries = [beliefs_of(out, commit, index.shard_sizes, 5) for commit in (first, second)]
    assert class_counts(str(out), first, index).counts[:, :2].sum() == len(entries[0])
    found = dict(zip(DIFFERENCES, differences(str(out), first, second, index).counts.sum(axis=0).tolist(), strict=True))
    both = entries[0].keys() & entries[1].keys()
    assert found["added_present"] + found["added_absent"] == len(entries[1].keys() - both)
    assert found["removed_present"] + found["removed_absent"] == len(entries[0].keys() - both)
    assert found["unchanged"] == sum(entries[0][at] == entries[1][at] for at in both)
    assert "holds what round 1 held" in roll_back(str(out))
    third = read_round(str(out), 3)
    assert (third.parent, third.restores, third.files) == (0, 1, first.files)
    with pytest.raises(ConfigError, match="newest already"):
        roll_back(str(out), 1)
    assert "holds what round 0 held" in roll_back(str(out))
    assert beliefs_of(out, read_round(str(out), 4), index.shard_sizes, 5) == {}
    roll_back(str(out), 2)
    assert beliefs_of(out, read_round(str(out), 5), index.shard_sizes, 5) == entries[1]
    lines = rounds_of(str(out))
    assert [(one.number, one.state, one.restores) for one in lines] == [
        (1, "committed", None), (2, "in force", None), (3, "committed", 1), (4, "committed", 0), (5, "committed", 2),
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"\[0, 5\]"):
        roll_back(str(out), 9)


def answer(*arguments: str, exit_code: int = 0) -> str:
    """What a verb prints, run in this process."""
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, MlplError):
        assert result.exception.exit_code == exit_code, result.exception
        return str(result.exception)
    assert result.exit_code == exit_code, result.output
    return result.stdout


def everything(out: Path) -> dict[str, bytes]:
    """Every file of a run."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def spoil_model(out: Path) -> None:
    """The newest model answers NaN about one class; its commit names the file as it is now."""
    head = read_chain(str(out))[-1]
    file = next(file for file in head.files if file.path.endswith("/model.safetensors"))
    model = read_model(str(out), head)
    model["head.linear.bias"][3] = float("nan")
    content = safetensors.torch.save(model)
    rewrite_commit(out / "commits" / f"{head.name}.json", file.path, content)
    (out / file.path).write_bytes(content)


def rewrite_commit(record: Path, path: str, content: bytes) -> None:
    """The record says of one of its files what the content is."""
    document = json.loads(record.read_text())
    entry = next(entry for entry in document["files"] if entry["path"] == path)
    entry |= {"num_bytes": len(content), "sha256": storage.sha256_of_bytes(content)}
    record.write_text(json.dumps(document))


def spoil_labels(out: Path) -> None:
    """A belief of the newest round is 2."""
    record = out / "rounds" / "000002" / "commit.json"
    path = json.loads(record.read_text())["files"][0]["path"]
    table = pa.ipc.open_file(out / "rounds" / path).read_all()
    values = pa.array([2, *table.column("value").to_pylist()[1:]], pa.int8())
    changed = table.set_column(table.schema.get_field_index("value"), "value", values)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(changed)
    (out / "rounds" / path).write_bytes(sink.getvalue().to_pybytes())
    rewrite_commit(record, path, sink.getvalue().to_pybytes())


def take_rounds_of_another_set(out: Path) -> None:
    """The rounds are about other shards."""
    for record in out.glob("rounds/*/commit.json"):
        record.write_text(json.dumps(json.loads(record.read_text()) | {"manifest_digest": "0" * 64}))


def cut_newest_record(out: Path) -> None:
    """The newest round's record ends in its middle."""
    record = out / "rounds" / "000002" / "commit.json"
    record.write_bytes(record.read_bytes()[:200])


BAD_ROUNDS: dict[str, tuple[Callable[[Path], None], list[str], str, int]] = {
    "scores that are no numbers": (spoil_model, [], "the model answers nan", 4),
    "a belief outside the code": (spoil_labels, ["cumulative=true"], "a value that is no label", 4),
    "rounds of another data set": (take_rounds_of_another_set, [], "about another manifest", 4),
    "half a record": (cut_newest_record, [], "round 2 of labels cannot be read", 4),
    "a negative threshold": (lambda out: None, ["threshold=-1"], "curriculum.threshold", 2),
    "a threshold that is no number": (lambda out: None, ["threshold=.nan"], "curriculum.threshold", 2),
    "a threshold beyond all scores": (lambda out: None, ["threshold=70000"], "curriculum.threshold", 2),
    "more than everything": (lambda out: None, ["strategy=score_fraction", "fraction=1.5"], "curriculum.fraction", 2),
    "an ensemble of one": (lambda out: None, ["strategy=ensemble", "checkpoints=1"], "an ensemble of one model", 2),
    "another strategy's key": (lambda out: None, ["strategy=positive_only", "fraction=0.5"], "does not use it", 2),
}


@pytest.mark.parametrize("case", BAD_ROUNDS)
def test_what_cannot_make_a_round_is_refused_by_name_and_nothing_committed_changes(
    case: str, trained: tuple[Path, Rows], tmp_path: Path
) -> None:
    spoil, overrides, words, exit_code = BAD_ROUNDS[case]
    out = copy_of(trained, tmp_path)
    spoil(out)
    before = everything(out)
    options = [part for override in overrides for part in ("--set", override)]
    assert words in answer("relabel", str(out), "--local", *options, exit_code=exit_code)
    after = everything(out)
    assert {name: after.get(name) for name in before} == before
    assert not (out / "rounds" / "000003" / "commit.json").exists()
    assert {name for name in after.keys() - before.keys() if not name.startswith("rounds/000003/")} == set()


def test_what_a_faster_job_removed_is_no_fault_of_the_store(trained: tuple[Path, Rows], tmp_path: Path) -> None:
    out = copy_of(trained, tmp_path)
    for number, expected in ((2, OvertakenError), (3, StorageError)):  # round 2 is committed
        place: Any = SimpleNamespace(run=str(out), number=number)
        with pytest.raises(expected), _clearing(place):
            raise StorageError("a part", expected="", where="", next_step="")


def test_two_equal_jobs_at_once_make_one_round_and_the_slower_one_gives_way_if_it_must(
    trained: tuple[Path, Rows], tmp_path: Path
) -> None:
    out = copy_of(trained, tmp_path)
    given = ["relabel", str(out), "--local", "--json", "--set", "strategy=score_fraction", "--set", "fraction=0.5"]
    jobs = [Verb(*given, num_ranks=1, variables=environment()) for _ in range(2)]
    done = [job.finished(120) for job in jobs]
    made = [json.loads(one.stdout)["sha256"] for one in done if one.returncode == 0]
    assert set(made) == {read_round(str(out), 3).sha256}, [one.stderr for one in done]
    assert newest_round(str(out)) == 3
    assert all(one.returncode == 4 and "OvertakenError" in one.stderr for one in done if one.returncode)
    assert not list(out.glob("rounds/*/parts/*"))


def test_the_verbs_answer(trained: tuple[Path, Rows], tmp_path: Path) -> None:
    out = str(copy_of(trained, tmp_path))
    made = json.loads(answer("relabel", out, "--set", "strategy=score_fraction", "--local", "--json"))
    assert (made["round"], made["num_kept"]) == (3, 0)
    log = json.loads(answer("labels", "log", out, "--json"))["rounds"]
    assert [one["strategy"] for one in log] == ["score_threshold", "score_threshold", "score_fraction"]
    assert "hidden_precision_absent" in log[0]["metrics"]
    assert "score_fraction by the model of step 18, after round 2" in answer("labels", "log", out)
    written = datetime.fromtimestamp(Path(round_url(out, 3, "commit.json")).stat().st_mtime, UTC)
    assert f"after round 2, {written.isoformat(sep=' ', timespec='seconds')}" in answer("labels", "log", out)
    said = answer("labels", "show", out)
    assert "class0" in said
    assert f"{made['hidden_precision_absent']:.1%} of absent right" in said
    shown = json.loads(answer("labels", "show", out, "--round", "3", "--json"))
    assert shown["metrics"] == {name: made[name] for name in shown["metrics"]}
    assert "hidden_recall_present" in shown["metrics"]
    assert sum(one["present"] for one in shown["classes"].values()) == made["num_present"]
    assert "unchanged" in answer("labels", "diff", out, "1", "3")
    assert json.loads(answer("labels", "diff", out, "2", "2", "--json"))["added_present"] == 0
    assert "round 4 holds what round 2 held" in answer("labels", "rollback", out)
    assert "KEY=VALUE" in answer("relabel", out, "--set", "strategy", "--local", exit_code=2)
    assert "nearest" in answer("relabel", out, "--set", "treshold=1", "--local", exit_code=2)
    assert "no committed round 9" in answer("labels", "show", out, "--round", "9", exit_code=4)
    said = answer("labels", "show", out, "--round", "0", exit_code=4)
    assert "round 0, which stands for no beliefs" in said
    assert "a round in [1, 4]" in said
    assert "rounds/000001" not in said, "a round that nobody asked for"
    assert "a round in [0, 4], 0 for no beliefs" in answer("labels", "rollback", out, "--to", "9", exit_code=4)
    answer("labels", "show", out, "--top", "-1", exit_code=2)
    answer("labels", "diff", out, "1", "2", "--top", "0", exit_code=2)
    answer("labels", "rollback", out, "--to", "-1", exit_code=2)


def test_a_picture_shows_samples_with_all_that_is_known_of_them(trained: tuple[Path, Rows], tmp_path: Path) -> None:
    out = str(copy_of(trained, tmp_path))
    picture = answer("labels", "show", out, "--sample", "3", "--sample", "50").strip()
    image = Image.open(picture)
    assert picture.startswith(out)
    assert image.format == "PNG"
    assert min(image.size) >= 256
    assert "[0, 104)" in answer("labels", "show", out, "--sample", "104", exit_code=2)
    text = tmp_path / "x.txt"
    assert "ending in .png" in answer("labels", "show", out, "--sample", "3", "--out", str(text), exit_code=2)
    assert not text.exists()
