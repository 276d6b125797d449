"""What a run logs: metrics.jsonl, its environment, Weights & Biases."""

import dataclasses
import fcntl
import json
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import torch

from runtime.command_line import UserError, one_line, say

REPOSITORY = Path(__file__).resolve().parent.parent


def environment(device: torch.device, world_size: int) -> dict:
    """Return what a result depends on besides the settings: versions, hardware, commit, command."""
    commit = ""
    if (REPOSITORY / ".git").exists() and shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty"]
        run = subprocess.run(describe, cwd=REPOSITORY, capture_output=True, text=True)
        commit = run.stdout.strip()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type}, {os.cpu_count()} cores"
    return {
        "commit": commit,
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "platform": platform.platform(),
        "device": name,
        "threads": torch.get_num_threads(),
        "world_size": world_size,
    }


def read_metrics(run_dir: str | Path) -> list[dict]:
    """Return the records of a run, in the order written."""
    with open(Path(run_dir) / "metrics.jsonl") as f:
        # a crash may have cut the last line
        return [json.loads(line) for line in f if line.endswith("\n")]


# --------------------------------------------------------------------------------------------------
# metrics.jsonl


class RunLog:
    """Writes records in the process that has opened a run directory; does nothing in the others.

    One JSON object per line in metrics.jsonl, unbuffered: what was logged survives a crash of the
    process. A resumed run cuts the file to the step it resumes from, so that no step stands there
    twice. What cannot be written (disk full) is kept and tried again with the next line; the run
    continues.
    """

    def __init__(self):
        self.run_dir: Path | None = None
        self.wandb: Wandb | None = None
        self.file = None
        self.unwritten: list[bytes] = []  # lines that could not be written yet
        self.lock = threading.Lock()  # the thread that saves checkpoints writes, too

    def open(self, run_dir: Path, resume_step: int = 0):
        """Open metrics.jsonl and cut it to a step.

        Raises UserError when another process writes there, before anything is changed.
        """
        path = run_dir / "metrics.jsonl"
        file = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when this process ends
        except BlockingIOError:
            raise UserError(
                f"another process is writing to {run_dir}; hint: wait for it, or --run_name NEW"
            ) from None
        except OSError:  # a file system without locks
            pass
        self.run_dir, self.file = run_dir, file
        lines = self.file.read().splitlines(keepends=True)
        text = b"".join(line for line in lines if belongs_before(line, resume_step))
        self.file.seek(0)
        self.file.write(text)
        self.file.truncate()
        self.end = len(text)  # byte at which the next line goes
        cut_samples(run_dir / "samples.txt", resume_step)

    def write(self, record: dict):
        """Append to metrics.jsonl and to W&B; record["step"] is the number of updates done."""
        if self.file is None:
            return
        with self.lock:
            self.unwritten.append(json.dumps(record).encode() + b"\n")
            self.flush()
        # save records arrive late, and W&B rejects a step lower than the last one
        if self.wandb is not None and "save_ms" not in record:
            self.wandb.queue.put(record)

    def flush(self):
        """Write the pending lines. On an error they stay pending; the first time, say so."""
        data = b"".join(self.unwritten)
        try:
            self.file.seek(self.end)
            written = self.file.write(data)
            if written != len(data):
                raise OSError(f"{written} of {len(data)} bytes written")
        except OSError as e:
            if len(self.unwritten) == 1:
                say(f"metrics.jsonl | not written, the lines are kept for later: {one_line(e)}")
            return
        self.unwritten = []
        self.end += len(data)

    def sync(self):
        """Fsync, so that the log never lags behind a checkpoint."""
        if self.file is None:
            return
        with self.lock:
            self.flush()
            try:
                os.fsync(self.file.fileno())
            except OSError:
                pass  # flush() has said so

    def close(self, wandb_seconds: float = 30):
        """Close everything, once; wait so long for what W&B has still to send."""
        if self.file is None:
            return
        self.sync()
        if self.unwritten:
            say(f"metrics.jsonl | its last {len(self.unwritten)} lines could not be written")
        try:
            self.file.close()
        except OSError as e:
            say(f"metrics.jsonl | not closed: {one_line(e)}")
        self.file = None
        if self.wandb is not None:
            self.wandb.close(wandb_seconds)


def belongs_before(line: bytes, resume_step: int) -> bool:
    """Tell whether a line of metrics.jsonl is kept when a run resumes at a step.

    Kept is everything before it, and the update and save of that step, but not its evaluation,
    which is repeated. Nothing is kept at step 0.
    """
    try:
        record = json.loads(line)
    except ValueError:  # a line cut off by a crash
        return False
    if record["step"] == resume_step > 0:
        return "val/loss" not in record
    return record["step"] < resume_step


def cut_samples(path: Path, resume_step: int):
    """Cut samples.txt before the samples of resume_step: the same ones will be drawn again."""
    if not path.exists():
        return
    for sample in re.finditer(rb"^=== step (\d+), sample", path.read_bytes(), re.M):
        if int(sample[1]) >= resume_step:
            os.truncate(path, sample.start())
            return


# --------------------------------------------------------------------------------------------------
# Weights & Biases


class Wandb:
    """Sends records to Weights & Biases from a thread: no slow network holds or stops a run.

    "auto" goes online only when a key is there (in the environment or .netrc; wandb itself would
    prompt for one). Failures are reported in one line.
    """

    def __init__(self, cfg, run_id: str | None, run_dir: Path):
        self.id = run_id
        self.queue = queue.SimpleQueue()
        self.thread = threading.Thread(
            target=self.work, args=(cfg, run_dir), daemon=True, name="wandb"
        )
        wanted = cfg.wandb in ("online", "offline")
        if wanted or (cfg.wandb == "auto" and wandb_logged_in()):
            self.thread.start()

    def work(self, cfg, run_dir: Path):
        """Log what comes through the queue, until None comes (the thread)."""
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
            say(f"wandb | {run.url or f'offline, in {run_dir}/wandb'}")
            while record := self.queue.get():
                values = {key: value for key, value in record.items() if key != "step"}
                run.log(values, step=record["step"])
            run.finish()
        except Exception as e:  # wandb has many
            say(f"wandb | off from here: {one_line(e)}; hint: --wandb offline, then `wandb sync`")

    def close(self, seconds: float):
        """Wait until everything is sent, but not longer than `seconds`."""
        self.queue.put(None)
        if self.thread.is_alive():
            self.thread.join(seconds)


def wandb_logged_in() -> bool:
    """Tell whether an API key of W&B is in the environment or in .netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.exists() and "api.wandb.ai" in netrc.read_text(errors="replace")
