"""Owns the exception tree, the four parts of every message, and the exit code of each branch.

MlplError
  ConfigError         a setting is wrong, alone or with another            exit 2
  DataError           images, labels, shards or storage are wrong          exit 3
    ManifestError       the list of shards
    ShardError          one shard or its index
    LabelCodeError      a label outside {-1, 0, +1}
    StorageError        a URL that cannot be read or written
      StorageRefusedError   a store that answered, and would answer the same again
  RunError            a run cannot go on                                   exit 4
    CheckpointError     the commit chain or a file in it
      OvertakenError      another attempt went on from where this one stood
    BankError           a memory bank
    RankMismatchError   ranks disagree
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class MlplError(Exception):
    """Base of every error raised on purpose.

    Args:
        found: what was found, one phrase.
        expected: what was expected instead.
        where: the setting, shard, sample or rank at fault.
        next_step: what the reader should do now.
    """

    exit_code = 4

    def __init__(self, found: str, *, expected: str, where: str, next_step: str) -> None:
        self.found, self.expected, self.where, self.next_step = found, expected, where, next_step
        super().__init__(f"{found}\n  expected: {expected}\n  where:    {where}\n  do:       {next_step}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickling, which keyword-only constructors lack: errors are sent between processes."""
        return _rebuild, (type(self), self.found, self.expected, self.where, self.next_step)


def _rebuild(kind: type[MlplError], found: str, expected: str, where: str, next_step: str) -> MlplError:
    return kind(found, expected=expected, where=where, next_step=next_step)


class ConfigError(MlplError):
    exit_code = 2


class DataError(MlplError):
    exit_code = 3


class ManifestError(DataError):
    pass


class ShardError(DataError):
    pass


class LabelCodeError(DataError):
    pass


class StorageError(DataError):
    pass


class StorageRefusedError(StorageError):
    pass


class RunError(MlplError):
    exit_code = 4


class CheckpointError(RunError):
    pass


class OvertakenError(CheckpointError):
    pass


class BankError(RunError):
    pass


class RankMismatchError(RunError):
    pass


def nearest_names(name: str, valid: Iterable[str], *, limit: int = 3) -> str:
    """List the valid names closest to `name`, for the `expected` part of a message about an unknown one.

    Returns:
        "one of 'a', 'b'" for up to 6 names, else "nearest: 'a', 'b' (of 601)".
    """
    names = sorted(valid)
    if len(names) <= 6:
        return "one of " + ", ".join(repr(n) for n in names) if names else "no name is valid here"
    close = difflib.get_close_matches(name, names, n=limit, cutoff=0.4) or names[:limit]
    return "nearest: " + ", ".join(repr(n) for n in close) + f" (of {len(names)})"
