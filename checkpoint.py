"""Checkpoints: write one so that it is whole or not there, find the newest good one, rebuild a model from it.

A checkpoint is a directory `step_NNNNNN/` of plain files, nothing pickled:
    model.safetensors      the weights, under the names of model.py (the tied head once, no buffers)
    optimizer.safetensors  AdamW's moments, under the names of their parameters
    state.json             step, full config, best loss, data set fingerprint, W&B run id, versions, SHA-256 of the two
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import UserError, one_line
from model import GPT, GPTConfig
from runlog import read_metrics
from shards import sha256

FORMAT = 1

# Settings that a resumed run may change: they do not alter what is learned.
FREE_ON_RESUME = {"B", "device", "use_compile", "log_interval", "eval_interval", "save_interval", "keep_last",
                  "val_tokens", "hellaswag_limit", "sample_interval", "n_samples", "sample_tokens", "sample_prompt",
                  "data_root", "log_dir", "ckpt_dir", "run_name", "resume", "wandb", "wandb_project", "batch_hashes",
                  "eval_only", "dry_run"}


def save(ckpt_dir: Path, step: int, model: GPT, optimizer: torch.optim.Optimizer, state: dict) -> Path:
    """Write ckpt_dir/step_NNNNNN and return it. A crash at any moment leaves older checkpoints and no half of this one:
    files go to a temporary directory, reach the disk (fsync), and get their name last."""
    final = ckpt_dir / f"step_{step:06d}"
    temporary = ckpt_dir / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary / "model.safetensors")
    names = {p: name for name, p in model.named_parameters()}
    moments = {f"{names[p]}.{key}": value for p, values in optimizer.state.items() for key, value in values.items()}
    save_file(moments, temporary / "optimizer.safetensors")
    state = state | dict(format=FORMAT, step=step, gpt_config=dataclasses.asdict(model.config),
                         torch=str(torch.__version__), sha256={f.name: sha256(f) for f in sorted(temporary.iterdir())})
    (temporary / "state.json").write_text(json.dumps(state, indent=1))
    for path in [*temporary.iterdir(), temporary]:
        fsync(path)
    shutil.rmtree(final, ignore_errors=True)  # only ever a checkpoint of this step that failed to load
    os.replace(temporary, final)
    fsync(ckpt_dir)
    return final


def fsync(path: Path):
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle for a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_state(path: Path) -> dict:
    """state.json of a checkpoint whose files all match their SHA-256. Raises UserError naming what does not."""
    try:
        state = json.loads((path / "state.json").read_text())
        if state["format"] != FORMAT:
            raise UserError(f"{path} has checkpoint format {state['format']}, expected {FORMAT}; "
                            "hint: use the version that wrote it")
        for name, expected in state["sha256"].items():
            if os.path.basename(name) != name or (found := sha256(path / name)) != expected:
                raise UserError(f"{path / name} is damaged: SHA-256 {found[:12]}..., expected {expected[:12]}...; "
                                "hint: --resume an older checkpoint")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is not a whole checkpoint ({type(e).__name__}: {e}); hint: --resume an older one")
    return state


def steps(ckpt_dir: Path) -> list[Path]:
    """The checkpoints of a directory, oldest first."""
    return sorted(p for p in ckpt_dir.glob("step_*") if p.is_dir())


def newest(ckpt_dir: Path, say=print) -> tuple[Path, dict] | None:
    """The newest checkpoint whose files are all good, and its state; None when there are none at all.

    Damaged ones are told of and passed over. Raises UserError when every one is damaged: no silent start from scratch.
    """
    for path in reversed(steps(ckpt_dir)):
        try:
            return path, read_state(path)
        except UserError as e:
            say(f"checkpoint passed over | {e}")
    if steps(ckpt_dir):
        raise UserError(f"no good checkpoint in {ckpt_dir}; hint: --run_name NEW starts again beside it")
    return None


def load_optimizer(path: Path, model: GPT, optimizer: torch.optim.Optimizer):
    """Put the stored moments back, where AdamW keeps them: with their parameters, the step count of the unfused one (MPS)
    on the CPU."""
    params = dict(model.named_parameters())
    for key, value in load_file(path / "optimizer.safetensors").items():
        name, _, moment = key.rpartition(".")
        on_cpu = moment == "step" and params[name].device.type not in ("cpu", "cuda")
        optimizer.state[params[name]][moment] = value if on_cpu else value.to(params[name].device)


def load_model(path: Path) -> GPT:
    """The model of a checkpoint, on the CPU, rebuilt from the config stored with it."""
    state = read_state(path)
    model = GPT(GPTConfig(**state["gpt_config"]))
    load_weights(path, model)
    return model


def load_weights(path: Path, model: GPT):
    """Weights of a checkpoint into a model of the same shape. Raises UserError where the shapes differ."""
    try:
        model.load_state_dict(load_file(path / "model.safetensors"))
    except (RuntimeError, SafetensorError) as e:
        raise UserError(f"{path} does not fit this model: {one_line(e)}; hint: same model settings as in its state.json")


def prune(ckpt_dir: Path, keep_last: int, best: str | None):
    """Delete all but the newest keep_last checkpoints and the best one (its directory name)."""
    for path in steps(ckpt_dir)[:-keep_last]:
        if path.name != best:
            shutil.rmtree(path)


def find(where: str) -> Path:
    """The checkpoint meant by a path: itself, the newest of a run directory, or of a directory of checkpoints.

    Raises UserError when there is none.
    """
    path = Path(where)
    if (path / "state.json").exists():
        return path
    for ckpt_dir in (path / "ckpt", path):
        if steps(ckpt_dir):
            return newest(ckpt_dir)[0]
    raise UserError(f"no checkpoint in {where}; hint: a run directory (log/NAME), or a step_NNNNNN directory in it")


def open_run(cfg, run_dir: Path, ckpt_dir: Path, say) -> tuple[Path, dict] | None:
    """The checkpoint to go on from and its state, or None for a fresh start. Never touches another run's files."""
    if cfg.resume == "never" and (run_dir / "config.json").exists():
        raise UserError(f"{run_dir} holds a run already, --resume never would mix with it; "
                        f"hint: --run_name {cfg.run_name}-2")
    if cfg.resume not in ("auto", "never"):
        path = find(cfg.resume)
        found = path, read_state(path)
    else:
        found = newest(ckpt_dir, say) if ckpt_dir.exists() else None
    old = found[1]["config"] if found else None
    if not found and (run_dir / "config.json").exists():  # a run that ended before its first checkpoint
        old = json.loads((run_dir / "config.json").read_text())
    if old is not None:
        new = json.loads(json.dumps(dataclasses.asdict(cfg)))  # tuples become lists, as in the file
        changed = [f"{k} {old.get(k)} -> {new[k]}" for k in new if k not in FREE_ON_RESUME and old.get(k) != new[k]]
        if changed:
            raise UserError(f"{run_dir} holds a run with other settings ({', '.join(changed)}); "
                            f"hint: --run_name {cfg.run_name}-2 starts a new one beside it")
    return found


def finished(run_dir: Path, max_steps: int) -> bool:
    """Whether the run's last evaluation has been written."""
    if not (run_dir / "metrics.jsonl").exists():
        return False
    return any(r["step"] == max_steps and "val/loss" in r for r in read_metrics(run_dir))
