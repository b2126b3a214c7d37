"""Owns the fixtures that every tier may ask for."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from dist_mlpl.tools.object_store import EmbeddedS3


@pytest.fixture(scope="session")
def embedded_s3() -> Iterator[EmbeddedS3]:
    """One S3 server for the session, started when first asked for; the AWS variables point at it from then on."""
    with EmbeddedS3() as server:
        yield server


@pytest.fixture
def s3_bucket(embedded_s3: EmbeddedS3) -> str:
    """`s3://bucket-RANDOM`, empty, for this test alone."""
    return embedded_s3.make_bucket(f"bucket-{secrets.token_hex(6)}")
