"""A step's micro-batches are read one step ahead, and the ranks agree on them by numbers that are summed elsewhere."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ddk_ds.comm import SingleProcess
from ddk_ds.errors import DataError, TemporaryError, UserError
from ddk_ds.train.interruption import Interrupted, Interruption
from ddk_ds.train.step_reader import StepReader

CPU = torch.device("cpu")


class OfTwo(SingleProcess):
    """A rank whose peer has these numbers and this error."""

    def __init__(self, numbers: list[float], error: UserError | None = None) -> None:
        self._numbers, self._error = numbers, error

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + torch.tensor(self._numbers, dtype=tensor.dtype)

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, self._error]


def reader_of(batches: Iterator[Any], micro_batches: int = 2) -> tuple[StepReader, Interruption]:
    interruption = Interruption(SingleProcess(), CPU)
    return StepReader(batches, micro_batches, interruption), interruption


def test_each_step_is_read_before_it_is_agreed_on_and_the_last_is_empty() -> None:
    read: list[int] = []

    def batches() -> Iterator[Any]:
        for number in range(4):
            read.append(number)
            yield number

    reader, _ = reader_of(batches())
    assert reader.first(SingleProcess(), CPU) == [0, 1] and read == [0, 1]
    assert reader.read() == [0.0] * 5 and read == [0, 1, 2, 3]
    assert reader.agreed(SingleProcess(), [0.0] * 5) == [2, 3]
    reader.read()
    assert reader.agreed(SingleProcess(), [0.0] * 5) == []
    assert reader.take_seconds() > 0 and reader.take_seconds() == 0


def test_a_rank_that_cannot_read_is_heard_by_all_and_a_signal_comes_first() -> None:
    def failing() -> Iterator[Any]:
        yield 0
        raise TemporaryError("the store does not answer")

    reader, _ = reader_of(failing(), 1)
    assert reader.first(OfTwo([0.0] * 5), CPU) == [0]
    assert reader.read()[0] == 1.0
    with pytest.raises(TemporaryError, match="does not answer"):
        reader.agreed(SingleProcess(), [1.0, 0, 0, 0, 0])
    healthy, interruption = reader_of(iter([0, 1]), 1)
    with pytest.raises(DataError, match="a shard is damaged"):
        healthy.first(OfTwo([1.0, 0, 0, 0, 0], DataError("a shard is damaged")), CPU)
    interruption.signal = signal.SIGUSR1
    numbers = healthy.read()
    assert numbers == [0.0, 0.0, 1.0, 0.0, 0.0]
    with pytest.raises(Interrupted, match="SIGTERM"):  # the peer's, of the higher number
        healthy.agreed(SingleProcess(), [1.0, 1.0, *numbers[2:]])
