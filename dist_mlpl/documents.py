"""Owns configs as YAML documents: the text of a file, and what a chain of files that extend each other says."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import yaml

from dist_mlpl import storage
from dist_mlpl.errors import ConfigError
from dist_mlpl.methods.base import MethodSettings

# Keys of `method` that mean the same under every name, so that a file which names another method still inherits them.
_OF_ALL_METHODS: Final = MethodSettings.model_fields.keys() - {"name"}


class Layer(NamedTuple):
    """What one file, or the command line, says; layers are listed nearest first, and the nearest wins."""

    source: str  # path or URL of the file, or `--set`
    document: dict[str, Any]


def read_layers(path: str) -> list[Layer]:
    """Read a config and what it extends, nearest first.

    Args:
        path: local path or URL.

    Raises:
        ConfigError: a file is missing or holds no keys and values, or files extend each other in a circle.
    """
    path = path if storage.is_remote(path) else os.path.normpath(path)
    layers: list[Layer] = []
    while True:
        seen = [layer.source for layer in layers]
        if path in seen:
            raise ConfigError(
                "configs that extend each other: " + " -> ".join([*seen, path]),
                expected="a chain of `extends` with an end",
                where="extends",
                next_step="remove one of them",
            )
        document = _read_document(path, asked_by=seen[-1] if seen else None)
        parent = document.pop("extends", None)
        layers.append(Layer(path, document))
        if parent is None:
            return layers
        path = _beside(path, parent)


def merged(layers: Sequence[Layer]) -> dict[str, Any]:
    """Merge layers, nearest first, to one document: maps deeply, everything else replaced by the nearest.

    Where `method.name` changes from one layer to the next, the farther method's own keys are left behind.
    """
    document: dict[str, Any] = {}
    for layer in reversed(layers):
        document = _merged(without_own_keys(document, layer.document), layer.document)
    return document


def without_own_keys(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` without the keys that only its own method has, if `over` names another method; else `base` itself."""
    before, after = base.get("method"), over.get("method")
    if not (isinstance(before, dict) and isinstance(after, dict)) or "name" not in before or "name" not in after:
        return base
    if before["name"] == after["name"]:
        return base
    return base | {"method": {key: value for key, value in before.items() if key in _OF_ALL_METHODS}}


def set_value(document: dict[str, Any], place: Sequence[str], value: Any) -> None:
    """Set a value at a path of keys, making the maps on the way."""
    for part in place[:-1]:
        inner = document.get(part)
        if not isinstance(inner, dict):
            inner = document[part] = {}
        document = inner
    document[place[-1]] = value


def source_of(layers: Sequence[Layer], place: Sequence[str]) -> str | None:
    """The nearest layer that sets the value at a path of keys; None if none does."""
    for layer in layers:
        inner: Any = layer.document
        for part in place:
            inner = inner.get(part, _NOTHING) if isinstance(inner, dict) else _NOTHING
        if inner is not _NOTHING:
            return layer.source
    return None


_NOTHING: Final = object()


def decoded(content: bytes, *, where: str) -> str:
    """Decode a YAML file's bytes.

    Raises:
        ConfigError: they are not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"a file that is no UTF-8 text, at byte {error.start + 1:,} of {len(content):,}",
            expected="YAML in UTF-8",
            where=where,
            next_step="save the file as UTF-8, or name another one: is this the config?",
        ) from None


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse YAML.

    Raises:
        ConfigError: the text is not YAML, or a map has a key twice.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:  # its text repeats the line, which may hold secrets
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(
            f"{place}{problem or 'text that cannot be read'}", expected="YAML", where=where,
            next_step="correct the file, or the option",
        ) from None  # fmt: skip


class _Loader(yaml.SafeLoader):
    """A safe loader that reads 3e-4 and 1.5e6 as numbers (YAML 1.1: strings), and refuses a key given twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in lines:
                line = lines[key.tag, key.value]
                raise yaml.composer.ComposerError(
                    None, None, f"key {key.value!r} again; line {line} gives it already", key.start_mark
                )
            lines[key.tag, key.value] = key.start_mark.line + 1
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_document(path: str, *, asked_by: str | None) -> dict[str, Any]:
    try:
        text = decoded(storage.read_bytes(path), where=path)
    except FileNotFoundError:
        raise ConfigError(
            f"no config at {path!r}",
            expected="a YAML file",
            where=f"extends of {asked_by}" if asked_by else "CONFIG",
            next_step="check the path; configs/ holds examples",
        ) from None
    document = parse_yaml(text, where=path)
    if not isinstance(document, dict):
        kinds = {type(None): "an empty file", str: "text, not settings", list: "a list"}
        raise ConfigError(
            kinds.get(type(document), "a single value"), expected="keys and values", where=path,
            next_step="see configs/ucm.yaml",
        )  # fmt: skip
    return document


def _beside(path: str, parent: Any) -> str:
    """Path or URL of what a file extends."""
    if not isinstance(parent, str):
        raise ConfigError(
            "`extends` that is no path",
            expected="one path or URL, relative to the file",
            where=path,
            next_step="write it like extends: base.yaml; that file may extend another one",
        )
    folder = path.rsplit("/", 1)[0] if "/" in path else "."
    found = parent if storage.is_remote(parent) or parent.startswith("/") else storage.join(folder, parent)
    # One name per file, else a cycle through `..` would go unnoticed.
    return found if storage.is_remote(found) else os.path.normpath(found)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = _merged(merged[name], value)
        else:
            merged[name] = value
    return merged
