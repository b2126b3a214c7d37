"""Owns the base of all settings classes: frozen, unknown keys refused, defaults checked; and which keys are paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, TypeVar, get_args

from pydantic import BaseModel, ConfigDict

_LOCATION: Final = object()
Location = Annotated[str, _LOCATION]  # a path or URL; a relative path is relative to where the command was given


class Settings(BaseModel):
    """Base of every part of the config and of every JSON document.

    Each module defines its own subclasses beside the code that they configure; `dist_mlpl.config` composes them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


S = TypeVar("S", bound=Settings)


def with_locations(settings: S, change: Callable[[str], str]) -> S:
    """Return a copy with `change` applied to every `Location`, here and in nested settings; empty ones stay."""
    changes = {}
    for name, field in type(settings).model_fields.items():
        is_location = _LOCATION in field.metadata or _is_location(field.annotation)
        changes[name] = _changed(getattr(settings, name), change, is_location=is_location)
    return settings.model_copy(update=changes)


def _is_location(annotation: Any) -> bool:
    """True if a type is or contains a `Location`."""
    is_one = _LOCATION in getattr(annotation, "__metadata__", ())
    return is_one or any(_is_location(part) for part in get_args(annotation))


def _changed(value: Any, change: Callable[[str], str], *, is_location: bool) -> Any:
    if isinstance(value, Settings):
        return with_locations(value, change)
    if isinstance(value, tuple):
        return tuple(_changed(part, change, is_location=is_location) for part in value)
    if isinstance(value, Mapping):
        return {key: _changed(part, change, is_location=is_location) for key, part in value.items()}
    return change(value) if is_location and isinstance(value, str) and value else value
