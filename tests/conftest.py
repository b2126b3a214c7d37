"""Owns the fixtures that every tier may ask for."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from dist_mlpl.tools.object_store import EmbeddedS3


@pytest.fixture(autouse=True)
def torch_seed() -> None:
    """Torch's global stream starts alike in every test, so that what a test draws depends on no other test."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def embedded_s3() -> Iterator[EmbeddedS3]:
    """One S3 server for the session, started when first asked for; the AWS variables point at it from then on."""
    with EmbeddedS3() as server:
        yield server


@pytest.fixture
def s3_bucket(embedded_s3: EmbeddedS3) -> str:
    """`s3://bucket-RANDOM`, empty, for this test alone."""
    return embedded_s3.make_bucket(f"bucket-{secrets.token_hex(6)}")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for what a module trains in this process, fixtures included: the number of threads orders the sums,
    and runs in processes of their own have one.

    For modules that ask for it by `pytest.mark.usefixtures`, which comes before all other fixtures of the module.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
