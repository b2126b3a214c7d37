"""Owns parsing `--option KEY=VALUE` into a source's settings, and listing its options."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BeforeValidator, ValidationError
from pydantic_core import PydanticUndefined

from dist_mlpl.errors import ConfigError, nearest_names
from dist_mlpl.settings import Settings

S = TypeVar("S", bound=Settings)


def _split_at_commas(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


# Several texts, joined by commas in an option.
Names = Annotated[tuple[str, ...], BeforeValidator(_split_at_commas)]

# What a class is in an image that has it only as specially marked objects (difficult, crowds).
Meaning = Literal["absent", "unknown", "present"]


class Option(NamedTuple):
    """One option of a source."""

    key: str  # KEY of KEY=VALUE; KEY.NAME if there is a value for each name
    values: str  # allowed values
    default: str | None  # None: the option is required
    about: str


def parse_options(settings: type[S], options: Mapping[str, str], *, where: str) -> S:
    """Parse options into settings.

    Args:
        settings: the source's settings class.
        options: text by key; `KEY.NAME` sets one name of a key that has a value for each name.
        where: the source, for messages.

    Raises:
        ConfigError: an unknown key (the message names the nearest), a missing one, or an invalid value.
    """
    document: dict[str, Any] = {}
    for key, value in options.items():
        field, dot, name = key.partition(".")
        if field not in settings.model_fields:
            raise _wrong(f"option {key!r}", nearest_names(field, settings.model_fields), where)
        is_named = get_origin(settings.model_fields[field].annotation) is dict
        if is_named != bool(dot and name):
            raise _wrong(f"option {key}={value}", f"{_key(field, is_named)}=VALUE", where)
        if is_named:
            document.setdefault(field, {})[name] = value
        else:
            document[field] = value
    try:
        return settings.model_validate(document)
    except ValidationError as error:
        raise _unfit(settings, options, dict(error.errors()[0]), where) from error


def list_options(settings: type[Settings]) -> list[Option]:
    """The options of a settings class, in its order."""
    options = []
    for name, field in settings.model_fields.items():
        default = None if field.is_required() else _shown(field.get_default(call_default_factory=True))
        is_named = get_origin(field.annotation) is dict
        annotation = get_args(field.annotation)[1] if is_named else field.annotation
        options.append(Option(_key(name, is_named), _values(annotation), default, field.description or ""))
    return options


def _key(field: str, is_named: bool) -> str:
    return f"{field}.NAME" if is_named else field


def _values(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_values(part) for part in get_args(annotation) if part is not NoneType)
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        return "TEXT,TEXT"
    return {bool: "true | false", int: "NUMBER", float: "NUMBER"}.get(annotation, "TEXT")


def _shown(default: Any) -> str:
    if default is None or default is PydanticUndefined:
        return ""
    if isinstance(default, dict):
        return " ".join(f"{name}={_shown(value)}" for name, value in default.items())
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def _unfit(settings: type[Settings], options: Mapping[str, str], first: dict[str, Any], where: str) -> ConfigError:
    """The error for the first finding of pydantic; the caller raises it."""
    key, says = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if not key:  # the finding is about several options
        return _wrong(f"options {', '.join(options)}", says, where)
    if first["type"] == "missing":
        option = next(option for option in list_options(settings) if option.key.partition(".")[0] == key)
        return _wrong(f"no option {key!r}", f"{option.key}={option.values}: {option.about}", where)
    return _wrong(f"option {key}={first['input']}", says, where)


def _wrong(found: str, expected: str, where: str) -> ConfigError:
    step = "correct the option; `dist-mlpl shards sources` lists them all"
    return ConfigError(found, expected=expected, where=where, next_step=step)
