"""Owns drawing for the tools: images with lines of text, in rows, as one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageOps

PLAIN, GOOD, BAD, FAINT = (20, 20, 20), (0, 110, 0), (180, 0, 0), (120, 120, 120)
LINE: Final = 14  # height of a line of text in pixels
GAP: Final = 8

Line = tuple[str, tuple[int, int, int]]  # text and its colour


def opened(content: bytes) -> Image.Image:
    """Decode a file's bytes to an RGB image."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def beside(picture: Image.Image, lines: Sequence[Line], *, side: int, width: int) -> Image.Image:
    """An image that fits into a square of `side` pixels, with text `width` pixels wide on its right."""
    picture = ImageOps.contain(picture, (side, side))
    row = Image.new("RGB", (side + width, max(picture.height, LINE * len(lines)) + GAP), "white")
    row.paste(picture, (0, GAP // 2))
    _write(row, lines, left=side + GAP, top=GAP // 2)
    return row


def above(picture: Image.Image, lines: Sequence[Line], *, side: int) -> Image.Image:
    """An image that fits into a square of `side` pixels, above its lines of text."""
    picture = ImageOps.contain(picture, (side, side))
    tile = Image.new("RGB", (side + GAP, side + GAP + LINE * len(lines)), "white")
    tile.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    _write(tile, lines, left=2, top=side + 2)
    return tile


def in_a_row(tiles: Sequence[Image.Image]) -> Image.Image:
    """Place tiles from left to right."""
    row = Image.new("RGB", (sum(tile.width for tile in tiles), max(tile.height for tile in tiles)), "white")
    left = 0
    for tile in tiles:
        row.paste(tile, (left, 0))
        left += tile.width
    return row


def stacked(rows: Sequence[Image.Image], legend: Sequence[str] = ()) -> bytes:
    """Stack rows from top to bottom below paragraphs that say what they show, as the bytes of a PNG."""
    width = max(row.width for row in rows)
    words: list[Line] = [(line, FAINT) for text in legend for line in _wrapped(text, width - GAP)]
    top = LINE * len(words) + (GAP if words else 0)
    sheet = Image.new("RGB", (width, top + sum(row.height for row in rows)), "white")
    _write(sheet, words, left=2, top=2)
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def heated(picture: Image.Image, evidence: np.ndarray) -> Image.Image:
    """A grey image overlaid with a heatmap (h, w), from dark blue at its lowest to yellow at its highest value."""
    low, high = float(evidence.min()), float(evidence.max())
    scaled = (evidence - low) / (high - low if high > low else 1.0)
    heat = Image.fromarray((255 * scaled).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
    colors = ImageOps.colorize(heat, black=(0, 0, 90), mid=(200, 60, 60), white=(255, 255, 60))
    return Image.blend(picture.convert("L").convert("RGB"), colors, 0.5)


def _wrapped(text: str, width: int) -> list[str]:
    """A paragraph as lines of at most `width` pixels where its words allow."""
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and pen.textlength(_ascii(longer)) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _ascii(text: str) -> str:
    """Text that the font can draw; other letters become `?`."""
    return text.encode("ascii", "replace").decode()


def _write(sheet: Image.Image, lines: Sequence[Line], *, left: int, top: int) -> None:
    pen = ImageDraw.Draw(sheet)
    for number, (text, color) in enumerate(lines):
        pen.text((left, top + number * LINE), _ascii(text), fill=color)
