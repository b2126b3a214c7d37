"""Claims about the table of sources, options given as text, and sources of one's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from dist_mlpl.errors import ConfigError, StorageError
from dist_mlpl.settings import Settings
from shards.sources.coco import CocoSettings
from shards.sources.nuswide import NusWideSettings
from shards.sources.options import Meaning, Names, Option, list_options, parse_options
from shards.sources.registry import SOURCES, find_source, read_source
from shards.sources.voc import VocSettings
from tests.support.sources import seen, write_files

pytestmark = pytest.mark.unit


def test_sources_are_sorted_and_each_has_a_summary() -> None:
    assert list(SOURCES) == sorted(SOURCES)
    assert all(kind.summary for kind in SOURCES.values())


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_source_has_frozen_settings_with_images_and_says_what_each_option_is(name: str) -> None:
    kind = SOURCES[name]
    assert issubclass(kind.settings, Settings)
    assert callable(kind.read)
    options = list_options(kind.settings)
    assert options[0].key == "images"
    assert all(option.about and option.values for option in options)


def test_texts_make_the_settings_of_a_source() -> None:
    texts = {"images": "i", "annotations.train": "a.json", "annotations.val": "b.json", "crowd": "absent"}
    assert parse_options(CocoSettings, texts, where="x") == CocoSettings(
        images="i", annotations={"train": "a.json", "val": "b.json"}, crowd="absent"
    )
    lists = parse_options(VocSettings, {"images": "i", "lists.train": "VOC2007/train, VOC2012/train"}, where="x").lists
    assert lists == {"train": ("VOC2007/train", "VOC2012/train")}
    assert parse_options(NusWideSettings, {"images": "i", "labels": "l", "flat": "true"}, where="x").flat is True


@pytest.mark.parametrize(
    ("kind", "texts", "found", "expected"),
    [
        (CocoSettings, {"annotation.train": "a"}, "option 'annotation.train'", "'annotations'"),
        (CocoSettings, {"images": "i", "annotations": "a"}, "option annotations=a", "annotations.NAME=VALUE"),
        (CocoSettings, {"images.x": "i"}, "option images.x=i", "images=VALUE"),
        (CocoSettings, {"images": "i"}, "no option 'annotations'", "annotations.NAME=TEXT: the instances JSON"),
        (
            CocoSettings,
            {"images": "i", "annotations.a": "a", "crowd": "skip"},
            "option crowd=skip",
            "'absent', 'unknown' or 'present'",
        ),
        (NusWideSettings, {"images": "i"}, "options images", "give `annotations` or `labels`"),
    ],
)
def test_options_that_do_not_fit_are_refused(kind: Any, texts: dict[str, str], found: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options(kind, texts, where="source x")
    assert caught.value.found == found
    assert expected in caught.value.expected
    assert caught.value.where == "source x"


class Made(Settings):
    images: str = Field(description="a folder")
    parts: dict[str, Names] = Field({"a": ("x", "y")}, description="parts")
    names: Names = Field((), description="names")
    many: int = Field(3, description="how many")
    hard: Meaning = Field("absent", description="what")
    extra: str | None = Field(None, description="more")
    strict: bool = Field(False, description="strict")


def test_options_are_listed_with_their_values_and_defaults() -> None:
    assert list_options(Made) == [
        Option("images", "TEXT", None, "a folder"),
        Option("parts.NAME", "TEXT,TEXT", "a=x,y", "parts"),
        Option("names", "TEXT,TEXT", "", "names"),
        Option("many", "NUMBER", "3", "how many"),
        Option("hard", "absent | unknown | present", "absent", "what"),
        Option("extra", "TEXT", "", "more"),
        Option("strict", "true | false", "false", "strict"),
    ]


OWN = '''
from pydantic import Field
from dist_mlpl.data.manifest import ClassEntry
from dist_mlpl.settings import Settings
from shards.sources.base import Record, Records, Source
from shards.sources.files import read_file

class BirdSettings(Settings):
    images: str = Field(description="folder")
    sightings: str = Field(description="lines of image and bird")

def read_birds(settings: BirdSettings) -> Source:
    """Birds of our garden.

    More.
    """
    rows = [line.split() for _, line in read_file(settings.sightings, what="sightings", option="sightings").lines()]
    names = sorted({bird for _, bird in rows})
    records = [Record(image, "train", (names.index(bird),), (), row) for row, (image, bird) in enumerate(rows)]
    classes = tuple(ClassEntry(id=name, name=name) for name in names)
    return Source("birds", settings.images, classes, "unknown", {}, Records.of(records))

def no_source(images, labels):
    pass

def untyped(settings):
    pass
'''


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_files(tmp_path, {"garden_birds.py": OWN, "birds.txt": "a.jpg wren\nb.jpg robin\n"})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "garden_birds", raising=False)
    return tmp_path


def test_a_source_of_ones_own_is_a_module_and_a_function(own_module: Path) -> None:
    kind = find_source("garden_birds:read_birds")
    assert kind.summary == "Birds of our garden."
    assert [option.key for option in list_options(kind.settings)] == ["images", "sightings"]
    options = {"images": "i", "sightings": str(own_module / "birds.txt")}
    source = read_source("garden_birds:read_birds", options)
    assert {image: row.positives for image, row in seen(source).items()} == {"a.jpg": {"wren"}, "b.jpg": {"robin"}}
    with pytest.raises(StorageError, match="sightings not found"):
        read_source("garden_birds:read_birds", options | {"sightings": "none"})


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("cocoa", "no source named 'cocoa'", "'coco'"),
        ("garden_beds:read", "no module named 'garden_beds'", "a module that Python finds"),
        (":read", "module ''", "module:function"),
        ("garden_birds:read_bird", "no function 'read_bird' in garden_birds", "'read_birds'"),
        ("garden_birds:no_source", "no_source(images, labels)", "annotated with a class of Settings"),
        ("garden_birds:untyped", "untyped(settings)", "annotated with a class of Settings"),
    ],
)
def test_names_that_are_no_source_are_refused(own_module: Path, name: str, found: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_source(name)
    assert caught.value.found == found
    assert expected in caught.value.expected


def test_a_source_is_read_by_name_and_texts(tmp_path: Path) -> None:
    document = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "category_id": 3}],
        "categories": [{"id": 3, "name": "car"}],
    }
    root = write_files(tmp_path, {"a.json": json.dumps(document)})
    source = read_source("coco", {"images": root, "annotations.test": f"{root}/a.json"})
    assert seen(source)["a.jpg"].split == "test"
