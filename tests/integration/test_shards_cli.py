"""Claims about `dist-mlpl shards`: what it prints, where things are, and its exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_mlpl import storage
from dist_mlpl.cli import main
from tests.support.packing import NAMES, contents, packed, source_at, write_inputs

pytestmark = pytest.mark.integration


class Command:
    """The command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        """What it prints on standard output and standard error."""
        self._monkeypatch.setattr(sys, "argv", ["dist-mlpl", "shards", *arguments])
        self._monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == code
        return tuple(self._capsys.readouterr())  # type: ignore[return-value]

    def told(self, *arguments: str, code: int = 0) -> Any:
        """What it prints with --json."""
        return json.loads(self(*arguments, "--json", code=code)[0])


@pytest.fixture
def shards(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(capsys, monkeypatch)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    return write_inputs(tmp_path / "inputs")


def source(folder: Path, splits: str = "splits.csv") -> list[str]:
    files = {"labels": "labels.csv", "classes": "classes.csv"}
    options = [part for key, file in files.items() for part in ("--option", f"{key}={folder / file}")]
    return ["--images", str(folder / "images"), "--splits", str(folder / splits), *options]


def test_a_set_is_built_found_complete_verified_damaged_and_repaired(
    inputs: Path, tmp_path: Path, shards: Command
) -> None:
    out = str(tmp_path / "out")
    build = ["build", *source(inputs), "--out", out, "--workers", "1", "--no-decode"]
    printed, _ = shards(*build)
    assert "train: 24 images, 1 shards" in printed
    assert f"5 classes; {out} written" in printed
    told = shards.told(*build)
    assert told["was_complete"]
    assert told["splits"]["val"]["num_samples"] == 6
    assert contents(out) == contents(packed(inputs, tmp_path / "oracle", target_shard_bytes=256 << 20).manifest.url)
    assert "whole: 30 samples" in shards("verify", out, "--workers", "1")[0]
    (tmp_path / "out" / "val-000000.tar").unlink()
    assert not shards.told("verify", out, "--workers", "1", code=3)["is_whole"]
    assert shards.told("repair", out, *source(inputs), "--workers", "1") == {
        "is_whole": True, "rewritten": ["val-000000.tar"], "faults": [],
    }  # fmt: skip
    (tmp_path / "out" / "stray.tar").write_bytes(b"")
    assert "1 faults left" in shards("repair", out, *source(inputs), "--workers", "1", code=3)[0]


def test_a_set_is_extended(inputs: Path, tmp_path: Path, shards: Command) -> None:
    out = str(tmp_path / "out")
    packed(inputs, out)
    assert "had all that can be packed of it" in shards("extend", out, *source(inputs), "--workers", "1")[0]
    (inputs / "images" / "new.jpg").write_bytes((inputs / "images" / NAMES[0]).read_bytes())
    with open(inputs / "labels.csv", "a") as file:
        file.write("new.jpg,sky,\n")
    with open(inputs / "splits.csv", "a") as file:
        file.write("new.jpg,train\n")
    assert shards.told("extend", out, *source(inputs), "--workers", "1")["num_added"] == 1
    assert "whole: 31 samples" in shards("verify", out, "--workers", "1")[0]


def test_left_out_images_are_counted_and_their_list_is_named(inputs: Path, tmp_path: Path, shards: Command) -> None:
    (inputs / "images" / NAMES[1]).write_bytes(b"")
    out = str(tmp_path / "out")
    build = ["build", *source(inputs), "--out", out, "--workers", "1", "--no-decode"]
    _, said = shards(*build, code=3)
    assert "DataError: 1 of 30 images cannot be packed" in said
    assert f"listed in {out}/skipped.csv" in said
    assert "left out: 1 empty file" in shards(*build, "--max-bad-fraction", "0.05")[0]


def test_classes_are_mapped_on_the_way(inputs: Path, tmp_path: Path, shards: Command) -> None:
    (tmp_path / "map.csv").write_text("id,new_id\nsky,nature\ntree,nature\ncar,car\n")
    arguments = [*source(inputs), "--mapping", str(tmp_path / "map.csv"), "--others", "drop", "--no-decode"]
    assert shards.told("build", *arguments, "--out", str(tmp_path / "out"), "--workers", "1")["num_classes"] == 2


def test_sources_are_listed_with_their_options(shards: Command) -> None:
    printed, _ = shards("sources")
    assert all(name in printed for name in ("coco", "openimages", "table", "voc"))
    (option,) = [option for option in shards.told("sources", "table")["table"]["options"] if option["key"] == "splits"]
    assert option["default"] == ""
    assert "no source named" in shards("sources", "tabel", code=2)[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--source", "tabel"], "no source named 'tabel'"),
        (["--option", "labels"], "option 'labels' without a value"),
        (["--labels", "a", "--option", "labels=b"], "option 'labels=b' twice"),
        (["--images", "x"], "no option 'labels'"),
        (["--workers", "2", "--ray-address", "auto"], "--workers 2 with --ray-address"),
        (["--storage-options", "[1]"], "--storage-options"),
    ],
)
def test_wrong_options_are_config_errors(tmp_path: Path, shards: Command, arguments: list[str], says: str) -> None:
    assert says in shards("build", "--out", str(tmp_path / "out"), *arguments, code=2)[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [["--quality", "0"], ["--max-side", "0"], ["--target-shard-bytes", "0"]])
def test_numbers_out_of_range_are_config_errors(
    inputs: Path, tmp_path: Path, shards: Command, option: list[str]
) -> None:
    said = shards("build", *source(inputs), "--out", str(tmp_path / "out"), *option, code=2)[1]
    assert said.startswith(f"ConfigError: {option[0][2:].replace('-', '_')} 0")


def test_a_bucket_that_holds_another_set_is_refused(inputs: Path, shards: Command, s3_bucket: str) -> None:
    packed(inputs, s3_bucket)
    before = contents(s3_bucket)
    _, said = shards("build", *source(inputs), "--out", s3_bucket, "--seed", "3", code=3)
    assert "another data set: seed 0 there, 3 here" in said
    assert contents(s3_bucket) == before
    assert source_at(str(inputs)).records[0].image == NAMES[0]
    assert storage.list_names(storage.join(s3_bucket, "build")) == []
