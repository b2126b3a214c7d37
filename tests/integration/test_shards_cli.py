"""Claims about `dist-mlpl shards`: what it prints, where things are, and its exit codes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

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
    assert "train: 24 images, 1 shard, 71.7 kB" in printed
    assert f"5 classes; {out} written" in printed
    told = shards.told(*build)
    assert told["was_complete"]
    assert f"{out} was complete already, checked in " in shards(*build)[0]
    assert told["splits"]["val"]["num_samples"] == 6
    assert contents(out) == contents(packed(inputs, tmp_path / "oracle", target_shard_bytes=256 << 20).manifest.url)
    assert "whole: 30 samples" in shards("verify", out, "--workers", "1")[0]
    (tmp_path / "out" / "val-000000.tar").unlink()
    assert not shards.told("verify", out, "--workers", "1", code=3)["is_whole"]
    assert shards.told("repair", out, *source(inputs), "--workers", "1") == {
        "is_whole": True, "rewritten": ["val-000000.tar"], "faults": [],
    }  # fmt: skip
    (tmp_path / "out" / "stray.tar").write_bytes(b"")
    assert "1 fault left" in shards("repair", out, *source(inputs), "--workers", "1", code=3)[0]


def test_a_set_is_extended(inputs: Path, tmp_path: Path, shards: Command) -> None:
    out = str(tmp_path / "out")
    packed(inputs, out)
    assert (
        f"5 classes; {out} had all that can be packed of it"
        in shards("extend", out, *source(inputs), "--workers", "1")[0]
    )
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


def write_loose(folder: Path) -> list[str]:
    """Labels without a list of classes, with typing mistakes; options for them."""
    rows = [f"{name},{'car | tree' if number % 2 else 'Car|tree '}\n" for number, name in enumerate(NAMES)]
    (folder / "loose.csv").write_text("image, labels\n" + "".join(rows))
    (folder / "slips.csv").write_text(
        "image,split\n" + "".join(f"{name},{'trian' if name == NAMES[0] else 'train'}\n" for name in NAMES)
    )
    return [
        "--images",
        str(folder / "images"),
        "--labels",
        str(folder / "loose.csv"),
        "--splits",
        f"{folder}/slips.csv",
    ]


def test_what_looks_like_a_typing_mistake_is_told(inputs: Path, tmp_path: Path, shards: Command) -> None:
    build = ["build", *write_loose(inputs), "--out", str(tmp_path / "out"), "--workers", "1", "--no-decode"]
    content, exif = (inputs / "images" / NAMES[3]).read_bytes(), Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(content)).save(inputs / "images" / NAMES[3], "JPEG", exif=exif)
    printed, _ = shards(*build)
    notes = [line.removeprefix("note: ") for line in printed.splitlines() if line.startswith("note: ")]
    assert notes == [
        f"without a list of classes, 3 were found in {inputs}/loose.csv: Car, car, tree",
        "classes that differ in case or blanks alone, yet count as different ones: 'Car' and 'car'",
        "split 'trian' is of a single image; the others: 'train'",
        "1 image carries an EXIF orientation: kept as stored, and training does not turn it; --max-side N makes it "
        "upright",
    ]
    assert shards.told(*build)["notes"] == notes[:3]


def test_shards_are_not_written_among_the_images(inputs: Path, tmp_path: Path, shards: Command) -> None:
    images, there = inputs / "images", sorted((inputs / "images").rglob("*"))
    _, said = shards("build", *source(inputs), "--out", f"{images}/", code=2)
    assert "the folder of the images as --out" in said
    assert f"such as --out {images}-shards" in said
    link = tmp_path / "link"
    link.symlink_to(images)
    assert "the folder of the images" in shards("build", *source(inputs), "--out", str(link), code=2)[1]
    images.rename(inputs / "build")
    options = ["--images", str(inputs / "build"), *source(inputs)[2:]]
    assert "removes at its end" in shards("build", *options, "--out", str(inputs), code=2)[1]
    assert len(sorted((inputs / "build").rglob("*"))) == len(there)
    shards("build", *options, "--out", str(inputs / "build" / "packed"), "--workers", "1", "--no-decode")


def test_a_refused_build_says_what_to_do_and_then_goes_on(inputs: Path, tmp_path: Path, shards: Command) -> None:
    path = inputs / "images" / NAMES[1]
    whole = path.read_bytes()
    Image.open(io.BytesIO(whole)).save(path, "PNG")
    build = ["build", *source(inputs), "--workers", "1", "--no-decode", "--out"]
    _, said = shards(*build, str(tmp_path / "out"), code=3)
    assert f"1 of 30 images cannot be packed so far (the build stopped there): '{NAMES[1]}' (not a JPEG)" in said
    assert "add --convert, which makes JPEGs of PNG, TIFF, BMP and WebP; or repair them; or allow for them" in said
    path.write_bytes(whole)
    shards(*build, str(tmp_path / "out"))
    shards(*build, str(tmp_path / "quiet"))
    assert contents(str(tmp_path / "out")) == contents(str(tmp_path / "quiet"))


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


def test_rules_are_listed_and_one_of_them_by_its_name(shards: Command) -> None:
    printed, _ = shards("rules")
    assert len(printed.splitlines()) > 5
    (line,) = shards("rules", "keyed_bernoulli")[0].splitlines()
    assert line.startswith("keyed_bernoulli  every label is kept")
    assert line.endswith("needs --fraction")
    assert "unknown rule 'keyed'" in shards("rules", "keyed", code=2)[1]


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
