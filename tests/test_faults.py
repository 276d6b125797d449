"""python -m pytest tests/test_faults.py : interrupted, killed, corrupted, starved: a run loses nothing and changes nothing."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, run, write_shards
from test_readme import clone  # noqa: F401, a fixture: the tracked files alone

import checkpoint
import distributed
import optim
import runlog
import shards
import train_gpt2
from config import UserError
from model import GPT


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """360 windows of 32 tokens: 30 steps of 12 windows are an epoch."""
    return write_shards(
        tmp_path_factory.mktemp("data"), {"train": [4033, 3489, 4001], "val": [1100]}, ids=512
    )


@pytest.fixture(scope="module")
def flags(data):
    """60 steps of three micro-batches each, two epochs."""
    tiny = list(TINY)
    tiny[tiny.index("--total_batch") + 1] = "384"
    return [
        "gpt2-rope",
        *tiny,
        "--max_steps",
        "60",
        "--max_lr",
        "1e-2",
        "--eval_interval",
        "20",
        "--sample_interval",
        "1000",
        "--data_root",
        str(data),
        "--batch_hashes",
        "True",
    ]


@pytest.fixture
def train(flags, tmp_path, monkeypatch, capsys):
    """train(name, *more) runs the script in this process; (exit status, what it printed). Later flags override."""

    def go(name, *more, log_dir=tmp_path):
        monkeypatch.setattr(
            sys,
            "argv",
            ["train_gpt2.py", *map(str, [*flags, "--log_dir", log_dir, "--run_name", name, *more])],
        )
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            train_gpt2.main()
            status = 0
        except SystemExit as e:
            status = e.code
        assert before == {s: signal.getsignal(s) for s in before}
        return status, capsys.readouterr().out

    return go


def records(run_dir: Path) -> dict:
    """What decides equality: losses, norms, rates and batch hashes by step, and validation losses; no step twice."""
    lines = runlog.read_metrics(run_dir)
    train = [
        (r["step"], r["train/loss"], r["train/lr"], r["train/norm"], r["batch_hash"])
        for r in lines
        if "train/loss" in r
    ]
    val = [(r["step"], r["val/loss"]) for r in lines if "val/loss" in r]
    assert [t[0] for t in train] == list(range(train[0][0], train[-1][0] + 1)) and len(
        dict(val)
    ) == len(val)
    return {"train": train, "val": val}


def weights(run_dir: Path, step: int = 60) -> dict:
    """SHA-256 of the weights and of the optimiser's moments at a step."""
    return checkpoint.read_state(run_dir / "ckpt" / f"step_{step:06d}")["sha256"]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory, launch):
    """The run that nothing interrupts, with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("whole")
    process = launch(
        [
            *flags,
            "--log_dir",
            folder,
            "--run_name",
            "r",
            "--save_interval",
            "1",
            "--keep_last",
            "60",
        ],
        folder / "out.txt",
    )
    process.join()
    assert process.exitcode == 0, (folder / "out.txt").read_text()
    return folder / "r"


def begun(whole: Path, run_dir: Path, step: int) -> Path:
    """A copy of the run as it was when its checkpoint at `step` had just been written, and some lines of log beyond."""
    (run_dir / "ckpt").mkdir(parents=True)
    shutil.copytree(whole / "ckpt" / f"step_{step:06d}", run_dir / "ckpt" / f"step_{step:06d}")
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    beyond = next(i for i, line in enumerate(lines) if json.loads(line)["step"] > step)
    (run_dir / "metrics.jsonl").write_text("".join(lines[: beyond + 2]) + '{"step": 9')
    return run_dir


# ---- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_resume_at_every_step(whole, train, tmp_path, monkeypatch):
    """60 of 60: every loss, rate, norm and batch, and the hash over weights and optimiser, equal the uninterrupted run's."""
    monkeypatch.setattr(runlog, "curves", lambda run_dir: None)
    for step in range(1, 60):
        run_dir = begun(whole, tmp_path / f"r{step}", step)
        status, out = train(run_dir.name)
        assert status == 0 and f"resume | step {step} from" in out
        assert records(run_dir) == records(whole) and weights(run_dir) == weights(whole), step
        shutil.rmtree(run_dir)
    run_dir = begun(whole, tmp_path / "r60", 59)  # and at 60: done but for the last evaluation
    shutil.copytree(whole / "ckpt" / "step_000060", run_dir / "ckpt" / "step_000060")
    shutil.copy(whole / "metrics.jsonl", run_dir)
    assert (
        train("r60")[0] == 0
        and records(run_dir) == records(whole)
        and weights(run_dir) == weights(whole)
    )


def test_without_a_moment_or_with_the_next_batch_it_would_differ(
    whole, train, tmp_path, monkeypatch
):
    """Negative controls of the test above."""
    with monkeypatch.context() as m:
        restore = checkpoint.restore

        def forgetful(path, model, optimizer):
            restore(path, model, optimizer)
            next(iter(optimizer.state.values()))["exp_avg"].zero_()

        m.setattr(checkpoint, "restore", forgetful)
        assert train(begun(whole, tmp_path / "moment", 31).name)[0] == 0
    with monkeypatch.context() as m:
        loader = shards.Loader
        m.setattr(shards, "Loader", lambda *args: loader(*args[:6], args[6] + 1, *args[7:]))
        assert train(begun(whole, tmp_path / "shifted", 31).name)[0] == 0
    for name in ("moment", "shifted"):
        assert weights(tmp_path / name) != weights(whole) and records(tmp_path / name) != records(
            whole
        )


def signal_at(monkeypatch, steps: dict):
    """Send this process a signal when it begins a step: {step: signal}."""
    plain = optim.cosine

    def cosine(step, *rest):
        if (number := steps.pop(step, None)) is not None:
            os.kill(os.getpid(), number)
        return plain(step, *rest)

    monkeypatch.setattr(train_gpt2.optim, "cosine", cosine)


def test_interrupted_by_each_signal_several_times(whole, train, tmp_path, monkeypatch):
    """Twice within an epoch, at its edge, and in the second: a checkpoint, status 75, one line; the end is the same."""
    monkeypatch.setattr(
        signal, "getsignal", lambda number: signal.SIG_DFL
    )  # under nohup SIGHUP would be left ignored
    signal_at(
        monkeypatch, {7: signal.SIGTERM, 13: signal.SIGINT, 30: signal.SIGUSR1, 31: signal.SIGHUP}
    )
    for step, name in ((7, "SIGTERM"), (13, "SIGINT"), (30, "SIGUSR1"), (31, "SIGHUP")):
        status, out = train(
            "r", "--log_interval", "5"
        )  # lines that were not due yet are written, too
        assert (
            status == 75
            and f"interrupted by {name} at step {step}; to go on: the same command again" in out
        )
        assert (
            checkpoint.steps(tmp_path / "r" / "ckpt")[-1].name == f"step_{step:06d}"
            and (tmp_path / "r" / "curves.png").exists()
        )
        assert not (tmp_path / "r" / "finished.json").exists()
    assert train("r")[0] == 0
    assert records(tmp_path / "r") == records(whole) and weights(tmp_path / "r") == weights(whole)
    assert json.loads((tmp_path / "r" / "finished.json").read_text())["step"] == 60


@pytest.mark.slow
def test_interrupted_in_evaluation_and_sampling(whole, train, tmp_path, monkeypatch):
    """The evaluation at step 20 and the samples at 30 are cut short, and done when the run goes on; no sample stands twice."""
    more = [
        "--vocab_size",
        "50304",
        "--n_samples",
        "2",
        "--sample_tokens",
        "12",
        "--sample_interval",
        "10",
        "--max_steps",
        "40",
    ]
    assert train("whole", *more)[0] == 0
    calls, val_batches, trunk = [0], shards.val_batches, GPT.trunk

    def batches(*args):
        for i, batch in enumerate(val_batches(*args)):
            if (calls.append(0), len(calls))[1] == 1 + 3 * 9 // 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as m:
        m.setattr(shards, "val_batches", batches)
        status, out = train("parts", *more)
    assert (
        status == 75
        and "at step 20" in out
        and [s for s, _ in records(tmp_path / "parts")["val"]] == [0]
    )
    drawn = [0]

    def count(model, idx, **more):
        if not torch.is_grad_enabled() and idx.shape[0] == 2:
            drawn[0] += 1
            if (
                drawn[0] == 11 + 2
            ):  # the third token at step 30; the first comes from the prompt, one row
                os.kill(os.getpid(), signal.SIGTERM)
        return trunk(model, idx, **more)

    with monkeypatch.context() as m:
        m.setattr(GPT, "trunk", count)
        status, out = train("parts", *more)
    assert status == 75 and "at step 30" in out
    assert train("parts", *more)[0] == 0
    assert records(tmp_path / "parts") == records(tmp_path / "whole") and weights(
        tmp_path / "parts", 40
    ) == weights(tmp_path / "whole", 40)
    assert (tmp_path / "parts" / "samples.txt").read_text() == (
        tmp_path / "whole" / "samples.txt"
    ).read_text()


@pytest.mark.slow
def test_compiled_on_two_threads_it_resumes_exactly(flags, launch, tmp_path):
    """A model large enough for both threads to work on it; the compiled gradient of its embedding must not depend on them."""
    args = [
        *flags,
        "--use_compile",
        "True",
        "--n_embd",
        "64",
        "--vocab_size",
        "8192",
        "--T",
        "64",
        "--total_batch",
        "1024",
        "--B",
        "8",
        "--max_steps",
        "12",
        "--save_interval",
        "6",
        "--eval_interval",
        "100",
        "--log_dir",
        tmp_path,
    ]
    for name in ("whole", "parts"):
        process = launch([*args, "--run_name", name], tmp_path / f"{name}.txt", threads=2)
        process.join()
        assert process.exitcode == 0, (tmp_path / f"{name}.txt").read_text()
        if name == "whole":
            begun(tmp_path / "whole", tmp_path / "parts", 6)
    assert "resume | step 6" in (tmp_path / "parts.txt").read_text()
    assert records(tmp_path / "parts") == records(tmp_path / "whole") and weights(
        tmp_path / "parts", 12
    ) == weights(tmp_path / "whole", 12)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_ended_ten_times_at_random_moments(whole, flags, launch, tmp_path, how):
    """Of a process that saves every other step. Killed or asked to stop, the end is the same."""
    rng, ended, out = random.Random(how), 0, tmp_path / "out.txt"
    args = [*flags, "--log_dir", tmp_path, "--run_name", "r", "--save_interval", "2"]
    while True:
        seen = out.stat().st_size if out.exists() else 0
        process = launch(args, out)
        if ended < 10:
            while (
                process.is_alive()
                and b"data |" not in (out.read_bytes() if out.exists() else b"")[seen:]
            ):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.2))
            os.kill(process.pid, getattr(signal, how)) if process.is_alive() else None
        process.join()
        text = out.read_text()[seen:]
        if process.exitcode == 0:
            break
        assert process.exitcode == (-9 if how == "SIGKILL" else 75), text
        assert "Traceback" not in text and (how == "SIGKILL" or "interrupted by SIGTERM" in text)
        ended += 1
    assert ended == 10, "finished too early to be interrupted ten times"
    assert records(tmp_path / "r") == records(whole) and weights(tmp_path / "r") == weights(whole)


def busy(ready):
    """Trains and never polls."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job would ignore it
    stop = distributed.Stop(distributed.World(0, 1, torch.device("cpu")), 600)
    stop.armed = True
    ready.set()
    while True:
        time.sleep(0.01)


def test_the_second_ctrl_c_ends_at_once():
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=busy, args=(ready := context.Event(),))
    process.start()
    assert ready.wait(60)
    for alive in (True, False):
        os.kill(process.pid, signal.SIGINT)
        process.join(1)
        assert process.is_alive() == alive
    assert process.exitcode == -signal.SIGINT


def test_a_signal_before_the_first_step_ends_at_once(train, tmp_path, monkeypatch):
    """In the warm-up there is nothing to save yet."""
    forward = GPT.forward

    def first(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return forward(*args)

    with monkeypatch.context() as m:
        m.setattr(GPT, "forward", first)
        status, out = train("r")
    assert (
        status == 75
        and "before the first step" in out
        and not checkpoint.steps(tmp_path / "r" / "ckpt")
    )
    assert train("r")[0] == 0


# ---- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_two_four_and_one_rank(flags, data, tmp_path):
    """1 -> 2 -> 4 -> 1 processes with --deterministic: the batches and the bits of one process all the way."""
    args = [
        "train_gpt2.py",
        *flags,
        "--total_batch",
        "512",
        "--max_steps",
        "20",
        "--save_interval",
        "5",
        "--keep_last",
        "9",
        "--deterministic",
        "True",
        "--log_dir",
        tmp_path,
    ]
    for name, source, step, nproc in (
        ("one", None, 0, 0),
        ("two", "one", 5, 2),
        ("four", "two", 10, 4),
        ("last", "four", 15, 0),
    ):
        if source:
            begun(tmp_path / source, tmp_path / name, step)
        done = run(*args, "--run_name", name, nproc=nproc)
        assert done.returncode == 0 and (not source or f"resume | step {step}" in done.stdout), (
            done.stderr
        )
        assert weights(tmp_path / name, 20) == weights(tmp_path / "one", 20), name
        assert records(tmp_path / name)["train"] == records(tmp_path / "one")["train"]
    done = run(
        *args, "--run_name", "plain", "--deterministic", "False", nproc=2
    )  # why the option is there
    assert [r[4] for r in records(tmp_path / "plain")["train"]] == [
        r[4] for r in records(tmp_path / "one")["train"]
    ]
    assert weights(tmp_path / "plain", 20) != weights(tmp_path / "one", 20)
    assert [r[1] for r in records(tmp_path / "plain")["train"]] == pytest.approx(
        [r[1] for r in records(tmp_path / "one")["train"]], abs=1e-5
    )


def torchrun(output: Path, *args, **env):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            *map(str, args),
        ],
        cwd=ROOT,
        stdout=open(output, "w"),
        stderr=subprocess.STDOUT,
        env=os.environ | env,
    )


def ranks(launcher) -> list[int]:
    """The processes that a torchrun has started, in the order of their ranks."""
    path = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    found = [
        (Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"), int(pid))
        for pid in path.read_text().split()
    ]
    found = [(next((e for e in env if e.startswith(b"RANK=")), None), pid) for env, pid in found]
    return [pid for rank, pid in sorted(f for f in found if f[0])]


def wait_for(launcher, output: Path, true, seconds: float = 90) -> float:
    """Seconds until the output is as wanted."""
    t0 = time.monotonic()
    while not true(output.read_text()):
        assert launcher.poll() is None and time.monotonic() - t0 < seconds, output.read_text()
        time.sleep(0.01)
    return time.monotonic() - t0


@pytest.mark.slow
def test_torchrun_stopped_killed_and_hung(flags, tmp_path):
    """Two ranks: SIGTERM to torchrun, then a rank killed, then a rank hung: the end is that of the run left alone.

    The hung one is ended by its peer, and training goes on, within --group_timeout + 20 s.
    """
    args = [
        "train_gpt2.py",
        *flags,
        "--total_batch",
        "768",
        "--max_steps",
        "400",
        "--max_lr",
        "1e-3",
        "--eval_interval",
        "500",
        "--save_interval",
        "25",
        "--group_timeout",
        "10",
        "--log_dir",
        tmp_path,
        "--log_interval",
        "5",
    ]
    alone = run(*args, "--run_name", "whole", nproc=2)
    assert alone.returncode == 0, alone.stderr
    out = tmp_path / "1.txt"
    first = torchrun(out, *args, "--run_name", "r")
    wait_for(first, out, lambda text: "step 30/" in text)
    t0 = time.monotonic()
    first.send_signal(signal.SIGTERM)
    first.wait()
    assert time.monotonic() - t0 < 20 and "interrupted by SIGTERM at step" in out.read_text()
    out = tmp_path / "2.txt"
    second = torchrun(
        out, "--max-restarts", "3", *args, "--run_name", "r", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"
    )
    wait_for(second, out, lambda text: "step 150/" in text)
    os.kill(ranks(second)[1], signal.SIGKILL)
    wait_for(second, out, lambda text: "step 250/" in text)
    os.kill(ranks(second)[1], signal.SIGSTOP)
    assert wait_for(second, out, lambda text: text.count("resume | step") == 3) < 10 + 20
    assert second.wait() == 0 and "no progress for 10 s" in out.read_text()
    assert "torchrun | a restart may fail" not in out.read_text()
    assert records(tmp_path / "r") == records(tmp_path / "whole") and weights(
        tmp_path / "r", 400
    ) == weights(tmp_path / "whole", 400)


@pytest.mark.slow
def test_two_launches_from_two_directories(clone, flags, tmp_path):  # noqa: F811
    """README, "More GPUs, more machines": records and checkpoints are in the first alone, from which both go on; the end is
    that of two processes of one launch. As near to two machines as one comes: the file system is the same.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shutil.copytree(clone, tmp_path / "second")
    shutil.copy(ROOT / "tests" / "hellaswag_items.jsonl", clone / "data" / "hellaswag_val.jsonl")
    own = [
        *flags,
        "--B",
        "3",
        "--vocab_size",
        "50304",
        "--hellaswag_limit",
        "20",
        "--run_name",
        "r",
        "--log_dir",
        "log/here",
        "--save_interval",
        "20",
        "--keep_last",
        "3",
    ]

    def both(*more):
        nodes = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nproc_per_node=1",
                    "--nnodes=2",
                    f"--node_rank={rank}",
                    "--master_addr=127.0.0.1",
                    f"--master_port={port}",
                    "train_gpt2.py",
                    *own,
                    *more,
                ],
                cwd=folder,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank, folder in enumerate((clone, tmp_path / "second"))
        ]
        said = [node.communicate(timeout=180)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], said
        return said[0]

    whole = run("train_gpt2.py", *own, nproc=2, cwd=clone)
    assert whole.returncode == 0 and "(20 items, gpt2 protocol)" in whole.stdout, whole.stderr
    (clone / "log" / "here" / "r").rename(clone / "log" / "here" / "whole")
    assert "(20 items, gpt2 protocol)" in both()
    assert not (tmp_path / "second" / "log" / "here").exists()
    shutil.rmtree(clone / "log" / "here" / "r" / "ckpt" / "step_000060")
    (clone / "log" / "here" / "r" / "finished.json").unlink()
    assert "resume | step 40" in both()
    assert weights(clone / "log" / "here" / "r", 60) == weights(
        clone / "log" / "here" / "whole", 60
    )
    assert records(clone / "log" / "here" / "r") == records(clone / "log" / "here" / "whole")


# ---- checkpoints that are no good ----------------------------------------------------------------------------------


def corrupt(path: Path, rng: random.Random) -> str:
    """Damage a checkpoint in one of the ways in which disks, copies and people do."""
    file = rng.choice(sorted(path.iterdir()))
    raw = bytearray(file.read_bytes())
    at = rng.randrange(len(raw))
    how = rng.choice(
        [
            "bit",
            "bit",
            "bit",
            "cut",
            "zeros",
            "longer",
            "gone",
            "empty",
            "swapped",
            "half-written",
            "renamed",
        ]
    )
    if how == "bit":
        raw[at] ^= 1 << rng.randrange(8)
    elif how == "cut":
        raw = raw[:at]
    elif how == "zeros":
        raw[at:] = bytes(len(raw) - at)
    elif how == "longer":
        raw += b"\0"
    elif how == "swapped":
        raw = bytearray(next(f for f in path.iterdir() if f != file).read_bytes())
    file.write_bytes(b"" if how == "empty" else raw)
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
        for step in (50, 57):
            shutil.copytree(whole / "ckpt" / f"step_{step:06d}", ckpt_dir / f"step_{step:06d}")
        before = {f: f.read_bytes() for f in (ckpt_dir / "step_000057").iterdir()}
        what = corrupt(ckpt_dir / "step_000057", rng)
        if all(f.exists() and f.read_bytes() == raw for f, raw in before.items()):
            continue  # zeros over zeros
        found, state = checkpoint.newest(ckpt_dir)
        assert found.name == "step_000050" and state["step"] == 50, what
        assert "checkpoint passed over" in capsys.readouterr().out, what


def test_bad_checkpoints_are_passed_over_and_kept(whole, train, tmp_path):
    """Damaged, foreign, half-written: training goes on from the newest good one, deletes none of them, ends the same."""
    run_dir = begun(whole, tmp_path / "r", 31)
    ckpt = run_dir / "ckpt"
    train("foreign", "--max_lr", "1e-3", "--max_steps", "59", "--save_interval", "59")
    shutil.copytree(tmp_path / "foreign" / "ckpt" / "step_000059", ckpt / "step_000059")
    shutil.copytree(whole / "ckpt" / "step_000040", ckpt / "step_000040")
    (ckpt / "step_000040" / "model.safetensors").write_bytes(b"damaged")
    shutil.copytree(whole / "ckpt" / "step_000050", ckpt / ".step_000050.tmp")
    foreign = weights(run_dir, 59)
    status, out = train("r", "--save_interval", "10", "--keep_last", "1")
    assert (
        status == 0
        and out.count("passed over") == 2
        and "max_lr 0.001 -> 0.01" in out
        and "resume | step 31" in out
    )
    assert records(run_dir) == records(whole) and weights(run_dir) == weights(whole)
    assert checkpoint.read_state(next(ckpt.glob("passed_over_step_000059_*")))["sha256"] == foreign
    assert next(ckpt.glob("passed_over_step_000040_*/model.safetensors")).read_bytes() == b"damaged"
    assert not list(ckpt.glob(".step*"))


def test_no_silent_start_from_scratch(whole, train, tmp_path):
    """All checkpoints damaged, gone, or of a run with other settings; an older one asked for: an error, nothing touched."""
    run_dir = begun(whole, tmp_path / "r", 31)
    shutil.copy(whole / "config.json", run_dir)
    for spoil, words in (
        (
            lambda: (run_dir / "ckpt" / "step_000031" / "state.json").write_text("{}"),
            "no good checkpoint in",
        ),
        (lambda: shutil.rmtree(run_dir / "ckpt"), "has saved checkpoints, but"),
        (
            lambda: shutil.copytree(whole / "ckpt", run_dir / "ckpt"),
            "is not the newest checkpoint of this run",
        ),
    ):
        spoil()
        before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
        with pytest.raises(UserError, match=words):
            train(
                "r", *(["--resume", run_dir / "ckpt" / "step_000031"] if "newest" in words else [])
            )
        assert before == {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    with pytest.raises(
        UserError,
        match=r"other settings: max_lr 0.01 -> 0.02, min_lr .*; hint: --run_name r-2 .* may go on with another B, ",
    ):
        train("r", "--max_lr", "2e-2")
    status, out = train("branch", "--resume", run_dir / "ckpt" / "step_000031")
    assert status == 0 and weights(tmp_path / "branch") == weights(whole)


def test_checkpoints_elsewhere_are_not_mixed_up(whole, train, tmp_path):
    """A shared --ckpt_dir: a new run neither prunes nor goes on from another's; without config.json no start from scratch."""
    shutil.copytree(whole / "ckpt" / "step_000031", tmp_path / "ckpt" / "step_000031")
    for resume in ("auto", "never"):
        with pytest.raises(
            UserError, match="holds checkpoints, but .* no run: another one's.*--resume"
        ):
            train("r", "--ckpt_dir", tmp_path / "ckpt", "--resume", resume)
    status, out = train(
        "r", "--ckpt_dir", tmp_path / "ckpt", "--resume", tmp_path / "ckpt" / "step_000031"
    )
    assert (
        status == 0
        and "resume | step 31" in out
        and checkpoint.read_state(tmp_path / "ckpt" / "step_000060")["sha256"] == weights(whole)
    )
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    (tmp_path / "r" / "config.json").write_text("")
    with pytest.raises(UserError, match="has saved checkpoints, but"):
        train("r", "--ckpt_dir", tmp_path / "unmounted")
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before


def test_two_processes_cannot_write_one_run(train, tmp_path, flags, launch):
    (tmp_path / "r").mkdir()
    log = runlog.RunLog()
    log.open(tmp_path / "r")
    with pytest.raises(UserError, match="another process is writing"):
        train("r")
    log.file.close()
    assert train("r")[0] == 0


# ---- disks, logs, W&B ----------------------------------------------------------------------------------------------


def test_a_failing_save_leaves_the_last_good_one(whole, train, tmp_path, monkeypatch):
    """From step 20 to 40 the system refuses files above 40 KB: told, tried again at the next interval, same end."""
    plain, limits = optim.cosine, resource.getrlimit(resource.RLIMIT_FSIZE)

    def cosine(step, *rest):
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (40_000 if 19 <= step <= 40 else limits[0], limits[1])
        )
        return plain(step, *rest)

    monkeypatch.setattr(train_gpt2.optim, "cosine", cosine)
    status, out = train("r", "--save_interval", "8", "--keep_last", "9")
    assert status == 0 and [f"step {s} | NOT saved" in out for s in (16, 24, 32, 40, 48)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert "the last checkpoint is step_000016" in out
    assert [p.name for p in checkpoint.steps(tmp_path / "r" / "ckpt")] == [
        f"step_{s:06d}" for s in (8, 16, 48, 56, 60)
    ]
    assert records(tmp_path / "r") == records(whole) and weights(tmp_path / "r") == weights(whole)
    monkeypatch.setattr(
        train_gpt2.optim,
        "cosine",
        lambda step, *rest: (
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1])),
            plain(step, *rest),
        )[1],
    )
    try:
        with pytest.raises(UserError, match="the last checkpoint could not be written"):
            train("full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "full" / "finished.json").exists()
    monkeypatch.setattr(train_gpt2.optim, "cosine", plain)
    assert train("full")[0] == 0 and weights(tmp_path / "full") == weights(whole)


def test_no_room_is_said_at_the_start(train, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(
        UserError, match=r"0.00 GB free, checkpoints need 4 x 0.00 GB; hint: make room"
    ):
        train("r")
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


def test_a_failing_log_changes_nothing(whole, train, tmp_path, monkeypatch, capsys):
    """metrics.jsonl refuses lines for a while, half of one gets through; the console is gone; curves and samples cannot be
    drawn. The run ends the same, and the lines are there when the disk is well again.
    """

    class Full:
        def __init__(self, file):
            self.file, self.calls = file, 0

        def write(self, data):
            self.calls += 1
            if 20 <= self.calls < 60:
                raise OSError(28, "No space left on device")
            return self.file.write(data[:5]) if 60 <= self.calls < 65 else self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    plain = runlog.RunLog.open

    def full(self, *args):
        plain(self, *args)
        self.file = Full(self.file)

    monkeypatch.setattr(runlog.RunLog, "open", full)
    monkeypatch.setattr(runlog, "curves", lambda run_dir: (run_dir / "no" / "such").write_text(""))
    status, out = train("r")
    assert status == 0 and "metrics.jsonl | not written" in out and "curves | not drawn" in out
    assert records(tmp_path / "r") == records(whole) and weights(tmp_path / "r") == weights(whole)
    pipe = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import runlog, time; runlog.say('1'); time.sleep(1); runlog.say('2'); runlog.say('3'); "
            "open('/dev/null'); print(4)",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    pipe.stdout.readline()
    pipe.stdout.close()
    assert pipe.wait() == 0 and pipe.stderr.read() == b""


@pytest.mark.parametrize(
    "key,server", [(False, None), (True, "http://10.255.255.1"), (True, "http://127.0.0.1:9")]
)
def test_wandb_without_key_or_network_holds_nothing_up(
    whole, train, tmp_path, monkeypatch, key, server
):
    """Not a second of the start, and the run is the same."""
    for proxy in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40) if key else monkeypatch.delenv(
        "WANDB_API_KEY", raising=False
    )
    monkeypatch.setenv("WANDB_BASE_URL", server or "")
    took, init, close = [], runlog.Wandb.__init__, runlog.Wandb.close

    def timed(*args):
        t0 = time.monotonic()
        init(*args)
        took.append(time.monotonic() - t0)

    monkeypatch.setattr(runlog.Wandb, "__init__", timed)
    monkeypatch.setattr(runlog.Wandb, "close", lambda self: close(self, 5))
    assert train("r", "--wandb", "auto")[0] == 0 and took[0] < 1
    assert records(tmp_path / "r") == records(whole) and weights(tmp_path / "r") == weights(whole)


def test_no_secret_is_written(flags, tmp_path):
    """Keys from the environment stand in no file of a run, W&B's own included."""
    pytest.importorskip("wandb")
    secrets = {
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        "HF_TOKEN": "hf_secretsecretsecret",
    }
    done = run(
        "train_gpt2.py",
        *flags,
        "--max_steps",
        "3",
        "--log_dir",
        tmp_path,
        "--run_name",
        "r",
        "--wandb",
        "offline",
        env=secrets,
    )
    assert done.returncode == 0 and "wandb | offline" in done.stdout, done.stderr
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any("wandb" in str(p) for p in files)
    for secret in secrets.values():
        assert (
            not [p for p in files if secret.encode() in p.read_bytes()]
            and secret not in done.stdout + done.stderr
        )


def test_no_name_leads_out_of_the_directory(whole, tmp_path):
    """A checkpoint that names a file elsewhere is refused."""
    path = shutil.copytree(whole / "ckpt" / "step_000031", tmp_path / "step_000031")
    state = json.loads((path / "state.json").read_text())
    for name in ("../outside", str(tmp_path / "outside")):
        (tmp_path / "outside").write_text("x")
        state["sha256"][name] = shards.sha256(tmp_path / "outside")
        (path / "state.json").write_text(
            json.dumps(state | {"checksum": checkpoint.checksum(state)})
        )
        with pytest.raises(UserError):
            checkpoint.read_state(path)
        del state["sha256"][name]


# ---- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what,words",
    [
        ("cut", "has 4096 bytes now, not 7106"),
        ("replaced", "was replaced or rewritten"),
        ("gone", "cannot be read any more"),
    ],
)
def test_a_shard_that_goes_bad_is_named(whole, data, train, tmp_path, monkeypatch, what, words):
    """The run stops with a checkpoint; with the shard restored it ends the same. As it is, it is refused."""
    root, plain = shutil.copytree(data, tmp_path / "data"), optim.cosine
    monkeypatch.setattr(shards, "LOOK", 0)
    shard = root / "data_train_000001.npy"
    good = shard.read_bytes()

    def cosine(step, *rest):
        if step == 12:
            if what == "cut":
                os.truncate(shard, 4096)
            elif what == "gone":
                shard.unlink()
            else:
                (root / "new").write_bytes(good[:200] + bytes(len(good) - 200))
                os.replace(root / "new", shard)
        return plain(step, *rest)

    with monkeypatch.context() as m:
        m.setattr(train_gpt2.optim, "cosine", cosine)
        with pytest.raises(UserError, match=f"data_train_000001.npy {words}.*hint"):
            train("r", "--data_root", root)
    at = checkpoint.step_of(checkpoint.steps(tmp_path / "r" / "ckpt")[-1])
    assert at in (12, 13)
    if what == "replaced":
        with pytest.raises(
            UserError, match="is not the data this run began with.*--accept_new_data"
        ):
            train("r", "--data_root", root)
        copy = shutil.copytree(tmp_path / "r", tmp_path / "accepted")
        status, out = train("accepted", "--data_root", root, "--accept_new_data", "True")
        assert (
            status == 0
            and "with other data than it began with" in out
            and records(copy)["train"][at:] != records(whole)["train"][at:]
        )
    shard.write_bytes(good)
    assert train("r", "--data_root", root)[0] == 0
    assert records(tmp_path / "r") == records(whole) and weights(tmp_path / "r") == weights(whole)


def test_a_validation_shard_that_goes_bad(whole, data, train, tmp_path, monkeypatch):
    root, plain = shutil.copytree(data, tmp_path / "data"), optim.cosine
    monkeypatch.setattr(shards, "LOOK", 0)
    good = (root / "data_val_000000.npy").read_bytes()
    with monkeypatch.context() as m:
        m.setattr(
            train_gpt2.optim,
            "cosine",
            lambda step, *rest: (
                (root / "data_val_000000.npy").unlink() if step == 15 else None,
                plain(step, *rest),
            )[1],
        )
        with pytest.raises(UserError, match="data_val_000000.npy cannot be read any more"):
            train("r", "--data_root", root)
    (root / "data_val_000000.npy").write_bytes(good)
    status, out = train("r", "--data_root", root)
    assert status == 0 and "resume | step 20" in out and records(tmp_path / "r") == records(whole)


def test_a_bad_validation_set_in_an_evaluation_alone(whole, train, tmp_path):
    root = write_shards(tmp_path / "data", {"train": [4033], "val": [1100]}, ids=50257)
    with pytest.raises(UserError, match="beyond vocab_size 512"):
        train("r", "--data_root", root, "--eval_only", "True", "--init_from", whole)


# ---- numbers that are none -----------------------------------------------------------------------------------------


def poison(monkeypatch, micro_steps: int, bad: set, value: float = float("nan")):
    """One micro-batch of each step in `bad` gets a loss that is no number. A step has micro_steps of them."""
    forward, calls = GPT.forward, [-1]  # the warm-up comes first

    def poisoned(model, idx, *args):
        loss = forward(model, idx, *args)
        if torch.is_grad_enabled():
            calls[0] += 1
            if (
                (calls[0] - 1) // micro_steps + 1 in bad
                and calls[0] % micro_steps == 1
                and calls[0] > 0
            ):
                return loss * value
        return loss

    monkeypatch.setattr(GPT, "forward", poisoned)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_skips_the_step(train, tmp_path, monkeypatch, value):
    """Steps 5 and 6 of 20 equal a run in which these two update nothing; the windows are recorded."""
    more = ["--max_steps", "20", "--log_interval", "4"]
    with monkeypatch.context() as m:
        step_if, steps = optim.step_if, []
        m.setattr(
            train_gpt2.optim,
            "step_if",
            lambda *args: (steps.append(0), len(steps) in (5, 6) or step_if(*args)),
        )
        assert train("without", *more)[0] == 0
    with monkeypatch.context() as m:
        poison(m, 3, {5, 6}, value)
        status, out = train("poisoned", *more)
    assert status == 0 and out.count("| skipped, no update") == 2
    lines = {r["step"]: r for r in runlog.read_metrics(tmp_path / "poisoned") if "train/loss" in r}
    assert (
        [s for s, r in lines.items() if r["train/loss"] is None]
        == [s for s, r in lines.items() if "skipped" in r]
        == [5, 6]
    )
    assert lines[5]["windows"] == [48, 59] and lines[6]["windows"] == [60, 71]
    assert weights(tmp_path / "poisoned", 20) == weights(tmp_path / "without", 20)
    a, b = records(tmp_path / "poisoned"), records(tmp_path / "without")
    assert a["val"] == b["val"] and [x for x in a["train"] if x[0] not in (5, 6)] == [
        x for x in b["train"] if x[0] not in (5, 6)
    ]


def test_many_in_a_row_stop_the_run(train, tmp_path, monkeypatch):
    poison(monkeypatch, 3, set(range(5, 100)))
    with pytest.raises(
        UserError, match="4 steps in a row skipped up to step 8.*hint: a lower --max_lr"
    ):
        train("r", "--max_skipped", "4")
    state = torch.cat(
        [
            t.flatten()
            for t in checkpoint.load_model(checkpoint.find(str(tmp_path / "r")))
            .state_dict()
            .values()
        ]
    )
    assert (
        torch.isfinite(state).all()
        and checkpoint.steps(tmp_path / "r" / "ckpt")[-1].name == "step_000008"
    )


@pytest.mark.slow
def test_one_rank_of_two_with_a_bad_number(flags, tmp_path):
    """Both skip the step, and stay alike: the losses after it are those of one process that had it, too."""
    code = (
        "import sys, os; sys.path[:0] = ['tests', '.']; import pytest, test_faults, train_gpt2, config\n"
        "nproc = int(os.environ.get('WORLD_SIZE', 1))\n"
        "if os.environ.get('RANK', '0') == '0': test_faults.poison(pytest.MonkeyPatch(), 4 // nproc, {5, 6})\n"
        "sys.argv[0] = 'train_gpt2.py'; config.command_line(train_gpt2.main)"
    )
    (tmp_path / "poisoned.py").write_text(code)
    for nproc in (0, 2):
        done = run(
            tmp_path / "poisoned.py",
            *flags,
            "--total_batch",
            "512",
            "--max_steps",
            "12",
            "--log_dir",
            tmp_path,
            "--run_name",
            f"n{nproc}",
            nproc=nproc,
            env={"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0 and done.stdout.count("skipped, no update") == 2, (
            done.stdout + done.stderr
        )
    a, b = (
        [r[1] for r in records(tmp_path / f"n{n}")["train"] if r[1] is not None] for n in (0, 2)
    )
    assert len(a) == 10 and a == pytest.approx(b, abs=1e-5)


# ---- saving beside training ----------------------------------------------------------------------------------------


def test_saving_by_the_clock(whole, train, tmp_path, monkeypatch):
    """Every few steps by --save_minutes; what is saved is the state at that step, though training has gone on since."""
    status, out = train(
        "r", "--save_minutes", "0.0005", "--keep_last", "99", "--save_interval", "1000"
    )
    saved = [checkpoint.step_of(p) for p in checkpoint.steps(tmp_path / "r" / "ckpt")]
    assert status == 0 and len(saved) > 1 and weights(tmp_path / "r") == weights(whole)
    assert all(weights(tmp_path / "r", s) == weights(whole, s) for s in saved) and records(
        tmp_path / "r"
    ) == records(whole)


def test_the_best_checkpoint_is_kept(train, tmp_path):
    """A rate so high that the loss rises again: the lowest evaluation's checkpoint stays beside the newest."""
    status, _ = train(
        "r", "--max_lr", "1.0", "--save_interval", "5", "--eval_interval", "5", "--keep_last", "2"
    )
    losses = dict(records(tmp_path / "r")["val"])
    best = min((s for s in losses if s > 0), key=losses.get)
    assert [checkpoint.step_of(p) for p in checkpoint.steps(tmp_path / "r" / "ckpt")] == sorted(
        {best, 55, 60}
    )
