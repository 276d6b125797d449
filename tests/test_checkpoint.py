"""python -m pytest tests/test_checkpoint.py : checkpoints on file systems as they are.

Ones that cannot sync directories, have no locks or count no blocks; ones that are full, private,
read-only or shared. Runs that are interrupted are in test_faults.py.
"""

import dataclasses
import errno
import fcntl
import json
import os
import resource
import shutil
import stat
import tempfile
import time
import types
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import TINY, at_step, files, options, start_waiting, write_shards

import hf
import optim
from config import preset
from model import GPT, GPTConfig
from runtime import checkpoint
from runtime.checkpoint import Unreadable
from runtime.command_line import UserError
from runtime.files import atomic, error_number, remedy
from runtime.lock import Lock
from runtime.runlog import RunLog


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


@pytest.fixture
def done(train, folder):
    """A run that is done; made once."""
    if not (folder / "done").exists():
        assert train("done", "--log_dir", folder)[0] == 0
    return folder / "done"


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


def test_checkpoints_may_lie_in_the_run_directory_itself(train, tmp_path):
    """Both are locked, by one process."""
    assert train("r", "--ckpt_dir", tmp_path / "r")[0] == 0
    assert "step_000004" in names(tmp_path / "r")


def test_checkpoints_that_cannot_be_set_aside_are_not_called_valid(tmp_path, monkeypatch, capsys):
    model = torch.nn.Linear(1, 1)
    cfg = preset("gpt2-rope", ckpt_dir=str(tmp_path))
    saver = checkpoint.Saver(cfg, model, torch.optim.AdamW(model.parameters()), RunLog())
    small(tmp_path, 1, 2)
    monkeypatch.setattr(checkpoint, "rename_aside", broken_disk)
    saver.set_aside(0)
    out = capsys.readouterr().out
    assert "not set aside" in out and "valid" not in out


def broken_disk(*args):
    raise OSError(5, "Input/output error")


def test_what_cannot_be_read_is_neither_damaged_nor_passed_over(folder, command, train):
    """A private file in the newest checkpoint: one error that names it, and all stays there."""
    runs = folder / "runs"
    runs.mkdir(mode=0o777)
    runs.chmod(0o777)
    train("first")  # loads all modules, which the other user may not be allowed to read
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


@pytest.mark.parametrize("supported", [True, False])
def test_the_lock_of_a_killed_process_is_free(tmp_path, monkeypatch, supported):
    """With the system's locks, and by the number in the file where there are none."""

    def refuse(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    if not supported:
        monkeypatch.setattr(fcntl, "flock", refuse)
    holder = start_waiting(HOLDER, tmp_path, "locked")
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


def test_what_another_process_trained_meanwhile_is_not_overwritten(tmp_path):
    """It had the directory after this one chose where to resume, and has given it back."""
    cfg = preset("gpt2-rope", ckpt_dir=str(small(tmp_path, 5)))
    with pytest.raises(UserError, match="another process has written step_000005"):
        checkpoint.open_directory(cfg, GPT(TOY), start_step=0)
    assert names(tmp_path) == ["step_000005"]


# --------------------------------------------------------------------------------------------------
# which checkpoints stay

TOY = GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def saver(tmp_path):
    """A saver of a toy model."""
    cfg = preset("gpt2-rope", ckpt_dir=str(tmp_path), keep_last=1)
    model = GPT(TOY)
    saver = checkpoint.Saver(cfg, model, torch.optim.AdamW(model.parameters()), RunLog())
    yield saver
    saver.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_nan_or_infinite_replace_no_checkpoint(saver, tmp_path, value, capsys):
    saver.save(1, {})
    assert saver.wait()
    with torch.no_grad():
        saver.model.wpe.weight[3, 4] = value
    saver.save(2, {})
    assert not saver.wait()
    assert names(tmp_path) == ["step_000001"]
    words = "step 2 | NOT saved: NotFinite: wpe.weight is NaN or infinite"
    assert words in capsys.readouterr().out and "--max_lr" in saver.remedy


def test_a_sum_that_overflows_is_no_infinity():
    largest = torch.finfo(torch.float32).max
    assert checkpoint.is_finite(torch.full((4,), largest))
    assert not checkpoint.is_finite(torch.tensor([float("inf"), -float("inf"), 1.0]))


def test_a_loss_that_is_nan_is_never_the_best(saver):
    for step, loss in {1: float("nan"), 2: 3.0, 3: 2.0, 4: float("inf")}.items():
        saver.save(step, {})
        saver.losses[step] = loss
        assert saver.wait()
    assert [checkpoint.step_of(path) for path in checkpoint.steps(saver.ckpt_dir)] == [3, 4]


def test_what_could_not_be_deleted_is_deleted_later(saver, tmp_path, monkeypatch):
    """Its name is gone at once, its files when the disk is well again."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove", lambda path: None)
        for step in (1, 2):
            saver.save(step, {})
            assert saver.wait()
        assert names(tmp_path) == [f".step_000001.{os.getpid()}.tmp", "step_000002"]
        assert [path.name for path in checkpoint.steps(tmp_path)] == ["step_000002"]
    saver.save(3, {})
    assert saver.wait() and names(tmp_path) == ["step_000003"]


def test_checkpoints_of_wrong_data_are_set_aside(saver, tmp_path):
    """Those whose state was taken since then; they stay, under another name."""
    for step, seconds in ((1, 100.0), (2, 200.0), (3, 300.0)):
        tensors = {"model.safetensors": {"x": torch.zeros(1)}}
        checkpoint.write(tmp_path, step, tensors, {"time": seconds})
    saver.set_aside(200.0)
    assert [name.rpartition("_")[0] for name in names(tmp_path)] == [
        "passed_over_step_000002_wrong-data",
        "passed_over_step_000003_wrong-data",
        "step",
    ]


def test_of_damaged_checkpoints_the_newest_is_kept(tmp_path, capsys):
    """What is another run's is kept, too: it is whole."""

    def refuse_3(found):
        if found.step == 3:
            raise UserError("of another run")

    small(tmp_path, 1)
    for step in (4, 3, 2):
        small(tmp_path, step)
        if step != 3:
            (tmp_path / f"step_{step:06d}" / "model.safetensors").write_bytes(b"damaged")
        assert checkpoint.newest(tmp_path, refuse_3, rename_bad=True).step == 1
    kept = [name.rpartition("_")[0] for name in names(tmp_path)]
    assert kept == ["passed_over_step_000002_damaged", "passed_over_step_000003_foreign", "step"]
    assert "deleted" in capsys.readouterr().out


def test_when_space_is_short_what_was_passed_over_is_named(tmp_path, monkeypatch):
    (tmp_path / "passed_over_step_000007_damaged_20260101-000000").mkdir()
    usage = types.SimpleNamespace(total=2000, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="hint: make room .delete passed_over_step_000007_damaged"):
        checkpoint.need_space(tmp_path, GPT(TOY), 2)


# --------------------------------------------------------------------------------------------------
# reading while training deletes


def test_what_is_deleted_while_it_is_read_is_not_missed(tmp_path, monkeypatch, capsys):
    """The newest one is taken that is there when its turn comes, and nothing is reported."""
    small(tmp_path, 1, 2)
    sha256 = checkpoint.sha256

    def deleted_meanwhile(path):
        if path.parent.name == "step_000002":
            small(tmp_path, 3)
            for step in ("step_000001", "step_000002"):
                shutil.rmtree(tmp_path / step)
        return sha256(path)

    monkeypatch.setattr(checkpoint, "sha256", deleted_meanwhile)
    assert checkpoint.find(tmp_path).step == 3
    assert capsys.readouterr() == ("", "")


def test_what_is_deleted_before_it_is_loaded_is_looked_up_again(tmp_path):
    small(tmp_path, 1, 2)

    def load(found):
        if found.step == 2:
            small(tmp_path, 3)
            shutil.rmtree(found.path)
        return checkpoint.load_tensors(found.path / "model.safetensors")["x"].item()

    assert checkpoint.find_and(tmp_path, load) == 3


# --------------------------------------------------------------------------------------------------
# what a checkpoint may not be


@pytest.fixture
def sealed(tmp_path):
    """sealed(state, tensors, file) writes a checkpoint whose hashes are right, whatever it says."""

    def sealed(state: dict | None = None, tensors: dict | None = None, make_file=None) -> Path:
        weights = GPT(TOY).state_dict() | (tensors or {})
        base = {"gpt_config": dataclasses.asdict(TOY)}
        path = checkpoint.write(tmp_path / "c", 5, {"model.safetensors": weights}, base)
        if make_file:
            make_file(path / "model.safetensors")
        changed = json.loads((path / "state.json").read_text()) | (state or {})
        changed["checksum"] = checkpoint.checksum(changed)
        (path / "state.json").write_text(json.dumps(changed))
        return path

    return sealed


BOMBS = [{"vocab_size": 10**9}, {"n_layer": 10**6}, {"block_size": 10**10}]
BOMBS += [{"n_embd": 1 << 40}, {"n_embd": 1 << 70}, {"block_size": 1 << 70}]
NONSENSE = [
    *({name: -1} for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")),
    *({"n_head": value} for value in (0, 3, 2.0, "2", None, True)),
    {"n_embd": 17},
    {"arch": "evil"},
    {"use_rope": "yes"},
    {"more": 1},
]


@pytest.mark.parametrize("changes", BOMBS + NONSENSE)
def test_a_shape_that_is_not_the_weights_own_is_refused_before_anything_is_built(sealed, changes):
    """Whatever it asks for: within a second, and without the memory."""
    path = sealed({"gpt_config": dataclasses.asdict(TOY) | changes})
    started = time.process_time()
    with pytest.raises(
        UserError, match="does not fit the weights|says n_layer|is not of this model"
    ):
        hf.load(str(path))
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "convert, words",
    [
        (lambda t: t * float("nan"), "is NaN or infinite"),
        (lambda t: t + float("inf"), "is NaN or infinite"),
        (lambda t: t.double() * 1e300, "is NaN or infinite"),  # once it is the model's float32
        (lambda t: t > 0, "BOOL, expected"),
        (lambda t: t.to(torch.int8), "I8, expected"),
        (lambda t: t.to(torch.complex64), "C64, expected"),
        (lambda t: t.to(torch.float8_e4m3fn), "F8_E4M3, expected"),
    ],
)
def test_weights_are_finite_floating_point_numbers(sealed, convert, words):
    path = sealed(tensors={"wpe.weight": convert(torch.ones(16, 16))})
    with pytest.raises(UserError, match=f"wpe.weight {words}"):
        hf.load(str(path))


def after_one_step(name: str) -> tuple[GPT, torch.optim.Optimizer]:
    """A toy model and its optimizer, which has all of its moments."""
    model = GPT(dataclasses.replace(TOY, arch="modern" if name == "gpt2-modern" else "gpt2"))
    optimizer = optim.build(preset(name), model, torch.float32)
    ids = torch.arange(16)[None]
    model(ids, ids).backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    "name, key",
    [
        ("gpt2-rope", "wpe.weight.exp_avg"),
        ("gpt2-rope", "h.0.mlp.c_fc.bias.step"),
        ("gpt2-modern", "lm_head.weight.exp_avg_sq"),
        ("gpt2-modern", "h.0.attn.c_attn.weight.momentum_buffer"),
    ],
)
@pytest.mark.parametrize(
    "change",
    [
        lambda key, t: {key: torch.zeros(() if t.dim() else 64)},
        lambda key, t: {key: t[None]},
        *(
            lambda key, t, dtype=dtype: {key: t.to(dtype)}
            for dtype in (torch.int64, torch.complex64, torch.bool, torch.bfloat16, torch.float64)
        ),
        lambda key, t: {},
        lambda key, t: {key: t, f"{key}_more": t.clone()},
        lambda key, t: {key: t, f"more\n.{key}": t.clone()},
        lambda key, t: {key: t, "x" * 10**6: t.clone()},
    ],
)
def test_moments_are_exactly_those_that_the_optimizer_makes(tmp_path, name, key, change):
    """Others are refused before anything changes: fused kernels would read out of bounds."""
    tensors = checkpoint.contents(*after_one_step(name))
    whole = checkpoint.read(checkpoint.write(tmp_path, 1, tensors, {}))
    moments = tensors["optimizer.safetensors"]
    moments |= change(key, moments.pop(key))
    damaged = checkpoint.read(checkpoint.write(tmp_path, 2, tensors, {}))

    model, optimizer = after_one_step(name)
    optimizer.state.clear()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(UserError, match="does not fit the optimizer: .*hint: --init_from") as e:
        checkpoint.restore(damaged, model, optimizer)
    assert len(str(e.value)) < 1000 and "\n" not in str(e.value)
    assert not optimizer.state
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)

    checkpoint.restore(whole, model, optimizer)
    optimizer.step()


def to_fifo(path: Path):
    path.unlink()
    os.mkfifo(path)


def to_device(path: Path):
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make_file", [to_fifo, to_device])
def test_what_is_no_file_is_not_read(sealed, make_file):
    """Reading a pipe or a device would never end."""
    with pytest.raises(UserError, match="is not a regular file"):
        checkpoint.read(sealed(make_file=make_file))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "5"},
        {"step": 5.0},
        {"step": True},
        {"sha256": {}},
        {"sha256": ["model.safetensors"]},
        {"sha256": {"model.safetensors": 5}},
        {"format": "\x1b[2J"},
        {"format": "x" * 10**6},
        {"sha256": {"model.safetensors": ["x" * 10**6]}},
        {"sha256": {"model.safetensors": "0", "../state.json": "0"}},
        {"sha256": {"x" * 10**6: "0", "model.safetensors": "0"}},
    ],
)
def test_a_state_that_is_none_is_one_line(sealed, changes):
    with pytest.raises(UserError) as raised:
        checkpoint.read(sealed(changes))
    assert "\x1b" not in str(raised.value) and len(str(raised.value)) < 1000


@pytest.mark.parametrize("text", ["[]", "null", "5", "[" * 200_000, '{"format": 1' + "0" * 6000])
def test_a_state_of_another_kind_of_json_is_one_line(sealed, text):
    path = sealed()
    (path / "state.json").write_text(text)
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        checkpoint.read(path)


def test_a_state_that_is_too_large_is_not_read(sealed):
    """As a sparse file it costs its maker nothing, and would cost its reader twice the memory."""
    path = sealed()
    os.truncate(path / "state.json", 2**40)
    with pytest.raises(UserError, match="state.json has 1,099,511,627,776 bytes, expected at most"):
        checkpoint.read(path)


def test_a_name_that_looks_like_a_number_is_no_step(tmp_path):
    small(tmp_path, 5)
    (tmp_path / "step_²").mkdir()
    (tmp_path / "step_000009").write_text("")
    assert checkpoint.find(tmp_path).step == 5


@pytest.mark.parametrize(
    "key, value",
    [
        *((key, None) for key in ("config", "gpt_config", "data", "val_losses")),
        ("wandb_id", 5),
        ("val_losses", {"x": 1.0}),
        ("val_losses", {"4": "x"}),
        ("config", {}),
        ("data", 5),
    ],
)
def test_a_state_without_what_a_run_needs_is_one_line(done, train, tmp_path, key, value):
    """Its weights are whole, and the hint says what they are good for."""
    shutil.copytree(done, tmp_path / "r")
    for path in checkpoint.steps(tmp_path / "r" / "ckpt"):
        state = json.loads((path / "state.json").read_text()) | {key: value}
        if value is None:
            del state[key]
        state["checksum"] = checkpoint.checksum(state)
        (path / "state.json").write_text(json.dumps(state))
    (tmp_path / "r" / "config.json").unlink()
    with pytest.raises(UserError, match=f"no valid checkpoint in .*({key}|settings|not a run)"):
        train("r")


@pytest.mark.parametrize("file", ["config.json", "finished.json"])
@pytest.mark.parametrize("text", ["5", "[]", "[" * 200_000, ""])
def test_a_run_whose_own_json_is_another_kind_resumes(done, train, tmp_path, file, text):
    shutil.copytree(done, tmp_path / "r")
    (tmp_path / "r" / "finished.json").unlink()
    (tmp_path / "r" / file).write_text(text)
    status, out = train("r")
    assert status == 0 and "resume | step 4" in out


def test_a_checkpoint_directory_that_becomes_a_file_ends_no_training(train, tmp_path):
    """Handlers of a failed save touch no disk: the run goes on to its end, and says so there."""
    ckpt_dir = tmp_path / "r" / "ckpt"

    def replace(step):
        while not (ckpt_dir / "step_000002").exists():
            time.sleep(0.01)
        ckpt_dir.rename(tmp_path / "moved")
        ckpt_dir.write_text("")

    stepped = []
    with at_step(stepped.append), at_step(replace, only=3):
        with pytest.raises(UserError, match="could not be written.*hint: move away the file"):
            train("r")
    assert stepped == [0, 1, 2, 3]
