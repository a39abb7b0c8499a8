"""One process among several, as torchrun starts them; a world of one where it did not.

What is agreed on goes over gloo on the CPU, so that agreeing never makes a GPU wait; gradients and sums
of losses go over the device's own engine (NCCL on CUDA, gloo on the CPU).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """Where a process stands: `rank` of `size`; `main` alone writes files and talks."""

    rank: int = 0
    size: int = 1
    agreeing: Any = None  # the gloo group

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def max_over_processes(self, value: int) -> int:
        """The largest of every process's `value`: true everywhere if it is true somewhere."""
        if self.size == 1:
            return value
        agreed = torch.tensor(value)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.agreeing)
        return int(agreed)

    def sum_over_processes_(self, tensor: Tensor) -> Tensor:
        """Adds up `tensor` over all processes, in place, on its own device."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier(group=self.agreeing)


SINGLE_PROCESS = World()


def local_rank() -> int:
    """Which of this machine's processes this is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def env_rank() -> int:
    """The rank that torchrun gave, before anything is set up."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """The processes that torchrun started, joined; a world of one otherwise."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield SINGLE_PROCESS
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()
