"""Owns tars as other people write them: any members, any tar format, labels in several forms."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Member = tuple[str, bytes | None]  # name and content; None is a folder


def tar_bytes(members: Iterable[Member], *, tar_format: int = tarfile.USTAR_FORMAT, mtime: float = 0) -> bytes:
    """A tar with these members in this order."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.mtime = mtime
            if content is None:
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def write_tar(path: Path, members: Iterable[Member], **options: Any) -> Path:
    """`tar_bytes` as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, **options))
    return path


def as_json(**fields: Any) -> bytes:
    """A label member."""
    return json.dumps(fields).encode()


def fake_jpeg(seed: int, num_bytes: int) -> bytes:
    """The markers of a JPEG around filler that no decoder reads: for tests that only move bytes."""
    filler = bytes((seed + number) % 200 for number in range(251)) * (num_bytes // 251 + 1)
    return b"\xff\xd8\xff\xe0" + filler[: num_bytes - 8] + b"\xff\xda\xff\xd9"
