"""Train presets with several seeds and learning rates, one run after the other; compare them.

    python study.py gpt2-baseline gpt2-rope --seeds 3 --max_lr 1e-3 2e-3 --max_steps 640 \\
        --data_root data/edu
    python study.py gpt2-modern --max_steps 320 --data_root data/edu -- --hellaswag_limit 1000

What follows `--` are more settings for all runs. Each run is train_gpt2.py in a process of its own,
in LOG_DIR/NAME. Ctrl-C or SIGTERM stops the study with a checkpoint; the same command resumes it
and skips the runs that are finished or have diverged.
"""

import json
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

import config
from runtime.command_line import PathText, UserError, parse, run_script, say

# --scale mini, a size for two CPU cores: 10.2M parameters beside the embedding
MINI = dict(
    n_layer=13,
    n_embd=256,
    T=256,
    B=8,
    total_batch=8192,
    val_tokens=65536,
    eval_interval=64,
    save_interval=16,
    keep_last=1,
    hellaswag_limit=200,
    n_samples=0,
    wandb="off",
)


@dataclass(frozen=True)
class Study:
    """Train presets with several seeds and learning rates, one run after the other."""

    # as `train_gpt2.py --help` lists them; after `--`: settings of train_gpt2.py for all runs
    presets: tyro.conf.Positional[tuple[str, ...]] = ()
    seeds: int = 1  # runs of each setting: seeds 1, 2, ... of weights and data order
    # peak learning rates, the preset's own unless given; Muon's other rates keep their ratio to it
    max_lr: tuple[float, ...] = ()
    # mini: 13 layers, 256 wide, T = 256, 8,192 tokens per step; full: the preset as it is
    scale: Literal["mini", "full"] = "mini"
    max_steps: int | None = None  # the preset's own unless given
    data_root: PathText | None = None  # directory of token shards; the preset's own unless given
    log_dir: PathText = "log/study"  # parent of the run directories


def commands(study: Study, more: list[str]) -> list[list[str]]:
    """Return train_gpt2.py's arguments for each run. Raises UserError for wrong settings."""
    from preflight import problems, with_shape  # imports torch

    if not study.presets or study.seeds < 1:
        raise UserError(
            f"{len(study.presets)} presets and {study.seeds} seeds make no run; "
            "hint: python study.py gpt2-rope --seeds 1"
        )
    refuse_taken(more)
    argvs = []
    for preset in map(config.preset, study.presets):
        if study.scale == "mini":
            refuse_to_shrink(preset, more)
        for max_lr in study.max_lr or (preset.max_lr,):
            for seed in range(1, study.seeds + 1):
                argv = [preset.preset]
                for name, value in run_settings(study, preset, max_lr, seed).items():
                    argv += [f"--{name}", str(value)]
                cfg, _ = config.from_command_line(argv + more)
                wrong = problems(with_shape(cfg), world_size=1)
                if wrong:
                    raise UserError(f"{cfg.run_name}: {'; '.join(wrong)}")
                argvs.append(argv + more)
    return argvs


def refuse_taken(more: list[str]):
    """Raise UserError for a setting after `--` that would be the same in runs meant to differ."""
    instead = dict.fromkeys(("seed", "data_seed"), "--seeds N") | {"max_lr": "--max_lr X"}
    instead |= dict.fromkeys(("run_name", "log_dir", "ckpt_dir", "resume"), "--log_dir DIR")
    for name in sorted(given_names(more) & instead.keys()):
        raise UserError(
            f"--{name} after -- would be the same for all runs; hint: {instead[name]} before --"
        )


def refuse_to_shrink(preset: config.TrainConfig, more: list[str]):
    """Raise UserError where --scale mini would undo what a preset or --init_from is about."""
    given = given_names(more)
    if "init_from" in given:
        raise UserError("--init_from brings its own shape, not --scale mini's; hint: --scale full")
    baseline = config.preset("gpt2-baseline")
    for name in ("n_layer", "n_embd", "T", "total_batch"):
        value = getattr(preset, name)
        if value != getattr(baseline, name) and name not in given:
            raise UserError(
                f"{preset.preset} has {name} {value}, and --scale mini would set {MINI[name]}; "
                "hint: --scale full"
            )


def given_names(argv: list[str]) -> set[str]:
    """Return the names of the options on a command line."""
    options = [re.match(r"--([\w-]+)", word) for word in argv]
    return {option[1].replace("-", "_") for option in options if option}


def run_settings(study: Study, preset: config.TrainConfig, max_lr: float, seed: int) -> dict:
    """Return the settings of a run beside its preset."""
    name = f"{preset.preset}-{max_lr:g}-seed{seed}"
    settings = dict(run_name=name, log_dir=study.log_dir, seed=seed, data_seed=seed, max_lr=max_lr)
    if preset.optimizer == "muon":
        for rate in ("embed_lr", "head_lr"):
            settings[rate] = getattr(preset, rate) * max_lr / preset.max_lr
    if study.scale == "mini":
        settings |= MINI | dict(n_head=MINI["n_embd"] * preset.n_head // preset.n_embd)
    for name in ("max_steps", "data_root"):
        if getattr(study, name) is not None:
            settings[name] = getattr(study, name)
    return settings


def train_all(argvs: list[list[str]]):
    """Train all runs. A signal stops the current run with a checkpoint, and then the study."""
    from runtime.stop import INTERRUPTED, Diverged  # imports torch: errors in settings come before

    process = None
    stopped = False

    def stop(number, frame):
        nonlocal stopped
        stopped = True
        if process:
            process.terminate()

    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            handlers[number] = signal.signal(number, stop)
    try:
        for argv in argvs:
            cfg, _ = config.from_command_line(argv)
            marker = cfg.run_dir / "diverged.json"
            if marker.exists() and not changed_since(cfg):
                say(f"{cfg.run_name} has diverged before; remove {marker} to try it again")
                continue
            say(f"$ python train_gpt2.py {shlex.join(argv)}")
            command = [sys.executable, str(Path(__file__).with_name("train_gpt2.py")), *argv]
            # in a session of its own: Ctrl-C reaches it once, from here
            process = subprocess.Popen(command, start_new_session=True)
            if stopped:  # before there was a process
                process.terminate()
            status = process.wait()
            if stopped or status == INTERRUPTED:
                say("interrupted; to resume: the same command again")
                sys.exit(INTERRUPTED)
            if status == Diverged.status:
                say(f"{cfg.run_name} has diverged; the study continues")
            elif status:
                raise UserError(
                    f"{cfg.run_name} ended with status {status}; hint: see above; the same command "
                    "resumes, another --log_dir starts a new study"
                )
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def changed_since(cfg: config.TrainConfig) -> str:
    """List the settings of a run that differ from those in its directory."""
    try:
        return config.differences(cfg, json.loads((cfg.run_dir / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        return "config.json"


def main():
    argv, more = sys.argv[1:], []
    if "--" in argv:
        more = argv[argv.index("--") + 1 :]
        argv = argv[: argv.index("--")]
    study = parse(Study, args=argv)
    argvs = commands(study, more)
    train_all(argvs)
    import compare  # imports torch, too

    runs = tuple(str(config.from_command_line(argv)[0].run_dir) for argv in argvs)
    out = str(Path(study.log_dir, "compare.png"))
    compare.main(compare.Comparison(runs, x="tokens", out=out))


if __name__ == "__main__":
    run_script(main)
