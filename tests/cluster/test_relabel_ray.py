"""Claims about rounds of labels on Ray, with shards and run folder in object storage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_mlpl import storage
from dist_mlpl.chain import read_chain
from dist_mlpl.data.overlays import read_round, round_url
from tests.support.runs import run_command, tiny_config, tiny_shards, write_config

pytestmark = [pytest.mark.cluster, pytest.mark.long]


def copy_of(run_url: str, url: str) -> str:
    for path in storage.list_files(run_url):
        storage.write_bytes(storage.join(url, path), storage.read_bytes(storage.join(run_url, path)))
    return url


def test_a_round_on_two_ray_workers_has_the_bytes_of_one_local_process(embedded_s3: object, tmp_path: Path) -> None:
    bucket = embedded_s3.make_bucket("bucket-relabel")  # type: ignore[attr-defined]
    shards = tiny_shards(tmp_path, out=storage.join(bucket, "shards"))
    curriculum = {"strategy": "score_fraction", "fraction": 0.5, "every_epochs": 1}
    sections = {"curriculum": curriculum, "cluster": {"num_workers": 2}, "engine": {"kind": "deepspeed"}}
    config = write_config(tmp_path / "run.yaml", tiny_config(shards, **sections))
    trained = storage.join(bucket, "run")
    run_command("train", config, "--out", trained)
    assert [(commit.epoch, commit.round) for commit in read_chain(trained)][-1] == (2, 1)
    commits = {}
    for name, options in {"local": ["--local"], "ray": []}.items():
        out = copy_of(trained, storage.join(bucket, name))
        made = json.loads(run_command("relabel", out, "--set", "fraction=0.3", "--json", *options).stdout)
        assert made["round"] == 2
        assert made["num_present"] + made["num_absent"] == round(0.3 * made["num_unknown"])
        commits[name] = storage.read_bytes(round_url(out, 2, "commit.json"))
        assert read_round(out, 2).parent == 1
        assert not [path for path in storage.list_files(round_url(out, 2)) if "parts" in path]
    assert commits["local"] == commits["ray"]
