"""Checkpoints: written beside training so that one is whole or not there; the newest good one found and put back.

A checkpoint is a directory `step_NNNNNN/` of plain files, nothing pickled:
    model.safetensors      the weights, under the names of model.py (the tied head once, no buffers)
    optimizer.safetensors  AdamW's moments, under the names of their parameters
    state.json             step, full config, validation losses, data set fingerprint, W&B run id, versions, SHA-256 of
                           the two files and of itself
Every random draw of a run is a function of (seed, step), so there is no random state to keep.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import UserError, one_line
from distributed import from_first
from model import GPT, GPTConfig
from shards import sha256

FORMAT = 2

# Settings that a resumed run may change: they do not alter what is learned.
FREE_ON_RESUME = {
    "B",
    "recompute",
    "device",
    "use_compile",
    "log_interval",
    "eval_interval",
    "save_interval",
    "save_minutes",
    "keep_last",
    "val_tokens",
    "hellaswag_limit",
    "sample_interval",
    "n_samples",
    "sample_tokens",
    "sample_prompt",
    "data_root",
    "log_dir",
    "ckpt_dir",
    "run_name",
    "resume",
    "wandb",
    "wandb_project",
    "batch_hashes",
    "eval_only",
    "dry_run",
    "deterministic",
    "group_timeout",
    "max_skipped",
    "accept_new_data",
}

# --------------------------------------------------------------------------------------------------------------------
# writing


def contents(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a checkpoint, by file and name: where they live, not copies."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        "model.safetensors": model.state_dict(),
        "optimizer.safetensors": {
            f"{names[p]}.{key}": value
            for p, values in optimizer.state.items()
            for key, value in values.items()
        },
    }


def write(
    ckpt_dir: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict
) -> Path:
    """Write ckpt_dir/step_NNNNNN and return it. A crash at any moment leaves older checkpoints and no half of this one:
    files go to a temporary directory, reach the disk (fsync), and get their name last.
    """
    final = ckpt_dir / f"step_{step:06d}"
    temporary = ckpt_dir / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, content in tensors.items():
            save_file({k: v.contiguous() for k, v in content.items()}, temporary / name)
        state = state | dict(
            format=FORMAT,
            step=step,
            versions=dict(
                python=platform.python_version(), torch=str(torch.__version__), numpy=np.__version__
            ),
            sha256={name: sha256(temporary / name) for name in tensors},
        )
        (temporary / "state.json").write_text(
            json.dumps(state | {"checksum": checksum(state)}, indent=1)
        )
        for path in [*temporary.iterdir(), temporary]:
            fsync(path)
        os.replace(temporary, final)
    except (OSError, SafetensorError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync(ckpt_dir)
    return final


def save(
    ckpt_dir: Path, step: int, model: GPT, optimizer: torch.optim.Optimizer, state: dict
) -> Path:
    """write() the state of a model and its optimiser, waiting for the disk."""
    return write(
        ckpt_dir,
        step,
        contents(model, optimizer),
        state | dict(gpt_config=dataclasses.asdict(model.config)),
    )


def checksum(state: dict) -> str:
    """SHA-256 over what state.json says, its own checksum aside."""
    said = json.dumps({k: v for k, v in state.items() if k != "checksum"}, sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def fsync(path: Path):
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle for a directory
    descriptor = os.open(
        path, os.O_RDONLY if path.is_dir() else os.O_RDWR
    )  # Windows syncs what can be written alone
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Saver:
    """Saves beside training: save() copies the state into host memory, then a thread writes it, and prunes.

    The copies' memory is taken once: new pages cost 1.5 s a GB on the test machine, copying into old ones 0.06 s.
    A save that fails is told of and leaves the checkpoints as they are; the next one tries again.
    """

    def __init__(
        self, ckpt_dir: Path, keep_last: int, minutes: float, model: GPT, optimizer, log, say
    ):
        self.ckpt_dir, self.keep_last, self.minutes, self.log, self.say = (
            ckpt_dir,
            keep_last,
            minutes,
            log,
            say,
        )
        self.model, self.optimizer, self.copies, self.step, self.saved_at = (
            model,
            optimizer,
            {},
            None,
            time.monotonic(),
        )
        self.losses: dict[int, float] = {}  # validation losses of the steps with a checkpoint
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self.writing = self.thread.submit(lambda: True)
        for left_over in ckpt_dir.glob(".step_*.tmp"):  # of a process that was killed while saving
            shutil.rmtree(left_over, ignore_errors=True)

    def due(self) -> bool:
        """By the clock."""
        return 0 < self.minutes * 60 < time.monotonic() - self.saved_at

    def reserve(self):
        """Take the memory for the copies, in the background."""
        self.writing = self.thread.submit(self.allocate)

    def allocate(self) -> bool:
        for file, tensors in contents(self.model, self.optimizer).items():
            for name, t in tensors.items():
                if (file, name) not in self.copies:
                    copy = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.device.type == "cuda")
                    copy.numpy().fill(
                        0
                    )  # touches the pages; numpy, because torch would start a second team of threads
                    self.copies[file, name] = copy
        return True

    def save(self, step: int, state: dict):
        """Copy the state, once the last save has ended, and have it written. Nothing for the same step again.

        Leaves a record: save_ms is how long the caller was held, write_ms until all was on the disk.
        """
        t0 = time.perf_counter()
        if self.wait() and self.step == step:
            return
        self.log.sync()  # the lines up to this step reach the disk before the checkpoint that goes on from it
        self.allocate()
        for file, tensors in contents(self.model, self.optimizer).items():
            for name, t in tensors.items():
                self.copies[file, name].copy_(t, non_blocking=t.is_cuda)
        if next(self.model.parameters()).is_cuda:
            torch.cuda.synchronize()
        state = state | dict(
            gpt_config=dataclasses.asdict(self.model.config),
            val_losses={str(k): v for k, v in self.losses.items()},
            best=self.best(),
        )
        self.step, self.saved_at = step, time.monotonic()
        self.writing = self.thread.submit(self.write, step, state, t0, time.perf_counter() - t0)

    def write(self, step: int, state: dict, t0: float, held: float) -> bool:
        tensors = {file: {} for file, _ in self.copies}
        for (file, name), t in self.copies.items():
            tensors[file][name] = t
        try:
            path = write(self.ckpt_dir, step, tensors, state)
            prune(self.ckpt_dir, step, self.keep_last, self.best()["step"])
        except Exception as e:  # whatever it was: it must not end training
            last = [p.name for p in steps(self.ckpt_dir) if step_of(p) < step][-1:]
            self.say(
                f"step {step} | NOT saved: {one_line(e)}; the last checkpoint is {', '.join(last) or 'none'}, "
                f"the next save tries again; hint: make room in {self.ckpt_dir}"
            )
            return False
        took = time.perf_counter() - t0
        self.log.write({"step": step, "save_ms": held * 1e3, "write_ms": took * 1e3})
        self.say(
            f"step {step} | saved {path} | {took:.1f} s, of which training waited {held:.2f} s"
        )
        return True

    def wait(self) -> bool:
        """Wait for the thread; whether the last save went well."""
        return self.writing.result()

    def close(self) -> bool:
        """wait(), then prune with the last evaluation counted in."""
        if saved := self.wait():
            prune(self.ckpt_dir, self.step or 0, self.keep_last, self.best()["step"])
        self.thread.shutdown()
        return saved

    def best(self) -> dict:
        """The step with the lowest validation loss among those with a checkpoint, and that loss."""
        there = {
            k: v
            for k, v in list(self.losses.items())
            if (self.ckpt_dir / f"step_{k:06d}").exists() or k == self.step
        }
        step = min(there, key=there.get, default=None)
        return {"step": step, "val_loss": there.get(step)}


def prune(ckpt_dir: Path, step: int, keep_last: int, best: int | None):
    """Delete all but the newest keep_last checkpoints up to the one just written, at `step`, and the best one."""
    for path in [p for p in steps(ckpt_dir) if step_of(p) <= step][:-keep_last]:
        if step_of(path) != best:
            shutil.rmtree(
                path, ignore_errors=True
            )  # what cannot be deleted stays, and is tried again next time


def need_space(ckpt_dir: Path, model: GPT, keep_last: int):
    """Raise UserError when the disk has no room for the checkpoints that a run keeps, and the one being written."""
    size = 12 * model.num_params()  # float32 weights and AdamW's two moments
    missing = keep_last + 2 - len(steps(ckpt_dir))
    if (free := shutil.disk_usage(ckpt_dir).free) < missing * size:
        raise UserError(
            f"{ckpt_dir} has {free / 1e9:.2f} GB free, checkpoints need {missing} x {size / 1e9:.2f} GB; "
            "hint: make room, a lower --keep_last, or another --ckpt_dir"
        )


# --------------------------------------------------------------------------------------------------------------------
# reading


def read_state(path: Path) -> dict:
    """state.json of a checkpoint whose files all match their SHA-256. Raises UserError naming what does not."""
    try:
        state = json.loads((path / "state.json").read_text())
        if state["format"] != FORMAT:
            raise UserError(
                f"{path} has checkpoint format {state['format']}, expected {FORMAT}; "
                "hint: use the version that wrote it"
            )
        if state["checksum"] != checksum(state):
            raise UserError(
                f"{path / 'state.json'} is damaged: its checksum is another; hint: --resume an older one"
            )
        if path.name.startswith("step_") and step_of(path) != state["step"]:
            raise UserError(
                f"{path} holds step {state['step']}; hint: give the directory its own name back"
            )
        for name, expected in state["sha256"].items():
            if os.path.basename(name) != name or (found := sha256(path / name)) != expected:
                raise UserError(
                    f"{path / name} is damaged: SHA-256 {found[:12]}..., expected {expected[:12]}...; "
                    "hint: --resume an older checkpoint"
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path} is not a whole checkpoint ({type(e).__name__}: {e}); hint: --resume an older one"
        ) from e
    return state


def steps(ckpt_dir: Path) -> list[Path]:
    """The checkpoints of a directory, oldest first."""
    return sorted(
        (p for p in ckpt_dir.glob("step_*") if p.is_dir() and p.name[5:].isdigit()), key=step_of
    )


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def newest(
    ckpt_dir: Path, say=print, fits=lambda path, state: None, aside: bool = False
) -> tuple[Path, dict] | None:
    """The newest checkpoint whose files are all good and which `fits` (or raises UserError), and its state.

    Others are told of and passed over; with `aside` they get another name, so that they are neither pruned nor written
    over. None when there are none at all; raises UserError when none is good: no silent start from scratch.
    """
    passed_over, error = [], None
    for path in reversed(steps(ckpt_dir)):
        try:
            state = read_state(path)
            fits(path, state)
        except UserError as e:
            say(f"checkpoint passed over | {e}")
            passed_over, error = [*passed_over, path], e
            continue
        for bad in passed_over if aside else ():
            os.replace(
                bad, bad.with_name(f"passed_over_{bad.name}_{time.strftime('%Y%m%d-%H%M%S')}")
            )
        return path, state
    if error is not None:
        raise UserError(
            f"no good checkpoint in {ckpt_dir}; the oldest: {error}; or --run_name NEW starts again beside it"
        )
    return None


def restore(path: Path, model: GPT, optimizer: torch.optim.Optimizer | None = None):
    """Put weights and moments back. The first process reads them, the others get them from it: no shared disk needed.

    Raises UserError where the shapes differ.
    """

    def read():
        load_weights(path, model)
        return [(k, v.shape, v.dtype) for k, v in moments.items()]

    first, params = (
        not dist.is_initialized() or dist.get_rank() == 0,
        dict(model.named_parameters()),
    )
    moments = load_file(path / "optimizer.safetensors") if first and optimizer else {}
    for key, shape, dtype in from_first(read):
        name, _, moment = key.rpartition(".")
        value = (
            moments[key].clone() if first else torch.empty(shape, dtype=dtype)
        )  # what was read is a map of the file
        on_cpu = moment == "step" and params[name].device.type not in (
            "cpu",
            "cuda",
        )  # where the unfused AdamW keeps it
        optimizer.state[params[name]][moment] = value if on_cpu else value.to(params[name].device)
    if dist.is_initialized():
        moments = (
            [t for p in params.values() for t in optimizer.state[p].values()] if optimizer else []
        )
        for t in [*model.state_dict().values(), *moments]:
            dist.broadcast(t, 0)


def load_model(path: Path) -> GPT:
    """The model of a checkpoint, on the CPU, rebuilt from the config stored with it."""
    model = empty_model(path, read_state(path))
    load_weights(path, model)
    return model


def empty_model(path: Path, state: dict) -> GPT:
    """A model of the shape that state.json says. Raises UserError when it says another kind of model."""
    try:
        return GPT(GPTConfig(**state["gpt_config"]))
    except (KeyError, TypeError) as e:
        raise UserError(
            f"{path} is not of this model ({one_line(e)}); hint: use the version that wrote it"
        ) from e


def load_weights(path: Path, model: GPT):
    """Weights of a checkpoint into a model of the same shape. Raises UserError where the shapes differ."""
    try:
        model.load_state_dict(load_file(path / "model.safetensors"))
    except (RuntimeError, SafetensorError) as e:
        raise UserError(
            f"{path} does not fit this model: {one_line(e)}; hint: same model settings as in its state.json"
        )


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
    raise UserError(
        f"no checkpoint in {where}; hint: a run directory (log/NAME), or a step_NNNNNN directory in it"
    )


# --------------------------------------------------------------------------------------------------------------------
# a run: where it goes on, whether it is done


def open_run(cfg, run_dir: Path, ckpt_dir: Path, say) -> tuple[Path, dict] | None:
    """The checkpoint to go on from and its state, or None for a fresh start. Never touches another run's files.

    Raises UserError for settings that would mix two runs, and when checkpoints that were written are gone.
    """

    def same_run(path: Path, state: dict):
        if "config" not in state:  # hf.py import
            raise UserError(
                f"{path} holds weights from {state.get('source')}, not a run to go on with; "
                f"hint: --init_from {path} under a new --run_name"
            )
        if changed := differences(cfg, state["config"]):
            raise UserError(
                f"{path} is of a run with other settings: {changed}; hint: another --run_name for these"
            )

    begun = None  # settings of the run that is here already
    try:
        begun = json.loads((run_dir / "config.json").read_text())
    except FileNotFoundError:
        pass
    except ValueError:
        say(f"{run_dir / 'config.json'} cannot be read, the checkpoints' own settings decide")
    if begun and cfg.resume == "never":
        raise UserError(
            f"{run_dir} holds a run already, --resume never would mix with it; "
            f"hint: --run_name {cfg.run_name}-2"
        )
    if begun and (changed := differences(cfg, begun)):
        raise UserError(
            f"{run_dir} holds a run with other settings: {changed}; hint: --run_name {cfg.run_name}-2 starts a "
            f"new one beside it. It may go on with another {', '.join(sorted(FREE_ON_RESUME))}"
        )
    if (
        cfg.ckpt_dir
        and cfg.resume in ("auto", "never")
        and steps(ckpt_dir)
        and not (run_dir / "config.json").exists()
    ):
        raise UserError(
            f"{ckpt_dir} holds checkpoints, but {run_dir} no run: another one's? hint: another --ckpt_dir, or "
            f"--resume {steps(ckpt_dir)[-1]}"
        )
    trains = not (cfg.eval_only or cfg.dry_run)
    found = (
        newest(ckpt_dir, say, same_run, aside=trains)
        if ckpt_dir.exists() and cfg.resume != "never"
        else None
    )
    if cfg.resume not in ("auto", "never"):
        path = find(cfg.resume)
        same_run(path, state := read_state(path))
        if found and path.resolve().parent == ckpt_dir.resolve() and path.name != found[0].name:
            raise UserError(
                f"{path} is not the newest checkpoint of this run, {found[0].name} is, and what came between "
                f"would be overwritten; hint: --run_name {cfg.run_name}-2 goes on from there beside it"
            )
        return found if found and found[1]["step"] > state["step"] else (path, state)
    if not found:
        metrics = run_dir / "metrics.jsonl"
        if metrics.exists() and '"save_ms"' in metrics.read_text():
            raise UserError(
                f"{run_dir} has saved checkpoints, but {ckpt_dir} has none; hint: --ckpt_dir if they are "
                f"elsewhere, --run_name {cfg.run_name}-2 to start again beside it"
            )
        begun and say(f"resume | {run_dir} ended before its first checkpoint: from step 0")
    return found


def differences(cfg, old: dict) -> str:
    """The settings that decide the result and differ from a run's, as `name old -> new, ...`; empty when none does."""
    as_stored = lambda config: json.loads(
        json.dumps(dataclasses.asdict(config))
    )  # tuples become lists
    new, old = (
        as_stored(cfg),
        as_stored(type(cfg)()) | old,
    )  # the defaults: for what an older version did not know
    derived = (
        {"max_steps", "warmup_steps"}
        if cfg.epochs is not None and cfg.epochs == old["epochs"]
        else set()
    )
    return ", ".join(
        f"{k} {old[k]} -> {new[k]}"
        for k in new
        if k not in FREE_ON_RESUME | derived and old[k] != new[k]
    )


def mark_finished(run_dir: Path, step: int, val_loss: float, say):
    """Leave the mark of success; a script can look for it where it cannot trust an exit status (torchrun's)."""
    try:
        write_json(run_dir / "finished.json", {"step": step, "val_loss": val_loss})
    except OSError as e:
        say(f"finished.json not written: {one_line(e)}")


def write_json(path: Path, content: dict):
    """Whole or not at all, and never less than what was there before."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)


def finished(run_dir: Path, max_steps: int) -> bool:
    """Whether the run has left its mark of success: written last, after the last checkpoint and evaluation."""
    try:
        return json.loads((run_dir / "finished.json").read_text())["step"] == max_steps
    except (OSError, ValueError, KeyError):
        return False
