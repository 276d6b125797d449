"""python -m pytest tests/test_study.py : which runs a study makes; stopped, it resumes."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, run, write_shards

import config
from model import GPT, GPTConfig
from runtime.command_line import UserError
from runtime.runlog import read_metrics
from runtime.stop import INTERRUPTED
from study import MINI, Study, changed_since, commands, train_all


def settings(study: Study, *more: str) -> list[config.TrainConfig]:
    return [config.from_command_line(argv)[0] for argv in commands(study, list(more))]


def test_every_preset_rate_and_seed_is_a_run_of_its_own():
    """Seeds of weights and data together; each run has its own name."""
    runs = settings(Study(("gpt2-baseline", "gpt2-rope"), 3, (1e-3, 2e-3), max_steps=640))
    assert len({cfg.run_name for cfg in runs}) == 12
    assert {(cfg.preset, cfg.max_lr, cfg.seed) for cfg in runs} == {
        (preset, lr, seed)
        for preset in ("gpt2-baseline", "gpt2-rope")
        for lr in (1e-3, 2e-3)
        for seed in (1, 2, 3)
    }
    for cfg in runs:
        assert cfg.seed == cfg.data_seed
        assert cfg.max_steps == 640 and cfg.log_dir == "log/study"
        assert cfg.min_lr == pytest.approx(0.1 * cfg.max_lr)


def test_mini_changes_the_size_and_not_what_a_preset_is_about():
    """Heads as wide as in the preset; data order, optimizer and schedule are the preset's own."""
    names = ("gpt2-baseline", "gpt2-periodicity-fix", "gpt2-swiglu", "gpt2-modern")
    for name, cfg in zip(names, settings(Study(names, max_steps=100))):
        preset = config.preset(name)
        assert cfg.n_embd // cfg.n_head == preset.n_embd // preset.n_head
        for key in ("data_order", "optimizer", "schedule", "arch", "use_swiglu", "max_lr", "betas"):
            assert getattr(cfg, key) == getattr(preset, key)
        assert {key: getattr(cfg, key) for key in MINI} == MINI


def test_the_size_is_what_it_says():
    for more in (dict(n_head=4), dict(n_head=2, arch="modern")):
        shape = {key: MINI[key] for key in ("n_layer", "n_embd")}
        with torch.device("meta"):
            model = GPT(GPTConfig(block_size=MINI["T"], **shape, **more))
        assert sum(p.numel() for p in model.h.parameters()) >= 10e6


def test_full_is_the_preset_as_it_is():
    (cfg,) = settings(Study(("gpt2-rope",), scale="full", data_root="data/x"))
    rate = config.preset("gpt2-rope").max_lr
    changes = dict(run_name=cfg.run_name, log_dir="log/study", seed=1, data_seed=1, max_lr=rate)
    assert cfg == config.preset("gpt2-rope", data_root="data/x", **changes)


def test_muon_keeps_the_ratios_of_its_rates():
    preset = config.preset("gpt2-modern")
    (cfg,) = settings(Study(("gpt2-modern",), max_lr=(0.05,)))
    assert cfg.max_lr == 0.05
    for rate in ("embed_lr", "head_lr"):
        ratio = getattr(preset, rate) / preset.max_lr
        assert getattr(cfg, rate) / cfg.max_lr == pytest.approx(ratio)


def test_more_settings_are_passed_through_and_win():
    (cfg,) = settings(Study(("gpt2-rope",)), "--hellaswag_limit", "7", "--weight_decay", "0.2")
    assert (cfg.hellaswag_limit, cfg.weight_decay) == (7, 0.2)


@pytest.mark.parametrize(
    "study, more, words",
    [
        (Study(), [], "0 presets and 1 seeds"),
        (Study(("gpt2-rope",), seeds=0), [], "1 presets and 0 seeds"),
        (Study(("gpt2-rop",)), [], "did you mean gpt2-rope"),
        (Study(("gpt2-rope",)), ["--sed", "1"], "no option --sed"),
        (Study(("gpt2-rope",), max_lr=(-1.0,)), [], "max_lr is -1.0"),
        (Study(("gpt2-baseline", "gpt2-rope")), ["--B", "7"], "is not a multiple of B x T"),
        (Study(("gpt2-rope",)), ["--data-seed=7"], "--data_seed after -- would be the same"),
        (Study(("gpt2-rope",)), ["--run_name", "x"], "--run_name after -- would be the same"),
        (Study(("gpt2-rope",)), ["--ckpt_dir", "x"], "--ckpt_dir after -- would be the same"),
        (Study(("gpt2-xl",)), [], "gpt2-xl has n_layer 48, and --scale mini would set 13"),
        (Study(("gpt2-rope-t2048",)), [], "has T 2048, and --scale mini would set 256"),
        (Study(("gpt2-baseline",)), ["--init_from", "gpt2"], "brings its own shape"),
    ],
)
def test_mistakes_are_found_before_the_first_run(study, more, words):
    with pytest.raises(UserError) as e:
        commands(study, more)
    message = str(e.value)
    assert words in message and "hint: " in message and "\n" not in message


def test_a_run_that_fails_ends_the_study(tmp_path):
    done = run("study.py", "gpt2-rope", "--data_root", tmp_path, "--log_dir", tmp_path / "log")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    *_, of_the_run, of_the_study = done.stderr.splitlines()
    assert of_the_run.startswith("error: no train shards")
    assert of_the_study.startswith("error: gpt2-rope-0.0015-seed1 ended with status 2; hint: ")


def test_a_run_that_diverges_does_not_end_a_sweep(tmp_path, capsys):
    """It has a row of its own in the table, and is not trained again."""
    data = write_shards(tmp_path / "toy", {"train": [20000], "val": [2000]}, ids=512)
    log = tmp_path / "log"
    argv = ["study.py", "gpt2-rope", "--max_lr", "1e30", "1e-3", "--scale", "full"]
    argv += ["--max_steps", 9, "--data_root", data, "--log_dir", log, "--", *TINY]
    first = run(*argv)
    assert first.returncode == 0, first.stderr
    assert "gpt2-rope-1e+30-seed1 has diverged; the study continues" in first.stdout
    assert (log / "gpt2-rope-0.001-seed1" / "finished.json").exists()
    assert "| gpt2-rope max_lr 1e+30, diverged | one |" in first.stdout
    again = Study(("gpt2-rope",), 1, (1e30,), "full", 9, str(data), str(log))
    train_all(commands(again, list(TINY)))
    assert "gpt2-rope-1e+30-seed1 has diverged before; remove " in capsys.readouterr().out
    # with other settings it is another run
    (mended,) = settings(again, *TINY, "--grad_norm_clip", "0.1")
    assert changed_since(mended) == "grad_norm_clip 1 -> 0.1"


def losses(run_dir) -> dict[int, float]:
    """Return train/loss by step; each step stands in metrics.jsonl once."""
    steps = [(r["step"], r["train/loss"]) for r in read_metrics(run_dir) if "train/loss" in r]
    assert len(dict(steps)) == len(steps)
    return dict(steps)


def test_a_stopped_study_resumes_and_skips_what_is_finished(tmp_path):
    """SIGTERM to the study alone, in its second run; the same command makes the rest."""
    data = write_shards(tmp_path / "toy", {"train": [20000], "val": [2000]}, ids=512)
    log = tmp_path / "log"
    argv = ["study.py", "gpt2-rope", "--seeds", 2, "--scale", "full", "--max_steps", 200]
    argv += ["--data_root", data, "--log_dir", log, "--", *TINY]
    first, second = (log / f"gpt2-rope-0.0015-seed{seed}" for seed in (1, 2))
    study = subprocess.Popen(
        [sys.executable, *map(str, argv)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        pipesize=4096,  # some forty steps later it waits until their lines are read
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    for line in study.stdout:
        if line.startswith(b"step 5/") and second.exists():
            break
    study.send_signal(signal.SIGTERM)
    output = study.stdout.read().decode()
    assert study.wait() == INTERRUPTED
    assert "to resume: the same command again" in output, output
    assert (first / "finished.json").exists() and not (second / "finished.json").exists()
    before = losses(second)
    assert 5 <= len(before) < 200
    modified = (first / "metrics.jsonl").stat().st_mtime_ns

    done = run(*argv)
    assert done.returncode == 0, done.stderr
    assert "already finished" in done.stdout
    assert (first / "metrics.jsonl").stat().st_mtime_ns == modified
    after = losses(second)
    assert len(after) == 200 and before.items() <= after.items()
    assert "| gpt2-rope | 2 |" in done.stdout and (log / "compare.png").exists()
