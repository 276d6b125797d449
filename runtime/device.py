"""The device and how it computes: choice, number type, compiler, determinism, peak speed."""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend

from runtime.command_line import UserError, one_line, say

# there is an NVIDIA GPU on the machine where one of these is
NVIDIA_FILES = ("/dev/nvidia0", "/proc/driver/nvidia")


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device called cuda, cuda:1, mps or cpu; "auto" takes the first that exists.

    Raises UserError when there is no such device, and for "auto" when there is a GPU that torch's
    CUDA cannot use: nobody wants to find out from the speed.
    """
    available = []
    if torch.cuda.is_available():
        available.append("cuda")
    if torch.backends.mps.is_available():
        available.append("mps")
    available.append("cpu")
    kind, _, index = name.partition(":")
    if not re.fullmatch(r"auto|\w+(:\d+)?", name) or (kind == "auto" and name != kind):
        raise UserError(f"device {name!r} is not a device; hint: cuda, cuda:1, mps, cpu or auto")
    if kind == "cuda" and index and local_rank:
        raise UserError(f"--device {name} is one GPU for all processes; hint: --device cuda")
    if kind == "auto":
        kind = "cuda" if has_gpu() else available[0]
    if kind == "cuda" and kind not in available:
        version = torch.version.cuda
        fix = f"nvidia-smi must work and show CUDA {version} or later, otherwise a newer driver"
        if version is None:
            fix = "another build of torch"
        raise UserError(
            f"torch {torch.__version__} (CUDA: {version}) can use no GPU here; hint: {fix} "
            f"(notes/running.md); or --device {available[0]}"
        )
    if kind not in available:
        raise UserError(
            f"device {name!r} is not there, this machine has {', '.join(available)}; "
            f"hint: --device {available[0]}"
        )
    if kind != "cuda":
        return torch.device(kind)
    number = int(index or local_rank)
    count = torch.cuda.device_count()
    if number >= count:
        fewer = f"--device cuda:{count - 1}" if index else f"--nproc_per_node={count}"
        raise UserError(f"GPU {number} is not there, this machine has {count}; hint: {fewer}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def has_gpu() -> bool:
    """Return whether torch is built for CUDA and this machine has a GPU, usable or not.

    One that CUDA_VISIBLE_DEVICES hides does not count.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    hidden = not re.match(r"\d|GPU-|MIG-", visible)
    return bool(torch.version.cuda) and not hidden and any(map(os.path.exists, NVIDIA_FILES))


def worker_thread(name: str, device: torch.device) -> ThreadPoolExecutor:
    """Return an executor with one thread, which works on `device`.

    CUDA starts every thread on GPU 0: merely leaving a stream there would create a context on it,
    0.5 GB from each of the other ranks.
    """
    initializer = torch.cuda.set_device if device.type == "cuda" else None
    arguments = (device,) if initializer else ()
    return ThreadPoolExecutor(1, name, initializer, arguments)


def autocast_dtype(device: torch.device, dtype: str) -> torch.dtype:
    """Return the type of the matmuls; "auto" is bfloat16 where the hardware multiplies it natively.

    Others (T4, MPS, CPUs without AMX or AVX512-BF16) emulate bfloat16, several times slower
    than float32.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        native = any(hasattr(torch.cpu, test) and getattr(torch.cpu, test)() for test in tests)
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which matmuls run in `dtype`; it changes nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


class Compute(NamedTuple):
    """How a run computes: where, in which type, compiled or not."""

    device: torch.device
    dtype: torch.dtype  # of the matmuls
    compiled: bool

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.dtype)

    def compile(self, model: torch.nn.Module):
        """Return a compiled callable of fixed shapes, or the model itself."""
        if not self.compiled:
            return model
        return torch.compile(model, fullgraph=True, dynamic=False)

    def try_pass(self, train_model, B: int, T: int):
        """Run a forward and a backward pass on dummy tokens (B, T); it compiles the kernels."""
        tokens = torch.zeros(B, T, dtype=torch.int64, device=self.device)
        with self.autocast():
            # clone: the compiler would specialise on idx and targets being the same tensor
            train_model(tokens, tokens.clone()).backward()


def choose_compute(device: torch.device, dtype: str, use_compile: bool) -> Compute:
    """Decide how to compute; a line says so when torch.compile is wanted and does not work here.

    All ranks compile or none: one that does not would slow down the others.
    """
    compiled = use_compile
    if use_compile and device.type == "mps":
        compiled = False
        say("compile | off: on MPS it has not been tried")
    elif use_compile:
        errors = [compile_error(device)]  # by rank
        if dist.is_initialized():
            errors *= dist.get_world_size()
            dist.all_gather_object(errors, errors[0])
        failing = [rank for rank, error in enumerate(errors) if error]
        if failing:
            compiled = False
            where = f"on rank {failing[0]}" if dist.is_initialized() else "here"
            say(
                f"compile | off, it does not work {where} ({errors[failing[0]]}); "
                "hint: install gcc, g++ and the Python headers (python3-dev); on a GPU triton, too"
            )
    return Compute(device, autocast_dtype(device, dtype), compiled)


def compile_error(device: torch.device) -> str | None:
    """Return why torch.compile cannot build a kernel here, or None when it can.

    It needs g++ on a CPU, Triton and gcc on a GPU, the Python headers on both.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as e:  # each backend has its own
        return one_line(e)
    return None


def attention_backend(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Return what computes scaled_dot_product_attention in training on a GPU, such as "CUDNN".

    None on other devices, and where this version of torch does not tell.
    """
    if device.type != "cuda":
        return None
    try:
        q = torch.empty(1, 1, 128, head_width, device=device, dtype=dtype, requires_grad=True)
        choice = torch._fused_sdp_choice(q, q, q, is_causal=True)
        return SDPBackend(choice).name.removesuffix("_ATTENTION")
    except (AttributeError, RuntimeError, TypeError, ValueError):  # a private function
        return None


# options of mallopt: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
KEEP_FREED_MEMORY = {-4: 0, -1: 2**31 - 1, -2: 2**28}


def keep_freed_memory():
    """Make glibc keep freed memory: a step's activations have the same sizes as the last one's.

    Otherwise they are returned to the kernel and zeroed again page by page. Costs some peak memory.
    Only for a CPU, and only on Linux.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return
    for option, value in KEEP_FREED_MEMORY.items():
        mallopt(option, value)


def use_deterministic_kernels(device: torch.device):
    """Choose kernels with bit-identical results each time.

    Where torch has none, it raises on a GPU (see `not_deterministic`) and warns elsewhere: to be
    warned only would also leave the backward pass of a GPU's attention as it is.
    """
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # for finding bugs; costs time


def not_deterministic(e: BaseException) -> bool:
    """Return whether an exception means that torch has no deterministic kernel for something."""
    return isinstance(e, RuntimeError) and "use_deterministic_algorithms" in str(e)


@contextmanager
def torch_settings_restored() -> Iterator[None]:
    """Restore, at the end of the block, what a run sets in torch for the whole process."""
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


# Dense bf16 peak in FLOP/s with float32 sums (vendors' data sheets), by the exact name that CUDA
# gives: a part of a name would count an L40 as an L4.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA RTX 6000 Ada Generation": 364.2e12,
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 3090 Ti": 80e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of a known GPU, in FLOP/s; None for others.

    There is no guess: an MFU over a wrong peak is worse than none.
    """
    if device.type != "cuda":
        return None
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device))
