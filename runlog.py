"""Records of a run: the console line, metrics.jsonl, curves.png, and Weights & Biases when wanted.

python runlog.py compare log/gpt2-rope log/gpt2-modern --x tokens --out compare.png    a table and a picture
python runlog.py curves --run_dir log/gpt2-rope                                         curves.png of a run, again
"""

import dataclasses
import json
import os
import platform
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from config import UserError, command_line, one_line
from distributed import World, all_sum
from shards import Windows
from tokenizer import N_VOCAB


def environment(device: torch.device, world_size: int) -> dict:
    """What a figure depends on beside the settings: versions, hardware, the commit, the command."""
    commit = (
        subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        ).stdout.strip()
        if (Path(__file__).parent / ".git").exists()
        else ""
    )
    return dict(
        commit=commit,
        command=" ".join(sys.argv),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        platform=platform.platform(),
        device=torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {os.cpu_count()} cores",
        threads=torch.get_num_threads(),
        world_size=world_size,
    )


def bigram_loss(
    train: Windows, val: Windows, val_tokens: int, largest: int = 5_000_000
) -> float | None:
    """Validation loss, nats per token, of counting which token follows which: what a network has to beat.

    p(b | a) = (n(ab) + k p(b)) / (n(a) + k) with p(b) = (n(b) + 1) / (N + V) (MacKay and Peto 1995); k is the best of
    a few for this very split, so the yardstick is as good as its kind can be. None for splits beyond `largest` tokens.
    """
    if train.sizes.sum() > largest:
        return None
    tokens = np.concatenate(
        [np.fromfile(s.path, np.uint16, offset=s.start) for s in train.shards]
    ).astype(np.int64)
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
    return min(
        float(-np.log((n_pair + k * p_after) / (single[before] + k)).mean())
        for k in (10, 20, 50, 100, 200, 500, 1000)
    )


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known GPU, FLOP/s (vendors' data sheets, SXM parts unless named); None when not known.

    No guess for others: an MFU over a wrong peak is worse than none.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    table = {
        "H200": 989e12,
        "H100 PCIe": 756e12,
        "H100 NVL": 835e12,
        "H100": 989e12,
        "A100": 312e12,
        "A10G": 70e12,
        "L40S": 362e12,
        "L4": 121e12,
        "RTX 4090": 165e12,
        "RTX 3090": 71e12,
        "B200": 2250e12,
    }
    return next((peak for key, peak in table.items() if key in name), None)


def say(message: str):
    """One line on the console. A console that is gone or a full disk behind it never stops a run."""
    try:
        print(message, flush=True)
    except UnicodeEncodeError:  # a console of another alphabet
        print(message.encode("ascii", "replace").decode(), flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")
    except OSError:
        pass


class RunLog:
    """Writes records in the process that has opened a run directory; does nothing in the others.

    One JSON object a line in metrics.jsonl, handed to the system at once: what was logged survives a crash. A resumed run
    cuts the file to the step it goes on from, so that no step stands there twice. What cannot be written (disk full)
    is kept and tried again with the next line; the run goes on.
    """

    def __init__(self):
        self.run_dir, self.wandb, self.file, self.waiting, self.lock = (
            None,
            None,
            None,
            [],
            threading.Lock(),
        )

    def open(self, run_dir: Path, resume_step: int = 0):
        """Raises UserError when another process writes there, before anything is changed."""
        path = run_dir / "metrics.jsonl"
        file = open(path, "r+b" if path.exists() else "w+b", buffering=0)
        try:
            import fcntl  # not on Windows

            fcntl.flock(
                file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # let go by the system when this process ends
        except BlockingIOError:
            raise UserError(
                f"another process is writing to {run_dir}; hint: wait for it, or --run_name NEW"
            )
        except (ImportError, OSError):  # a file system without locks
            pass
        self.run_dir, self.file = run_dir, file
        kept = b"".join(
            line for line in self.file.read().splitlines(keepends=True) if keeps(line, resume_step)
        )
        self.file.seek(0)
        self.file.write(kept)
        self.file.truncate()
        self.end = len(kept)  # byte at which the next line goes
        cut_samples(run_dir / "samples.txt", resume_step)

    def write(self, record: dict):
        """Append to metrics.jsonl and to W&B; record["step"] is the number of updates done."""
        if self.file is None:
            return
        with self.lock:  # a thread that saves writes, too
            self.waiting.append(json.dumps(record).encode() + b"\n")
            self.flush()
        if (
            self.wandb is not None and "save_ms" not in record
        ):  # that one comes late, and W&B takes no step that lies back
            self.wandb.queue.put(record)

    def flush(self):
        data = b"".join(self.waiting)
        try:
            self.file.seek(self.end)
            if (written := self.file.write(data)) != len(data):
                raise OSError(f"{written} of {len(data)} bytes written")
            self.waiting, self.end = [], self.end + len(data)
        except OSError as e:
            if len(self.waiting) == 1:
                say(f"metrics.jsonl | not written, the lines are kept for later: {one_line(e)}")

    def sync(self):
        """To the disk, before a checkpoint that goes on from here gets there."""
        if self.file is None:
            return
        with self.lock:
            self.flush()
            try:
                os.fsync(self.file.fileno())
            except OSError:
                pass  # flush() has told

    def close(self):
        if self.file is None:
            return
        self.sync()
        if self.waiting:
            say(f"metrics.jsonl | its last {len(self.waiting)} lines could not be written")
        try:
            self.file.close()
            curves(self.run_dir)
        except ImportError:
            say("curves | not drawn: matplotlib is missing; hint: pip install matplotlib")
        except (OSError, ValueError) as e:
            say(f"curves | not drawn: {one_line(e)}")
        if self.wandb is not None:
            self.wandb.close()


def keeps(line: bytes, resume_step: int) -> bool:
    """Whether a line of metrics.jsonl stays when a run goes on from a step (0: afresh): all up to the update that made
    the checkpoint, and the saving itself; the evaluation that followed is done again.
    """
    try:
        record = json.loads(line)
    except ValueError:  # a line cut off by a crash
        return False
    return record["step"] < resume_step or (
        record["step"] == resume_step > 0 and "val/loss" not in record
    )


def cut_samples(path: Path, resume_step: int):
    """Take the samples from resume_step on out of samples.txt: they will be drawn again, the same ones."""
    if path.exists():
        text = path.read_bytes()
        again = [
            m.start()
            for m in re.finditer(rb"^=== step (\d+), sample", text, re.M)
            if int(m[1]) >= resume_step
        ]
        os.truncate(path, min(again, default=len(text)))


class Meter:
    """Loss, gradient norm and speed of each step, kept on the device until a line is due: then one trip for all."""

    def __init__(self, cfg, flops: float, world: World, log: RunLog, say):
        self.cfg, self.flops, self.world, self.log, self.say = (
            cfg,
            flops,
            world,
            log,
            say,
        )  # flops: of one token
        self.peak = peak_flops(world.device)
        self.in_a_row = 0  # steps skipped since the last good one
        self.restart()

    def restart(self):
        """Start the clock: what lay before (saving, evaluating, sampling) does not count."""
        self.pending, self.clock, self.waited = [], time.perf_counter(), 0.0

    def add(
        self,
        step: int,
        lr: float,
        loss: torch.Tensor,
        norm: torch.Tensor,
        healthy: torch.Tensor,
        digest: int,
    ):
        self.pending.append((step, lr, torch.stack([loss, norm, healthy.float()]), digest % 2**64))

    def flush(self):
        """Write the records of the pending steps, and a line for the last of them."""
        if not self.pending:
            return
        cfg, n = self.cfg, len(self.pending)
        numbers = torch.stack(
            [p[2] for p in self.pending]
        ).tolist()  # here the host waits for the device
        dt = (time.perf_counter() - self.clock) / n
        tok_s = cfg.total_batch / dt
        mfu = tok_s * self.flops / (self.peak * self.world.world_size) if self.peak else None
        hashes = self.hashes() if cfg.batch_hashes else [{}] * n
        for (step, lr, _, _), (loss, norm, healthy), batch_hash in zip(
            self.pending, numbers, hashes
        ):
            record = {
                "step": step,
                "train/loss": loss if healthy else None,
                "train/lr": lr,
                "train/norm": norm if healthy else None,
                **batch_hash,
            }
            if not healthy:
                first = (step - 1) * (cfg.total_batch // cfg.T)
                record |= {
                    "skipped": f"loss {loss}, norm {norm}",
                    "windows": [first, first + cfg.total_batch // cfg.T - 1],
                }
                self.say(
                    f"step {step} | skipped, no update: {record['skipped']} | windows {record['windows']}"
                )
            self.in_a_row = 0 if healthy else self.in_a_row + 1
            self.log.write(
                record
                | {"dt_ms": dt * 1e3, "data_ms": self.waited / n * 1e3, "tok_s": tok_s, "mfu": mfu}
            )
        self.say(
            f"step {step}/{cfg.max_steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | {dt * 1e3:.0f} ms | "
            f"{tok_s:,.0f} tok/s{f' | mfu {mfu:.1%}' if mfu else ''} | {remaining(dt * (cfg.max_steps - step))} left"
        )
        self.restart()

    def hashes(self) -> list[dict]:
        """--batch_hashes: sums over the processes modulo 2**64, added in halves so that nothing overflows."""
        halves = all_sum(
            torch.tensor([[p[3] >> 32, p[3] & 0xFFFFFFFF] for p in self.pending])
        ).tolist()
        return [{"batch_hash": f"{((high << 32) + low) % 2**64:016x}"} for high, low in halves]


def remaining(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {int(seconds % 60):02d} s"


class Wandb:
    """Weights & Biases in a thread of its own: however slow or absent the network, nothing of it holds or stops a run.

    "auto" goes online only when a key is there (in the environment or .netrc; wandb itself would prompt for one).
    Failures are told in one line.
    """

    def __init__(self, cfg, run_id: str | None, run_dir: Path):
        self.id, self.queue = run_id, queue.SimpleQueue()
        self.thread = threading.Thread(
            target=self.work, args=(cfg, run_dir), daemon=True, name="wandb"
        )
        if cfg.wandb in ("online", "offline") or cfg.wandb == "auto" and wandb_logged_in():
            self.thread.start()

    def work(self, cfg, run_dir: Path):
        try:
            import wandb

            run = wandb.init(
                project=cfg.wandb_project,
                name=cfg.run_name,
                id=self.id,
                resume="allow" if self.id else None,
                dir=run_dir,
                config=dataclasses.asdict(cfg),
                mode="offline" if cfg.wandb == "offline" else "online",
                settings=wandb.Settings(init_timeout=60, silent=True),
            )
            self.id = run.id
            say(f"wandb | {run.url or 'offline, in ' + str(run_dir / 'wandb')}")
            while record := self.queue.get():
                run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
            run.finish()
        except Exception as e:  # wandb has many
            say(f"wandb | off from here: {one_line(e)}; hint: --wandb offline, then `wandb sync`")

    def close(self, seconds: float = 30):
        self.queue.put(None)
        if self.thread.is_alive():
            self.thread.join(seconds)


def wandb_logged_in() -> bool:
    netrc = Path(os.environ.get("NETRC", Path.home() / (".netrc" if os.name != "nt" else "_netrc")))
    return (
        bool(os.environ.get("WANDB_API_KEY"))
        or netrc.exists()
        and "api.wandb.ai" in netrc.read_text(errors="replace")
    )


def read_metrics(run_dir: Path) -> list[dict]:
    """The records of a run, in the order written."""
    with open(Path(run_dir) / "metrics.jsonl") as f:
        return [
            json.loads(line) for line in f if line.endswith("\n")
        ]  # a crash may have cut the last one


def curves(run_dir: Path):
    """Draw curves.png from metrics.jsonl: training and validation loss, HellaSwag when it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(run_dir)
    points = lambda key: [(r["step"], r[key]) for r in records if r.get(key) is not None]
    train, val, hella, bigram = (
        points("train/loss"),
        points("val/loss"),
        points("val/hella_norm"),
        points("val/bigram"),
    )
    fig, axes = plt.subplots(
        1, 2 if hella else 1, figsize=(11 if hella else 7, 4), squeeze=False, layout="constrained"
    )
    left = axes[0][0]
    if train:
        left.plot(*zip(*train), color="#9ecae1", linewidth=1, label="training, one batch each")
    if val:
        left.plot(
            *zip(*val),
            "o-",
            color="#08519c",
            markersize=3,
            label=f"validation, last {val[-1][1]:.4f}",
        )
    if bigram:
        left.axhline(
            bigram[-1][1],
            color="#d95f0e",
            linestyle="--",
            linewidth=1,
            label=f"bigram model {bigram[-1][1]:.4f}",
        )
    low = min(v for _, v in train + val) if train + val else 0
    high = max(v for _, v in train + val) if train + val else 1
    left.set(
        title=Path(run_dir).name,
        xlabel="step (optimiser updates)",
        ylabel="loss (nats per token)",
        ylim=(low - 0.1, min(high, low + 3.5) + 0.1),
    )
    left.legend(frameon=False)
    if hella:
        axes[0][1].plot(*zip(*hella), "o-", color="#08519c", markersize=3)
        axes[0][1].axhline(
            0.294463,
            color="#d95f0e",
            linestyle="--",
            linewidth=1,
            label="OpenAI GPT-2 124M, 0.2945",
        )
        axes[0][1].set(title="HellaSwag", xlabel="step (optimiser updates)", ylabel="acc_norm")
        axes[0][1].legend(frameon=False)
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    fig.savefig(Path(run_dir) / "curves.png", dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    import tyro

    import compare

    command_line(
        lambda: tyro.extras.subcommand_cli_from_dict(
            {"compare": compare.main, "curves": curves},
            description=__doc__,
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
        )
    )
