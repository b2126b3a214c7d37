"""A contact sheet shows the images that were asked for, their labels, and nothing outside its cells."""

from __future__ import annotations

import io
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from dist_mlpl.data.manifest import Manifest
from dist_mlpl.errors import ConfigError, DataError, ManifestError
from shards import inspect as inspecting
from shards import sample, sheet
from shards.inspect import inspect
from shards.sheet import COLOURS, Cell, Label, draw_sheet
from shards.simulate import simulate
from tests.support.images import tiny_jpeg, truncated, undecodable
from tests.support.label_sets import label_split, write_label_set

pytestmark = pytest.mark.integration

NAMES = ["cat", "dog", "sea", "sea", "Café & <b>bar</b>", "unseen"]


def make_set(folder: Path, *, unlisted: Any = "unknown", machine: bool = False) -> Manifest:
    """30 images: cat in every third, dog absent from every fifth; some labels of others; two damaged images."""
    source = np.zeros((30, 6), dtype=np.int8)
    source[::3, 0], source[::5, 1], source[::7, 4], source[1::2, 2] = 1, -1, 1, 1
    if unlisted == "absent":
        source[source == 0] = -1
    images = [tiny_jpeg(i, height=20 + 9 * i, width=300 - 9 * i) for i in range(30)]
    images[4], images[9] = truncated(images[4]), undecodable(images[9])
    guesses = np.zeros(source.shape, dtype=np.float16)
    guesses[2, 5] = 0.5
    split = label_split(source, num_shards=4)._replace(images=images, machine=guesses if machine else None)
    return write_label_set(folder / "set", {"train": split, "val": split._replace(machine=None)}, unlisted=unlisted,
                           names=NAMES)  # fmt: skip


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[list[Cell]]:
    """The cells of every sheet that is written."""
    sheets: list[list[Cell]] = []
    write = inspecting._write

    def keep(out: str, title: Any, cells: list[Cell]) -> Any:
        sheets.append(cells)
        return write(out, title, cells)

    monkeypatch.setattr(inspecting, "_write", keep)
    return sheets


def numbers(cells: list[Cell]) -> set[int]:
    """Source positions of the images on a sheet."""
    return {int(cell.key.removeprefix("image")) for cell in cells}


def test_a_picture_has_its_size_colours_and_the_same_bytes_every_time(tmp_path: Path) -> None:
    manifest, contents = make_set(tmp_path, machine=True), []
    for name in ("one.png", "two.png"):
        found = inspect(manifest.url, out=str(tmp_path / name), sample=30)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    assert (found.num_shown, found.num_unreadable) == (30, 2)
    picture = Image.open(io.BytesIO(contents[0]))
    picture.load()
    assert picture.size == found.size
    assert found.size[0] == 2 * 18 + 6 * 250 + 5 * 14
    colours = {colour for _, colour in picture.getcolors(1 << 24)}
    assert {ImageColor.getrgb(colour) for colour in COLOURS.values()} <= colours


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"class_id": "/m/0000"}, set(range(0, 30, 3))),
        ({"class_id": "cat"}, set(range(0, 30, 3))),
        ({"class_id": "dog", "is_absent": True}, set(range(0, 30, 5))),
        ({"known_only": True}, {i for i in range(30) if i % 3 == 0 or i % 5 == 0 or i % 7 == 0 or i % 2}),
        ({}, set(range(30))),
    ],
)
@pytest.mark.parametrize("view", [None, "all"])
def test_only_images_that_were_asked_for_are_shown(
    arguments: dict[str, Any], expected: set[int], view: str | None, tmp_path: Path, shown: list[list[Cell]]
) -> None:
    manifest = make_set(tmp_path)
    simulate(manifest.url, name="all", rule="keyed_bernoulli", fraction=1.0)
    inspect(manifest.url, out=str(tmp_path / "sheet.png"), sample=100, view=view, **arguments)
    assert numbers(shown[0]) == expected
    inspect(manifest.url, out=str(tmp_path / "sheet.png"), sample=3, view=view, **arguments)
    assert numbers(shown[1]) < expected
    assert len(shown[1]) == 3


def test_labels_are_those_known_the_class_asked_for_first(tmp_path: Path, shown: list[list[Cell]]) -> None:
    manifest = make_set(tmp_path, machine=True)
    inspect(manifest.url, out=str(tmp_path / "sheet.html"), sample=30, class_id="/m/0004")
    inspect(manifest.url, out=str(tmp_path / "sheet.html"), sample=30)
    by_key = {cell.key: cell.labels for cell in shown[0]}
    assert by_key["image21"] == [Label(NAMES[4], 1), Label("cat", 1), Label("sea", 1)]
    assert by_key["image0"] == [Label(NAMES[4], 1), Label("cat", 1), Label("dog", -1)]
    by_key = {cell.key: cell.labels for cell in shown[1]}
    assert by_key["image2"] == [Label("unseen", 0, "0.50")]
    assert by_key["image4"] == []


def test_where_unlisted_is_absent_only_a_view_makes_absence_worth_saying(
    tmp_path: Path, shown: list[list[Cell]]
) -> None:
    manifest = make_set(tmp_path, unlisted="absent")
    simulate(manifest.url, name="v", rule="web")
    out = str(tmp_path / "sheet.png")
    inspect(manifest.url, out=out, sample=30)
    assert {label.value for cell in shown[0] for label in cell.labels} == {1}
    inspect(manifest.url, out=out, sample=30, class_id="dog", is_absent=True)
    assert all(cell.labels[0] == Label("dog", -1) for cell in shown[1])
    assert len(shown[1]) == 30
    inspect(manifest.url, out=out, sample=30, view="v", known_only=True)
    present = {i for i in range(30) if i % 3 == 0 or i % 7 == 0 or i % 2}
    assert numbers(shown[2]) == present, "an image without positives is found by no search"
    assert all(sum(label.value == 1 for label in cell.labels) == 1 for cell in shown[2])
    assert all(len(cell.labels) == 6 for cell in shown[2])


def test_the_page_is_complete_and_shows_names_as_they_are(tmp_path: Path) -> None:
    manifest, out = make_set(tmp_path), tmp_path / "sheet.html"
    found = inspect(manifest.url, out=str(out), sample=30, split="val")
    page = out.read_text()
    assert found.size == (0, 0)
    assert page.count("<img") == 28
    assert page.count("does not decode") == 2
    assert "Café &amp; &lt;b&gt;bar&lt;/b&gt;" in page
    sources = re.findall(r'(?:src|href)="(.{15})', page)
    assert set(sources) == {"data:image/jpeg"}


def test_only_the_images_shown_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_set(tmp_path)
    read, read_bytes = [], sample.storage.read_bytes
    monkeypatch.setattr(sample.storage, "read_bytes", lambda *args: read.append(args) or read_bytes(*args))
    inspect(manifest.url, out=str(tmp_path / "sheet.png"), sample=4)
    assert sum(str(args[0]).endswith(".tar") for args in read) == 4
    assert all(len(args) == 3 for args in read if str(args[0]).endswith(".tar"))


@pytest.mark.parametrize(
    ("arguments", "error", "found"),
    [
        ({"out": "sheet.gif"}, ConfigError, r"\.png or \.html"),
        ({"sample": 0}, ConfigError, "1 to 400"),
        ({"sample": 401}, ConfigError, "1 to 400"),
        ({"is_absent": True}, ConfigError, "--class ID"),
        ({"class_id": "cta"}, ConfigError, "nearest: 'cat'"),
        ({"class_id": "sea"}, ConfigError, "2 classes"),
        ({"class_id": "unseen"}, DataError, "no such image"),
        ({"split": "tarin"}, ManifestError, "'train'"),
        ({"view": "none"}, ManifestError, "no view"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    arguments: dict[str, Any], error: type[Exception], found: str, tmp_path: Path
) -> None:
    manifest = make_set(tmp_path)
    with pytest.raises(error, match=found):
        inspect(manifest.url, **{"out": str(tmp_path / "sheet.png"), **arguments})
    assert not (tmp_path / "sheet.png").exists()


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=70)
LABEL = st.builds(Label, WORDS, st.sampled_from([-1, 0, 1]), st.sampled_from(["", "0.87"]))
LABELS = st.one_of(st.lists(LABEL, max_size=12), st.lists(LABEL, min_size=15, max_size=60))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(labels=LABELS)
def test_labels_stay_in_their_cell_and_none_is_lost_unsaid(labels: list[Label]) -> None:
    font = sheet._font(13)
    placed = sheet._label_lines(labels, font)
    assert all(words.x + font.getlength(words.text) <= sheet._CELL + 0.01 for words in placed)
    assert placed[-1].y <= (sheet._MAX_LINES - 1) * sheet._LINE
    for one, other in pairwise(placed):
        assert other.y > one.y or other.x >= one.x + font.getlength(one.text)
    if not labels:
        assert placed[0].text == "nothing known"
    elif len(placed) < len(labels) or placed[-1].text.endswith("more"):
        assert placed[-1].text == f"+ {len(labels) - len(placed) + 1} more"


def test_any_number_of_images_fills_a_sheet_without_overlap() -> None:
    for count in (1, 2, 3, 7, 36, 37):
        cells = [Cell("k" * 90, Image.new("RGB", (250, 190), "black"), [Label("x", 1)]) for _ in range(count)]
        picture = draw_sheet([("t" * 300, "#24292f"), ("present", "#1a7f37")], cells)
        black = np.asarray(picture.convert("L")) == 0
        assert black.sum() == count * 250 * 190
        assert (np.asarray(picture)[:, -18:] == 255).all()
        assert (np.asarray(picture)[-18:] == 255).all()
