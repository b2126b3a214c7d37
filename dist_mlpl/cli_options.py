"""Owns what commands share: options, and printing a result as JSON."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final

import typer

from dist_mlpl.errors import ConfigError

INTERRUPTED: Final = 130  # exit code of what was asked to stop; the other codes belong to the classes in `errors`

StorageOptions = Annotated[
    str | None, typer.Option("--storage-options", metavar="JSON", help="fsspec keywords; runs write none down.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def parse_storage_options(text: str | None) -> dict[str, Any] | None:
    """Parse `--storage-options` to a dict; None stays None.

    Raises:
        ConfigError: not a JSON object. The message omits the text, which may contain secrets.
    """
    if text is None:
        return None
    options, found = None, "JSON that is no object"
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        found = f"text that is no JSON: {error.msg} at character {error.pos + 1} of {len(text)}"
    if not isinstance(options, dict):
        raise ConfigError(
            found,
            expected="a JSON object",
            where="--storage-options",
            next_step="""write it like '{"endpoint_url": "http://127.0.0.1:9000"}'""",
        )
    return options


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON object; non-finite numbers become null, since JSON has no NaN."""
    from dist_mlpl.progress import without_nan

    print(json.dumps(without_nan(document)))
