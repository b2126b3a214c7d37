"""Claims about wrong input at the command line: a typed error in four parts, its exit code, before work is lost."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from dist_mlpl import storage
from dist_mlpl.cli import main
from tests.support.images import truncated, undecodable, write_images
from tests.support.runs import tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.integration


class Outcome:
    """What a verb printed and returned."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def assert_is(self, code: int, kind: str, *words: str) -> None:
        assert self.code == code, self.err
        for part in (f"{kind}:", "expected:", "where:", "do:", *words):
            assert part in self.err, f"{part!r} not in {self.err}"


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run `dist-mlpl ARGUMENTS` in this process."""

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["dist-mlpl", *arguments])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as ending:
            code = int(ending.code or 0)
        printed = capfd.readouterr()
        return Outcome(code, printed.out, printed.err)

    yield call
    storage.configure_storage()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A folder with images/ and labels.csv of six images."""
    names = [f"{n}.jpg" for n in range(6)]
    write_images(tmp_path / "images", names)
    (tmp_path / "labels.csv").write_text("image,labels\n" + "".join(f"{name},cat\n" for name in names))
    (tmp_path / "classes.csv").write_text("class\ncat\ndog\n")
    return tmp_path


def build_arguments(table: Path, *more: str) -> list[str]:
    return ["shards", "build", "--images", f"{table}/images", "--labels", f"{table}/labels.csv",
            "--classes", f"{table}/classes.csv", "--out", f"{table}/out", "--workers", "1", *more]  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_shards(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def own_shards(shards: str, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(shards, tmp_path / "own")
    return tmp_path / "own"


def train_arguments(tmp_path: Path, shards: str, **sections: object) -> list[str]:
    config = write_config(tmp_path / "run.yaml", tiny_config(shards, **sections))
    return ["train", config, "--local", "--out", str(tmp_path / "run")]


def test_a_missing_image_stops_the_build(verb, table: Path) -> None:
    (table / "images" / "3.jpg").unlink()
    verb(*build_arguments(table)).assert_is(3, "DataError", "skipped.csv")
    assert "3.jpg" in (table / "out" / "skipped.csv").read_text()
    assert not (table / "out" / "manifest.json").exists()


def test_an_unknown_class_names_the_nearest_and_the_line(verb, table: Path) -> None:
    (table / "labels.csv").write_text("image,labels\n0.jpg,cat\n1.jpg,dgo\n")
    verb(*build_arguments(table)).assert_is(3, "DataError", "dgo", "'dog'", "labels.csv, line 3")


def test_an_image_listed_twice_is_refused(verb, table: Path) -> None:
    (table / "labels.csv").write_text("image,labels\n0.jpg,cat\n0.jpg,dog\n")
    verb(*build_arguments(table)).assert_is(3, "DataError", "0.jpg")


def test_an_unreadable_image_is_listed_and_tolerated_only_when_asked(verb, table: Path) -> None:
    image = table / "images" / "2.jpg"
    image.write_bytes(undecodable(image.read_bytes()))
    verb(*build_arguments(table)).assert_is(3, "DataError", "--max-bad-fraction")
    assert verb(*build_arguments(table, "--max-bad-fraction", "0.2")).code == 0
    assert json.loads((table / "out" / "manifest.json").read_text())["splits"]["train"]["num_samples"] == 5


def test_a_truncated_tar_stops_training_and_is_found_by_verify(verb, own_shards: Path, tmp_path: Path) -> None:
    tar = own_shards / "train-000001.tar"
    tar.write_bytes(truncated(tar.read_bytes()))
    verb(*train_arguments(tmp_path, str(own_shards))).assert_is(3, "ShardError", "train-000001", "shards verify")
    found = verb("shards", "verify", str(own_shards), "--workers", "1")
    assert found.code == 3
    assert "train-000001.tar" in found.out


def test_a_changed_index_stops_training_by_its_digest(verb, own_shards: Path, tmp_path: Path) -> None:
    index = own_shards / "train-000000.arrow"
    content = bytearray(index.read_bytes())
    content[len(content) // 2] ^= 1
    index.write_bytes(content)
    verb(*train_arguments(tmp_path, str(own_shards))).assert_is(3, "ShardError", "train-000000.arrow", "sha256")


def test_an_undecodable_sample_in_training_stops_the_run_above_the_limit_and_is_counted_below(
    verb, table: Path, tmp_path: Path
) -> None:
    names = [f"{n:02d}.jpg" for n in range(40)]
    write_images(table / "images", names)
    image = table / "images" / "07.jpg"
    image.write_bytes(undecodable(image.read_bytes()))
    (table / "labels.csv").write_text("image,labels\n" + "".join(f"{name},cat\n" for name in names))
    (table / "splits.csv").write_text(
        "image,split\n" + "".join(f"{name},{'test' if n > 30 else 'train'}\n" for n, name in enumerate(names))
    )
    assert verb(*build_arguments(table, "--splits", f"{table}/splits.csv", "--no-decode")).code == 0
    arguments = train_arguments(tmp_path, str(table / "out"), global_batch=8, group_size=1, num_epochs=1)
    whole = {"global_batch": 31, "group_size": 1, "num_epochs": 1}
    verb(*arguments).assert_is(3, "DataError", "07", "max_bad_fraction")
    shutil.rmtree(tmp_path / "run")
    data = {"max_bad_fraction": 0.1}
    assert verb(*train_arguments(tmp_path, str(table / "out"), data=data, **whole)).code == 0
    record = json.loads(next((tmp_path / "run" / "commits").iterdir()).read_text())
    assert [name for _, name, _ in record["bad_samples"]] == ["train-000000.tar: 07"]


def test_a_bucket_that_is_not_there_is_a_storage_error(verb, embedded_s3: object, tmp_path: Path) -> None:
    arguments = train_arguments(tmp_path, "s3://no-such-bucket-here/shards")
    outcome = verb(*arguments)
    assert outcome.code == 3
    assert "s3://no-such-bucket-here/shards" in outcome.err


def test_an_unreachable_store_is_a_storage_error_that_says_what_to_check(
    verb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(storage, "DEADLINE_SECONDS", 0.5)
    options = {"endpoint_url": "http://127.0.0.1:9", "key": "k", "secret": "s"}
    data = {"storage_options": options}
    verb(*train_arguments(tmp_path, "s3://bucket/shards", data=data)).assert_is(3, "StorageError", "AWS_ENDPOINT_URL")


def test_a_config_typo_suggests_the_nearest_key(verb, shards: str, tmp_path: Path) -> None:
    outcome = verb(*train_arguments(tmp_path, shards, optimizer={"learning_rte": 0.1}))
    outcome.assert_is(2, "ConfigError", "optimizer.learning_rte", "'learning_rate'")
    assert not (tmp_path / "run").exists()


def test_a_global_batch_that_cannot_be_split_suggests_one_that_can(verb, shards: str, tmp_path: Path) -> None:
    outcome = verb(*train_arguments(tmp_path, shards, global_batch=20))
    outcome.assert_is(2, "ConfigError", "global_batch", "set global_batch to 16")
    assert not (tmp_path / "run").exists()


def test_a_label_outside_the_code_is_refused_at_the_border() -> None:
    import numpy as np

    from dist_mlpl.errors import LabelCodeError
    from dist_mlpl.labels import check_codes

    with pytest.raises(LabelCodeError, match="label value 2"):
        check_codes(np.array([[1, 0], [2, -1]]), where="labels")
