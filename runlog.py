"""Records of a run: the console line, metrics.jsonl, curves.png, and Weights & Biases when wanted."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from config import one_line
from shards import Windows
from tokenizer import N_VOCAB


def environment(device: torch.device, world_size: int) -> dict:
    """What a figure depends on beside the settings: versions, hardware, the commit, the command."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True,
                            text=True).stdout.strip() if (Path(__file__).parent / ".git").exists() else ""
    return dict(commit=commit, command=" ".join(sys.argv), python=platform.python_version(), torch=torch.__version__,
                cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), platform=platform.platform(),
                device=torch.cuda.get_device_name(device) if device.type == "cuda"
                else f"{device.type}, {os.cpu_count()} cores", threads=torch.get_num_threads(), world_size=world_size)


def bigram_loss(train: Windows, val: Windows, val_tokens: int, largest: int = 5_000_000) -> float | None:
    """Validation loss, nats per token, of counting which token follows which: what a network has to beat.

    p(b | a) = (n(ab) + k p(b)) / (n(a) + k) with p(b) = (n(b) + 1) / (N + V) (MacKay and Peto 1995); k is the best of
    a few for this very split, so the yardstick is as good as its kind can be. None for splits beyond `largest` tokens.
    """
    if train.sizes.sum() > largest:
        return None
    tokens = np.concatenate([np.fromfile(s.path, np.uint16, offset=s.start) for s in train.shards]).astype(np.int64)
    rows = np.zeros((min(val_tokens // val.T, val.per_epoch()), val.T + 1), np.uint16)
    val.read(np.arange(len(rows)), rows)
    before, after = rows[:, :-1].ravel().astype(np.int64), rows[:, 1:].ravel().astype(np.int64)
    V = 1 << 16
    single = np.bincount(tokens, minlength=V)
    p_after = (single[after] + 1) / (len(tokens) + N_VOCAB)
    pairs, counts = np.unique(tokens[:-1] * V + tokens[1:], return_counts=True)
    wanted = before * V + after
    at = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    n_pair = np.where(pairs[at] == wanted, counts[at], 0)
    return min(float(-np.log((n_pair + k * p_after) / (single[before] + k)).mean())
               for k in (10, 20, 50, 100, 200, 500, 1000))


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known GPU, FLOP/s (vendors' data sheets, SXM parts unless named); None when not known.

    No guess for others: an MFU over a wrong peak is worse than none.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    table = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "A10G": 70e12,
             "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "B200": 2250e12}
    return next((peak for key, peak in table.items() if key in name), None)


class RunLog:
    """Writes records on the process that has the run directory; does nothing on the others (run_dir None).

    One JSON object a line in metrics.jsonl, flushed at once: what was logged survives a crash. A resumed run cuts the
    file to the step it goes on from, so that no step stands there twice.
    """

    def __init__(self, run_dir: Path | None, resume_step: int = 0, wandb_run=None):
        self.file, self.run_dir, self.wandb_run = None, run_dir, wandb_run
        if run_dir is None:
            return
        path = run_dir / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if keeps(line, resume_step)] if path.exists() else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)
        self.file = open(path, "a")

    def say(self, message: str):
        """One line on the console of the first process."""
        if self.run_dir is not None:
            print(message, flush=True)

    def write(self, record: dict):
        """Append to metrics.jsonl and to W&B; record["step"] is the number of updates done."""
        if self.file is None:
            return
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.wandb_run is not None:
            try:
                self.wandb_run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
            except Exception as e:  # W&B must never stop a run
                self.say(f"wandb | off from here: {one_line(e)}")
                self.wandb_run = None

    def close(self):
        if self.file is None:
            return
        self.file.close()
        try:
            curves(self.run_dir)
        except ImportError:
            self.say("curves | not drawn: matplotlib is missing; hint: pip install matplotlib")
        if self.wandb_run is not None:
            try:
                self.wandb_run.finish()
            except Exception as e:
                self.say(f"wandb | {one_line(e)}")


def keeps(line: str, resume_step: int) -> bool:
    """Whether a line of metrics.jsonl stays when a run goes on from a step (0: afresh): all up to the update that made
    the checkpoint, and the saving itself; the evaluation that followed is done again."""
    try:
        record = json.loads(line)
    except ValueError:  # a line cut off by a crash
        return False
    return record["step"] < resume_step or (record["step"] == resume_step > 0 and "val/loss" not in record)


def start_wandb(cfg, run_id: str | None, run_dir: Path, say):
    """A W&B run, or None. "auto" goes online only when logged in, without asking; failures are told in one line.

    The key is looked for in the environment and in .netrc only: wandb itself would prompt, or wait 90 s for its server.
    """
    if cfg.wandb == "off" or (cfg.wandb == "auto" and not wandb_logged_in()):
        return None
    try:
        import wandb
        run = wandb.init(project=cfg.wandb_project, name=cfg.run_name, id=run_id, resume="allow" if run_id else None,
                         dir=run_dir, config=dataclasses.asdict(cfg), mode="offline" if cfg.wandb == "offline" else "online",
                         settings=wandb.Settings(init_timeout=20, silent=True))
        say(f"wandb | {run.url or 'offline, in ' + str(run_dir / 'wandb')}")
        return run
    except Exception as e:
        say(f"wandb | not used: {one_line(e)}")
        return None


def wandb_logged_in() -> bool:
    netrc = Path(os.environ.get("NETRC", Path.home() / (".netrc" if os.name != "nt" else "_netrc")))
    return bool(os.environ.get("WANDB_API_KEY")) or netrc.exists() and "api.wandb.ai" in netrc.read_text(errors="replace")


def read_metrics(run_dir: Path) -> list[dict]:
    """The records of a run, in the order written."""
    with open(Path(run_dir) / "metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def curves(run_dir: Path):
    """Draw curves.png from metrics.jsonl: training and validation loss, HellaSwag when it was measured."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    records = read_metrics(run_dir)
    points = lambda key: [(r["step"], r[key]) for r in records if r.get(key) is not None]
    train, val, hella, bigram = points("train/loss"), points("val/loss"), points("val/hella_norm"), points("val/bigram")
    fig, axes = plt.subplots(1, 2 if hella else 1, figsize=(11 if hella else 7, 4), squeeze=False, layout="constrained")
    left = axes[0][0]
    if train:
        left.plot(*zip(*train), color="#9ecae1", linewidth=1, label="training, one batch each")
    if val:
        left.plot(*zip(*val), "o-", color="#08519c", markersize=3, label=f"validation, last {val[-1][1]:.4f}")
    if bigram:
        left.axhline(bigram[-1][1], color="#d95f0e", linestyle="--", linewidth=1,
                     label=f"bigram model {bigram[-1][1]:.4f}")
    low = min(v for _, v in train + val) if train + val else 0
    high = max(v for _, v in train + val) if train + val else 1
    left.set(title=Path(run_dir).name, xlabel="step (optimiser updates)", ylabel="loss (nats per token)",
             ylim=(low - 0.1, min(high, low + 3.5) + 0.1))
    left.legend(frameon=False)
    if hella:
        axes[0][1].plot(*zip(*hella), "o-", color="#08519c", markersize=3)
        axes[0][1].axhline(0.294463, color="#d95f0e", linestyle="--", linewidth=1, label="OpenAI GPT-2 124M, 0.2945")
        axes[0][1].set(title="HellaSwag", xlabel="step (optimiser updates)", ylabel="acc_norm")
        axes[0][1].legend(frameon=False)
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    fig.savefig(Path(run_dir) / "curves.png", dpi=120)
    plt.close(fig)
