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
import math
import os
import platform
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from runtime.command_line import UserError, one_line, say
from runtime.device import worker_thread
from runtime.files import (
    atomic,
    fsync,
    make_directory,
    read_json,
    regular_file,
    remedy,
    remove,
    sha256,
)
from runtime.lock import Lock
from runtime.runlog import RunLog
from runtime.world import on_rank0

FORMAT = 2

T = TypeVar("T")

# bytes at which each copy of a tensor begins, a cache line
ALIGNMENT = 64

# seconds after which a file that could not be read is tried again: network disks recover
READ_AGAIN = (0.5, 2.0)


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
            save_tensors(content, temporary / name)
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


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict | None = None):
    """Write a safetensors file with the usual permissions: save_file() would make it private."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    path.chmod(mode)


def checksum(state: dict) -> str:
    """Return the SHA-256 of the content of state.json without the checksum itself."""
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
        self.last_saved = ""  # name of the newest checkpoint
        self.remedy = ""  # hint for the last failed save
        self.not_finite = ""  # what was NaN or infinite in it
        self.thread = worker_thread("saver", self.device)
        self.writing = self.thread.submit(lambda: True)

    def due(self) -> bool:
        """Return whether --save_minutes have passed since the last save."""
        seconds = 60 * self.cfg.save_minutes
        return 0 < seconds < time.monotonic() - self.saved_at

    def reserve(self):
        """Allocate the memory for the copies, in the background."""
        self.writing = self.thread.submit(self.allocate)

    def allocate(self) -> bool:
        """Allocate the missing copies in one block, pinned for a GPU (in the thread)."""
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
            "time": time.time(),
            "gpt_config": dataclasses.asdict(self.model.config),
            "val_losses": {str(k): v for k, v in self.losses.items()},
        }
        self.step = step
        self.saved_at = time.monotonic()
        waited = time.perf_counter() - started
        self.writing = self.thread.submit(self.write, step, state, started, waited)

    def write(self, step: int, state: dict, started: float, waited: float) -> bool:
        """Write the copies and delete old checkpoints; False when that failed (in the thread).

        No error here may end training, so the handlers touch no disk.
        """
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for (file, name), t in self.copies.items():
            tensors.setdefault(file, {})[name] = t
        try:
            refuse_not_finite(tensors)
            path = write(self.ckpt_dir, step, tensors, state)
        except Exception as e:
            self.remedy = remedy(e, self.ckpt_dir)
            if isinstance(e, NotFinite):
                self.not_finite = str(e)
                self.remedy = "a lower --max_lr under a new --run_name, with --init_from that one"
            say(
                f"step {step} | NOT saved: {one_line(e)}; the last checkpoint is "
                f"{self.last_saved or 'none'}, the next save tries again; hint: {self.remedy}"
            )
            return False
        self.last_saved = path.name
        self.prune()
        took = time.perf_counter() - started
        self.log.write({"step": step, "save_ms": waited * 1e3, "write_ms": took * 1e3})
        say(f"step {step} | saved {path} | {took:.1f} s, of which training waited {waited:.2f} s")
        return True

    def set_aside(self, since: float):
        """Set aside the checkpoints since a time, as time.time(): they learned from wrong data."""
        self.wait()
        renamed = []
        try:
            for path in reversed(steps(self.ckpt_dir)):  # newest first
                if time_saved(path) >= since:
                    renamed.append(rename_aside(path, WRONG_DATA).name)
        except OSError as e:
            say(
                f"checkpoints | not set aside: {one_line(e)}; hint: delete those since the damage, "
                f"{len(renamed)} are renamed"
            )
            return
        what = f"set aside: {', '.join(renamed)}" if renamed else "older checkpoints are valid"
        say(f"checkpoints | steps that may have read a damaged shard are not saved; {what}")

    def prune(self):
        """Delete old checkpoints; what cannot be listed or deleted is left for the next time."""
        try:
            prune(self.ckpt_dir, self.step or 0, self.cfg.keep_last, self.best_step())
        except Exception as e:
            say(f"checkpoints | older ones not deleted: {one_line(e)}")

    def wait(self) -> bool:
        """Wait for the thread; return whether the last save succeeded."""
        return self.writing.result()

    def close(self) -> bool:
        """Wait for the last save; prune again, as the last evaluation may have been the best."""
        saved = self.wait()
        if saved:
            self.prune()
        self.thread.shutdown()
        self.copies = {}
        while self.pinned:
            unpin(self.pinned.pop())
        return saved

    def best_step(self) -> int | None:
        """Return the step with the lowest validation loss among those with a checkpoint.

        A loss that is NaN or infinite is never the best.
        """
        losses = {
            step: loss
            for step, loss in list(self.losses.items())
            if (step == self.step or (self.ckpt_dir / f"step_{step:06d}").exists())
            and loss is not None
            and math.isfinite(loss)
        }
        return min(losses, key=losses.get, default=None)


class NotFinite(ArithmeticError):
    """Weights or moments are NaN or infinite: nothing worth saving."""


def refuse_not_finite(tensors: dict[str, dict[str, torch.Tensor]]):
    """Raise NotFinite naming a tensor that holds NaN or infinity."""
    for content in tensors.values():
        for name, t in content.items():
            if not is_finite(t):
                raise NotFinite(f"{name} is NaN or infinite")


def is_finite(t: torch.Tensor) -> bool:
    """Return whether all values of a tensor in host memory are finite in float32."""
    t = t.float()
    # one pass without a copy, in numpy, because torch would start a second OpenMP thread pool;
    # NaN and infinity survive every sum
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(t.numpy().sum()):
            return True
    return bool(torch.isfinite(t).all())


def pin(block: torch.Tensor) -> bool:
    """Pin host memory, for copies from a GPU at full speed; return whether that worked.

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
    remove_hidden(ckpt_dir)
    written = [path for path in steps(ckpt_dir) if step_of(path) <= step]
    for path in written[:-keep_last]:
        if step_of(path) != best:
            # first rename it, which is atomic: nobody finds half a checkpoint
            os.replace(path, path.with_name(f".{path.name}.{os.getpid()}.tmp"))
    remove_hidden(ckpt_dir)


def remove_hidden(ckpt_dir: Path):
    """Delete half-written and half-deleted checkpoints; what cannot be deleted stays for later."""
    for leftover in ckpt_dir.glob(".step_*.tmp"):
        remove(leftover)


# --------------------------------------------------------------------------------------------------
# the directory


def open_directory(cfg, model: torch.nn.Module, start_step: int) -> Lock:
    """Lock a run's checkpoint directory for this process, and prepare it.

    It is made if need be, what killed processes left in it is deleted, and a small save is tried.
    Raises UserError when another process has it or has trained further since this one looked, when
    checkpoints cannot be written, and when there is no room for them.
    """
    ckpt_dir: Path = cfg.checkpoint_dir
    try:
        make_directory(ckpt_dir)
        lock = take_lock(ckpt_dir)
    except OSError as e:
        raise cannot_write(cfg, e) from e
    try:
        newer = [path.name for path in steps(ckpt_dir) if step_of(path) > start_step]
        if newer:
            raise UserError(
                f"another process has written {newer[-1]} to {ckpt_dir} since this one looked, "
                f"which is at step {start_step}; hint: the same command again"
            )
        need_space(ckpt_dir, model, cfg.keep_last)
        remove_hidden(ckpt_dir)
        try_saving(ckpt_dir)
    except BaseException as e:
        lock.close()
        if isinstance(e, OSError | SafetensorError):
            raise cannot_write(cfg, e) from e
        raise
    return lock


def take_lock(ckpt_dir: Path) -> Lock:
    """Lock a checkpoint directory. Raises UserError when another process has it."""
    try:
        lock = Lock(ckpt_dir)
    except BlockingIOError as e:
        raise UserError(
            f"another process is writing to {ckpt_dir} ({e.strerror}); "
            "hint: wait for it, or another --run_name and --ckpt_dir"
        ) from None
    if not lock.supported:
        say(f"checkpoints | {ckpt_dir} has no file locks: start no second run there from elsewhere")
    return lock


def cannot_write(cfg, e: BaseException) -> UserError:
    """Return the error for a run that cannot save checkpoints."""
    option = "--ckpt_dir" if cfg.ckpt_dir else "--log_dir"
    return UserError(
        f"cannot write to {cfg.checkpoint_dir}: {one_line(e)}; "
        f"hint: {option} chooses another place, or {remedy(e, cfg.checkpoint_dir)}"
    )


def try_saving(ckpt_dir: Path):
    """Write, read back and delete a small checkpoint. Raises the error that a save would raise."""
    trial = ckpt_dir / ".trial"
    remove(trial)
    try:
        read(write(trial, 0, {"model.safetensors": {"x": torch.zeros(1)}}, {}))
    finally:
        remove(trial)


def need_space(ckpt_dir: Path, model: torch.nn.Module, keep_last: int):
    """Raise UserError when the disk has no room for the checkpoints of a run, and one more."""
    size = 12 * model.num_params()  # float32 weights and AdamW's two moments
    missing = keep_last + 2 - len(steps(ckpt_dir))
    disk = shutil.disk_usage(ckpt_dir)
    if disk.total == 0:  # ramfs, some FUSE and cluster file systems count no blocks
        say(f"checkpoints | {ckpt_dir} does not say how much room it has")
        return
    if disk.free < missing * size:
        aside = [path.name for path in sorted(ckpt_dir.glob("passed_over_*"))]
        unused = f" (delete {', '.join(aside)}?)" if aside else ""
        raise UserError(
            f"{ckpt_dir} has {disk.free / 1e9:.2f} GB free, checkpoints need {missing} x "
            f"{size / 1e9:.2f} GB; hint: make room{unused}, a lower --keep_last, or another "
            "--ckpt_dir"
        )


# --------------------------------------------------------------------------------------------------
# reading


class Unreadable(UserError):
    """A file that exists and cannot be read: not damaged, so nothing is set aside for it."""


class Gone(UserError):
    """A checkpoint that training has deleted since it was found."""


def unreadable(path: Path, e: OSError) -> Unreadable:
    reason = e.strerror or one_line(e)
    return Unreadable(f"{path} cannot be read ({reason}); hint: {remedy(e, path)}")


# errors which mean that a file does not exist
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def read(path: Path) -> Checkpoint:
    """Read a checkpoint's state and check its files.

    Raises UserError naming what is damaged, and Unreadable for what cannot be read even when
    retried.
    """
    for seconds in (*READ_AGAIN, None):
        try:
            return read_once(path)
        except OSError as e:
            if seconds is None or isinstance(e, PermissionError):
                raise unreadable(Path(e.filename or path), e) from e
            # stderr, because a program may read stdout (generate.py --json)
            say(f"checkpoint | read again in {seconds} s: {one_line(e)}", sys.stderr)
        time.sleep(seconds)


def read_once(path: Path) -> Checkpoint:
    """Read and check a checkpoint once. Raises UserError, and OSError where a retry may help."""
    try:
        state = read_json(path / "state.json")
        if state["format"] != FORMAT:
            raise UserError(
                f"{path} has checkpoint format {state['format']!r:.40}, expected {FORMAT}; "
                "hint: use the version that wrote it"
            )
        if state["checksum"] != checksum(state):
            raise UserError(
                f"{path / 'state.json'} is damaged: its checksum is another; "
                "hint: --resume an older one"
            )
        if type(state["step"]) is not int or "model.safetensors" not in state["sha256"]:
            raise ValueError("state.json names no step, or no weights")
        if path.name.startswith("step_") and step_of(path) != state["step"]:
            raise UserError(
                f"{path} holds step {state['step']}; hint: give the directory its own name back"
            )
        for name, expected in state["sha256"].items():
            if name not in ("model.safetensors", "optimizer.safetensors"):
                raise ValueError(f"state.json names a file {name!r}")
            actual = sha256(regular_file(path / name))
            if actual != expected:
                raise UserError(
                    f"{path / name} is damaged: SHA-256 {actual[:12]}..., expected "
                    f"{expected!s:.12}...; hint: --resume an older checkpoint"
                )
    except (*ABSENT, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(
            f"{path} is not a whole checkpoint ({one_line(e)}); hint: --resume an older one"
        ) from e
    return Checkpoint(path, state)


def steps(ckpt_dir: Path) -> list[Path]:
    """Return the checkpoints of a directory, oldest first. Raises Unreadable."""
    try:
        with os.scandir(ckpt_dir) as entries:
            names = [e.name for e in entries if re.fullmatch("step_[0-9]+", e.name) and e.is_dir()]
    except ABSENT:
        return []
    except OSError as e:
        raise unreadable(ckpt_dir, e) from e
    return sorted((ckpt_dir / name for name in names), key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def newest(
    ckpt_dir: Path,
    check: Callable[[Checkpoint], None] | None = None,
    rename_bad: bool = False,
) -> Checkpoint | None:
    """Return the newest valid checkpoint for which check() raises no UserError; None without any.

    Invalid ones are reported and skipped; with rename_bad they are also set aside, so that they are
    neither pruned nor overwritten. One that training deletes meanwhile is ignored. Raises UserError
    when there are checkpoints and none is valid, or one cannot be read: a run never starts from
    scratch silently.
    """
    bad: dict[Path, str] = {}  # and why
    error = None  # of the previous one
    reported = None
    while paths := [path for path in steps(ckpt_dir) if path not in bad]:
        path, why = paths[-1], DAMAGED
        if error is not reported:  # the last one's is raised below instead
            say(f"checkpoint skipped | {error}", sys.stderr)
            reported = error
        try:
            checkpoint = read(path)
            why = FOREIGN
            if check:
                check(checkpoint)
        except Unreadable:
            raise
        except UserError as e:
            bad[path] = why
            if path.exists():
                error = e
            continue
        if rename_bad:
            set_aside_invalid(bad)
        return checkpoint
    if error is not None:
        raise UserError(
            f"no valid checkpoint in {ckpt_dir}; the oldest: {error}; "
            "or --run_name NEW starts again beside it"
        )
    return None


# why a checkpoint is set aside, in its new name: passed_over_step_000100_damaged_20260131-235959
DAMAGED, FOREIGN, WRONG_DATA = "damaged", "foreign", "wrong-data"


def rename_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint, so that it is neither resumed from, nor pruned, nor overwritten."""
    now = time.strftime("%Y%m%d-%H%M%S")
    aside = path.with_name(f"passed_over_{path.name}_{why}_{now}")
    os.replace(path, aside)
    fsync(aside.parent)
    return aside


def set_aside_invalid(bad: dict[Path, str]):
    """Set invalid checkpoints aside; keep only the newest damaged one. Raises UserError."""
    newest_damaged = None
    for path, why in bad.items():  # newest first
        try:
            aside = rename_aside(path, why)
        except FileNotFoundError:
            continue
        except OSError as e:
            raise UserError(
                f"{path} is {why} and cannot be renamed ({e.strerror}); "
                f"hint: {remedy(e, path.parent)}"
            ) from e
        if why == DAMAGED and newest_damaged is None:
            newest_damaged = aside
    if newest_damaged is None:
        return
    for older in newest_damaged.parent.glob(f"passed_over_step_*_{DAMAGED}_*"):
        if older != newest_damaged:
            say(f"checkpoints | deleted {older}, a newer damaged one is kept")
            remove(older)


def of_wrong_data(ckpt_dir: Path) -> list[Path]:
    """Return the checkpoints that were set aside because they had learned from a damaged shard."""
    return sorted(ckpt_dir.glob(f"passed_over_step_*_{WRONG_DATA}_*"))


def time_saved(path: Path) -> float:
    """Return when the state of a checkpoint was taken, as time.time()."""
    try:
        return float(read_json(path / "state.json")["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return path.stat().st_mtime  # a damaged one, or one of an older version


def find_and(where: str | Path, use: Callable[[Checkpoint], T]) -> T:
    """Return use(the newest checkpoint); try again when training deletes that one meanwhile."""
    while True:
        try:
            return use(find(where))
        except Gone:
            continue


def find(where: str | Path) -> Checkpoint:
    """Return the checkpoint at a path, or the newest of a run or checkpoint directory.

    Raises UserError when there is none.
    """
    path = Path(where)
    if os.path.exists(path / "state.json"):
        return read(path)
    for ckpt_dir in (path / "ckpt", path):
        if checkpoint := newest(ckpt_dir):
            return checkpoint
    raise UserError(
        f"no checkpoint in {where}; "
        "hint: a run directory (log/NAME), or a step_NNNNNN directory in it"
    )


class Header(NamedTuple):
    """Shape and type of a tensor, from the header of its file."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: F32, BF16, I64, ...

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def read_header(path: Path) -> dict[str, Header]:
    """Return shape and type of each tensor in a file by its name, without reading the tensors."""
    header = {}
    with safe_open(path, "pt") as f:
        for name in f.keys():  # noqa: SIM118  it is not a dictionary
            tensor = f.get_slice(name)
            header[name] = Header(tuple(tensor.get_shape()), tensor.get_dtype())
    return header


def weights_header(checkpoint: Checkpoint) -> dict[str, Header]:
    """Return the header of a checkpoint's weights. Raises UserError when there is none."""
    return stored_header(checkpoint.path / "model.safetensors")


def stored_header(path: Path) -> dict[str, Header]:
    """Return the header of a checkpoint's file. Raises UserError when there is none."""
    try:
        return read_header(path)
    except (OSError, RuntimeError, SafetensorError) as e:
        raise not_loaded(path, e) from e


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Load a file of tensors. Raises UserError when it cannot be, or holds NaN or infinity."""
    try:
        tensors = load_file(path)
    except (OSError, RuntimeError, SafetensorError) as e:
        raise not_loaded(path, e) from e
    for name, t in tensors.items():
        if not is_finite(t):
            raise UserError(f"{path}: {name} is NaN or infinite; hint: an older checkpoint")
    return tensors


def not_loaded(path: Path, e: Exception) -> UserError:
    """Return the UserError for a file of tensors that failed to load, by its cause."""
    try:
        with open(path, "rb"):
            pass
    except ABSENT:
        return Gone(f"{path} is gone; hint: the same command again finds a newer checkpoint")
    except OSError as not_opened:
        return unreadable(path, not_opened)
    return UserError(f"{path} is not a file of tensors ({one_line(e)}); hint: another checkpoint")


def load_weights(checkpoint: Checkpoint, model: torch.nn.Module):
    """Load a checkpoint's weights into a model. Raises UserError where the shapes differ."""
    try:
        model.load_state_dict(load_tensors(checkpoint.path / "model.safetensors"))
    except RuntimeError as e:
        raise UserError(
            f"{checkpoint.path} does not fit this model: {one_line(e)}; "
            "hint: same model settings as in its state.json"
        ) from e


def moments_header(names: dict[torch.nn.Parameter, str], optimizer) -> dict[str, Header]:
    """Return the header that an optimizer's moments must have: AdamW has three, Muon one."""
    header = {}
    for group in optimizer.param_groups:
        moments = ["step", "exp_avg", "exp_avg_sq"]
        if "momentum" in group:
            moments = ["momentum_buffer"]
        for parameter in group["params"]:
            for moment in moments:
                shape = () if moment == "step" else tuple(parameter.shape)
                header[f"{names[parameter]}.{moment}"] = Header(shape, "F32")
    return header


def load_moments(path: Path, expected: dict[str, Header]) -> dict[str, torch.Tensor]:
    """Load an optimizer's moments. Raises UserError unless they are exactly the expected ones.

    The fused kernels check neither shape nor type: they would read and write out of bounds.
    """
    header = stored_header(path)
    for key in expected | header:
        if header.get(key) != expected.get(key):
            raise UserError(
                f"{path} does not fit the optimizer: {key!r:.80} is "
                f"{header.get(key, 'missing')!s:.80}, expected {expected.get(key, 'no such one')}; "
                f"hint: --init_from {path.parent} under a new --run_name takes its weights alone"
            )
    return load_tensors(path)


def restore(checkpoint: Checkpoint, model: torch.nn.Module, optimizer=None):
    """Restore weights and moments. Rank 0 reads and broadcasts them: no shared disk is needed.

    Raises UserError where they are not this model's and this optimizer's.
    """
    parameters = dict(model.named_parameters())
    moments = {}  # as on the disk, on rank 0

    def read_tensors():
        if optimizer:
            names = {parameter: name for name, parameter in parameters.items()}
            expected = moments_header(names, optimizer)
            moments.update(load_moments(checkpoint.path / "optimizer.safetensors", expected))
        load_weights(checkpoint, model)
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
