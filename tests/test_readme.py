"""What the README says is so: its commands run or are understood, its files exist."""

import contextlib
import io
import re
import runpy
import shlex
import sys

import pytest
from conftest import ROOT, run

from config import PRESETS, from_command_line

README = (ROOT / "README.md").read_text()
NOTES = [README, *(path.read_text() for path in sorted(ROOT.glob("notes/*.md")))]


def commands(text: str) -> list[str]:
    """Command lines in code blocks, and those in backticks that begin with python or torchrun."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    lines += re.findall(
        r"`((?:python|torchrun) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S)
    )
    return [line for line in lines if line and not line.startswith("#")]


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 120
    recipe = next(i for i, line in enumerate(lines) if "--nproc_per_node=4" in line)
    assert recipe < 60


def test_the_two_commands_stand_first():
    assert commands(README)[:2] == [
        "pip install -r requirements.txt && python train_gpt2.py",
        "pip install -r requirements.txt && python -m pytest",
    ]


def test_the_main_job_and_what_comes_after(clone):
    """The first command from a fresh clone, shortened, without a network; then the next ones."""
    options = "--max_steps 4 --val_tokens 8192 --sample_tokens 100".split()
    offline = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    env = {"OMP_NUM_THREADS": "2"} | offline
    done = run("train_gpt2.py", *options, cwd=clone, timeout=600, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for words in (
        "no preset given: shakespeare",
        "train_gpt2.py gpt2-rope",
        "bigram | a bigram model gets val loss 5.",
        "step 4/4 | loss",
        "sample 0",
        "finished in",
        "python generate.py --model log/shakespeare",
    ):
        assert words in done.stdout, words
    left = {path.name for path in (clone / "log" / "shakespeare").iterdir()}
    assert left >= {"config.json", "env.json", "metrics.jsonl", "curves.png", "samples.txt", "ckpt"}
    again = run("train_gpt2.py", "--max_steps", "4", cwd=clone)
    assert again.returncode == 0 and "already finished" in again.stdout
    sampled = run("generate.py", "--prompt", "ROMEO:", "--max_new_tokens", "20", cwd=clone)
    assert sampled.returncode == 0, sampled.stderr
    assert "ROMEO:" in sampled.stdout and "log/shakespeare" in sampled.stdout


def test_your_own_data_and_experiment(clone):
    """The commands of that section on a small text and a tiny model: shards, two runs, a table."""
    text = (clone / "data" / "input.txt").read_text()[:200_000]
    (clone / "my.txt").write_text(text)
    steps = [
        "prepare.py files my.txt --out data/my --val_share 0.2",
        "audit.py data/my --T 64 --total_batch 512 --B 4 --max_steps 4",
        "train_gpt2.py gpt2-rope --data_root data/my --max_steps 4 --run_name a",
        "train_gpt2.py gpt2-swiglu --data_root data/my --max_steps 4 --run_name b",
        "compare.py log/a log/b --out compare.png",
        "hellaswag.py --model log/a --data tests/hellaswag_items.jsonl --limit 4",
        "generate.py --model log/a --prompt Once --max_new_tokens 4",
        "hf.py export log/a my-gpt2",
    ]
    tiny = (
        "--n_layer 1 --n_head 2 --n_embd 16 --T 64 --block_size 1024 --B 4 --total_batch 512 "
        "--val_tokens 512 --hellaswag_limit 0 --n_samples 0 --no-use_compile --wandb off"
    )
    for step in steps:
        more = tiny.split() if "train_gpt2" in step else []
        done = run(*step.split(), *more, cwd=clone)
        assert done.returncode == 0, f"{step}: {done.stdout[-500:]} {done.stderr[-1500:]}"
    assert (clone / "compare.png").exists() and (clone / "my-gpt2" / "config.json").exists()


TRAINING = {c for text in NOTES for c in commands(text) if "train_gpt2.py" in c}


@pytest.mark.parametrize("command", sorted(TRAINING))
def test_training_commands_are_understood(command):
    words = command.split("train_gpt2.py", 1)[1].split(">")[0].split("||")[0]
    argv = shlex.split(words.removesuffix("&").strip())
    if argv[:1] == ["PRESET"]:
        argv[0] = "gpt2-rope"
    if "--help" in argv:
        return
    cfg, _ = from_command_line(argv)
    assert cfg.preset in PRESETS


SCRIPTS = (
    "prepare.py",
    "audit.py",
    "generate.py",
    "hellaswag.py",
    "hf.py",
    "compare.py",
    "study.py",
)


@pytest.fixture(scope="module")
def help_texts():
    """What `--help` says, by script; subcommands of prepare.py and hf.py included."""
    subcommands = {
        "prepare.py": ("shakespeare", "files", "fineweb-edu"),
        "hf.py": ("import", "export"),
    }
    texts = {}
    for script in SCRIPTS:
        texts[script] = ""
        for words in [(), *((name,) for name in subcommands.get(script, ()))]:
            printed = io.StringIO()
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
                patch.setattr(sys, "argv", [script, *words, "--help"])
                with pytest.raises(SystemExit) as e:
                    runpy.run_path(str(ROOT / script), run_name="__main__")
            assert not e.value.code
            texts[script] += printed.getvalue()
    return texts


def test_options_of_the_other_scripts_exist(help_texts):
    for text in NOTES:
        for command in commands(text):
            for script in SCRIPTS:
                if f"python {script}" not in command:
                    continue
                for option in re.findall(r"--([a-z_A-Z]+)", command.split(script, 1)[1]):
                    assert f"--{option}" in help_texts[script], command


def test_presets_and_files_in_the_text_exist():
    for name in re.findall(r"`(gpt2-[a-z0-9-]+|shakespeare)`", README):
        assert name in PRESETS, name
    for name in re.findall(r"`([\w/.-]+\.(?:py|sh))`", README):
        assert (ROOT / name).exists(), name
