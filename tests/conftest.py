"""Rules for all tests, and what several of them need: data, runs of the scripts, faults."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

# before torch is imported: at tiny sizes a second thread only waits
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
STRICT = os.environ.get("STRICT") == "1"
# reasons to skip a test that are no failure under STRICT=1: a stranger's machine may lack these
MAY_BE_MISSING = ("GPU", "beside the repository", "strace", "loop mounts", "without LaTeX")

# the same examples each time, and no example fails because it was slow
hypothesis.settings.register_profile("repository", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repository")

# starts processes that have imported the scripts already, within 0.1 s
FORKSERVER = multiprocessing.get_context("forkserver")
# once for all files: its first process ends the choice
FORKSERVER.set_forkserver_preload(["train_gpt2", "matplotlib.pyplot", "prepare", "pyarrow.parquet"])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """With STRICT=1 a skipped test fails: a green run has run all but what MAY_BE_MISSING names."""
    outcome = yield
    report = outcome.get_result()
    skipped = report.skipped and not hasattr(report, "wasxfail")
    allowed = any(words in str(report.longrepr) for words in MAY_BE_MISSING)
    if STRICT and skipped and not allowed:
        report.outcome = "failed"
        report.longrepr = f"skipped although STRICT=1: {report.longrepr}"


# --------------------------------------------------------------------------------------------------
# data


@pytest.fixture(scope="session")
def shared():
    """The folder of real text beside the repository; not part of it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.exists():
        pytest.skip("no ../shared/data beside the repository")
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The tracked files alone, as after `git clone`."""
    folder = tmp_path_factory.mktemp("clone") / "repo"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        ignored = shutil.ignore_patterns("log", "shakespeare", ".git")
        shutil.copytree(ROOT, folder, ignore=ignored)
        return folder
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def write_shards(
    folder: Path, sizes: dict, seed: int = 0, document: int = 100, ids: int = 50257
) -> Path:
    """Write shards of random tokens, a document about every `document` of them.

    sizes: {"train": [1000, 500], "val": [300]}.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, counts in sizes.items():
        for i, n in enumerate(counts):
            tokens = rng.integers(0, min(ids, 50256), n).astype(np.uint16)
            if ids > 50256:
                tokens[rng.random(n) < 1 / document] = 50256
                tokens[0] = 50256
            np.save(folder / f"data_{split}_{i:06d}.npy", tokens)
    return folder


# --------------------------------------------------------------------------------------------------
# runs of the scripts


def options(*parts) -> list[str]:
    """Return a command line as words: strings are split at spaces, a path or number is one word."""
    words = []
    for part in parts:
        words += part.split() if isinstance(part, str) else [str(part)]
    return words


# settings of a run that takes a second
SMALL = dict(
    n_layer=2,
    n_head=2,
    n_embd=32,
    vocab_size=512,
    T=32,
    B=4,
    total_batch=512,
    val_tokens=1024,
    hellaswag_limit=0,
    n_samples=0,
    log_interval=1,
    wandb="off",
    device="cpu",
    dtype="float32",
    use_compile=False,
)
# the same as options of train_gpt2.py; one that is given again after these overrides
TINY = tuple(options(*(f"--{name} {value}" for name, value in SMALL.items())))


def start_waiting(script: str, path: Path, line: str) -> subprocess.Popen:
    """Start a Python script with a path, which prints a line and then waits for its stdin."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == f"{line}\n"
    return process


# starts scripts under torchrun: what NCCL refuses then fails under gloo, too
STRICT_GROUP = ROOT / "tests" / "strict_group.py"


def torchrun(*args) -> list[str]:
    """Return the command `torchrun args` in whose strict group a script runs (strict_group.py).

    args: torchrun's options, the script, the script's options.
    """
    words = list(map(str, args))
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    words.insert(script, str(STRICT_GROUP))
    return [sys.executable, "-m", "torch.distributed.run", *words]


def python(*args, nproc: int = 0) -> list[str]:
    """Return the command `python args`, or with nproc torchrun's for so many gloo ranks."""
    if nproc:
        return torchrun("--standalone", f"--nproc_per_node={nproc}", *args)
    return [sys.executable, *map(str, args)]


def run(
    *args, nproc: int = 0, env: dict | None = None, timeout: int = 300, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """Run `python args`, or torchrun with nproc ranks, as a user would; output as text."""
    return subprocess.run(
        python(*args, nproc=nproc),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
    )


@pytest.fixture
def train_here(monkeypatch, capsys):
    """train_here(*options) runs train_gpt2.py in this process: exit status, what it printed.

    Whatever happens there, the signal handlers are afterwards what they were.
    """
    import train_gpt2
    from runtime.stop import SIGNALS

    def train(*parts) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *options(*parts)])
        handlers = [signal.getsignal(number) for number in SIGNALS]
        status = 0
        try:
            train_gpt2.main()
        except SystemExit as e:
            status = e.code
        finally:
            assert handlers == [signal.getsignal(number) for number in SIGNALS]
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return train


@pytest.fixture(scope="session")
def fake_gpu(tmp_path_factory):
    """fake_gpu(script, *args) returns what a script of tests/fake_gpu prints on its fake GPU."""
    sys.path.append(str(ROOT / "tests" / "fake_gpu"))
    import guard

    if guard.missing():
        pytest.skip(guard.missing())
    library = tmp_path_factory.mktemp("fake_gpu") / "guard.so"
    guard.build_guard(library)
    return partial(guard.run_with_guard, library)


@pytest.fixture
def fast_curves(monkeypatch):
    """Leave an empty curves.png instead of drawing it at each evaluation, 0.2 s each time."""
    import compare

    monkeypatch.setattr(compare, "curves", lambda run_dir: (run_dir / "curves.png").touch())


def train_process(argv: list[str], output: str, threads: int):
    """Run train_gpt2.py in this process, forked from one that has imported torch: see `launch`."""
    import torch

    import train_gpt2
    from runtime.command_line import run_script

    with open(output, "a") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    torch.set_num_threads(threads)
    sys.argv = ["train_gpt2.py", *argv]
    run_script(train_gpt2.main)


def wait_at_the_save(argv: list[str], output: str, pipe):
    """Train; the thread that saves sends its number and waits for an answer (a process)."""
    from runtime import checkpoint

    init = checkpoint.Saver.__init__

    def announce(saver, *args):
        init(saver, *args)
        pipe.send(saver.thread.submit(threading.get_native_id).result())
        pipe.recv()

    checkpoint.Saver.__init__ = announce
    train_process(argv, output, threads=1)


def wait_at_the_start(argv: list[str], output: str, pipe):
    """Train; the main thread sends its number first and waits for an answer (a process)."""
    pipe.send(threading.get_native_id())
    pipe.recv()
    train_process(argv, output, threads=1)


@pytest.fixture(scope="session")
def launch():
    """launch(argv, output) starts a training process within 0.1 s instead of 3.

    It takes real signals and really dies.
    """

    def start(argv, output, threads=1):
        arguments = (options(*argv), str(output), threads)
        process = FORKSERVER.Process(target=train_process, args=arguments)
        process.start()
        return process

    return start


# --------------------------------------------------------------------------------------------------
# what a run has left


def decisive(records: list[dict]) -> dict[str, list[tuple]]:
    """Return what decides whether two runs are equal; no step may stand there twice.

    Losses, rates, norms and batch hashes by step, and validation losses.
    """
    keys = ("step", "train/loss", "train/lr", "train/norm", "batch_hash")
    train = [tuple(r.get(key) for key in keys) for r in records if "train/loss" in r]
    val = [(r["step"], r["val/loss"]) for r in records if "val/loss" in r]
    first, last = train[0][0], train[-1][0]
    assert [step for step, *_ in train] == list(range(first, last + 1))
    assert len(dict(val)) == len(val)
    return {"train": train, "val": val}


def files(folder: Path) -> dict[Path, bytes]:
    """Return the content of every file in a folder, to see later that nothing was touched."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(run_dir: Path, step: int | None = None) -> dict[str, str]:
    """Return the SHA-256 of the weights and of the optimizer's moments at a step; or the newest."""
    from runtime import checkpoint

    paths = checkpoint.steps(run_dir / "ckpt")
    path = paths[-1] if step is None else run_dir / "ckpt" / f"step_{step:06d}"
    return checkpoint.read(path).state["sha256"]


def lose_the_end(run_dir: Path):
    """Leave the oldest checkpoint alone: the run has finished before all faults have come."""
    from runtime import checkpoint

    (run_dir / "finished.json").unlink()
    for path in checkpoint.steps(run_dir / "ckpt")[1:]:
        shutil.rmtree(path)


# --------------------------------------------------------------------------------------------------
# faults


@contextmanager
def at_step(act, only: int | None = None):
    """Inside the block, call act(step) whenever a training step begins; `step` updates are done.

    With `only`, at that step alone.
    """
    import optim

    learning_rate = optim.learning_rate

    def act_first(cfg, step):
        if only is None or step == only:
            act(step)
        return learning_rate(cfg, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "learning_rate", act_first)
        yield


@contextmanager
def poisoned(steps, value: float = float("nan")):
    """Inside the block, the first micro-batch of the updates with these numbers has a bad loss.

    Its loss is multiplied by NaN or infinity.
    """
    import torch

    from model import GPT

    forward, due = GPT.forward, set()

    def begin(step):
        if step + 1 in steps:
            due.add(step)

    def bad_forward(model, idx, *args):
        loss = forward(model, idx, *args)
        if due and torch.is_grad_enabled():
            due.clear()
            return loss * value
        return loss

    with at_step(begin), pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "forward", bad_forward)
        yield
