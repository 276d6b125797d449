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
        train_gpt2.py gpt2-rope
on CPUs, two processes, a few steps:
    torchrun --standalone --nproc_per_node=2 train_gpt2.py gpt2-rope --device cpu --B 2 --T 512 --total_batch 2048 \\
        --max_steps 5
Continue an interrupted run: the same command again. Start anew beside it: --run_name NAME. Fine-tune: --init_from gpt2.
Evaluate a checkpoint: --eval_only True --init_from log/gpt2-rope. See what would run: --dry_run True.

Everything a run writes is in log/RUN_NAME/: config.json, env.json, metrics.jsonl, samples.txt, curves.png, ckpt/.
"""

import sys

from config import UserError, command_line, fit_warmup, from_command_line, preset, problems

if __name__ == "__main__":  # before torch is imported (2 s): --help and mistyped options are answered at once
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
from distributed import World, all_sum, autocast_dtype, barrier, compile_error, setup
from model import GPT, GPTConfig
from tokenizer import N_VOCAB, token_bytes


# --------------------------------------------------------------------------------------------------------------------
# data


def open_data(cfg, world: World, say):
    """Windows of the training and validation split, and cfg with max_steps set from epochs. Raises UserError."""
    if cfg.preset == "shakespeare" and cfg.data_root == preset("shakespeare").data_root:
        if world.rank == 0 and not os.path.exists(os.path.join(cfg.data_root, "manifest.json")):
            import prepare
            prepare.shakespeare(cfg.data_root)
        barrier()
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
    say(f"data | {cfg.data_root} | train {train.sizes.sum():,} tokens, shards: {len(train.shards)}, {per_epoch:,} windows"
        f" | {cfg.max_steps * step_windows / per_epoch:.2f} epochs, {cfg.data_order} order, "
        f"{train.left_out(0).sum():,} tokens left out of the first | "
        f"val {min(cfg.val_tokens, val.per_epoch() * cfg.T):,} of {val.sizes.sum():,} tokens")
    mine = int(shards.fingerprint(train), 16) % 2**32
    if all_sum(torch.tensor(mine)).item() != mine * world.world_size:
        raise UserError(f"the processes see different shards in {cfg.data_root}; hint: the same files on all machines, "
                        "and no download going on while a run starts")
    return train, val, cfg


# --------------------------------------------------------------------------------------------------------------------
# model


def build_model(cfg, say) -> GPT:
    """The raw model on the CPU: from --init_from, or fresh from --seed. Every process builds the same one."""
    if cfg.init_from:
        if (Path(cfg.init_from) / "config.json").exists() and not (Path(cfg.init_from) / "metrics.jsonl").exists() \
                or not Path(cfg.init_from).exists():
            import hf
            model = hf.from_pretrained(cfg.init_from)
        else:
            model = checkpoint.load_model(checkpoint.find(cfg.init_from))
        say(f"model | weights and shape from {cfg.init_from}")
    else:
        torch.manual_seed(cfg.seed)
        model = GPT(GPTConfig(cfg.block_size, cfg.vocab_size, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.use_rope,
                              cfg.use_swiglu))
    if cfg.T > model.config.block_size:
        raise UserError(f"T {cfg.T} exceeds the model's block_size {model.config.block_size}; "
                        f"hint: --T {model.config.block_size}")
    return model


# --------------------------------------------------------------------------------------------------------------------
# evaluation


class Evaluator:
    """All that is measured between steps: validation loss, HellaSwag, samples. Identical on any number of processes."""

    def __init__(self, cfg, model, eval_model, val: shards.Windows, world: World, autocast, say):
        self.cfg, self.model, self.eval_model, self.val = cfg, model, eval_model, val
        self.world, self.autocast, self.say = world, autocast, say
        self.hella = hellaswag.load(hellaswag.DATA, cfg.hellaswag_limit, say) if cfg.hellaswag_limit else None
        self.token_bytes = token_bytes()

    @torch.no_grad()
    def __call__(self, step: int) -> dict:
        """One record: val/loss (nats per token), val/bpb (bits per byte), val/hella_norm and its standard error."""
        t0, cfg, device = time.perf_counter(), self.cfg, self.world.device
        total = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
        for x, y in shards.val_batches(self.val, cfg.val_tokens, cfg.B, self.world.rank, self.world.world_size, device):
            with self.autocast():
                nats = self.eval_model(x, y, "sum")
            y = y[y >= 0].cpu().numpy()
            total += torch.tensor([nats.item(), len(y), self.token_bytes[y[y < N_VOCAB]].sum()])
        nats, tokens, n_bytes = all_sum(total).tolist()
        record = {"step": step, "val/loss": nats / tokens, "val/bpb": nats / math.log(2) / n_bytes if n_bytes else None}
        line = f"step {step} | val loss {nats / tokens:.4f} | bits per byte {record['val/bpb'] or float('nan'):.4f}"
        if self.hella:
            result = hellaswag.evaluate(self.model, self.hella, self.world, self.autocast)
            record |= {"val/hella_norm": result["acc_norm"], "val/hella_se": result["se"]}
            line += (f" | HellaSwag acc_norm {result['acc_norm']:.4f} +- {result['se']:.4f} "
                     f"({result['items']} items, {result['protocol']} protocol)")
        record["eval_ms"] = (time.perf_counter() - t0) * 1e3
        self.say(f"{line} | {record['eval_ms'] / 1e3:.1f} s")
        return record

    def samples(self, step: int, path: Path | None):
        """Texts of the first process, a function of (seed, step); appended to samples.txt."""
        cfg = self.cfg
        if not cfg.n_samples or not cfg.sample_tokens or self.model.config.vocab_size < N_VOCAB or self.world.rank != 0:
            return
        with self.autocast():
            texts = generate.sample_texts(self.model, cfg.sample_prompt, cfg.n_samples, cfg.sample_tokens,
                                          seed=cfg.seed * 1_000_003 + step)
        for i, text in enumerate(texts):
            self.say(f"step {step} | sample {i} | " + (text if "\n" not in text else f"\n{text.strip()}\n"))
        if path is not None:
            with open(path, "a") as f:
                f.write("".join(f"=== step {step}, sample {i}\n{text}\n" for i, text in enumerate(texts)))


# --------------------------------------------------------------------------------------------------------------------
# the run


def main():
    # config: everything that can be wrong is found here, before anything slow starts
    cfg, notes = from_command_line(sys.argv[1:])
    world = setup(cfg.device)
    say = (lambda message: print(message, flush=True)) if world.rank == 0 else (lambda message: None)
    for note in notes:
        say(f"config | {note}")
    if "RANK" in os.environ and world.device.type == "cuda" and cfg.preset == "shakespeare":
        raise UserError("torchrun on GPUs needs a preset, the default is a toy; hint: torchrun ... train_gpt2.py gpt2-rope")
    wrong = problems(cfg, world.world_size)
    try:
        if cfg.T > 0 and cfg.total_batch > 0:
            train, val, cfg = open_data(cfg, world, say)
    except UserError as e:
        wrong.append(str(e))
    if wrong := wrong or problems(cfg, world.world_size):  # again: epochs may have changed max_steps
        raise UserError("\n       ".join(wrong))
    run_dir = Path(cfg.log_dir) / cfg.run_name
    ckpt_dir = Path(cfg.ckpt_dir) if cfg.ckpt_dir else run_dir / "ckpt"
    found = checkpoint.open_run(cfg, run_dir, ckpt_dir, say) if not (cfg.eval_only and cfg.init_from) else None
    trains = not (cfg.eval_only or cfg.dry_run)
    if trains and found and found[1]["step"] == cfg.max_steps and checkpoint.finished(run_dir, cfg.max_steps):
        say(f"already finished: {run_dir} has {cfg.max_steps} of {cfg.max_steps} steps; hint: --run_name {cfg.run_name}-2 "
            f"starts anew, python generate.py --model {run_dir} samples from it")
        return

    # model
    model = build_model(cfg, say) if not found else checkpoint.load_model(found[0])
    model.to(world.device)
    dtype = autocast_dtype(world.device, cfg.dtype)
    autocast = lambda: torch.autocast(world.device.type, dtype=dtype, enabled=dtype != torch.float32)
    torch.set_float32_matmul_precision("high")  # TF32 for the few float32 matmuls on a GPU; no effect on the CPU
    flops, peak = model.flops_per_token(cfg.T), runlog.peak_flops(world.device)
    micro_steps = cfg.total_batch // (cfg.B * cfg.T * world.world_size)
    say(f"model | {model.num_params():,} parameters | {flops / 1e6:.1f} MFLOP a token | "
        f"{world.world_size} x {world.device.type}, {str(dtype).removeprefix('torch.')}")
    say(f"batch | {cfg.total_batch:,} tokens a step = micro-steps: {micro_steps} x rows: {cfg.B} x tokens: {cfg.T} x "
        f"processes: {world.world_size}")
    if cfg.dry_run:
        say(json.dumps(dataclasses.asdict(cfg), indent=1))
        return
    if compiled := cfg.use_compile:
        if why := compile_error(world.device):
            say(f"compile | off, it does not work here ({why}); hint: install g++ and the Python headers")
        compiled = not why
    train_model = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    eval_model = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    evaluate = Evaluator(cfg, model, eval_model, val, world, autocast, say)
    if cfg.eval_only:
        evaluate(found[1]["step"] if found else 0)
        return
    if dist.is_initialized():
        train_model = DDP(train_model, device_ids=[world.device.index] if world.device.type == "cuda" else None)

    # optimiser
    optimizer = optim.adamw(model, cfg.max_lr, cfg.betas, cfg.weight_decay)

    # resume, records
    start_step, best, wandb_id = 0, {"step": None, "val_loss": math.inf}, None
    if found:
        start_step, best, wandb_id = found[1]["step"], found[1]["best"], found[1]["wandb_id"]
        checkpoint.load_optimizer(found[0], model, optimizer)
        if (begun := shards.as_begun(train, found[1]["data"])) is None:
            raise UserError(f"{cfg.data_root} is not the data this run began with (fingerprint {shards.fingerprint(train)}, "
                            f"was {found[1]['data']}); hint: restore it, or --run_name NEW --init_from {found[0]}")
        train = begun
        say(f"resume | step {start_step} from {found[0]}")
    wandb_run = None
    if world.rank == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            ckpt_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
            (run_dir / "env.json").write_text(json.dumps(runlog.environment(world.device, world.world_size), indent=1))
        except OSError as e:
            raise UserError(f"cannot write to {run_dir}: {e.strerror}; hint: --log_dir and --ckpt_dir choose another place")
        wandb_run = runlog.start_wandb(cfg, wandb_id, run_dir, say)
    log = runlog.RunLog(run_dir if world.rank == 0 else None, start_step, wandb_run)
    bigram = runlog.bigram_loss(train, val, cfg.val_tokens) if world.rank == 0 else None
    if bigram is not None:
        say(f"bigram | val loss {bigram:.4f} is what counting pairs of tokens gets on this split")
        log.write({"step": start_step, "val/bigram": bigram}) if start_step == 0 else None

    # warm-up: one pass on made-up tokens compiles the kernels, so that the first step's time is a step's time
    t0 = time.perf_counter()
    tokens = torch.zeros(cfg.B, cfg.T, dtype=torch.int64, device=world.device)
    with autocast():
        train_model(tokens, tokens.clone()).backward()  # a clone: "idx is targets" would be compiled for
    optimizer.zero_grad(set_to_none=True)
    say(f"warm-up | {time.perf_counter() - t0:.1f} s{', compiled' if compiled else ''}")
    loader = shards.Loader(train, cfg.total_batch, cfg.B, world.rank, world.world_size, world.device, start_step,
                           cfg.batch_hashes)

    # loop: `step` counts the updates done
    pending, clock, waited = [], time.perf_counter(), 0.0
    for step in range(start_step, cfg.max_steps + 1):
        last_step = step == cfg.max_steps

        # everything needed to resume exactly; before evaluating, so that a crash there costs nothing
        saved = (last_step or step % cfg.save_interval == 0) and step > start_step
        if saved and world.rank == 0:
            t0 = time.perf_counter()
            state = dict(config=dataclasses.asdict(cfg), best=best, wandb_id=getattr(wandb_run, "id", None),
                         data=shards.fingerprint(train))
            path = checkpoint.save(ckpt_dir, step, model, optimizer, state)
            log.write({"step": step, "save_ms": (time.perf_counter() - t0) * 1e3})
            say(f"step {step} | saved {path} | {time.perf_counter() - t0:.1f} s")

        if last_step or step % cfg.eval_interval == 0:
            record = evaluate(step)
            log.write(record)
            if saved and record["val/loss"] < best["val_loss"]:
                best = {"step": step, "val_loss": record["val/loss"]}
        if last_step or (step > 0 and step % cfg.sample_interval == 0):
            evaluate.samples(step, run_dir / "samples.txt")
        if saved and world.rank == 0:
            checkpoint.prune(ckpt_dir, cfg.keep_last, best=f"step_{best['step'] or 0:06d}")
        if last_step:
            break
        if saved or step % cfg.eval_interval == 0 or step % cfg.sample_interval == 0:
            clock = time.perf_counter()  # saving, evaluating and sampling are not on the clock

        # one optimiser step: the only part on the clock
        lr = optim.cosine(step, cfg.max_lr, cfg.min_lr, cfg.warmup_steps, cfg.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss_sum, digest = torch.zeros((), device=world.device), 0
        for micro_step in range(micro_steps):
            batch, seconds = loader.next()
            waited += seconds
            digest += batch.digest
            if dist.is_initialized():  # set before the forward pass, which is when DDP reads it
                train_model.require_backward_grad_sync = micro_step == micro_steps - 1
            with autocast():
                loss = train_model(batch.x, batch.y) / micro_steps
            loss.backward()
            loss_sum += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_norm_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pending.append((step + 1, lr, loss_sum, norm, digest % 2**64))

        # diagnostics only from here on: numbers stay on the device until a line is due
        done = step + 1
        if done < cfg.max_steps and all(done % n for n in (cfg.log_interval, cfg.save_interval, cfg.eval_interval,
                                                           cfg.sample_interval)):
            continue
        records = fetch(pending, world)
        dt = (time.perf_counter() - clock) / len(pending)
        tok_s = cfg.total_batch / dt
        mfu = tok_s * flops / (peak * world.world_size) if peak else None
        for r in records:
            log.write(r | {"dt_ms": dt * 1e3, "data_ms": waited / len(pending) * 1e3, "tok_s": tok_s, "mfu": mfu})
        r = records[-1]
        say(f"step {done}/{cfg.max_steps} | loss {r['train/loss']:.4f} | lr {lr:.2e} | norm {r['train/norm']:.2f} | "
            f"{dt * 1e3:.0f} ms | {tok_s:,.0f} tok/s{f' | mfu {mfu:.1%}' if mfu else ''} | "
            f"{remaining(dt * (cfg.max_steps - done))} left")
        if not all(math.isfinite(r["train/loss"]) for r in records):
            raise UserError(f"the loss is no longer finite at step {done}; hint: a lower --max_lr, or --resume an older "
                            "checkpoint")
        pending, clock, waited = [], time.perf_counter(), 0.0

    # clean-up
    loader.close()
    log.close()
    say(f"finished | val loss {record['val/loss']:.4f}{f', bigram model {bigram:.4f}' if bigram else ''} | "
        f"curves and checkpoint in {run_dir}")


def fetch(pending: list, world: World) -> list[dict]:
    """Losses (mean over processes), norms and hashes of the steps since the last line, in one trip from the device."""
    losses = all_sum(torch.stack([p[2] for p in pending])) / world.world_size
    losses, norms = torch.stack([losses, torch.stack([p[3] for p in pending])]).tolist()
    records = [{"step": p[0], "train/loss": loss, "train/lr": p[1], "train/norm": norm}
               for p, loss, norm in zip(pending, losses, norms)]
    if any(p[4] for p in pending):  # --batch_hashes: sums modulo 2**64, added in halves so that nothing overflows
        halves = all_sum(torch.tensor([[p[4] >> 32, p[4] & 0xFFFFFFFF] for p in pending])).tolist()
        for record, (high, low) in zip(records, halves):
            record["batch_hash"] = f"{((high << 32) + low) % 2**64:016x}"
    return records


def remaining(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {int(seconds % 60):02d} s"


if __name__ == "__main__":
    command_line(main)
    if dist.is_initialized():
        dist.destroy_process_group()
