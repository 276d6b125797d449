"""The run directory: what a run leaves there, and which checkpoint it resumes from.

Rank 0 writes. The other ranks call the same methods, which then only take part in collective sums.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from functools import partial
from pathlib import Path

import torch

import compare
import evaluate
import hf
import shard_files
import shards
from config import FREE_ON_RESUME, TrainConfig, as_stored, differences
from model import GPT
from runtime import checkpoint
from runtime.checkpoint import Checkpoint
from runtime.command_line import UserError, one_line, say
from runtime.device import attention_backend, autocast_dtype
from runtime.files import make_directory, read_json, remedy, write_json
from runtime.meter import Meter, duration
from runtime.runlog import (
    WANDB_END_SECONDS,
    RunLog,
    Wandb,
    add_part,
    environment,
    read_metrics,
)
from runtime.stop import Diverged, Stop
from runtime.world import World, min_over_ranks, on_rank0
from shard_files import DamagedShard


class Records:
    """Everything that a run writes: console lines, metrics.jsonl, curves, W&B and checkpoints."""

    def __init__(
        self,
        cfg: TrainConfig,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        loader: shards.Loader,
        resume_from: Checkpoint | None,
        world: World,
        stop: Stop,
    ):
        self.cfg = cfg
        self.model = model
        self.loader = loader
        self.world = world
        self.stop = stop
        self.start_step = resume_from.step if resume_from else 0
        self.fingerprint = shard_files.fingerprints(loader.windows.shards)[-1]
        self.val_loss: float | None = None  # of the last evaluation
        self.bigram: float | None = None  # loss of the bigram model
        state = resume_from.state if resume_from else {}
        self.unwritten_lines = state.get("unwritten", [])  # of metrics.jsonl, on rank 0
        skipped = state.get("skipped_in_a_row", 0)
        self.log = RunLog()
        self.lock = None  # of the checkpoint directory, on rank 0
        self.saver = None
        try:
            on_rank0(self.open)
            if world.rank == 0:
                self.log.wandb = Wandb(cfg, state.get("wandb_id"), cfg.run_dir)
                self.saver = checkpoint.Saver(cfg, model, optimizer, self.log)
        except BaseException:  # a signal, too: no lock must outlive this call
            self.close_log_and_unlock()
            raise
        if self.saver and resume_from:
            losses = resume_from.state["val_losses"]
            self.saver.losses = {int(step): loss for step, loss in losses.items()}
            self.saver.last_saved = resume_from.path.name
        self.meter = Meter(cfg, model.flops_per_token(cfg.T), world, self.log, skipped)

    def open(self):
        """Make the directories, write config.json and env.json, open the log (rank 0).

        Raises UserError for what cannot be written, and when the disk is too small for the
        checkpoints.
        """
        cfg = self.cfg
        machine = self.machine()
        self.lock = checkpoint.open_directory(cfg, self.model, self.start_step)
        try:
            make_directory(cfg.run_dir)
            self.log.open(cfg.run_dir, self.start_step, self.unwritten_lines)
            for marker in ("finished.json", "diverged.json"):
                (cfg.run_dir / marker).unlink(missing_ok=True)
            write_json(cfg.run_dir / "config.json", dataclasses.asdict(cfg))
            self.write_environment(machine)
        except OSError as e:
            raise UserError(
                f"cannot write to {cfg.run_dir}: {e.strerror or one_line(e)}; "
                f"hint: --log_dir chooses another place, or {remedy(e, cfg.run_dir)}"
            ) from e

    def close_log_and_unlock(self, wandb_seconds: float = WANDB_END_SECONDS):
        """Close the log and unlock the checkpoint directory; a second call does nothing."""
        self.log.close()
        self.log.close_wandb(wandb_seconds)
        if self.lock:
            self.lock.close()

    def write_environment(self, machine: dict):
        """Write env.json, which also keeps the machines of the run's earlier parts."""
        path = self.cfg.run_dir / "env.json"
        try:
            earlier = json.loads(path.read_text()) if self.start_step else None
        except (OSError, ValueError):
            earlier = None
        content, changes = add_part(earlier, machine, self.start_step)
        write_json(path, content)
        if changes:
            say(
                "resume | hardware or software changed, losses may differ in the last digits: "
                f"{changes}"
            )

    def machine(self) -> dict:
        """Return hardware, software and settings of this run, for env.json."""
        device = self.world.device
        dtype = autocast_dtype(device, self.cfg.dtype)
        head_width = self.model.config.n_embd // self.model.config.n_head
        return environment(device, self.world.world_size) | {
            "dtype": str(dtype).removeprefix("torch."),
            "compiled": self.cfg.use_compile,
            "attention": attention_backend(device, dtype, head_width),
            "B": self.cfg.B,
            "config": as_stored(self.cfg),
        }

    def state(self) -> dict:
        """Return what a run stores in state.json; the checkpoint adds the rest."""
        state = {
            "config": dataclasses.asdict(self.cfg),
            "data": self.fingerprint,
            "wandb_id": self.log.wandb.id,
        }
        lines = self.log.pending()
        skipped = self.meter.skipped_in_a_row
        if lines:  # of metrics.jsonl: stored here, they survive the end of this process
            state["unwritten"] = lines
        if skipped:
            state["skipped_in_a_row"] = skipped
        return state

    def save_due(self) -> bool:
        """Return whether --save_minutes have passed since the last checkpoint."""
        return self.saver is not None and self.saver.due()

    def save(self, step: int):
        """Save a checkpoint in the background.

        Saves nothing when training data were wrong or the run has diverged: a restart then resumes
        from the last good checkpoint, and cannot finish a run whose weights are NaN.
        """
        started = time.perf_counter()
        if self.saver and not all_finite(self.model):
            self.stop.stop_with(self.diverged_error(f"weights are NaN or infinite at step {step}"))
        diverged = isinstance(self.stop.error, Diverged)
        if self.wrong_since() == math.inf and self.saver and not diverged:
            self.saver.save(step, self.state())  # waits for the previous save, which looks closer
            if self.saver.not_finite:
                self.stop.stop_with(self.diverged_error(f"{self.saver.not_finite} before {step}"))
        self.meter.paused("save", self.cfg.save_interval, time.perf_counter() - started)

    def save_on_stop(self, step: int):
        """Save an interrupted run; after damaged data set checkpoints aside instead.

        A shard may have been damaged for a while: all checkpoints since then are set aside.
        """
        self.meter.flush()
        since = self.wrong_since()
        if since == math.inf:
            if step > self.start_step:
                self.save(step)
        elif self.saver:
            self.saver.set_aside(since)

    def wrong_since(self) -> float:
        """Return since when training data may be wrong on any rank, as time.time(); inf for never.

        Checks once more each shard that was read, so that no checkpoint contains what was learned
        from a changed file. A change found here counts from now: saved checkpoints stay valid.
        """
        windows = self.loader.windows
        errors = [self.stop.error]
        for shard in list(windows.checked_at):
            try:
                windows.check_file(shard)
            except UserError as e:
                errors.append(e)
                self.stop.stop_with(e)
            self.stop.last_poll = time.monotonic()  # a touched shard is read whole
        paths = [shard.path for shard in windows.shards]
        since = math.inf
        for e in errors:
            if isinstance(e, DamagedShard) and e.path in paths:
                since = min(since, e.since, time.time())
        return min_over_ranks(since)

    def log_evaluation(self, record: dict, has_checkpoint: bool):
        """Log an evaluation; with a checkpoint of the same step it may become the best one."""
        self.log.write(record)
        self.val_loss = record["val/loss"]
        finite = math.isfinite(self.val_loss)
        if not finite:
            step = record["step"]
            self.stop.stop_with(
                self.diverged_error(f"the validation loss is {self.val_loss} at step {step}")
            )
        if self.saver:
            if has_checkpoint and finite:
                self.saver.losses[record["step"]] = self.val_loss
            self.draw_curves()
        self.meter.paused("evaluation", self.cfg.eval_interval, record["eval_ms"] / 1e3)

    def note_sampling_time(self, seconds: float):
        """Note how long it took to draw samples."""
        self.meter.paused("samples", self.cfg.sample_interval, seconds)

    def log_step(
        self,
        step: int,
        lr: float,
        loss: torch.Tensor,
        norm: torch.Tensor,
        finite: torch.Tensor,
        save_due: bool,
    ):
        """Record an update; the device is read only when a line is due or training pauses."""
        cfg = self.cfg
        waited, digest = self.loader.totals()
        self.meter.add(step, lr, torch.stack([loss, norm, finite.float()]), waited, digest)
        if step == self.start_step + 1 and self.saver:
            self.saver.reserve()
        pauses = cfg.save_interval, cfg.eval_interval, cfg.sample_interval
        if save_due or step == cfg.max_steps or any(step % n == 0 for n in pauses):
            self.meter.flush()
        skipped = self.meter.most_skipped  # since the last look good steps may have followed
        if skipped >= cfg.max_skipped:
            self.stop.stop_with(
                self.diverged_error(
                    f"{skipped} steps in a row skipped by step {self.meter.last_read}, their "
                    "loss or gradient is NaN or infinite"
                )
            )

    def diverged_error(self, what: str) -> Diverged:
        """Return the error that ends a run which more steps cannot fix."""
        on_gpu = ""
        if self.world.device.type == "cuda":
            on_gpu = "; or, first, TORCH_CUDNN_SDPA_DEPRIORITIZED=1 (notes/running.md)"
        start = ""
        if checkpoint.steps(self.cfg.checkpoint_dir):
            start = f", with --init_from {self.cfg.checkpoint_dir}"
        return Diverged(f"{what}; hint: a lower --max_lr under a new --run_name{start}{on_gpu}")

    def measure_bigram(self, val_data: shards.Windows):
        """Log the validation loss of a bigram model, a loss to beat; small data only."""
        if self.world.rank != 0:
            return
        try:
            self.bigram = evaluate.bigram_loss(self.loader.windows, val_data, self.cfg.val_tokens)
        except Exception as e:  # out of memory, for example: training does not need it
            say(f"bigram | not measured: {one_line(e)}")
        if self.bigram is None:
            return
        say(f"bigram | a bigram model gets val loss {self.bigram:.4f} on this split")
        if self.start_step == 0:
            self.log.write({"step": 0, "val/bigram": self.bigram})

    def restart_clock(self):
        self.meter.restart()

    def draw_curves(self):
        """Draw curves.png; an error is reported in one line and does not stop the run."""
        try:
            compare.curves(self.cfg.run_dir)
        except Exception as e:
            say(f"curves | {compare.not_drawn(e)}")

    def close_checkpoints(self) -> bool:
        """Wait for the last checkpoint; return whether it was written.

        Moments in it that are NaN or infinite end the run as diverged.
        """
        if self.saver is None:
            return True
        saved = self.saver.close()
        if self.saver.not_finite:
            error = self.diverged_error(f"{self.saver.not_finite} in the last checkpoint")
            self.stop.stop_with(error)
        return saved

    def not_saved_error(self) -> UserError:
        """Return the error that ends a run whose last checkpoint could not be written."""
        return UserError(
            f"the last checkpoint could not be written to {self.cfg.checkpoint_dir}; "
            f"hint: {self.saver.remedy}, then the same command again"
        )

    def say_finished(self, seconds: float):
        """Print the result, where it is, and the next commands."""
        cfg = self.cfg
        bigram = f" (bigram model {self.bigram:.4f})" if self.bigram else ""
        say(
            f"finished in {duration(seconds)} | val loss {self.val_loss:.4f}{bigram} | "
            f"{cfg.max_steps * cfg.total_batch:,} tokens"
        )
        say(f"  curves   {cfg.run_dir / 'curves.png'}")
        if os.path.exists(cfg.run_dir / "samples.txt"):
            say(f"  samples  {cfg.run_dir / 'samples.txt'}")
        prompt, next_command = cfg.sample_prompt, f"hellaswag.py --model {cfg.run_dir}"
        if cfg.preset == "shakespeare":
            prompt, next_command = "ROMEO:", "train_gpt2.py --max_steps 1000 --run_name longer"
        say(f'  next     python generate.py --model {cfg.run_dir} --prompt "{prompt}"')
        say(f"           python {next_command}")

    def close(self, finished: bool, saved: bool):
        """Close the log, write how the run ended, draw the curves.

        Raises UserError for a finished run whose last checkpoint, lines or marker were not written.
        """
        self.log.close()
        error = self.log.error
        if self.saver:
            if finished and saved and not error:
                content = {"step": self.cfg.max_steps, "val_loss": self.val_loss}
                error = write_marker(self.cfg, "finished.json", content)
            elif isinstance(self.stop.error, Diverged):
                content = {"error": str(self.stop.error)}
                failure = write_marker(self.cfg, "diverged.json", content)
                if failure:
                    hint = remedy(failure, self.cfg.run_dir)
                    say(f"diverged.json not written: {one_line(failure)}; hint: {hint}")
            self.draw_curves()
        self.close_log_and_unlock()
        if finished and not saved:
            raise self.not_saved_error()
        if finished and error:
            raise UserError(
                "training is done, but not all of its records could be written to "
                f"{self.cfg.run_dir} ({one_line(error)}); "
                f"hint: {remedy(error, self.cfg.run_dir)}, then the same command writes them"
            )

    def close_after_error(self):
        """Close files and locks after an error, so that this process can resume the run.

        A notebook keeps the error, and with it everything that the run had open.
        """
        try:
            self.close_checkpoints()
        finally:
            self.close_log_and_unlock(wandb_seconds=0)


def all_finite(model: torch.nn.Module) -> bool:
    """Return whether all weights are finite, with one read from the device."""
    return bool(torch.stack([p.isfinite().all() for p in model.parameters()]).all())


def log_of(cfg: TrainConfig, world: World) -> list[dict]:
    """Return the records of metrics.jsonl on rank 0, [] on the others and without such a file."""
    try:
        return read_metrics(cfg.run_dir) if world.rank == 0 else []
    except OSError:
        return []


# --------------------------------------------------------------------------------------------------
# where a run resumes, and whether it is finished


def resume_point(cfg: TrainConfig) -> tuple[TrainConfig, Checkpoint | None]:
    """Return cfg, with the length of the run that it resumes, and the checkpoint, on all ranks."""
    if cfg.eval_only and cfg.init_from:
        return cfg, None
    resume_from = on_rank0(lambda: find_checkpoint(cfg))
    if resume_from and cfg.epochs is not None:
        # keep the length computed when the run began, even if shards were added since
        stored = resume_from.state["config"]
        length = {"max_steps": stored["max_steps"], "warmup_steps": stored["warmup_steps"]}
        cfg = dataclasses.replace(cfg, **length)
    if resume_from and cfg.init_from:  # even if its source is gone
        cfg = dataclasses.replace(cfg, **resume_from.state["gpt_config"])
    return cfg, resume_from


def find_checkpoint(cfg: TrainConfig) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None for a fresh start (rank 0).

    It never touches another run's files. Raises UserError for settings that would mix two runs, and
    when checkpoints that were written are gone.
    """
    started_before = refuse_to_mix(cfg)
    if not (cfg.eval_only or cfg.dry_run):
        refuse_to_diverge_again(cfg)
    newest = None
    if cfg.resume != "never":
        newest = newest_checkpoint(cfg)
    if cfg.resume not in ("auto", "never"):
        return named_checkpoint(cfg, newest)
    if cfg.eval_only and newest is None:
        raise UserError(
            f"no checkpoint in {cfg.checkpoint_dir} to evaluate; hint: --run_name of a run, or "
            "--init_from gpt2"
        )
    if newest is None and checkpoint.of_wrong_data(cfg.checkpoint_dir):
        say(
            f"resume | all checkpoints in {cfg.checkpoint_dir} had learned from a damaged shard "
            "and are set aside: from step 0"
        )
    elif newest is None:
        if b'"save_ms"' in (read_bytes(cfg.run_dir / "metrics.jsonl") or b""):
            raise UserError(
                f"{cfg.run_dir} has saved checkpoints, but {cfg.checkpoint_dir} has none; "
                f"hint: --ckpt_dir if they are elsewhere, --run_name {cfg.run_name}-2 to start "
                "again beside it"
            )
        if started_before:
            say(f"resume | {cfg.run_dir} ended before its first checkpoint: from step 0")
    return newest


def newest_checkpoint(cfg: TrainConfig) -> Checkpoint | None:
    """Return the newest valid checkpoint of a run, and set newer invalid ones aside (rank 0).

    Only a process that is to train sets them aside, and only while it has the directory's lock.
    """
    find_newest = partial(
        checkpoint.newest, cfg.checkpoint_dir, check=lambda c: refuse_other_run(cfg, c)
    )
    if cfg.eval_only or cfg.dry_run or not checkpoint.steps(cfg.checkpoint_dir):
        return find_newest()
    try:
        lock = checkpoint.take_lock(cfg.checkpoint_dir)
    except OSError:  # a read-only directory: the run is finished, or Records.open() reports it
        return find_newest()
    try:
        return find_newest(rename_bad=True)
    finally:
        lock.close()


def read_bytes(path: Path) -> bytes | None:
    """Return a file's content, None without a file. Raises UserError when it cannot be read."""
    try:
        return path.read_bytes()
    except checkpoint.ABSENT:
        return None
    except OSError as e:
        raise checkpoint.unreadable(path, e) from e


def refuse_to_mix(cfg: TrainConfig) -> bool:
    """Raise UserError when the run directory or --ckpt_dir belong to another run.

    Returns whether this run has been started before.
    """
    path = cfg.run_dir / "config.json"
    stored = None
    content = read_bytes(path)
    if content is not None:
        try:
            stored = json.loads(content)
        except (ValueError, RecursionError):
            pass
        if not isinstance(stored, dict):
            stored = None
            say(f"{path} is damaged, the checkpoints' own settings decide")
    if stored and cfg.resume == "never":
        raise UserError(
            f"{cfg.run_dir} holds a run already, --resume never would mix with it; "
            f"hint: --run_name {cfg.run_name}-2"
        )
    changed = differences(cfg, stored) if stored else ""
    if changed:
        raise UserError(
            f"{cfg.run_dir} holds a run with other settings: {changed}; "
            f"hint: --run_name {cfg.run_name}-2 starts a new one beside it. "
            f"It may be resumed with another {', '.join(sorted(FREE_ON_RESUME - {'given'}))}"
        )
    others = checkpoint.steps(cfg.checkpoint_dir)
    if cfg.ckpt_dir and cfg.resume in ("auto", "never") and others and content is None:
        raise UserError(
            f"{cfg.checkpoint_dir} holds checkpoints, but {cfg.run_dir} no run: another one's? "
            f"hint: another --ckpt_dir, or --resume {others[-1]}"
        )
    return bool(stored)


def refuse_to_diverge_again(cfg: TrainConfig):
    """Raise UserError when torchrun itself (--max-restarts) restarts a run that has diverged.

    The same command given by the user again trains, as something may have been fixed: it removes
    the marker, so that torchrun's own restarts of that launch find none.
    """
    marker = cfg.run_dir / "diverged.json"
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0":
        with contextlib.suppress(OSError):
            marker.unlink()
    elif marker.exists():
        raise UserError(
            f"{cfg.run_dir} has diverged, restart {restarts} by torchrun would end the same; "
            f"hint: {marker} says how"
        )


def refuse_other_run(cfg: TrainConfig, saved: Checkpoint):
    """Raise UserError for a checkpoint of another run, or one that is not of a run at all."""
    if "config" not in saved.state:  # hf.py import
        raise UserError(
            f"{saved.path} holds weights from {saved.state.get('source')}, not a run to resume; "
            f"hint: --init_from {saved.path} under a new --run_name"
        )
    kinds = {"config": dict, "gpt_config": dict, "data": str, "val_losses": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(saved.state.get(key), kind)]
    losses = saved.state.get("val_losses")
    if not wrong and not all(s.isdecimal() and type(v) in (int, float) for s, v in losses.items()):
        wrong = ["val_losses"]
    if wrong or not isinstance(saved.state.get("wandb_id", 0), str | None):
        raise UserError(
            f"{saved.path / 'state.json'} has no usable {', '.join(wrong or ['wandb_id'])}; "
            f"hint: --init_from {saved.path} takes its weights alone"
        )
    hf.check_shape(saved)
    changed = differences(cfg, saved.state["config"])
    if changed:
        raise UserError(
            f"{saved.path} is of a run with other settings: {changed}; "
            "hint: another --run_name for these"
        )


def named_checkpoint(cfg: TrainConfig, newest: Checkpoint | None) -> Checkpoint:
    """Return the checkpoint of --resume PATH, or this run's newest when that one is ahead of it.

    Raises UserError for an older one of this run: what came after it would be overwritten.
    """
    began_there = newest and newest.state["config"].get("resume") == cfg.resume
    if began_there and not os.path.exists(cfg.resume):
        say(f"resume | {cfg.resume} is gone, this run has a checkpoint of its own")
        return newest
    named = checkpoint.find(cfg.resume)
    refuse_other_run(cfg, named)
    if newest is None:
        return named
    same_folder = named.path.resolve().parent == cfg.checkpoint_dir.resolve()
    if same_folder and named.path.name != newest.path.name:
        raise UserError(
            f"{named.path} is not the newest checkpoint of this run, {newest.path.name} is, and "
            f"what came between would be overwritten; hint: --run_name {cfg.run_name}-2 resumes "
            "from there beside it"
        )
    return newest if newest.step > named.step else named


def data_to_resume(
    cfg: TrainConfig, train_data: shards.Windows, resume_from: Checkpoint
) -> shards.Windows:
    """Return the data that the run began with, without shards added since.

    Raises UserError when the data are others, unless --accept_new_data.
    """
    began_with = resume_from.state["data"]
    same_data = data_of_run(train_data, began_with)
    if same_data is None and not cfg.accept_new_data:
        raise UserError(
            f"{cfg.data_root} is not the data this run began with (fingerprint "
            f"{shard_files.fingerprints(train_data.shards)[-1]}, was {began_with}); hint: restore "
            f"it, --run_name {cfg.run_name}-2 starts a new run with this one, or "
            "--accept_new_data True continues regardless"
        )
    note = "" if same_data else ", with other data than it began with"
    say(f"resume | step {resume_from.step} from {resume_from.path}{note}")
    return same_data or train_data


def data_of_run(windows: shards.Windows, fingerprint: str) -> shards.Windows | None:
    """Return the windows of the run with this fingerprint, without shards added since.

    None when the data differ.
    """
    known = shard_files.fingerprints(windows.shards)
    if fingerprint not in known:
        return None
    first = windows.shards[: known.index(fingerprint) + 1]
    return shards.Windows(first, windows.T, windows.data_order, windows.seed, windows.vocab_size)


def write_marker(cfg: TrainConfig, name: str, content: dict) -> OSError | None:
    """Write a file that says how a run ended: scripts cannot tell from torchrun's exit status.

    A disk that fails once is tried again. Returns why the file could not be written.
    """
    error = None
    for _ in range(2):
        try:
            write_json(cfg.run_dir / name, content)
            return None
        except OSError as e:
            error = e
    return error


def finished_loss(cfg: TrainConfig) -> float | None:
    """Return the final validation loss of a finished run; None when it is not finished.

    finished.json is written last, after the last checkpoint and evaluation.
    """
    try:
        finished = read_json(cfg.run_dir / "finished.json")
        return finished["val_loss"] if finished["step"] == cfg.max_steps else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
