"""Claims about whole runs of SST: resumed bit-equal with the ring; judged, and taken over, without counting labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_mlpl.banks.ring import Ring
from dist_mlpl.chain import read_chain, read_model
from dist_mlpl.tools.judge import judge
from tests.support.banks import assert_same_banks, saved_bank
from tests.support.runs import (
    assert_same_end,
    rows_reach,
    run,
    run_until,
    tiny_config,
    tiny_shards,
    train_in_process,
    write_config,
)

pytestmark = pytest.mark.integration

SST: dict[str, Any] = {
    "name": "sst",
    "head": {"embedding_width": 4, "attention_width": 8},
    "graph": {"num_neighbours": 3},
    "pairs": {"class_width": 4, "pair_width": 8, "num_neighbours": 2},
    "ring_capacity": 7,
    "start_epoch": 1,
    "threshold": 0.75,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_shards(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def undisturbed(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_config(folder / "run.yaml", tiny_config(shards, method=SST))
    run("train", config, "--local", "--out", str(folder / "run"))
    return folder / "run"


def test_a_killed_run_resumes_with_bit_equal_ring_and_graph(undisturbed: Path, shards: str, tmp_path: Path) -> None:
    config, out = write_config(tmp_path / "run.yaml", tiny_config(shards, method=SST)), tmp_path / "run"
    run_until(rows_reach(out, 9), "train", config, "--local", "--out", str(out))
    run("train", config, "--local", "--out", str(out))
    assert len({commit.attempt for commit in read_chain(str(out))}) >= 2
    assert_same_end(str(undisturbed), str(out))
    assert_same_banks(str(undisturbed), str(out))
    head = read_chain(str(out))[-1]
    ring = saved_bank(str(out), head, Ring("positives", 5, 7, 128))
    assert bool((ring["num_pushed"] > 7).all())
    model = read_model(str(out), head)
    assert not torch.equal(model["head.graph.neighbours"][:, 1], torch.arange(5))


def test_a_finished_run_is_judged_as_it_was(undisturbed: Path) -> None:
    head = read_chain(str(undisturbed))[-1]
    judged = json.loads(run("evaluate", str(undisturbed), "--json").stdout)
    recorded = json.loads((undisturbed / "evaluations" / f"{head.step:08d}.json").read_text())
    assert judged["mAP"] == pytest.approx(recorded["mAP"], abs=1e-6)


def test_a_run_that_starts_from_another_has_the_graph_of_its_own_labels_and_the_other_runs_pairs(
    undisturbed: Path, shards: str, tmp_path: Path
) -> None:
    source = read_model(str(undisturbed), read_chain(str(undisturbed))[-1])
    models = {}
    for name, keys in (("alone", {}), ("after", {"init_from": str(undisturbed)})):
        sections = {"method": SST | keys, "data": {"known_fraction": 0.2}}
        config, out = write_config(tmp_path / f"{name}.yaml", tiny_config(shards, **sections)), tmp_path / name
        run("train", config, "--local", "--out", str(out), "--max-steps", "1")
        models[name] = read_model(str(out), read_chain(str(out))[-1])
    for name in ("neighbours", "weights", "senders", "sender_weights", "sender_starts"):
        assert torch.equal(models["after"][f"head.graph.{name}"], models["alone"][f"head.graph.{name}"])
    assert not torch.equal(models["after"]["head.graph.weights"], source["head.graph.weights"])
    assert torch.equal(models["after"]["pair_head.neighbours"], source["pair_head.neighbours"])


def test_a_run_is_judged_without_the_file_of_class_vectors_that_it_began_with(shards: str, tmp_path: Path) -> None:
    vectors = tmp_path / "vectors.npy"
    np.save(vectors, np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32))
    method = SST | {"head": SST["head"] | {"embeddings": str(vectors)}}
    train_in_process(tiny_config(shards, method=method, num_epochs=1), tmp_path / "run")
    before = judge(str(tmp_path / "run"))
    vectors.unlink()
    assert judge(str(tmp_path / "run")) == before
