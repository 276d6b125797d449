"""Every setting of a training run, the named presets, and the check that runs before anything slow starts.

python train_gpt2.py --help                 all settings with their defaults
python train_gpt2.py gpt2-rope --dry_run True   what a preset comes to, without training
"""

import dataclasses
import difflib
import os
import sys
from dataclasses import dataclass
from typing import Callable, Literal

import tyro


class UserError(Exception):
    """A mistake in what the user gave: shown as `error: ...` without a traceback. Says both values and a hint."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are the gpt2-baseline preset: GPT-2 (124M) on 10B tokens of FineWeb-Edu."""

    preset: tyro.conf.Suppress[str] = "gpt2-baseline"  # set by the first word of the command line

    # model
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads; n_embd must divide by it
    n_embd: int = 768  # width of the residual stream
    block_size: int | None = None  # longest sequence the model accepts, tokens; = T unless given
    vocab_size: int = (
        50304  # embedding rows: 50,257 GPT-2 ids, padded to a multiple of 128 for speed
    )
    use_rope: bool = False  # rotary positions instead of a learned table
    use_swiglu: bool = False  # gated MLP of equal size instead of tanh-GELU
    arch: Literal["gpt2", "modern"] = (
        "gpt2"  # modern: RMSNorm, RoPE, QK-norm, ReLU^2, zero-init, a head of its own (model.py)
    )
    init_from: str = ""  # start from weights: gpt2 (and -medium, -large, -xl), a Hugging Face folder, or a checkpoint

    # batch: only total_batch changes what is learned; B and the number of GPUs change memory and speed
    total_batch: int = (
        524288  # tokens in one optimiser step, over all GPUs (2**19, about the 0.5M of GPT-3 small)
    )
    B: int | Literal["auto"] = (
        64  # sequences in one micro-batch on one GPU; auto = as many as its memory holds
    )
    T: int = 1024  # tokens in a sequence

    # optimiser: AdamW with the settings of GPT-3 (Brown et al. 2020, appendix B)
    # muon: hidden matrices by Muon, embedding and head by AdamW (arch modern alone: GPT-2's are one matrix)
    optimizer: Literal["adamw", "muon"] = "adamw"
    schedule: Literal["cosine", "linear", "constant_linear"] = (
        "cosine"  # of all learning rates, after the warm-up (optim.py)
    )
    max_lr: float = 6e-4  # peak learning rate; muon: of the hidden matrices
    min_lr: float | None = (
        None  # learning rate at the end of the schedule; 10% of max_lr unless given
    )
    embed_lr: float = (
        0.7  # muon: peak rate of the embedding (modded-nanogpt, tuned at 768 wide, as the next one)
    )
    head_lr: float = 0.004  # muon: peak rate of the head
    warmup_steps: int = 715  # linear warm-up: GPT-3's 375M tokens in steps of 2**19
    max_steps: int = 19073  # optimiser steps: 10B tokens in steps of 2**19
    epochs: float | None = None  # passes over the training split; sets max_steps when given
    weight_decay: float = (
        0.1  # on matrices and embeddings, not on biases and norms; muon: on the hidden matrices
    )
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's averaging of gradient and squared gradient
    grad_norm_clip: float = 1.0  # longest gradient, L2 norm over all parameters; 0 = any length

    # data
    data_root: str = "data/fineweb-edu-10BT"  # directory of token shards (see prepare.py)
    # how windows follow each other: as on disk; documents shuffled within shards; one permutation of all windows
    data_order: Literal["sequential", "documents", "global"] = "sequential"
    data_seed: int = 1337  # decides the order of the data
    seed: int = 42  # decides initial weights and samples

    # evaluation, in steps of the optimiser; always also after the last update
    eval_interval: int = 250  # steps between evaluations
    val_tokens: int = (
        5242880  # validation tokens, the same ones for any B and any number of GPUs (10 * 2**19)
    )
    hellaswag_limit: int = 10042  # HellaSwag items, spread over the set; 0 = off
    sample_interval: int = 250  # steps between samples
    n_samples: int = 4  # texts sampled each time; 0 = off
    sample_tokens: int = 32  # tokens in each sample
    sample_prompt: str = "Hello, I'm a language model,"  # how samples begin

    # records and checkpoints
    log_interval: int = 1  # steps between log lines; the loss is read from the device only then
    save_interval: int = 1000  # steps between checkpoints; always also after the last update
    save_minutes: float = 15  # and at least this often by the clock; 0 = by steps alone
    keep_last: int = 2  # newest checkpoints kept beside the best one
    log_dir: str = "log"  # parent of the run directory
    run_name: str = ""  # run directory inside log_dir; the preset's name unless given
    ckpt_dir: str = ""  # directory of the checkpoints; ckpt/ in the run directory unless given
    resume: str = (
        "auto"  # auto: continue the run of this name if there is one; never; or a checkpoint's path
    )
    wandb: Literal["auto", "online", "offline", "off"] = (
        "auto"  # Weights & Biases; auto = online when logged in
    )
    wandb_project: str = "gpt2-from-scratch"  # W&B project
    max_skipped: int = 10  # steps in a row with a loss or gradient that is no number, each skipped, before a run stops
    accept_new_data: bool = False  # resume although the shards are not those the run began with
    batch_hashes: bool = (
        False  # write a hash of every global batch into metrics.jsonl, to compare runs
    )

    # machine
    device: str = "auto"  # cuda, mps or cpu; auto takes the first of these that is there
    dtype: Literal["auto", "bfloat16", "float32"] = (
        "auto"  # of the matmuls; auto = bfloat16 where the device has it
    )
    use_compile: bool = True  # torch.compile (needs a C++ compiler on the CPU)
    recompute: bool = False  # keep only the input of each block and compute the rest twice: less memory, 10% slower (CPU)
    deterministic: bool = (
        False  # the same bits each time, on any number of processes with the same B; slower
    )
    group_timeout: float = (
        600  # seconds without progress after which a process ends itself and its peers
    )
    eval_only: bool = False  # evaluate the newest checkpoint (or init_from) once, and stop
    dry_run: bool = False  # check settings and data, print the plan, and stop


# --------------------------------------------------------------------------------------------------------------------
# Presets: (the preset it builds on, what differs). Published figures: FineWeb-Edu sample-10BT, 4xH100, one seed each,
# minimum validation loss and maximum HellaSwag acc_norm over the run's evaluations. On 4 GPUs:
#     torchrun --standalone --nproc_per_node=4 train_gpt2.py PRESET

PRESETS: dict[str, tuple[str | None, dict]] = {
    # python train_gpt2.py : Tiny Shakespeare on any machine, 5 minutes on two CPU cores, val loss 5.0
    "shakespeare": (
        None,
        dict(
            n_layer=4,
            n_head=4,
            n_embd=256,
            use_rope=True,
            T=128,
            B=8,
            total_batch=1024,
            max_lr=1.3e-3,
            warmup_steps=50,
            betas=(0.9, 0.99),
            max_steps=500,
            data_root="data/shakespeare",
            data_order="global",
            val_tokens=65536,
            eval_interval=125,
            hellaswag_limit=0,
            sample_interval=250,
            n_samples=1,
            sample_tokens=500,
            sample_prompt="\n",
            log_interval=10,
            save_interval=250,
        ),
    ),
    # GPT-2 as published: GELU, learned positions. Published: val 3.0658, HellaSwag 0.3037
    "gpt2-baseline": (None, dict()),
    # the loss no longer ripples with the shards: documents shuffled within them. Published: 3.0639, 0.3055
    "gpt2-periodicity-fix": ("gpt2-baseline", dict(data_order="documents")),
    # GPT-3's learning rate is far too careful at this size. Published: 3.0210, 0.3155
    "gpt2-lr-inc": ("gpt2-periodicity-fix", dict(max_lr=1.8e-3, warmup_steps=285)),
    # one permutation of all windows of all shards. Published: 3.0045, 0.3169
    "gpt2-global-datafix": ("gpt2-lr-inc", dict(data_order="global")),
    # rotary positions (its learning rate is not published: assumed unchanged). Published: 2.9874, 0.3202
    "gpt2-rope": ("gpt2-global-datafix", dict(use_rope=True)),
    # gated MLP, hidden 2,048, with biases. Published: 3.0311, 0.3175 (stopped at about 15K of 19,073 steps)
    "gpt2-swiglu": ("gpt2-rope", dict(use_swiglu=True, max_lr=1.5e-3, warmup_steps=300)),
    # what the speed records on GPT-2 kept, with the rates and the schedule of modded-nanogpt's readable script, which reaches
    # GPT-2's loss with 1.7B tokens of FineWeb instead of 10B (--max_steps 3250). Not yet measured; for 4 x 80 GB
    "gpt2-modern": (
        "gpt2-global-datafix",
        dict(
            arch="modern",
            n_head=6,
            optimizer="muon",
            schedule="constant_linear",
            max_lr=0.025,
            min_lr=0.0,
            warmup_steps=0,
            weight_decay=0.05,
            betas=(0.8, 0.95),
            grad_norm_clip=0.0,
        ),
    ),
    # GPT-3's sequence length and batch. Four epochs: up to there repeated tokens are nearly as good as new ones (Muennighoff
    # et al. 2023). Not yet measured; for 4 x 80 GB, four times as long as gpt2-rope
    "gpt2-rope-t2048": ("gpt2-rope", dict(T=2048, B=32, epochs=4)),
    "gpt2-modern-t2048": ("gpt2-modern", dict(T=2048, B=32, epochs=4)),
    # the larger sizes of the GPT-2 paper, at twice the learning rates of GPT-3's table 2.1. B for 80 GB. Not yet run
    "gpt2-medium": (
        "gpt2-global-datafix",
        dict(n_layer=24, n_head=16, n_embd=1024, B=32, max_lr=6e-4, warmup_steps=715),
    ),
    "gpt2-large": ("gpt2-medium", dict(n_layer=36, n_head=20, n_embd=1280, B=16, max_lr=5e-4)),
    "gpt2-xl": ("gpt2-medium", dict(n_layer=48, n_head=25, n_embd=1600, B=8, max_lr=4e-4)),
}


def preset(name: str) -> TrainConfig:
    """The full settings of a preset. Raises UserError with near names when there is none of that name."""
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; hint: {near(name, PRESETS)}")
    base, changes = PRESETS[name]
    return dataclasses.replace(preset(base) if base else TrainConfig(), **changes, preset=name)


def near(word: str, words) -> str:
    """The names closest to a mistyped one, or all of them when none is close."""
    close = difflib.get_close_matches(word, words, n=3)
    return "did you mean " + " or ".join(close) + "?" if close else "one of " + ", ".join(words)


# --------------------------------------------------------------------------------------------------------------------
# from the command line to a checked configuration


def from_command_line(argv: list[str]) -> tuple[TrainConfig, list[str]]:
    """Settings from `[PRESET] [--field value ...]`, and what should be told about them (one line each).

    Unknown names raise UserError before tyro sees them: its own message for one does not name the near ones.
    """
    notes, fields = [], [f.name for f in dataclasses.fields(TrainConfig) if f.name != "preset"]
    if argv and not argv[0].startswith("-"):
        name, argv = argv[0], argv[1:]
    else:
        name = "shakespeare"
        notes.append(
            "no preset given: shakespeare, a small model on any machine; for GPT-2 (124M) on 4 GPUs: "
            "torchrun --standalone --nproc_per_node=4 train_gpt2.py gpt2-rope"
        )
    base = preset(name)
    given = [a[2:].split("=")[0].replace("-", "_") for a in argv if a.startswith("--")]
    if unknown := [g for g in given if g not in fields and g != "help"]:
        raise UserError(
            "; ".join(f"no option --{g}: {near(g, fields)}" for g in unknown)
            + "; hint: --help lists all"
        )
    cfg = tyro.cli(
        TrainConfig,
        args=argv,
        default=base,
        prog=f"train_gpt2.py {name}",
        use_underscores=True,
        description=f"presets: {', '.join(PRESETS)} (first word; shown: {name})",
        config=(tyro.conf.FlagConversionOff,),
    )
    if cfg.epochs is not None and "max_steps" in given:
        if "epochs" in given:
            raise UserError(
                f"--epochs {cfg.epochs:g} and --max_steps {cfg.max_steps} both set the length; hint: give one"
            )
        cfg = dataclasses.replace(cfg, epochs=None)  # the preset's
    if "warmup_steps" not in given:
        cfg = fit_warmup(cfg, base, notes)
    return dataclasses.replace(
        cfg,
        run_name=cfg.run_name or name,
        block_size=cfg.block_size or cfg.T,
        min_lr=0.1 * cfg.max_lr if cfg.min_lr is None else cfg.min_lr,
    ), notes


def fit_warmup(cfg: TrainConfig, base: TrainConfig, notes: list[str]) -> TrainConfig:
    """A run made shorter than its preset keeps the same share of warm-up; a note says so."""
    if cfg.max_steps >= base.max_steps or cfg.warmup_steps != base.warmup_steps:
        return cfg
    warmup = base.warmup_steps * max(cfg.max_steps, 0) // base.max_steps
    notes.append(
        f"max_steps {cfg.max_steps} instead of {base.max_steps}: warm-up shrinks in proportion, "
        f"{base.warmup_steps} to {warmup} steps"
    )
    return dataclasses.replace(cfg, warmup_steps=warmup)


def problems(cfg: TrainConfig, world_size: int) -> list[str]:
    """All that is wrong with the settings, each with both values and the way out. Empty when all is well."""
    wrong = []

    def need(ok: bool, message: str):
        if not ok:
            wrong.append(message)

    for name in (
        "n_layer",
        "n_head",
        "n_embd",
        "vocab_size",
        "total_batch",
        "B",
        "T",
        "max_steps",
        "eval_interval",
        "val_tokens",
        "sample_interval",
        "log_interval",
        "save_interval",
        "keep_last",
        "max_lr",
        "embed_lr",
        "head_lr",
        "max_skipped",
        "group_timeout",
    ):
        need(
            getattr(cfg, name) == "auto" or getattr(cfg, name) > 0,
            f"{name} is {getattr(cfg, name)}, must be above 0; hint: --{name}",
        )
    for name in (
        "warmup_steps",
        "weight_decay",
        "grad_norm_clip",
        "hellaswag_limit",
        "n_samples",
        "sample_tokens",
        "min_lr",
        "save_minutes",
    ):
        need(
            getattr(cfg, name) >= 0,
            f"{name} is {getattr(cfg, name)}, must not be negative; hint: --{name}",
        )
    need(
        all(0 <= b < 1 for b in cfg.betas),
        f"betas are {cfg.betas}, each must be in [0, 1); hint: --betas 0.9 0.95",
    )
    need(
        cfg.epochs is None or cfg.epochs > 0,
        f"epochs is {cfg.epochs}, must be above 0; hint: --epochs 1",
    )
    need(
        "/" not in cfg.run_name and cfg.run_name not in (".", ".."),
        f"run_name {cfg.run_name!r} must be a plain name; hint: --log_dir sets the place",
    )
    if wrong:
        return wrong  # the rules below divide by these
    B = 1 if cfg.B == "auto" else cfg.B
    rows = B * cfg.T * world_size  # tokens in one micro-step of all processes
    if cfg.total_batch % rows:
        fits = [b for b in range(1, B + 1) if cfg.total_batch % (b * cfg.T * world_size) == 0]
        way_out = (
            f"--B {fits[-1]}"
            if fits
            else f"--total_batch {max(1, round(cfg.total_batch / rows)) * rows}"
        )
        wrong.append(
            f"total_batch {cfg.total_batch} is not a multiple of B x T x processes = {B} x {cfg.T} x "
            f"{world_size} = {rows}; hint: {way_out}"
        )
    need(
        cfg.block_size >= cfg.T,
        f"T {cfg.T} exceeds block_size {cfg.block_size}; hint: --block_size {cfg.T}",
    )
    need(
        cfg.n_embd % cfg.n_head == 0,
        f"n_embd {cfg.n_embd} does not divide by n_head {cfg.n_head}; hint: --n_head",
    )
    need(
        not (cfg.use_rope or cfg.arch == "modern") or cfg.n_embd // cfg.n_head % 2 == 0,
        f"RoPE needs heads of even width, n_embd / n_head is {cfg.n_embd // cfg.n_head}; hint: --n_head",
    )
    need(
        cfg.arch == "gpt2" or not (cfg.use_rope or cfg.use_swiglu),
        f"arch modern has its own positions (RoPE) and MLP (ReLU^2), use_rope is {cfg.use_rope}, use_swiglu {cfg.use_swiglu}; "
        "hint: --use_rope False --use_swiglu False, or --arch gpt2",
    )
    need(
        cfg.optimizer == "adamw" or cfg.arch == "modern",
        f"optimizer muon needs arch modern, arch is {cfg.arch}: its head and embedding are one matrix; hint: --optimizer adamw",
    )
    need(
        cfg.min_lr <= cfg.max_lr,
        f"min_lr {cfg.min_lr:g} exceeds max_lr {cfg.max_lr:g}; hint: --min_lr",
    )
    need(
        cfg.epochs is not None or cfg.warmup_steps < cfg.max_steps or cfg.warmup_steps == 0,
        f"warmup_steps {cfg.warmup_steps} must be below max_steps {cfg.max_steps}; hint: --warmup_steps "
        f"{cfg.max_steps // 20}",
    )
    need(
        cfg.val_tokens >= cfg.T,
        f"val_tokens {cfg.val_tokens} is less than one window of T = {cfg.T}; hint: --val_tokens {64 * cfg.T}",
    )
    return wrong


def one_line(e: Exception) -> str:
    """An exception as part of a message."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"


def command_line(main: Callable[[], None]):
    """Run a script's main function: mistakes of the user end in one line and status 2, bugs in their traceback."""
    try:
        main()
    except UserError as e:
        rank = os.environ.get("RANK", "0")
        print(f"error{f' (rank {rank})' if rank != '0' else ''}: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
