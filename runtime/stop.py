"""Stopping together: signals, errors of one process and a watchdog for processes that hang."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from runtime.command_line import UserError, last_words
from runtime.world import COMPILE_SECONDS, World

# Exit status of a run that was stopped and can be resumed (sysexits.h: EX_TEMPFAIL, "try again
# later").
INTERRUPTED = 75

# SIGTERM: clouds, schedulers. SIGINT: Ctrl-C. SIGUSR1: Slurm's --signal. SIGHUP: a terminal closed.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stopped(BaseException):
    """Raised to stop a run with a checkpoint.

    A BaseException, so that no library's `except Exception` swallows it.
    """


class Diverged(UserError):
    """The end of a run whose weights or losses are NaN or infinite: more steps cannot fix it."""

    status = 3


class Stop:
    """Stops all processes of a run together.

    A signal to one process, or an error in one, makes poll() raise Stopped in all of them. Signals
    that were ignored at start (nohup) stay ignored; torchrun, though, ends its processes at SIGHUP
    even under nohup. Before `armed` is set there is nothing to save, and a signal raises Stopped at
    once. Outside the main thread Python allows no signal handlers: then none is set.

    A watchdog thread kills this process and its peers on this machine when poll() was not called
    for `timeout` seconds (longer inside allow_compiling()): torchrun alone would give a hanging
    process, which cannot answer its SIGTERM, another 30 s.
    """

    def __init__(self, world: World, timeout: float, second_interrupt=signal.SIG_DFL):
        self.reason = ""  # the signal's name, or "error"
        self.error: UserError | None = None
        self.armed = False
        self.last_poll = time.monotonic()
        self.timeout = timeout
        self.limit = timeout  # seconds without poll() at present
        self.interrupts = 0  # Ctrl-C received
        self.second_interrupt = second_interrupt  # what handles SIGINT once a run is stopping
        self.closed = threading.Event()
        self.handlers_before = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.handlers_before[number] = signal.signal(number, self.on_signal)
        if world.world_size > 1:
            watch = (world.rank, processes_of_this_machine(world))
            threading.Thread(target=self.watch, args=watch, daemon=True, name="watchdog").start()

    def on_signal(self, number: int, _frame):
        if number == signal.SIGINT:
            self.interrupts += 1
            # The next Ctrl-C kills at once. Under torchrun each Ctrl-C arrives twice (from the
            # terminal and from torchrun), so there the first two count as one.
            if self.interrupts == (2 if "TORCHELASTIC_RUN_ID" in os.environ else 1):
                signal.signal(signal.SIGINT, self.second_interrupt)
        self.reason = self.reason or signal.Signals(number).name
        if not self.armed:
            raise Stopped

    def stop_with(self, error: UserError):
        """Stop the run because of an error, which is raised after the last checkpoint."""
        self.reason = self.reason or "error"
        self.error = self.error or error

    def poll(self, save_due: bool = False) -> bool:
        """Return whether a checkpoint is due on any rank. Raises Stopped on all if one is to stop.

        Every process must call it equally often. Uses gloo on host memory, so there is no GPU sync.
        """
        self.last_poll = time.monotonic()
        flags = torch.tensor([bool(self.reason), save_due], dtype=torch.int32)
        if dist.is_initialized():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        stop, save_due = flags.tolist()
        if stop:
            raise Stopped
        return bool(save_due)

    def share_error(self):
        """Give every process the error of the first that has one, and wait until all are here."""
        if not dist.is_initialized():
            return
        errors = [None] * dist.get_world_size()
        own = (self.error.status, str(self.error)) if self.error else None
        dist.all_gather_object(errors, own)
        for rank, error in enumerate(errors):
            if error is not None:
                status, text = error
                kind = Diverged if status == Diverged.status else UserError
                self.error = kind(text if rank == 0 else f"on rank {rank}: {text}")
                return

    @contextmanager
    def allow_compiling(self) -> Iterator[None]:
        """Inside the block allow COMPILE_SECONDS without poll(): torch.compile calls none."""
        self.limit = max(self.timeout, COMPILE_SECONDS)
        try:
            yield
        finally:
            self.last_poll = time.monotonic()
            self.limit = self.timeout

    def watch(self, rank: int, peers: list[int]):
        """Kill all processes of this machine when poll() was not called for too long (a thread)."""
        last_tick = time.monotonic()
        while not self.closed.wait(1):
            now = time.monotonic()
            if now - last_tick > 10:  # the machine was suspended: do not count that as a hang
                self.last_poll = now
            last_tick = now
            if now - self.last_poll <= self.limit:
                continue
            last_words(
                f"error (rank {rank}): no progress for {self.limit:g} s, "
                "a process hangs or is gone: ending all on this machine; "
                "hint: a longer --group_timeout if a step may take that long"
            )
            for peer in peers:
                try:
                    signal.pidfd_send_signal(peer, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            os._exit(1)

    def stop_watching(self):
        """End the watchdog: what follows does not call poll()."""
        self.closed.set()

    def close(self):
        """End the watchdog and give the signal handlers back."""
        self.closed.set()
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)


def processes_of_this_machine(world: World) -> list[int]:
    """Return descriptors of the other ranks' processes on this machine; empty where there are none.

    Descriptors rather than ids: another program may get the id of a process that has ended.
    """
    machine = socket.gethostname(), os.environ.get("GROUP_RANK")
    processes = [None] * world.world_size
    dist.all_gather_object(processes, (machine, os.getpid()))
    del processes[world.rank]
    try:
        return [os.pidfd_open(pid) for where, pid in processes if where == machine]
    except (OSError, AttributeError):  # not Linux, or a kernel or container that does not allow it
        return []  # torchrun then ends them, 30 s later
