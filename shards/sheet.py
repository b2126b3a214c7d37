"""Owns drawing a contact sheet: images in a grid with their labels below, as an image or an HTML page."""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Sequence
from html import escape
from math import ceil, sqrt
from typing import Final, NamedTuple, cast

from PIL import Image, ImageDraw, ImageFont

from dist_mlpl.labels import ABSENT, PRESENT, UNKNOWN
from shards.sample import UNREADABLE, open_jpeg

_CELL, _PICTURE, _GAP, _MARGIN, _LINE = 250, 190, 14, 18, 18  # pixels
_MAX_LINES = 7  # most lines of labels below an image
_WORD_GAP = 12  # pixels between labels
_COLUMNS = 6
_PAPER, _FRAME = "#ffffff", "#eceef0"
INK, FAINT = "#24292f", "#6e7781"
# UNKNOWN stands for labels that only a machine calls present.
COLOURS: Final = {PRESENT: "#1a7f37", ABSENT: "#c0392b", UNKNOWN: "#8250df"}

Title = Sequence[tuple[str, str]]  # (text, colour): the title itself, then the legend


class Label(NamedTuple):
    """One label of an image."""

    name: str
    value: int  # PRESENT or ABSENT; UNKNOWN for a label that only a machine calls present
    note: str = ""  # shown after the name, in full even if the name is cut


class Cell(NamedTuple):
    """One image of a sheet."""

    key: str
    picture: Image.Image | None  # fits its place in the cell; None: it does not decode
    labels: list[Label]


def thumbnail(content: bytes) -> Image.Image | None:
    """A JPEG scaled to fit a cell; None if it does not decode."""
    try:
        with open_jpeg(content) as image:
            image.draft("RGB", (2 * _CELL, 2 * _PICTURE))  # decode at reduced size
            small = image.convert("RGB")
    except UNREADABLE:
        return None
    scale = min(_CELL / small.width, _PICTURE / small.height)
    width, height = (max(1, round(side * scale)) for side in small.size)
    return small.resize((width, height), Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)


class _Words(NamedTuple):
    """A piece of text and its position in pixels, relative to its cell."""

    x: float
    y: int
    text: str
    colour: str


def draw_sheet(title: Title, cells: Sequence[Cell]) -> Image.Image:
    """The sheet as an image; letters outside ASCII lose their accents or become question marks, unlike in a page."""
    font, small, large = (_font(size) for size in (13, 12, 17))
    columns = min(_COLUMNS, max(2, ceil(sqrt(len(cells)))), max(2, len(cells)))
    blocks = [_label_lines(cell.labels, font) for cell in cells]
    rows = [range(start, min(start + columns, len(cells))) for start in range(0, len(cells), columns)]
    text_heights = [max((blocks[number][-1].y + _LINE if blocks[number] else 0) for number in row) for row in rows]
    width = 2 * _MARGIN + columns * _CELL + (columns - 1) * _GAP
    heading = _heading(title, large, width - 2 * _MARGIN)
    top = _MARGIN + heading[-1].y + 34
    height = top + sum(_PICTURE + 24 + text + _GAP for text in text_heights) + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for words in heading:
        draw.text((_MARGIN + words.x, _MARGIN + words.y), words.text, font=large, fill=words.colour)
    y = top
    for row, text_height in zip(rows, text_heights, strict=True):
        for place, number in enumerate(row):
            x = _MARGIN + place * (_CELL + _GAP)
            draw.rectangle((x, y, x + _CELL - 1, y + _PICTURE - 1), fill=_FRAME)
            picture = cells[number].picture
            if picture is None:
                draw.text((x + _CELL // 2, y + _PICTURE // 2), "does not decode", font=font, fill=FAINT, anchor="mm")
            else:
                sheet.paste(picture, (x + (_CELL - picture.width) // 2, y + (_PICTURE - picture.height) // 2))
            draw.text((x, y + _PICTURE + 4), _fitted(cells[number].key, small, _CELL), font=small, fill=FAINT)
            for words in blocks[number]:
                draw.text((x + words.x, y + _PICTURE + 22 + words.y), words.text, font=font, fill=words.colour)
        y += _PICTURE + 24 + text_height + _GAP
    return sheet


def _heading(title: Title, font: ImageFont.FreeTypeFont, width: int) -> list[_Words]:
    """The title on its own line, cut if too wide, and the legend below it."""
    (words, colour), *key = title
    placed, x = [_Words(0, 0, _fitted(words, font, width), colour)], 0.0
    for word, tint in key:
        placed.append(_Words(x, 24, word, tint))
        x += font.getlength(word) + 18
    return placed


def _label_lines(labels: Sequence[Label], font: ImageFont.FreeTypeFont) -> list[_Words]:
    """Labels laid out in lines of a cell's width; those that do not fit are counted at the end of the last line."""
    placed: list[_Words] = []
    x, line = 0.0, 0
    for number, label in enumerate(labels):
        note = f" {label.note}" if label.note else ""
        text = _fitted(label.name, font, _CELL - font.getlength(note)) + note
        length, rest = font.getlength(text), len(labels) - number
        if x and x + length > _CELL and line < _MAX_LINES - 1:
            x, line = 0.0, line + 1
        # The last line keeps room for the number of labels left out.
        room = _CELL - (_WORD_GAP + font.getlength(f"+ {rest - 1} more") if rest > 1 else 0)
        if line == _MAX_LINES - 1 and x + length > room:
            return [*placed, _Words(x, line * _LINE, f"+ {rest} more", FAINT)]
        placed.append(_Words(x, line * _LINE, text, COLOURS[label.value]))
        x += length + _WORD_GAP
    return placed or [_Words(0, 0, "nothing known", FAINT)]


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in font, so that a sheet looks the same everywhere; it covers only ASCII."""
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text in ASCII, or as much of its beginning as fits before three dots."""
    plain = unicodedata.normalize("NFKD", text)
    text = "".join(letter if letter.isascii() else "?" for letter in plain if not unicodedata.combining(letter))
    if font.getlength(text) <= width:
        return text
    end = len(text)
    while end > 1 and font.getlength(text[:end].rstrip() + "...") > width:
        end -= 1
    return text[:end].rstrip() + "..."


_STYLE = f"""
body {{ font: 14px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif; color: {INK}; margin: 1.5rem; }}
h1 {{ font-size: 1.2rem; margin: 0; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax({_CELL}px, 1fr)); gap: 1.2rem;
margin-top: 1rem; }}
figure {{ margin: 0; }} .picture {{ background: {_FRAME}; height: {_PICTURE}px; display: flex; align-items: center;
justify-content: center; color: {FAINT}; }} .picture img {{ max-width: 100%; max-height: 100%; }}
.key {{ color: {FAINT}; font-size: 12px; overflow-wrap: anywhere; }} span.label {{ margin-right: .8em; }}
"""


def sheet_page(title: Title, cells: Sequence[Cell]) -> str:
    """The sheet as one self-contained HTML page with embedded thumbnails."""
    (words, _), *key = title
    figures = []
    for cell in cells:
        image = "does not decode" if cell.picture is None else f'<img alt="" src="{_embedded(cell.picture)}">'
        labels = "".join(
            f'<span class="label" style="color:{COLOURS[label.value]}">'
            f"{escape(f'{label.name} {label.note}'.rstrip())}</span> "
            for label in cell.labels
        )
        figures.append(
            f'<figure><div class="picture">{image}</div><div class="key">{escape(cell.key)}</div>'
            f"<figcaption>{labels or 'nothing known'}</figcaption></figure>"
        )
    legend = "".join(f'<span class="label" style="color:{colour}">{escape(word)}</span>' for word, colour in key)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(words)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(words)}</h1><p>{legend}</p>\n<main>\n"
        + "\n".join(figures)
        + "\n</main></body></html>\n"
    )


def _embedded(picture: Image.Image) -> str:
    target = io.BytesIO()
    picture.save(target, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(target.getvalue()).decode()
