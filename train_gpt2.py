"""Train GPT-2. `--help` lists every setting, config.py explains them, runs/ has whole recipes.

A small model on Shakespeare, on any machine, in a few minutes (no account, no download):
    python train_gpt2.py
GPT-2 (124M) on FineWeb-Edu shards in data/fineweb-edu-10BT (prepare.py), on one GPU or on four:
    python train_gpt2.py gpt2-rope
    torchrun --standalone --nproc_per_node=4 train_gpt2.py gpt2-rope
from Python or a notebook:
    result = train_gpt2.train(config.preset("shakespeare", max_steps=50, run_name="short"))
To resume an interrupted run, give the same command again; --run_name NAME starts a second run.
Fine-tune: --init_from gpt2. Evaluate a checkpoint: --eval_only True --init_from log/gpt2-rope.
See what would run: --dry_run True. When NCCL hangs: NCCL_DEBUG=INFO in front.

Exit status: 0 done; 1 a hang was ended, or a bug; 2 settings, data, memory or disk to correct;
3 diverged to NaN; 75 stopped by a signal (SIGTERM, SIGINT, SIGUSR1, SIGHUP), with a checkpoint.

Everything that a run writes is in log/RUN_NAME/ (notes/running.md); finished.json marks success.
"""

import sys

from config import TrainConfig, complete, from_command_line
from runtime.command_line import UserError, one_line, run_script, say

if __name__ == "__main__":  # before torch is imported (2 s): --help and typos are answered at once
    run_script(lambda: from_command_line(sys.argv[1:]))

import dataclasses
import os
import signal
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import hf
import optim
import records
import shards
from evaluate import Evaluator
from kernels.compute import start_computing
from model import GPT, GPTConfig
from preflight import Data, check, print_plan, with_shape
from runtime import checkpoint
from runtime.checkpoint import Checkpoint
from runtime.device import (
    Compute,
    autocast_dtype,
    not_deterministic,
    torch_settings_restored,
)
from runtime.memory import fit_batch, out_of_memory
from runtime.stop import INTERRUPTED, Stop, Stopped
from runtime.world import World, join_world, on_rank0


class Run(NamedTuple):
    """What the loop works with: set_up() builds it, train_loop() uses it, finish() closes it."""

    cfg: TrainConfig
    world: World
    stop: Stop
    compute: Compute
    model: GPT  # raw: what is saved and sampled
    train_model: torch.nn.Module  # compiled, and in DDP when there are several processes
    optimizer: torch.optim.Optimizer
    loader: shards.Loader
    gradients: optim.Gradients
    evaluate: Evaluator
    records: records.Records
    start_step: int
    micro_steps: int
    started: float  # time.perf_counter() before the set-up


class Result(NamedTuple):
    """What train() returns."""

    model: GPT  # raw, on the device
    val_loss: float | None  # of the last evaluation, nats per token
    records: list[dict]  # of metrics.jsonl, or of --eval_only; [] on ranks above 0
    step: int  # updates done
    finished: bool  # False: stopped by a signal, with a checkpoint


# --------------------------------------------------------------------------------------------------
# the loop


def train_loop(run: Run) -> tuple[int, bool]:
    """Train from start_step to max_steps.

    Returns the number of updates done, and False if asked to stop before the end.
    """
    cfg, optimizer = run.cfg, run.optimizer
    save_due = False  # whether --save_minutes have passed
    run.stop.armed = True  # from here on a signal is answered with a checkpoint
    try:
        for step in range(run.start_step, cfg.max_steps + 1):
            last_step = step == cfg.max_steps
            saves = last_step or save_due or step % cfg.save_interval == 0
            saves = saves and step > run.start_step

            # once in a while: save before evaluating, so that a crash there costs nothing
            if saves:
                run.records.save(step)
            if last_step or step % cfg.eval_interval == 0:
                has_checkpoint = saves or step == run.start_step > 0
                run.records.log_evaluation(run.evaluate(step), has_checkpoint)
            if last_step or (step > 0 and step % cfg.sample_interval == 0):
                run.records.note_sampling_time(run.evaluate.samples(step))
                run.stop.poll()
            if last_step:
                return step, True

            # one optimizer step: the only part on the clock
            lr = optim.learning_rate(cfg, step)
            optim.set_rates(optimizer, lr, step, cfg.max_steps)
            save_due = False
            for micro_step in range(run.micro_steps):
                batch = run.loader.take()  # None after a read error: poll() then raises Stopped
                save_due |= run.stop.poll(run.records.save_due())
                run.gradients.sync(last=micro_step == run.micro_steps - 1)
                with run.compute.autocast():
                    loss = run.train_model(batch.x, batch.y)
                run.gradients.add(loss)
            loss, norm = run.gradients.finish(cfg.grad_norm_clip)
            finite = torch.isfinite(loss) & torch.isfinite(norm)  # the same in all processes
            optim.step_if_finite(finite, optimizer)
            optimizer.zero_grad(set_to_none=True)

            # diagnostics only from here on
            run.records.log_step(step + 1, lr, loss, norm, finite, save_due)
    except Stopped:
        run.records.save_on_stop(step)
        return step, False


# --------------------------------------------------------------------------------------------------
# a run: the stages, in the order in which they happen


def train(cfg: TrainConfig) -> Result:
    """Train as the command does, from Python; also in a notebook or a thread.

    An interrupt (in the main thread) saves a checkpoint and returns; the same call resumes.
    Restores torch's global settings and the signal handlers. Raises UserError for what the command
    would report.
    """
    with torch_settings_restored():
        world = join_world(cfg.device, cfg.group_timeout, cfg.deterministic)
        stop = Stop(world, cfg.group_timeout, second_interrupt=signal.default_int_handler)
        return launch(complete(cfg), world, stop)


def launch(cfg: TrainConfig, world: World, stop: Stop) -> Result:
    """Call run_stages() and turn its errors into messages for users.

    Raises UserError, and Stopped before the first step.
    """
    try:
        return run_stages(cfg, world, stop)
    except (Stopped, Exception) as e:
        # an interrupted import may replace Stopped by an error of its own
        if isinstance(e, Stopped) or (stop.reason and not stop.armed):
            if stop.error:
                raise stop.error from None
            say(
                f"interrupted by {stop.reason} before the first step, nothing was lost; {TO_RESUME}"
            )
            raise Stopped from None
        if not_deterministic(e):
            raise UserError(
                f"--deterministic True cannot be kept here: {one_line(e)}; "
                "hint: --deterministic False"
            ) from None
        if isinstance(e, UserError) or not out_of_memory(e):
            raise
        smaller = "--B auto or a smaller --B"
        if cfg.B == "auto":
            smaller = "a number for --B, smaller than what auto chose"
        raise UserError(
            f"out of memory with --B {cfg.B} --T {cfg.T} ({one_line(e)}); "
            f"hint: {smaller}, then --recompute True"
        ) from None
    finally:
        stop.close()


TO_RESUME = "to resume: the same command again"


def run_stages(cfg: TrainConfig, world: World, stop: Stop) -> Result:
    """Check, resume or begin, train, finish; --dry_run and --eval_only end before training."""
    cfg, data = check(with_shape(cfg), world)
    cfg, resume_from = records.resume_point(cfg)
    trains = not (cfg.eval_only or cfg.dry_run)
    if trains and resume_from:
        data = data._replace(train=records.data_to_resume(cfg, data.train, resume_from))
        # rank 0 looks: others need not have the run directory
        val_loss = on_rank0(lambda: records.finished_loss(cfg))
        if val_loss is not None and resume_from.step == cfg.max_steps:
            return already_finished(cfg, resume_from, val_loss, world)
    model = build_model(cfg, resume_from, world)
    if cfg.dry_run:
        print_plan(cfg, model, world)
        return Result(model, None, [], 0, True)
    if cfg.eval_only:
        return evaluate_only(cfg, model, resume_from, data.val, world, stop)
    run = set_up(cfg, model, resume_from, data, world, stop)
    try:
        run.records.measure_bigram(data.val)
        first_pass(run)
        step, finished = train_loop(run)
        return finish(run, step, finished)
    except BaseException:
        run.loader.close()
        run.records.close_after_error()
        raise


def already_finished(
    cfg: TrainConfig, resume_from: Checkpoint, val_loss: float, world: World
) -> Result:
    """Return the result of a run that has finished before."""
    say(
        f"already finished: {cfg.run_dir} has {cfg.max_steps} of {cfg.max_steps} steps; "
        f"hint: --run_name {cfg.run_name}-2 starts a new run, "
        f"python generate.py --model {cfg.run_dir} samples from it"
    )
    model = hf.empty_model(resume_from).to(world.device)
    checkpoint.restore(resume_from, model)
    log = records.log_of(cfg, world)
    return Result(model, val_loss, log, cfg.max_steps, True)


def build_model(cfg: TrainConfig, resume_from: Checkpoint | None, world: World) -> GPT:
    """Build the raw model on its device: of a checkpoint's shape, from --init_from or --seed."""
    if resume_from:
        model = hf.empty_model(resume_from)
    elif cfg.init_from:
        model = hf.load(cfg.init_from)
        say(f"model | weights and shape from {cfg.init_from}")
    else:
        shape = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(GPTConfig)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            model = GPT(GPTConfig(**shape))
    model.recompute = cfg.recompute
    dtype = str(autocast_dtype(world.device, cfg.dtype)).removeprefix("torch.")
    say(
        f"model | {model.num_params():,} parameters | {model.flops_per_token(cfg.T) / 1e6:.1f} "
        f"MFLOP per token | {world.world_size} x {world.device.type}, {dtype}"
    )
    return model.to(world.device)


def evaluate_only(
    cfg: TrainConfig,
    model: GPT,
    resume_from: Checkpoint | None,
    val_data: shards.Windows,
    world: World,
    stop: Stop,
) -> Result:
    """Evaluate a model once (--eval_only)."""
    if resume_from:
        checkpoint.restore(resume_from, model)
    compute = start_computing(cfg, model, world.device)
    if cfg.B == "auto":
        with stop.allow_compiling():
            B = fit_batch(cfg, model, model, compute, 0, world)
        cfg = dataclasses.replace(cfg, B=B)
    step = resume_from.step if resume_from else 0
    record = Evaluator(cfg, model, val_data, compute, world, stop)(step)
    log = [record] if world.rank == 0 else []
    return Result(model, record["val/loss"], log, step, True)


def set_up(
    cfg: TrainConfig,
    model: GPT,
    resume_from: Checkpoint | None,
    data: Data,
    world: World,
    stop: Stop,
) -> Run:
    """Build everything between a model and the first step."""
    started = time.perf_counter()
    optimizer = optim.build(cfg, model, autocast_dtype(world.device, cfg.dtype))
    if resume_from:
        checkpoint.restore(resume_from, model, optimizer)
    stop.poll()
    compute = start_computing(cfg, model, world.device)
    train_model = compute.compile(model)
    ddp = None
    if dist.is_initialized() and not cfg.deterministic:  # otherwise add_in_order() exchanges
        ddp = DDP(train_model, [world.device] if world.device.type == "cuda" else None)
        train_model = ddp
    cfg = dataclasses.replace(cfg, use_compile=compute.compiled)
    if cfg.B == "auto":
        # to be allocated later: AdamW's moments, unless restored, and DDP's buckets
        copies = (0 if resume_from else 2) + dist.is_initialized()
        reserved = copies * sum(4 * p.numel() for p in model.parameters())
        # train_model: DDP cuts the compiled graph, so it needs another amount of memory
        with stop.allow_compiling():
            B = fit_batch(cfg, model, train_model, compute, reserved, world)
        cfg = dataclasses.replace(cfg, B=B)
    micro_steps = count_micro_steps(cfg, world)
    evaluate = Evaluator(cfg, model, data.val, compute, world, stop)
    start_step = resume_from.step if resume_from else 0
    loader = shards.Loader(
        data.train, cfg.total_batch, cfg.B, world, start_step, cfg.batch_hashes, stop.stop_with
    )
    try:
        run_records = records.Records(cfg, model, optimizer, loader, resume_from, world, stop)
    except BaseException:
        loader.close()
        raise
    return Run(
        cfg=cfg,
        world=world,
        stop=stop,
        compute=compute,
        model=model,
        train_model=train_model,
        optimizer=optimizer,
        loader=loader,
        gradients=optim.Gradients(model, ddp, micro_steps, cfg.deterministic),
        evaluate=evaluate,
        records=run_records,
        start_step=start_step,
        micro_steps=micro_steps,
        started=started,
    )


def count_micro_steps(cfg: TrainConfig, world: World) -> int:
    """Return the micro-steps per optimizer step."""
    micro_steps = cfg.total_batch // (cfg.B * cfg.T * world.world_size)
    say(
        f"batch | {cfg.total_batch:,} tokens per step = micro-steps: {micro_steps} x rows: {cfg.B} "
        f"x tokens: {cfg.T} x processes: {world.world_size}"
    )
    return micro_steps


def first_pass(run: Run):
    """Run one forward and backward pass on dummy tokens: no step's time includes compiling."""
    name = "first pass"
    if run.compute.compiled:
        name = "compile"
        say("compile | once: about 20 s on a CPU, a minute or two on a GPU")
    started = time.perf_counter()
    with run.stop.allow_compiling():
        run.compute.try_pass(run.train_model, run.cfg.B, run.cfg.T)
    run.optimizer.zero_grad(set_to_none=True)
    say(f"{name} | {time.perf_counter() - started:.1f} s")
    run.stop.poll()
    run.records.restart_clock()


def finish(run: Run, step: int, finished: bool) -> Result:
    """Wait for the last checkpoint, close everything. Raises UserError for what is not written."""
    run.stop.stop_watching()  # nothing below calls poll()
    run.loader.close()
    saved = run.records.close_checkpoints()
    # all wait until rank 0 has written: when one exits, torchrun kills the others
    run.stop.share_error()
    on_rank0(lambda: run.records.close(finished and not run.stop.error, saved))
    cfg = run.cfg
    if run.stop.error:
        raise run.stop.error
    if finished:
        run.records.say_finished(time.perf_counter() - run.started)
    else:
        reason = run.stop.reason or "another process"
        say(f"interrupted by {reason} at step {step}{'' if saved else ' (NOT saved)'}; {TO_RESUME}")
    log = records.log_of(cfg, run.world)
    return Result(run.model, run.records.val_loss, log, step, finished)


# --------------------------------------------------------------------------------------------------
# the command


def main():
    cfg, notes = from_command_line(sys.argv[1:])
    for note in notes:
        say(f"config | {note}")
    world = join_world(cfg.device, cfg.group_timeout, cfg.deterministic)
    try:
        result = launch(cfg, world, Stop(world, cfg.group_timeout))
        status = 0 if result.finished else INTERRUPTED
    except Stopped:
        status = INTERRUPTED
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        # skip Python's shutdown: a gloo thread that still frees a tensor aborts the process there
        # (seen in 2 of 84)
        os._exit(status)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    run_script(main)
