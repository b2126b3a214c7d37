"""Claims about the memory of batches."""

from __future__ import annotations

import gc

import pytest
import torch

from dist_mlpl.data.collate import ImageMemory

pytestmark = pytest.mark.unit


def test_memory_is_used_again_only_when_no_tensor_is_left_of_it() -> None:
    memory = ImageMemory()
    first = memory.take(2, 4, 4, 3)
    address, row = first.data_ptr(), first.permute(0, 3, 1, 2)[1]
    row.fill_(7)
    del first
    second = memory.take(2, 4, 4, 3).fill_(9)  # a view of the first is alive
    assert second.data_ptr() != address
    assert (row == 7).all()
    del row
    gc.collect()
    assert memory.take(2, 4, 4, 5).data_ptr() != address  # of another shape
    third = memory.take(2, 4, 4, 3)
    assert third.data_ptr() == address
    assert (second == 9).all()


def test_many_batches_need_no_more_memory_than_are_alive_at_once() -> None:
    memory, alive, addresses = ImageMemory(), list[torch.Tensor](), set()
    for _ in range(50):
        alive = [*alive[-2:], memory.take(3, 8, 8, 3)]
        addresses.add(alive[-1].data_ptr())
    assert len(addresses) <= 4
