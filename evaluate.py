"""What is measured between steps: validation loss, HellaSwag, samples; and a bigram baseline.

Results do not depend on the number of processes.
"""

import math
import time
from contextlib import nullcontext

import numpy as np
import torch

import generate
import hellaswag
import shards
from config import TrainConfig
from model import GPT
from runtime.command_line import UserError, one_line, say
from runtime.device import Compute
from runtime.runlog import sample_text
from runtime.stop import Stop
from runtime.world import World, sum_over_ranks
from tokenizer import N_VOCAB, token_bytes


class Evaluator:
    """Measures validation loss and HellaSwag when called with a step, and draws samples."""

    def __init__(
        self,
        cfg: TrainConfig,
        model: GPT,
        val_data: shards.Windows,
        compute: Compute,
        world: World,
        stop: Stop,
    ):
        self.cfg = cfg
        self.model = model
        self.eval_model = compute.compile(model)
        self.val_data = val_data
        self.compute = compute
        self.world = world
        self.stop = stop
        self.gpt2_tokens = model.config.vocab_size >= N_VOCAB
        self.hellaswag = hellaswag.for_training(cfg.hellaswag_limit, model, world, compute)
        self.token_bytes = token_bytes() if self.gpt2_tokens else np.zeros(N_VOCAB, np.int64)
        self.has_run = False  # the first call compiles

    @torch.no_grad()
    def __call__(self, step: int) -> dict:
        """Return val/loss (nats per token), val/bpb (bits per byte), and HellaSwag, if it is on."""
        started = time.perf_counter()
        compiles = self.compute.compiled and not self.has_run
        self.has_run = True
        if compiles:
            say(f"step {step} | evaluating, which compiles once more")
        with self.stop.allow_compiling() if compiles else nullcontext():
            return self.measure(step, started)

    def measure(self, step: int, started: float) -> dict:
        """Measure and print everything; `started` is when that began."""
        loss, bits_per_byte = self.validation()
        record = {"step": step, "val/loss": loss, "val/bpb": bits_per_byte}
        line = f"step {step} | val loss {loss:.4f}"
        if bits_per_byte is not None:
            line += f" | {bits_per_byte:.4f} bits per byte"
        if self.hellaswag:
            result = self.hellaswag(self.stop.poll)
            record |= {"val/hella_norm": result["acc_norm"], "val/hella_se": result["se"]}
            line += (
                f" | HellaSwag acc_norm {result['acc_norm']:.4f} +- {result['se']:.4f} "
                f"({result['items']} items, {result['protocol']} protocol)"
            )
        seconds = time.perf_counter() - started
        record["eval_ms"] = seconds * 1e3
        say(f"{line} | evaluated in {seconds:.1f} s")
        return record

    def validation(self) -> tuple[float, float | None]:
        """Return nats per token and bits per byte over the first val_tokens of the split."""
        cfg = self.cfg
        total = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
        try:
            for x, y in shards.val_batches(self.val_data, cfg.val_tokens, cfg.B, self.world):
                self.stop.poll()
                with self.compute.autocast():
                    nats = self.eval_model(x, y, "sum")
                targets = y[y >= 0].cpu().numpy()
                n_bytes = self.token_bytes[targets[targets < N_VOCAB]].sum()
                total += torch.tensor([nats.item(), len(targets), n_bytes])
        except UserError as e:  # a shard was cut, replaced or removed during the run
            self.stop.stop_with(e)
            self.stop.poll()
        nats, tokens, n_bytes = sum_over_ranks(total).tolist()
        bits_per_byte = nats / math.log(2) / n_bytes if n_bytes else None
        return nats / tokens, bits_per_byte

    def samples(self, step: int) -> float:
        """Draw texts on rank 0, a function of (seed, step); print them, append to samples.txt.

        Returns the seconds that it took.
        """
        cfg = self.cfg
        started = time.perf_counter()
        draws = cfg.n_samples and cfg.sample_tokens and self.gpt2_tokens
        if not draws or self.world.rank != 0:
            return 0.0
        try:
            with self.compute.autocast():
                texts = generate.sample_texts(
                    self.model,
                    cfg.sample_prompt,
                    cfg.n_samples,
                    cfg.sample_tokens,
                    seed=cfg.seed * 1_000_003 + step,
                    stopped=lambda: bool(self.stop.reason),
                )
        except Exception as e:  # out of memory, for example: training needs no samples
            say(f"step {step} | no samples: {one_line(e)}")
            return time.perf_counter() - started
        if self.stop.reason:  # interrupted half-way: the resumed run draws these samples again
            return 0.0
        written = ""
        for i, text in enumerate(texts):
            say(f"step {step} | sample {i} | {shortened(text)}")
            written += sample_text(step, i, text)
        try:
            with open(cfg.run_dir / "samples.txt", "a", encoding="utf-8", errors="replace") as f:
                f.write(written)
        except OSError as e:
            say(f"step {step} | samples.txt not written: {one_line(e)}")
        return time.perf_counter() - started


def shortened(text: str, most: int = 8) -> str:
    """Return what the console shows of a sample: its first lines, indented."""
    lines = text.strip().splitlines()
    if len(lines) < 2:
        return text.strip()
    shown = "".join(f"\n    {line}" for line in lines[:most])
    if len(lines) > most:
        shown += f"\n    ... {len(lines) - most} more lines in samples.txt"
    return shown


def bigram_loss(
    train: shards.Windows, val: shards.Windows, val_tokens: int, largest: int = 5_000_000
) -> float | None:
    """Return a bigram model's validation loss, nats per token.

    A baseline that a network has to beat: p(b | a) = (n(ab) + k p(b)) / (n(a) + k) with p(b) =
    (n(b) + 1) / (N + V) (MacKay and Peto 1995); k is the best of a few for this very split, so the
    baseline is as strong as a bigram model can be. None when the training split has more than
    `largest` tokens.
    """
    if train.sizes.sum() > largest:
        return None
    files = [np.fromfile(s.path, np.uint16, offset=s.start) for s in train.shards]
    tokens = np.concatenate(files).astype(np.int64)
    rows = np.zeros((min(val_tokens // val.T, val.per_epoch()), val.T + 1), np.uint16)
    val.read(np.arange(len(rows)), rows)
    before = rows[:, :-1].ravel().astype(np.int64)
    after = rows[:, 1:].ravel().astype(np.int64)
    n_ids = 1 << 16  # uint16: a pair of ids is before * n_ids + after
    n_single = np.bincount(tokens, minlength=n_ids)
    p_after = (n_single[after] + 1) / (len(tokens) + N_VOCAB)
    pairs, counts = np.unique(tokens[:-1] * n_ids + tokens[1:], return_counts=True)
    val_pairs = before * n_ids + after
    index = np.searchsorted(pairs, val_pairs).clip(max=len(pairs) - 1)
    n_pair = np.where(pairs[index] == val_pairs, counts[index], 0)
    losses = []
    for k in (10, 20, 50, 100, 200, 500, 1000):
        p = (n_pair + k * p_after) / (n_single[before] + k)
        losses.append(float(-np.log(p).mean()))
    return min(losses)
