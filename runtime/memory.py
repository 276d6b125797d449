"""Memory: how much is free, what an out-of-memory error looks like, the micro-batch that fits."""

import re
import resource
import sys
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from runtime.cgroup import control_groups, memory_left, read_text
from runtime.command_line import UserError, say
from runtime.device import Compute
from runtime.world import World, sum_over_ranks


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still allocate on a device.

    On a CPU that is the least of what the machine, the container and this process's limits leave.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if sys.platform != "linux":
        return 2**33  # unknown
    numbers = re.findall(
        r"^(\w+):\s+(\d+) kB", read_text("/proc/meminfo") + read_text("/proc/self/status"), re.M
    )
    kilobytes = {name: int(number) for name, number in numbers}
    limits = [1024 * kilobytes["MemAvailable"]]
    of_group = memory_left(control_groups("memory"))
    if of_group is not None:
        limits.append(of_group)
    for name, limit in (("VmSize", resource.RLIMIT_AS), ("VmData", resource.RLIMIT_DATA)):
        soft_limit = resource.getrlimit(limit)[0]
        if soft_limit != resource.RLIM_INFINITY:
            limits.append(soft_limit - 1024 * kilobytes[name])
    return max(0, min(limits))


# torch's allocator on a CPU, C++; CUDA, Triton and NCCL; cuBLAS
OUT_OF_MEMORY = ("DefaultCPUAllocator", "bad_alloc", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(e: BaseException) -> bool:
    """Return whether an exception means out of memory.

    It is a type of its own from torch's allocator on a GPU, and a message in a RuntimeError from
    other libraries there and on a CPU.
    """
    if isinstance(e, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(e, RuntimeError) and any(text in str(e) for text in OUT_OF_MEMORY)


def bytes_per_token(model, compute: Compute) -> int:
    """Estimate the activation memory of one token in a forward and backward pass, in bytes.

    In bf16: 34 C per layer (Korthikanti et al. 2022, attention matrix not stored), 8 V for the
    logits and their gradient. With --recompute 2 C per layer, plus 34 C for the layer being
    recomputed.
    """
    config = model.config
    per_layer = 2 * config.n_layer + 34 if model.recompute else 34 * config.n_layer
    in_bf16 = per_layer * config.n_embd + 8 * config.vocab_size
    return in_bf16 if compute.dtype == torch.bfloat16 else 2 * in_bf16


def fit_batch(cfg, model, train_model, compute: Compute, reserved: int, world: World) -> int:
    """Return the largest micro-batch that divides the global batch and fits in memory.

    It must fit together with `reserved` bytes that training takes later. Tried on all processes at
    once, from an estimate downwards. Raises UserError when not even one sequence fits.
    """
    on_gpu = world.device.type == "cuda"
    free = free_memory(world.device)
    sequences = cfg.total_batch // (cfg.T * world.world_size)  # of a process, per optimizer step
    useful = (131072 if on_gpu else 8192) // cfg.T  # more tokens at once gain no speed
    per_sequence = cfg.T * bytes_per_token(model, compute)
    # A GPU raises out-of-memory, so trying 1.5 times the free memory is safe. On a CPU the kernel
    # kills the process, and the heap grows to twice what is in use because freed memory is kept.
    usable = (1.5 if on_gpu else 0.4) * free - reserved
    for B in range(min(sequences, max(1, useful)), 0, -1):
        if sequences % B:
            continue
        fitting = B == 1 or B * per_sequence <= usable
        if fitting:
            fitting = fits(train_model, B, cfg.T, reserved, compute)
        if sum_over_ranks(torch.tensor(float(fitting))).item() == world.world_size:
            say(
                f"batch | B = {B} is the largest that divides the batch and fits into "
                f"{free / 1e9:.1f} GB"
            )
            return B
        torch.compiler.reset()
        if on_gpu:
            torch.cuda.empty_cache()
    raise UserError(
        f"not even one sequence of T = {cfg.T} fits into {free / 1e9:.1f} GB; "
        f"hint: --recompute True, or --T {cfg.T // 2}"
    )


def fits(train_model, B: int, T: int, reserved: int, compute: Compute) -> bool:
    """Try a forward and a backward pass on (B, T) tokens beside `reserved` allocated bytes.

    DDP exchanges no gradients here: a rank whose memory runs out would leave the others waiting.
    """
    exchange = train_model.no_sync() if isinstance(train_model, DDP) else nullcontext()
    try:
        room = torch.empty(reserved, dtype=torch.uint8, device=compute.device)
        with exchange:
            compute.try_pass(train_model, B, T)
        del room
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        return False
    finally:
        train_model.zero_grad(set_to_none=True)
    return True
