"""What the command line refuses and answers before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.runs import run, tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "x.yaml", "--local", "--out", "run", "--max-steps", "0"],
        ["train", "x.yaml", "--local", "--out", "run", "--max-steps", "-3"],
        ["demo", "--epochs", "0"],
        ["labels", "show", "run", "--top", "-1"],
        ["relabel", "run", "--step", "-1"],
    ],
)
def test_numbers_that_mean_nothing_are_refused(arguments: list[str]) -> None:
    found = run(*arguments, check=False)
    assert found.returncode == 2
    assert "greater than or equal to" in found.stderr


def test_the_version_and_the_schema_are_printed(tmp_path: Path) -> None:
    assert run("--version").stdout.startswith("dist-mlpl 0.")
    assert "extends" in json.loads(run("config", "schema").stdout)["properties"]
    found = run("config", "check", write_config(tmp_path / "run.yaml", tiny_config("nowhere"))).stdout
    assert found.startswith("valid, digest ")
    assert "not looked at: data, weights and the run folder" in found


def test_another_program_s_folder_is_no_run_folder_and_stays_as_it_is(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_shards(tmp_path / "set")))
    out = tmp_path / "full"
    out.mkdir()
    (out / "config.yaml").write_text("model: gpt\n")
    for arguments in (["train", config, "--local", "--out", str(out)], ["evaluate", str(out)]):
        found = run(*arguments, check=False)
        assert found.returncode == 4, found.stderr
        assert "a config.yaml that no run wrote" in found.stderr
        assert "choose another folder" in found.stderr
    assert [path.name for path in out.iterdir()] == ["config.yaml"]
    assert (out / "config.yaml").read_text() == "model: gpt\n"
