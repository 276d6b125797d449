"""Rules for all tests, and the small things that several of them need."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported: at tiny sizes a second thread only waits

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
STRICT = os.environ.get("STRICT") == "1"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """With STRICT=1 a skipped test is a failure, unless it needs a GPU: a green run has then run everything."""
    outcome = yield
    report = outcome.get_result()
    if (
        STRICT
        and report.skipped
        and not hasattr(report, "wasxfail")
        and "GPU" not in str(report.longrepr)
    ):
        report.outcome, report.longrepr = "failed", f"skipped although STRICT=1: {report.longrepr}"


@pytest.fixture(scope="session")
def shared():
    """The folder of real text beside the repository; not part of it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.exists():
        pytest.skip("no ../shared/data beside the repository")
    return folder


def write_shards(
    folder: Path, sizes: dict, seed: int = 0, document: int = 100, ids: int = 50257
) -> Path:
    """Shards of random tokens: {"train": [1000, 500], "val": [300]}, a document about every `document` tokens."""
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


def run(
    *args, nproc: int = 0, env: dict | None = None, timeout: int = 300, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """`python args`, or torchrun with nproc gloo ranks, as a user would; output captured as text."""
    launch = [sys.executable] + (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        if nproc
        else []
    )
    return subprocess.run(
        [*launch, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
    )


TINY = (
    "--n_layer",
    "2",
    "--n_head",
    "2",
    "--n_embd",
    "32",
    "--T",
    "32",
    "--B",
    "4",
    "--total_batch",
    "512",
    "--val_tokens",
    "1024",
    "--hellaswag_limit",
    "0",
    "--n_samples",
    "0",
    "--use_compile",
    "False",
    "--wandb",
    "off",
    "--log_interval",
    "1",
    "--device",
    "cpu",
    "--vocab_size",
    "512",
    "--dtype",
    "float32",
)


def train_process(argv: list, output: str, threads: int = 1):
    """train_gpt2.py in a process of its own, forked from one that has imported torch already: see `launch`."""
    import torch

    import train_gpt2
    from config import command_line

    with open(output, "a") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    torch.set_num_threads(threads)
    sys.argv = ["train_gpt2.py", *map(str, argv)]
    command_line(train_gpt2.main)


@pytest.fixture(scope="session")
def launch():
    """launch(argv, output) starts a training process within 0.1 s instead of 3; it takes real signals and really dies."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_gpt2", "matplotlib.pyplot"])

    def go(argv, output, threads=1):
        process = context.Process(target=train_process, args=(argv, str(output), threads))
        process.start()
        return process

    return go
