"""What a run logs: metrics.jsonl, its environment, Weights & Biases."""

import atexit
import dataclasses
import json
import math
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
from runtime.files import NOT_SUPPORTED, atomic
from runtime.lock import Lock

REPOSITORY = Path(__file__).resolve().parent.parent

# newest lines that a checkpoint stores while the log cannot be written: 20 MB
STORED_LINES = 100_000

# longest time that the end of a run waits for W&B
WANDB_END_SECONDS = 10


def environment(device: torch.device, world_size: int) -> dict:
    """Return what a result depends on besides the settings: versions, hardware, commit, command."""
    return {
        "commit": value_or_none(commit) or "",
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": value_or_none(torch.backends.cudnn.version),
        "platform": value_or_none(platform.platform),
        "device": value_or_none(lambda: device_name(device)),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
    }


# when one of these has changed, losses of a resumed run may differ in the last digits
COMPUTES = (
    "commit python torch cuda cudnn device threads world_size dtype compiled attention B".split()
)


def add_part(earlier, part: dict, step: int) -> tuple[dict, str]:
    """Return env.json for a run that begins at a step, and what has changed since the part before.

    `earlier` is the existing env.json, whatever it holds. The newest part is at the top level;
    `began_at` lists the steps at which a process of that part began.
    """
    if not isinstance(earlier, dict):
        return part | {"began_at": [step], "earlier": []}, ""
    parts = earlier.pop("earlier", None)
    if not isinstance(parts, list):
        parts = []
    began_at = earlier.pop("began_at", None)
    if not isinstance(began_at, list):
        began_at = []
    if earlier == part:
        return part | {"began_at": [*began_at, step], "earlier": parts}, ""
    changes = [
        f"{key} {earlier[key]} -> {part[key]}"
        for key in COMPUTES
        if key in earlier and earlier[key] != part.get(key)
    ]
    parts = [*parts, earlier | {"began_at": began_at}]
    return part | {"began_at": [step], "earlier": parts}, ", ".join(changes)


def value_or_none(look_up: Callable):
    """Return look_up(), or None when it fails: a diagnostic never stops a run."""
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
    """Return the records of a run, in the order written, without lines that are not records."""
    lines = (Path(run_dir) / "metrics.jsonl").read_bytes().splitlines()
    records = (parse_record(line) for line in lines)
    return [record for record in records if record is not None]


def parse_record(line: bytes) -> dict | None:
    """Return the record in a line; None when it holds none, as after a crash or an edit by hand."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(record, dict) and type(record.get("step")) is int:
        return record
    return None


def without_nan(record: dict) -> dict:
    """Return a record with null for NaN and infinity, which JSON does not have."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }


# --------------------------------------------------------------------------------------------------
# metrics.jsonl


class RunLog:
    """Writes records in the process that has opened a run directory; does nothing in the others.

    One JSON object per line in metrics.jsonl, unbuffered: what was logged survives a crash of the
    process. A resumed run cuts the file to the step it resumes from, so that no step appears
    twice. What cannot be written (disk full) is kept, in the checkpoints too, and tried again with
    the next line; the run continues. A file that is deleted or replaced meanwhile is written again.
    """

    def __init__(self):
        self.run_dir: Path | None = None
        self.wandb: Wandb | None = None
        self.file = None
        self.end = 0  # byte at which the next line goes
        self.unwritten: list[bytes] = []  # lines that could not be written yet
        self.error: OSError | None = None  # why not, or why they are not surely on the disk
        self.lock = threading.Lock()  # the thread that saves checkpoints writes, too
        self.directory_lock: Lock | None = None  # of the run directory

    def open(self, run_dir: Path, resume_step: int = 0, saved_lines: list[str] | None = None):
        """Open metrics.jsonl and cut it to a step; add lines that only a checkpoint has saved.

        Raises UserError when another process writes there, before anything is changed.
        """
        path = (run_dir / "metrics.jsonl").resolve()
        self.run_dir, self.path = run_dir, path
        self.lock_directory()
        self.file = open_to_update(path)
        try:
            text = self.cut(resume_step)
        except BaseException:  # close() must not write to a file that is half cut
            file, self.file = self.file, None
            close_file(file)
            raise
        present = set(text.splitlines(keepends=True))
        for line in saved_lines or ():
            data = line.encode() + b"\n"
            if data not in present and belongs_before(data, resume_step):
                self.unwritten.append(data)
        with self.lock:
            self.flush()
        self.say_missing(resume_step)
        cut_samples(run_dir / "samples.txt", resume_step)

    def cut(self, resume_step: int) -> bytes:
        """Remove from metrics.jsonl what a run resumed at a step writes again; return the rest."""
        content = self.file.read()
        lines = content.splitlines(keepends=True)
        text = b"".join(line for line in lines if belongs_before(line, resume_step))
        if content.startswith(text):
            self.file.truncate(len(text))
            self.end = len(text)
        else:  # what is removed is not all at the end
            self.rewrite(text)
        return text

    def lock_directory(self):
        """Lock the run directory until close() or the end of the process. Raises UserError."""
        try:
            self.directory_lock = Lock(self.run_dir, ".lock-log")
        except BlockingIOError as e:
            raise UserError(
                f"another process is writing to {self.run_dir} ({e.strerror}); "
                "hint: wait for it, or --run_name NEW"
            ) from None
        if not self.directory_lock.supported:
            say(
                f"metrics.jsonl | the file system of {self.run_dir} has no locks: a second launch "
                "of this run on another machine would not be noticed"
            )

    def rewrite(self, text: bytes):
        """Replace metrics.jsonl by one with another text, atomically."""
        with atomic(self.path) as temporary:
            temporary.write_bytes(text)
        new = open_to_update(self.path)
        # in one statement, because other threads read self.file
        old, self.file, self.end = self.file, new, len(text)
        close_file(old)

    def say_missing(self, resume_step: int):
        """Say which steps before the one to resume from have no line: training needs none."""
        logged = {r["step"] for r in read_metrics(self.run_dir) if "train/loss" in r}
        pending = (parse_record(line) for line in self.unwritten)
        logged |= {r["step"] for r in pending if r and "train/loss" in r}
        missing = sorted(set(range(1, resume_step + 1)) - logged)
        if missing:
            say(
                f"metrics.jsonl | has no lines for {len(missing):,} of the {resume_step:,} steps "
                f"so far, between {missing[0]:,} and {missing[-1]:,}; training needs none of them"
            )

    def write(self, record: dict):
        """Append to metrics.jsonl and to W&B; record["step"] is the number of updates done."""
        if self.file is None:
            return
        with self.lock:
            line = json.dumps(without_nan(record), allow_nan=False)
            self.unwritten.append(line.encode() + b"\n")
            self.flush()
        # save records arrive late, and W&B rejects a step lower than the last one
        if self.wandb is not None and "save_ms" not in record:
            self.wandb.queue.put(record)

    def flush(self):
        """Write the pending lines. On an error they stay pending; the first time, say so."""
        data = b"".join(self.unwritten)
        try:
            self.reopen_if_replaced()
            self.file.seek(self.end)
            write_all(self.file, data)
        except OSError as e:
            if len(self.unwritten) == 1:
                say(f"metrics.jsonl | not written, the lines are kept for later: {one_line(e)}")
            self.error = e if self.unwritten else None
            return
        self.unwritten, self.error = [], None
        self.end += len(data)

    def reopen_if_replaced(self):
        """Write metrics.jsonl again when its path no longer leads to the open file.

        Deleted, replaced by an editor or by a copy: the open file still has every line.
        """
        own = os.fstat(self.file.fileno())
        if own.st_size < self.end:
            say(
                f"metrics.jsonl | was cut from {self.end:,} to {own.st_size:,} bytes by another "
                "program; the lines in between are lost"
            )
            self.end = own.st_size
        try:
            if os.path.samestat(os.stat(self.path), own):
                return
            os.replace(self.path, self.path.with_name("metrics.jsonl.replaced"))
            what = "replaced by another file, now metrics.jsonl.replaced"
        except FileNotFoundError:
            what = "deleted"
        self.file.seek(0)
        self.rewrite(self.file.read(self.end))
        say(f"metrics.jsonl | was {what}; written again, with every line of this run")

    def pending(self) -> list[str]:
        """Return the lines that cannot be written yet, for the state of a checkpoint."""
        if self.file is None:
            return []
        with self.lock:
            if self.unwritten:
                self.flush()
            return [line.decode().removesuffix("\n") for line in self.unwritten[-STORED_LINES:]]

    def sync(self):
        """Fsync, so that the log never lags behind a checkpoint."""
        if self.file is None:
            return
        with self.lock:
            self.flush()
            try:
                os.fsync(self.file.fileno())
            except OSError as e:
                if e.errno not in NOT_SUPPORTED:
                    self.error = e

    def close(self):
        """Close metrics.jsonl and unlock the run directory; a second call does nothing.

        `error` stays when the last lines could not be written.
        """
        if self.file is not None:
            self.sync()
            if self.unwritten:
                say(f"metrics.jsonl | its last {len(self.unwritten)} lines could not be written")
            file, self.file = self.file, None
            close_file(file)
        if self.directory_lock is not None:
            self.directory_lock.close()

    def close_wandb(self, seconds: float = WANDB_END_SECONDS):
        """Send W&B what is still queued, for at most this many seconds."""
        if self.wandb is not None:
            self.wandb.close(seconds)


def open_to_update(path: Path):
    """Open a file unbuffered, creating it if need be; "w" would empty one that exists."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)


def close_file(file):
    """Close a file; an error is only reported."""
    try:
        file.close()
    except OSError as e:
        say(f"metrics.jsonl | not closed: {one_line(e)}")


def write_all(file, data: bytes):
    """Write all of `data` to an unbuffered file. Raises OSError."""
    while data:  # a full disk may take only a part
        data = data[file.write(data) :]


def belongs_before(line: bytes, resume_step: int) -> bool:
    """Return whether a line of metrics.jsonl is kept when a run resumes at a step.

    Everything before the step is kept, and its update and save, but not its evaluation, which is
    repeated. Nothing is kept at step 0.
    """
    record = parse_record(line)
    if record is None or not line.endswith(b"\n"):  # cut off by a crash
        return False
    if record["step"] == resume_step > 0:
        return "val/loss" not in record
    return record["step"] < resume_step


SAMPLE_HEAD = "=== step"  # how the line above each sample begins, and no other line


def sample_text(step: int, index: int, text: str) -> str:
    """Return a sample as samples.txt has it; a line that looks like a sample's head is indented."""
    text = re.sub(f"^{SAMPLE_HEAD}", f" {SAMPLE_HEAD}", text, flags=re.M)
    return f"{SAMPLE_HEAD} {step}, sample {index}\n{text}\n"


def cut_samples(path: Path, resume_step: int):
    """Cut samples.txt before the samples of resume_step: the same ones will be drawn again."""
    if not path.exists():
        return
    head = rf"^{SAMPLE_HEAD} (\d+), sample".encode()
    for sample in re.finditer(head, path.read_bytes(), re.M):
        if int(sample[1]) >= resume_step:
            os.truncate(path, sample.start())
            return


# --------------------------------------------------------------------------------------------------
# Weights & Biases


class Wandb:
    """Sends records to Weights & Biases from a thread: a slow network delays no run.

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
        """Log what comes through the queue, until None comes (in the thread)."""
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
            project = cfg.wandb_project
            if settings.project and project == type(cfg).wandb_project:  # the default
                project = settings.project
            run = wandb.init(
                project=project,
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
    """Return whether W&B may be wanted: only then is it imported, which takes a second."""
    if any(name.startswith("WANDB_") for name in os.environ):
        return True
    netrc = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    return os.path.isfile(netrc)


def end_wandb_service():
    """End wandb's own process; at exit it would wait for that, a minute without a network."""
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
