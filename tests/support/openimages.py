"""Owns small files in the forms that Open Images publishes, and where its real metadata lie."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

_DATA = os.environ.get("MLPL_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data")
METADATA = Path(_DATA, "meta", "openimages")

TREE, DOG, CAT, PET, WHEEL = "/m/07j7r", "/m/0bt9lr", "/m/01yrx", "/g/11jy976z6", "/m/083wq"

LABEL_HEADER = "ImageID,Source,LabelName,Confidence\n"
BOX_HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
)
IMAGE_HEADER = (
    "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,OriginalMD5,"
    "Thumbnail300KURL,Rotation\n"
)
_FILES = ("classes", "descriptions", "hierarchy")  # options that name one file
_SEVERAL = ("human", "machine", "boxes", "image_lists")


def image_row(image: str, *, subset: str = "train", title: str = "...die FNF-Kerze", rotation: str = "0.0") -> str:
    """A row of an image list, quoted where needed."""
    text = io.StringIO()
    url = "https://farm3.staticflickr.com/5310/5898076654_51085e157c_o.jpg"
    place, profile = (
        "https://www.flickr.com/photos/michael-beat/5898076654",
        "https://www.flickr.com/people/michael-beat/",
    )
    licence, digest = "https://creativecommons.org/licenses/by/2.0/", "KFukvivpCM5QXl5SqKe41g=="
    cells = [image, subset, url, place, licence, profile, "Michael Beat", title, "4405052", digest, "", rotation]
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def write(folder: Path, option: str, value: Any) -> Any:
    """The value of an option whose contents were written into files: NAME.csv, or NAME-0.csv and on for a list."""
    if option in _FILES and "\n" not in value and Path(value).is_absolute() and Path(value).suffix:
        return value
    if option in _SEVERAL and isinstance(value, tuple):
        return value  # paths
    if option not in _FILES + _SEVERAL:
        return value
    contents = (
        {f"{option}-{place}": part for place, part in enumerate(value)} if isinstance(value, list) else {option: value}
    )
    paths = []
    for name, content in contents.items():
        paths.append(folder / f"{name}.csv")
        paths[-1].write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(paths[0]) if option in _FILES else tuple(map(str, paths))
