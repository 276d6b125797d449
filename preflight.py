"""Everything that can be wrong with settings and data, found before anything slow starts."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

import hf
import prepare
import shards
from config import SHAPE, TrainConfig, as_stored, fit_warmup, format_value, preset_defaults
from model import GPT
from runtime.command_line import UserError, say
from runtime.device import Compute, autocast_dtype, peak_flops
from runtime.memory import bytes_per_token
from runtime.meter import duration
from runtime.world import World, on_rank0, sum_over_ranks
from shard_files import fingerprints, open_shards


class Data(NamedTuple):
    train: shards.Windows
    val: shards.Windows


def check(cfg: TrainConfig, world: World) -> tuple[TrainConfig, Data | None]:
    """Find everything that can be wrong with settings and data before anything slow starts.

    Returns cfg with max_steps set from epochs, and the data; None for a dry run without any yet.
    """
    if os.environ.get("RANK") and world.device.type == "cuda" and cfg.preset == "shakespeare":
        raise UserError(
            "shakespeare, the default, is a toy for one process; "
            "hint: torchrun ... train_gpt2.py gpt2-rope"
        )
    wrong = []
    data = None
    if cfg.T > 0 and cfg.total_batch > 0:
        try:
            refuse_missing_data(cfg)
            data = open_data(cfg)
        except UserError as e:
            if cfg.dry_run and isinstance(e, NoData):
                say(f"data | {e}")
            else:
                wrong.append(str(e))
    if cfg.epochs is not None and data and not out_of_range(cfg):
        cfg = set_length(cfg, data.train)
    elif cfg.epochs is not None and data is None and not wrong:
        say(
            f"plan | {cfg.epochs:g} epochs of data that do not exist yet: how many steps is "
            f"unknown, the plan below is for {cfg.max_steps:,}"
        )
    wrong = problems(cfg, world.world_size) + wrong
    if wrong:
        raise UserError("\n       ".join(wrong))
    if data:
        describe(cfg, data, world)
    return cfg, data


def with_shape(cfg: TrainConfig) -> TrainConfig:
    """Return cfg with the shape of the model that --init_from names.

    Raises UserError for a given setting that differs from it.
    """
    if not cfg.init_from:
        return cfg
    shape = on_rank0(lambda: source_shape(cfg))
    wrong = [
        f"{name} {getattr(cfg, name)}, {cfg.init_from} has {shape[name]}"
        for name in cfg.given
        if name in SHAPE and getattr(cfg, name) not in (None, shape[name])
    ]
    if wrong:
        raise UserError(
            f"--init_from brings its own shape: {'; '.join(wrong)}; hint: leave these options out"
        )
    return dataclasses.replace(cfg, **shape)


def source_shape(cfg: TrainConfig) -> dict:
    """Return the shape of --init_from's model; of the run's own, when that source is gone."""
    try:
        return dataclasses.asdict(hf.read_shape(cfg.init_from))
    except UserError:
        try:
            stored = json.loads((cfg.run_dir / "config.json").read_text())
            if stored["init_from"] == cfg.init_from:
                return {name: stored[name] for name in SHAPE}
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise


class NoData(UserError):
    """The data of a preset have not been made yet."""


def refuse_missing_data(cfg: TrainConfig):
    """Raise NoData when a preset's own data are not there: the hint says how to make them."""
    root = Path(cfg.data_root)
    own_data = root == Path(TrainConfig().data_root)
    if own_data and not any(path.suffix in (".npy", ".bin") for path in root.glob("*")):
        raise NoData(
            f"no shards in {cfg.data_root} yet; hint: python prepare.py fineweb-edu --sample 10BT "
            f"--out {cfg.data_root} makes them (28.5 GB to download, 20 GB of shards), or "
            "--data_root for others"
        )


def open_data(cfg: TrainConfig) -> Data:
    """Open the shards of both splits; the default run's are made if need be. Raises UserError."""
    if cfg.preset == "shakespeare" and cfg.data_root == preset_defaults("shakespeare").data_root:
        on_rank0(lambda: prepare.shakespeare(cfg.data_root))
    train, val = (open_shards(cfg.data_root, split, cfg.T) for split in ("train", "val"))
    return Data(
        shards.Windows(train, cfg.T, cfg.data_order, cfg.data_seed, cfg.vocab_size),
        shards.Windows(val, cfg.T, vocab_size=cfg.vocab_size),
    )


def set_length(cfg: TrainConfig, train_data: shards.Windows) -> TrainConfig:
    """Return cfg with max_steps set from epochs, and a warm-up that fits."""
    tokens = train_data.in_epochs(cfg.epochs) * cfg.T
    max_steps = max(1, tokens // cfg.total_batch)
    notes = [f"{cfg.epochs:g} epochs are {max_steps} steps"]
    cfg = dataclasses.replace(cfg, max_steps=max_steps)
    cfg = fit_warmup(cfg, notes)
    for note in notes:
        say(f"config | {note}")
    return cfg


def describe(cfg: TrainConfig, data: Data, world: World):
    """Print what the data hold. Raises UserError when the processes see different shards."""
    train, val = data
    windows = train.per_epoch()
    epochs = cfg.max_steps * (cfg.total_batch // cfg.T) / windows
    val_tokens = min(cfg.val_tokens, val.per_epoch() * cfg.T)
    say(
        f"data | {cfg.data_root} | train {train.sizes.sum():,} tokens, shards: "
        f"{len(train.shards)}, {windows:,} windows | {epochs:.2f} epochs, {cfg.data_order} order, "
        f"{train.left_out(0).sum():,} tokens left out of the first epoch | "
        f"val {val_tokens:,} of {val.sizes.sum():,} tokens"
    )
    fingerprint = int(fingerprints(train.shards)[-1], 16) % 2**32
    if sum_over_ranks(torch.tensor(fingerprint)).item() != fingerprint * world.world_size:
        raise UserError(
            f"the processes see different shards in {cfg.data_root}; hint: the same files on all "
            "machines, and no download in progress while a run starts"
        )


# --------------------------------------------------------------------------------------------------
# what a run comes to

ASSUMED_MFU = 0.4  # of the bf16 peak; what a GPU reaches with this code is not measured yet
H100_FLOPS = 989e12  # dense bf16 peak of an H100 SXM (data sheet)


def print_plan(cfg: TrainConfig, model: GPT, world: World):
    """Print what a run would take: tokens, operations, memory, disk and time, as estimates."""
    defaults = as_stored(TrainConfig())
    changed = {
        k: v
        for k, v in as_stored(cfg).items()
        if v != defaults[k] and k not in ("dry_run", "given")
    }
    say(f"plan | settings: {', '.join(f'{k} {format_value(v)}' for k, v in changed.items())}")
    tokens = cfg.max_steps * cfg.total_batch
    flops = tokens * model.flops_per_token(cfg.T)
    say(
        f"plan | {cfg.max_steps:,} steps x {cfg.total_batch:,} tokens = {tokens:,} tokens, "
        f"{flops:.3g} FLOP"
    )
    if flops > 1e16:
        say(f"plan | time: {', '.join(hours(flops, world))} (computed for {ASSUMED_MFU:.0%} MFU)")
    if cfg.B != "auto":
        compute = Compute(world.device, autocast_dtype(world.device, cfg.dtype), cfg.use_compile)
        dtype = str(compute.dtype).removeprefix("torch.")
        # weights, gradients, and two moments in float32
        memory = 16 * model.num_params() + cfg.B * cfg.T * bytes_per_token(model, compute)
        say(
            f"plan | memory per process at B = {cfg.B}: about {memory / 1e9:.1f} GB "
            f"(estimate, {dtype})"
        )
    checkpoint = 12 * model.num_params()  # weights and two moments
    say(
        f"plan | disk: {cfg.keep_last + 2} x {checkpoint / 1e9:.2f} GB of checkpoints in "
        f"{cfg.checkpoint_dir}"
    )


def hours(flops: float, world: World) -> list[str]:
    """Return how long `flops` operations take on one, four and eight H100, and on this machine."""
    times = []
    for n in (1, 4, 8):
        times.append(f"{n} x H100 {duration(flops / (n * H100_FLOPS * ASSUMED_MFU))}")
    peak = peak_flops(world.device)
    if peak:
        seconds = flops / (world.world_size * peak * ASSUMED_MFU)
        times.append(f"here ({world.world_size} GPUs) {duration(seconds)}")
    return times


# --------------------------------------------------------------------------------------------------
# settings


def problems(cfg: TrainConfig, world_size: int) -> list[str]:
    """List every problem with the settings, each with its values and a hint."""
    wrong = out_of_range(cfg)
    if wrong:
        return wrong  # the rules below divide by these
    return batch_problems(cfg, world_size) + model_problems(cfg) + schedule_problems(cfg)


POSITIVE = (
    "n_layer n_head n_embd vocab_size total_batch B T max_steps eval_interval val_tokens "
    "sample_interval log_interval save_interval keep_last max_lr embed_lr head_lr max_skipped "
    "group_timeout"
).split()
NOT_NEGATIVE = (
    "warmup_steps weight_decay grad_norm_clip hellaswag_limit n_samples sample_tokens min_lr "
    "save_minutes"
).split()


# far beyond what anybody trains, and below what would never end or not be a number any more
LARGEST = dict.fromkeys(("n_layer", "n_head", "n_embd", "B"), 2**20)
LARGEST |= dict.fromkeys(("vocab_size", "total_batch", "T"), 2**31)
LARGEST |= {"seed": 2**40, "data_seed": 2**63}
LONGEST_NAME = 200  # bytes: most file systems take 255


def out_of_range(cfg: TrainConfig) -> list[str]:
    wrong = []
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            wrong.append(f"{field.name} is {value}, must be finite; hint: --{field.name}")
    for name, largest in LARGEST.items():
        value = getattr(cfg, name)
        if value != "auto" and abs(value) > largest:
            wrong.append(f"{name} is {value}, must not exceed {largest}; hint: --{name}")
    for name in POSITIVE:
        value = getattr(cfg, name)
        if value != "auto" and value <= 0:
            wrong.append(f"{name} is {value}, must be above 0; hint: --{name}")
    for name in NOT_NEGATIVE:
        value = getattr(cfg, name)
        if value < 0:
            wrong.append(f"{name} is {value}, must not be negative; hint: --{name}")
    if any(beta < 0 or beta >= 1 for beta in cfg.betas):
        wrong.append(f"betas are {cfg.betas}, each must be in [0, 1); hint: --betas 0.9 0.95")
    if cfg.epochs is not None and not 0 < cfg.epochs < float("inf"):
        wrong.append(f"epochs is {cfg.epochs}, must be a number above 0; hint: --epochs 1")
    name = cfg.run_name
    size = len(name.encode(errors="surrogateescape"))
    odd = not name.isprintable() or name.isspace() or "/" in name or name in (".", "..")
    if odd or size > LONGEST_NAME:
        wrong.append(
            f"run_name {name[:40]!r} has {size} bytes, must be a plain name of at most "
            f"{LONGEST_NAME}; hint: --run_name {cfg.preset}-2; --log_dir sets the place"
        )
    return wrong


def batch_problems(cfg: TrainConfig, world_size: int) -> list[str]:
    wrong = []
    B = 1 if cfg.B == "auto" else cfg.B
    tokens = B * cfg.T * world_size  # in one micro-step of all processes
    if cfg.total_batch % tokens:
        fitting = (b for b in range(B, 0, -1) if cfg.total_batch % (b * cfg.T * world_size) == 0)
        largest = next(fitting, None)
        fix = f"--total_batch {max(1, round(cfg.total_batch / tokens)) * tokens}"
        if largest:
            fix = f"--B {largest}"
        wrong.append(
            f"total_batch {cfg.total_batch} is not a multiple of B x T x processes = {B} x {cfg.T} "
            f"x {world_size} = {tokens}; hint: {fix}"
        )
    if cfg.val_tokens < cfg.T:
        wrong.append(
            f"val_tokens {cfg.val_tokens} is less than one window of T = {cfg.T}; "
            f"hint: --val_tokens {64 * cfg.T}"
        )
    return wrong


def model_problems(cfg: TrainConfig) -> list[str]:
    wrong = []
    if cfg.block_size < cfg.T:
        fix = f"--T {cfg.block_size}" if cfg.init_from else f"--block_size {cfg.T}"
        wrong.append(f"T {cfg.T} exceeds block_size {cfg.block_size}; hint: {fix}")
    rotary = cfg.use_rope or cfg.arch == "modern"
    unit = 2 if rotary else 1
    fitting = [n for n in range(1, cfg.n_embd + 1) if cfg.n_embd % (n * unit) == 0]
    nearest = min(fitting, key=lambda n: abs(n - cfg.n_head), default=1)
    if cfg.n_embd % cfg.n_head:
        wrong.append(
            f"n_embd {cfg.n_embd} is not divisible by n_head {cfg.n_head}; hint: --n_head {nearest}"
        )
    elif rotary and cfg.n_embd // cfg.n_head % 2:
        wrong.append(
            f"RoPE needs heads of even width, n_embd / n_head is {cfg.n_embd // cfg.n_head}; "
            f"hint: --n_head {nearest}"
        )
    if cfg.arch == "modern" and (cfg.use_rope or cfg.use_swiglu):
        wrong.append(
            "arch modern has its own positions (RoPE) and MLP (ReLU^2), use_rope is "
            f"{cfg.use_rope}, use_swiglu {cfg.use_swiglu}; "
            "hint: --use_rope False --use_swiglu False, or --arch gpt2"
        )
    if cfg.optimizer == "muon" and cfg.arch != "modern":
        wrong.append(
            f"optimizer muon needs arch modern, arch is {cfg.arch}: its head and embedding are one "
            "matrix; hint: --optimizer adamw --max_lr 6e-4"
        )
    return wrong


def schedule_problems(cfg: TrainConfig) -> list[str]:
    wrong = []
    if cfg.min_lr > cfg.max_lr:
        wrong.append(f"min_lr {cfg.min_lr:g} exceeds max_lr {cfg.max_lr:g}; hint: --min_lr")
    if cfg.warmup_steps >= cfg.max_steps and cfg.warmup_steps != 0:
        wrong.append(
            f"warmup_steps {cfg.warmup_steps} must be below max_steps {cfg.max_steps}; "
            f"hint: --warmup_steps {cfg.max_steps // 20}"
        )
    return wrong
