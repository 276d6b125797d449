"""python -m pytest tests/test_checkpoint.py : checkpoints on file systems as they are.

Ones that cannot sync directories, have no locks or count no blocks; ones that are full, private,
read-only or shared. Runs that are interrupted are in test_faults.py.
"""

import errno
import fcntl
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import types
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, at_step, files, options, write_shards

import hf
from runtime import checkpoint
from runtime.checkpoint import Unreadable
from runtime.command_line import UserError
from runtime.files import atomic, error_number, remedy
from runtime.lock import Lock


@pytest.fixture(scope="module")
def folder():
    """A folder that every user can look into: pytest's own are private."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


@pytest.fixture(scope="module")
def command(folder):
    """A run of four steps with checkpoints at 2 and 4."""
    data = write_shards(folder / "data", {"train": [4033], "val": [1100]}, ids=512)
    steps = "--max_steps 4 --save_interval 2 --eval_interval 4 --warmup_steps 0 --data_root"
    return options("gpt2-rope", *TINY, steps, data)


@pytest.fixture
def train(command, tmp_path, train_here, fast_curves):
    """train(name, *changes) runs the script in this process; (exit status, what it printed)."""

    def train(name, *changes):
        return train_here(*command, "--log_dir", tmp_path, "--run_name", name, *changes)

    return train


@contextmanager
def as_another_user():
    """Inside the block, permissions count: root would pass over them."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def small(ckpt_dir: Path, *steps: int) -> Path:
    """Write checkpoints of one number."""
    for step in steps:
        tensors = {"model.safetensors": {"x": torch.tensor([float(step)])}}
        checkpoint.write(ckpt_dir, step, tensors, {})
    return ckpt_dir


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------------------------------
# what a file system cannot do, against what failed


def failing_fsync(number: int, of_directories: bool):
    """Return an os.fsync that fails for directories, or for files."""
    fsync = os.fsync

    def failing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_directories:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    return failing


NO_SYNC = [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS]


@pytest.mark.parametrize("number", NO_SYNC)
def test_a_directory_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", failing_fsync(number, of_directories=True))
    assert checkpoint.read(small(tmp_path, 1) / "step_000001").step == 1


@pytest.mark.parametrize(
    "number, of_directories", [(errno.EIO, True), (errno.EIO, False), (errno.EINVAL, False)]
)
def test_other_errors_of_fsync_are_failures(tmp_path, monkeypatch, number, of_directories):
    monkeypatch.setattr(os, "fsync", failing_fsync(number, of_directories))
    with pytest.raises(OSError), atomic(tmp_path / "a") as temporary:
        temporary.write_text("a")


def test_what_is_renamed_is_on_the_disk_first_and_its_name_afterwards(tmp_path, monkeypatch):
    """In this order: its files, its directory, the rename, the directory that has its name."""
    fsync, replace = os.fsync, os.replace
    calls = []

    def noted(descriptor):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source, target):
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", renamed)
    small(tmp_path / "ckpt", 1)
    temporary = f".step_000001.{os.getpid()}.tmp"
    assert sorted(calls[:2]) == ["model.safetensors", "state.json"]
    assert calls[2:] == [temporary, "rename", "ckpt"]


def test_a_disk_that_counts_no_blocks_is_not_full(train, monkeypatch):
    usage = types.SimpleNamespace(total=0, used=0, free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    status, out = train("r")
    assert status == 0 and "does not say how much room it has" in out


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "make room in /ckpt"),
        (errno.EDQUOT, "make room in /ckpt: your quota"),
        (errno.EACCES, "change the permissions of /ckpt"),
        (errno.EROFS, "mount /ckpt"),
        (errno.ENOTEMPTY, "move away"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "the disk of /ckpt"),
    ],
)
def test_hints_follow_the_error(number, words):
    hint = remedy(OSError(number, os.strerror(number)), "/ckpt")
    assert words in hint
    assert ("room" in hint) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_the_error_number_is_known_through_safetensors(tmp_path):
    """It raises an error of its own with the system's in the text."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(Exception) as raised:
            checkpoint.save_tensors({"x": torch.zeros(1000)}, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error_number(raised.value) == errno.EFBIG


# --------------------------------------------------------------------------------------------------
# before the first step


def refused_at_the_start(train, words: str, *changes):
    """Assert that a run ends in this error before its first step."""
    stepped = []
    with at_step(stepped.append), pytest.raises(UserError, match=words):
        train("r", *changes)
    assert not stepped


def test_a_directory_that_cannot_be_written_ends_the_run_before_its_first_step(folder, train):
    private = folder / "private"
    private.mkdir(mode=0o755)
    small(private / "r" / "ckpt")
    (private / "r" / "ckpt").mkdir(parents=True)
    os.chmod(private / "r" / "ckpt", 0o555)
    with as_another_user():
        words = "cannot write to .*r/ckpt: PermissionError.*permissions of .*ckpt"
        refused_at_the_start(train, words, "--log_dir", private)
    assert names(private / "r") == ["ckpt"] and not names(private / "r" / "ckpt")


def test_a_directory_that_cannot_rename_ends_the_run_before_its_first_step(
    train, tmp_path, monkeypatch
):
    replace = os.replace

    def refuse_directories(source, target):
        if os.path.isdir(source):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_directories)
    refused_at_the_start(train, "cannot write to .*r/ckpt: .*Invalid cross-device link")
    assert not names(tmp_path / "r" / "ckpt")


def test_a_log_directory_that_is_a_file_is_one_line(train, tmp_path):
    (tmp_path / "file").write_text("")
    refused_at_the_start(train, "cannot write to .*file/r.*hint: ", "--log_dir", tmp_path / "file")


# --------------------------------------------------------------------------------------------------
# permissions


@pytest.mark.parametrize("umask, missing", [(0o022, 0o044), (0o077, 0o077)])
def test_everything_that_a_run_writes_follows_the_umask(train, tmp_path, umask, missing):
    """Readable for all, or for nobody else, as the user has it; also what safetensors writes."""
    before = os.umask(umask)
    try:
        assert train("r")[0] == 0
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert any(path.name == "model.safetensors" for path in modes)
    wanted = missing if umask == 0o022 else 0
    assert [path for path, mode in modes.items() if mode & missing != wanted] == []


def test_what_cannot_be_read_is_neither_damaged_nor_passed_over(folder, command, train):
    """A private file in the newest checkpoint: one error that names it, and all stays there."""
    runs = folder / "runs"
    runs.mkdir(mode=0o777)
    runs.chmod(0o777)
    with as_another_user():
        assert train("r", "--log_dir", runs)[0] == 0
    private = runs / "r" / "ckpt" / "step_000004" / "model.safetensors"
    os.chmod(private, 0)
    before = names(runs / "r" / "ckpt")
    (runs / "r" / "finished.json").unlink()
    with as_another_user():
        for use in (lambda: train("r", "--log_dir", runs), lambda: hf.load(str(runs / "r"))):
            with pytest.raises(UserError, match=f"{private} cannot be read.*hint: .*permissions"):
                use()
    assert names(runs / "r" / "ckpt") == before
    os.chmod(private, 0o644)


def test_a_private_run_is_one_line(folder, train):
    private = folder / "of_root"
    (private / "r" / "ckpt").mkdir(parents=True)
    small(private / "r" / "ckpt", 4)
    (private / "r").chmod(0)
    with as_another_user():
        for use in (
            lambda: train("r", "--log_dir", private),
            lambda: checkpoint.find(private / "r"),
            lambda: hf.load(str(private / "r")),
        ):
            with pytest.raises(UserError, match="of_root/r.* cannot be read.*permissions"):
                use()
    (private / "r").chmod(0o755)


# --------------------------------------------------------------------------------------------------
# read errors that pass


def failing_reads(monkeypatch, number: int, times: int):
    """Let the first reads of a weights file fail."""
    sha256, left = checkpoint.sha256, [number] * times

    def failing(path):
        if left and path.name == "model.safetensors":
            left.pop()
            raise OSError(number, os.strerror(number))
        return sha256(path)

    monkeypatch.setattr(checkpoint, "sha256", failing)
    monkeypatch.setattr(checkpoint, "READ_AGAIN", (0, 0))


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_read_error_that_passes_costs_no_checkpoint(tmp_path, monkeypatch, number):
    small(tmp_path, 1, 2)
    failing_reads(monkeypatch, number, times=2)
    assert checkpoint.newest(tmp_path, rename_bad=True).step == 2
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_a_read_error_that_stays_is_an_error_and_no_damage(tmp_path, monkeypatch):
    small(tmp_path, 1, 2)
    failing_reads(monkeypatch, errno.EIO, times=99)
    with pytest.raises(Unreadable, match="step_000002 cannot be read.*Input/output error"):
        checkpoint.newest(tmp_path, rename_bad=True)
    assert names(tmp_path) == ["step_000001", "step_000002"]


# --------------------------------------------------------------------------------------------------
# locks


def test_a_lock_keeps_a_directory_until_it_is_closed(tmp_path):
    first = Lock(tmp_path)
    with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on "):
        Lock(tmp_path)
    first.close()
    assert not names(tmp_path)
    second = Lock(tmp_path)
    first.close()  # once
    with pytest.raises(BlockingIOError):
        Lock(tmp_path)
    second.close()


HOLDER = """
import sys
from pathlib import Path
from runtime.lock import Lock
lock = Lock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def start_holder(folder: Path) -> subprocess.Popen:
    """Start a process that holds the lock of a directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.mark.parametrize("supported", [True, False])
def test_the_lock_of_a_killed_process_is_free(tmp_path, monkeypatch, supported):
    """With the system's locks, and by the number in the file where there are none."""

    def refuse(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    if not supported:
        monkeypatch.setattr(fcntl, "flock", refuse)
    holder = start_holder(tmp_path)
    with pytest.raises(BlockingIOError, match=f"process {holder.pid} on "):
        Lock(tmp_path)
    holder.kill()
    holder.communicate()
    lock = Lock(tmp_path)
    assert lock.supported == supported
    lock.close()


def test_two_runs_cannot_share_a_checkpoint_directory_at_once(train, tmp_path):
    """The later one is refused at its start, and touches nothing; afterwards it may."""
    shared = tmp_path / "ckpt"
    small(shared, 1)
    (shared / "step_000001" / "model.safetensors").write_bytes(b"damaged")
    before = files(shared / "step_000001")
    lock = Lock(shared)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json").write_text("{")
    refused_at_the_start(train, "another process is writing to .*ckpt", "--ckpt_dir", shared)
    assert files(shared / "step_000001") == before
    assert names(tmp_path / "r") == ["config.json"]
    lock.close()
    shutil.rmtree(shared)
    assert train("r", "--ckpt_dir", shared)[0] == 0


def test_a_run_gives_its_locks_back(train, tmp_path):
    """However it ends: a notebook resumes it in the same process."""
    ckpt_dir = tmp_path / "r" / "ckpt"

    def fail(step):
        raise RuntimeError("a bug")

    with at_step(fail, only=3), pytest.raises(RuntimeError, match="a bug"):
        train("r")
    assert names(ckpt_dir) == ["step_000002"]
    assert train("r")[0] == 0
    assert names(ckpt_dir) == ["step_000002", "step_000004"]
