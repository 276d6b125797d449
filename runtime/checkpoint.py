"""Checkpoints: written atomically in the background; the newest valid one is found and restored.

A checkpoint is a directory `step_NNNNNN/` of plain files, nothing pickled:
    model.safetensors      the weights, under the names of model.py (the tied head once, no buffers)
    optimizer.safetensors  the optimizer's moments, under the names of their parameters
    state.json             step, full config, validation losses, data set fingerprint, W&B run id,
                           versions, SHA-256 of the two files and of itself
Every random draw of a run is a function of (seed, step), so there is no random state to save.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from runtime.command_line import UserError, one_line, say
from runtime.device import worker_thread
from runtime.files import atomic, remove, sha256
from runtime.runlog import RunLog
from runtime.world import on_rank0

FORMAT = 2

# bytes at which each copy of a tensor begins, a cache line
ALIGNMENT = 64


class Checkpoint(NamedTuple):
    """A valid checkpoint: every file in it matches its SHA-256."""

    path: Path
    state: dict  # state.json

    @property
    def step(self) -> int:
        return self.state["step"]


# --------------------------------------------------------------------------------------------------
# writing


def contents(model: torch.nn.Module, optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of a checkpoint by file and name; references, not copies."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[parameter]}.{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    return {"model.safetensors": model.state_dict(), "optimizer.safetensors": moments}


def write(ckpt_dir: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict):
    """Write ckpt_dir/step_NNNNNN atomically and return its path."""
    path = ckpt_dir / f"step_{step:06d}"
    with atomic(path) as temporary:
        temporary.mkdir(parents=True)
        for name, content in tensors.items():
            save_file({k: v.contiguous() for k, v in content.items()}, temporary / name)
        state = state | {
            "format": FORMAT,
            "step": step,
            "versions": {
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "numpy": np.__version__,
            },
            "sha256": {name: sha256(temporary / name) for name in tensors},
        }
        state = state | {"checksum": checksum(state)}
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
    return path


def checksum(state: dict) -> str:
    """Return the SHA-256 over the content of state.json, its own checksum aside."""
    content = {key: value for key, value in state.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Saver:
    """Saves in the background: save() copies the state into host memory, then a thread writes it.

    The host copies are allocated once: fresh pages cost 1.5 s per GB (measured), reused ones 0.06
    s. A save that fails is reported and leaves the checkpoints as they are; the next one tries
    again.
    """

    def __init__(self, cfg, model: torch.nn.Module, optimizer, log: RunLog):
        self.cfg = cfg
        self.ckpt_dir: Path = cfg.checkpoint_dir
        self.model = model
        self.optimizer = optimizer
        self.log = log
        self.device = next(model.parameters()).device
        self.copies: dict[tuple[str, str], torch.Tensor] = {}  # by file and name
        self.pinned: list[torch.Tensor] = []  # blocks of memory that copies are in
        self.step: int | None = None  # of the last save
        self.saved_at = time.monotonic()
        self.losses: dict[int, float] = {}  # validation losses of the steps with a checkpoint
        self.thread = worker_thread("saver", self.device)
        self.writing = self.thread.submit(lambda: True)
        for leftover in self.ckpt_dir.glob(".step_*.tmp"):  # of a process killed while saving
            remove(leftover)

    def due(self) -> bool:
        """Tell whether --save_minutes have passed since the last save."""
        seconds = 60 * self.cfg.save_minutes
        return 0 < seconds < time.monotonic() - self.saved_at

    def reserve(self):
        """Allocate the memory for the copies, in the background."""
        self.writing = self.thread.submit(self.allocate)

    def allocate(self) -> bool:
        """Allocate what is missing of the copies, in one block; pinned for a GPU (the thread)."""
        missing = {
            (file, name): t
            for file, tensors in contents(self.model, self.optimizer).items()
            for name, t in tensors.items()
            if (file, name) not in self.copies
        }
        if not missing:
            return True
        sizes = [-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in missing.values()]
        block = torch.empty(sum(sizes), dtype=torch.uint8)
        # touch the pages; numpy, because torch would start a second OpenMP thread pool
        block.numpy().fill(0)
        if self.device.type == "cuda" and pin(block):
            self.pinned.append(block)
        for (key, t), part in zip(missing.items(), block.split(sizes)):
            self.copies[key] = part[: t.nbytes].view(t.dtype).view(t.shape)
        return True

    def save(self, step: int, state: dict):
        """Wait for the previous save, copy the state, start writing it.

        Does nothing when this step is saved already. Logs save_ms, how long the caller waited, and
        write_ms, how long it took until everything was on the disk.
        """
        started = time.perf_counter()
        if self.wait() and self.step == step:
            return
        self.log.sync()  # the lines up to this step reach the disk before the checkpoint
        self.thread.submit(self.allocate).result()  # nothing is missing after the first time
        for file, tensors in contents(self.model, self.optimizer).items():
            for name, t in tensors.items():
                self.copies[file, name].copy_(t, non_blocking=t.is_cuda)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        state = state | {
            "gpt_config": dataclasses.asdict(self.model.config),
            "val_losses": {str(k): v for k, v in self.losses.items()},
        }
        self.step = step
        self.saved_at = time.monotonic()
        waited = time.perf_counter() - started
        self.writing = self.thread.submit(self.write, step, state, started, waited)

    def write(self, step: int, state: dict, started: float, waited: float) -> bool:
        """Write the copies and delete old checkpoints; False when that failed (the thread)."""
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for (file, name), t in self.copies.items():
            tensors.setdefault(file, {})[name] = t
        try:
            path = write(self.ckpt_dir, step, tensors, state)
            prune(self.ckpt_dir, step, self.cfg.keep_last, self.best_step())
        except Exception as e:  # whatever it was: it must not end training
            older = [p.name for p in steps(self.ckpt_dir) if step_of(p) < step]
            say(
                f"step {step} | NOT saved: {one_line(e)}; the last checkpoint is "
                f"{older[-1] if older else 'none'}, the next save tries again; "
                f"hint: make room in {self.ckpt_dir}"
            )
            return False
        took = time.perf_counter() - started
        self.log.write({"step": step, "save_ms": waited * 1e3, "write_ms": took * 1e3})
        say(f"step {step} | saved {path} | {took:.1f} s, of which training waited {waited:.2f} s")
        return True

    def wait(self) -> bool:
        """Wait for the thread; tell whether the last save succeeded."""
        return self.writing.result()

    def close(self) -> bool:
        """Wait for the last save; prune again, as the last evaluation may have been the best."""
        saved = self.wait()
        if saved:
            prune(self.ckpt_dir, self.step or 0, self.cfg.keep_last, self.best_step())
        self.thread.shutdown()
        self.copies = {}
        while self.pinned:
            unpin(self.pinned.pop())
        return saved

    def best_step(self) -> int | None:
        """Return the step with the lowest validation loss among those with a checkpoint."""
        losses = {
            step: loss
            for step, loss in list(self.losses.items())
            if step == self.step or (self.ckpt_dir / f"step_{step:06d}").exists()
        }
        return min(losses, key=losses.get, default=None)


def pin(block: torch.Tensor) -> bool:
    """Pin host memory, which copies from a GPU to it need for full speed; tell whether it worked.

    torch's own pin_memory would round 1.5 GB up to 2.
    """
    error = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0))
    if error:
        say(f"checkpoints | slower: CUDA cannot pin {block.nbytes / 1e9:.2f} GB (error {error})")
    return not error


def unpin(block: torch.Tensor):
    """Undo pin(), before the memory is freed."""
    torch.cuda.cudart().cudaHostUnregister(block.data_ptr())


def prune(ckpt_dir: Path, step: int, keep_last: int, best: int | None):
    """Delete all but the newest keep_last checkpoints up to the one at `step`, and the best one."""
    written = [path for path in steps(ckpt_dir) if step_of(path) <= step]
    for path in written[:-keep_last]:
        if step_of(path) != best:
            # what cannot be deleted stays, and is tried again next time
            shutil.rmtree(path, ignore_errors=True)


def need_space(ckpt_dir: Path, model: torch.nn.Module, keep_last: int):
    """Raise UserError when the disk has no room for the checkpoints of a run, and one more."""
    size = 12 * model.num_params()  # float32 weights and AdamW's two moments
    missing = keep_last + 2 - len(steps(ckpt_dir))
    free = shutil.disk_usage(ckpt_dir).free
    if free < missing * size:
        raise UserError(
            f"{ckpt_dir} has {free / 1e9:.2f} GB free, checkpoints need {missing} x "
            f"{size / 1e9:.2f} GB; hint: make room, a lower --keep_last, or another --ckpt_dir"
        )


# --------------------------------------------------------------------------------------------------
# reading


def read(path: Path) -> Checkpoint:
    """Read a checkpoint's state and check its files. Raises UserError naming what is damaged."""
    try:
        state = json.loads((path / "state.json").read_text())
        if state["format"] != FORMAT:
            raise UserError(
                f"{path} has checkpoint format {state['format']}, expected {FORMAT}; "
                "hint: use the version that wrote it"
            )
        if state["checksum"] != checksum(state):
            raise UserError(
                f"{path / 'state.json'} is damaged: its checksum is another; "
                "hint: --resume an older one"
            )
        if path.name.startswith("step_") and step_of(path) != state["step"]:
            raise UserError(
                f"{path} holds step {state['step']}; hint: give the directory its own name back"
            )
        for name, expected in state["sha256"].items():
            if os.path.basename(name) != name:
                raise UserError(f"{path / 'state.json'} is damaged: it names a file {name!r}")
            actual = sha256(path / name)
            if actual != expected:
                raise UserError(
                    f"{path / name} is damaged: SHA-256 {actual[:12]}..., expected "
                    f"{expected[:12]}...; hint: --resume an older checkpoint"
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path} is not a whole checkpoint ({type(e).__name__}: {e}); "
            "hint: --resume an older one"
        ) from e
    return Checkpoint(path, state)


def steps(ckpt_dir: Path) -> list[Path]:
    """Return the checkpoints of a directory, oldest first."""
    paths = [p for p in ckpt_dir.glob("step_*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(paths, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def newest(
    ckpt_dir: Path,
    check: Callable[[Checkpoint], None] | None = None,
    rename_bad: bool = False,
) -> Checkpoint | None:
    """Return the newest valid checkpoint for which check() raises no UserError; None without any.

    Damaged ones are reported and skipped; with rename_bad they are renamed, so that they are
    neither pruned nor overwritten. Raises UserError when there are checkpoints and none is valid: a
    run never starts again silently.
    """
    bad, error = [], None
    for path in reversed(steps(ckpt_dir)):
        try:
            checkpoint = read(path)
            if check:
                check(checkpoint)
        except UserError as e:
            say(f"checkpoint skipped | {e}")
            bad.append(path)
            error = e
            continue
        if rename_bad:
            now = time.strftime("%Y%m%d-%H%M%S")
            for other in bad:
                os.replace(other, other.with_name(f"passed_over_{other.name}_{now}"))
        return checkpoint
    if error is not None:
        raise UserError(
            f"no valid checkpoint in {ckpt_dir}; the oldest: {error}; "
            "or --run_name NEW starts again beside it"
        )
    return None


def find(where: str | Path) -> Checkpoint:
    """Return the checkpoint at a path, or the newest of a run or checkpoint directory.

    Raises UserError when there is none.
    """
    path = Path(where)
    if (path / "state.json").exists():
        return read(path)
    for ckpt_dir in (path / "ckpt", path):
        if steps(ckpt_dir):
            return newest(ckpt_dir)
    raise UserError(
        f"no checkpoint in {where}; "
        "hint: a run directory (log/NAME), or a step_NNNNNN directory in it"
    )


def load_weights(checkpoint: Checkpoint, model: torch.nn.Module):
    """Load a checkpoint's weights into a model. Raises UserError where the shapes differ."""
    try:
        model.load_state_dict(load_file(checkpoint.path / "model.safetensors"))
    except (RuntimeError, SafetensorError) as e:
        raise UserError(
            f"{checkpoint.path} does not fit this model: {one_line(e)}; "
            "hint: same model settings as in its state.json"
        ) from e


def restore(checkpoint: Checkpoint, model: torch.nn.Module, optimizer=None):
    """Restore weights and moments. Rank 0 reads and broadcasts them: no shared disk is needed.

    Raises UserError where the shapes differ.
    """
    parameters = dict(model.named_parameters())
    moments = {}  # as on the disk, on rank 0

    def read_tensors():
        load_weights(checkpoint, model)
        if optimizer:
            moments.update(load_file(checkpoint.path / "optimizer.safetensors"))
        return [(key, value.shape, value.dtype) for key, value in moments.items()]

    for key, shape, dtype in on_rank0(read_tensors):
        name, _, moment = key.rpartition(".")
        device = parameters[name].device
        if key in moments:
            value = moments[key].clone()  # the file is memory-mapped
        else:
            value = torch.empty(shape, dtype=dtype)
        if moment == "step" and device.type not in ("cpu", "cuda"):
            device = torch.device("cpu")  # where the unfused AdamW keeps it
        optimizer.state[parameters[name]][moment] = value.to(device)
    if dist.is_initialized():
        tensors = list(model.state_dict().values())
        if optimizer:
            for parameter in parameters.values():
                tensors += optimizer.state[parameter].values()
        for t in tensors:
            dist.broadcast(t, 0)
