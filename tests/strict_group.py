"""Run a script in a process group that refuses what NCCL refuses.

    torchrun --nproc_per_node=2 tests/strict_group.py SCRIPT ARGS

The tests run on gloo, which takes more than NCCL does: tensors with any strides (of which it makes
wrong results in silence, pytorch#192920), and types that NCCL has not. conftest.run(nproc=...)
starts every script through this file, so that no multi-process test passes with a call that would
end a run on GPUs. What DDP sends itself is flat and contiguous, and is not looked at.
"""

import functools
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

CPU = torch.device("cpu")
# All functions of torch.distributed that hand the caller's tensors to the back end.
COLLECTIVES = (
    "all_gather all_gather_into_tensor all_gather_single all_reduce all_to_all all_to_all_single "
    "broadcast gather irecv isend recv reduce reduce_scatter reduce_scatter_single "
    "reduce_scatter_tensor scatter send"
).split()
# ProcessGroupNCCL.cpp, getNcclDataType, torch 2.13, without the 8-bit floats
NCCL_TYPES = (
    torch.bool,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
BITWISE = (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR)


def tensors_of(arguments) -> Iterator[torch.Tensor]:
    """Yield the tensors among the arguments of a call, those in lists included."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from tensors_of(argument)


def check(name: str, arguments: list, devices: tuple[torch.device, ...] = (CPU,)):
    """Raise ValueError for arguments of a collective that NCCL would refuse.

    devices: where the back ends of this process group take tensors, all of a call on one.
    """
    tensors = list(tensors_of(arguments))
    for tensor in tensors:
        shown = f"{name} {tuple(tensor.shape)}"
        if tensor.device not in devices:
            raise ValueError(f"No back end for this device: {shown} on {tensor.device}")
        if tensor.layout != torch.strided:
            raise ValueError(f"Tensors must be dense: {shown} {tensor.layout}")
        if not tensor.is_contiguous():
            raise ValueError(f"Tensors must be contiguous: {shown} strides {tensor.stride()}")
        if tensor.dtype not in NCCL_TYPES:
            raise ValueError(f"NCCL has no such type: {shown} {tensor.dtype}")
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) > 1:
        raise ValueError(f"Tensors must be on one device and of one type: {name}")
    operations = [a for a in arguments if isinstance(a, dist.ReduceOp.RedOpType)]
    if any(operation in BITWISE for operation in operations):
        raise ValueError(f"NCCL has no bitwise reductions: {name}")


def strict(name: str, collective: Callable) -> Callable:
    """Return the collective with check() in front."""

    @functools.wraps(collective)
    def checked(*args, **kwargs):
        devices = [CPU]
        if torch.cuda.is_initialized():
            devices.append(torch.device("cuda", torch.cuda.current_device()))
        check(name, [*args, *kwargs.values()], tuple(devices))
        return collective(*args, **kwargs)

    return checked


def install():
    """Make every process group of this process strict."""
    for name in [name for name in COLLECTIVES if hasattr(dist, name)]:
        setattr(dist, name, strict(name, getattr(dist, name)))


def main():
    """Run the script that argv names in a strict process group."""
    install()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
