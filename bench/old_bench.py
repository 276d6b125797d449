"""Side-by-side measurements: this project against the usual way of doing the same thing, in one process.

    python bench.py step                                one training step, GPT-2 (124M), B = 4, T = 1024
    python bench.py step --size tiny --steps 20         in seconds
    python bench.py step --B 64 --compiled_baseline True
    python bench.py step --preset gpt2-modern --against gpt2-baseline
    python bench.py sweep                               tokens a second by B and T
    python bench.py profile                             where a step's time goes, against a floor
    python bench.py startup                             from the command to the first step
    python bench.py ddp                                 two processes under DDP, or left alone
    python bench.py muon                                the hidden matrices' update against torch.optim.Muon
    python bench.py loader                              random windows out of 10B tokens, and their index
    python bench.py save                                a checkpoint of GPT-2 (124M): training held, or waiting for the disk
    python bench.py hellaswag                           packed rows against one item at a time
    python bench.py prepare --data edu_docs.jsonl.gz    documents into shards against tiktoken alone and the usual loop
    python bench.py generate                            tokens one by one, for one text and for sixteen
    python bench.py suite                               all that a GPU is asked, in one call

The two sides take turns (A B A B), so that whatever else the machine does meets both: the ratio travels, the absolute
figures are this machine's at this hour. Each part prints a table, then one line of JSON with `ratio`, above 1 when this
project is the faster one.
"""

import contextlib
import copy
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Callable, Literal
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import generate
import hellaswag
import optim
import prepare
import shards
import tokenizer
from config import UserError, command_line, preset
from distributed import World, autocast_dtype, compile_error, keep_freed_memory, pick_device
from kernels import speed_up
from model import GPT, GPTConfig
from runlog import RunLog, environment

SIZES = {  # n_layer, n_head, n_embd
    "tiny": (2, 2, 64),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


# --------------------------------------------------------------------------------------------------------------------
# step: one training step


@dataclass(frozen=True)
class Step:
    """One training step against transformers.GPT2LMHeadModel: forward, backward, clip, optimiser (fused AdamW), zero_grad."""

    size: Literal["tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"  # of both models
    preset: str = "gpt2-baseline"  # whose switches and optimiser this project's model has; the baseline keeps its table and GELU
    against: str = ""  # another preset of this project, as a further side
    B: int = 4  # sequences in the batch
    T: int = 1024  # tokens in a sequence
    vocab_size: int = 50304  # embedding rows of both models
    dtype: Literal["auto", "bfloat16", "float32"] = (
        "auto"  # of the matmuls; auto = bfloat16 where the device has it
    )
    steps: int = 10  # timed steps of each side
    warmup: int = 2  # steps of each side before the clock; the first one compiles
    device: str = "auto"  # cuda, mps or cpu; auto takes the first of these that is there
    use_compile: bool = (
        True  # this project's model compiled, as in training; transformers runs as it comes
    )
    compiled_baseline: bool = False  # transformers compiled, too, as a third side
    memory: bool = True  # peak memory of each side, in processes of their own
    keep_memory: bool = True  # on a CPU, all sides: freed memory kept, as train_gpt2.py does; False: malloc as it comes
    recompute: bool = False  # this project's activations computed a second time instead of kept
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = (
        "auto"  # SDPA's back end, where it is used
    )
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"  # torch.compile's


def step(args: Step) -> dict:
    """Both models on one random batch, with the same autocast, clipping and optimiser, and without dropout."""
    check(args)
    sides = [
        "ours",
        "transformers",
        *["transformers compiled"] * args.compiled_baseline,
        *[args.against] * bool(args.against),
    ]
    peak = {side: peak_memory(args, side) for side in sides} if args.memory else {}
    # transformers shifts the labels itself, which leaves it one target less in each sequence
    ms, losses = take_turns(
        {side: training_step(args, side)[0] for side in sides}, args.warmup, args.steps
    )
    tok_s = {side: 1e3 * args.B * args.T / statistics.median(values) for side, values in ms.items()}
    print(
        f"\n{'one training step':24}{'tok/s':>10}{'median ms':>12}{'min':>10}{'max':>10}{'last loss':>12}{'peak GB':>10}"
    )
    for side, values in ms.items():
        print(
            f"{side:24}{tok_s[side]:10,.0f}{statistics.median(values):12,.1f}{min(values):10,.1f}{max(values):10,.1f}"
            f"{losses[side]:12.4f}{peak[side] / 1e9 if peak else float('nan'):10.2f}"
        )
    result = dict(
        ratio=tok_s["ours"] / tok_s["transformers"],
        tok_s=tok_s["ours"],
        baseline_tok_s=tok_s["transformers"],
        ours_ms=ms["ours"],
        baseline_ms=ms["transformers"],
    )
    if peak:
        result |= dict(
            memory_ratio=peak["ours"] / peak["transformers"],
            peak=peak["ours"],
            baseline_peak=peak["transformers"],
        )
    if args.compiled_baseline:
        result |= dict(
            compiled_ratio=tok_s["ours"] / tok_s["transformers compiled"],
            compiled_ms=ms["transformers compiled"],
        )
    if args.against:
        result |= dict(
            against_ratio=tok_s["ours"] / tok_s[args.against],
            against_tok_s=tok_s[args.against],
            against_ms=ms[args.against],
        )
        print(
            f"{args.preset} / {args.against}: {result['against_ratio']:.2f} of the tokens a second"
        )
    return result | used(args)


def check(args):
    if wrong := [k for k in ("B", "T", "vocab_size", "steps", "warmup") if getattr(args, k, 1) < 1]:
        raise UserError(
            "; ".join(f"{k} is {getattr(args, k)}, must be at least 1" for k in wrong)
            + f"; hint: --{wrong[0]} 1"
        )
    for name in filter(None, (args.preset, getattr(args, "against", ""))):
        preset(name)
    if args.use_compile and (why := compile_error(pick_device(args.device))):
        raise UserError(
            f"torch.compile does not work here ({why}); hint: install g++, or --use_compile False"
        )


def used(args) -> dict:
    """The settings, with the device and type that "auto" came to."""
    device = pick_device(args.device)
    return dataclasses.asdict(args) | dict(
        device=environment(device, 1)["device"],
        dtype=str(autocast_dtype(device, args.dtype)).removeprefix("torch."),
    )


def training_step(
    args: Step, side: str, wrap: Callable = lambda model: model
) -> tuple[Callable[[], float], GPT]:
    """A function that takes one step and returns its loss, and the model. Each side sees the same tokens.

    side: ours (args.preset), transformers, transformers compiled, or another preset's name.
    """
    device = pick_device(args.device)
    dtype = autocast_dtype(device, args.dtype)
    if device.type == "cpu" and args.keep_memory:
        keep_freed_memory()
    torch.manual_seed(42)
    ids = torch.randint(args.vocab_size, (args.B, args.T + 1), device=device)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()  # (B, T) each
    shape = dict(zip(("n_layer", "n_head", "n_embd"), SIZES[args.size]), vocab_size=args.vocab_size)
    if not side.startswith("transformers"):
        cfg = preset(args.preset if side == "ours" else side)
        if cfg.arch == "modern" and shape["n_embd"] % 128 == 0:
            shape["n_head"] = shape["n_embd"] // 128  # as in gpt2-modern
        switches = {name: getattr(cfg, name) for name in ("use_rope", "use_swiglu", "arch")}
        model = GPT(GPTConfig(args.T, **shape, **switches)).to(device)
        optimizer = optim.build(
            dataclasses.replace(cfg, max_lr=6e-4 if cfg.optimizer == "adamw" else cfg.max_lr),
            model,
            dtype,
        )
        model.recompute = args.recompute
        if args.use_compile and device.type == "cpu":
            speed_up(model, dtype)
        compiled = (
            torch.compile(model, fullgraph=True, dynamic=False, mode=args.compile_mode)
            if args.use_compile
            else model
        )
        wrapped = wrap(compiled)
        forward = lambda: wrapped(x, y)
    else:
        model = transformers_gpt2(args.T, shape).to(device)
        compiled = torch.compile(model) if side == "transformers compiled" else model
        forward = lambda: compiled(input_ids=x, labels=x).loss
        optimizer = optim.adamw(model, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    backend = {
        "flash": "FLASH_ATTENTION",
        "cudnn": "CUDNN_ATTENTION",
        "efficient": "EFFICIENT_ATTENTION",
        "math": "MATH",
    }

    def run() -> float:
        chosen = (
            contextlib.nullcontext()
            if args.attention == "auto"
            else sdpa_kernel(SDPBackend[backend[args.attention]])
        )
        with chosen, torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = forward()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device, on all sides

    return run, model


def transformers_gpt2(T: int, shape: dict) -> torch.nn.Module:
    """transformers' GPT-2 at its best: no dropout (the default 0.1 makes it several times slower), SDPA, no cache."""
    import transformers

    transformers.logging.set_verbosity_error()  # it warns about its own defaults
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_positions=T,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="sdpa",
            use_cache=False,
            **shape,
        )
    ).train()


def peak_memory(args: Step, side: str) -> int:
    """Bytes that a process of its own needs for three steps: on a GPU what torch held, on a CPU all that was resident."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_peak, args, side).result()


def measure_peak(args: Step, side: str) -> int:
    run, _ = training_step(args, side)
    for _ in range(3):
        run()
    if torch.cuda.is_available() and pick_device(args.device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


# --------------------------------------------------------------------------------------------------------------------
# sweep: tokens a second by B and T


@dataclass(frozen=True)
class Sweep(Step):
    """This project's training step at several shapes: cost should grow as the operations do."""

    Bs: tuple[int, ...] = (1, 2, 4, 8)  # sequences in the batch
    Ts: tuple[int, ...] = (256, 512, 1024, 2048)  # tokens in a sequence


def sweep(args: Sweep) -> dict:
    """Median tokens a second of each shape, and operations a second; ratio: the slowest of the latter over the fastest."""
    check(args)
    rates, flops = {}, {}
    for T in args.Ts:
        for B in args.Bs:
            run, model = training_step(dataclasses.replace(args, B=B, T=T), "ours")
            with contextlib.redirect_stdout(None):
                ms = take_turns({"ours": run}, args.warmup, args.steps)[0]["ours"]
            rates[f"{B}x{T}"] = 1e3 * B * T / statistics.median(ms)
            flops[f"{B}x{T}"] = rates[f"{B}x{T}"] * model.flops_per_token(T)
            print(
                f"B {B:4} x T {T:5} | {rates[f'{B}x{T}']:10,.0f} tok/s | {flops[f'{B}x{T}'] / 1e9:10,.0f} GFLOP/s",
                flush=True,
            )
            torch._dynamo.reset()
    return dict(ratio=min(flops.values()) / max(flops.values()), tok_s=rates, flop_s=flops) | used(
        args
    )


# --------------------------------------------------------------------------------------------------------------------
# profile: where a step's time goes

KINDS = (  # names of operators and kernels, the first that fits
    ("attention", r"gpt2::attention|scaled_dot_product|flash|fmha|cudnn_generated"),
    ("matmul", r"^aten::(add|b|badd)?mm$|gemm|nvjet|cutlass|xmma"),
    ("cross-entropy", r"(cpp|triton)_.*(log_softmax|nll_loss)"),
    (
        "element-wise",
        r"cpp_fused|triton_|CompiledFxGraph|^aten::(copy_|fill_|add|zero_|embedding|sum)",
    ),
    ("optimiser, clip", r"adam|vector_norm|foreach|^aten::mul_|lpnorm|multi_tensor"),
    ("rest", r""),
)


@dataclass(frozen=True)
class Profile(Step):
    """Where this project's training step spends its time, against a floor of operations and bytes."""


def profile(args: Profile) -> dict:
    """Milliseconds by kind; floors: operations over the rate of a large matmul, AdamW's bytes over the rate of a copy."""
    check(args)
    device, tokens = pick_device(args.device), args.B * args.T
    dtype = autocast_dtype(device, args.dtype)
    torch._inductor.config.cpp.enable_kernel_profile = True  # names the generated kernels of a CPU
    run, model = training_step(args, "ours")
    with contextlib.redirect_stdout(None):
        ms = take_turns({"ours": run}, args.warmup, args.steps)[0]["ours"]
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as recorded:
        t0 = time.perf_counter()
        run()
        wall = 1e3 * (time.perf_counter() - t0)
    found = dict.fromkeys((kind for kind, _ in KINDS), 0.0)
    for event in recorded.key_averages():
        kind = next(kind for kind, pattern in KINDS if re.search(pattern, event.key))
        found[kind] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
    found["host gaps"] = max(0.0, wall - sum(found.values()))
    rate, copy = device_rates(device, dtype)
    c, n = model.config, sum(p.numel() for p in model.parameters())
    floor = {
        "matmul": 1e3 * tokens * model.flops_per_token(0) / rate,
        "attention": 1e3 * tokens * 6 * c.n_layer * c.n_embd * args.T / rate,  # causal: half of T
        "optimiser, clip": 1e3 * 4 * n * 8 / copy,
    }  # p, m, v read and written, g read twice, float32
    print(f"\n{'kind':20}{'ms':>10}{'share':>10}{'floor ms':>10}")
    for kind, value in found.items():
        print(f"{kind:20}{value:10,.1f}{value / wall:10.1%}{floor.get(kind, 0):10,.1f}")
    print(
        f"{'step':20}{wall:10,.1f}{'':10}{sum(floor.values()):10,.1f}   (median {statistics.median(ms):,.1f} ms unprofiled; "
        f"matmul {rate / 1e9:,.0f} GFLOP/s, copy {copy / 1e9:,.1f} GB/s)"
    )
    return dict(
        ratio=sum(floor.values()) / statistics.median(ms),
        ms=found,
        floor_ms=floor,
        step_ms=ms,
        matmul_flop_s=rate,
        copy_byte_s=copy,
    ) | used(args)


def device_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of (4096, 768) @ (768, 3072), and bytes a second, read and written, of a 256 MB copy: the best of 10."""
    a, b = (
        torch.randn(4096, 768, device=device, dtype=dtype),
        torch.randn(768, 3072, device=device, dtype=dtype),
    )
    x = torch.ones(2**26, device=device)
    y = x.clone()
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    sides = {"matmul": lambda: (a @ b, wait()), "copy": lambda: (y.copy_(x), wait())}
    with contextlib.redirect_stdout(None):
        ms, _ = take_turns(sides, 3, 10)
    return 2e3 * 4096 * 768 * 3072 / min(ms["matmul"]), 8e3 * 2**26 / min(ms["copy"])


# --------------------------------------------------------------------------------------------------------------------
# startup: from the command to the first step


@dataclass(frozen=True)
class Startup:
    """Seconds from the command to the first step of train_gpt2.py, with nothing compiled before and with it cached."""

    preset: str = "shakespeare"  # what to start; its data must be there or be fetched
    rounds: int = 3  # starts of each kind
    device: str = "auto"  # cuda, mps or cpu; auto takes the first of these that is there


def startup(args: Startup) -> dict:
    """ratio: first over cached."""

    def seconds(cache: str, logs: str) -> float:
        command = [
            sys.executable,
            "train_gpt2.py",
            args.preset,
            "--max_steps",
            "1",
            "--log_interval",
            "1",
            "--val_tokens",
            "1024",
            "--hellaswag_limit",
            "0",
            "--n_samples",
            "0",
            "--wandb",
            "off",
            "--log_dir",
            logs,
            "--device",
            args.device,
        ]
        t0 = time.perf_counter()
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parent,
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
        ) as process:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("step 1/1"):
                    found = time.perf_counter() - t0
        if process.returncode:
            raise UserError(f"{' '.join(command)} failed: {lines[-1].strip()}; hint: run it alone")
        return found

    times = {"first": [], "cached": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for i, kind in enumerate(times):
                times[kind].append(seconds(f"{folder}/cache", f"{folder}/log{i}"))
    print(f"\n{'command to first step':24}{'median s':>10}{'min':>10}{'max':>10}")
    for kind, values in times.items():
        print(f"{kind:24}{statistics.median(values):10.1f}{min(values):10.1f}{max(values):10.1f}")
    first, cached = map(statistics.median, times.values())
    return dict(
        ratio=first / cached,
        first_s=times["first"],
        cached_s=times["cached"],
        **dataclasses.asdict(args),
    )


# --------------------------------------------------------------------------------------------------------------------
# ddp: what two processes lose by being one run


@dataclass(frozen=True)
class Parallel(Step):
    """Two gloo processes of one thread each, their gradients averaged by DDP, against the same two left alone."""


def parallel(args: Parallel) -> dict:
    """Both kinds of step in turn in the same two processes, which wait for each other before each."""
    check(args)
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool,
    ):
        both = [pool.submit(one_of_two, rank, args, f"file://{folder}/meet") for rank in range(2)]
        ms, others = (future.result() for future in both)
    ms = {side: values + others[side] for side, values in ms.items()}
    alone, together = (statistics.median(values) for values in ms.values())
    print(f"\n{'two processes':24}{'median ms':>12}{'min':>10}{'max':>10}")
    for side, values in ms.items():
        print(
            f"{side:24}{statistics.median(values):12,.1f}{min(values):10,.1f}{max(values):10,.1f}"
        )
    return dict(
        ratio=alone / together, lost=1 - alone / together, alone_ms=ms["alone"], ddp_ms=ms["ddp"]
    ) | used(args)


def one_of_two(rank: int, args: Parallel, meet: str) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    sides = {
        "alone": training_step(args, "ours")[0],
        "ddp": training_step(args, "ours", DistributedDataParallel)[0],
    }
    ms = {side: [] for side in sides}
    for turn in range(-args.warmup, args.steps):
        for side, run in sides.items():
            dist.barrier()
            t0 = time.perf_counter()
            run()
            if turn >= 0:
                ms[side].append(round(1e3 * (time.perf_counter() - t0), 3))
    dist.destroy_process_group()
    return ms


# --------------------------------------------------------------------------------------------------------------------
# muon: the update of the hidden matrices


@dataclass(frozen=True)
class Matrices:
    """Muon's update of a modern model's hidden matrices against torch.optim.Muon, which takes one matrix at a time."""

    size: Literal["tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    layers: int = 0  # blocks whose matrices are updated; 0 = all of that size
    rounds: int = 3  # updates of each side
    dtype: Literal["auto", "bfloat16", "float32"] = (
        "auto"  # of our multiplications; auto = bfloat16 where the device has it
    )
    device: str = "auto"  # cuda, mps or cpu; auto takes the first of these that is there


def muon(args: Matrices) -> dict:
    """The same weights, gradients and type on both sides, q, k and v apart.

    torch.optim.Muon multiplies in bfloat16 always, 75 times as slow as float32 on a CPU that only emulates it. Where ours is
    in float32, so is theirs here: the types are not to decide.
    """
    if wrong := [k for k in ("layers", "rounds") if getattr(args, k) < (k == "rounds")]:
        raise UserError(f"{wrong[0]} is {getattr(args, wrong[0])}, too few; hint: --{wrong[0]} 1")
    device, (n_layer, n_head, n_embd) = pick_device(args.device), SIZES[args.size]
    dtype, wait = (
        autocast_dtype(device, args.dtype),
        torch.cuda.synchronize if device.type == "cuda" else (lambda: None),
    )
    if device.type == "cpu":
        keep_freed_memory()  # as in training, and to the good of both sides
    torch.manual_seed(42)
    model = GPT(GPTConfig(16, 128, args.layers or n_layer, n_head, n_embd, arch="modern")).to(
        device
    )  # next to no vocabulary
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    split = lambda t, name: t.detach().clone().chunk(3 if "c_attn" in name else 1)
    parts = {
        name: [torch.nn.Parameter(w.clone()) for w in split(p, name)]
        for name, p in model.h.named_parameters()
    }
    for name, p in model.h.named_parameters():
        for part, grad in zip(parts[name], split(p.grad, name)):
            part.grad = grad.clone()
    cfg = preset("gpt2-modern")
    theirs = torch.optim.Muon(
        [part for some in parts.values() for part in some],
        lr=cfg.max_lr,
        weight_decay=cfg.weight_decay,
    )
    ours = optim.build(cfg, model, dtype)

    def torchs():
        in_type = (
            contextlib.nullcontext()
            if dtype == torch.bfloat16
            else mock.patch.object(torch.Tensor, "bfloat16", lambda x: x.clone())
        )
        with in_type:
            theirs.step()
        wait()

    ms, _ = take_turns(
        {"ours": lambda: (ours.step(), wait()) and None, "torch.optim.Muon": torchs}, 1, args.rounds
    )
    print(
        f"\n{f'update of {len(parts) * 3 // 2:,} matrices':30}{'median ms':>12}{'min':>10}{'max':>10}"
    )
    for side, values in ms.items():
        print(
            f"{side:30}{statistics.median(values):12,.1f}{min(values):10,.1f}{max(values):10,.1f}"
        )
    apart = max(
        ((torch.cat([w.detach() for w in parts[name]]) - p).norm() / p.norm()).item()
        for name, p in model.h.named_parameters()
    )
    print(f"largest relative difference of a matrix after all updates: {apart:.1e}")
    return dict(
        ratio=statistics.median(ms["torch.optim.Muon"]) / statistics.median(ms["ours"]),
        ours_ms=ms["ours"],
        baseline_ms=ms["torch.optim.Muon"],
        difference=apart,
        **dataclasses.asdict(args)
        | dict(device=environment(device, 1)["device"], dtype=str(dtype).removeprefix("torch.")),
    )


# --------------------------------------------------------------------------------------------------------------------
# suite: all that a GPU is asked, in one call


@dataclass(frozen=True)
class Suite:
    """On a GPU: the tests that need one, then each variant of the step, the profile, HellaSwag and decoding."""

    steps: int = 20  # timed steps of each variant
    device: str = "cuda"  # of all of them
    out: str = "log/reference"  # directory of bench_DEVICE.jsonl, to which each result adds a line


def suite(args: Suite) -> dict:
    """Each part in a process of its own; one that fails is told, and the next one goes on. ratio: that of the plain step."""
    device, root = pick_device(args.device), Path(__file__).parent
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-k", "gpu", "-n", "0"], cwd=root)
    common = ["--device", args.device]
    step = ["step", *common, "--steps", str(args.steps)]
    big = [*step, "--memory", "False", "--compiled_baseline", "False"]
    variants = [
        [*step, "--B", "64", "--compiled_baseline", "True"],
        [*step, "--B", "128"],
        *([*big, "--B", "64", "--attention", kind] for kind in ("flash", "cudnn", "efficient")),
        [*big, "--B", "64", "--compile_mode", "max-autotune-no-cudagraphs"],
        [*step, "--B", "64", "--recompute", "True"],
        *([*big, "--B", "64", "--preset", name] for name in ("gpt2-rope", "gpt2-swiglu")),
        [*big, "--B", "64", "--preset", "gpt2-modern", "--against", "gpt2-baseline"],
        ["muon", *common],
        ["profile", *common, "--B", "64"],
        ["sweep", *common, "--steps", str(args.steps), "--Bs", "8", "16", "32", "64"],
        ["hellaswag", *common, "--items", "1000"],
        ["generate", *common, "--use_compile", "True"],
    ]
    name = re.sub(r"\W+", "_", environment(device, 1)["device"]).strip("_")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    ratios, failed = [], ["pytest"] * bool(tests.returncode)
    for variant in variants:
        print("\n$ python bench.py", *variant, flush=True)
        done = subprocess.run(
            [sys.executable, "bench.py", *variant], cwd=root, stdout=subprocess.PIPE, text=True
        )
        print(done.stdout, flush=True)
        if done.returncode:
            failed.append(" ".join(variant))
            continue
        result = json.loads(done.stdout.strip().splitlines()[-1])
        ratios.append(result["ratio"])
        with open(Path(args.out) / f"bench_{name}.jsonl", "a") as f:
            f.write(json.dumps(result) + "\n")
    if failed:
        print("failed |", " | ".join(failed))
    return dict(ratio=ratios[0] if ratios else None, failed=failed, **dataclasses.asdict(args))


# --------------------------------------------------------------------------------------------------------------------
# loader: windows in random order


@dataclass(frozen=True)
class Loader:
    """Random windows of token shards against the usual way: an index array, memory maps, row by row, torch.stack."""

    B: int = 64  # windows in a batch
    T: int = 1024  # tokens in a window
    windows: int = 9_770_000  # of the index, in 100 shards: 10B tokens; sparse files, which take no room on the disk
    tokens: int = 50_000_000  # read for the speed: random ones in 5 ordinary files, just written, so in the file cache
    batches: int = 50  # of each side in a turn
    rounds: int = 21  # turns of each side


def loader(args: Loader) -> dict:
    """The index: seconds to open, bytes kept. Then batches of x and y, int64 on the CPU, windows in random order."""
    if args.tokens < 10 * args.B * (args.T + 1) or args.windows < 100:
        raise UserError(
            f"{args.tokens} tokens or {args.windows} windows are too few for B x T = {args.B} x {args.T}; "
            f"hint: --tokens {20 * args.B * args.T} --windows 1000"
        )
    torch.set_num_threads(
        1
    )  # what torchrun sets; for work this small a second thread is only waited for
    with tempfile.TemporaryDirectory() as folder:
        sparse, real = os.path.join(folder, "sparse"), os.path.join(folder, "real")
        sparse_shards(sparse, [args.windows // 100 * args.T + 1] * 100)
        index = index_cost(sparse, args)
        os.mkdir(real)
        for i in range(5):
            tokens = np.random.default_rng(i).integers(0, 50257, args.tokens // 5, dtype=np.uint16)
            np.save(os.path.join(real, f"real_train_{i:06d}.npy"), tokens)
        windows, usual = open_windows(real, args.T), UsualLoader(real, args.B, args.T)
        ahead = shards.Loader(windows, args.B * args.T, args.B, 0, 1, torch.device("cpu"))
        direct = shards.Loader(windows, args.B * args.T, args.B, 0, 1, torch.device("cpu"))
        direct.close()  # without its thread: read() is called here
        rows, turn = np.zeros((args.B, args.T + 1), np.uint16), range(args.batches)
        numbers, blocks = itertools.count(), itertools.count()

        def repeat(get_batch: Callable):
            for _ in (
                turn
            ):  # no list of the results: a batch is dropped before the next one, as in training
                get_batch()

        def prefetched():  # ends when the batch read ahead is there, so that each turn pays for as many as it takes
            repeat(ahead.next)
            ahead.ahead.result()

        def windows_only():  # uint16 windows in a buffer, the order computed for as many at a time as Loader does
            places = windows.locate(next(blocks) * shards.AHEAD + np.arange(shards.AHEAD))
            for at in range(0, args.batches * args.B, args.B):
                at %= shards.AHEAD // args.B * args.B
                windows.fetch(places[:, at : at + args.B], rows)

        sides = {
            "ours": lambda: repeat(lambda: direct.read(next(numbers))),
            "usual way": lambda: repeat(usual.get_batch),
            "ours, by the reading thread": prefetched,
            "ours, uint16 windows only": windows_only,
        }
        ms, _ = take_turns(sides, 2, args.rounds)
        ahead.close()
    amount = args.batches * args.B * args.T
    tok_s = {side: 1e3 * amount / statistics.median(values) for side, values in ms.items()}
    print(f"\n{f'index of {args.windows:,} windows':30}{'seconds':>12}{'MB':>12}")
    for side, (seconds, size) in index.items():
        print(f"{side:30}{seconds:12.3f}{size / 1e6:12.3f}")
    print(
        f"\n{f'batches of {args.B} x {args.T} tokens':30}{'M tok/s':>12}{'slowest':>12}{'fastest':>12}"
    )
    for side, values in ms.items():
        speeds = tok_s[side], 1e3 * amount / max(values), 1e3 * amount / min(values)
        print(f"{side:30}" + "".join(f"{speed / 1e6:12,.0f}" for speed in speeds))
    ratios = [theirs / ours for ours, theirs in zip(ms["ours"], ms["usual way"])]
    return dict(
        ratio=tok_s["ours"] / tok_s["usual way"],
        ratio_quartiles=statistics.quantiles(ratios, n=4),
        memory_ratio=index["usual way"][1] / index["ours"][1],
        tok_s=tok_s["ours"],
        baseline_tok_s=tok_s["usual way"],
        thread_tok_s=tok_s["ours, by the reading thread"],
        windows_tok_s=tok_s["ours, uint16 windows only"],
        index_s=index["ours"][0],
        baseline_index_s=index["usual way"][0],
        index_bytes=index["ours"][1],
        baseline_index_bytes=index["usual way"][1],
        ours_ms=ms["ours"],
        baseline_ms=ms["usual way"],
        **dataclasses.asdict(args),
    )


def open_windows(folder: str, T: int) -> shards.Windows:
    return shards.Windows(shards.open_shards(folder, "train", T), T, "global", 1337)


def index_cost(folder: str, args: Loader) -> dict[str, tuple[float, int]]:
    """Of each side: seconds until the first batch's windows are known, and bytes kept to know all the others."""
    first, costs = np.arange(args.B), {}
    t0 = time.perf_counter()
    open_windows(folder, args.T).locate(first)
    seconds = time.perf_counter() - t0
    tracemalloc.start()
    kept = open_windows(folder, args.T)
    kept = kept, kept.locate(first)
    costs["ours"] = seconds, tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    t0 = time.perf_counter()
    usual = UsualLoader(folder, args.B, args.T)
    costs["usual way"] = time.perf_counter() - t0, usual.index.nbytes
    return costs


class UsualLoader:
    """The predecessor's loader with global shuffle: an array of all (shard, start), each row through a memory map."""

    def __init__(self, folder: str, B: int, T: int, seed: int = 1337):
        self.maps = [
            np.load(os.path.join(folder, f), mmap_mode="r") for f in sorted(os.listdir(folder))
        ]
        starts = [np.arange((len(m) - 1) // T) * T for m in self.maps]
        self.index = np.concatenate(
            [np.stack([np.full_like(s, i), s], axis=1) for i, s in enumerate(starts)]
        )
        np.random.default_rng(seed).shuffle(self.index)
        self.B, self.T, self.at = B, T, 0

    def get_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        xs, ys = [], []
        for shard, start in self.index[self.at : self.at + self.B]:
            row = torch.from_numpy(self.maps[shard][start : start + self.T + 1].astype(np.uint16))
            xs.append(row[:-1])
            ys.append(row[1:])
        self.at = (self.at + self.B) % (len(self.index) - self.B)
        return torch.stack(xs).long(), torch.stack(ys).long()


def sparse_shards(folder: str, sizes: list[int]):
    """Training shards of zeros that take no room on the disk: a header, then a hole."""
    os.mkdir(folder)
    for i, n in enumerate(sizes):
        with open(os.path.join(folder, f"sparse_train_{i:06d}.npy"), "wb") as f:
            np.lib.format.write_array_header_1_0(
                f, dict(descr="<u2", fortran_order=False, shape=(n,))
            )
            f.truncate(f.tell() + 2 * n)


# --------------------------------------------------------------------------------------------------------------------
# save: a checkpoint


@dataclass(frozen=True)
class Save:
    """A checkpoint: how long checkpoint.Saver holds the training loop, against writing it while the loop waits."""

    size: Literal["tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    rounds: int = 5  # saves of each kind
    folder: str = ""  # directory in which the checkpoints are written, on the disk of interest; a temporary one by default
    device: str = "auto"  # cuda, mps or cpu; auto takes the first of these that is there


def save(args: Save) -> dict:
    """Both write and verify the same files; the second save beside training begins when the first one's thread is done."""
    device = pick_device(args.device)
    n_layer, n_head, n_embd = SIZES[args.size]
    model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)).to(device)
    optimizer = optim.adamw(model, 0.0, (0.9, 0.95), 0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # makes the moments
    optimizer.zero_grad(set_to_none=True)
    held, waited = [], []
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        saver = checkpoint.Saver(
            Path(folder), 1, 0, model, optimizer, RunLog(), lambda message: None
        )
        saver.reserve()
        for step in range(0, 2 * args.rounds, 2):
            saver.wait()
            t0 = time.perf_counter()
            saver.save(step, {})
            held.append(round(1e3 * (time.perf_counter() - t0), 3))
            if not saver.wait():
                raise UserError(f"cannot write to {folder}; hint: --folder")
            t0 = time.perf_counter()
            path = checkpoint.save(Path(folder), step + 1, model, optimizer, {})
            waited.append(round(1e3 * (time.perf_counter() - t0), 3))
            size = sum(f.stat().st_size for f in path.iterdir())
            checkpoint.prune(Path(folder), step + 1, 1, None)
        saver.close()
    print(
        f"{'checkpoint of ' + format(size / 1e9, '.2f') + ' GB':30}{'ms':>12}{'fastest':>12}{'slowest':>12}"
    )
    for side, ms in (("training held", held), ("waiting for the disk", waited)):
        print(f"{side:30}{statistics.median(ms):12,.0f}{min(ms):12,.0f}{max(ms):12,.0f}")
    return dict(
        ratio=statistics.median(waited) / statistics.median(held),
        save_ms=statistics.median(held),
        synchronous_ms=statistics.median(waited),
        ours_ms=held,
        baseline_ms=waited,
        bytes=size,
        **dataclasses.asdict(args) | dict(device=environment(device, 1)["device"]),
    )


# --------------------------------------------------------------------------------------------------------------------
# hellaswag: an evaluation


@dataclass(frozen=True)
class Evaluation:
    """HellaSwag, gpt2 protocol: packed rows against one item at a time, four padded rows, all logits."""

    size: Literal["tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = (
        "gpt2"  # of the model when none is given
    )
    model: str = (
        ""  # run directory, checkpoint, or Hugging Face name or folder; random weights unless given
    )
    data: str = str(hellaswag.DATA)  # jsonl or jsonl.gz
    items: int = 100  # items in each turn
    rounds: int = 3  # turns of each side, each with items of its own
    dtype: Literal["auto", "bfloat16", "float32"] = (
        "auto"  # of the matmuls; auto = bfloat16 where the device has it
    )
    device: str = "auto"  # cuda, mps or cpu; auto takes the first of these that is there


def evaluation(args: Evaluation) -> dict:
    """Both score the same items with the same weights; where they choose differently is counted."""
    device = pick_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()  # for both sides
    if not Path(args.data).exists():
        raise UserError(
            f"no such file: {args.data}; hint: --data FILE (python hellaswag.py fetches it)"
        )
    torch.manual_seed(1)
    n_layer, n_head, n_embd = SIZES[args.size]
    model = (
        generate.load(args.model)
        if args.model
        else GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    )
    model, dtype = model.to(device), autocast_dtype(device, args.dtype)
    autocast = lambda: torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    chosen = hellaswag.load(Path(args.data), "gpt2", args.items * args.rounds)
    texts = [
        chosen.tokens[e - n : e].tolist()
        for n, e in zip(chosen.lengths.sum(1), chosen.lengths.sum(1).cumsum())
    ]
    usual = lambda part, autocast: np.array(
        [
            usual_item(
                model, texts[4 * i : 4 * i + 4], chosen.lengths[4 * i : 4 * i + 4, 0], autocast
            )
            for i in range(part.start, part.stop)
        ]
    )
    ms, losses = {"ours": [], "usual way": []}, {"ours": [], "usual way": []}
    world = World(0, 1, device)
    for turn in range(-1, args.rounds):  # the first turn is the warm-up
        part = slice(max(turn, 0) * args.items, (max(turn, 0) + 1) * args.items)
        paths = slice(4 * part.start, 4 * part.stop)
        mine = chosen._replace(
            tokens=np.concatenate(texts[paths]).astype(np.uint16),
            lengths=chosen.lengths[paths],
            divisors=chosen.divisors[paths],
            labels=chosen.labels[part],
        )
        ours = hellaswag.HellaSwag(mine, model, world, autocast, compiled=True)
        for side, run in (("ours", ours.losses), ("usual way", lambda: usual(part, autocast))):
            t0 = time.perf_counter()
            found = run()
            if turn >= 0:
                ms[side].append(round(1e3 * (time.perf_counter() - t0), 3))
                losses[side].append(found)
    a, b = (np.concatenate(losses[side]) for side in losses)
    tokens = chosen.divisors.reshape(-1, 4)
    other = {"other_choices": other_choices(a, b, tokens)}
    if dtype != torch.float32:  # how much of that is rounding: the usual way against itself
        exact = usual(slice(0, len(a)), contextlib.nullcontext)
        other |= {
            "other_than_float32": other_choices(a, exact, tokens),
            "baseline_other_than_float32": other_choices(b, exact, tokens),
        }
    speed = {side: 1e3 * args.items / statistics.median(values) for side, values in ms.items()}
    print(f"\n{'HellaSwag':30}{'items/s':>12}{'slowest':>12}{'fastest':>12}")
    for side, values in ms.items():
        rates = speed[side], 1e3 * args.items / max(values), 1e3 * args.items / min(values)
        print(f"{side:30}" + "".join(f"{rate:12,.1f}" for rate in rates))
    print(
        f"largest difference of an ending's loss {abs(a - b).max():.1e}; of {len(a)} items, "
        + ", ".join(f"{name}: {count}" for name, count in other.items())
    )
    return dict(
        ratio=speed["ours"] / speed["usual way"],
        ratios=[u / o for o, u in zip(ms["ours"], ms["usual way"])],
        items_s=speed["ours"],
        baseline_items_s=speed["usual way"],
        **other,
        largest_difference=abs(a - b).max().item(),
        ours_ms=ms["ours"],
        baseline_ms=ms["usual way"],
        **dataclasses.asdict(args)
        | dict(device=environment(device, 1)["device"], dtype=str(dtype).removeprefix("torch.")),
    )


def other_choices(a: np.ndarray, b: np.ndarray, tokens: np.ndarray) -> int:
    """Items (n, 4) for which two sets of losses choose differently, by sum or by token; margins below 1e-5 in b aside."""
    differ = np.zeros(len(a), bool)
    for x, y in ((a, b), (a / tokens, b / tokens)):
        best = np.sort(y, 1)
        differ |= (x.argmin(1) != y.argmin(1)) & (best[:, 1] - best[:, 0] > 1e-5)
    return int(differ.sum())


@torch.no_grad()
def usual_item(model, texts: list[list[int]], contexts: np.ndarray, autocast) -> list[float]:
    """Losses of an item's four endings as build-nanogpt and its followers get them: four padded rows, all logits."""
    T = max(map(len, texts))
    ids, scored = torch.zeros(4, T, dtype=torch.long), torch.zeros(4, T)
    for row, (text, n) in enumerate(zip(texts, contexts)):
        ids[row, : len(text)] = torch.tensor(text)
        scored[row, n : len(text)] = 1
    ids, scored = (
        ids.to(next(model.parameters()).device),
        scored.to(next(model.parameters()).device),
    )
    with autocast():
        logits = model(ids)
    nats = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(4, -1)
    return (nats * scored[:, 1:]).sum(1).tolist()


# --------------------------------------------------------------------------------------------------------------------
# prepare: documents into shards


@dataclass(frozen=True)
class Preparation:
    """Documents into shards by prepare.py, against tiktoken's batch call alone and the predecessor's loop."""

    data: str  # .jsonl, .jsonl.gz or .parquet file with a field `text`
    rounds: int = 3  # turns of each side


def preparation(args: Preparation) -> dict:
    """Ours reads the file and leaves checked shards; the others have all documents in memory, tiktoken writes nothing.

    Both get as many threads or processes as there are cores (the predecessor takes half). Memory is the peak of a process
    of its own that does what ours does; it has no children.
    """
    if args.rounds < 1 or not os.path.isfile(args.data):
        raise UserError(
            f"rounds is {args.rounds}, data {args.data!r}; hint: at least 1, and a file that is there"
        )
    memory, cores = preparation_memory(args.data), os.cpu_count()
    with prepare.progress(0) as bar:
        documents = [
            text
            for _, text in prepare.read_documents(
                args.data, "text", dict(documents=0, empty=0), bar
            )
        ]
    gpt2 = tokenizer.gpt2()

    def ours() -> int:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            prepare.files((args.data,), folder)
            return sum(shard["tokens"] for shard in shards.read_manifest(folder)["shards"])

    sides = {
        "prepare.py files": ours,
        "encode_ordinary_batch alone": lambda: sum(
            map(len, gpt2.encode_ordinary_batch(documents, num_threads=cores))
        ),
        "per-document loop": lambda: usual_preparation(documents, cores),
    }
    ms, tokens = take_turns(sides, 1, args.rounds)
    count = tokens["prepare.py files"]
    if (
        not count
        == tokens["per-document loop"]
        == tokens["encode_ordinary_batch alone"] + len(documents)
    ):
        raise RuntimeError(f"the sides differ in tokens: {tokens}, documents: {len(documents)}")
    tok_s = {side: 1e3 * count / statistics.median(values) for side, values in ms.items()}
    print(f"\n{f'{count:,} tokens':30}{'M tok/s':>12}{'slowest':>12}{'fastest':>12}")
    for side, values in ms.items():
        speeds = tok_s[side], 1e3 * count / max(values), 1e3 * count / min(values)
        print(f"{side:30}" + "".join(f"{speed / 1e6:12.2f}" for speed in speeds))
    print(f"peak memory of prepare.py files: {memory / 1e6:,.0f} MB")
    mine, batch, loop = ms.values()
    return dict(
        ratio=tok_s["prepare.py files"] / tok_s["per-document loop"],
        batch_ratio=tok_s["prepare.py files"] / tok_s["encode_ordinary_batch alone"],
        ratios=[b / a for a, b in zip(mine, loop)],
        batch_ratios=[b / a for a, b in zip(mine, batch)],
        tok_s=tok_s["prepare.py files"],
        baseline_tok_s=tok_s["per-document loop"],
        batch_tok_s=tok_s["encode_ordinary_batch alone"],
        peak_bytes=memory,
        ours_ms=mine,
        baseline_ms=loop,
        batch_ms=batch,
        tokens=count,
        cores=cores,
        **dataclasses.asdict(args),
    )


def preparation_memory(data: str) -> int:
    """Bytes that a fresh process holds at most when it prepares a file (Linux: VmHWM; 0 elsewhere)."""
    code = (
        "import re, sys, prepare; prepare.files((sys.argv[1],), sys.argv[2]); "
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    if not os.path.exists("/proc/self/status"):
        return 0
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code, os.path.abspath(data), folder],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        )
    if done.returncode:
        raise UserError(
            f"{data}: {(done.stderr.strip() or 'no message').splitlines()[-1]}; hint: --data another file"
        )
    return 1024 * int(done.stdout.split()[-1])


def usual_tokens(document: str) -> np.ndarray:
    """What a worker of the predecessor's data script does for each document."""
    tokens = [tokenizer.EOT]
    tokens.extend(tokenizer.gpt2().encode_ordinary(document))
    tokens = np.array(tokens)
    assert (tokens >= 0).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def usual_preparation(documents: list[str], processes: int) -> int:
    """The predecessor's loop: a pool of processes, document by document into one array, which is saved. Returns tokens."""
    shard, count = np.empty(sum(map(len, documents)) + len(documents), np.uint16), 0
    with multiprocessing.Pool(processes) as pool, tempfile.TemporaryDirectory() as folder:
        for tokens in pool.imap(usual_tokens, documents, chunksize=16):
            shard[count : count + len(tokens)] = tokens
            count += len(tokens)
        np.save(os.path.join(folder, "shard"), shard[:count])
    return count


# --------------------------------------------------------------------------------------------------------------------
# generate: token by token


@dataclass(frozen=True)
class Generation:
    """Greedy decoding with a KV cache against transformers.generate, each in all its types; int8 weights for one row."""

    size: Literal["tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = (
        "gpt2"  # of both models, random weights
    )
    model: str = ""  # run directory, checkpoint, or Hugging Face name or folder with learned positions, for both sides
    batches: tuple[int, ...] = (1, 16)  # rows decoded together
    # of transformers' weights and cache; default: both where the device multiplies bfloat16, float32 elsewhere (bfloat16 is
    # five times as slow there). This project's side always has both
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ()
    prompt_tokens: int = 16  # in each row, random
    new_tokens: int = 128  # in each row; prefill is on the clock, too
    rounds: int = 3  # turns of each side
    use_compile: bool = False  # this project's decoding step compiled, without packed weights; transformers runs as it comes
    device: str = "auto"  # cuda, mps or cpu; auto takes the first of these that is there


@torch.no_grad()
def generation(args: Generation) -> dict:
    """Tokens per second of both, and of the floor: the bytes of the weights over the memory's speed of reading."""
    if wrong := [k for k in ("prompt_tokens", "new_tokens", "rounds") if getattr(args, k) < 1] + [
        "batches"
    ] * (not args.batches or min(args.batches) < 1):
        raise UserError(
            "; ".join(f"{k} is {getattr(args, k)}, must be at least 1" for k in wrong)
            + f"; hint: --{wrong[0]} 1"
        )
    device = pick_device(args.device)
    torch.manual_seed(42)
    n_layer, n_head, n_embd = SIZES[args.size]
    model = (
        generate.load(args.model)
        if args.model
        else GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    )
    theirs, gb_s = as_transformers(model), read_speed(device)
    names = ["float32", "bfloat16", *["int8"] * (device.type == "cpu" and not args.use_compile)]
    their_names = args.dtypes or (
        "float32",
        *["bfloat16"] * (autocast_dtype(device, "auto") == torch.bfloat16),
    )
    models = {
        ("ours", name): generate.of_type(copy.deepcopy(model), name, device, not args.use_compile)
        for name in names
    }
    models |= {
        ("transformers", name): copy.deepcopy(theirs).to(device, getattr(torch, name))
        for name in their_names
    }
    step = (
        torch.compile(generate.decode, fullgraph=True, dynamic=False)
        if args.use_compile
        else generate.decode
    )
    tok_s, spread, floors, tokens = {}, {}, {}, {}
    for B in args.batches:
        ids = torch.randint(tokenizer.N_VOCAB, (B, args.prompt_tokens), device=device)
        sides = {
            " ".join(key): partial(continuation, m, ids, args.new_tokens, step)
            for key, m in models.items()
            if B == 1 or key[1] != "int8"
        }
        for run in sides.values():
            run(steps=3)  # compiles, and makes what is made once
        ms, found = take_turns(sides, 0, args.rounds)
        for side, values in ms.items():
            key, weights = f"{side}, batch {B}", models[tuple(side.split())]
            tok_s[key], spread[key] = 1e3 * B * args.new_tokens / statistics.median(values), values
            floors[key] = B * gb_s * 1e9 / bytes_read(weights)
            tokens[key] = torch.tensor(found[side])
    print(
        f"\n{'generation':36}{'tok/s':>10}{'slowest':>10}{'fastest':>10}{'floor':>10}{'share':>8}"
    )
    for key, values in spread.items():
        rates = (
            1e3 * tokens[key].numel() / t
            for t in (statistics.median(values), max(values), min(values))
        )
        print(
            f"{key:36}"
            + "".join(f"{rate:10,.1f}" for rate in rates)
            + f"{floors[key]:10,.1f}{tok_s[key] / floors[key]:8.0%}"
        )
    print(f"floor: weights read once a token at {gb_s:.1f} GB/s, measured")
    best = lambda side, B: max(
        v
        for k, v in tok_s.items()
        if k.startswith(side) and k.endswith(f"batch {B}") and "int8" not in k
    )
    same = {
        f"batch {B}": (
            tokens[f"ours float32, batch {B}"] == tokens[f"transformers float32, batch {B}"]
        )
        .float()
        .mean()
        .item()
        for B in args.batches
        if "float32" in their_names
    }
    ratios = {f"batch{B}_ratio": best("ours", B) / best("transformers", B) for B in args.batches}
    if "ours int8, batch 1" in tok_s:
        ratios["int8_ratio"] = tok_s["ours int8, batch 1"] / best("transformers", 1)
    return dict(
        ratio=min(ratios.values()),
        **ratios,
        deviation=deviations(model, models, device),
        same_tokens=same,
        tok_s=tok_s,
        floor_tok_s=floors,
        read_gb_s=gb_s,
        ms=spread,
        **dataclasses.asdict(args) | dict(device=environment(device, 1)["device"]),
    )


def continuation(
    model, ids: torch.Tensor, new_tokens: int, step: Callable, steps: int | None = None
) -> list[list[int]]:
    """Greedy tokens that follow ids (B, T), a list for each of new_tokens steps (or the first `steps` of them)."""
    if isinstance(model, GPT):
        rows = generate.tokens(
            model, ids.tolist(), 1, new_tokens, generate.Sampling(temperature=0), step
        )
        return list(itertools.islice(rows, steps))
    new_tokens = steps or new_tokens
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
    )
    return out[:, ids.shape[1] :].t().tolist()


def as_transformers(model: GPT) -> torch.nn.Module:
    """transformers' GPT-2 with the same weights. Raises UserError for what it does not compute."""
    c = model.config
    if c.use_rope or c.use_swiglu:
        raise UserError(
            "transformers has no such model to compare with; hint: --model with learned positions and GELU"
        )
    theirs = transformers_gpt2(
        c.block_size,
        dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, vocab_size=c.vocab_size),
    ).eval()
    weights = {
        f"transformer.{k}": w.t() if w.dim() == 2 and k.startswith("h.") else w
        for k, w in model.state_dict().items()
    }
    theirs.load_state_dict(weights | {"lm_head.weight": model.wte.weight})
    theirs.generation_config.eos_token_id = None
    return theirs


def read_speed(device: torch.device) -> float:
    """GB/s at which memory is read: the best of ten sums of 512 MB."""
    numbers, seconds = torch.ones(2**27, device=device), []
    for _ in range(10):
        t0 = time.perf_counter()
        numbers.sum().item()
        seconds.append(time.perf_counter() - t0)
    return numbers.nbytes / min(seconds) / 1e9


def bytes_read(model: torch.nn.Module) -> int:
    """Bytes of weights that one token needs: all but the look-ups (the embedding counts where it is the head, too)."""
    tensors = {name: t for name, t in [*model.named_parameters(), *model.named_buffers()]}
    unread = ["wpe.weight"]
    if "out.weight" in tensors:  # packed: the head is there a second time, in another type
        unread += ["wte.weight", "lm_head.weight"]
    elif "lm_head.weight" in tensors:
        unread += ["wte.weight"]
    return sum(t.nbytes for name, t in tensors.items() if not name.endswith(tuple(unread)))


def deviations(model: GPT, models: dict, device: torch.device) -> dict:
    """Of each of our types against float32, on one greedy text of its own: largest difference of a logit beside their standard
    deviation, and the share of positions where both prefer the same token.
    """
    ids, result = (
        torch.randint(tokenizer.N_VOCAB, (1, min(512, model.config.block_size)), device=device),
        {},
    )
    expected = model.to(device)(ids)[..., : tokenizer.N_VOCAB]
    for (side, name), m in models.items():
        if side == "ours" and name != "float32":
            logits = m(ids)[..., : tokenizer.N_VOCAB].float()
            result[name] = dict(
                largest=(logits - expected).abs().max().item(),
                std=expected.std().item(),
                same_token=(logits.argmax(-1) == expected.argmax(-1)).float().mean().item(),
            )
    return result


# --------------------------------------------------------------------------------------------------------------------
# what all parts share


def take_turns(
    sides: dict[str, Callable], warmup: int, rounds: int
) -> tuple[dict[str, list[float]], dict]:
    """Milliseconds of each side's calls, A B A B, after warm-up, and what each returned last.

    A call must not return before the device has done its work.
    """
    for side, run in sides.items():
        t0 = time.perf_counter()
        for _ in range(warmup):
            run()
        print(f"warm-up | {side} | {time.perf_counter() - t0:.1f} s", flush=True)
    ms, last = {side: [] for side in sides}, {}
    for _ in range(rounds):
        for side, run in sides.items():
            t0 = time.perf_counter()
            last[side] = run()
            ms[side].append(round(1e3 * (time.perf_counter() - t0), 3))
    return ms, last


PARTS = {
    "step": (Step, step),
    "sweep": (Sweep, sweep),
    "profile": (Profile, profile),
    "startup": (Startup, startup),
    "ddp": (Parallel, parallel),
    "muon": (Matrices, muon),
    "loader": (Loader, loader),
    "save": (Save, save),
    "hellaswag": (Evaluation, evaluation),
    "generate": (Generation, generation),
    "prepare": (Preparation, preparation),
    "suite": (Suite, suite),
}


def main():
    settings = {name: kind for name, (kind, _) in PARTS.items()}
    args = tyro.extras.subcommand_cli_from_dict(
        settings,
        description=__doc__.split("\n")[0],
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )
    part, run = next((name, run) for name, (kind, run) in PARTS.items() if kind is type(args))
    versions = dict(
        torch=torch.__version__,
        transformers=version("transformers"),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if torch.cuda.is_available() else None,
    )
    print(json.dumps(dict(part=part, **run(args), **versions, threads=torch.get_num_threads())))


if __name__ == "__main__":
    command_line(main)
