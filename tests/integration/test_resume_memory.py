"""Claims about runs that remember: killed and resumed with banks and averages, pruned, taken over by other runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_mlpl.banks.base import Bank
from dist_mlpl.banks.heatmaps import HeatmapBank
from dist_mlpl.banks.held import Column
from dist_mlpl.banks.keyed import KeyedBank
from dist_mlpl.banks.table import TableBank
from dist_mlpl.batch import RunLength
from dist_mlpl.chain import Commit, RunIdentity, read_chain, read_model
from dist_mlpl.checkpoint import Attempt, Checkpoint, read_state
from dist_mlpl.data.tar_stream import TarStream
from dist_mlpl.errors import BankError
from tests.support.banks import assert_same_banks, saved_bank
from tests.support.runs import assert_same_end, rows_reach, run, run_until, tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.integration

NUM_CLASSES, NUM_TRAIN = 5, 104
ROLE = {"name": "single_positive", "loss": "role", "expected_positives": 2.0}
LL_CP = {"name": "single_positive", "loss": "ll_cp", "large_fraction": 0.3}
AVERAGE = {"weight_average": 0.9}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_shards(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def undisturbed(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain run of ROLE with an average of the weights, on one rank, without a break."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_config(folder / "run.yaml", role_config(shards))
    run("train", config, "--local", "--out", str(folder / "run"))
    return folder / "run"


def role_config(shards: str, **method: Any) -> dict[str, Any]:
    return tiny_config(shards, method=ROLE | method, engine=AVERAGE)


def test_a_killed_run_resumes_with_bit_equal_memory_and_average(undisturbed: Path, shards: str, tmp_path: Path) -> None:
    mapped = tmp_path / "mapped"
    mapped.mkdir()
    config = write_config(tmp_path / "run.yaml", role_config(shards, bank_folder=str(mapped)))
    out = tmp_path / "run"
    run_until(rows_reach(out, 3), "train", config, "--local", "--out", str(out))
    run_until(rows_reach(out, 9), "train", config, "--local", "--out", str(out))
    run("train", config, "--local", "--out", str(out))
    assert len({commit.attempt for commit in read_chain(str(out))}) >= 2
    assert_same_end(str(undisturbed), str(out))
    assert_same_banks(str(undisturbed), str(out))
    assert list(mapped.iterdir()) == []


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long), 2])
def test_deepspeed_on_two_ranks_resumes_bit_equal_with_memory_after_a_kill(
    stage: int, shards: str, tmp_path: Path
) -> None:
    sections = {"method": LL_CP, "engine": AVERAGE | {"kind": "deepspeed", "zero_stage": stage}, "num_epochs": 3}
    config = write_config(tmp_path / "run.yaml", tiny_config(shards, **sections))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("train", config, "--local", "--out", str(whole), num_ranks=2)
    run_until(rows_reach(broken, 9), "train", config, "--local", "--out", str(broken), num_ranks=2)
    run("train", config, "--local", "--out", str(broken), num_ranks=2)
    assert_same_end(str(whole), str(broken))
    assert_same_banks(str(whole), str(broken))
    head = read_chain(str(whole))[-1]
    bank = KeyedBank("corrections", NUM_TRAIN, (1,), "u8")
    assert bool(saved_bank(str(whole), head, bank)["rows"].any()), "nothing was ever corrected"


def test_a_run_with_memory_goes_on_with_another_number_of_ranks(shards: str, tmp_path: Path) -> None:
    config, out = write_config(tmp_path / "run.yaml", role_config(shards)), tmp_path / "run"
    run("train", config, "--local", "--out", str(out), "--max-steps", "3", num_ranks=2)
    before = saved_bank(str(out), read_chain(str(out))[-1], estimates())
    run("train", config, "--local", "--out", str(out), "--max-steps", "1")
    after = saved_bank(str(out), read_chain(str(out))[-1], estimates())
    moved = (after["rows"] != before["rows"]).any(dim=1)
    assert int((before["stamps"] >= 0).sum()) == 48
    assert int(moved.sum()) == int((after["stamps"] >= 0).sum()) - 48 == 16


def estimates() -> KeyedBank:
    return KeyedBank("estimates", NUM_TRAIN, (NUM_CLASSES,), "f32")


def test_every_kept_checkpoint_is_whole_and_old_bank_files_are_pruned(undisturbed: Path) -> None:
    chain = read_chain(str(undisturbed))
    for commit in chain[-3:]:
        assert all((undisturbed / file.path).exists() for file in commit.files)
        saved_bank(str(undisturbed), commit, estimates())
    needed = {file.path for commit in chain[-3:] for file in commit.files}
    there = {str(path.relative_to(undisturbed)) for path in undisturbed.glob("checkpoints/*/banks/*/*.safetensors")}
    assert there == {path for path in needed if "/banks/" in path}
    assert any(commit.step not in {c.step for c in chain[-3:]} for commit in chain)
    assert json.loads(run("audit", str(undisturbed), "--json").stdout)["is_exact"]


def test_the_model_file_holds_the_average_and_is_what_evaluation_judges(undisturbed: Path) -> None:
    head = read_chain(str(undisturbed))[-1]
    model, state = read_model(str(undisturbed), head), read_state(str(undisturbed), head)
    assert not torch.equal(model["head.linear.weight"], state.trained["head.linear.weight"])
    assert torch.equal(state.trained["head.linear.weight"], state.moments["head.linear.weight/trained"])
    judged = json.loads(run("evaluate", str(undisturbed), "--json").stdout)
    recorded = json.loads((undisturbed / "evaluations" / f"{head.step:08d}.json").read_text())
    assert judged["mAP"] == pytest.approx(recorded["mAP"], abs=1e-6)


def test_another_loss_whose_memory_the_run_does_not_hold_is_refused(
    undisturbed: Path, shards: str, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_config(shards, method=LL_CP, engine=AVERAGE))
    refused = run("train", config, "--local", "--out", str(undisturbed), "--allow-change", check=False)
    assert refused.returncode == 4
    assert "BankError" in refused.stderr
    assert "no bank 'corrections'" in refused.stderr


def test_csl_takes_its_prior_from_a_run_that_ignored_unknown_labels(shards: str, tmp_path: Path) -> None:
    ignore = {"name": "csl", "mode": "ignore"}
    source, out = tmp_path / "ignore", tmp_path / "run"
    config = write_config(tmp_path / "ignore.yaml", tiny_config(shards, method=ignore, num_epochs=1))
    run("train", config, "--local", "--out", str(source))
    selective = {"name": "csl", "top_k": 1, "prior_threshold": 0.5, "prior_from": str(source)}
    config = write_config(tmp_path / "run.yaml", tiny_config(shards, method=selective, num_epochs=1))
    run("train", config, "--local", "--out", str(out), "--max-steps", "3")
    run("train", config, "--local", "--out", str(out))  # from its own commit now
    tables = [saved_bank(str(url), read_chain(str(url))[-1], prior()) for url in (source, out)]
    assert tables[0]["counts"].tolist() == [96] * NUM_CLASSES
    assert torch.equal(tables[0]["sums"], tables[1]["sums"])
    elsewhere = selective | {"prior_from": str(tmp_path / "nowhere")}
    config = write_config(tmp_path / "wrong.yaml", tiny_config(shards, method=elsewhere, num_epochs=1))
    refused = run("train", config, "--local", "--out", str(tmp_path / "wrong"), check=False)
    assert refused.returncode == 4
    assert "nowhere" in refused.stderr


def prior() -> TableBank:
    return TableBank("prior", NUM_CLASSES, {name: Column(dtype="i64") for name in ("sums", "counts", "known")})


def test_a_commit_of_the_first_format_is_still_read(undisturbed: Path) -> None:
    record = json.loads((undisturbed / "commits" / "00000002.json").read_text())
    del record["banks"]
    assert Commit.model_validate(record | {"format": 1}).banks == {}


@pytest.mark.parametrize(
    "bank",
    [KeyedBank("estimates", 3, (2,), "f32"), HeatmapBank("estimates", 3, num_slots=1, map_size=2, seed=0)],
    ids=["keyed", "heatmaps"],
)
def test_memory_of_single_samples_is_refused_over_tars_without_an_index(bank: Bank) -> None:
    engine: Any = SimpleNamespace(method=SimpleNamespace(banks=lambda: {"estimates": bank}))
    with pytest.raises(BankError, match=r"tars without an index"):
        Checkpoint(
            "", engine, TarStream.__new__(TarStream), attempt=Attempt("0001", None), length=RunLength(1, 1),
            identity=RunIdentity(global_batch=1, num_lanes=1, window_samples=1, group_size=1, digests={}),
            keep_checkpoints=1,
        )  # fmt: skip
