"""python -m pytest tests/test_train.py : train_gpt2.py as a user runs it, at tiny size."""

import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from unittest.mock import Mock

import matplotlib
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    TINY,
    at_step,
    decisive,
    files,
    options,
    poisoned,
    run,
    weights,
    write_shards,
)
from test_golden import GOLDEN

import compare
import evaluate
import generate
import hf
import train_gpt2
from config import PRESETS, TrainConfig, from_command_line, preset
from model import GPT
from preflight import problems
from runtime import checkpoint
from runtime.command_line import UserError
from runtime.meter import Meter
from runtime.runlog import RunLog, read_metrics
from runtime.stop import SIGNALS, Stop, Stopped


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_shards(folder, {"train": [6000, 4000, 9000], "val": [3000]}, ids=512)


@pytest.fixture
def train(data, tmp_path, train_here):
    """train("PRESET --option value") runs the script here at tiny size: (records, output).

    The run's directory is tmp_path / name.
    """

    def train(command, *more, shards=data, name="r"):
        preset_name, *changes = options(command, *more)
        places = options("--data_root", shards, "--log_dir", tmp_path, "--run_name", name)
        status, out = train_here(preset_name, *TINY, *places, *changes)
        assert status == 0
        path = tmp_path / name
        return read_metrics(path) if (path / "metrics.jsonl").exists() else [], out

    return train


def losses(records):
    return [r["train/loss"] for r in records if "train/loss" in r]


def val_losses(records):
    return [r["val/loss"] for r in records if "val/loss" in r]


# --------------------------------------------------------------------------------------------------
# what a run does


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in GOLDEN])
def test_every_preset_takes_two_steps(train, fast_curves, name):
    """Those of test_golden.py take ten there."""
    records, out = train(f"{name} --max_steps 2")
    assert len(losses(records)) == 2 and np.isfinite(losses(records)).all()
    assert len(val_losses(records)) == 2 and "finished" in out


def test_a_run_leaves_what_the_readme_says(train, tmp_path):
    """Files, records and lines; the checkpoint holds the last update, so it has the last loss."""
    command = "gpt2-rope --max_steps 40 --eval_interval 10 --save_interval 15 --max_lr 1e-2"
    records, out = train(command)
    run_dir = tmp_path / "r"
    expected = options("config.json env.json metrics.jsonl curves.png ckpt finished.json")
    assert {path.name for path in run_dir.iterdir()} >= set(expected)
    assert checkpoint.steps(run_dir / "ckpt")[-1].name == "step_000040"
    updates = [r for r in records if "train/loss" in r]
    evaluations = [r for r in records if "val/loss" in r]
    assert [r["step"] for r in updates] == list(range(1, 41))
    assert [r["step"] for r in evaluations] == [0, 10, 20, 30, 40]
    assert {"train/lr", "train/norm", "dt_ms", "data_ms", "tok_s", "mfu"} <= set(updates[0])
    assert {"val/bpb", "eval_ms"} <= set(evaluations[0])
    assert any("save_ms" in r for r in records)
    assert "step 40/40 | loss" in out and "tok/s" in out and "left" in out
    _, out = train("gpt2-rope --eval_only True --init_from", run_dir)
    assert f"val loss {val_losses(records)[-1]:.4f}" in out
    with pytest.raises(UserError, match="no checkpoint in .* to evaluate; hint: "):
        train("gpt2-rope --eval_only True", name="another")


@pytest.fixture
def read_late(monkeypatch):
    """Read the numbers of each step when the next one has been launched, as on a GPU."""
    make = Meter.__init__

    def make_late(meter, *args):
        make(meter, *args)
        meter.lag = 1

    monkeypatch.setattr(Meter, "__init__", make_late)


def lines_of(records: list[dict]) -> list[tuple]:
    """Return the lines of metrics.jsonl in their order, without times and records of saving."""
    keys = options("step train/loss train/lr train/norm batch_hash skipped windows val/loss")
    return [tuple(r.get(key) for key in keys) for r in records if "save_ms" not in r]


@pytest.mark.parametrize("log_interval", [1, 3])
def test_a_gpu_is_read_one_step_late_with_the_same_records(
    train, fast_curves, log_interval, request
):
    """The same lines in the same order: nothing is pending when training pauses or ends."""
    words = f"gpt2-rope --max_steps 11 --log_interval {log_interval} --batch_hashes True"
    words += " --eval_interval 4 --save_interval 5 --warmup_steps 2"
    with poisoned({3, 8}):
        at_once, printed_at_once = train(words, name="at_once")
    request.getfixturevalue("read_late")
    with poisoned({3, 8}):
        late, printed_late = train(words, name="late")
    assert lines_of(late) == lines_of(at_once)
    assert printed_late.count("| loss") == printed_at_once.count("| loss")


def test_a_step_is_logged_when_the_next_one_has_been_launched(read_late, train):
    """Only then: the device has work while the host waits. Not where training pauses."""
    logged = {}

    def count(step):
        logged[step] = [line["step"] for line in written if "train/loss" in line]

    written = []
    write = RunLog.write

    def write_and_note(log, record):
        written.append(record)
        write(log, record)

    with pytest.MonkeyPatch.context() as patch, at_step(count):
        patch.setattr(RunLog, "write", write_and_note)
        train("gpt2-rope --max_steps 6 --eval_interval 3")
    assert logged == {0: [], 1: [], 2: [1], 3: [1, 2, 3], 4: [1, 2, 3], 5: [1, 2, 3, 4]}


def test_many_bad_steps_stop_a_late_run_one_step_later(read_late, train_here, data, tmp_path):
    places = options("--data_root", data, "--log_dir", tmp_path, "--run_name r")
    words = "--max_steps 20 --max_skipped 3 --eval_interval 100"
    error = "3 steps in a row skipped by step 7"
    begun = []
    with poisoned(range(5, 21)), at_step(begun.append), pytest.raises(UserError, match=error):
        train_here("gpt2-rope", *TINY, *places, words)
    assert begun[-1] == 8  # the ninth began, and was left


def test_it_learns(train, tmp_path):
    """A text of one repeated phrase is learnt: the loss falls far below that of the first step."""
    tokens = np.tile(np.arange(40, dtype=np.uint16), 500)
    for split in ("train", "val"):
        np.save(tmp_path / f"loop_{split}_0.npy", tokens)
    records, _ = train("gpt2-baseline --max_steps 60 --max_lr 1e-2", shards=tmp_path)
    assert losses(records)[0] > 6 and val_losses(records)[-1] < 0.5


def test_curves_are_drawn_from_the_first_evaluation_on(train, tmp_path):
    """A run can be watched: curves.png is there when the first step begins."""
    drawn = []
    with at_step(lambda step: drawn.append((tmp_path / "r" / "curves.png").exists())):
        train("gpt2-rope --max_steps 2")
    assert drawn == [True, True]


def test_validation_does_not_depend_on_the_micro_batch(train):
    command = "gpt2-rope --max_steps 1 --val_tokens 1600 --B"
    a, _ = train(command, 4, name="b4")
    b, _ = train(command, 16, name="b16")
    assert val_losses(a)[0] == pytest.approx(val_losses(b)[0], abs=1e-6)


def batch_hashes(records):
    return [r["batch_hash"] for r in records if "batch_hash" in r]


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_one_process(train, data, tmp_path, nproc):
    """Three epochs of the same total batch on one process and on several.

    The same hash of every batch, losses to 1e-5 over 20 steps, the same validation loss.
    """
    changes = "--epochs 3 --total_batch 2048 --batch_hashes True"
    one, _ = train("gpt2-rope", changes, name="one")
    places = options("--data_root", data, "--log_dir", tmp_path, "--run_name several")
    done = run("train_gpt2.py", "gpt2-rope", *TINY, *places, *options(changes), nproc=nproc)
    assert done.returncode == 0, done.stderr
    several = read_metrics(tmp_path / "several")
    assert batch_hashes(several) == batch_hashes(one)
    assert len(set(batch_hashes(one))) == 27  # 57,000 tokens
    assert losses(several)[:20] == pytest.approx(losses(one)[:20], abs=1e-5)
    assert val_losses(several)[0] == pytest.approx(val_losses(one)[0], abs=1e-6)


def test_micro_batches_change_nothing(train):
    a, _ = train("gpt2-global-datafix --max_steps 8 --B 2", name="b2")
    b, _ = train("gpt2-global-datafix --max_steps 8 --B 16", name="b16")
    assert losses(a) == pytest.approx(losses(b), abs=1e-5)


def test_compiled_equals_plain(train):
    a, _ = train("gpt2-swiglu --max_steps 5 --n_layer 1 --use_compile False", name="plain")
    b, _ = train("gpt2-swiglu --max_steps 5 --n_layer 1 --use_compile True", name="compiled")
    assert losses(a) == pytest.approx(losses(b), abs=1e-5)
    assert val_losses(a) == pytest.approx(val_losses(b), abs=1e-5)


@pytest.mark.slow
def test_modern_on_two_ranks_equals_one_process(data, tmp_path):
    """Muon's work is shared, the checkpoint is written by one: losses to 1e-5.

    One process resumes what two began.
    """
    command = options("train_gpt2.py gpt2-modern", *TINY, "--max_steps 8 --save_interval 4")
    command += options("--data_root", data, "--log_dir", tmp_path)
    for nproc, name in ((0, "one"), (2, "two")):
        done = run(*command, "--run_name", name, nproc=nproc)
        assert done.returncode == 0, done.stderr
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert losses(two) == pytest.approx(losses(one), abs=1e-5) and len(losses(two)) == 8
    (tmp_path / "two" / "finished.json").unlink()
    shutil.rmtree(tmp_path / "two" / "ckpt" / "step_000008")
    done = run(*command, "--run_name", "two")
    assert "resume | step 4" in done.stdout
    assert losses(read_metrics(tmp_path / "two")) == pytest.approx(losses(one), abs=1e-5)


@pytest.mark.parametrize(
    "command, words",
    [
        ("gpt2-modern --use_rope True", "use_rope is True"),
        ("gpt2-modern --use_swiglu True", "use_swiglu True"),
        ("gpt2-rope --optimizer muon", "arch is gpt2"),
        ("gpt2-modern --n_embd 6", "even width, n_embd / n_head is 3"),
    ],
)
def test_modern_refuses_what_does_not_fit(train, command, words):
    """Switches of the other architecture, and Muon without an untied head."""
    with pytest.raises(UserError, match=words):
        train(command, "--max_steps 2")


def test_modern_refuses_a_tied_head(train, tmp_path):
    train("gpt2-rope --max_steps 2", name="tied")
    with pytest.raises(UserError, match="arch is gpt2.*hint: --optimizer adamw"):
        train("gpt2-modern --max_steps 2 --init_from", tmp_path / "tied")


def test_modern_does_not_resume_with_other_settings(train):
    """Whatever decides the result is compared."""
    train("gpt2-modern --max_steps 2")
    for change in options("optimizer=adamw schedule=cosine embed_lr=0.5 head_lr=0.01"):
        with pytest.raises(UserError, match=f"other settings: {change.split('=')[0]} "):
            train(f"gpt2-modern --max_steps 2 --{change}")


@pytest.mark.parametrize("name", ["gpt2-rope-t2048", "gpt2-modern-t2048"])
def test_epochs_of_a_preset_give_way_to_steps(train, name):
    """These presets run over epochs: three of them here; --max_steps takes their place."""
    assert preset(name).epochs == 4 and (preset(name).T, preset(name).B) == (2048, 32)
    records, out = train(f"{name} --epochs 3")
    assert "3 epochs are 111 steps" in out and len(losses(records)) == 111
    assert from_command_line(options(name, "--max_steps 7"))[0].epochs is None


def test_epochs_set_the_length(train):
    """About 19,000 tokens, twice, 512 per step."""
    records, out = train("gpt2-global-datafix --epochs 2")
    assert "2 epochs are 74 steps" in out and len(losses(records)) == 74


# --------------------------------------------------------------------------------------------------
# resuming


def test_a_resumed_run_equals_an_uninterrupted_one(train, tmp_path):
    """An error in step 13 of 20: the same command resumes from step 10, to the same weights."""
    command = "gpt2-modern --max_steps 20 --save_interval 5 --eval_interval 4"
    whole, _ = train(command, name="whole")

    def fail(step):
        raise KeyboardInterrupt

    with at_step(fail, only=12), pytest.raises(KeyboardInterrupt):
        train(command, name="parts")
    parts, out = train(command, name="parts")
    assert "resume | step 10" in out
    assert losses(parts) == losses(whole) and val_losses(parts) == val_losses(whole)
    assert [r["step"] for r in parts if "train/loss" in r] == list(range(1, 21))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_a_resume_on_other_hardware_or_software_says_so(train, tmp_path):
    """With other threads, say, the last digits may differ; env.json keeps what came before."""
    command = "gpt2-rope --max_steps 6 --save_interval 3"

    def fail(step):
        raise KeyboardInterrupt

    with at_step(fail, only=4), pytest.raises(KeyboardInterrupt):
        train(command)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        _, out = train(command)
    finally:
        torch.set_num_threads(threads)
    change = f"threads {threads} -> {threads + 1}"
    assert f"hardware or software changed, losses may differ in the last digits: {change}\n" in out
    machine = json.loads((tmp_path / "r" / "env.json").read_text())
    assert (machine["threads"], machine["began_at"]) == (threads + 1, [3])
    assert [(e["threads"], e["began_at"]) for e in machine["earlier"]] == [(threads, [0])]


def test_a_hang_in_a_save_or_evaluation_ends_within_group_timeout(train, monkeypatch):
    """The watchdog waits longer in one place alone, the first pass of an uncompiled run."""
    allow_compiling = Mock(wraps=Stop.allow_compiling)
    monkeypatch.setattr(Stop, "allow_compiling", lambda stop: allow_compiling(stop))
    train("gpt2-baseline --max_steps 4 --save_interval 2 --eval_interval 2")
    assert allow_compiling.call_count == 1


def test_a_clock_that_stands_still_is_no_error(train, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)
    records, _ = train("gpt2-rope --max_steps 2")
    assert len(losses(records)) == 2


def test_a_finished_run_says_so_and_nothing_is_overwritten(train, tmp_path):
    train("gpt2-baseline --max_steps 3")
    before = files(tmp_path / "r")
    _, out = train("gpt2-baseline --max_steps 3")
    assert "already finished" in out
    for changes in ("--max_steps 4", "--max_steps 3 --max_lr 1e-3", "--max_steps 3 --resume never"):
        with pytest.raises(UserError, match="hint: --run_name"):
            train("gpt2-baseline", changes)
    assert before == files(tmp_path / "r")


def test_a_finished_run_is_not_the_result_of_other_data(train, tmp_path, data):
    """Refused as an unfinished run is, unless accepted; shards added since do no harm."""
    command = "gpt2-baseline --max_steps 3"
    train(command)
    before = files(tmp_path / "r")
    grown = shutil.copytree(data, tmp_path / "grown")
    np.save(grown / "data_train_999999.npy", np.zeros(500, np.uint16))
    other = shutil.copytree(data, tmp_path / "other")
    np.save(other / "data_train_000000.npy", np.zeros(5000, np.uint16))
    assert "already finished" in train(command, shards=grown)[1]
    words = "not the data this run began with.*hint: restore it, --run_name r-2 starts a new run"
    with pytest.raises(UserError, match=words):
        train(command, shards=other)
    assert "already finished" in train(command, "--accept_new_data True", shards=other)[1]
    assert before == files(tmp_path / "r")


def test_fine_tuning_starts_from_the_given_weights(train, tmp_path):
    first, _ = train("gpt2-rope --max_steps 30 --max_lr 1e-2", name="first")
    tuned, _ = train("gpt2-rope --max_steps 2 --init_from", tmp_path / "first", name="tuned")
    assert val_losses(tuned)[0] == pytest.approx(val_losses(first)[-1], abs=1e-6)


# --------------------------------------------------------------------------------------------------
# settings


def test_published_settings():
    """Decisive numbers of the published experiments: a change changes what presets reproduce."""
    published = {name: preset(name) for name in list(PRESETS)[1:7]}
    for p in published.values():
        assert (p.total_batch, p.max_steps, p.T, p.vocab_size) == (524288, 19073, 1024, 50304)
        assert p.betas == (0.9, 0.95)
    assert [(p.max_lr, p.warmup_steps, p.data_order) for p in published.values()] == [
        (6e-4, 715, "sequential"),  # baseline
        (6e-4, 715, "documents"),  # periodicity-fix
        (1.5e-3, 300, "documents"),  # lr-inc
        (1.5e-3, 300, "global"),  # global-datafix
        (1.5e-3, 300, "global"),  # rope
        (1.5e-3, 300, "global"),  # swiglu
    ]
    assert [p.use_rope for p in published.values()] == [False] * 4 + [True] * 2
    assert [p.use_swiglu for p in published.values()] == [False] * 5 + [True]
    assert list(published) == options(
        "gpt2-baseline gpt2-periodicity-fix gpt2-lr-inc gpt2-global-datafix gpt2-rope gpt2-swiglu"
    )


def test_command_line():
    """The preset comes first; what follows from other settings is filled in."""
    cfg, notes = from_command_line([])
    assert cfg.preset == cfg.run_name == "shakespeare" and "gpt2-rope" in notes[0]
    argv = options("gpt2-rope --max-steps 100 --use_compile=False --betas 0.8 0.9")
    cfg, _ = from_command_line(argv)
    assert (cfg.max_steps, cfg.warmup_steps, cfg.block_size) == (100, 1, 1024)
    assert cfg.use_compile is False and cfg.betas == (0.8, 0.9)
    assert cfg.min_lr == pytest.approx(1.5e-4)
    cfg, _ = from_command_line(options("gpt2-rope --max_lr 1e-3"))
    assert cfg.min_lr == pytest.approx(1e-4)
    cfg, _ = from_command_line(options("gpt2-rope --max_steps 100 --warmup_steps 100"))
    assert "warmup_steps 100 must be below max_steps 100" in problems(cfg, 1)[0]


@pytest.mark.parametrize(
    "command, words",
    [
        ("gpt2-rop", "gpt2-rope"),
        ("gpt2-rope --max_step 3", "max_steps"),
        ("--epochs 1 --max_steps 3", "hint"),
    ],
)
def test_command_line_mistakes(command, words):
    with pytest.raises(UserError, match=words):
        from_command_line(options(command))


def test_all_problems_at_once():
    """Every problem is listed, with its values and a hint."""
    cfg = TrainConfig(
        total_batch=1000, B=3, T=64, block_size=32, n_head=5, min_lr=1.0, warmup_steps=30000
    )
    wrong = problems(cfg, 2)
    for words in (
        "3 x 64 x 2",
        "T 64 exceeds block_size 32",
        "n_head 5",
        "min_lr 1",
        "warmup_steps 30000",
    ):
        assert any(words in problem for problem in wrong), (words, wrong)
    assert all("hint:" in problem for problem in wrong)
    assert len(problems(TrainConfig(B=0, T=-1, max_lr=0, block_size=1, min_lr=0), 1)) == 3
    assert problems(TrainConfig(block_size=1024, min_lr=6e-5), 4) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(max_lr=math.inf), "max_lr is inf, must be finite"),
        (dict(weight_decay=math.nan), "weight_decay is nan, must be finite"),
        (dict(betas=(0.9, math.nan)), "must be finite"),
        (dict(total_batch=2**62), f"total_batch is {2**62}, must not exceed {2**31}"),
        (dict(B=2**40), f"B is {2**40}, must not exceed"),
        (dict(seed=2**64), f"seed is {2**64}, must not exceed"),
        (dict(run_name="x" * 300), "has 300 bytes, must be a plain name of at most 200"),
        (dict(run_name="\x1b[2J"), "must be a plain name"),
        (dict(run_name="a\nb"), "must be a plain name"),
        (dict(run_name=" "), "run_name ' ' has 1 bytes, must be a plain name"),
        (dict(run_name="../a"), "must be a plain name"),
    ],
)
def test_absurd_settings_are_refused_at_once(changes, words):
    started = time.process_time()
    wrong = problems(preset("gpt2-rope", **changes), 1)
    assert any(words in problem and "hint: " in problem for problem in wrong), wrong
    assert time.process_time() - started < 1
    assert problems(preset("gpt2-rope", seed=-1, run_name="日本 1", B=1), 1) == []


def test_user_errors_have_no_traceback(tmp_path):
    """Several at once, too; more of them are below."""
    changes = options("--max_steps 3 --total_batch 500 --data_root nowhere --log_dir", tmp_path)
    done = run("train_gpt2.py", "gpt2-baseline", *TINY, *changes)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for words in ("error: ", "total_batch 500", "no train shards", "hint: "):
        assert words in done.stderr, done.stderr


def test_help_answers_at_once():
    """Torch is not even imported."""
    done = run(*options("-X importtime train_gpt2.py gpt2-rope --help"))
    imported = re.findall(r"\| +(\S+)$", done.stderr, re.M)
    assert done.returncode == 0 and "tyro" in imported and "torch" not in imported
    assert "--total_batch" in done.stdout and "tokens in one optimizer step" in done.stdout


def test_training_needs_six_packages_only(data, tmp_path):
    """torch, numpy, tiktoken, tqdm, tyro, safetensors: the others cannot be imported here."""
    others = options("wandb datasets transformers modal matplotlib pyarrow pandas huggingface_hub")
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({others}));"
        "runpy.run_path('train_gpt2.py', run_name='__main__')"
    )
    places = options("--data_root", data, "--log_dir", tmp_path)
    done = run("-c", code, "gpt2-swiglu", *TINY, *places, *options("--max_steps 2"))
    assert done.returncode == 0, done.stderr
    assert "matplotlib is missing" in done.stdout


def test_a_missing_compiler_is_one_line(data, tmp_path):
    """Without g++ the run continues uncompiled."""
    places = options("--data_root", data, "--log_dir", tmp_path)
    changes = options("--max_steps 2 --use_compile True")
    env = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run(*options("train_gpt2.py gpt2-rope"), *TINY, *places, *changes, env=env)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("compile | off")]) == 1


def test_a_missing_git_is_no_error(train, tmp_path, monkeypatch):
    """A clone in a container without it: env.json then knows no commit."""
    monkeypatch.setenv("PATH", str(tmp_path))
    train("gpt2-rope --max_steps 1")
    assert json.loads((tmp_path / "r" / "env.json").read_text())["commit"] == ""


def test_a_picture_that_fails_leaves_the_run_finished(train, tmp_path, monkeypatch):
    """Whatever matplotlib raises, here RuntimeError: TeX is wanted and not installed."""
    if shutil.which("latex"):
        pytest.skip("needs a machine without LaTeX")
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    _, out = train("gpt2-rope --max_steps 2")
    assert "curves | not drawn: RuntimeError" in out
    assert (tmp_path / "r" / "finished.json").exists()


def test_the_mark_of_success_comes_before_what_is_optional(train, tmp_path, monkeypatch):
    """The last picture and W&B's last words: each may take long, and fail."""
    finished = []

    def note(*args):
        finished.append((tmp_path / "r" / "finished.json").exists())

    monkeypatch.setattr(compare, "curves", note)
    monkeypatch.setattr(RunLog, "close_wandb", note)
    train("gpt2-rope --max_steps 2")
    assert finished == [False, False, True, True]  # two evaluations, then the end


def test_a_prompt_that_is_not_utf8_is_written_with_a_replacement(train, tmp_path):
    """A Latin-1 terminal: Python passes the byte on as half a surrogate pair."""
    size = "--vocab_size 50304 --n_samples 1 --sample_tokens 2"
    train(
        f"gpt2-rope --max_steps 1 {size} --sample_prompt",
        b"caf\xe9".decode(errors="surrogateescape"),
    )
    assert (tmp_path / "r" / "samples.txt").read_text("utf-8").splitlines()[1].startswith("caf?")


def test_samples_and_yardsticks_that_fail_stop_nothing(train, monkeypatch):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generate, "sample_texts", fail)
    monkeypatch.setattr(evaluate, "bigram_loss", fail)
    _, out = train("gpt2-rope --max_steps 1 --vocab_size 50304 --n_samples 1")
    assert "step 1 | no samples: OutOfMemoryError" in out
    assert "bigram | not measured: OutOfMemoryError" in out and "finished" in out


def test_other_tokens_than_gpt2s_have_no_bits_per_byte_and_no_hellaswag(train):
    """A vocabulary of 512 ids: their bytes are unknown, and HellaSwag's ids do not exist."""
    records, out = train("gpt2-rope --max_steps 1 --hellaswag_limit 8")
    evaluations = [r for r in records if "val/loss" in r]
    assert [r["val/bpb"] for r in evaluations] == [None, None]
    assert "bits per byte" not in out and not any("val/hella_norm" in r for r in evaluations)
    assert out.count("hellaswag | skipped: it needs GPT-2's 50,257 tokens, the model has 512") == 1


def test_dry_run_writes_nothing(train, tmp_path):
    _, out = train("gpt2-rope --dry_run True")
    assert not (tmp_path / "r").exists() and "max_lr 0.0015" in out


# --------------------------------------------------------------------------------------------------
# from Python


@pytest.fixture
def tiny(data, tmp_path):
    """tiny(run_name, **changes) returns the settings of a run of 20 steps, for train_gpt2.train."""

    def settings(run_name="r", **changes):
        places = dict(data_root=str(data), log_dir=str(tmp_path), run_name=run_name)
        steps = dict(max_steps=20, save_interval=5, eval_interval=10, max_lr=1e-2)
        return preset("gpt2-rope", **SMALL | places | steps | changes)

    return settings


def interrupt(step=None):
    os.kill(os.getpid(), signal.SIGINT)


def assert_same_weights(model, other):
    """Compare two models bit for bit."""
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())


def test_python_trains_what_the_command_trains(train, tiny, tmp_path):
    """Losses, batches and weights, bit for bit, and the result says what the files say."""
    steps = "--max_steps 20 --save_interval 5 --eval_interval 10 --max_lr 1e-2"
    records, _ = train(f"gpt2-rope {steps} --batch_hashes True", name="command")
    result = train_gpt2.train(tiny("python", batch_hashes=True))
    assert decisive(result.records) == decisive(records)
    assert result.records == read_metrics(tmp_path / "python")
    finished = json.loads((tmp_path / "command" / "finished.json").read_text())
    assert (result.step, result.val_loss) == (finished["step"], finished["val_loss"])
    assert result.finished and result.step == 20
    assert weights(tmp_path / "python") == weights(tmp_path / "command")
    assert_same_weights(result.model, hf.load_checkpoint(checkpoint.find(tmp_path / "command")))


def test_python_trains_twice_in_one_process(tiny, tmp_path):
    """Two names are two equal runs; a finished run returns its result again, untouched."""
    a, b = train_gpt2.train(tiny("a")), train_gpt2.train(tiny("b"))
    assert decisive(a.records) == decisive(b.records)
    before = files(tmp_path)
    again = train_gpt2.train(tiny("a"))
    assert again[1:] == a[1:]
    assert_same_weights(again.model, a.model)
    assert files(tmp_path) == before


def test_python_trains_in_a_thread(tiny):
    """Where Python allows no signal handlers."""
    results = []
    thread = threading.Thread(target=lambda: results.append(train_gpt2.train(tiny("thread"))))
    thread.start()
    thread.join()
    assert decisive(results[0].records) == decisive(train_gpt2.train(tiny("main")).records)


def global_state():
    """Return what a run may change for the whole process, and has to give back."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    return {
        "handlers": [signal.getsignal(number) for number in SIGNALS],
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": (deterministic, warn_only),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "torch": torch.random.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "random": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "backend": matplotlib.rcParams["backend"],
    }


def test_python_gets_its_settings_back(tiny, monkeypatch):
    """Handlers, threads, precision, determinism, generators and the backend, after a whole run.

    And after one that raises.
    """
    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before = global_state()
        samples = dict(vocab_size=50304, n_samples=1, sample_tokens=4)
        train_gpt2.train(tiny(deterministic=True, max_steps=3, **samples))
        assert global_state() == before
        with pytest.raises(UserError):
            train_gpt2.train(tiny(deterministic=True, max_lr=1e-3))
        assert global_state() == before
    finally:
        torch.set_num_threads(threads)


def test_python_interrupted_resumes(tiny, tmp_path, monkeypatch):
    """An interrupt saves a checkpoint and returns; the same call resumes, to the same losses."""
    whole = train_gpt2.train(tiny("whole"))
    # a shell's background job would ignore it
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)
    with at_step(interrupt, only=7):
        result = train_gpt2.train(tiny("parts"))
    assert (result.step, result.finished) == (7, False)
    assert decisive(result.records)["train"] == decisive(whole.records)["train"][:7]
    assert checkpoint.steps(tmp_path / "parts" / "ckpt")[-1].name == "step_000007"
    result = train_gpt2.train(tiny("parts"))
    assert (result.step, result.finished) == (20, True)
    assert decisive(result.records) == decisive(whole.records)
    assert_same_weights(result.model, whole.model)


def test_python_interrupted_before_the_first_step(tiny, tmp_path, monkeypatch):
    """There is nothing to save: it raises Stopped; the same call begins anew.

    Though the exception is still there, as in a notebook.
    """
    forward = GPT.forward

    def interrupted(*args):
        interrupt()
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)
        patch.setattr(GPT, "forward", interrupted)
        with pytest.raises(Stopped) as exception:
            train_gpt2.train(tiny())
    assert checkpoint.steps(tmp_path / "r" / "ckpt") == []
    assert train_gpt2.train(tiny()).finished and exception


def test_python_interrupted_twice_ends_at_once(tiny, capsys):
    """The second Ctrl-C raises KeyboardInterrupt and kills nothing: the same call resumes.

    Though the exception is still there, as in a notebook.
    """

    def interrupt_twice(step):
        interrupt()
        interrupt()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with at_step(interrupt_twice, only=7), pytest.raises(KeyboardInterrupt) as exception:
            train_gpt2.train(tiny())
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert train_gpt2.train(tiny()).finished and exception
    assert "resume | step 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(total_batch=500), "total_batch 500 .*hint: "),
        (dict(data_root="nowhere"), "no train shards"),
        (dict(T=40000, total_batch=40000, B=1, block_size=40000), "fewer than a window"),
        (dict(vocab_size=128), "beyond vocab_size 128"),
        (dict(max_step=3), "max_steps"),
        (dict(log_dir="/proc"), "cannot write.*hint: --log_dir"),
        (dict(resume="nowhere"), "no checkpoint in nowhere"),
    ],
)
def test_python_mistakes_are_user_errors(tiny, changes, words):
    """Nothing exits the interpreter."""
    with pytest.raises(UserError, match=words):
        train_gpt2.train(tiny(**changes))


def test_python_mistakes_leave_the_run_free(tiny, monkeypatch):
    """After an error in the middle of a run the same call resumes, the exception still in hand."""

    def fail(step):
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    with at_step(fail, only=7):
        with pytest.raises(UserError, match="with --B 4 .*hint: --B auto or a ") as exception:
            train_gpt2.train(tiny())
    with at_step(fail, only=7):
        with pytest.raises(UserError, match="with --B auto .*hint: a number for --B, "):
            train_gpt2.train(tiny("auto", B="auto"))
    assert train_gpt2.train(tiny(B=2)).finished and exception


# --------------------------------------------------------------------------------------------------
# memory

LIMITED = """
import re, resource, sys
sys.path.insert(0, {root!r})
import matplotlib.pyplot, torch._dynamo, train_gpt2
from pathlib import Path
from runtime.command_line import run_script

status = Path("/proc/self/status").read_text()
in_use = 1024 * int(re.search(r"VmData:\\s+(\\d+)", status).group(1))
if {more}:
    resource.setrlimit(resource.RLIMIT_DATA, (in_use + {more}, -1))
run_script(train_gpt2.main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA")
@pytest.mark.slow
def test_auto_takes_the_largest_micro_batch_that_fits(tmp_path):
    """Under a memory limit B auto takes a smaller one, with the same losses.

    One that is given and does not fit is refused in one line, with a hint.
    """
    data = write_shards(tmp_path / "data", {"train": [6000], "val": [2000]})
    size = "--vocab_size 50304 --T 128 --total_batch 2048 --max_steps 3"

    def limited(more, *changes):
        script = tmp_path / "limited.py"
        script.write_text(LIMITED.format(root=str(ROOT), more=more))
        places = options("--data_root", data, "--log_dir", tmp_path / str(more), "--run_name r")
        return run(script, "gpt2-rope", *TINY, *options(size), *places, *options(*changes))

    losses_of, B = {}, {}
    for more in (0, 1_200_000_000):
        done = limited(more, "--B auto")
        assert done.returncode == 0, done.stdout + done.stderr
        run_dir = tmp_path / str(more) / "r"
        B[more] = json.loads((run_dir / "config.json").read_text())["B"]
        assert f"B = {B[more]} is the largest" in done.stdout
        losses_of[more] = losses(read_metrics(run_dir))
    assert B[0] == 16 and B[1_200_000_000] in (2, 4, 8)
    assert len(losses_of[0]) == 3
    assert losses_of[0] == pytest.approx(losses_of[1_200_000_000], abs=1e-5)
    done = limited(600_000_000, "--B 16")
    assert done.returncode == 2 and "error: out of memory with --B 16 --T 128" in done.stderr
    assert "hint: --B auto or a smaller --B, " in done.stderr and "Traceback" not in done.stderr
