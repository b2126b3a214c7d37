"""Claims about runs that blend: killed and resumed in the middle of an epoch, with all prototypes and what they sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_mlpl.banks.base import Bank
from dist_mlpl.chain import read_chain
from tests.support.banks import assert_same_banks, saved_bank
from tests.support.runs import assert_same_end, rows_reach, run, run_until, tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.integration

METHOD = {
    "name": "blending",
    "dropout": 0.0,
    "head": {"attention_width": 8, "embedding_width": 6, "feature_width": 12},
    "start_epoch": 1,
    "renew_every_epochs": 1,
}


@pytest.mark.parametrize("prototypes", [{"prototypes": "kmeans", "num_prototypes": 3}, {"prototypes": "quadrants"}])
def test_a_run_killed_while_it_gathers_and_blends_resumes_bit_equal(prototypes: dict[str, Any], tmp_path: Path) -> None:
    shards = tiny_shards(tmp_path / "tiny")
    config = write_config(tmp_path / "run.yaml", tiny_config(shards, method=METHOD | prototypes))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("train", config, "--local", "--out", str(whole))
    run_until(rows_reach(broken, 9), "train", config, "--local", "--out", str(broken))  # gathering and blending
    run("train", config, "--local", "--out", str(broken))
    head = read_chain(str(whole))[-1]
    assert len({commit.attempt for commit in read_chain(str(broken))}) == 2
    assert_same_end(str(whole), str(broken))
    assert_same_banks(str(whole), str(broken))
    record = head.banks["prototypes"].spec
    bank = saved_bank(
        str(whole), head, Bank("prototypes", record.num_rows, record.columns, num_shards=record.num_shards)
    )
    assert bool((bank["counts"] > 0).all())
    assert bool(bank["num_added"].any()), "the sums of the epoch under way were saved too"
