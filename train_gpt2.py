"""Train GPT-2. This docstring is the launch manual; `--help` lists every setting, config.py explains them.

A small model on Tiny Shakespeare, on any machine, in a few minutes (no account, no data to fetch by hand):
    python train_gpt2.py
GPT-2 (124M) on FineWeb-Edu shards in data/fineweb-edu-10BT (prepare.py), on one GPU:
    python train_gpt2.py gpt2-rope
on the four H100 of the published runs, and the same without peer-to-peer copies (consumer GPUs, or when NCCL hangs):
    torchrun --standalone --nproc_per_node=4 train_gpt2.py gpt2-rope
    NCCL_P2P_DISABLE=1 torchrun --standalone --nproc_per_node=4 train_gpt2.py gpt2-rope
on two machines of eight (run on both, node_rank 0 and 1):
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=29500 \\
        train_gpt2.py gpt2-rope --B 32
on CPUs, two processes, a few steps:
    torchrun --standalone --nproc_per_node=2 train_gpt2.py gpt2-rope --device cpu --B 2 --T 512 --total_batch 2048 \\
        --max_steps 5 --val_tokens 8192 --hellaswag_limit 0
with restarts after a crash (the variable makes them reliable; torchrun itself reads it):
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc_per_node=4 --max-restarts=100 \\
        train_gpt2.py gpt2-rope
Continue an interrupted run: the same command again. Start anew beside it: --run_name NAME. Fine-tune: --init_from gpt2.
Evaluate a checkpoint: --eval_only True --init_from log/gpt2-rope. See what would run: --dry_run True.
Exit status: 0 done; 2 a mistake in what was given; 75 stopped by a signal (SIGTERM, SIGINT, SIGUSR1, SIGHUP) with a
checkpoint; anything else a fault.

Everything a run writes is in log/RUN_NAME/: config.json, env.json, metrics.jsonl, samples.txt, curves.png, ckpt/, and, as
its last act, finished.json.
"""

import sys

from config import (
    UserError,
    command_line,
    fit_warmup,
    from_command_line,
    one_line,
    preset,
    problems,
)

if (
    __name__ == "__main__"
):  # before torch is imported (2 s): --help and mistyped options are answered at once
    command_line(lambda: from_command_line(sys.argv[1:]))

import dataclasses
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import checkpoint
import generate
import hellaswag
import optim
import runlog
import shards
from distributed import (
    INTERRUPTED,
    Stop,
    Stopped,
    World,
    all_sum,
    autocast_dtype,
    compile_error,
    free_memory,
    from_first,
    out_of_memory,
    same_bits,
    setup,
)
from kernels import speed_up
from model import GPT, GPTConfig
from tokenizer import N_VOCAB, token_bytes

# --------------------------------------------------------------------------------------------------------------------
# data


def open_data(cfg, world: World, say):
    """Windows of the training and validation split, and cfg with max_steps set from epochs. Raises UserError."""
    if cfg.preset == "shakespeare" and cfg.data_root == preset("shakespeare").data_root:

        def prepare_once():
            if not os.path.exists(os.path.join(cfg.data_root, "manifest.json")):
                import prepare

                prepare.shakespeare(cfg.data_root)

        from_first(prepare_once)
    files = {split: shards.open_shards(cfg.data_root, split, cfg.T) for split in ("train", "val")}
    train = shards.Windows(files["train"], cfg.T, cfg.data_order, cfg.data_seed, cfg.vocab_size)
    val = shards.Windows(files["val"], cfg.T, vocab_size=cfg.vocab_size)
    if cfg.epochs is not None:
        whole, part = int(cfg.epochs), cfg.epochs % 1
        windows = sum(train.per_epoch(e) for e in range(whole)) + part * train.per_epoch(whole)
        notes = []
        steps = max(1, int(windows) * cfg.T // cfg.total_batch)
        cfg = fit_warmup(dataclasses.replace(cfg, max_steps=steps), preset(cfg.preset), notes)
        for note in [f"{cfg.epochs:g} epochs are {steps} steps"] + notes:
            say(f"config | {note}")
    step_windows, per_epoch = cfg.total_batch // cfg.T, train.per_epoch()
    say(
        f"data | {cfg.data_root} | train {train.sizes.sum():,} tokens, shards: {len(train.shards)}, {per_epoch:,} windows"
        f" | {cfg.max_steps * step_windows / per_epoch:.2f} epochs, {cfg.data_order} order, "
        f"{train.left_out(0).sum():,} tokens left out of the first | "
        f"val {min(cfg.val_tokens, val.per_epoch() * cfg.T):,} of {val.sizes.sum():,} tokens"
    )
    mine = int(shards.fingerprints(train.shards)[-1], 16) % 2**32
    if all_sum(torch.tensor(mine)).item() != mine * world.world_size:
        raise UserError(
            f"the processes see different shards in {cfg.data_root}; hint: the same files on all machines, "
            "and no download going on while a run starts"
        )
    return train, val, cfg


# --------------------------------------------------------------------------------------------------------------------
# model


def build_model(cfg, say) -> GPT:
    """The raw model on the CPU: from --init_from, or fresh from --seed. Every process builds the same one."""
    if cfg.init_from:
        if (
            (Path(cfg.init_from) / "config.json").exists()
            and not (Path(cfg.init_from) / "metrics.jsonl").exists()
            or not Path(cfg.init_from).exists()
        ):
            import hf

            model = hf.from_pretrained(cfg.init_from)
        else:
            model = checkpoint.load_model(checkpoint.find(cfg.init_from))
        say(f"model | weights and shape from {cfg.init_from}")
    else:
        torch.manual_seed(cfg.seed)
        model = GPT(
            GPTConfig(
                cfg.block_size,
                cfg.vocab_size,
                cfg.n_layer,
                cfg.n_head,
                cfg.n_embd,
                cfg.use_rope,
                cfg.use_swiglu,
                cfg.arch,
            )
        )
    if cfg.optimizer == "muon" and not model.config.modern:
        raise UserError(
            f"optimizer muon needs arch modern, {cfg.init_from} has arch {model.config.arch}; "
            "hint: --optimizer adamw --max_lr 6e-4"
        )
    if model.config.block_size < cfg.T:
        raise UserError(
            f"T {cfg.T} exceeds the model's block_size {model.config.block_size}; "
            f"hint: --T {model.config.block_size}"
        )
    return model


def fit_batch(cfg, model: GPT, train_model, world: World, autocast, held: int, say) -> int:
    """The largest micro-batch that divides the batch and whose passes fit beside `held` more bytes; found by trying.

    All processes try together, from an estimate downwards. Raises UserError when one sequence does not fit.
    """
    c, sequences, free = (
        model.config,
        cfg.total_batch // (cfg.T * world.world_size),
        free_memory(world.device),
    )
    on_gpu = world.device.type == "cuda"
    most = min(
        sequences, max(1, (131072 if on_gpu else 8192) // cfg.T)
    )  # tokens beyond which speed gains nothing
    # bytes of a token in bf16: 34 C a layer (Korthikanti et al. 2022, without T x T attention), logits and gradients 8 V
    # or, where they are recomputed, 2 C a layer and one layer's 34 C
    layers = 2 * c.n_layer + 34 if cfg.recompute else 34 * c.n_layer
    token = (layers * c.n_embd + 8 * c.vocab_size) * (
        1 if autocast_dtype(world.device, cfg.dtype) == torch.bfloat16 else 2
    )
    # a GPU that is asked for too much says so; on a CPU the kernel kills, and a heap that keeps what is freed grows: by
    # 0.85 GB in three steps that have 0.41 GB in use at a time
    room = (1.5 if on_gpu else 0.4) * free - held

    def fits(B: int) -> bool:
        if B > 1 and B * cfg.T * token > room:
            return False
        try:
            reserve, tokens = (
                torch.empty(held, dtype=torch.uint8, device=world.device),
                torch.zeros(B, cfg.T, dtype=torch.int64, device=world.device),
            )
            with autocast():
                train_model(tokens, tokens.clone()).backward()
            del reserve
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
            return False
        finally:
            model.zero_grad(set_to_none=True)
        return True

    for B in (b for b in range(most, 0, -1) if sequences % b == 0):
        if all_sum(torch.tensor(float(fits(B)))).item() == world.world_size:
            say(
                f"batch | B = {B} is the largest that divides the batch and fits into {free / 1e9:.1f} GB"
            )
            return B
        torch._dynamo.reset()
        if on_gpu:
            torch.cuda.empty_cache()
    raise UserError(
        f"not even one sequence of T = {cfg.T} fits into {free / 1e9:.1f} GB; hint: --recompute True, or --T "
        f"{cfg.T // 2}"
    )


# --------------------------------------------------------------------------------------------------------------------
# evaluation


class Evaluator:
    """All that is measured between steps: validation loss, HellaSwag, samples. Identical on any number of processes."""

    def __init__(
        self,
        cfg,
        model,
        eval_model,
        val: shards.Windows,
        world: World,
        autocast,
        compiled,
        stop: Stop,
        say,
    ):
        self.cfg, self.model, self.eval_model, self.val = cfg, model, eval_model, val
        self.world, self.autocast, self.stop, self.say = world, autocast, stop, say
        self.hella = hellaswag.for_training(
            cfg.hellaswag_limit, model, world, autocast, compiled, say
        )
        self.token_bytes = token_bytes()

    @torch.no_grad()
    def __call__(self, step: int) -> dict:
        """One record: val/loss (nats per token), val/bpb (bits per byte), val/hella_norm and its standard error."""
        t0, cfg = time.perf_counter(), self.cfg
        total = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
        try:
            for x, y in shards.val_batches(self.val, cfg.val_tokens, cfg.B, *self.world):
                self.stop.poll()
                with self.autocast():
                    nats = self.eval_model(x, y, "sum")
                y = y[y >= 0].cpu().numpy()
                total += torch.tensor([nats.item(), len(y), self.token_bytes[y[y < N_VOCAB]].sum()])
        except UserError as e:  # a shard that went bad
            self.stop.ask(e)
            self.stop.poll()
        nats, tokens, n_bytes = all_sum(total).tolist()
        record = {
            "step": step,
            "val/loss": nats / tokens,
            "val/bpb": nats / math.log(2) / n_bytes if n_bytes else None,
        }
        line = f"step {step} | val loss {nats / tokens:.4f} | bits per byte {record['val/bpb'] or float('nan'):.4f}"
        if self.hella:
            result = self.hella(self.stop.poll)
            record |= {"val/hella_norm": result["acc_norm"], "val/hella_se": result["se"]}
            line += (
                f" | HellaSwag acc_norm {result['acc_norm']:.4f} +- {result['se']:.4f} "
                f"({result['items']} items, {result['protocol']} protocol)"
            )
        record["eval_ms"] = (time.perf_counter() - t0) * 1e3
        self.say(f"{line} | {record['eval_ms'] / 1e3:.1f} s")
        return record

    def samples(self, step: int, path: Path):
        """Texts of the first process, a function of (seed, step); appended to samples.txt."""
        cfg = self.cfg
        if (
            not cfg.n_samples
            or not cfg.sample_tokens
            or self.model.config.vocab_size < N_VOCAB
            or self.world.rank != 0
        ):
            return
        with self.autocast():
            texts = generate.sample_texts(
                self.model,
                cfg.sample_prompt,
                cfg.n_samples,
                cfg.sample_tokens,
                seed=cfg.seed * 1_000_003 + step,
                stopped=lambda: bool(self.stop.reason),
            )
        if self.stop.reason:  # cut short: drawn again when the run goes on
            return
        for i, text in enumerate(texts):
            self.say(
                f"step {step} | sample {i} | "
                + (text if "\n" not in text else f"\n{text.strip()}\n")
            )
        try:
            with open(path, "a", encoding="utf-8") as f:
                f.write(
                    "".join(
                        f"=== step {step}, sample {i}\n{text}\n" for i, text in enumerate(texts)
                    )
                )
        except OSError as e:
            self.say(f"step {step} | samples.txt not written: {one_line(e)}")


# --------------------------------------------------------------------------------------------------------------------
# the run


def main():
    cfg, notes = from_command_line(sys.argv[1:])
    world = setup(cfg.device, cfg.group_timeout, cfg.deterministic)
    stop = Stop(world, cfg.group_timeout)
    say = runlog.say if world.rank == 0 else (lambda message: None)
    try:
        status = run(cfg, notes, world, stop, say)
    except Stopped:
        if stop.error:
            raise stop.error
        say(
            f"interrupted by {stop.reason} before the first step, nothing was lost; to go on: the same command again"
        )
        status = INTERRUPTED
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        raise UserError(
            f"out of memory with --B {cfg.B} --T {cfg.T} ({one_line(e)}); hint: a smaller --B or --B auto, then "
            "--recompute True"
        ) from None
    finally:
        stop.close()
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        # not by way of the interpreter's end: there a thread of gloo's that still lets go of a tensor aborts the process
        # ("terminate called without an active exception", SIGABRT: 2 of 84 processes of DDP and all_reduce alone)
        os._exit(status)
    if status:
        sys.exit(status)


def run(cfg, notes: list[str], world: World, stop: Stop, say) -> int:
    """The whole run, from settings to the last checkpoint; its exit status. Raises UserError, and Stopped early on."""
    # config: everything that can be wrong is found here, before anything slow starts
    for note in notes:
        say(f"config | {note}")
    if "RANK" in os.environ and world.device.type == "cuda" and cfg.preset == "shakespeare":
        raise UserError(
            "torchrun on GPUs needs a preset, the default is a toy; hint: torchrun ... train_gpt2.py gpt2-rope"
        )
    own_store = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1"
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not own_store:
        say(
            "torchrun | a restart may fail without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in front (pytorch#135712)"
        )
    wrong = problems(cfg, world.world_size)
    try:
        if cfg.T > 0 and cfg.total_batch > 0:
            train, val, cfg = open_data(cfg, world, say)
    except UserError as e:
        wrong.append(str(e))
    if wrong := wrong or problems(
        cfg, world.world_size
    ):  # again: epochs may have changed max_steps
        raise UserError("\n       ".join(wrong))
    run_dir = Path(cfg.log_dir) / cfg.run_name
    ckpt_dir = Path(cfg.ckpt_dir) if cfg.ckpt_dir else run_dir / "ckpt"
    found = None  # the checkpoint to go on from and its state, the same for all processes
    if not (cfg.eval_only and cfg.init_from):
        found = from_first(lambda: checkpoint.open_run(cfg, run_dir, ckpt_dir, say))
    if (
        found and cfg.epochs is not None
    ):  # its length is that of the data it began with, whatever was downloaded since
        begun = found[1]["config"]
        cfg = dataclasses.replace(
            cfg, max_steps=begun["max_steps"], warmup_steps=begun["warmup_steps"]
        )
    trains = not (cfg.eval_only or cfg.dry_run)
    if (
        trains
        and found
        and found[1]["step"] == cfg.max_steps
        and checkpoint.finished(run_dir, cfg.max_steps)
    ):
        say(
            f"already finished: {run_dir} has {cfg.max_steps} of {cfg.max_steps} steps; hint: --run_name "
            f"{cfg.run_name}-2 starts anew, python generate.py --model {run_dir} samples from it"
        )
        return 0

    # model
    model = checkpoint.empty_model(*found) if found else build_model(cfg, say)
    model.to(world.device)
    dtype = autocast_dtype(world.device, cfg.dtype)
    autocast = lambda: torch.autocast(
        world.device.type, dtype=dtype, enabled=dtype != torch.float32
    )
    torch.set_float32_matmul_precision(
        "high"
    )  # TF32 for the few float32 matmuls on a GPU; no effect on the CPU
    say(
        f"model | {model.num_params():,} parameters | {model.flops_per_token(cfg.T) / 1e6:.1f} MFLOP a token | "
        f"{world.world_size} x {world.device.type}, {str(dtype).removeprefix('torch.')}"
    )
    if cfg.dry_run:
        say(json.dumps(dataclasses.asdict(cfg), indent=1))
        return 0
    model.recompute = cfg.recompute
    params, optimizer = list(model.parameters()), optim.build(cfg, model, dtype)
    if found:
        checkpoint.restore(found[0], model, None if cfg.eval_only else optimizer)
    stop.poll()
    if compiled := cfg.use_compile:
        if why := compile_error(world.device):
            say(
                f"compile | off, it does not work here ({why}); hint: install g++ and the Python headers"
            )
        compiled = not why
    if (
        compiled and world.device.type == "cpu"
    ):  # costs no time there, and without it two threads add up the embedding's
        same_bits()  # gradient in the order in which they come by
        speed_up(model, dtype)
    train_model = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    eval_model = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    if cfg.B == "auto":
        held = sum(4 * p.numel() for p in params) * (
            2 * (not found) + dist.is_initialized()
        )  # AdamW's averages, DDP's sums
        cfg = dataclasses.replace(
            cfg, B=fit_batch(cfg, model, train_model, world, autocast, held, say)
        )
    micro_steps = cfg.total_batch // (cfg.B * cfg.T * world.world_size)
    say(
        f"batch | {cfg.total_batch:,} tokens a step = micro-steps: {micro_steps} x rows: {cfg.B} x tokens: {cfg.T} x "
        f"processes: {world.world_size}"
    )
    evaluate = Evaluator(cfg, model, eval_model, val, world, autocast, compiled, stop, say)
    if cfg.eval_only:
        evaluate(found[1]["step"] if found else 0)
        return 0
    if (
        averages := dist.is_initialized() and not cfg.deterministic
    ):  # --deterministic adds gradients up by itself
        train_model = DDP(
            train_model, device_ids=[world.device.index] if world.device.type == "cuda" else None
        )

    # resume, records
    start_step, wandb_id, wandb, saver = 0, None, None, None
    if found:
        start_step, wandb_id = found[1]["step"], found[1]["wandb_id"]
        if (begun := shards.as_begun(train, found[1]["data"])) is None and not cfg.accept_new_data:
            raise UserError(
                f"{cfg.data_root} is not the data this run began with (fingerprint "
                f"{shards.fingerprints(train.shards)[-1]}, was {found[1]['data']}); hint: restore it, or "
                "--accept_new_data True goes on with it"
            )
        say(
            f"resume | step {start_step} from {found[0]}"
            + ("" if begun else ", with other data than it began with")
        )
        train = begun or train

    log = runlog.RunLog()

    def make_room():
        try:
            for directory in (ckpt_dir, run_dir):
                directory.mkdir(parents=True, exist_ok=True)
            checkpoint.need_space(ckpt_dir, model, cfg.keep_last)
            log.open(run_dir, start_step)
            (run_dir / "finished.json").unlink(missing_ok=True)
            checkpoint.write_json(run_dir / "config.json", dataclasses.asdict(cfg))
            checkpoint.write_json(
                run_dir / "env.json", runlog.environment(world.device, world.world_size)
            )
        except OSError as e:
            raise UserError(
                f"cannot write to {run_dir}: {e.strerror}; hint: --log_dir and --ckpt_dir choose another place"
            )

    from_first(make_room)
    if world.rank == 0:
        log.wandb = wandb = runlog.Wandb(cfg, wandb_id, run_dir)
        saver = checkpoint.Saver(
            ckpt_dir, cfg.keep_last, cfg.save_minutes, model, optimizer, log, say
        )
        saver.losses = {int(k): v for k, v in found[1]["val_losses"].items()} if found else {}
    data = shards.fingerprints(train.shards)[-1]
    state = lambda: dict(config=dataclasses.asdict(cfg), data=data, wandb_id=wandb.id)
    bigram = runlog.bigram_loss(train, val, cfg.val_tokens) if world.rank == 0 else None
    if bigram is not None:
        say(f"bigram | val loss {bigram:.4f} is what counting pairs of tokens gets on this split")
        log.write({"step": start_step, "val/bigram": bigram}) if start_step == 0 else None

    # warm-up: one pass on made-up tokens compiles the kernels, so that the first step's time is a step's time
    t0 = time.perf_counter()
    tokens = torch.zeros(cfg.B, cfg.T, dtype=torch.int64, device=world.device)
    with autocast():
        train_model(
            tokens, tokens.clone()
        ).backward()  # a clone: "idx is targets" would be compiled for
    optimizer.zero_grad(set_to_none=True)
    say(f"warm-up | {time.perf_counter() - t0:.1f} s{', compiled' if compiled else ''}")
    stop.poll()
    loader = shards.Loader(
        train,
        cfg.total_batch,
        cfg.B,
        world.rank,
        world.world_size,
        world.device,
        start_step,
        cfg.batch_hashes,
    )
    meter = runlog.Meter(cfg, model.flops_per_token(cfg.T), world, log, say)

    # loop: `step` counts the updates done
    stop.armed, save_due, interrupted = True, False, False
    try:
        for step in range(start_step, cfg.max_steps + 1):
            last_step = step == cfg.max_steps
            saves = (last_step or step % cfg.save_interval == 0 or save_due) and step > start_step
            evaluates = last_step or step % cfg.eval_interval == 0
            samples = last_step or (step > 0 and step % cfg.sample_interval == 0)

            # everything needed to resume exactly; before evaluating, so that a crash there costs nothing
            if saves and saver:
                saver.save(step, state())
            if evaluates:
                record = evaluate(step)
                log.write(record)
                if saver and (saves or step == start_step > 0):
                    saver.losses[step] = record["val/loss"]
            if samples:
                evaluate.samples(step, run_dir / "samples.txt")
                stop.poll()
            if last_step:
                break
            if saves or evaluates or samples:
                meter.restart()

            # one optimiser step: the only part on the clock
            lr = getattr(optim, cfg.schedule)(
                step, cfg.max_lr, cfg.min_lr, cfg.warmup_steps, cfg.max_steps
            )
            optim.set_rates(optimizer, lr, step, cfg.max_steps)
            loss_sum, sums, digest, save_due = torch.zeros((), device=world.device), None, 0, False
            for micro_step in range(micro_steps):
                try:
                    batch, seconds = loader.next()
                    meter.waited, digest = meter.waited + seconds, digest + batch.digest
                except UserError as e:  # a shard that went bad
                    stop.ask(e)
                save_due |= stop.poll(saver is not None and saver.due())
                if averages:  # set before the forward pass, which is when DDP reads it
                    train_model.require_backward_grad_sync = micro_step == micro_steps - 1
                with autocast():
                    loss = train_model(batch.x, batch.y) / (
                        micro_steps if averages else micro_steps * world.world_size
                    )
                loss.backward()
                loss_sum += loss.detach()
                if cfg.deterministic:
                    sums = optim.add_in_order(params, loss, sums)
            if cfg.deterministic:
                *grads, loss_sum = sums
                for p, grad in zip(params, grads):
                    p.grad = grad
            else:
                loss_sum = all_sum(loss_sum) / world.world_size
            norm = torch.nn.utils.get_total_norm([p.grad for p in params])
            if cfg.grad_norm_clip:
                torch.nn.utils.clip_grads_with_norm_(params, cfg.grad_norm_clip, norm)
            healthy = torch.isfinite(loss_sum) & torch.isfinite(norm)  # the same in all processes
            optim.step_if(healthy, optimizer)
            optimizer.zero_grad(set_to_none=True)
            meter.add(step + 1, lr, loss_sum, norm, healthy, digest)

            # diagnostics only from here on
            done = step + 1
            if done == start_step + 1 and saver:
                saver.reserve()
            if (
                save_due
                or done == cfg.max_steps
                or not all(
                    done % n
                    for n in (
                        cfg.log_interval,
                        cfg.save_interval,
                        cfg.eval_interval,
                        cfg.sample_interval,
                    )
                )
            ):
                meter.flush()
                if meter.in_a_row >= cfg.max_skipped:
                    stop.ask(
                        UserError(
                            f"{meter.in_a_row} steps in a row skipped up to step {done}, their loss or "
                            "gradient is no number; hint: a lower --max_lr under a new --run_name, with "
                            f"--init_from {ckpt_dir}"
                        )
                    )
    except Stopped:
        interrupted = True
        meter.flush()
        if saver and step > start_step:
            saver.save(step, state())

    # clean-up
    stop.closed.set()  # the watchdog's: what follows has no polls
    loader.close()
    saved = saver.close() if saver else True
    all_sum(
        torch.zeros(1)
    )  # nobody leaves before the checkpoint is written: torchrun gives those that stay 30 s
    log.close()
    if saver and saved and not interrupted:
        checkpoint.mark_finished(run_dir, cfg.max_steps, record["val/loss"], say)
    if interrupted and stop.error:
        raise stop.error
    if interrupted:
        say(
            f"interrupted by {stop.reason or 'another process'} at step {step}{'' if saved else ' (NOT saved)'}; to go on: "
            "the same command again"
        )
        return INTERRUPTED
    if not saved:
        raise UserError(
            f"the last checkpoint could not be written to {ckpt_dir}; hint: make room, then the same "
            "command again"
        )
    say(
        f"finished | val loss {record['val/loss']:.4f}{f', bigram model {bigram:.4f}' if bigram else ''} | "
        f"curves and checkpoint in {run_dir}"
    )
    return 0


if __name__ == "__main__":
    command_line(main)
