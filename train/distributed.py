"""The processes that torchrun started, or a single process.

Control values are exchanged over gloo on the CPU, so that they never make a GPU wait. Gradients and losses
are summed over the device's own backend (NCCL on CUDA, gloo on the CPU).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lora.quantised.tensor import QuantisedTensor


@dataclass(frozen=True)
class World:
    """A process' `rank` among `size` processes. Only the main process writes files and prints."""

    rank: int = 0
    size: int = 1
    control_group: Any = None  # gloo

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def max_over_processes(self, value: int) -> int:
        """The largest `value` of all processes."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control_group)
        return int(largest)

    def sum_over_processes_(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over all processes, in place, on its device."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Waits until every process has reached this call."""
        if self.size > 1:
            dist.barrier(group=self.control_group)


SINGLE_PROCESS = World()


def data_parallel(model: nn.Module) -> DistributedDataParallel:
    """The model in DistributedDataParallel, inside `join_world`.

    Quantised weights are left out of what it copies from the first process: every process has them already,
    from the same file, and they cannot be written to.
    """
    quantised = [name for name, p in model.named_parameters() if isinstance(p, QuantisedTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, quantised)  # type: ignore[no-untyped-call]
    return DistributedDataParallel(model, forward_sync_buffers=False)


def local_rank() -> int:
    """The rank among the processes on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def env_rank() -> int:
    """The rank that torchrun set, available before `join_world`."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Context in which the processes that torchrun started communicate; otherwise a single process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield SINGLE_PROCESS
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()
