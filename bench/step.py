"""A training step of this repository against transformers' GPT-2, or against another preset."""

import contextlib
import dataclasses
import multiprocessing
import re
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import optim
from bench.common import REPO, Common, Side, Type, alternate, report, speedup
from bench.transformers_gpt2 import transformers_gpt2
from config import preset
from kernels.attention import install_cpu_attention
from model import GPT, GPTConfig
from runtime.command_line import UserError
from runtime.device import autocast, autocast_dtype, compile_error, keep_freed_memory, pick_device

BASELINES = ("transformers", "transformers-compiled")


@dataclass(frozen=True)
class StepSettings(Common):
    """What decides a training step beside the shape of its batch."""

    # this repository's switches and optimizer; transformers has learned positions, GELU and AdamW
    preset: str = "gpt2-baseline"
    vocab_size: int = 50304  # rows of the embedding
    dtype: Type = "auto"  # of the matmuls; auto = bfloat16 where the device has it
    steps: int = 10  # timed steps of each side
    warmup: int = 2  # steps of each side before the clock starts; the first one compiles
    use_compile: bool = True  # this repository's models compiled, as in training
    # CPU: glibc keeps freed memory, for all sides, as in training; False: default malloc
    keep_memory: bool = True
    recompute: bool = False  # activation checkpointing in this repository's models
    # back end of SDPA, where it is used
    attention: Literal["auto", "flash", "cudnn", "efficient"] = "auto"
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"  # torch.compile's

    def check(self, *positive: str):
        """Raise UserError for settings that cannot be, those of the part in `positive` included."""
        self.refuse_below_1(*positive, "vocab_size", "steps", "warmup")
        preset(self.preset)
        error = compile_error(pick_device(self.device)) if self.use_compile else None
        if error:
            raise UserError(
                f"torch.compile does not work here ({error}); "
                "hint: install g++, or --use_compile False"
            )


@dataclass(frozen=True)
class StepPart(StepSettings):
    """Time a training step: forward, backward, clip, fused AdamW, zero_grad."""

    B: int = 4  # sequences in the batch
    T: int = 1024  # tokens in a sequence
    # the other sides, `ratio` is to the first: transformers, transformers-compiled, or presets
    against: tuple[str, ...] = ("transformers",)
    memory: bool = True  # peak memory of each side, in a process of its own

    def measure(self) -> dict:
        """Run all sides on one random batch, with the same autocast, clipping and optimizer."""
        self.check("B", "T")
        if not self.against:
            raise UserError("nothing to measure against; hint: --against transformers")
        for name in self.against:
            if name not in BASELINES:
                preset(name)
        names = [REPO, *self.against]
        peaks = {name: peak_memory(self, name) if self.memory else None for name in names}
        sides = {
            name: Side(training_step(self, name, self.B, self.T)[0], self.B * self.T)
            for name in names
        }
        alternate(sides, self.warmup, self.steps)
        return self.result(sides, peaks)

    def result(self, sides: dict[str, Side], peaks: dict[str, int | None]) -> dict:
        """Print the table, and return the figures."""
        ms, losses, memory = {}, {}, {}
        for name, side in sides.items():
            if side.fits:
                ms[name] = f"{side.median:,.1f}"
                losses[name] = f"{side.result:.4f}"
                memory[name] = f"{peaks[name] / 1e9:.2f}" if peaks[name] else "-"
        columns = {"median ms": ms, "last loss": losses, "peak GB": memory}
        speeds = report("one training step", "tok/s", sides, columns)
        ratios = {name: speedup(sides[REPO], sides[name]) for name in self.against}
        result = {"ratio": ratios[self.against[0]], "ratios": ratios} | speeds
        if self.memory:
            known = peaks[REPO] and peaks[self.against[0]]
            result["memory_ratio"] = peaks[REPO] / peaks[self.against[0]] if known else None
            result["peak"] = peaks
        return result | self.used()


def training_step(
    settings: StepSettings, side: str, B: int, T: int
) -> tuple[Callable[[], float], torch.nn.Module]:
    """Return a function that takes one step and returns its loss, and the model.

    side: this repo (settings.preset), one of BASELINES, or a preset. All see the same tokens.
    """
    device = pick_device(settings.device)
    dtype = autocast_dtype(device, settings.dtype)
    if device.type == "cpu" and settings.keep_memory:
        keep_freed_memory()
    torch.manual_seed(42)
    ids = torch.randint(settings.vocab_size, (B, T + 1), device=device)
    x = ids[:, :-1].contiguous()  # (B, T)
    y = ids[:, 1:].contiguous()
    if side in BASELINES:
        model = transformers_gpt2(T, settings.shape() | {"vocab_size": settings.vocab_size})
        model = model.to(device)
        optimizer = optim.adamw(model, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
        train_model = torch.compile(model) if side == "transformers-compiled" else model
    else:
        name = settings.preset if side == REPO else side
        model, optimizer = build_preset(settings, name, T, dtype)
        train_model = compile_model(settings, model, dtype)

    def step() -> float:
        attention = contextlib.nullcontext()
        if settings.attention != "auto":
            attention = sdpa_kernel(getattr(SDPBackend, f"{settings.attention.upper()}_ATTENTION"))
        with attention, autocast(device, dtype):
            if side in BASELINES:  # shifts the labels itself: one target less per sequence
                loss = train_model(input_ids=x, labels=x).loss
            else:
                loss = train_model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    return step, model


def build_preset(settings: StepSettings, name: str, T: int, dtype: torch.dtype):
    """Return a preset's model in the size of the settings, on the device, and its optimizer."""
    cfg = preset(name, T=T, vocab_size=settings.vocab_size, **settings.shape())
    if cfg.arch == "modern" and cfg.n_embd % 128 == 0:
        cfg = dataclasses.replace(cfg, n_head=cfg.n_embd // 128)  # as in gpt2-modern
    if cfg.optimizer == "adamw":
        cfg = dataclasses.replace(cfg, max_lr=6e-4)  # the baselines'
    shape = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(GPTConfig)}
    model = GPT(GPTConfig(**shape)).to(pick_device(settings.device))
    model.recompute = settings.recompute
    return model, optim.build(cfg, model, dtype)


def compile_model(settings: StepSettings, model: GPT, dtype: torch.dtype):
    """Return the model compiled as in training, or as it is."""
    if not settings.use_compile:
        return model
    if pick_device(settings.device).type == "cpu":
        install_cpu_attention(model, dtype)
    return torch.compile(model, fullgraph=True, dynamic=False, mode=settings.compile_mode)


def peak_memory(part: StepPart, side: str) -> int | None:
    """Return the bytes that a process needs for three steps; None when they do not fit.

    On a GPU what torch allocated, on a CPU the peak of resident memory.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_peak, part, side).result()


def measure_peak(part: StepPart, side: str) -> int | None:
    """Take three steps in this process, and return the peak of its memory."""
    steps = Side(training_step(part, side, part.B, part.T)[0])
    for _ in range(3):
        steps.call()
    if not steps.fits:
        return None
    if pick_device(part.device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":  # where ru_maxrss begins with the peak of the parent
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
