"""python -m pytest -n 0 -m slow tests/test_soak.py : many faults in a row, and power cuts."""

import os
import random
import re
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import TINY, files, lose_the_end, options, python, write_shards
from test_faults import assert_equal, corrupt

from runtime import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_shards(folder, {"train": [4033, 3489, 4001], "val": [1100]}, ids=512)


@pytest.fixture(scope="module")
def train(data, launch):
    """train(log_dir, output, steps) starts a run `r`, resumes it, or does nothing when finished."""
    settings = options(
        "gpt2-rope",
        *TINY,
        "--total_batch 128 --warmup_steps 100 --max_lr 1e-2 --eval_interval 1000",
        "--save_interval 20 --keep_last 3 --batch_hashes True --run_name r --data_root",
        data,
    )

    def train(log_dir: Path, output: Path, steps: int, *changes):
        argv = options(*settings, "--log_dir", log_dir, f"--max_steps {steps}", *changes)
        return launch(argv, output)

    return train


def whole_run(train, folder: Path, steps: int) -> Path:
    """Train a run that nothing touches, and return its directory."""
    folder.mkdir()
    process = train(folder, folder / "whole.txt", steps)
    process.join()
    assert process.exitcode == 0, (folder / "whole.txt").read_text()
    return folder / "r"


def wait_for(words: str, output: Path, process):
    """Wait until the output holds the words, or the process has ended."""
    while process.is_alive() and words not in output.read_text():
        time.sleep(0.002)


# --------------------------------------------------------------------------------------------------
# faults in a row

# what is sent to the process, with up to 30 ms between
SIGNALS = {
    "killed": [signal.SIGKILL],
    "SIGTERM": [signal.SIGTERM],
    "Ctrl-C": [signal.SIGINT],
    "Ctrl-C twice": [signal.SIGINT, signal.SIGINT],
    "SIGHUP": [signal.SIGHUP],
    "SIGUSR1": [signal.SIGUSR1],
    "stopped, continued, killed": [signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL],
    "SIGTERM, then killed": [signal.SIGTERM, signal.SIGKILL],
}
# the last ones when they come after the end of the run, which gives the handlers back
ENDS = {0, 75, -signal.SIGKILL, -signal.SIGINT}
ENDS |= {-signal.SIGTERM, -signal.SIGHUP, -signal.SIGUSR1}
TORN_LINES = (b"\0" * 4096, b'{"step": 99', b"\xff\xfe{}\n", b"\n\n\n")
TORN_FILES = (b"", b"\0" * 100, b'{"preset": "gp')


def damage_checkpoint(run_dir: Path, rng: random.Random):
    """Damage the newest checkpoint, where there is another one to fall back to."""
    there = checkpoint.steps(run_dir / "ckpt")
    if len(there) > 1:
        corrupt(there[-1], rng)


def damage_log(run_dir: Path, rng: random.Random):
    """Leave a last line as a crash may."""
    with open(run_dir / "metrics.jsonl", "ab") as f:
        f.write(rng.choice(TORN_LINES))


def damage_settings(run_dir: Path, rng: random.Random):
    """Leave a settings file as a power cut may."""
    (run_dir / rng.choice(["config.json", "env.json"])).write_bytes(rng.choice(TORN_FILES))


DAMAGES = (damage_checkpoint, damage_log, damage_settings)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sixty_faults_in_a_row_change_nothing(train, tmp_path, seed):
    """Signals at random moments, after every third some damage: the end is the untouched run's."""
    rng, steps = random.Random(seed), 4000
    whole = whole_run(train, tmp_path / "whole", steps)
    run_dir, output = tmp_path / "r", tmp_path / "out.txt"
    hit = 0
    while hit < 60:
        output.write_text("")
        process = train(tmp_path, output, steps)
        wait_for(rng.choice(["data |", "first pass |", "saved", "step "]), output, process)
        time.sleep(rng.uniform(0, 0.1))
        name = rng.choice(list(SIGNALS))
        hit += process.is_alive()
        for number in SIGNALS[name]:
            if process.is_alive():
                os.kill(process.pid, number)
            time.sleep(rng.uniform(0, 0.03))
        process.join()
        text = output.read_text()
        assert process.exitcode in ENDS and "Traceback" not in text, (hit, name, text)
        if (run_dir / "finished.json").exists():
            lose_the_end(run_dir)
        elif hit % 3 == 2 and (run_dir / "metrics.jsonl").exists():
            rng.choice(DAMAGES)(run_dir, rng)
    process = train(tmp_path, output, steps)
    process.join()
    assert process.exitcode == 0, output.read_text()
    assert_equal(run_dir, whole)
    print(f"{hit} faults in a row: the same losses, batches, weights and moments")


# --------------------------------------------------------------------------------------------------
# power cuts

# size of an image, and options of mount: ext4 shall not guess what should have been flushed
FILE_SYSTEMS = {
    "ext4": ("64M", "loop,noauto_da_alloc"),
    "xfs": ("320M", "loop,nouuid"),
    "btrfs": ("150M", "loop"),
}


class Disk:
    """A file system in an image, and what of it survives when the power is cut."""

    def __init__(self, folder: Path, kind: str, copy_of: Path | None = None):
        self.folder, self.kind = folder, kind
        self.image, self.place = folder / "image", folder / "mounted"
        self.place.mkdir(parents=True)
        size, self.options = FILE_SYSTEMS[kind]
        if copy_of:
            call("cp", "--sparse=always", copy_of, self.image)
        else:
            call("truncate", "-s", size, self.image)
            call(f"mkfs.{kind}", "-q", "-F" if kind == "ext4" else "-f", self.image)

    @contextmanager
    def mounted(self):
        call("mount", "-o", self.options, self.image, self.place)
        try:
            yield self.place
        finally:
            call("umount", self.place)

    def cut(self) -> "Disk":
        """Return a copy with what the file system has handed to the disk until now."""
        return Disk(self.folder / "after", self.kind, copy_of=self.image)


def call(*words):
    subprocess.run(list(map(str, words)), check=True, capture_output=True)


@pytest.fixture(params=FILE_SYSTEMS)
def new_disk(request, tmp_path):
    """new_disk(name) makes an empty disk of each file system."""
    kind = request.param
    try:
        with Disk(tmp_path / "trial", kind).mounted():
            pass
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"needs loop mounts of {kind}: {e}")
    return lambda name: Disk(tmp_path / str(name), kind)


def freeze(pid: int):
    """Stop a process if it is still there; it shall write no more."""
    try:
        os.kill(pid, signal.SIGSTOP)
    except ProcessLookupError:
        pass


def test_a_power_cut_while_training_loses_nothing(train, new_disk, tmp_path):
    """Between two steps, in a save, at the end: the copy resumes and ends as the untouched run."""
    rng, steps = random.Random(5), 600
    whole = whole_run(train, tmp_path / "whole", steps)
    moments = ["first pass |", "step 40 | saved", "step 300/", "step 580 | saved", "finished in"]
    for n, moment in enumerate(moments):
        disk, output = new_disk(n), tmp_path / f"{n}.txt"
        output.write_text("")
        with disk.mounted() as folder:
            os.sync()
            process = train(folder, output, steps)
            wait_for(moment, output, process)
            time.sleep(rng.uniform(0, 0.1))
            freeze(process.pid)
            saved = re.findall(r"step (\d+) \| saved", output.read_text())
            after = disk.cut()
            process.kill()
            process.join()
        with after.mounted() as folder:
            there = [checkpoint.step_of(path) for path in checkpoint.steps(folder / "r" / "ckpt")]
            assert not saved or int(saved[-1]) <= max(there), (moment, saved, there)
            process = train(folder, output, steps)
            process.join()
            assert process.exitcode == 0, output.read_text()
            assert_equal(folder / "r", whole)


def contents(out: Path) -> dict[str, bytes]:
    """Return the content of every file in a folder by its name."""
    return {str(path.relative_to(out)): content for path, content in files(out).items()}


@pytest.mark.parametrize("command", ["files", "fineweb-edu"])
def test_a_power_cut_while_preparing_loses_nothing(new_disk, tmp_path, command):
    """After each number of shards the same command makes the same files; the end is on disk."""
    source = tmp_path / "in"
    source.mkdir()
    rng = random.Random(6)
    for n in range(3):
        words = [[str(rng.randrange(1000)) for _ in range(300)] for _ in range(20)]
        texts = [" ".join(document) for document in words]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), source / f"{n}.parquet")
    inputs = [source] if command == "files" else ["--source", source]
    wanted = None
    for shards in (None, 1, 3, 6, 10, "all"):
        disk = new_disk(shards)
        with disk.mounted() as folder:
            os.sync()
            out = folder / "out"
            argv = options("prepare.py", command, *inputs, "--shard_tokens 2000 --out")
            process = subprocess.Popen(python(*argv, out), stdout=subprocess.DEVNULL)
            while process.poll() is None:
                if isinstance(shards, int) and len(list(out.rglob("*.npy"))) >= shards:
                    break
                time.sleep(0.001)
            freeze(process.pid)
            if shards is None:
                assert process.returncode == 0
                wanted = contents(out)
                continue
            after = disk.cut()
            process.kill()
            process.wait()
        with after.mounted() as folder:
            out = folder / "out"
            whole = contents(out) == wanted
            assert whole or shards != "all"
            again = subprocess.run(python(*argv, out), capture_output=True, text=True)
            # `files` overwrites nothing: where all is there, it says so
            done = command == "files" and "already holds" in again.stderr and whole
            assert again.returncode == 0 or done, again.stderr
            assert contents(out) == wanted, shards
