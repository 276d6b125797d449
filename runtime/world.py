"""The processes of a run: ranks from torchrun's environment, sums over them, work of rank 0."""

import datetime
import math
import os
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from runtime.cgroup import control_groups, cpu_quota
from runtime.command_line import UserError, last_words, one_line, say
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
    device, for a part of torchrun's variables, and when other processes do not come.
    """
    rank, world_size = read_rank_and_world_size()
    if not 0 < timeout < 1e9:  # NaN, too
        raise UserError(
            f"group_timeout is {timeout} seconds, must be above 0 and below 1e9; "
            "hint: --group_timeout 600"
        )
    if deterministic:
        # read by cuBLAS when it starts, and by torch's compiler, which otherwise chooses
        # among reductions by timing them
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    chosen = pick_device(device, whole_number("LOCAL_RANK"))
    if deterministic:
        use_deterministic_kernels(chosen)
    if chosen.type == "cpu":
        keep_freed_memory()
        limit_threads()
        if deterministic:
            torch.set_num_threads(1)
    if is_set("RANK") and not dist.is_initialized():
        warn_of_restarts()
        make_process_group(chosen, world_size, timeout)
    return World(rank, world_size, chosen)


# --------------------------------------------------------------------------------------------------
# torchrun's environment

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# How other launchers count the copies that they start, by the name of the launcher.
COPIES = {
    "srun": "SLURM_STEP_NUM_TASKS",
    "mpirun (Open MPI)": "OMPI_COMM_WORLD_SIZE",
    "mpirun": "PMI_SIZE",
}


def is_set(name: str) -> bool:
    """Return whether an environment variable has a value; an empty one has none."""
    return bool(os.environ.get(name))


def whole_number(name: str, least: int = 0) -> int:
    """Return an environment variable as a number, `least` without it. Raises UserError."""
    text = os.environ.get(name) or str(least)
    if not text.isdecimal() or int(text) < least:
        raise UserError(
            f"{name} is {text!r} in the environment, expected a whole number from {least} on; "
            f"hint: unset {name}, or start with torchrun, which sets it"
        )
    return int(text)


def read_rank_and_world_size() -> tuple[int, int]:
    """Return rank and world size from torchrun's environment, (0, 1) without it.

    Raises UserError for a part of its variables: another launcher's, or left from an old export.
    """
    present = [name for name in LAUNCHER if is_set(name)]
    missing = [name for name in LAUNCHER if not is_set(name)]
    # the address alone means nothing: cluster software sets it for programs that may want it
    if not is_set("RANK") and not is_set("WORLD_SIZE"):
        warn_of_copies()
        return 0, 1
    if missing:
        raise UserError(
            f"torchrun's variables are incomplete: {', '.join(present)} set, "
            f"{', '.join(missing)} not; "
            f"hint: unset {' '.join(present)}, or torchrun --nproc_per_node=N in place of python"
        )
    rank, world_size = whole_number("RANK"), whole_number("WORLD_SIZE", least=1)
    whole_number("MASTER_PORT")
    if rank >= world_size:
        raise UserError(
            f"RANK is {rank} of WORLD_SIZE {world_size} in the environment, must be below it; "
            "hint: torchrun sets both"
        )
    return rank, world_size


def warn_of_copies():
    """Say so when a launcher has started several copies that do not know of each other."""
    for launcher, name in COPIES.items():
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 1:
            say(
                f"processes | {launcher} has started {count} copies of this program, and each is a "
                "run of its own: torchrun is missing; hint: torchrun --nproc_per_node=N in place "
                "of python, one on each machine, or runs/slurm.sh"
            )
            return


def make_process_group(device: torch.device, world_size: int, timeout: float):
    """Wait for the other processes, then make the process group. Raises UserError without them.

    Ends this process when they are there and yet no group comes about.
    """
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    others = f"{world_size - 1} other processes at {address}"
    late = threading.Timer(10, say, [f"processes | still waiting for {others}"])
    late.daemon = True
    late.start()
    hanging = threading.Timer(timeout, end_hanging, [timeout, others])
    hanging.daemon = True
    on_gpu = device.type == "cuda"
    try:
        seconds = datetime.timedelta(seconds=timeout)
        store, rank, world_size = next(rendezvous("env://", timeout=seconds))
        hanging.start()
        # Later than the watchdog's limit (Stop), which gives the better message and also kills the
        # hanging process. Ranks wait here for one that still compiles.
        seconds = datetime.timedelta(seconds=max(timeout, COMPILE_SECONDS) + 15)
        store.set_timeout(seconds)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("default_pg", store),  # as torch itself does
            rank=rank,
            world_size=world_size,
            device_id=device if on_gpu else None,
            timeout=seconds,
        )
    except (dist.DistStoreError, dist.DistNetworkError) as e:
        raise UserError(
            f"waited {timeout:g} s for {others} ({one_line(e)}); hint: start all of them, with "
            "torchrun, and the same MASTER_ADDR and MASTER_PORT; --group_timeout waits longer"
        ) from None
    finally:
        late.cancel()
        hanging.cancel()


def end_hanging(timeout: float, others: str):
    """End this process, which hangs while the process group is made (a thread)."""
    last_words(
        f"error (rank {os.environ['RANK']}): no process group after {timeout:g} s with {others}; "
        "hint: NCCL_DEBUG=INFO in front tells more; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME "
        "name the network interface (notes/running.md)"
    )
    os._exit(1)


def limit_threads():
    """Use no more threads than the CPUs that a container is granted: more would only be halted.

    torch counts the machine's cores. OMP_NUM_THREADS decides when it is given.
    """
    quota = cpu_quota(control_groups("cpu"))
    threads = torch.get_num_threads()
    if quota is None or is_set("OMP_NUM_THREADS") or math.ceil(quota) >= threads:
        return
    torch.set_num_threads(math.ceil(quota))
    say(
        f"threads | {math.ceil(quota)} of {threads}: the container may use {quota:g} CPUs at a "
        "time; OMP_NUM_THREADS overrides this"
    )


def warn_of_restarts():
    """Say so when torchrun is to restart processes and may fail to (pytorch#135712)."""
    own_store = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1"
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and not own_store:
        say(
            "torchrun | a restart may fail without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in front "
            "(pytorch#135712)"
        )


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Add `values` up over all ranks, in place, and return them."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def min_over_ranks(value: float) -> float:
    """Return the smallest value of all ranks."""
    if not dist.is_initialized():
        return value
    smallest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return smallest.item()


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
