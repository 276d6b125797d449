"""Loss, gradient norm and speed of each step: read from the device together, when a line is due.

A GPU would idle while the host waits for the numbers of the step that it has just begun. So they
are copied in the background, and read when the next step has been launched, too.
"""

import math
import time
from typing import NamedTuple

import torch

from runtime.command_line import say
from runtime.device import peak_flops
from runtime.runlog import RunLog
from runtime.world import World, sum_over_ranks


class Pending(NamedTuple):
    """A step whose numbers have not been read yet."""

    step: int
    lr: float
    numbers: torch.Tensor  # (3,): loss, gradient norm, 1 if the update was made
    copied: torch.cuda.Event | None  # on a GPU: reached when the numbers are in host memory
    waited: float  # seconds that training waited for data
    digest: int  # of this process's part of the batch


class Pause(NamedTuple):
    """What interrupts training every `interval` steps, and after the last one."""

    interval: int
    seconds: float  # that it took the last time


class Meter:
    """Times steps and logs them; reads their numbers once for all steps since the last line."""

    def __init__(self, cfg, flops_per_token: float, world: World, log: RunLog, skipped: int = 0):
        self.cfg = cfg
        self.flops_per_token = flops_per_token
        self.world = world
        self.log = log
        self.peak = peak_flops(world.device)
        # steps by which reading lags behind launching: 1 on a GPU
        self.lag = 1 if world.device.type == "cuda" else 0
        self.pending: list[Pending] = []
        self.last_read = 0  # the last step that was logged
        self.skipped_in_a_row = skipped  # steps skipped up to it, since the last good one
        self.most_skipped = 0  # the largest that number has been in this process
        self.pauses: dict[str, Pause] = {}  # what interrupts training from time to time
        self.restart()

    def restart(self):
        """Start the clock: what came before (saving, evaluating, sampling) does not count."""
        self.started = time.perf_counter()

    def add(self, step: int, lr: float, numbers: torch.Tensor, waited: float, digest: int):
        """Take a step that has been launched; log those before it whose line is due.

        numbers (3,): its loss, gradient norm, and 1 if the update was made, on the device.
        """
        copied = None
        if numbers.is_cuda:
            numbers = numbers.to("cpu", non_blocking=True)  # into pinned memory
            copied = torch.cuda.Event()
            copied.record()
        self.pending.append(Pending(step, lr, numbers, copied, waited, digest % 2**64))
        if (step - self.lag) % self.cfg.log_interval == 0:
            self.flush(step - self.lag)

    def flush(self, last_step: float = math.inf):
        """Log the pending steps up to last_step, and print a line for the last of them."""
        steps = [p for p in self.pending if p.step <= last_step]
        if not steps:
            return
        self.pending = self.pending[len(steps) :]
        cfg, n = self.cfg, len(steps)
        if steps[-1].copied:
            steps[-1].copied.synchronize()
        numbers = torch.stack([p.numbers for p in steps]).tolist()  # a CPU or MPS waits here
        now = time.perf_counter()
        dt = max(now - self.started, 1e-9) / n  # a clock may stand still
        self.started = now
        tok_s = cfg.total_batch / dt
        mfu = None
        if self.peak:
            mfu = tok_s * self.flops_per_token / (self.peak * self.world.world_size)
        speed = {
            "dt_ms": dt * 1e3,
            "data_ms": sum(p.waited for p in steps) / n * 1e3,
            "tok_s": tok_s,
            "mfu": mfu,
        }
        hashes = self.batch_hashes(steps) if cfg.batch_hashes else [{}] * n
        for step, (loss, norm, finite), batch_hash in zip(steps, numbers, hashes):
            record = self.record(step, loss, norm, bool(finite)) | batch_hash
            self.log.write(record | speed)
        last = steps[-1]
        self.last_read = last.step
        say(
            f"step {last.step}/{cfg.max_steps} | loss {loss:.4f} | lr {last.lr:.2e} | "
            f"grad norm {norm:.2f} | {dt * 1e3:.0f} ms | {tok_s:,.0f} tok/s"
            f"{f' | mfu {mfu:.1%}' if mfu else ''} | {duration(self.remaining(last.step, dt))} left"
        )

    def paused(self, name: str, interval: int, seconds: float):
        """Note how long an evaluation, a sampling or a save took, and start the clock again."""
        self.pauses[name] = Pause(interval, seconds)
        self.restart()

    def remaining(self, step: int, seconds_per_step: float) -> float:
        """Estimate the seconds until the end: steps, and the pauses between them."""
        last_step = self.cfg.max_steps
        seconds = seconds_per_step * (last_step - step)
        for interval, each in self.pauses.values():
            seconds += each * (math.ceil(last_step / interval) - (step - 1) // interval)
        return seconds

    def record(self, step: Pending, loss: float, norm: float, finite: bool) -> dict:
        """Return the record of a step; a skipped one is counted, printed, and has no loss."""
        if finite:
            self.skipped_in_a_row = 0
            return {
                "step": step.step,
                "train/loss": loss,
                "train/lr": step.lr,
                "train/norm": norm,
            }
        self.skipped_in_a_row += 1
        self.most_skipped = max(self.most_skipped, self.skipped_in_a_row)
        windows_per_step = self.cfg.total_batch // self.cfg.T
        first = (step.step - 1) * windows_per_step
        skipped = f"loss {loss}, norm {norm}"
        windows = [first, first + windows_per_step - 1]
        say(f"step {step.step} | skipped, no update: {skipped} | windows {windows}")
        return {
            "step": step.step,
            "train/loss": None,
            "train/lr": step.lr,
            "train/norm": None,
            "skipped": skipped,
            "windows": windows,
        }

    def batch_hashes(self, steps: list[Pending]) -> list[dict]:
        """Sum the digests over the ranks modulo 2**64, in halves so that nothing overflows."""
        halves = [[p.digest >> 32, p.digest & 0xFFFFFFFF] for p in steps]
        sums = sum_over_ranks(torch.tensor(halves)).tolist()
        return [{"batch_hash": f"{((high << 32) + low) % 2**64:016x}"} for high, low in sums]


def duration(seconds: float) -> str:
    """Return a time in words: 2 h 05 min, or 3 min 07 s."""
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {int(seconds % 60):02d} s"
