"""Owns the registry: which methods there are. A new method is one row here."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from dist_mlpl.methods.base import MethodSettings
from dist_mlpl.methods.csl import CslSettings
from dist_mlpl.methods.partial_bce import PartialBceSettings
from dist_mlpl.methods.single_positive import SinglePositiveSettings

METHODS: dict[str, type[MethodSettings]] = {
    "csl": CslSettings,
    "partial_bce": PartialBceSettings,
    "single_positive": SinglePositiveSettings,
}

if TYPE_CHECKING:
    AnyMethodSettings = MethodSettings
else:  # the settings of one row, chosen by their `name`; built from the rows, so that a row is all it takes
    AnyMethodSettings = Annotated[reduce(or_, METHODS.values()), Field(discriminator="name")]
