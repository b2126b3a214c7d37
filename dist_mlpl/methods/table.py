"""Owns the registry of methods. A new method is one row here."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from dist_mlpl.methods.base import MethodSettings
from dist_mlpl.methods.blending import BlendingSettings
from dist_mlpl.methods.csl import CslSettings
from dist_mlpl.methods.partial_bce import PartialBceSettings
from dist_mlpl.methods.single_positive import SinglePositiveSettings
from dist_mlpl.methods.spatial_consistency import SpatialConsistencySettings
from dist_mlpl.methods.srn import SrnSettings
from dist_mlpl.methods.sst import SstSettings

METHODS: dict[str, type[MethodSettings]] = {
    "blending": BlendingSettings,
    "csl": CslSettings,
    "partial_bce": PartialBceSettings,
    "single_positive": SinglePositiveSettings,
    "spatial_consistency": SpatialConsistencySettings,
    "srn": SrnSettings,
    "sst": SstSettings,
}

if TYPE_CHECKING:
    AnyMethodSettings = MethodSettings
else:  # the settings of the row that `name` selects; built from the rows, so that a new method needs only a row
    AnyMethodSettings = Annotated[reduce(or_, METHODS.values()), Field(discriminator="name")]
