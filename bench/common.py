"""What all parts share: the clock, sides that alternate, one table, settings."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

import hf
from model import GPT, GPTConfig
from runtime.command_line import UserError
from runtime.device import autocast_dtype, pick_device
from runtime.memory import out_of_memory
from runtime.runlog import environment

REPO = "this repo"
SIZES = {  # n_layer, n_head, n_embd
    "tiny": (2, 2, 64),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
Type = Literal["auto", "bfloat16", "float32"]


@dataclass(frozen=True)
class Common:
    """Settings of all parts that run a model."""

    size: Literal["tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    device: str = "auto"  # cuda, mps or cpu; auto takes the first of these that exists

    def shape(self) -> dict[str, int]:
        """Return the settings of GPTConfig that the size decides."""
        return dict(zip(("n_layer", "n_head", "n_embd"), SIZES[self.size]))

    def load_model(self, where: str) -> GPT:
        """Return the model that hf.load() finds there, or one of this size with random weights."""
        torch.manual_seed(42)
        return hf.load(where) if where else GPT(GPTConfig(**self.shape()))

    def used(self) -> dict:
        """Return the settings, with the device and type that "auto" stands for here."""
        device = pick_device(self.device)
        settings = dataclasses.asdict(self) | {"device": environment(device, 1)["device"]}
        if "dtype" in settings:
            settings["dtype"] = str(autocast_dtype(device, self.dtype)).removeprefix("torch.")
        return settings

    def refuse_below_1(self, *names: str):
        """Raise UserError when one of these settings, or an item of it, is below 1."""
        wrong = []
        for name in names:
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                wrong.append(f"{name} is {value}, must be at least 1")
        if wrong:
            raise UserError("; ".join(wrong) + f"; hint: --{wrong[0].split()[0]} 1")


class Side:
    """One side of a comparison: a function that is timed, and what its calls took."""

    def __init__(self, run: Callable, amount: float = 1):
        self.run = run  # must not return before the device has done the work
        self.amount = amount  # of tokens or items per call
        self.fits = True  # False once memory ran out
        self.ms: list[float] = []  # of each timed call; empty when it does not fit
        self.result = None  # of the last call

    def call(self, timed: bool = True):
        """Call the function. When memory runs out, this side ends, and its model is freed."""
        if not self.fits:
            return
        started = time.perf_counter()
        try:
            self.result = self.run()
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
            self.fits = False
            self.ms = []
            self.run = None
            return
        if timed:
            self.ms.append(round(1e3 * (time.perf_counter() - started), 3))

    @property
    def median(self) -> float:
        """Milliseconds per call; infinite when it does not fit."""
        return statistics.median(self.ms) if self.fits else float("inf")

    @property
    def rate(self) -> float:
        """The amount per second, by the median call; 0 when it does not fit."""
        return 1e3 * self.amount / self.median


def speedup(side: Side, baseline: Side) -> float | None:
    """Return how many times as fast as the baseline a side is; None when one does not fit."""
    return baseline.median / side.median if side.fits and baseline.fits else None


def alternate(sides: dict[str, Side], warmup: int, rounds: int):
    """Warm each side up, then time them A B A B, `rounds` calls of each."""
    for name, side in sides.items():
        started = time.perf_counter()
        for _ in range(warmup):
            side.call(timed=False)
        if warmup:
            outcome = "" if side.fits else " | does not fit"
            print(f"warm-up | {name} | {time.perf_counter() - started:.1f} s{outcome}", flush=True)
    for _ in range(rounds):
        for side in sides.values():
            if torch.cuda.is_initialized():
                # What the other side has cached may be most of the memory: return it, and let this
                # side fill its own cache off the clock.
                torch.cuda.empty_cache()
                side.call(timed=False)
            side.call()


def report(title: str, unit: str, sides: dict[str, Side], columns: dict | None = None) -> dict:
    """Print the speed of each side, and return it with the milliseconds of all calls.

    unit: tok/s or items/s. columns: further ones, each with the cells of the sides that fit.
    """
    columns, rows = columns or {}, []
    for name, side in sides.items():
        if side.fits:
            calls = (side.median, max(side.ms), min(side.ms))
            rates = [1e3 * side.amount / ms for ms in calls]
            row = [f"{rate:,.1f}" if rate < 1000 else f"{rate:,.0f}" for rate in rates]
            rows.append([name, *row, *(cells[name] for cells in columns.values())])
        else:
            rows.append([name, "does not fit"])
    table([title, unit, "slowest", "fastest", *columns], rows)
    return {
        unit.replace("/", "_"): {name: side.rate for name, side in sides.items()},
        "ms": {name: side.ms for name, side in sides.items()},
    }


def table(header: list[str], rows: list[list[str]]):
    """Print a table: the first column to the left, the others to the right, missing cells empty."""
    lines = [row + [""] * (len(header) - len(row)) for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print()
    for first, *others in lines:
        cells = [f"{cell:>{width + 2}}" for cell, width in zip(others, widths[1:])]
        print((f"{first:{widths[0]}}" + "".join(cells)).rstrip())
