"""Owns the JSON schema of config files, in which every key says what it means, as the settings classes say it."""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
from typing import Any, Final

from pydantic import BaseModel

from dist_mlpl.config import Config, models_in
from dist_mlpl.settings import Settings

_EXTENDS: Final = {
    "type": "string",
    "title": "Extends",
    "description": "Another config that this one builds on, by a path relative to this file or a URL: maps merge "
    "deeply, everything else is replaced. It may extend another one itself.",
}


def config_schema() -> dict[str, Any]:
    """The JSON schema of one config file.

    Only of a file that extends no other one are keys required, and only those at the top.
    """
    schema = Config.model_json_schema()
    tables = {model.__name__: model for model in _all_settings(Config)}
    for name, table in [("Config", schema), *schema["$defs"].items()]:
        said = descriptions(tables[name]) if name in tables else {}
        for key, entry in table.get("properties", {}).items():
            if key in said:
                entry["description"] = said[key]
        if table is not schema:
            table.pop("required", None)  # the file below, or `--set`, may give it
    method = schema["properties"]["method"]
    # A file that leaves `name` to the one below fits several methods.
    method["anyOf"] = method.pop("oneOf")
    del method["discriminator"]
    schema["anyOf"] = [{"required": ["extends"]}, {"required": schema.pop("required")}]
    schema["properties"] = {"extends": _EXTENDS, **schema["properties"]}
    return schema


def descriptions(settings: type[Settings]) -> dict[str, str]:
    """What each key of a settings class means: its entry under `Args:`, else the comment beside or above the key."""
    found: dict[str, str] = {}
    for model in reversed(settings.__mro__):
        if isinstance(model, type) and issubclass(model, Settings) and model is not Settings:
            found |= key_comments(inspect.getsource(model)) | argument_entries(model.__doc__ or "")
    return found


def argument_entries(docstring: str) -> dict[str, str]:
    """The entries of a Google docstring's `Args:` block, by name; `a, b: text` counts for both."""
    lines = inspect.cleandoc(docstring).splitlines()
    if "Args:" not in lines:
        return {}
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines[lines.index("Args:") + 1 :]:
        if line and not line.startswith(" "):
            break
        head = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if head:
            names = head[1].split(", ")
            found |= dict.fromkeys(names, head[2])
        elif line.startswith(" " * 8):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def key_comments(source: str) -> dict[str, str]:
    """The comments of a settings class about its keys, at the end of a key's line or on the lines right above it."""
    source = textwrap.dedent(source)
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    written = [token for token in tokens if token.type == tokenize.COMMENT and "fmt:" not in token.string]
    comments = {token.start[0]: token.string.lstrip("# ") for token in written}
    (model,) = ast.parse(source).body
    assert isinstance(model, ast.ClassDef)
    found: dict[str, str] = {}
    for node in model.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        first = node.lineno
        while first - 1 in comments and lines[first - 2].lstrip().startswith("#"):
            first -= 1
        own = [comments[line] for line in range(first, (node.end_lineno or first) + 1) if line in comments]
        if own:
            found[node.target.id] = " ".join(own)
    return found


def _all_settings(model: type[BaseModel]) -> set[type[Settings]]:
    """A settings class and all that its keys hold, at any depth."""
    found: set[type[Settings]] = {model} if issubclass(model, Settings) else set()
    for field in model.model_fields.values():
        for inner in models_in(field.annotation):
            found |= _all_settings(inner)
    return found
