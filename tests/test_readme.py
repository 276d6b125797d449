"""python -m pytest tests/test_readme.py : what the README says is so: its commands, links, figures and line counts."""

import dataclasses
import inspect
import re
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT, run

import generate
import prepare
from config import PRESETS, UserError, from_command_line

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


def test_the_two_commands_stand_first():
    assert COMMANDS[:2] == [
        "pip install -r requirements.txt && python train_gpt2.py",
        "pip install -r requirements.txt && python -m pytest",
    ]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The tracked files alone, as after `git clone`."""
    folder = tmp_path_factory.mktemp("clone") / "repo"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        shutil.copytree(
            ROOT, folder, ignore=shutil.ignore_patterns("log", "input.txt", "shakespeare", ".git")
        )
        return folder
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def test_the_main_job_and_what_comes_after(clone):
    """The first command from a fresh clone, shortened: data, training, evaluation, samples, curves, checkpoint."""
    done = run(
        "train_gpt2.py",
        "--max_steps",
        "20",
        "--val_tokens",
        "8192",
        "--sample_tokens",
        "100",
        cwd=clone,
        timeout=280,
        env={"OMP_NUM_THREADS": "2"},
    )
    if done.returncode == 2 and "no text:" in done.stderr:
        pytest.skip("neither Tiny Shakespeare's address nor a package index can be reached")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for word in (
        "no preset given: shakespeare",
        "train_gpt2.py gpt2-rope",
        "text: ",
        "bigram | val loss 5.",
        "step 20/20 | loss",
        "sample 0",
        "finished",
    ):
        assert word in done.stdout, word
    run_dir = clone / "log" / "shakespeare"
    assert {"config.json", "env.json", "metrics.jsonl", "curves.png", "samples.txt", "ckpt"} <= {
        p.name for p in run_dir.iterdir()
    }
    again = run("train_gpt2.py", "--max_steps", "20", cwd=clone)
    assert again.returncode == 0 and "already finished" in again.stdout
    sampled = run("generate.py", "--prompt", "ROMEO:", "--max_new_tokens", "20", cwd=clone)
    assert (
        sampled.returncode == 0
        and "ROMEO:" in sampled.stdout
        and "log/shakespeare" in sampled.stdout
    )


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train_gpt2.py" in c])
def test_training_commands_are_understood(command):
    argv = shlex.split(command.split("train_gpt2.py", 1)[1].split(">")[0].removesuffix("&"))
    cfg, _ = from_command_line(argv)
    assert cfg.preset in PRESETS


def test_every_preset_and_flag_in_the_text_exists():
    for name in re.findall(r"`(gpt2-[a-z0-9-]+|shakespeare)`", README):
        assert name in PRESETS or name in ("gpt2-modern",), name
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    others = {f.name for f in dataclasses.fields(generate.Settings)} | {
        *inspect.signature(prepare.fineweb_edu).parameters
    }
    for flag in set(re.findall(r"`--([a-z_A-Z]+)", text)) - others:
        try:
            from_command_line(["gpt2-rope", f"--{flag}", "1"])
        except UserError as e:
            assert "no option" not in str(e), flag
        except SystemExit:  # the flag exists, 1 is not a value of its kind
            pass


def test_links_and_line_counts():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    rows = dict(re.findall(r"^\| `(\S+\.py)` \| (\d+) \|", README, re.MULTILINE))
    assert rows.keys() == {p.name for p in ROOT.glob("*.py")}
    for name, count in rows.items():
        assert abs(len((ROOT / name).read_text().splitlines()) - int(count)) <= 15, (
            f"{name}: README says {count}"
        )
