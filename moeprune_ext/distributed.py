"""What several processes share: which sequences are whose, and sums over all of them.

Under `torchrun` every process runs the same program; the data's sequences are dealt out, and each process computes all
candidates (or all experts' statistics) on its own. What is added up crosses processes in float64: of scores each number
comes from one process, so that any number of processes gives the same bits; statistics are sums of every process's,
equal up to the rounding of float64. Outside torchrun everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def join() -> None:
    """Joins the group that torchrun has started, if it has: gloo for tensors on the CPU, NCCL on CUDA."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    wait = timedelta(hours=2)
    store, rank, size = next(dist.rendezvous("env://", timeout=wait))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # On one machine torchrun restarts a group on the store of the one that failed, where the addresses of its dead
        # processes still stand.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)


def leave() -> None:
    """Leaves the group again, once every process is done."""
    if dist.is_initialized():
        dist.barrier()  # a group is not taken apart while another process still talks to it
        dist.destroy_process_group()


def world() -> tuple[int, int]:
    """(rank, processes); (0, 1) where there is one process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return world()[0] == 0


def local_device() -> torch.device:
    """The CUDA device of this process, by torchrun's local rank."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.cuda.device_count()))


def mine(count: int, unit: int = 1) -> list[int]:
    """The numbers in [0, count) that are this process's share, dealt out `unit` neighbours at a time."""
    rank, size = world()
    return [number for number in range(count) if number // unit % size == rank]


def sum_(tensor: Tensor) -> Tensor:
    """Adds up a CPU tensor over all processes, in place."""
    if world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def maximum_(tensor: Tensor) -> Tensor:
    """The largest over all processes of a CPU tensor's every element, in place."""
    if world()[1] > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def from_first(function: Callable[[], T]) -> T:
    """What `function` returns in the first process, which alone calls it, in every process; its ValueError likewise.

    For small values that can be sent as they are.
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
