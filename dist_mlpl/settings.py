"""Owns how every settings class behaves: frozen, closed to unknown keys, defaults checked."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of every part of the config and of every document in JSON.

    Each room defines its own subclass beside what it sets; `dist_mlpl.config` composes them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
