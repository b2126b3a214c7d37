"""Owns the table of sources: the data sets that `dist-mlpl shards build --source NAME` can read.

A source of your own is a module with a settings class and a function, given as `--source my_module:read_birds`:

    class BirdSettings(Settings):                       # dist_mlpl.settings.Settings
        images: str = Field(description="folder of the images")
        sightings: str = Field(description="CSV of the sightings")

    def read_birds(settings: BirdSettings) -> Source:   # shards.sources.base.Source
        \"\"\"Bird sightings of our garden.\"\"\"

The options are the fields of the class that annotates the only parameter: `--option sightings=birds.csv`. The function
returns a `Source` with classes and `Records`, checks its files, raises `DataError` with file and place, and counts what
it drops in `arguments["dropped"]`. It may import `shards.sources.{base,files,dense,options}`.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dist_mlpl.errors import ConfigError, nearest_names
from dist_mlpl.settings import Settings
from shards.sources.base import Source
from shards.sources.options import parse_options


class Reader(NamedTuple):
    """The settings class and the reader function of one kind of source."""

    settings: type[Settings]
    read: Callable[[Any], Source]  # takes an instance of `settings`


@dataclass(frozen=True, slots=True)
class SourceKind:
    """One kind of source.

    Args:
        load: imports its module and returns the reader, so that listing the sources imports none of them.
        summary: a line of description.
    """

    load: Callable[[], Reader]
    summary: str

    @property
    def settings(self) -> type[Settings]:
        """The class of its settings: files and options."""
        return self.load().settings

    @property
    def read(self) -> Callable[[Any], Source]:
        """The function that reads the data set described by its settings."""
        return self.load().read


def _coco() -> Reader:
    from shards.sources.coco import CocoSettings, read_coco

    return Reader(CocoSettings, read_coco)


def _imagenet() -> Reader:
    from shards.sources.imagenet import ImageNetSettings, read_imagenet

    return Reader(ImageNetSettings, read_imagenet)


def _nuswide() -> Reader:
    from shards.sources.nuswide import NusWideSettings, read_nuswide

    return Reader(NusWideSettings, read_nuswide)


def _openimages() -> Reader:
    from shards.sources.openimages import OpenImagesSettings, read_openimages

    return Reader(OpenImagesSettings, read_openimages)


def _table() -> Reader:
    from shards.sources.table import TableSettings, read_table

    def read(settings: TableSettings) -> Source:
        return read_table(settings.images, settings.labels, classes=settings.classes, splits=settings.splits)

    return Reader(TableSettings, read)


def _vg() -> Reader:
    from shards.sources.vg import VgSettings, read_vg

    return Reader(VgSettings, read_vg)


def _voc() -> Reader:
    from shards.sources.voc import VocSettings, read_voc

    return Reader(VocSettings, read_voc)


def _yolo() -> Reader:
    from shards.sources.yolo import YoloSettings, read_yolo

    return Reader(YoloSettings, read_yolo)


SOURCES: dict[str, SourceKind] = {
    "coco": SourceKind(_coco, "COCO and its like: instances JSON files"),
    "imagenet": SourceKind(_imagenet, "ImageNet and its like: a folder for each class; ReaL labels for validation"),
    "nuswide": SourceKind(_nuswide, "NUS-WIDE, 81 concepts: the official lists, or a CSV"),
    "openimages": SourceKind(_openimages, "Open Images V2 to V7: CSV files of verified and machine labels"),
    "table": SourceKind(_table, "CSV tables: an image's name, the names of its classes, its split"),
    "vg": SourceKind(_vg, "VG-200 and VG-500: lists of Visual Genome images and a JSON of class numbers"),
    "voc": SourceKind(_voc, "PASCAL VOC and its like: lists of images and an XML file for each"),
    "yolo": SourceKind(_yolo, "YOLO folders: images/ and labels/ with a text file for each image"),
}


def find_source(name: str) -> SourceKind:
    """Find a kind of source by its name, or a custom one as `module:function`.

    Raises:
        ConfigError: no such name (the message names the nearest), a missing module, or a function that is not a reader.
    """
    if name in SOURCES:
        return SOURCES[name]
    if ":" in name:
        reader = _own(name)
        summary = (inspect.getdoc(reader.read) or "").partition("\n")[0]
        return SourceKind(lambda: reader, summary)
    expected = f"{nearest_names(name, SOURCES)}, or module:function"
    raise ConfigError(f"no source named {name!r}", expected=expected, where="--source", next_step="correct the name")


def read_source(name: str, options: Mapping[str, str]) -> Source:
    """Read a data set.

    Args:
        name: see `find_source`.
        options: text by key; `KEY.NAME` sets one name of a key that has a value for each name.

    Raises:
        ConfigError: an unknown source or option, or an invalid value.
        DataError: the data set is invalid.
        StorageError: a file is missing.
    """
    kind = find_source(name)
    return kind.read(parse_options(kind.settings, options, where=f"source {name}"))


def _own(name: str) -> Reader:
    def wrong(found: str, expected: str) -> ConfigError:
        step = "correct the name, or put the module on PYTHONPATH"
        return ConfigError(found, expected=expected, where=f"--source {name}", next_step=step)

    module_name, _, function = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise wrong(f"no module named {error.name!r}", "a module that Python finds") from error
    except (ValueError, TypeError) as error:  # an empty or relative name
        raise wrong(f"module {module_name!r}", "module:function") from error
    read = getattr(module, function, None)
    if not inspect.isfunction(read):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise wrong(f"no function {function!r} in {module_name}", nearest_names(function, names))
    hints = typing.get_type_hints(read)
    parameters = list(inspect.signature(read).parameters)
    settings = hints.get(parameters[0]) if len(parameters) == 1 else None
    if not (isinstance(settings, type) and issubclass(settings, Settings)):
        raise wrong(f"{function}({', '.join(parameters)})", "one parameter, annotated with a class of Settings")
    return Reader(settings, read)
