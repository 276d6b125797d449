"""One process or many: torchrun's environment in, rank and device out."""

import ctypes
import os
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist

from config import UserError, one_line


class World(NamedTuple):
    rank: int  # 0 without torchrun
    world_size: int  # 1 without torchrun
    device: torch.device


def pick_device(wanted: str, local_rank: int = 0) -> torch.device:
    """cuda, mps or cpu; "auto" takes the first that is there. Raises UserError when the wanted one is not."""
    there = [("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()), ("cpu", True)]
    names = [name for name, ok in there if ok]
    kind = names[0] if wanted == "auto" else wanted.split(":")[0]
    if kind not in names:
        raise UserError(f"device {wanted!r} is not there, this machine has {', '.join(names)}; hint: --device {names[0]}")
    if kind == "cuda":
        index = int(wanted.split(":")[1]) if ":" in wanted else local_rank
        if index >= torch.cuda.device_count():
            raise UserError(f"GPU {index} is not there, this machine has {torch.cuda.device_count()}; "
                            f"hint: --nproc_per_node={torch.cuda.device_count()}")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device(kind)


def keep_freed_memory():
    """Have glibc keep freed blocks instead of handing them back to the kernel, which zeroes them page by page when they
    are wanted again: activations of the same sizes come and go in every step. On a CPU only; costs some peak memory."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt and mallopt(option, value)


def setup(wanted_device: str) -> World:
    """Join the process group when torchrun started us: NCCL on GPUs, gloo elsewhere."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(wanted_device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cpu":
        keep_freed_memory()
    if "RANK" in os.environ:
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    return World(rank, world_size, device)


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, on the device that the process group works on; without torchrun the values as they are."""
    if dist.is_initialized():
        values = values.cuda() if dist.get_backend() == "nccl" else values
        dist.all_reduce(values)
    return values


def barrier():
    if dist.is_initialized():
        dist.barrier()


def autocast_dtype(device: torch.device, wanted: str) -> torch.dtype:
    """Type of the matmuls: bfloat16 where the hardware multiplies it natively, else float32 (T4, V100, older CPUs, MPS).

    On a CPU that means AMX or AVX512-BF16: without them bf16 is emulated, several times slower than float32.
    """
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        flags = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        native = device.type == "cpu" and any(getattr(torch.cpu, flag, bool)() for flag in flags)
    return torch.bfloat16 if native else torch.float32


def compile_error(device: torch.device) -> str | None:
    """Why torch.compile cannot build a kernel here, or None: it needs a C++ compiler on the CPU, Triton on a GPU."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as e:  # each backend has its own
        return one_line(e)
