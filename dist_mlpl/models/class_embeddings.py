"""Owns files of class vectors: (C, W) numbers in the order of the classes, from .npy or .safetensors."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from dist_mlpl import storage
from dist_mlpl.errors import ConfigError


class ClassEmbeddings(NamedTuple):
    """The content of a file of class vectors."""

    vectors: Tensor  # (C, W) float32
    classes: tuple[str, ...] | None  # class ids in the order of the rows; None if the file does not name them


def read_embeddings(url: str, *, num_classes: int, width: int | None) -> ClassEmbeddings:
    """Read class vectors from a file.

    Args:
        url: a .npy file with one (C, W) array, or a .safetensors file with one such tensor. Either may name the
            classes, by id in the order of the rows: a .npy file in NAME.classes.txt beside it, one per line; a
            .safetensors file in its metadata, as a JSON list under `classes`.
        num_classes: C.
        width: W that the file must have; None: any.

    Raises:
        StorageError: the file cannot be read.
        ConfigError: another content, number of rows, width or number of class ids, or numbers that are not finite.
    """
    try:
        content = storage.read_bytes(url)
    except FileNotFoundError as error:
        next_step = "correct the embeddings key, or set it to null for learned vectors"
        raise storage.missing(url, what="the file of class embeddings", next_step=next_step) from error
    vectors, classes = _decode(url, content)
    if url.endswith(".npy"):
        classes = _listed(_list_url(url))
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
        raise _wrong(url, f"an array of {vectors.dtype} and shape {vectors.shape}", expected="(C, W) numbers")
    if len(vectors) != num_classes:
        raise _wrong(url, f"{len(vectors)} class vectors", expected=f"{num_classes}, one a class, in their order")
    if width is not None and vectors.shape[1] != width:
        raise _wrong(url, f"class vectors of width {vectors.shape[1]}", expected=f"width {width}, as embedding_width")
    if not np.isfinite(vectors).all():
        raise _wrong(url, "numbers that are not finite", expected="finite class vectors")
    if classes is not None and len(classes) != num_classes:
        raise _wrong(url, f"{len(classes)} class ids with it", expected=f"{num_classes}, one a class")
    return ClassEmbeddings(torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32)), classes)


def check_order(url: str, found: Sequence[str], expected: Sequence[str]) -> None:
    """Check that the classes a file names, `found`, are those of the data, `expected`, in the same order.

    Raises:
        ConfigError: another order, or other classes.
    """
    differing = [row for row, (own, other) in enumerate(zip(expected, found, strict=True)) if own != other]
    if differing:
        row = differing[0]
        raise _wrong(
            url,
            f"row {row} is class {found[row]!r}, and {len(differing)} of {len(found)} rows differ",
            expected=f"{expected[row]!r} there: rows in the order of the manifest's classes",
        )


def unchecked_order(url: str) -> str:
    """Make the note for the user of a file that names no classes."""
    remedy = "put the class ids into its metadata as `classes`"
    if url.endswith(".npy"):
        remedy = f"list the class ids in {storage.shown(_list_url(url))}, one a line"
    return (
        f"the rows of {storage.shown(url)} are taken to be in the order of the manifest's classes, unchecked: it does "
        f"not name them; {remedy}, and a wrong order is refused"
    )


def _list_url(url: str) -> str:
    """The URL of the list of class ids for a .npy file."""
    return url.removesuffix(".npy") + ".classes.txt"


def _listed(url: str) -> tuple[str, ...] | None:
    try:
        lines = storage.read_bytes(url).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    return tuple(line.strip() for line in lines if line.strip())


def _decode(url: str, content: bytes) -> tuple[np.ndarray, tuple[str, ...] | None]:
    try:
        if not url.endswith(".safetensors"):
            return np.load(io.BytesIO(content), allow_pickle=False), None
        tensors = safetensors.numpy.load(content)
        if len(tensors) != 1:
            raise ValueError(f"{len(tensors)} tensors in place of one")
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        classes = header.get("__metadata__", {}).get("classes")
        return next(iter(tensors.values())), None if classes is None else tuple(json.loads(classes))
    except Exception as error:  # numpy and safetensors raise a dozen kinds for a file that is not theirs
        raise _wrong(
            url, f"not a file of class vectors: {error}", expected="one (C, W) array as .npy or .safetensors"
        ) from error


def _wrong(url: str, found: str, *, expected: str) -> ConfigError:
    return ConfigError(
        found,
        expected=expected,
        where=storage.shown(url),
        next_step="make the file anew from the manifest's classes, or set embeddings to null for learned vectors",
    )
