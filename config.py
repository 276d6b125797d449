"""Every setting of a training run, and the named presets.

python train_gpt2.py --help                     all settings with their defaults
python train_gpt2.py gpt2-rope --dry_run True   what a preset comes to, without training
"""

import dataclasses
import json
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Literal

import tyro

from runtime.command_line import UserError, parse, suggest

# --------------------------------------------------------------------------------------------------
# Settings in groups; --help shows their comments


@dataclass(frozen=True)
class ModelSettings:
    """The network (model.py). Defaults: GPT-2 (124M), 50,257 ids padded to a multiple of 128."""

    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads; n_embd must be a multiple of it
    n_embd: int = 768  # width of the residual stream
    block_size: int | None = None  # longest sequence the model accepts, tokens; = T unless given
    vocab_size: int = 50304  # rows of the embedding
    use_rope: bool = False  # rotary positions instead of a learned table
    use_swiglu: bool = False  # gated MLP with as many parameters instead of tanh-GELU
    # modern: RMSNorm, RoPE, QK-norm, ReLU^2, zero-init, untied head
    arch: Literal["gpt2", "modern"] = "gpt2"
    # start from weights: gpt2 (and -medium, -large, -xl), a Hugging Face folder, or a checkpoint
    init_from: str = ""


@dataclass(frozen=True)
class BatchSettings:
    """The batch. total_batch and T change what is learned; B and the number of GPUs do not."""

    total_batch: int = 524288  # tokens in one optimizer step, over all GPUs
    # sequences in one micro-batch on one GPU; auto = as many as its memory holds
    B: int | Literal["auto"] = 64
    T: int = 1024  # tokens in a sequence


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer (optim.py). Defaults: AdamW as for GPT-3 (Brown et al. 2020, appendix B)."""

    # muon: hidden matrices by Muon, embedding and head by AdamW (arch modern only)
    optimizer: Literal["adamw", "muon"] = "adamw"
    # of all learning rates, after the warm-up
    schedule: Literal["cosine", "constant_linear"] = "cosine"
    max_lr: float = 6e-4  # peak learning rate; muon: of the hidden matrices
    # learning rate at the end of the schedule; 10% of max_lr unless given
    min_lr: float | None = None
    embed_lr: float = 0.7  # muon: peak learning rate of the embedding
    head_lr: float = 0.004  # muon: peak learning rate of the head
    warmup_steps: int = 715  # steps of linear warm-up
    max_steps: int = 19073  # optimizer steps
    epochs: float | None = None  # passes over the training split; sets max_steps when given
    # on matrices and embeddings, not on biases and norms; muon: on the hidden matrices
    weight_decay: float = 0.1
    # decay of AdamW's averages of gradient and squared gradient
    betas: tuple[float, float] = (0.9, 0.95)
    # clip the gradient to this L2 norm over all parameters; 0 = no clipping
    grad_norm_clip: float = 1.0


@dataclass(frozen=True)
class DataSettings:
    """The data (shards.py) and what is random."""

    data_root: str = "data/fineweb-edu-10BT"  # directory of token shards (see prepare.py)
    # sequential: as on disk; documents: shuffled within shards; global: all windows permuted
    data_order: Literal["sequential", "documents", "global"] = "sequential"
    data_seed: int = 1337  # decides the order of the data
    seed: int = 42  # decides initial weights and samples


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation and samples, in optimizer steps; always also after the last update."""

    eval_interval: int = 250  # steps between evaluations
    val_tokens: int = 5242880  # validation tokens, the same ones for any B and any number of GPUs
    hellaswag_limit: int = 10042  # HellaSwag items, spread over the set; 0 = off
    sample_interval: int = 250  # steps between samples
    n_samples: int = 4  # texts sampled each time; 0 = off
    sample_tokens: int = 32  # tokens in each sample
    sample_prompt: str = "Hello, I'm a language model,"  # how samples begin


@dataclass(frozen=True)
class RecordSettings:
    """Records and checkpoints (records.py)."""

    log_interval: int = 1  # steps between log lines; the loss is read from the device only then
    save_interval: int = 1000  # steps between checkpoints; always also after the last update
    save_minutes: float = 15  # and at least this often by the clock; 0 = by steps only
    keep_last: int = 2  # newest checkpoints kept beside the best one
    log_dir: str = "log"  # parent of the run directory
    run_name: str = ""  # run directory inside log_dir; the preset's name unless given
    ckpt_dir: str = ""  # directory of the checkpoints; ckpt/ in the run directory unless given
    # auto: resume the run of this name if there is one; never; or the path of a checkpoint
    resume: str = "auto"
    # Weights & Biases; auto = as WANDB_MODE, when logged in
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    wandb_project: str = "gpt2-from-scratch"  # WANDB_PROJECT replaces this default
    # stop after this many consecutive steps with a NaN or infinite loss or gradient (all skipped)
    max_skipped: int = 10
    accept_new_data: bool = False  # resume although the shards are not those the run began with
    # write a hash of every global batch into metrics.jsonl, to compare runs
    batch_hashes: bool = False


@dataclass(frozen=True)
class MachineSettings:
    """The machine, and what to do at all."""

    device: str = "auto"  # cuda, mps or cpu; auto takes the first of these that exists
    # of the matmuls; auto = bfloat16 where the device has it
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    use_compile: bool = True  # torch.compile (needs a C++ compiler on the CPU)
    recompute: bool = False  # activation checkpointing per block: less memory, 10% slower (CPU)
    # bit-identical each time, on any number of processes with the same B; slower
    deterministic: bool = False
    # seconds without progress after which a process ends itself and its peers
    group_timeout: float = 600
    eval_only: bool = False  # evaluate the newest checkpoint (or init_from) once, and stop
    dry_run: bool = False  # check the settings, print what the run comes to, and stop


# what --init_from decides
SHAPE = {f.name for f in dataclasses.fields(ModelSettings)} - {"init_from"}
# settings in which ~ is expanded
PATHS = "data_root log_dir ckpt_dir init_from resume".split()

GROUPS = {
    "model": ModelSettings,
    "batch": BatchSettings,
    "optimizer": OptimizerSettings,
    "data": DataSettings,
    "evaluation": EvaluationSettings,
    "records": RecordSettings,
    "machine": MachineSettings,
}


@dataclass(frozen=True)
class TrainConfig(
    MachineSettings,
    RecordSettings,
    EvaluationSettings,
    DataSettings,
    OptimizerSettings,
    BatchSettings,
    ModelSettings,
):
    """One training run: all settings, flat. The defaults are the preset gpt2-baseline.

    As GPT-3 small: 2**19 tokens per step, 715 warm-up steps (375M tokens). 19,073 steps: 10B.
    """

    preset: str = "gpt2-baseline"  # the first word of the command line
    given: tuple[str, ...] = ()  # names of the settings that the user gave

    @property
    def run_dir(self) -> Path:
        """Where everything goes that the run writes."""
        return Path(self.log_dir) / self.run_name

    @property
    def checkpoint_dir(self) -> Path:
        return Path(self.ckpt_dir) if self.ckpt_dir else self.run_dir / "ckpt"


# --------------------------------------------------------------------------------------------------
# Presets: (the preset it builds on, what differs). Published figures: FineWeb-Edu sample-10BT,
# 4xH100, one seed each, minimum validation loss and maximum HellaSwag acc_norm over the run's
# evaluations.

PRESETS: dict[str, tuple[str | None, dict]] = {
    # python train_gpt2.py: Shakespeare on any machine, minutes on two CPU cores, val loss 4.94
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
    # Documents shuffled within shards: the loss no longer ripples with their order.
    # Published: 3.0639, 0.3055
    "gpt2-periodicity-fix": ("gpt2-baseline", dict(data_order="documents")),
    # GPT-3's learning rate is far too low at this size. The rate and warm-up of the code that was
    # run; its author's text says 3x and about 285 steps. Published: 3.0210, 0.3155
    "gpt2-lr-inc": ("gpt2-periodicity-fix", dict(max_lr=1.5e-3, warmup_steps=300)),
    # One permutation of all windows of all shards. The published one drew a seed per rank (31.6% of
    # the windows never read) and stopped at about step 18,250: ours may come out lower. Published:
    # 3.0045, 0.3169
    "gpt2-global-datafix": ("gpt2-lr-inc", dict(data_order="global")),
    # Rotary positions. Published: 2.9874, 0.3202
    "gpt2-rope": ("gpt2-global-datafix", dict(use_rope=True)),
    # Gated MLP, hidden 2,048, with biases. Published: 3.0311, 0.3175 (stopped at about 15K of
    # 19,073 steps)
    "gpt2-swiglu": ("gpt2-rope", dict(use_swiglu=True)),
    # What the speed records on GPT-2 kept. Its rates are those of modded-nanogpt's readable
    # script, which reaches GPT-2's loss with 1.7B tokens of FineWeb (3,250 steps); there
    # the loss is a sum, Newton-Schulz takes other steps, and momentum warm-up and architecture
    # differ. Not yet measured; for 4 x 80 GB
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
    # GPT-3's sequence length and batch. Four epochs: up to there repeated tokens are nearly as good
    # as new ones (Muennighoff et al. 2023). Not yet measured; for 4 x 80 GB, four times as long as
    # gpt2-rope
    "gpt2-rope-t2048": ("gpt2-rope", dict(T=2048, B=32, epochs=4)),
    "gpt2-modern-t2048": ("gpt2-modern", dict(T=2048, B=32, epochs=4)),
    # The larger sizes of the GPT-2 paper, at twice the learning rates of GPT-3's table 2.1. B for
    # 80 GB. Not yet run
    "gpt2-medium": (
        "gpt2-global-datafix",
        dict(n_layer=24, n_head=16, n_embd=1024, B=32, max_lr=6e-4, warmup_steps=715),
    ),
    "gpt2-large": ("gpt2-medium", dict(n_layer=36, n_head=20, n_embd=1280, B=16, max_lr=5e-4)),
    "gpt2-xl": ("gpt2-medium", dict(n_layer=48, n_head=25, n_embd=1600, B=8, max_lr=4e-4)),
}


def preset(name: str, **changes) -> TrainConfig:
    """Return the settings of a preset with changes, ready for train_gpt2.train().

    Raises UserError for a name or a setting that does not exist.
    """
    return build_config(name, changes)[0]


def build_config(name: str, changes: dict) -> tuple[TrainConfig, list[str]]:
    """Return a preset with changes, and one line per setting that follows from them."""
    fields = [f.name for cls in GROUPS.values() for f in dataclasses.fields(cls)]
    unknown = [key for key in changes if key not in fields]
    if unknown:
        raise UserError(
            "; ".join(f"no setting {key}: {suggest(key, fields)}" for key in unknown)
            + "; hint: config.py lists all"
        )
    cfg = dataclasses.replace(preset_defaults(name), **changes, given=tuple(sorted(changes)))
    notes = []
    if changes.get("epochs") is not None and "max_steps" in changes:
        raise UserError(
            f"epochs {cfg.epochs:g} and max_steps {cfg.max_steps} both set the length; "
            "hint: give one"
        )
    if "max_steps" in changes:
        cfg = dataclasses.replace(cfg, epochs=None)
    if cfg.epochs is None:  # otherwise in set_length
        cfg = fit_warmup(cfg, notes)
    return complete(cfg), notes


def complete(cfg: TrainConfig) -> TrainConfig:
    """Derive run_name, block_size and min_lr from other settings; expand ~ in paths."""
    paths = {name: expanduser(getattr(cfg, name)) for name in PATHS}
    return dataclasses.replace(
        cfg,
        run_name=cfg.run_name or cfg.preset,
        block_size=cfg.block_size or cfg.T,
        min_lr=0.1 * cfg.max_lr if cfg.min_lr is None else cfg.min_lr,
        **paths,
    )


def preset_defaults(name: str) -> TrainConfig:
    """Return a preset before complete(): settings derived from others are None or empty."""
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; hint: {suggest(name, PRESETS)}")
    base, changes = PRESETS[name]
    settings = preset_defaults(base) if base else TrainConfig()
    return dataclasses.replace(settings, **changes, preset=name)


def fit_warmup(cfg: TrainConfig, notes: list[str]) -> TrainConfig:
    """Shorten the warm-up in proportion when a run is shorter than its preset, unless given."""
    base = preset_defaults(cfg.preset)
    if cfg.max_steps >= base.max_steps or "warmup_steps" in cfg.given:
        return cfg
    warmup_steps = base.warmup_steps * max(cfg.max_steps, 0) // base.max_steps
    if warmup_steps == base.warmup_steps:
        return cfg
    notes.append(
        f"max_steps {cfg.max_steps} instead of {base.max_steps}: warm-up shrinks in proportion, "
        f"{base.warmup_steps} to {warmup_steps} steps"
    )
    return dataclasses.replace(cfg, warmup_steps=warmup_steps)


# --------------------------------------------------------------------------------------------------
# the command line


# What settings are called elsewhere, and here.
ADVICE = {
    "batch_size": "tokens per optimizer step are --total_batch, rows per micro-batch --B",
    "learning_rate": "it is --max_lr here",
    "lr": "it is --max_lr here",
    "max_iters": "it is --max_steps here",
    "warmup_iters": "it is --warmup_steps here",
    "preset": "a preset is the first word: train_gpt2.py gpt2-rope",
}


def from_command_line(argv: list[str]) -> tuple[TrainConfig, list[str]]:
    """Return the settings of `[PRESET] [--field value ...]`, and notes on them, one line each."""
    notes = []
    if argv and not argv[0].startswith("-"):
        name, argv = argv[0], argv[1:]
    else:
        name = "shakespeare"
        notes.append(
            "no preset given: shakespeare, a small model on any machine; for GPT-2 (124M) on 4 "
            "GPUs: torchrun --standalone --nproc_per_node=4 train_gpt2.py gpt2-rope"
        )
    defaults = preset_defaults(name)
    groups = []
    for group, cls in GROUPS.items():
        values = {f.name: getattr(defaults, f.name) for f in dataclasses.fields(cls)}
        groups.append((group, tyro.conf.OmitArgPrefixes[cls], cls(**values)))
    parsed = parse(
        dataclasses.make_dataclass("Settings", groups, frozen=True),
        argv,
        advice=ADVICE | dict.fromkeys(PRESETS, ADVICE["preset"]),
        prog=f"train_gpt2.py {name}",
        description=f"presets (first word; shown: {name}): {', '.join(PRESETS)}",
    )
    # tyro does not tell which were given
    given = [a[2:].split("=")[0].replace("-", "_") for a in argv if a.startswith("--")]
    changes = {}
    for group, cls in GROUPS.items():
        for field in dataclasses.fields(cls):
            if field.name in given or f"no_{field.name}" in given:
                changes[field.name] = getattr(getattr(parsed, group), field.name)
    cfg, more_notes = build_config(name, changes)
    return cfg, notes + more_notes


# --------------------------------------------------------------------------------------------------
# what may change when a run is resumed

# Settings that do not alter what is learned.
FREE_ON_RESUME = set(
    "B recompute device use_compile log_interval eval_interval save_interval save_minutes "
    "keep_last val_tokens hellaswag_limit sample_interval n_samples sample_tokens sample_prompt "
    "data_root log_dir ckpt_dir run_name resume wandb wandb_project batch_hashes eval_only dry_run "
    "deterministic group_timeout max_skipped accept_new_data given".split()
)


def as_stored(cfg: TrainConfig) -> dict:
    """Return settings as config.json holds them: tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def differences(cfg: TrainConfig, stored: dict) -> str:
    """List the settings that decide the result and differ from a run's: `name old -> new, ...`."""
    new = as_stored(cfg)
    old = as_stored(TrainConfig()) | stored  # defaults for what an older version did not know
    free = set(FREE_ON_RESUME)
    if cfg.epochs is not None and cfg.epochs == old["epochs"]:
        free |= {"max_steps", "warmup_steps"}  # computed from the epochs
    if cfg.init_from and cfg.init_from == old["init_from"]:
        free |= SHAPE  # the checkpoint's own
    changed = [key for key in new if key not in free and old[key] != new[key]]
    return ", ".join(f"{k} {format_value(old[k])} -> {format_value(new[k])}" for k in changed)


def format_value(value) -> str:
    """Return a setting as it is printed: 0.1 * 1.5e-3 as 0.00015."""
    return f"{value:.10g}" if isinstance(value, float) else str(value)
