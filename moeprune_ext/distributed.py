"""What several processes share: which sequences are whose, and sums over all of them.

Under `torchrun` every process runs the same program. The sequences are dealt out, and each process computes all
candidates (or all experts' statistics) on its own sequences. Sums over processes are float64. Every candidate's score
of a sequence comes from one process, so any number of processes gives the same bits; statistics are added up over the
processes and agree up to the rounding of float64. Outside torchrun everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def join() -> None:
    """Joins the group of processes that torchrun has started, if any: gloo for CPU tensors, NCCL for CUDA."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    wait = timedelta(hours=2)
    store, rank, size = next(dist.rendezvous("env://", timeout=wait))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # On one machine torchrun restarts a failed group with the same store, which still holds the addresses of the
        # dead processes.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)


def leave() -> None:
    """Leaves the group, once every process is done."""
    if dist.is_initialized():
        dist.barrier()  # a group is not taken apart while another process still talks to it
        dist.destroy_process_group()


def world() -> tuple[int, int]:
    """Returns this process's rank and the number of processes; 0 and 1 where there is one process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first() -> bool:
    """Returns whether this is the process that writes files and prints."""
    return world()[0] == 0


def local_device() -> torch.device:
    """Returns the CUDA device of this process, by torchrun's local rank."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.cuda.device_count()))


def own_share(count: int, unit: int = 1) -> list[int]:
    """Returns the numbers in [0, count) that are this process's, dealt out `unit` neighbours at a time."""
    rank, size = world()
    return [number for number in range(count) if number // unit % size == rank]


def sum_(tensor: Tensor) -> Tensor:
    """Adds up a CPU tensor over all processes, in place."""
    if world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def maximum_(tensor: Tensor) -> Tensor:
    """Takes the maximum of every element of a CPU tensor over all processes, in place."""
    if world()[1] > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def gathered(value: T) -> list[T]:
    """Returns every process's value, in order of rank; a value is small and can be pickled between the processes."""
    if world()[1] == 1:
        return [value]
    values: list[Any] = [None] * world()[1]
    dist.all_gather_object(values, value)
    return values


def from_first(function: Callable[[], T]) -> T:
    """Calls a function in the first process only, and returns its result in every process.

    Args:
        function: returns a small value that can be pickled between the processes.

    Raises:
        ValueError: in every process, if the function raises it.
    """
    if world()[1] == 1:
        return function()
    shared: list[tuple[T | None, str | None]] = [(None, None)]
    if is_first():
        try:
            shared = [(function(), None)]
        except ValueError as error:
            shared = [(None, str(error))]
    dist.broadcast_object_list(shared, src=0)
    value, problem = shared[0]
    if problem is not None:
        raise ValueError(problem)
    return value  # type: ignore[return-value]
