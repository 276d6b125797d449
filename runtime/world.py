"""The processes of a run: ranks from torchrun's environment, sums over them, work of rank 0."""

import datetime
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from runtime.command_line import UserError, say
from runtime.device import keep_freed_memory, pick_device, use_deterministic_kernels

# What a compilation may take before it counts as a hang: gpt2-xl on a machine of few cores may need
# half of it.
COMPILE_SECONDS = 3600


class World(NamedTuple):
    """Where this process stands among those of the run."""

    rank: int  # 0 without torchrun
    world_size: int  # 1 without torchrun
    device: torch.device


def join_world(device: str, timeout: float = 600, deterministic: bool = False) -> World:
    """Choose the device and, when torchrun started this process, join the process group.

    NCCL serves tensors on GPUs, gloo those in host memory. Raises UserError when there is no such
    device.
    """
    if deterministic:
        # read by cuBLAS when it starts, and by torch's compiler, which else chooses among
        # reductions by timing them
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if deterministic:
        use_deterministic_kernels(chosen)
    on_gpu = chosen.type == "cuda"
    if chosen.type == "cpu":
        keep_freed_memory()
        if deterministic:
            torch.set_num_threads(1)
    if "RANK" in os.environ and not dist.is_initialized():
        warn_of_restarts()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            device_id=chosen if on_gpu else None,
            # Later than the watchdog's limit (Stop), which gives the better message and also kills
            # the hanging process. Ranks wait here for one that still compiles.
            timeout=datetime.timedelta(seconds=max(timeout, COMPILE_SECONDS) + 15),
        )
    return World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), chosen)


def warn_of_restarts():
    """Say so when torchrun is to restart processes and may fail to (pytorch#135712)."""
    own_store = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1"
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not own_store:
        say(
            "torchrun | a restart may fail without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in front "
            "(pytorch#135712)"
        )


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Add `values` up over all ranks, in place, and return them."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def on_rank0(make: Callable):
    """Run make() on rank 0 and return its result on every rank; a UserError in it ends all."""
    result, error = None, None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = make()
        except UserError as e:
            error = str(e)
    if dist.is_initialized():
        box = [result, error]
        dist.broadcast_object_list(box, 0)
        result, error = box
        if error is not None and dist.get_rank() != 0:
            sys.exit(2)  # rank 0 prints the message
    if error is not None:
        raise UserError(error)
    return result
