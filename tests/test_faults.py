"""python -m pytest tests/test_faults.py : interrupted, killed, corrupted, starved.

A run loses nothing and changes nothing. Faults come at the beginning of a chosen training step
(conftest.at_step) or in a chosen loss (conftest.poisoned).
"""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
import types
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    FORKSERVER,
    ROOT,
    TINY,
    at_step,
    decisive,
    files,
    lose_the_end,
    options,
    poisoned,
    python,
    run,
    torchrun,
    wait_at_the_save,
    wait_at_the_start,
    weights,
    write_shards,
)
from test_shard_files import flip, with_manifest

import compare
import hf
import optim
import records as records_of_a_run
import shard_files
import shards
from model import GPT
from runtime import checkpoint, runlog
from runtime.command_line import UserError
from runtime.files import sha256, write_json
from runtime.runlog import read_metrics
from runtime.stop import Diverged, Stop, Stopped
from runtime.world import World


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """360 windows of 32 tokens: 30 steps of 12 windows are an epoch."""
    folder = tmp_path_factory.mktemp("data")
    return write_shards(folder, {"train": [4033, 3489, 4001], "val": [1100]}, ids=512)


@pytest.fixture(scope="module")
def command(data):
    """60 steps of three micro-batches each, two epochs."""
    return options(
        "gpt2-rope",
        *TINY,
        "--total_batch 384 --max_steps 60 --max_lr 1e-2 --eval_interval 20",
        "--sample_interval 1000 --batch_hashes True --data_root",
        data,
    )


@pytest.fixture
def train(command, tmp_path, train_here, fast_curves):
    """train(name, *changes) runs the script in this process; (exit status, what it printed)."""

    def train(name, *changes):
        return train_here(*command, "--log_dir", tmp_path, "--run_name", name, *changes)

    return train


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory, launch):
    """The run that nothing interrupts, with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("whole")
    output = folder / "out.txt"
    changes = options("--log_dir", folder, "--run_name r --save_interval 1 --keep_last 60")
    process = launch([*command, *changes], output)
    process.join()
    assert process.exitcode == 0, output.read_text()
    return folder / "r"


def records(run_dir: Path) -> dict:
    return decisive(read_metrics(run_dir))


def losses(run_dir: Path) -> list[float]:
    """Return the losses of the updates that were made."""
    return [loss for _, loss, *_ in records(run_dir)["train"] if loss is not None]


def assert_equal(run_dir: Path, expected: Path):
    """Compare every loss, rate, norm and batch, and the hashes of the last weights and moments."""
    assert records(run_dir) == records(expected)
    assert weights(run_dir) == weights(expected)


def saved_steps(run_dir: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.steps(run_dir / "ckpt")]


def crashed_copy(whole: Path, run_dir: Path, step: int) -> Path:
    """Copy a run as a crash leaves it: its checkpoint at `step`, and some lines of log beyond."""
    name = f"step_{step:06d}"
    shutil.copytree(whole / "ckpt" / name, run_dir / "ckpt" / name)
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    beyond = next(i for i, line in enumerate(lines) if json.loads(line)["step"] > step)
    (run_dir / "metrics.jsonl").write_text("".join(lines[: beyond + 2]) + '{"step": 9')
    return run_dir


def send(number: int, step: int | None = None):
    """Send this process a signal."""
    os.kill(os.getpid(), number)


# --------------------------------------------------------------------------------------------------
# resuming


@pytest.mark.slow
def test_resume_at_every_step(whole, train, tmp_path):
    """60 of 60: everything equals the uninterrupted run."""
    for step in range(1, 60):
        run_dir = crashed_copy(whole, tmp_path / f"r{step}", step)
        status, out = train(run_dir.name)
        assert status == 0 and f"resume | step {step} from" in out
        assert_equal(run_dir, whole)
        shutil.rmtree(run_dir)
    run_dir = crashed_copy(
        whole, tmp_path / "r60", 59
    )  # and at 60: done but for the last evaluation
    shutil.copytree(whole / "ckpt" / "step_000060", run_dir / "ckpt" / "step_000060")
    shutil.copy(whole / "metrics.jsonl", run_dir)
    assert train("r60")[0] == 0
    assert_equal(run_dir, whole)


def test_without_a_moment_it_would_differ(whole, train, tmp_path, monkeypatch):
    """A negative control of the test above: one of AdamW's averages is lost."""
    restore = checkpoint.restore

    def forgetful(path, model, optimizer):
        restore(path, model, optimizer)
        next(iter(optimizer.state.values()))["exp_avg"].zero_()

    monkeypatch.setattr(checkpoint, "restore", forgetful)
    run_dir = crashed_copy(whole, tmp_path / "r", 31)
    assert train("r")[0] == 0
    assert weights(run_dir) != weights(whole) and records(run_dir) != records(whole)


def test_with_the_next_batch_it_would_differ(whole, train, tmp_path, monkeypatch):
    """A negative control: the data begin one step too late."""
    loader = shards.Loader

    def shifted(windows, total_batch, B, world, start_step, *more):
        return loader(windows, total_batch, B, world, start_step + 1, *more)

    monkeypatch.setattr(shards, "Loader", shifted)
    run_dir = crashed_copy(whole, tmp_path / "r", 31)
    assert train("r")[0] == 0
    assert weights(run_dir) != weights(whole) and records(run_dir) != records(whole)


def test_interrupted_by_each_signal_several_times(whole, train, tmp_path, monkeypatch):
    """Twice within an epoch, at its edge, and in the second: checkpoint, status 75, one line.

    The end is the same. Lines that were not due yet are written, too.
    """
    # under nohup SIGHUP would be left ignored
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    signals = {7: "SIGTERM", 13: "SIGINT", 30: "SIGUSR1", 31: "SIGHUP"}
    for step, name in signals.items():
        number = signal.Signals[name]
        with at_step(partial(send, number), only=step):
            status, out = train("r", "--log_interval 5")
        line = f"interrupted by {name} at step {step}; to resume: the same command again"
        assert status == 75 and line in out
        assert saved_steps(tmp_path / "r")[-1] == step
        assert (tmp_path / "r" / "curves.png").exists()
        assert not (tmp_path / "r" / "finished.json").exists()
    assert train("r")[0] == 0
    assert_equal(tmp_path / "r", whole)
    assert json.loads((tmp_path / "r" / "finished.json").read_text())["step"] == 60


SAMPLED = "--vocab_size 50304 --n_samples 2 --sample_tokens 12 --sample_interval 10 --max_steps 40"


@pytest.mark.slow
def test_interrupted_in_evaluation_and_sampling(train, tmp_path, monkeypatch):
    """The evaluation at step 20 and the samples at 30 are cut short, and made on resuming.

    No sample stands twice.
    """
    assert train("whole", SAMPLED)[0] == 0
    val_batches, trunk = shards.val_batches, GPT.trunk
    evaluated = []

    def batches(*args):
        for batch in val_batches(*args):
            evaluated.append(batch)
            if len(evaluated) == 8 + 6:  # of eight in each evaluation, the first one at step 0
                send(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(shards, "val_batches", batches)
        status, out = train("parts", SAMPLED)
    assert status == 75 and "at step 20" in out
    assert [step for step, _ in records(tmp_path / "parts")["val"]] == [0]
    drawn = []

    def counted(model, idx, **more):
        if not torch.is_grad_enabled() and idx.shape[0] == 2:  # two samples at once, not the prompt
            drawn.append(idx)
            if len(drawn) == 11 + 2:  # at step 30, after the 11 tokens of step 20
                send(signal.SIGTERM)
        return trunk(model, idx, **more)

    with monkeypatch.context() as patch:
        patch.setattr(GPT, "trunk", counted)
        status, out = train("parts", SAMPLED)
    assert status == 75 and "at step 30" in out
    assert train("parts", SAMPLED)[0] == 0
    assert_equal(tmp_path / "parts", tmp_path / "whole")
    samples = [(tmp_path / name / "samples.txt").read_text() for name in ("parts", "whole")]
    assert samples[0] == samples[1]


@pytest.mark.slow
def test_compiled_on_two_threads_it_resumes_exactly(command, launch, tmp_path):
    """A model large enough for both threads to work on it.

    The compiled gradient of its embedding must not depend on their order.
    """
    size = "--n_embd 64 --vocab_size 8192 --T 64 --total_batch 1024 --B 8 --use_compile True"
    steps = "--max_steps 12 --save_interval 6 --eval_interval 100"
    changes = options(size, steps, "--log_dir", tmp_path)
    for name in ("whole", "parts"):
        output = tmp_path / f"{name}.txt"
        process = launch([*command, *changes, "--run_name", name], output, threads=2)
        process.join()
        assert process.exitcode == 0, output.read_text()
        if name == "whole":
            crashed_copy(tmp_path / "whole", tmp_path / "parts", 6)
    assert "resume | step 6" in (tmp_path / "parts.txt").read_text()
    assert_equal(tmp_path / "parts", tmp_path / "whole")


def random_moment(rng: random.Random, after_saves: bool, output: Path, seen: int, process):
    """Wait for a random moment of a run: in its start, or after one or two of its saves."""
    lines = rb"^step \d+ \| saved" if after_saves else rb"^data \|"
    n = rng.randint(1, 2) if after_saves else 1
    while process.is_alive():
        if len(re.findall(lines, output.read_bytes()[seen:], re.M)) >= n:
            break
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.01 if after_saves else 0.1))


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_ended_five_times_at_random_moments(whole, command, launch, tmp_path, how):
    """A process that saves every other step is killed, or asked to stop: the end is the same.

    The moments lie by turns after a save and between the opening of the data and the first steps.
    """
    rng = random.Random(how)
    run_dir, output = tmp_path / "r", tmp_path / "out.txt"
    output.touch()
    changes = options("--log_dir", tmp_path, "--run_name r --save_interval 2 --keep_last 60")
    ended = 0
    for _ in range(50):
        if ended == 5:
            break
        seen = output.stat().st_size
        process = launch([*command, *changes], output)
        random_moment(rng, ended % 2 == 0, output, seen, process)
        if process.is_alive():
            os.kill(process.pid, getattr(signal, how))
        process.join()
        text = output.read_text()[seen:]
        assert "Traceback" not in text
        if (run_dir / "finished.json").exists():
            lose_the_end(run_dir)
            continue
        ended += 1
        assert process.exitcode == (-9 if how == "SIGKILL" else 75), text
        assert how == "SIGKILL" or "interrupted by SIGTERM" in text
    assert ended == 5
    process = launch([*command, *changes], output)
    process.join()
    assert process.exitcode == 0 and "resume | step" in output.read_text()
    assert_equal(run_dir, whole)


def train_without_polling(ready, handled):
    """Stand for a process that trains and never polls."""
    # a shell's background job would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = Stop(World(0, 1, torch.device("cpu")), 600)
    stop.armed = True
    ready.set()
    while True:
        time.sleep(0.01)
        if stop.reason:
            handled.set()


def test_the_second_ctrl_c_ends_at_once():
    ready, handled = FORKSERVER.Event(), FORKSERVER.Event()
    process = FORKSERVER.Process(target=train_without_polling, args=(ready, handled))
    process.start()
    assert ready.wait(60)
    os.kill(process.pid, signal.SIGINT)
    assert handled.wait(60) and process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == -signal.SIGINT


@pytest.mark.parametrize("lost", [False, True])
def test_a_signal_before_the_first_step_ends_at_once(train, tmp_path, monkeypatch, lost):
    """In the first pass there is nothing to save yet; also when C code loses the exception.

    `from MODULE import NAME` of a name that is not there has raised TypeError in its place.
    """
    forward = GPT.forward

    def interrupted(*args):
        try:
            send(signal.SIGTERM)
        except Stopped:
            if lost:
                raise TypeError("expected a message argument") from None
            raise
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(GPT, "forward", interrupted)
        status, out = train("r")
    assert status == 75 and "before the first step" in out
    assert saved_steps(tmp_path / "r") == []
    assert train("r")[0] == 0


# --------------------------------------------------------------------------------------------------
# several processes


@pytest.mark.slow
def test_one_two_four_and_one_rank(command, tmp_path):
    """1, 2, 4, 1 processes with --deterministic: batches and bits of one process all the way.

    Without the option they differ in the last digits, which is why it is there.
    """
    steps = "--total_batch 512 --max_steps 20 --save_interval 5 --keep_last 9 --deterministic True"
    words = options("train_gpt2.py", *command, steps, "--log_dir", tmp_path)
    one = tmp_path / "one"
    for name, source, step, nproc in (
        ("one", None, 0, 0),
        ("two", "one", 5, 2),
        ("four", "two", 10, 4),
        ("last", "four", 15, 0),
    ):
        if source:
            crashed_copy(tmp_path / source, tmp_path / name, step)
        done = run(*words, "--run_name", name, nproc=nproc)
        assert done.returncode == 0, done.stderr
        assert not source or f"resume | step {step}" in done.stdout
        assert weights(tmp_path / name) == weights(one), name
        assert records(tmp_path / name)["train"] == records(one)["train"]
    plain = tmp_path / "plain"
    run(*words, *options("--run_name plain --deterministic False"), nproc=2)
    hashes = [[r[4] for r in records(run_dir)["train"]] for run_dir in (plain, one)]
    assert hashes[0] == hashes[1]
    assert weights(plain) != weights(one)
    assert losses(plain) == pytest.approx(losses(one), abs=1e-5)


def start_torchrun(output: Path, *args, **env) -> subprocess.Popen:
    """Start torchrun with two ranks, in the background."""
    words = torchrun("--standalone", "--nproc_per_node=2", *args)
    with open(output, "w") as f:
        return subprocess.Popen(
            words, cwd=ROOT, stdout=f, stderr=subprocess.STDOUT, env=os.environ | env
        )


def ranks(launcher) -> list[int]:
    """Return the processes that a torchrun has started, in the order of their ranks."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    pid_of_rank = {}
    for pid in children:
        environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
        for rank in [line for line in environment if line.startswith("RANK=")]:
            pid_of_rank[rank] = int(pid)
    return [pid_of_rank[rank] for rank in sorted(pid_of_rank)]


def wait_for(launcher, output: Path, text: str, times: int = 1, seconds: float = 600) -> float:
    """Wait until a text is in the output so many times; return the seconds that it took."""
    started = time.monotonic()
    while output.read_text().count(text) < times:
        assert launcher.poll() is None and time.monotonic() - started < seconds, output.read_text()
        time.sleep(0.01)
    return time.monotonic() - started


@pytest.mark.slow
def test_torchrun_stopped_killed_and_hung(command, tmp_path):
    """SIGTERM to torchrun, then a rank of two killed, then one hung: the end is the same.

    The hung one is ended by its peer, and training continues, within --group_timeout + 20 s; on a
    slow machine within three times what the first start takes.
    """
    steps = "--total_batch 768 --max_steps 400 --max_lr 1e-3 --eval_interval 500"
    steps += " --save_interval 25 --log_interval 5 --group_timeout 10"
    words = options("train_gpt2.py", *command, steps, "--log_dir", tmp_path)
    alone = run(*words, "--run_name", "whole", nproc=2)
    assert alone.returncode == 0, alone.stderr
    words += ["--run_name", "r"]
    output = tmp_path / "1.txt"
    first = start_torchrun(output, *words)
    soon = max(20, 3 * wait_for(first, output, "step 30/"))
    started = time.monotonic()
    first.send_signal(signal.SIGTERM)
    first.wait()
    assert time.monotonic() - started < soon
    assert "interrupted by SIGTERM at step" in output.read_text()
    output = tmp_path / "2.txt"
    restarts = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    second = start_torchrun(output, "--max-restarts", "3", *words, **restarts)
    wait_for(second, output, "step 150/")
    os.kill(ranks(second)[1], signal.SIGKILL)
    wait_for(second, output, "step 250/")
    os.kill(ranks(second)[1], signal.SIGSTOP)
    assert wait_for(second, output, "resume | step", times=3) < 10 + soon
    assert second.wait() == 0
    text = output.read_text()
    assert "no progress for 10 s" in text and "torchrun | a restart may fail" not in text
    assert_equal(tmp_path / "r", tmp_path / "whole")


@pytest.mark.slow
def test_two_launches_from_two_directories(clone, command, tmp_path):
    """README, "More GPUs, more machines": as near to two machines as one comes.

    Records and checkpoints are in the first directory alone, from which both resume; the end is
    that of two processes of one launch. The file system is the same.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shutil.copytree(clone, tmp_path / "second")
    shutil.copy(ROOT / "tests" / "hellaswag_items.jsonl", clone / "data" / "hellaswag_val.jsonl")
    changes = "--B 3 --vocab_size 50304 --hellaswag_limit 20 --save_interval 20 --keep_last 3"
    words = options("train_gpt2.py", *command, changes, "--run_name r --log_dir log/here")

    def launch_both():
        nodes = []
        for rank, folder in enumerate((clone, tmp_path / "second")):
            address = options("--master_addr=127.0.0.1", f"--master_port={port}")
            places = options("--nproc_per_node=1 --nnodes=2", f"--node_rank={rank}")
            node = subprocess.Popen(
                torchrun(*places, *address, *words),
                cwd=folder,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            nodes.append(node)
        outputs = [node.communicate(timeout=1200)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], outputs
        return outputs[0]

    log = clone / "log" / "here"
    whole = run(*words, nproc=2, cwd=clone)
    assert whole.returncode == 0 and "(20 items, gpt2 protocol)" in whole.stdout, whole.stderr
    (log / "r").rename(log / "whole")
    assert "(20 items, gpt2 protocol)" in launch_both()
    assert not (tmp_path / "second" / "log" / "here").exists()
    shutil.rmtree(log / "r" / "ckpt" / "step_000060")
    (log / "r" / "finished.json").unlink()
    assert "resume | step 40" in launch_both()
    assert_equal(log / "r", log / "whole")


# --------------------------------------------------------------------------------------------------
# damaged and foreign checkpoints


def corrupt(path: Path, rng: random.Random) -> str:
    """Damage a checkpoint in one of the ways in which disks, copies and people do."""
    file = rng.choice(sorted(path.iterdir()))
    raw = bytearray(file.read_bytes())
    place = rng.randrange(len(raw))
    how = rng.choice(
        options("bit bit bit cut zeros longer gone empty swapped half-written renamed")
    )
    if how == "bit":
        raw[place] ^= 1 << rng.randrange(8)
    elif how == "cut":
        raw = raw[:place]
    elif how == "zeros":
        raw[place:] = bytes(len(raw) - place)
    elif how == "longer":
        raw += b"\0"
    elif how == "empty":
        raw = b""
    elif how == "swapped":
        raw = next(f for f in path.iterdir() if f != file).read_bytes()
    file.write_bytes(raw)
    if how == "gone":
        file.unlink()
    elif how == "half-written":
        (path / "state.json").unlink()
    elif how == "renamed":
        path.rename(path.with_name("step_000058"))
    return f"{how} {file.name}"


def test_a_hundred_corruptions_are_all_noticed(whole, tmp_path, capsys):
    """None is loaded, each falls back to the checkpoint before, and says so."""
    rng = random.Random(7)
    for i in range(100):
        ckpt_dir = tmp_path / str(i)
        for name in ("step_000050", "step_000057"):
            shutil.copytree(whole / "ckpt" / name, ckpt_dir / name)
        before = files(ckpt_dir / "step_000057")
        what = corrupt(ckpt_dir / "step_000057", rng)
        if files(ckpt_dir / "step_000057") == before:
            continue  # zeros over zeros
        newest = checkpoint.newest(ckpt_dir)
        assert newest.path.name == "step_000050" and newest.step == 50, what
        printed = capsys.readouterr()
        assert "checkpoint skipped" in printed.err and not printed.out, what


def test_bad_checkpoints_are_skipped_and_kept(whole, train, tmp_path):
    """Damaged, foreign, half-written: none of them is deleted, the newest valid one is resumed."""
    run_dir = crashed_copy(whole, tmp_path / "r", 31)
    ckpt = run_dir / "ckpt"
    train("foreign", "--max_lr 1e-3 --max_steps 59 --save_interval 59")
    shutil.copytree(tmp_path / "foreign" / "ckpt" / "step_000059", ckpt / "step_000059")
    shutil.copytree(whole / "ckpt" / "step_000040", ckpt / "step_000040")
    (ckpt / "step_000040" / "model.safetensors").write_bytes(b"damaged")
    shutil.copytree(whole / "ckpt" / "step_000050", ckpt / ".step_000050.tmp")
    foreign = weights(run_dir, 59)
    status, out = train("r", "--save_interval 10 --keep_last 1")
    assert status == 0 and out.count("checkpoint skipped") == 2
    assert "max_lr 0.001 -> 0.01" in out and "resume | step 31" in out
    assert_equal(run_dir, whole)
    assert checkpoint.read(next(ckpt.glob("passed_over_step_000059_*"))).state["sha256"] == foreign
    damaged = next(ckpt.glob("passed_over_step_000040_*/model.safetensors"))
    assert damaged.read_bytes() == b"damaged"
    assert not list(ckpt.glob(".step*"))


def test_no_silent_start_from_scratch(whole, train, tmp_path):
    """All checkpoints damaged, all gone, an older one asked for: an error, nothing is touched."""
    run_dir = crashed_copy(whole, tmp_path / "r", 31)
    shutil.copy(whole / "config.json", run_dir)
    named = run_dir / "ckpt" / "step_000031"

    def refused(words, *changes):
        before = files(run_dir)
        with pytest.raises(UserError, match=words):
            train("r", *changes)
        assert before == files(run_dir)

    (named / "state.json").write_text("{}")
    refused("no valid checkpoint in")
    shutil.rmtree(run_dir / "ckpt")
    refused("has saved checkpoints, but")
    shutil.copytree(whole / "ckpt", run_dir / "ckpt")
    refused("is not the newest checkpoint of this run", "--resume", named)
    refused(
        r"other settings: max_lr 0.01 -> 0.02, min_lr .*; hint: --run_name r-2 .* "
        "may be resumed with another B, ",
        "--max_lr 2e-2",
    )
    status, _ = train("branch", "--resume", named)
    assert status == 0 and weights(tmp_path / "branch") == weights(whole)
    shutil.rmtree(run_dir)
    status, out = train("branch", "--resume", named)  # as a loop around it would
    assert status == 0 and "is gone, this run has a checkpoint of its own" in out


def test_checkpoints_elsewhere_are_not_mixed_up(whole, train, tmp_path):
    """In a shared --ckpt_dir a new run neither prunes nor resumes another's checkpoints.

    Without its config.json a run does not start from scratch either.
    """
    ckpt = tmp_path / "ckpt"
    named = ckpt / "step_000031"
    shutil.copytree(whole / "ckpt" / "step_000031", named)
    for resume in ("auto", "never"):
        words = "holds checkpoints, but .* no run: another one's.*--resume"
        with pytest.raises(UserError, match=words):
            train("r", "--ckpt_dir", ckpt, "--resume", resume)
    status, out = train("r", "--ckpt_dir", ckpt, "--resume", named)
    assert status == 0 and "resume | step 31" in out
    assert checkpoint.read(ckpt / "step_000060").state["sha256"] == weights(whole)
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    (tmp_path / "r" / "config.json").write_text("")
    with pytest.raises(UserError, match="has saved checkpoints, but"):
        train("r", "--ckpt_dir", tmp_path / "unmounted")
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before


# --------------------------------------------------------------------------------------------------
# each system call of a save

# a run with saves at 3 and 6, of which the first is hit
SHORT = "--total_batch 128 --max_steps 6 --save_interval 3 --eval_interval 6"
CALLS = "openat mkdir rename renameat unlinkat rmdir write fsync ftruncate chmod close"


def tracer_of(thread: int) -> int:
    """Return the process that traces a thread, 0 for none."""
    status = Path(f"/proc/{thread}/status").read_text()
    return int(re.search(r"TracerPid:\s+(\d+)", status)[1])


def traced(argv: list[str], output: Path, *options: str, wait=wait_at_the_save) -> int:
    """Train with strace at the thread that `wait` announces; return the exit status."""
    output.touch()
    ours, theirs = FORKSERVER.Pipe()
    process = FORKSERVER.Process(target=wait, args=(argv, str(output), theirs))
    process.start()
    theirs.close()
    thread = ours.recv()
    strace = subprocess.Popen(["strace", "-qq", "-p", str(thread), *options])
    while not tracer_of(thread) and strace.poll() is None:
        time.sleep(0.001)
    assert strace.poll() is None, "strace cannot attach"
    ours.send("go")
    process.join()
    strace.wait()
    return process.exitcode


@pytest.fixture(scope="module")
def short(command, launch, tmp_path_factory):
    """short(name) is the command of a short run; short.whole the run that nothing hits."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    folder = tmp_path_factory.mktemp("short")

    def short(name: str) -> list[str]:
        return [*command, *options(SHORT, "--log_dir", folder, "--run_name", name)]

    short.folder = folder
    process = launch(short("whole"), folder / "whole.txt")
    process.join()
    assert process.exitcode == 0, (folder / "whole.txt").read_text()
    return short


def system_calls(short, wait, names: str = CALLS) -> list[tuple[str, int]]:
    """Return a thread's system calls: each name, and the how many-th of that name it is.

    Those of the thread that saves up to the end of its first save.
    """
    shutil.rmtree(short.folder / "counted", ignore_errors=True)
    log = short.folder / "calls.txt"
    trace = ["-o", log, "-e", f"trace={names.replace(' ', ',')}"]
    assert traced(short("counted"), short.folder / "c.txt", *trace, wait=wait) == 0
    calls, seen = [], {}
    for line in log.read_text().splitlines():
        name = line.partition("(")[0]
        if name.startswith("---"):  # a signal
            continue
        seen[name] = seen.get(name, 0) + 1
        calls.append((name, seen[name]))
        first_saved = name in ("rename", "renameat") and '/step_000003"' in line.partition(",")[2]
        if first_saved and wait is wait_at_the_save:
            break
    return calls


def assert_survives(short, train_here, call: str, n: int, fault: str, wait=wait_at_the_save):
    """Hit one system call of a thread: afterwards the same command ends as the whole run does."""
    name = f"{call}-{n}-{fault.partition('=')[2]}"
    run_dir, output = short.folder / name, short.folder / f"{name}.txt"
    inject = ["-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={n}"]
    status = traced(short(name), output, *inject, wait=wait)
    text = output.read_text()
    assert status == (-9 if "KILL" in fault else 0) and "Traceback" not in text, (name, text)
    assert fault != "error=ENOSPC" or "NOT saved" in text, (name, text)
    saved = [int(step) for step in re.findall(r"step (\d+) \| saved", text)]
    assert not saved or saved_steps(run_dir)[-1] >= saved[-1], name
    assert train_here(*short(name))[0] == 0, name
    assert_equal(run_dir, short.folder / "whole")
    assert not [path for path in run_dir.rglob(".*")], name
    shutil.rmtree(run_dir)


SAMPLE = [("fsync", 2, "signal=KILL"), ("rename", 1, "signal=KILL"), ("write", 2, "error=ENOSPC")]


@pytest.mark.parametrize("call, n, fault", SAMPLE)
def test_a_fault_in_a_save_loses_nothing(short, train_here, fast_curves, call, n, fault):
    """Killed there, or an error there: what was saved stays, and the end is the same."""
    assert_survives(short, train_here, call, n, fault)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, every", [("signal=KILL", 1), ("error=EIO", 4), ("error=ENOSPC", 4)]
)
def test_a_fault_at_each_system_call_of_a_save_loses_nothing(
    short, train_here, fast_curves, fault, every
):
    """Kills at every call, errors at every fourth."""
    calls = system_calls(short, wait_at_the_save)[::every]
    assert len(calls) > 30 // every
    for call, n in calls:
        assert_survives(short, train_here, call, n, fault)
    print(f"{fault} at {len(calls)} system calls of a save: nothing lost")


@pytest.mark.slow
def test_a_kill_at_system_calls_of_the_main_thread_loses_nothing(short, train_here, fast_curves):
    """It writes the log, the settings and the marks: every third call that changes a file."""
    changing = "mkdir rename renameat unlink unlinkat rmdir write fsync ftruncate"
    calls = system_calls(short, wait_at_the_start, changing)[::3]
    assert len(calls) > 30
    for call, n in calls:
        assert_survives(short, train_here, call, n, "signal=KILL", wait_at_the_start)
    print(f"killed at {len(calls)} system calls of the main thread: nothing lost")


# --------------------------------------------------------------------------------------------------
# disks, logs, W&B


@contextmanager
def full_disk(full):
    """Let the system refuse files above 40 KB in steps for which full(step) is true.

    Each save ends before the next step: it finds the disk as it was when it began.
    """
    save = checkpoint.Saver.save

    def save_and_wait(saver, *args):
        save(saver, *args)
        saver.wait()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(step):
        largest = 40_000 if full(step) else limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))

    try:
        with at_step(limit), pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint.Saver, "save", save_and_wait)
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_failing_save_leaves_the_last_valid_one(whole, train, tmp_path):
    """While the disk is full: reported, tried again at the next interval, and the same end."""
    with full_disk(lambda step: 19 <= step <= 40):
        status, out = train("r", "--save_interval 8 --keep_last 9")
    failed = [step for step in range(61) if f"step {step} | NOT saved" in out]
    assert status == 0 and failed == [24, 32, 40]
    assert "the last checkpoint is step_000016" in out
    assert saved_steps(tmp_path / "r") == [8, 16, 48, 56, 60]
    assert_equal(tmp_path / "r", whole)


def test_a_run_whose_last_save_fails_is_not_finished(whole, train, tmp_path):
    """An error says so; the same command finishes it when there is room again."""
    with full_disk(lambda step: True):
        with pytest.raises(UserError, match="the last checkpoint could not be written"):
            train("r")
    assert not (tmp_path / "r" / "finished.json").exists()
    assert train("r")[0] == 0 and weights(tmp_path / "r") == weights(whole)


def test_a_disk_without_room_is_refused_at_the_start(train, tmp_path, monkeypatch):
    usage = types.SimpleNamespace(total=2000, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    words = r"0.00 GB free, checkpoints need 4 x 0.00 GB; hint: make room"
    with pytest.raises(UserError, match=words):
        train("r")
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


class FailingFile:
    """A file that refuses 40 writes, cuts five short, and is well again."""

    def __init__(self, file):
        self.file = file
        self.writes = 0

    def write(self, data):
        self.writes += 1
        if 20 <= self.writes < 60:
            raise OSError(28, "No space left on device")
        if 60 <= self.writes < 65:
            return self.file.write(data[:5])
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_failing_log_changes_nothing(whole, train, tmp_path, monkeypatch):
    """metrics.jsonl refuses lines for a while, half of one gets through; no curves can be drawn.

    The run ends the same, and the lines are there when the disk is well again.
    """
    open_log = runlog.RunLog.open

    def open_failing(log, *args):
        open_log(log, *args)
        log.file = FailingFile(log.file)

    def draw_nothing(run_dir):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runlog.RunLog, "open", open_failing)
    monkeypatch.setattr(compare, "curves", draw_nothing)
    status, out = train("r")
    assert status == 0 and "metrics.jsonl | not written" in out and "curves | not drawn" in out
    assert_equal(tmp_path / "r", whole)


@pytest.mark.parametrize("name", ["metrics.jsonl", "finished.json"])
def test_a_run_whose_last_records_cannot_be_written_is_not_finished(
    whole, train, tmp_path, monkeypatch, name
):
    """To the end no line of the log, or no mark, can be written: the same command writes them."""

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if name == "metrics.jsonl":
            patch.setattr(runlog, "write_all", fail)
        else:
            patch.setattr(records_of_a_run, "write_json", fail_for(name, fail))
        with pytest.raises(UserError, match="not all of its records .* hint: make room in"):
            train("r")
    assert not (tmp_path / "r" / "finished.json").exists()
    status, out = train("r")
    assert status == 0 and "resume | step 60" in out
    assert_equal(tmp_path / "r", whole)
    assert (tmp_path / "r" / "finished.json").exists()


NO_MARK = """
import os, sys
import records, train_gpt2
from runtime.command_line import run_script

def write_no_mark(path, content):
    if path.name == "finished.json":
        raise OSError(28, "No space left on device")
    write_json(path, content)

def tell(status):
    print(f"rank {os.environ['RANK']} ends with {status}", flush=True)
    leave(status)

leave, os._exit = os._exit, tell
write_json, records.write_json = records.write_json, write_no_mark
try:
    run_script(train_gpt2.main)
except SystemExit as e:
    tell(e.code)
"""


@pytest.mark.slow
def test_a_mark_that_cannot_be_written_ends_all_ranks(command, tmp_path):
    """None ends with status 0: the other one of two machines would leave the loop of its script."""
    (tmp_path / "train.py").write_text(NO_MARK)
    words = options(tmp_path / "train.py", *command, "--max_steps 4 --B 2 --log_dir", tmp_path)
    done = run(*words, nproc=2, env={"PYTHONPATH": str(ROOT)})
    assert "rank 1 ends with 2" in done.stdout and "ends with 0" not in done.stdout, done
    assert "not all of its records could be written" in done.stderr


def fail_for(name: str, fail):
    """Return a write_json that fails for files of this name."""
    return lambda path, content: (fail if path.name == name else write_json)(path, content)


def test_a_console_that_is_gone_stops_nothing():
    code = (
        "import sys; from runtime.command_line import say;"
        "say('1'); sys.stdin.read(); say('2'); say('3'); open('/dev/null'); print(4)"
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(python("-c", code), cwd=ROOT, **pipes)
    process.stdout.readline()
    process.stdout.close()
    process.stdin.close()
    assert process.wait() == 0 and process.stderr.read() == b""


@pytest.mark.parametrize(
    "key, server", [("", ""), ("0" * 40, "http://10.255.255.1"), ("0" * 40, "http://127.0.0.1:9")]
)
def test_wandb_without_key_or_network_delays_nothing(
    whole, train, tmp_path, monkeypatch, key, server
):
    """The start waits for no answer, and the run is the same."""
    for proxy in options("https_proxy HTTPS_PROXY all_proxy ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", server)
    seconds, init, close = [], runlog.Wandb.__init__, runlog.Wandb.close

    def timed(*args):
        started = time.monotonic()
        init(*args)
        seconds.append(time.monotonic() - started)

    monkeypatch.setattr(runlog.Wandb, "__init__", timed)
    monkeypatch.setattr(runlog.Wandb, "close", lambda self, seconds: close(self, 5))
    assert train("r", "--wandb auto")[0] == 0 and seconds[0] < runlog.WANDB_END_SECONDS
    assert_equal(tmp_path / "r", whole)


def test_no_secret_is_written(command, tmp_path):
    """Keys from the environment stand in no file of a run, W&B's own included."""
    pytest.importorskip("wandb")
    secrets = {
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        "HF_TOKEN": "hf_secretsecretsecret",
    }
    changes = options("--max_steps 3 --wandb offline --run_name r --log_dir", tmp_path)
    done = run("train_gpt2.py", *command, *changes, env=secrets)
    assert done.returncode == 0 and "wandb | offline" in done.stdout, done.stderr
    written = files(tmp_path)
    assert any("wandb" in str(path) for path in written)
    for secret in secrets.values():
        assert not [path for path, content in written.items() if secret.encode() in content]
        assert secret not in done.stdout + done.stderr


def test_no_name_leads_out_of_the_directory(whole, tmp_path):
    """A checkpoint that names a file elsewhere is refused."""
    path = shutil.copytree(whole / "ckpt" / "step_000031", tmp_path / "step_000031")
    state = json.loads((path / "state.json").read_text())
    outside = tmp_path / "outside"
    outside.write_text("x")
    for name in ("../outside", str(outside)):
        changed = state | {"sha256": state["sha256"] | {name: sha256(outside)}}
        changed["checksum"] = checkpoint.checksum(changed)
        (path / "state.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="state.json names a file"):
            checkpoint.read(path)


# --------------------------------------------------------------------------------------------------
# data


@pytest.fixture
def root(data, tmp_path, monkeypatch):
    """A copy of the shards, each of which is checked whenever it is read."""
    monkeypatch.setattr(shards, "CHECK_SECONDS", 0)
    return shutil.copytree(data, tmp_path / "data")


def spoil(shard: Path, how: str):
    """Remove a shard, or put another file in its place."""
    if how == "gone":
        shard.unlink()
    else:
        raw = shard.read_bytes()
        new = shard.with_name("new")
        new.write_bytes(raw[:200] + bytes(len(raw) - 200))
        os.replace(new, shard)


@pytest.mark.parametrize(
    "how, words",
    [
        ("replaced", "was replaced or rewritten"),
        ("gone", "cannot be read any more"),
    ],
)
def test_a_shard_that_goes_bad_is_named(whole, root, train, tmp_path, how, words):
    """The run stops; with the shard restored it ends the same.

    It saves what it has learned while the file was only gone; what it may have learned from another
    one is no checkpoint.
    """
    shard = root / "data_train_000001.npy"
    valid = shard.read_bytes()
    with at_step(lambda step: spoil(shard, how), only=12):
        with pytest.raises(UserError, match=f"data_train_000001.npy {words}.*hint"):
            train("r", "--data_root", root)
    assert saved_steps(tmp_path / "r") in ([[12], [13]] if how == "gone" else [[]])
    shard.write_bytes(valid)
    assert train("r", "--data_root", root)[0] == 0
    assert_equal(tmp_path / "r", whole)


def test_what_is_read_of_a_rewritten_shard_is_never_saved(whole, data, train, tmp_path):
    """Even before the next look at the file is due: each save looks first.

    With the shards restored the end is the same, from the last checkpoint before.
    """
    root = shutil.copytree(data, tmp_path / "data")
    valid = {path: path.read_bytes() for path in root.glob("*_train_*")}

    def rewrite():
        for path, raw in valid.items():
            path.write_bytes(raw[:128] + bytes(len(raw) - 128))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "CHECK_SECONDS", 3600)
        with at_step(lambda step: rewrite(), only=12):
            with pytest.raises(UserError, match="was replaced or rewritten since the run began"):
                train("r", "--save_interval 5 --keep_last 9 --data_root", root)
    assert saved_steps(tmp_path / "r") == [5, 10]
    for path, raw in valid.items():
        path.write_bytes(raw)
    status, out = train("r", "--data_root", root)
    assert status == 0 and "resume | step 10" in out
    assert_equal(tmp_path / "r", whole)


def test_nothing_learned_from_a_shard_that_was_damaged_before_stays(
    whole, data, train, tmp_path, monkeypatch
):
    """The comparison with manifest.json ends at step 12: what was saved by then is set aside.

    The run begins again, says so, and its end is the same.
    """
    root = with_manifest(shutil.copytree(data, tmp_path / "data"))
    shard = root / "data_train_000001.npy"
    flip(shard)
    due, scan = threading.Event(), shard_files.scan

    def scan_later(*args, **more):
        due.wait(600)
        return scan(*args, **more)

    def compare_now():
        (comparing,) = [t for t in threading.enumerate() if t.name == "verify"]
        due.set()
        comparing.join()

    monkeypatch.setattr(shard_files, "scan", scan_later)
    monkeypatch.setattr(shard_files, "VERIFY_FIRST", 0)  # small data are compared before step 1
    changes = ["--save_interval", 5, "--keep_last", 9, "--data_root", root]
    with at_step(lambda step: compare_now(), only=12):
        with pytest.raises(UserError, match="data_train_000001.npy is damaged: its SHA-256"):
            train("r", *changes)
    aside = sorted(path.name for path in (tmp_path / "r" / "ckpt").iterdir())
    assert len(aside) == 2
    for step, name in zip((5, 10), aside):
        assert name.startswith(f"passed_over_step_{step:06d}_wrong-data_")
    flip(shard)
    status, out = train("r", *changes)
    assert status == 0 and "had learned from a damaged shard and are set aside: from step 0" in out
    assert_equal(tmp_path / "r", whole)


def test_other_data_are_refused_unless_accepted(whole, root, train, tmp_path):
    crashed_copy(whole, tmp_path / "r", 12)
    spoil(root / "data_train_000001.npy", "replaced")
    words = "is not the data this run began with.*--accept_new_data"
    with pytest.raises(UserError, match=words):
        train("r", "--data_root", root)
    status, out = train("r", "--accept_new_data True --data_root", root)
    assert status == 0 and "with other data than it began with" in out
    assert records(tmp_path / "r")["train"][:12] == records(whole)["train"][:12]
    assert records(tmp_path / "r")["train"][12:] != records(whole)["train"][12:]


def test_a_validation_shard_that_goes_bad(whole, root, train, tmp_path):
    """Noticed in the next evaluation, after its checkpoint."""
    shard = root / "data_val_000000.npy"
    valid = shard.read_bytes()
    with at_step(lambda step: spoil(shard, "gone"), only=15):
        with pytest.raises(UserError, match="data_val_000000.npy cannot be read any more"):
            train("r", "--data_root", root)
    shard.write_bytes(valid)
    status, out = train("r", "--data_root", root)
    assert status == 0 and "resume | step 20" in out
    assert records(tmp_path / "r") == records(whole)


def test_a_bad_validation_set_in_an_evaluation_alone(whole, train, tmp_path):
    root = write_shards(tmp_path / "other", {"train": [4033], "val": [1100]}, ids=50257)
    with pytest.raises(UserError, match="beyond vocab_size 512"):
        train("r", "--eval_only True --init_from", whole, "--data_root", root)


# --------------------------------------------------------------------------------------------------
# losses that are NaN or infinite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_loss_skips_the_step(train, tmp_path, monkeypatch, value):
    """Steps 5 and 6 of 20 equal a run in which these two update nothing.

    Their windows are recorded.
    """
    changes = "--max_steps 20 --log_interval 4"
    step_if_finite, steps = optim.step_if_finite, []

    def step_but_twice(*args):
        if steps[-1] + 1 not in (5, 6):
            step_if_finite(*args)

    with at_step(steps.append), monkeypatch.context() as patch:
        patch.setattr(optim, "step_if_finite", step_but_twice)
        assert train("without", changes)[0] == 0
    with poisoned({5, 6}, value):
        status, out = train("poisoned", changes)
    assert status == 0 and out.count("| skipped, no update") == 2
    lines = {r["step"]: r for r in read_metrics(tmp_path / "poisoned") if "train/loss" in r}
    assert [step for step, r in lines.items() if r["train/loss"] is None] == [5, 6]
    assert [step for step, r in lines.items() if "skipped" in r] == [5, 6]
    assert lines[5]["windows"] == [48, 59] and lines[6]["windows"] == [60, 71]
    assert weights(tmp_path / "poisoned") == weights(tmp_path / "without")
    a, b = records(tmp_path / "poisoned"), records(tmp_path / "without")
    assert a["val"] == b["val"]
    others = [[r for r in run["train"] if r[0] not in (5, 6)] for run in (a, b)]
    assert others[0] == others[1]


def test_many_bad_losses_in_a_row_stop_the_run(train, tmp_path):
    """Each time it is started: no number of restarts carries it to its end.

    Though each leaves a checkpoint in the middle of the bad steps; the last one is before the end.
    """
    words = "4 steps in a row skipped by step 8.*NaN or infinite; hint: a lower --max_lr"
    with poisoned(range(5, 100)):
        for _ in range(3):
            with pytest.raises(Diverged, match=words):
                train("r", "--max_skipped 4 --save_interval 2")
    assert saved_steps(tmp_path / "r")[-1] == 6
    assert not (tmp_path / "r" / "finished.json").exists()
    skipped = [r["step"] for r in read_metrics(tmp_path / "r") if "skipped" in r]
    assert skipped == [5, 6, 7, 8]
    assert train("r", "--max_skipped 4")[0] == 0  # the cause is gone
    # and when good ones follow before the next line is due
    with poisoned(range(5, 9)), pytest.raises(Diverged, match="4 steps in a row"):
        train("s", "--max_skipped 4 --log_interval 10 --save_interval 100")
    # a signal that comes before that line leaves a run that can continue
    with poisoned(range(5, 9)), at_step(lambda _step: signal.raise_signal(signal.SIGTERM), only=8):
        assert train("t", "--max_skipped 4 --log_interval 10 --save_interval 100")[0] == 75
    assert train("t", "--max_skipped 4 --log_interval 10 --save_interval 100")[0] == 0


@pytest.mark.parametrize("save_interval, when", [(2, "before"), (100, "in the last checkpoint")])
def test_moments_that_are_infinite_end_the_run(train, monkeypatch, save_interval, when):
    """Though the loss is finite: such a second moment makes no update at all."""
    optimizers = []
    build = optim.build

    def build_and_keep(*args):
        optimizers.append(build(*args))
        return optimizers[0]

    def spoil(_step):
        next(iter(optimizers[0].state.values()))["exp_avg_sq"].fill_(math.inf)

    monkeypatch.setattr(optim, "build", build_and_keep)
    words = f"exp_avg_sq is NaN or infinite {when}"
    with at_step(spoil, only=5), pytest.raises(Diverged, match=words):
        train("r", "--save_interval", save_interval)


@pytest.mark.parametrize(
    "changes, words",
    [
        ("--max_lr 1e20 --min_lr 0 --eval_interval 1", "the validation loss is nan at step 1"),
        ("--max_lr 1e39 --min_lr 0 --save_interval 1", "weights are NaN or infinite at step 1"),
        ("--max_lr 1e20 --min_lr 0 --max_steps 1", "at step 1"),
    ],
)
def test_an_update_that_makes_nan_ends_the_run(train, tmp_path, changes, words):
    """With a status of its own, without finished.json, and without a checkpoint of such weights."""
    with pytest.raises(Diverged, match=f"{words}.*; hint: a lower --max_lr") as e:
        train("r", "--warmup_steps 0", changes)
    assert e.value.status == 3
    assert not (tmp_path / "r" / "finished.json").exists()
    for path in checkpoint.steps(tmp_path / "r" / "ckpt"):
        model = hf.load_checkpoint(checkpoint.read(path))
        assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    assert "NaN" not in (tmp_path / "r" / "metrics.jsonl").read_text()


def test_torchruns_restart_does_not_repeat_a_run_that_has_diverged(train, tmp_path, monkeypatch):
    """By itself; a person who gives the same command again may have mended something."""
    diverging = ("r", "--warmup_steps 0", "--max_lr 1e20 --min_lr 0")
    for _ in range(2):
        with pytest.raises(Diverged):
            train(*diverging)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="has diverged, restart 1 by torchrun would end the same"):
        train(*diverging)
    assert (tmp_path / "r" / "diverged.json").exists()
    train(*diverging, "--dry_run True")
    # given again, the command removes the mark first: a restart after a crash must find none
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    records_of_a_run.refuse_to_diverge_again(types.SimpleNamespace(run_dir=tmp_path / "r"))
    assert not (tmp_path / "r" / "diverged.json").exists()


POISONED = """
import os, sys
sys.path[:0] = [{tests!r}, {root!r}]
from contextlib import nullcontext
from conftest import poisoned
import train_gpt2
from runtime.command_line import run_script

with poisoned({{5, 6}}) if os.environ.get("RANK", "0") == "0" else nullcontext():
    run_script(train_gpt2.main)
"""


@pytest.mark.slow
def test_one_rank_of_two_with_a_bad_loss(command, tmp_path):
    """Both skip the step and stay alike: the losses are those of one process that had it."""
    script = tmp_path / "poisoned.py"
    script.write_text(POISONED.format(tests=str(ROOT / "tests"), root=str(ROOT)))
    changes = options("--total_batch 512 --max_steps 12 --log_dir", tmp_path)
    for nproc in (0, 2):
        done = run(script, *command, *changes, "--run_name", f"n{nproc}", nproc=nproc)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("skipped, no update") == 2, done.stdout
    one, two = losses(tmp_path / "n0"), losses(tmp_path / "n2")
    assert len(one) == 10 and one == pytest.approx(two, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# saving in the background


def test_saving_by_the_clock(whole, train, tmp_path):
    """By --save_minutes; saved is the state at that step, though training has continued since."""
    changes = "--save_minutes 0.0005 --keep_last 99 --save_interval 1000"
    status, _ = train("r", changes)
    saved = saved_steps(tmp_path / "r")
    assert status == 0 and len(saved) > 1
    for step in saved:
        assert weights(tmp_path / "r", step) == weights(whole, step)
    assert records(tmp_path / "r") == records(whole)


def test_the_best_checkpoint_is_kept(train, tmp_path):
    """A rate so high that the loss rises again: the best checkpoint stays beside the newest."""
    train("r", "--max_lr 1.0 --save_interval 5 --eval_interval 5 --keep_last 2")
    val_losses = dict(records(tmp_path / "r")["val"])
    best = min((step for step in val_losses if step > 0), key=val_losses.get)
    assert saved_steps(tmp_path / "r") == sorted({best, 55, 60})
