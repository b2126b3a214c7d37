"""Claims about communication of a lone process: every verb is the identity."""

from __future__ import annotations

import pytest
import torch

from dist_mlpl import comm

pytestmark = pytest.mark.unit


def test_a_lone_process_is_rank_0_of_1() -> None:
    assert (comm.rank(), comm.world_size()) == (0, 1)


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int8, torch.bool])
def test_tensors_come_back_as_they_went(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = tensor.clone()
    verbs = [comm.reduce_sum, comm.reduce_max, comm.broadcast_tensor]
    for verb in verbs if shape == () else [*verbs, comm.gather_rows]:
        found = verb(tensor)
        assert found is tensor
        assert torch.equal(found, before)
    if shape:
        rows, counts = comm.exchange(tensor, [len(tensor)])
        assert rows is tensor
        assert counts == [len(tensor)]


def test_objects_come_back_as_they_went() -> None:
    value = {"a": [1, None]}
    assert comm.gather_objects(value) == [value]
    assert comm.broadcast_object(value) is value
