"""Experiments in this process, on the CPU, under a clock that a test moves."""

import contextlib
import time
from collections.abc import Iterator

import pytest
import torch

from prepare import VOCAB_SIZE, Experiment

CPU = torch.device("cpu")
torch.set_num_threads(
    1
)  # with two of them the metric takes three times the CPU time, and no less of the other


def toy(description: str = "toy") -> Experiment:
    """An Experiment on the CPU, whatever this machine has."""
    run = Experiment(description)
    run.device = CPU
    return run


def uniform(inputs: torch.Tensor) -> torch.Tensor:
    """A model without any knowledge."""
    return torch.zeros(VOCAB_SIZE, device=inputs.device).expand(*inputs.shape, VOCAB_SIZE)


class StillClock:
    """The time stands still unless a test adds to `now`."""

    now = 1000.0


@contextlib.contextmanager
def still_clock() -> Iterator[StillClock]:
    """What time.perf_counter says within the block."""
    clock = StillClock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: clock.now)
        yield clock


def keep_cuda_busy() -> None:
    """For 0.15 to 0.3 s, for which the host does not wait."""
    torch.cuda._sleep(300_000_000)  # cycles
