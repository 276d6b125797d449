"""What a run logs: metrics.jsonl, its environment, Weights & Biases."""

import atexit
import dataclasses
import fcntl
import json
import os
import platform
import queue
import re
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch

from runtime.command_line import UserError, one_line, say

REPOSITORY = Path(__file__).resolve().parent.parent

# what the end of a run waits for W&B, at most
WANDB_END_SECONDS = 10


def environment(device: torch.device, world_size: int) -> dict:
    """Return what a result depends on besides the settings: versions, hardware, commit, command."""
    return {
        "commit": known(commit) or "",
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": known(torch.backends.cudnn.version),
        "platform": known(platform.platform),
        "device": known(lambda: device_name(device)),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
    }


def known(look_up: Callable):
    """Return what a look-up finds, None when it fails: a diagnostic never stops a run."""
    try:
        return look_up()
    except Exception:  # git, drivers and platforms have many
        return None


def commit() -> str:
    """Return the commit of this code, "" outside a git checkout."""
    if not (REPOSITORY / ".git").exists():
        return ""
    describe = ["git", "describe", "--always", "--dirty"]
    run = subprocess.run(
        describe, cwd=REPOSITORY, capture_output=True, encoding="utf-8", timeout=10
    )
    return run.stdout.strip()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {os.cpu_count()} cores"


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

    def close(self):
        """Close metrics.jsonl, once."""
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

    def close_wandb(self, seconds: float = WANDB_END_SECONDS):
        """Send W&B what it has still to get, for so many seconds at most."""
        if self.wandb is not None:
            self.wandb.close(seconds)


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

    "auto" follows W&B's own settings (WANDB_MODE, `wandb login`, its own server), and is off
    without a key, where wandb itself would prompt for one. Failures are reported in one line.
    """

    def __init__(self, cfg, run_id: str | None, run_dir: Path):
        self.id = run_id
        self.run_dir = run_dir
        self.abandoned = False  # the run has ended without waiting any longer
        self.queue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, args=(cfg,), daemon=True, name="wandb")
        if cfg.wandb in ("online", "offline") or (cfg.wandb == "auto" and wandb_configured()):
            self.thread.start()

    def work(self, cfg):
        """Log what comes through the queue, until None comes (the thread)."""
        try:
            import wandb

            wandb.setup(wandb.Settings(silent=True))
            settings = wandb.setup().settings
            mode = cfg.wandb
            if mode == "auto":
                mode = settings.mode
                if mode == "online" and not wandb.login(prompt=False, verify=False):
                    return
            if mode == "disabled":
                return
            if mode != "offline":
                urlopen_once(settings.base_url)
            run = wandb.init(
                project=cfg.wandb_project or settings.project or "gpt2-from-scratch",
                name=settings.run_name or cfg.run_name,
                id=self.id,
                resume="allow" if self.id else None,
                dir=self.run_dir,
                config=dataclasses.asdict(cfg),
                mode=mode,
                settings=wandb.Settings(
                    init_timeout=60, finish_timeout=WANDB_END_SECONDS - 2, silent=True
                ),
            )
            self.id = run.id
            say(f"wandb | {run.url or f'offline, in {self.run_dir}/wandb'}")
            while record := self.queue.get():
                values = {key: value for key, value in record.items() if key != "step"}
                run.log(values, step=record["step"])
            run.finish()
        except Exception as e:  # wandb has many
            if not self.abandoned:
                say(f"wandb | off from here: {one_line(e)}; hint: --wandb offline, `wandb sync`")
            atexit.register(end_wandb_service)

    def close(self, seconds: float):
        """Wait until everything is sent, but not longer than `seconds`."""
        self.queue.put(None)
        if self.thread.is_alive():
            self.thread.join(seconds)
        self.abandoned = self.thread.is_alive()
        if self.abandoned:
            atexit.register(end_wandb_service)
        if self.abandoned and seconds:
            say(
                f"wandb | not everything was sent within {seconds:g} s; "
                f"hint: wandb sync {self.run_dir}/wandb/*run-*"
            )


def wandb_configured() -> bool:
    """Tell whether W&B may be wanted: only then it is imported, a second of work, and asked."""
    if any(name.startswith("WANDB_") for name in os.environ):
        return True
    netrc = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    return os.path.isfile(netrc)


def end_wandb_service():
    """End wandb's own process, for which it else waits at exit: a minute without a network."""
    try:
        from wandb.sdk import wandb_setup

        service = wandb_setup.singleton()._connection
        service._proc._process.kill()
        service._cleanup()  # removes wandb's own function from what is called at exit
    except Exception:  # private names: in another version the process ends later
        pass


def urlopen_once(url: str):
    """Raise OSError when a server cannot be reached; any answer will do.

    wandb itself would try for a minute, and for half a minute more when the process ends.
    """
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except urllib.error.HTTPError:
        pass
    except urllib.error.URLError as e:
        if not isinstance(e.reason, ssl.SSLError):  # wandb has its own settings for certificates
            raise
