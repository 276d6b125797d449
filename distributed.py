"""One process or many: torchrun's environment in, rank and device out; and stopping together."""

import ctypes
import datetime
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist

from config import UserError, one_line

INTERRUPTED = 75  # exit status of a run that was stopped and can go on (sysexits.h: EX_TEMPFAIL, "try again later")


class World(NamedTuple):
    rank: int  # 0 without torchrun
    world_size: int  # 1 without torchrun
    device: torch.device


def pick_device(wanted: str, local_rank: int = 0) -> torch.device:
    """cuda, mps or cpu; "auto" takes the first that is there. Raises UserError when the wanted one is not."""
    there = [
        ("cuda", torch.cuda.is_available()),
        ("mps", torch.backends.mps.is_available()),
        ("cpu", True),
    ]
    names = [name for name, ok in there if ok]
    kind = names[0] if wanted == "auto" else wanted.split(":")[0]
    if kind not in names:
        raise UserError(
            f"device {wanted!r} is not there, this machine has {', '.join(names)}; hint: --device {names[0]}"
        )
    if kind == "cuda":
        index = int(wanted.split(":")[1]) if ":" in wanted else local_rank
        if index >= torch.cuda.device_count():
            raise UserError(
                f"GPU {index} is not there, this machine has {torch.cuda.device_count()}; "
                f"hint: --nproc_per_node={torch.cuda.device_count()}"
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device(kind)


def keep_freed_memory():
    """Have glibc keep freed blocks instead of handing them back to the kernel, which zeroes them page by page when they
    are wanted again: activations of the same sizes come and go in every step. On a CPU only; costs some peak memory.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        for option, value in (
            (-4, 0),
            (-1, 2**31 - 1),
            (-2, 2**28),
        ):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt and mallopt(option, value)


def setup(wanted_device: str, timeout: float = 600, deterministic: bool = False) -> World:
    """Join the process group when torchrun started us: NCCL for what is on GPUs, gloo for what is in host memory."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS reads it when it starts
        same_bits()
    device = pick_device(wanted_device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cpu":
        keep_freed_memory()
        deterministic and torch.set_num_threads(1)
    if "RANK" in os.environ:
        on_gpu = device.type == "cuda"
        # the group's own limit comes after that of Stop, which says more and ends the hanging process, too
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            device_id=device if on_gpu else None,
            timeout=datetime.timedelta(seconds=timeout + 15),
        )
    return World(rank, world_size, device)


def same_bits():
    """Have torch choose kernels that give the same bits each time (and warn where it has none)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # a help in finding bugs that costs time
    )


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over all processes; without torchrun the values as they are."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def from_first(make: Callable):
    """What make() returns in the first process, in all of them; where it raises UserError, all end."""
    box = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            box[0] = make()
        except UserError as e:
            box[1] = str(e)
    if dist.is_initialized():
        dist.broadcast_object_list(box, 0)
        if box[1] is not None and dist.get_rank() != 0:
            sys.exit(2)  # the first process tells
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


class Stopped(BaseException):
    """A run is to end now, with a checkpoint. Not an Exception: no handler of a library's may swallow it."""


class Stop:
    """Stopping together. A signal to one process, or a fault met by one, makes poll() raise Stopped in all of them.

    SIGTERM (clouds, schedulers), SIGINT (Ctrl-C; the second one kills), SIGUSR1 (Slurm's --signal), SIGHUP (a terminal
    closed), unless they were to be ignored (nohup). Until `armed` there is nothing to save, and a signal raises Stopped
    where it is. A watchdog thread ends this process and its peers on
    this machine when poll() was not called for timeout seconds: torchrun alone would give a hung process, which cannot
    answer its SIGTERM, another 30 s.
    """

    def __init__(self, world: World, timeout: float):
        self.reason, self.error, self.armed, self.beat, self.interrupts = (
            "",
            None,
            False,
            time.monotonic(),
            0,
        )
        names = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")  # Windows has the first two
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self.before = {
            n: signal.signal(n, self.on_signal)
            for n in numbers
            if signal.getsignal(n) != signal.SIG_IGN
        }
        self.closed = threading.Event()
        if world.world_size > 1:
            peers = [None] * world.world_size
            machine = socket.gethostname(), os.environ.get("GROUP_RANK")
            dist.all_gather_object(peers, (machine, os.getpid()))
            del peers[world.rank]
            try:  # descriptors, not numbers: another program may get the number of a process that has ended
                peers = [os.pidfd_open(pid) for where, pid in peers if where == machine]
            except (
                OSError,
                AttributeError,
            ):  # not Linux, or a kernel or container that does not allow it
                peers = []  # torchrun then ends them, 30 s later
            threading.Thread(
                target=self.watch, args=(world.rank, timeout, peers), daemon=True, name="watchdog"
            ).start()

    def on_signal(self, number: int, _frame):
        if number == signal.SIGINT:
            self.interrupts += 1
            # next time the kernel ends us, whatever runs then. torchrun hands on the Ctrl-C that the terminal has sent us
            # already, so under it the first two are one
            if self.interrupts == (2 if "TORCHELASTIC_RUN_ID" in os.environ else 1):
                signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.reason = self.reason or signal.Signals(number).name
        if not self.armed:
            raise Stopped

    def ask(self, error: UserError):
        """Stop for an error that this process met; the caller raises it once the checkpoint is written."""
        self.reason, self.error = self.reason or "error", self.error or error

    def poll(self, save_due: bool = False) -> bool:
        """Whether a checkpoint is due in any process. Raises Stopped in all when one wants to stop.

        To be called equally often by all processes. Host memory and gloo: nothing waits for a GPU.
        """
        self.beat = time.monotonic()
        flags = torch.tensor([bool(self.reason), save_due], dtype=torch.int32)
        if dist.is_initialized():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        stop, save_due = flags.tolist()
        if stop:
            raise Stopped
        return bool(save_due)

    def watch(self, rank: int, timeout: float, peers: list[int]):
        tick = time.monotonic()
        while not self.closed.wait(1):
            slept, tick = time.monotonic() - tick, time.monotonic()
            if slept > 10:  # this machine or the whole job was suspended: nobody hangs
                self.beat = tick
            if tick - self.beat > timeout:
                print(
                    f"error (rank {rank}): no progress for {timeout:g} s, a process hangs or is gone: ending all on "
                    "this machine; hint: a longer --group_timeout if a step may take that long",
                    file=sys.stderr,
                    flush=True,
                )
                for peer in peers:
                    try:
                        signal.pidfd_send_signal(peer, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
                os._exit(1)

    def close(self):
        self.closed.set()
        for number, handler in self.before.items():
            signal.signal(number, handler)


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


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still take: of the GPU; on a CPU the least of machine, container and its own limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    found = (
        [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
        if hasattr(os, "sysconf")
        else []
    )
    if sys.platform == "linux":
        import resource

        text = lambda path: Path(path).read_text() if Path(path).exists() else ""
        kilobytes = dict(
            re.findall(
                r"^(\w+):\s+(\d+) kB", text("/proc/meminfo") + text("/proc/self/status"), re.M
            )
        )
        found = [1024 * int(kilobytes["MemAvailable"])]
        top, held = (
            text("/sys/fs/cgroup/memory.max").strip(),
            text("/sys/fs/cgroup/memory.current").strip(),
        )
        found += [int(top) - int(held)] if top.isdigit() and held else []
        for name, limit in (("VmSize", resource.RLIMIT_AS), ("VmData", resource.RLIMIT_DATA)):
            limit = resource.getrlimit(limit)[0]
            found += (
                [limit - 1024 * int(kilobytes[name])] if limit != resource.RLIM_INFINITY else []
            )
    return max(0, min(found, default=2**33))


def out_of_memory(e: BaseException) -> bool:
    """Whether an exception says so, of a GPU's allocator (one type) or of the CPU's (a RuntimeError like others)."""
    return (
        isinstance(e, (torch.OutOfMemoryError, MemoryError))
        or "DefaultCPUAllocator" in str(e)
        or "bad_alloc" in str(e)
    )


def compile_error(device: torch.device) -> str | None:
    """Why torch.compile cannot build a kernel here, or None: it needs a C++ compiler on the CPU, Triton on a GPU."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as e:  # each backend has its own
        return one_line(e)
