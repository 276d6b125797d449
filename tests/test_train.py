"""python -m pytest tests/test_train.py : the training script, run as a user runs it, at tiny size."""

import json
import shutil
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, TINY, run, write_shards

import checkpoint
import train_gpt2
from config import PRESETS, TrainConfig, UserError, from_command_line, preset, problems


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(
        tmp_path_factory.mktemp("data"), {"train": [6000, 4000, 9000], "val": [3000]}, ids=512
    )


@pytest.fixture
def train(data, tmp_path, monkeypatch, capsys):
    """train(*arguments) runs the script in this process at tiny size and returns (records, what it printed)."""

    def go(*args, shards=data, name="r"):
        argv = [
            *args,
            *[x for pair in zip(TINY[::2], TINY[1::2]) if pair[0] not in args for x in pair],
        ]
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "train_gpt2.py",
                *map(str, argv),
                "--data_root",
                str(shards),
                "--log_dir",
                str(tmp_path),
                "--run_name",
                name,
            ],
        )
        train_gpt2.main()
        path = tmp_path / name / "metrics.jsonl"
        return (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        ), capsys.readouterr().out

    return go


losses = lambda records: [r["train/loss"] for r in records if "train/loss" in r]
val_losses = lambda records: [r["val/loss"] for r in records if "val/loss" in r]


# ---- what a run does -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_two_steps(train, name):
    records, out = train(name, "--max_steps", "2", name=name)
    assert (
        len(losses(records)) == 2
        and np.isfinite(losses(records)).all()
        and len(val_losses(records)) == 2
    )
    assert f"{name} " in out or "finished" in out


def test_a_run_leaves_what_the_readme_says(train, tmp_path):
    records, out = train(
        "gpt2-rope",
        "--max_steps",
        "40",
        "--eval_interval",
        "10",
        "--save_interval",
        "15",
        "--max_lr",
        "1e-2",
    )
    run_dir = tmp_path / "r"
    assert {p.name for p in run_dir.iterdir()} >= {
        "config.json",
        "env.json",
        "metrics.jsonl",
        "curves.png",
        "ckpt",
    }
    assert [p.name for p in checkpoint.steps(run_dir / "ckpt")][-1] == "step_000040"
    steps = [r["step"] for r in records if "train/loss" in r]
    assert steps == list(range(1, 41)) and [r["step"] for r in records if "val/loss" in r] == [
        0,
        10,
        20,
        30,
        40,
    ]
    assert {"train/lr", "train/norm", "dt_ms", "data_ms", "tok_s", "mfu"} <= set(records[2])
    assert {"val/bpb", "eval_ms"} <= set(next(r for r in records if "val/loss" in r)) and any(
        "save_ms" in r for r in records
    )
    assert "step 40/40 | loss" in out and "tok/s" in out and "left" in out
    # the last validation loss is that of the saved weights: the checkpoint holds the last update
    _, out = train("gpt2-rope", "--eval_only", "True", "--init_from", run_dir)
    assert f"val loss {val_losses(records)[-1]:.4f}" in out


def test_it_learns(train, tmp_path):
    """A text of one repeated phrase is learnt: the loss falls far below that of the first step."""
    tokens = np.tile(np.arange(40, dtype=np.uint16), 500)
    for split in ("train", "val"):
        np.save(tmp_path / f"loop_{split}_0.npy", tokens)
    records, _ = train("gpt2-baseline", "--max_steps", "60", "--max_lr", "1e-2", shards=tmp_path)
    assert losses(records)[0] > 6 and val_losses(records)[-1] < 0.5


def test_validation_does_not_depend_on_the_micro_batch(train):
    a, b = (
        train("gpt2-rope", "--max_steps", "1", "--B", B, "--val_tokens", "1600", name=f"b{B}")[0]
        for B in ("4", "16")
    )
    assert val_losses(a)[0] == pytest.approx(val_losses(b)[0], abs=1e-6)


def test_two_and_four_ranks_equal_one_process(data, tmp_path):
    """Three epochs with the same total batch: the same hash of every batch, losses to 1e-5 over 20 steps, the same validation loss."""
    args = [
        "train_gpt2.py",
        "gpt2-rope",
        *TINY,
        "--epochs",
        "3",
        "--data_root",
        data,
        "--log_dir",
        tmp_path,
        "--batch_hashes",
        "True",
    ]
    args[args.index("--total_batch") + 1] = "2048"
    records = {}
    for nproc in (0, 2, 4):
        done = run(*args, "--run_name", f"n{nproc}", nproc=nproc)
        assert done.returncode == 0, done.stderr
        records[nproc] = [
            json.loads(line)
            for line in (tmp_path / f"n{nproc}" / "metrics.jsonl").read_text().splitlines()
        ]
    hashes = {n: [r["batch_hash"] for r in rs if "batch_hash" in r] for n, rs in records.items()}
    assert hashes[0] == hashes[2] == hashes[4] and len(set(hashes[0])) == 27  # 57,000 tokens
    for n in (2, 4):
        assert losses(records[n])[:20] == pytest.approx(losses(records[0])[:20], abs=1e-5)
        assert val_losses(records[n])[0] == pytest.approx(val_losses(records[0])[0], abs=1e-6)


def test_micro_batches_change_nothing(train):
    a, b = (
        train("gpt2-global-datafix", "--max_steps", "8", "--B", B, name=f"b{B}")[0]
        for B in ("2", "16")
    )
    assert losses(a) == pytest.approx(losses(b), abs=1e-5)


def test_compiled_equals_plain(train):
    a, b = (
        train(
            "gpt2-swiglu", "--max_steps", "5", "--n_layer", "1", "--use_compile", c, name=f"c{c}"
        )[0]
        for c in ("False", "True")
    )
    assert losses(a) == pytest.approx(losses(b), abs=1e-5) and val_losses(a) == pytest.approx(
        val_losses(b), abs=1e-5
    )


@pytest.mark.slow
def test_modern_on_two_ranks_equals_one_process(data, tmp_path):
    """Muon's work is shared, the checkpoint is written by one: losses to 1e-5, and one process goes on with what two began."""
    found = {}
    for nproc, name in ((0, "one"), (2, "two")):
        done = run(
            "train_gpt2.py",
            "gpt2-modern",
            *TINY,
            "--max_steps",
            "8",
            "--data_root",
            data,
            "--log_dir",
            tmp_path,
            "--run_name",
            name,
            "--save_interval",
            "4",
            nproc=nproc,
        )
        assert done.returncode == 0, done.stderr
        found[name] = [
            json.loads(line)
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
    assert (
        losses(found["two"]) == pytest.approx(losses(found["one"]), abs=1e-5)
        and len(losses(found["two"])) == 8
    )
    (tmp_path / "two" / "finished.json").unlink()
    shutil.rmtree(tmp_path / "two" / "ckpt" / "step_000008")
    done = run(
        "train_gpt2.py",
        "gpt2-modern",
        *TINY,
        "--max_steps",
        "8",
        "--data_root",
        data,
        "--log_dir",
        tmp_path,
        "--run_name",
        "two",
        "--save_interval",
        "4",
    )
    again = [
        json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    ]
    assert "resume | step 4" in done.stdout and losses(again) == pytest.approx(
        losses(found["one"]), abs=1e-5
    )


def test_modern_refuses_what_does_not_fit(train, tmp_path):
    """Switches of the other architecture; a tied head under Muon; on resuming, whatever decides the result."""
    for args, words in (
        (["gpt2-modern", "--use_rope", "True"], "use_rope is True"),
        (["gpt2-modern", "--use_swiglu", "True"], "use_swiglu True"),
        (["gpt2-rope", "--optimizer", "muon"], "arch is gpt2"),
        (["gpt2-modern", "--n_embd", "6"], "even width, n_embd / n_head is 3"),
    ):
        with pytest.raises(UserError, match=words):
            train(*args, "--max_steps", "2")
    train("gpt2-rope", "--max_steps", "2", name="tied")
    with pytest.raises(UserError, match="tied has arch gpt2; hint: "):
        train("gpt2-modern", "--max_steps", "2", "--init_from", tmp_path / "tied")
    train("gpt2-modern", "--max_steps", "2")
    for name, value in (
        ("optimizer", "adamw"),
        ("schedule", "linear"),
        ("embed_lr", "0.5"),
        ("head_lr", "0.01"),
    ):
        with pytest.raises(UserError, match=f"other settings: {name} "):
            train("gpt2-modern", "--max_steps", "2", f"--{name}", value)


def test_epochs_of_a_preset_give_way_to_steps(train):
    """gpt2-rope-t2048 and gpt2-modern-t2048 run over epochs: three of them here; --max_steps takes their place."""
    for name in ("gpt2-rope-t2048", "gpt2-modern-t2048"):
        assert preset(name).epochs == 4 and (preset(name).T, preset(name).B) == (2048, 32)
        records, out = train(name, "--epochs", "3", name=name)
        assert "3 epochs are 111 steps" in out and len(losses(records)) == 111
        assert from_command_line([name, "--max_steps", "7"])[0].epochs is None


def test_epochs_set_the_length(train):
    records, out = train(
        "gpt2-global-datafix", "--epochs", "2"
    )  # about 19,000 tokens of 512 a step, twice
    assert "2 epochs are 74 steps" in out and len(losses(records)) == 74


# ---- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, schedule", [("gpt2-global-datafix", "cosine"), ("gpt2-modern", "constant_linear")]
)
def test_a_resumed_run_equals_an_uninterrupted_one(train, monkeypatch, tmp_path, name, schedule):
    """Stopped after step 12 of 20 by an error in the loop; the same command goes on from step 10, to the same losses and weights."""
    args = [name, "--max_steps", "20", "--save_interval", "5", "--eval_interval", "4"]
    whole, _ = train(*args, name="whole")
    plain = getattr(train_gpt2.optim, schedule)
    with monkeypatch.context() as m:

        def stop(step, *rest):
            if step == 12:
                raise KeyboardInterrupt
            return plain(step, *rest)

        m.setattr(train_gpt2.optim, schedule, stop)
        with pytest.raises(KeyboardInterrupt):
            train(*args, name="parts")
    parts, out = train(*args, name="parts")
    assert "resume | step 10" in out
    assert losses(parts) == losses(whole) and val_losses(parts) == val_losses(whole)
    assert [r["step"] for r in parts if "train/loss" in r] == list(range(1, 21))
    a, b = (
        checkpoint.read_state(tmp_path / n / "ckpt" / "step_000020")["sha256"]
        for n in ("whole", "parts")
    )
    assert a == b


def test_a_finished_run_says_so_and_nothing_is_overwritten(train, tmp_path):
    train("gpt2-baseline", "--max_steps", "3")
    before = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    assert "already finished" in train("gpt2-baseline", "--max_steps", "3")[1]
    for args in (
        ["--max_steps", "4"],
        ["--max_steps", "3", "--max_lr", "1e-3"],
        ["--max_steps", "3", "--resume", "never"],
    ):
        with pytest.raises(UserError, match="hint: --run_name"):
            train("gpt2-baseline", *args)
    assert before == {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}


def test_a_damaged_checkpoint_is_passed_over(train, tmp_path):
    args = ["gpt2-baseline", "--max_steps", "9", "--save_interval", "3"]
    train(*args)
    weights = tmp_path / "r" / "ckpt" / "step_000009" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)
    _, out = train(*args)
    assert "passed over" in out and "resume | step 6" in out
    for path in checkpoint.steps(tmp_path / "r" / "ckpt"):
        (path / "state.json").write_text("{")
    with pytest.raises(UserError, match="no good checkpoint"):
        train(*args)


def test_fine_tuning_starts_from_the_given_weights(train, tmp_path):
    first, _ = train("gpt2-rope", "--max_steps", "30", "--max_lr", "1e-2", name="first")
    tuned, _ = train(
        "gpt2-rope", "--max_steps", "2", "--init_from", tmp_path / "first", name="tuned"
    )
    assert val_losses(tuned)[0] == pytest.approx(val_losses(first)[-1], abs=1e-6)


# ---- settings ------------------------------------------------------------------------------------------------------


def test_published_settings():
    """Decisive numbers of the published experiments; a change here changes what the presets reproduce."""
    p = {name: preset(name) for name in PRESETS}
    for name in list(PRESETS)[1:7]:
        assert (
            p[name].total_batch,
            p[name].max_steps,
            p[name].T,
            p[name].vocab_size,
            p[name].betas,
        ) == (524288, 19073, 1024, 50304, (0.9, 0.95))
    lr = {n: (p[n].max_lr, p[n].warmup_steps) for n in p}
    assert lr["gpt2-baseline"] == lr["gpt2-periodicity-fix"] == (6e-4, 715)
    assert lr["gpt2-lr-inc"] == lr["gpt2-global-datafix"] == lr["gpt2-rope"] == (
        1.8e-3,
        285,
    ) and lr["gpt2-swiglu"] == (1.5e-3, 300)
    assert [p[n].data_order for n in list(PRESETS)[1:7]] == [
        "sequential",
        "documents",
        "documents",
        "global",
        "global",
        "global",
    ]
    assert [(p[n].use_rope, p[n].use_swiglu) for n in list(PRESETS)[1:7]] == [
        (False, False)
    ] * 4 + [(True, False), (True, True)]


def test_command_line():
    cfg, notes = from_command_line([])
    assert cfg.preset == cfg.run_name == "shakespeare" and "gpt2-rope" in notes[0]
    cfg, _ = from_command_line(
        ["gpt2-rope", "--max-steps", "100", "--use_compile=False", "--betas", "0.8", "0.9"]
    )
    assert (cfg.max_steps, cfg.warmup_steps, cfg.use_compile, cfg.betas, cfg.block_size) == (
        100,
        1,
        False,
        (0.8, 0.9),
        1024,
    )
    assert cfg.min_lr == pytest.approx(1.8e-4) and from_command_line(
        ["gpt2-rope", "--max_lr", "1e-3"]
    )[0].min_lr == pytest.approx(1e-4)
    for argv, word in (
        (["gpt2-rop"], "gpt2-rope"),
        (["gpt2-rope", "--max_step", "3"], "max_steps"),
        (["--epochs", "1", "--max_steps", "3"], "hint"),
    ):
        with pytest.raises(UserError, match=word):
            from_command_line(argv)
    cfg, _ = from_command_line(["gpt2-rope", "--max_steps", "100", "--warmup_steps", "100"])
    assert "warmup_steps 100 must be below max_steps 100" in problems(cfg, 1)[0]


def test_all_problems_at_once():
    cfg = TrainConfig(
        total_batch=1000, B=3, T=64, block_size=32, n_head=5, min_lr=1.0, warmup_steps=30000
    )
    found = problems(cfg, 2)
    for words in (
        "3 x 64 x 2",
        "T 64 exceeds block_size 32",
        "n_head 5",
        "min_lr 1",
        "warmup_steps 30000",
    ):
        assert any(words in p for p in found), (words, found)
    assert all("hint:" in p for p in found)
    assert len(problems(TrainConfig(B=0, T=-1, max_lr=0, block_size=1, min_lr=0), 1)) == 3
    assert problems(TrainConfig(block_size=1024, min_lr=6e-5), 4) == []


@pytest.mark.parametrize(
    "args,words",
    [
        (["gpt2-baseline", "--total_batch", "500"], ["total_batch 500", "hint: "]),
        (
            ["gpt2-baseline", "--total_batch", "500", "--data_root", "nowhere"],
            ["total_batch 500", "no train shards"],
        ),
        (["gpt2-baseline", "--log_dir", "/proc"], ["cannot write", "hint: --log_dir"]),
        (["gpt2-baseline", "--max_step", "5"], ["max_steps"]),
        (
            ["gpt2-baseline", "--T", "40000", "--total_batch", "40000", "--B", "1"],
            ["fewer than a window"],
        ),
        (["gpt2-baseline", "--vocab_size", "128"], ["beyond vocab_size 128"]),
        (["gpt2-baseline", "--resume", "nowhere"], ["no checkpoint in nowhere"]),
    ],
)
def test_user_errors_have_no_traceback(data, tmp_path, args, words):
    defaults = [*TINY, "--data_root", str(data), "--log_dir", str(tmp_path), "--max_steps", "3"]
    args = args + [
        x for pair in zip(defaults[::2], defaults[1::2]) if pair[0] not in args for x in pair
    ]
    done = run("train_gpt2.py", *args)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "error: " in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_help_answers_at_once():
    """Within 3 seconds on any machine: torch is not even imported."""
    t0 = time.perf_counter()
    done = run("train_gpt2.py", "gpt2-rope", "--help")
    assert done.returncode == 0 and time.perf_counter() - t0 < 3
    assert "--total_batch" in done.stdout and "tokens in one optimiser step" in done.stdout


def test_training_needs_six_packages_only(data, tmp_path):
    """torch, numpy, tiktoken, tqdm, tyro, safetensors: the others are made impossible to import."""
    others = (
        "wandb",
        "datasets",
        "transformers",
        "modal",
        "matplotlib",
        "pyarrow",
        "pandas",
        "huggingface_hub",
    )
    code = f"import sys, runpy; sys.modules.update(dict.fromkeys({others!r})); runpy.run_path('train_gpt2.py', run_name='__main__')"
    done = run(
        "-c",
        code,
        "gpt2-swiglu",
        *TINY,
        "--data_root",
        data,
        "--log_dir",
        tmp_path,
        "--max_steps",
        "2",
    )
    assert done.returncode == 0, done.stderr
    assert "matplotlib is missing" in done.stdout


def test_a_missing_compiler_is_one_line(data, tmp_path):
    """Without g++ the run goes on uncompiled."""
    args = [*TINY, "--data_root", data, "--log_dir", tmp_path, "--max_steps", "2"]
    args[args.index("--use_compile") + 1] = "True"
    done = run(
        "train_gpt2.py",
        "gpt2-rope",
        *args,
        env={"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("compile | off")]) == 1


def test_dry_run_writes_nothing(train, tmp_path):
    records, out = train("gpt2-rope", "--dry_run", "True")
    assert not (tmp_path / "r").exists() and '"max_lr": 0.0018' in out


# ---- memory --------------------------------------------------------------------------------------------------------

LIMITED = """
import re, resource, sys
sys.path.insert(0, {root!r})
import config, matplotlib.pyplot, torch._dynamo, train_gpt2
from pathlib import Path
held = 1024 * int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
resource.setrlimit(resource.RLIMIT_DATA, (held + {more}, -1)) if {more} else None
config.command_line(train_gpt2.main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA")
@pytest.mark.slow
def test_auto_takes_the_largest_micro_batch_that_fits(tmp_path):
    """Under a memory limit a smaller one, with the same losses; one that is given and does not fit: one line, with the way out."""
    data = write_shards(tmp_path / "data", {"train": [6000], "val": [2000]})
    losses, B = {}, {}
    for more in (0, 1_200_000_000):
        (tmp_path / "go.py").write_text(LIMITED.format(root=str(ROOT), more=more))
        args = [
            *TINY,
            "--data_root",
            data,
            "--log_dir",
            tmp_path / str(more),
            "--max_steps",
            "3",
            "--run_name",
            "r",
        ]
        args[args.index("--vocab_size") + 1], args[args.index("--B") + 1] = "50304", "auto"
        args[args.index("--T") + 1], args[args.index("--total_batch") + 1] = "128", "2048"
        done = run(tmp_path / "go.py", "gpt2-rope", *args)
        assert done.returncode == 0, done.stdout + done.stderr
        B[more] = json.loads((tmp_path / str(more) / "r" / "config.json").read_text())["B"]
        assert f"B = {B[more]} is the largest" in done.stdout
        records = [
            json.loads(line)
            for line in (tmp_path / str(more) / "r" / "metrics.jsonl").read_text().splitlines()
        ]
        losses[more] = [r["train/loss"] for r in records if "train/loss" in r]
    assert B[0] == 16 and B[1_200_000_000] in (2, 4, 8)
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1_200_000_000], abs=1e-5)
    args[args.index("--B") + 1] = "16"
    (tmp_path / "go.py").write_text(LIMITED.format(root=str(ROOT), more=600_000_000))
    done = run(
        tmp_path / "go.py", "gpt2-rope", *args, "--resume", "never", "--log_dir", tmp_path / "given"
    )
    assert (
        done.returncode == 2
        and "error: out of memory with --B 16 --T 128" in done.stderr
        and "hint: a smaller --B or --B auto" in done.stderr
    )
    assert "Traceback" not in done.stderr
