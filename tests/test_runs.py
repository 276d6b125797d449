"""python -m pytest tests/test_runs.py

The recipes of runs/, run for real at a tiny size. Programs that come first on the PATH replace what
needs a network or a cluster, and add options that make everything small; the options in the scripts
are parsed by the real programs.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, STRICT_GROUP, TINY, write_shards

SCRIPTS = sorted((ROOT / "runs").glob("*.sh"))
STEPS = 8
SMALL = [*TINY, "--vocab_size", "50304", "--max_steps", str(STEPS), "--warmup_steps", "2"]


def repository(folder: Path) -> Path:
    """Copy the files that git knows, or would add, into a folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        ignored = shutil.ignore_patterns("log", "shakespeare", ".git")
        return shutil.copytree(ROOT, folder, ignore=ignored)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def replace_programs(folder: Path, options: dict[str, list], **scripts: str) -> dict[str, str]:
    """Write programs into a folder; return the environment in which they are found first.

    python and torchrun run the real ones, with options added to those of a script; torchrun in a
    strict group. pip does nothing. scripts: further programs, in bash.
    """
    cases = ""
    for script, added in options.items():
        words = " ".join(f"'{word}'" for word in added)
        cases += f"*' {script} '*) set -- \"$@\" {words} ;;\n"
    add_options = f'case " $* " in\n{cases}esac\n'
    strict_words = (
        "words=()\n"
        'for word in "$@"; do\n'
        f"    if [[ $word == *.py ]]; then words+=('{STRICT_GROUP}'); fi\n"
        '    words+=("$word")\n'
        "done\n"
    )
    start = f'exec {sys.executable} -m torch.distributed.run "${{words[@]}}"\n'
    programs = {
        "pip": 'echo pip "$@"\n',
        "python": f'{add_options}exec {sys.executable} "$@"\n',
        "torchrun": add_options + strict_words + start,
    }
    folder.mkdir()
    for name, text in (programs | scripts).items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def bash(script: str, *args, cwd: Path, env: dict) -> subprocess.CompletedProcess:
    command = ["bash", f"runs/{script}", *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=1200)


def steps_of(run_dir: Path) -> list[int]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in records if "train/loss" in record]


def parquet_files(folder: Path) -> Path:
    """Write documents of random words as the files of a data set on the hub."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    words = np.array(["one", "two", "three", "four", "five", "\n"])
    texts = [" ".join(rng.choice(words, 300)) for _ in range(40)]
    folder.mkdir()
    parquet.write_table(pyarrow.table({"text": texts}), folder / "000_00000.parquet")
    return folder


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_syntax_and_header(script):
    """bash reads it; its comment says what it does and what to expect."""
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    header = script.read_text().split("\nset -")[0]
    assert header.startswith("#!/usr/bin/env bash\n# ") and "# Expected: " in header
    assert max(map(len, script.read_text().splitlines())) <= 100


@pytest.mark.slow
def test_gpt2_4xh100(tmp_path):
    """From parquet files to an exported model; a second call trains nothing."""
    clone = repository(tmp_path / "clone")
    source = parquet_files(tmp_path / "parquet")
    options = {
        "prepare.py": ["--source", source, "--shard_tokens", 3000],
        "audit.py": ["--T", 32, "--B", 4, "--total_batch", 512, "--max_steps", STEPS],
        "train_gpt2.py": SMALL,
        "hellaswag.py": ["--device", "cpu", "--limit", 4, "--data", "tests/hellaswag_items.jsonl"],
        "generate.py": ["--device", "cpu", "--max_new_tokens", 4],
    }
    env = replace_programs(tmp_path / "bin", options) | {"DATA": "data/tiny", "GPUS": "2"}
    for call in (1, 2):
        done = bash("gpt2_4xh100.sh", cwd=clone, env=env)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        for line in ("pip install -r requirements.txt", "nothing wrong", "speed | 16 tokens"):
            assert line in done.stdout
        assert ("step 1/" in done.stdout) == (call == 1)
    run_dir = clone / "log" / "gpt2-rope"
    assert steps_of(run_dir) == list(range(1, STEPS + 1))
    for file in ("finished.json", "hellaswag.json", "hugging-face/model.safetensors"):
        assert (run_dir / file).exists(), file


@pytest.mark.slow
def test_gpt2_4xh100_ends_at_a_mistake(tmp_path):
    """The dry run, before the loop, ends the script, also at one that only several ranks make."""
    data = write_shards(tmp_path / "data", {"train": [6000], "val": [2000]})
    options = {"train_gpt2.py": SMALL, "prepare.py": ["--help"], "audit.py": ["--help"]}
    env = replace_programs(tmp_path / "bin", options) | {"DATA": str(data), "GPUS": "3"}
    done = bash("gpt2_4xh100.sh", cwd=repository(tmp_path / "clone"), env=env)
    assert done.returncode == 1
    assert "error: total_batch 512 is not a multiple of B x T x processes" in done.stderr
    assert done.stderr.count("ChildFailedError:") == 1 and "launches" not in done.stderr


LAUNCHES = """
case "$*" in *--dry_run*) exit ;; esac
echo "$@" >> launches
n=$(wc -l < launches)
if [ "$n" -le 2 ]; then echo "  exitcode  : 1 (pid: 7)"; fi
if [ "$n" = 2 ]; then
    mkdir -p log/mine/ckpt/step_000250
    echo "step 250 | saved log/mine/ckpt/step_000250 | 1.0 s"
fi
exit 1
"""


@pytest.mark.parametrize(
    "script, node", [("gpt2_4xh100.sh", 0), ("two_machines.sh", 0), ("two_machines.sh", 1)]
)
def test_launches_end_without_progress(tmp_path, script, node):
    """After three in a row: each may cost ten minutes of several GPUs. Here the second saves."""
    helps = dict.fromkeys(("train_gpt2.py", "prepare.py", "audit.py"), ["--help"])
    env = replace_programs(tmp_path / "bin", helps, torchrun=LAUNCHES, sleep=":")
    env |= {"RUN": "mine", "NODE_RANK": str(node), "MASTER_ADDR": "127.0.0.1"}
    clone = repository(tmp_path / "clone")
    done = bash(script, cwd=clone, env=env)
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: 3 launches in a row without a new checkpoint; hint: the messages above\n"
    )
    launches = (clone / "launches").read_text().splitlines()
    assert len(launches) == 5
    assert all("--run_name mine" in line for line in launches) == (script == "gpt2_4xh100.sh")


@pytest.mark.slow
def test_gpt2_4xh100_ends_when_the_run_diverges(tmp_path):
    """After one launch: each would end the same, and cost what a GPU costs."""
    data = write_shards(tmp_path / "data", {"train": [6000], "val": [2000]})
    diverging = [*SMALL, "--max_lr", "1e20", "--min_lr", "0", "--warmup_steps", "0"]
    options = {"train_gpt2.py": diverging, "prepare.py": ["--help"], "audit.py": ["--help"]}
    env = replace_programs(tmp_path / "bin", options) | {"DATA": str(data), "GPUS": "1"}
    clone = repository(tmp_path / "clone")
    done = bash("gpt2_4xh100.sh", cwd=clone, env=env)
    assert done.returncode == 3, done.stderr[-3000:]
    assert done.stdout.count("compile | once") + done.stdout.count("step 1/") == 1
    run_dir = clone / "log" / "gpt2-rope"
    assert "is nan at step" in json.loads((run_dir / "diverged.json").read_text())["error"]
    assert not (run_dir / "finished.json").exists()


SRUN = """
[ "$1" = --cpus-per-task=8 ] || exit 9
shift
for i in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    tasks+=($!)
done
if [ -e early ]; then
    rm early
    kill -USR1 "${tasks[@]}"
fi
if [ -e preempt ]; then
    rm preempt
    until grep -q '"step": 3' log/gpt2-rope/metrics.jsonl 2> /dev/null; do sleep 0.02; done
    kill -USR1 "${tasks[@]}"
fi
highest=0
for task in "${tasks[@]}"; do
    status=0
    wait "$task" || status=$?
    highest=$((status > highest ? status : highest))
done
exit "$highest"
"""
SCONTROL = """
if [ "$1" = show ]; then
    echo localhost
else
    echo "$@" >> requeued
fi
"""


@pytest.mark.slow
def test_slurm(tmp_path):
    """SIGUSR1: the job is queued again, with a checkpoint if training has begun; then it finishes.

    A mistake ends it, also in a second run beside one that has finished.
    """
    clone = repository(tmp_path / "clone")
    data = write_shards(tmp_path / "data", {"train": [6000, 4000], "val": [2000]})
    options = {"train_gpt2.py": [*SMALL, "--max_steps", 40, "--data_root", data]}
    env = replace_programs(tmp_path / "bin", options, srun=SRUN, scontrol=SCONTROL)
    env |= {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": str(os.getpid())}
    run_dir = clone / "log" / "gpt2-rope"

    for n, when in enumerate(("early", "preempt"), 1):
        (clone / when).touch()
        stopped = bash("slurm.sh", cwd=clone, env=env)
        assert stopped.returncode == 0, stopped.stdout[-3000:] + stopped.stderr[-3000:]
        assert (clone / "requeued").read_text() == f"requeue {os.getpid()}\n" * n
        assert not (run_dir / "finished.json").exists()

    done = bash("slurm.sh", cwd=clone, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "resume | step" in done.stdout and (run_dir / "finished.json").exists()
    assert steps_of(run_dir) == list(range(1, 41))
    assert (clone / "requeued").read_text().count("requeue") == 2

    options["train_gpt2.py"] += ["--B", 0]
    programs = replace_programs(tmp_path / "bin2", options, srun=SRUN, scontrol=SCONTROL)
    env["PATH"] = programs["PATH"]
    mistake = bash("slurm.sh", "--run_name", "second", cwd=clone, env=env)
    assert mistake.returncode == 2 and mistake.stderr.count("error: B is 0") == 1


def two_machines(folder: Path, *options) -> list[int]:
    """Run runs/two_machines.sh in two directories, as two machines; return their exit statuses."""
    folder.mkdir()
    data = write_shards(folder / "data", {"train": [6000, 4000], "val": [2000]})
    options = {"train_gpt2.py": [*SMALL, "--data_root", data, *options]}
    env = replace_programs(folder / "bin", options)
    port = 20000 + os.getpid() % 10000
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GPUS": "1"}
    machines = []
    for rank in range(2):
        clone = repository(folder / f"machine{rank}")
        command = ["bash", "runs/two_machines.sh"]
        with open(folder / f"output{rank}", "w") as output:
            more = {"cwd": clone, "stdout": output, "stderr": subprocess.STDOUT}
            machines.append(subprocess.Popen(command, env=env | {"NODE_RANK": str(rank)}, **more))
    return [machine.wait(timeout=1200) for machine in machines]


@pytest.mark.slow
def test_two_machines(tmp_path):
    """Two launches from two directories are one run; the first one has its records."""
    folder = tmp_path / "run"
    assert two_machines(folder) == [0, 0], (folder / "output0").read_text()[-3000:]
    assert steps_of(folder / "machine0" / "log" / "gpt2-rope") == list(range(1, STEPS + 1))
    assert not (folder / "machine1" / "log" / "gpt2-rope").exists()


@pytest.mark.slow
def test_two_machines_end_when_the_run_diverges(tmp_path):
    """Both after one launch: each would end the same, and cost what GPUs cost."""
    folder = tmp_path / "run"
    statuses = two_machines(folder, "--max_lr", "1e20", "--min_lr", "0", "--warmup_steps", "0")
    assert statuses == [3, 3], [(folder / f"output{n}").read_text()[-3000:] for n in range(2)]
    assert "is nan at step" in (folder / "output0").read_text()


def test_two_machines_needs_an_address():
    missing = bash("two_machines.sh", cwd=ROOT, env=os.environ | {"NODE_RANK": "0"})
    assert missing.returncode != 0 and "the address of the first machine" in missing.stderr
