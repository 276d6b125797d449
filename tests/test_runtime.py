"""The laws of runtime/ that need no training run: files, signals, torch's settings, messages.

    python -m pytest tests/test_runtime.py

Interrupted and resumed runs are in test_train.py and test_faults.py.
"""

import contextlib
import errno
import fcntl
import http.server
import inspect
import io
import itertools
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
import tyro
from conftest import ROOT, run, start_waiting
from test_shards import world

from config import preset
from kernels.compute import start_computing
from model import GPT, GPTConfig
from optim import build
from runtime import cgroup, command_line, runlog
from runtime import device as device_module
from runtime import world as world_module
from runtime.checkpoint import Saver, find
from runtime.command_line import PathText, UserError, one_line, say, suggest
from runtime.device import (
    choose_compute,
    not_deterministic,
    peak_flops,
    pick_device,
    torch_settings_restored,
    use_deterministic_kernels,
    worker_thread,
)
from runtime.files import atomic, sha256, write_json
from runtime.memory import out_of_memory
from runtime.runlog import RunLog
from runtime.stop import SIGNALS, Stop, Stopped

# --------------------------------------------------------------------------------------------------
# files


class Crash(BaseException):
    """Not an Exception, as KeyboardInterrupt is none."""


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_atomic_file_is_complete_or_absent(tmp_path):
    path = tmp_path / "a.txt"
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == tmp_path  # a rename needs the same file system
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("old", ["old", None])
@pytest.mark.parametrize("error", [Crash, OSError])
def test_a_crash_leaves_the_old_file_and_no_temporary_one(tmp_path, old, error):
    path = tmp_path / "a.txt"
    if old:
        path.write_text(old)
    with pytest.raises(error), atomic(path) as temporary:
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == (["a.txt"] if old else [])
    if old:
        assert path.read_text() == old


def test_a_block_that_writes_nothing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic(path):
        pass
    assert path.read_text() == "old"


def test_an_atomic_directory_is_complete_or_absent(tmp_path):
    """Also when its writer crashes; one that exists and holds files is not replaced."""
    path = tmp_path / "step"
    with pytest.raises(Crash), atomic(path) as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("half")
        raise Crash
    assert names(tmp_path) == []
    with atomic(path) as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("whole")
    assert names(path) == ["a"]
    with pytest.raises(OSError), atomic(path) as temporary:
        temporary.mkdir()
        (temporary / "b").write_text("another")
    assert names(tmp_path) == ["step"]
    assert names(path) == ["a"]


WRITER = """
import sys
from runtime.files import atomic
with atomic(sys.argv[1]) as temporary:
    temporary.write_text("by the other process")
    print("written", flush=True)
    sys.stdin.readline()
"""


def test_what_a_killed_process_left_is_removed_by_the_next_writer(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    process = start_waiting(WRITER, path, "written")
    process.kill()
    process.communicate()
    assert path.read_text() == "old"
    assert len(names(tmp_path)) == 2
    with atomic(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_two_processes_may_write_the_same_file(tmp_path):
    """Each finds its own file in place when its block ends; the last one wins."""
    path = tmp_path / "a.txt"
    process = start_waiting(WRITER, path, "written")
    with atomic(path) as temporary:
        temporary.write_text("by this process")
    assert path.read_text() == "by this process"
    process.communicate("\n")
    assert process.returncode == 0
    assert path.read_text() == "by the other process"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    """A file that others are to read is not made private by being atomic."""
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", {"a": 1})
        with atomic(tmp_path / "folder") as temporary:
            temporary.mkdir()
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == mode
    assert (tmp_path / "folder").stat().st_mode & 0o666 == mode


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "a") == digest


# --------------------------------------------------------------------------------------------------
# stopping


def handlers() -> list:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.fixture(autouse=True)
def default_signals():
    """Python's own handlers: under nohup, or in the background of a shell, some are ignored."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def stop(monkeypatch):
    """A Stop of one process; the handlers are given back at the end."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    stop = Stop(world(), timeout=600, second_interrupt=signal.SIG_IGN)
    yield stop
    stop.close()


def test_stop_sets_handlers_and_gives_them_back():
    """Signals that were ignored at the start (nohup) stay ignored."""
    before = handlers()
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = Stop(world(), timeout=600)
        assert signal.getsignal(signal.SIGTERM) == stop.on_signal
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        stop.close()
    finally:
        signal.signal(signal.SIGHUP, hang_up)
    assert handlers() == before


def test_stop_in_a_thread_sets_no_handlers():
    """Python allows none outside the main thread; asking and polling work."""
    before = handlers()
    results = []

    def work():
        stop = Stop(world(), timeout=600)
        results.append(handlers())
        results.append(stop.poll(save_due=True))
        stop.stop_with(UserError("a shard was cut"))
        try:
            stop.poll()
        except Stopped:
            results.append("stopped")
        stop.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [before, True, "stopped"]
    assert handlers() == before


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_stops_at_once_while_there_is_nothing_to_save(stop, number):
    with pytest.raises(Stopped):
        signal.raise_signal(number)
    assert stop.reason == number.name


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_stops_an_armed_run_at_the_next_poll(stop, number):
    stop.armed = True
    assert stop.poll() is False
    assert stop.poll(save_due=True) is True
    signal.raise_signal(number)
    with pytest.raises(Stopped):
        stop.poll()
    assert stop.reason == number.name


def test_the_first_reason_and_error_count(stop):
    stop.armed = True
    first, second = UserError("first"), UserError("second")
    stop.stop_with(first)
    stop.stop_with(second)
    signal.raise_signal(signal.SIGTERM)
    assert stop.reason == "error"
    assert stop.error is first


def test_the_watchdog_waits_for_a_compilation(monkeypatch, capfd):
    """It allows a silence of hours while something compiles, and --group_timeout after it."""
    ended = threading.Event()
    stop = Stop(world(), timeout=0.1)

    def end(_status):
        ended.set()
        stop.stop_watching()

    monkeypatch.setattr(os, "_exit", end)
    watchdog = threading.Thread(target=stop.watch, args=(0, []), daemon=True)
    try:
        with stop.allow_compiling():
            watchdog.start()
            assert not ended.wait(1.5)  # it looks once a second
        assert ended.wait(60)
    finally:
        stop.close()
        watchdog.join()
    assert "no progress for 0.1 s" in capfd.readouterr().err


@pytest.mark.parametrize("console", ["full disk", "full pipe"])
def test_a_console_that_hangs_does_not_keep_a_hang_alive(monkeypatch, console):
    """The watchdog ends the process although it cannot say so."""
    reader, writer = os.pipe()
    path = "/dev/full" if console == "full disk" else writer
    if console == "full pipe":
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)
    else:
        os.close(writer)
    stop = Stop(world(), timeout=0.1)
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda _status: (ended.set(), stop.stop_watching()))
    watchdog = threading.Thread(target=stop.watch, args=(0, []), daemon=True)
    with contextlib.suppress(OSError), open(path, "w") as stream:  # it cannot be flushed
        monkeypatch.setattr(sys, "stderr", stream)
        watchdog.start()
        in_time = ended.wait(60)
        os.close(reader)  # what is blocked there ends
        watchdog.join()
    stop.close()
    assert in_time


@pytest.mark.parametrize("under_torchrun, presses", [(False, 1), (True, 2)])
def test_ctrl_c_is_handled_otherwise_once_a_run_is_stopping(
    stop, monkeypatch, under_torchrun, presses
):
    """Under torchrun each Ctrl-C arrives twice, so there the first two count as one."""
    stop.armed = True
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for _ in range(presses):
        assert signal.getsignal(signal.SIGINT) == stop.on_signal
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


# --------------------------------------------------------------------------------------------------
# torch


def torch_settings() -> tuple:
    return (
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.mark.parametrize("fails", [False, True])
def test_torch_settings_are_restored(fails):
    """Also when the block raises."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_float32_matmul_precision("highest")
    before = torch_settings()
    with contextlib.suppress(Crash), torch_settings_restored():
        torch.set_num_threads(before[0] + 1)
        torch.set_float32_matmul_precision("medium")
        use_deterministic_kernels(torch.device("cpu"))
        assert all(old != new for old, new in zip(before, torch_settings()))
        if fails:
            raise Crash
    assert torch_settings() == before


@pytest.mark.parametrize("device, raises", [("cuda", True), ("cpu", False), ("mps", False)])
def test_determinism_is_enforced_on_a_gpu(device, raises):
    """Without a deterministic kernel torch raises there, and the error is recognised as such."""
    x, indices = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.int64)
    expected = pytest.raises(RuntimeError) if raises else pytest.warns(UserWarning)
    with torch_settings_restored(), expected as e:
        use_deterministic_kernels(torch.device(device))
        torch.nn.functional.max_unpool2d(x, indices, 2)
    if raises:
        assert not_deterministic(e.value)


@pytest.mark.parametrize(
    "name, cuda, file, visible, words",
    [
        ("auto", "13.0", "/", None, "show CUDA 13.0 or later"),  # an old driver
        ("auto", "13.0", "/", "", None),  # hidden on purpose
        ("auto", "13.0", "/", "NoDevFiles", None),  # as Slurm does without --gpus
        ("auto", "13.0", "/", "GPU-8932f937", "show CUDA 13.0 or later"),
        ("auto", "13.0", "/none", None, None),  # a laptop: pip's torch has CUDA on any Linux
        ("auto", None, "/", None, None),
        ("cuda", "13.0", "/none", None, "show CUDA 13.0 or later"),
        ("cuda:1", None, "/none", None, "another build of torch"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_an_error(monkeypatch, name, cuda, file, visible, words):
    """Else a run meant for GPUs would go on, on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(device_module, "NVIDIA_FILES", (file,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if words is None:
        assert pick_device(name).type != "cuda"
        return
    with pytest.raises(UserError, match=rf"can use no GPU here; hint: .*{words}") as e:
        pick_device(name)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name, words",
    [
        ("cuda:x", "'cuda:x' is not a device"),
        ("cuda:-1", "'cuda:-1' is not a device"),
        ("cuda:", "'cuda:' is not a device"),
        ("auto:1", "'auto:1' is not a device"),
        ("cuda:1", "cuda:1 is one GPU for all processes"),
        ("tpu", "'tpu' is not there"),
    ],
)
def test_names_of_devices(name, words):
    """In the second process of a machine."""
    assert pick_device("cpu:0", local_rank=1).type == "cpu"
    with pytest.raises(UserError, match=f"{words}.*; hint: "):
        pick_device(name, local_rank=1)


@pytest.mark.parametrize("dtype, precision", [("float32", "highest"), ("bfloat16", "high")])
def test_float32_does_not_mean_tf32(dtype, precision):
    """Which a GPU would take for all matmuls; beside bfloat16 it is the more precise one."""
    cfg = preset("gpt2-rope", dtype=dtype, use_compile=False)
    with torch_settings_restored():
        start_computing(cfg, None, torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == precision


def test_compiling_is_off_on_mps(capsys):
    """A tiny kernel that compiles there says nothing about a GPT, and nobody has tried one."""
    compute = choose_compute(torch.device("mps"), "auto", use_compile=True)
    assert compute == (torch.device("mps"), torch.float32, False)
    assert "compile | off: on MPS" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, tera_flops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peaks_of_gpus(name, tera_flops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == tera_flops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A1000",
        "NVIDIA RTX A1000 Laptop GPU",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "Tesla T4",
    ],
)
def test_an_unknown_gpu_has_no_peak(name, monkeypatch):
    """No guess from a part of the name: an MFU over a wrong peak is worse than none."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) is None
    assert peak_flops(torch.device("cpu")) is None


def test_other_errors_are_not_of_determinism():
    assert not not_deterministic(RuntimeError("shapes differ"))
    assert not not_deterministic(ValueError("use_deterministic_algorithms"))


def test_a_worker_thread_works_on_its_own_gpu(monkeypatch):
    """CUDA starts every thread on GPU 0; where there is no GPU nothing is set."""
    chosen = []

    def set_device(device):
        chosen.append((device, threading.current_thread().name))

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    for device in (torch.device("cuda", 3), torch.device("cpu")):
        with worker_thread("loader", device) as thread:
            assert thread.submit(threading.current_thread).result().name == "loader_0"
    assert chosen == [(torch.device("cuda", 3), "loader_0")]


def test_copies_for_a_checkpoint_lie_in_one_block(tmp_path):
    """Its size is the sum of theirs but for their alignment: the block is pinned on a GPU."""
    cfg = preset("gpt2-rope", ckpt_dir=str(tmp_path))
    model = GPT(GPTConfig(32, 128, 1, 2, 32, use_rope=True))
    optimizer = build(cfg, model, torch.float32)
    model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    optimizer.step()
    saver = Saver(cfg, model, optimizer, RunLog())
    saver.reserve()
    saver.wait()
    copies = saver.copies.values()
    assert len(copies) == 4 * len(list(model.parameters()))  # weight, two moments and step
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
    size = next(iter(copies)).untyped_storage().nbytes()
    assert size < sum(copy.nbytes for copy in copies) + 64 * len(copies)
    saver.save(1, {})
    assert saver.close()
    assert find(tmp_path).step == 1
    assert not saver.copies


def test_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as e:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(e.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(MemoryError())
    for text in (
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error in: NCCLUtils.cpp:94\nLast error:\nCuda failure 2 'out of memory'",
    ):
        assert out_of_memory(RuntimeError(text)), text
    assert not out_of_memory(RuntimeError("shapes differ"))


# --------------------------------------------------------------------------------------------------
# launchers


@pytest.fixture
def no_launcher(monkeypatch):
    for name in (*world_module.LAUNCHER, "LOCAL_RANK", *world_module.COPIES.values()):
        monkeypatch.delenv(name, raising=False)


WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
EMPTY = {"RANK": "", "WORLD_SIZE": ""}


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize(
    "variables, expected",
    [(WHOLE, (1, 4)), ({}, (0, 1)), (EMPTY, (0, 1)), ({"MASTER_ADDR": "10.0.0.1"}, (0, 1))],
)
def test_torchruns_variables_count_as_a_whole(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert world_module.read_rank_and_world_size() == expected


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize(
    "variables, words",
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE set, RANK, MASTER_ADDR, MASTER_PORT not"),
        ({"RANK": "0"}, "RANK set, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"),
        (WHOLE | {"MASTER_PORT": ""}, "MASTER_ADDR set, MASTER_PORT not"),
        (WHOLE | {"RANK": "4"}, "RANK is 4 of WORLD_SIZE 4"),
        (WHOLE | {"RANK": "-1"}, "RANK is '-1'"),
        (WHOLE | {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        (WHOLE | {"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
    ],
)
def test_a_part_of_torchruns_variables_is_refused(monkeypatch, variables, words):
    """Another launcher's, or an old export: neither one process nor several is what was meant."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{words}.*hint: "):
        world_module.read_rank_and_world_size()


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize("name", world_module.COPIES.values())
def test_copies_of_another_launcher_are_reported(monkeypatch, capsys, name):
    """Only where there are several of them."""
    monkeypatch.setenv(name, "1")
    assert world_module.read_rank_and_world_size() == (0, 1)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv(name, "4")
    assert world_module.read_rank_and_world_size() == (0, 1)
    assert "started 4 copies" in capsys.readouterr().out


MEET = """
import sys
from runtime.command_line import run_script
from runtime.world import join_world
run_script(lambda: join_world("cpu", timeout=int(sys.argv[1])))
"""


def test_waiting_for_peers_ends_in_one_line():
    port = str(20000 + os.getpid() % 10000)
    env = WHOLE | {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = run("-c", MEET, 1, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"waited 1 s for 3 other processes at 127.0.0.1:{port}" in done.stderr
    assert "hint: " in done.stderr


def test_the_status_of_an_error_on_a_full_disk():
    """A script that launches again after a crash (1) must not do so after a mistake (2)."""
    script = "from runtime.command_line import *; run_script(lambda: exec('raise UserError(1)'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stderr=full)
    assert done.returncode == 2


def test_a_process_group_that_hangs_ends_in_one_line():
    """The watchdog of a run begins later: here rank 0 has come, and then is silent."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    done = run("-c", MEET, 2, env={"RANK": "1", "WORLD_SIZE": "2"} | address, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    peers = f"1 other processes at 127.0.0.1:{store.port}"
    assert f"error (rank 1): no process group after 2 s with {peers}" in done.stderr
    assert "hint: NCCL_DEBUG=INFO" in done.stderr


FAILING = """
import sys, time
sys.path.insert(0, {root!r})
from runtime.command_line import UserError, rank, run_script

def main():
    if rank() in sys.argv[1:]:
        raise UserError(f"no shard at {{rank()}}; hint: copy it")
    time.sleep(60)

run_script(main)
"""


@pytest.mark.parametrize(
    "failing, last",
    [("0", "error: no shard at 0"), ("1", "error (rank 1): no shard at 1"), ("0 1", "error: no")],
)
def test_the_last_line_is_the_error_of_any_rank(tmp_path, failing, last):
    """Below torchrun's own report; once, and rank 0's when several have one."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT)))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run(*command, script, *failing.split())
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith(last), done.stderr
    report = next(i for i, line in enumerate(lines) if "ChildFailedError" in line)
    assert sum("no shard" in line for line in lines[report:]) == 1


SHARING = """
import sys
sys.path.insert(0, {root!r})
from runtime.stop import Stop
from runtime.world import join_world
from shard_files import DamagedShard

world = join_world("cpu")
stop = Stop(world, timeout=60)
if world.rank == 1:
    stop.stop_with(DamagedShard("a shard was cut", "its path"))
stop.share_error()
stop.close()
print(f"{{world.rank}}: {{stop.error}}")
"""


def test_an_error_of_one_rank_is_the_error_of_all(tmp_path):
    """Else the others would end with the status of an interruption, which is tried again."""
    script = tmp_path / "sharing.py"
    script.write_text(SHARING.format(root=str(ROOT)))
    done = run(script, nproc=2)
    for rank in range(2):
        assert f"{rank}: on rank 1: a shard was cut" in done.stdout, done.stderr


COMPILING = """
import sys
sys.path.insert(0, {root!r})
import torch
from runtime.device import choose_compute
from runtime.world import join_world

def compile(function):
    if world.rank == 1:
        raise RuntimeError("no Python.h")
    return function

world = join_world("cpu")
torch.compile = compile
print(f"{{world.rank}}: {{choose_compute(world.device, 'float32', True).compiled}}")
"""


def test_all_ranks_compile_or_none(tmp_path):
    """One that cannot would slow down the others, in silence: only rank 0 prints."""
    script = tmp_path / "compiling.py"
    script.write_text(COMPILING.format(root=str(ROOT)))
    done = run(script, nproc=2)
    assert "0: False" in done.stdout and "1: False" in done.stdout, done.stderr
    line = "compile | off, it does not work on rank 1 (RuntimeError: no Python.h); hint: "
    assert done.stdout.count(line) == 1, done.stdout


# --------------------------------------------------------------------------------------------------
# what does not stop a run: diagnostics, Weights & Biases


@pytest.mark.parametrize("git", ["exit 1", "exec no-such-program", "printf '\\377\\n'"])
def test_an_odd_git_is_no_error(tmp_path, monkeypatch, git):
    (tmp_path / "git").write_text(f"#!/bin/sh\n{git}\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(runlog, "REPOSITORY", tmp_path)
    (tmp_path / ".git").mkdir()
    machine = runlog.environment(torch.device("cpu"), 1)
    assert machine["commit"] == "" and machine["torch"] == torch.__version__


KEY = "0123456789abcdef0123456789abcdef01234567"
SENDING = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import config
from runtime.runlog import Wandb

wandb = Wandb(config.preset("shakespeare", wandb=sys.argv[3]), None, Path(sys.argv[2]))
wandb.queue.put({"step": 1, "train/loss": 5.0})
while wandb.thread.is_alive() and not wandb.queue.empty():
    time.sleep(0.01)
started = time.monotonic()
wandb.close(1)
assert time.monotonic() - started < 10
"""


@pytest.fixture
def wandb_server():
    """A server that accepts every connection and fails every request; counts them."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            requests.append(self.path)
            self.send_error(404)

        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = requests
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def send(tmp_path, monkeypatch):
    """send("auto", **variables) logs a record to W&B: what it left in the run's directory, output.

    In a process of its own, of a user whose home is empty.
    """
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))

    def send(choice, **variables):
        done = run("-c", SENDING, ROOT, tmp_path, choice, env=variables)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        folder = tmp_path / "wandb"
        return [p.name for p in folder.glob("*run-*")], done.stdout

    return send


def test_wandb_auto_follows_wandb_login(send, tmp_path, wandb_server):
    """The key of the server that W&B is set to, be it a server of one's own, and no other one's."""
    other = f"machine api.example.com login user password {KEY}\n"
    (tmp_path / ".netrc").write_text(other)
    assert send("auto", WANDB_BASE_URL=wandb_server.url) == ([], "")
    assert wandb_server.requests == []
    login = ["login", "--no-verify", "--host", wandb_server.url, KEY]
    assert run("-m", "wandb", *login).returncode == 0
    _, out = send("auto")
    assert "/graphql" in wandb_server.requests and "wandb | off from here" in out


@pytest.mark.parametrize(
    "choice, mode, starts, says",
    [
        ("auto", "disabled", "", ""),
        ("auto", "offline", "offline-run", "wandb | offline"),
        ("online", "offline", "run", "wandb | off from here"),
        ("off", "online", "", ""),
    ],
)
def test_wandb_auto_follows_wandb_mode(send, wandb_server, choice, mode, starts, says):
    """A choice on the command line wins over the environment."""
    variables = dict(WANDB_MODE=mode, WANDB_API_KEY=KEY, WANDB_BASE_URL=wandb_server.url)
    names, out = send(choice, **variables)
    assert len(names) == bool(starts) and all(name.startswith(starts) for name in names)
    assert out.startswith(says) and bool(out) == bool(says)


def test_without_a_network_wandb_ends_before_the_run(send):
    """At once, in one line, and without a process of its own, which would end after a minute.

    See also test_faults.py.
    """
    started = time.monotonic()
    names, out = send("online", WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9")
    assert names == [] and out.startswith("wandb | off from here: URLError")
    assert time.monotonic() - started < 50


# --------------------------------------------------------------------------------------------------
# metrics.jsonl


def line(step: int, **values) -> str:
    return json.dumps({"step": step} | values)


def text_of(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


LOGGED = [
    line(0, **{"val/loss": 6.0}),
    *(line(step, **{"train/loss": 5.0}) for step in range(1, 6)),
]
SAVED_LATE = [*LOGGED[:5], line(3, save_ms=1.0), LOGGED[5]]


@pytest.fixture
def open_log(tmp_path):
    """open_log(*arguments) opens the log of a run in tmp_path, and closes it at the end."""
    logs = []

    def open_one(*arguments):
        logs.append(RunLog())
        logs[-1].open(tmp_path, *arguments)
        return logs[-1]

    yield open_one
    for log in logs:
        log.close()


@contextlib.contextmanager
def largest_file(size: int):
    """Let the system refuse to write beyond so many bytes in a file, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize(
    "lines, kept", [(LOGGED, LOGGED[:4]), (SAVED_LATE, [*LOGGED[:4], SAVED_LATE[5]])]
)
def test_a_resumed_log_is_cut_to_its_step(open_log, tmp_path, lines, kept):
    """Also where a checkpoint's own line came after those of later steps."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(text_of(lines) + '{"step": 9')
    log = open_log(3)
    assert path.read_text() == text_of(kept)
    log.write({"step": 4})
    assert path.read_text() == text_of([*kept, line(4)])
    with pytest.raises(UserError, match="another process is writing"):
        open_log(3)
    assert path.read_text() == text_of([*kept, line(4)])
    log.close()
    assert names(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("lines", [LOGGED, SAVED_LATE])
def test_cutting_a_log_on_a_full_disk_loses_no_line(open_log, tmp_path, lines):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text_of(lines))
    with largest_file(60), contextlib.suppress(OSError):
        open_log(3)
    assert path.read_text().startswith(text_of(LOGGED[:4]))
    assert lines == LOGGED or path.read_text() == text_of(lines)
    assert names(tmp_path) == [".lock-log", "metrics.jsonl"]


@pytest.mark.parametrize("call", range(3))
def test_cutting_a_log_that_fails_half_way_loses_no_line(tmp_path, monkeypatch, call):
    """At the fsync of the new file, its renaming, or the fsync of its directory."""
    log, path = RunLog(), tmp_path / "metrics.jsonl"
    path.write_text(text_of(SAVED_LATE))
    calls = itertools.count()

    def fragile(function):
        def counted(*arguments):
            if next(calls) >= call:
                raise OSError(errno.EIO, "Input/output error")
            return function(*arguments)

        return counted

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", fragile(os.fsync))
        patch.setattr(os, "replace", fragile(os.replace))
        log.open(tmp_path, 3)
    log.close()
    assert path.read_text() in (text_of(SAVED_LATE), text_of([*LOGGED[:4], SAVED_LATE[5]]))
    assert names(tmp_path) == ["metrics.jsonl"]


def test_the_error_of_a_log_is_that_of_lines_that_are_not_written(open_log, tmp_path, monkeypatch):
    """A full disk takes a part of them at first; nothing is wrong when no line is pending."""
    log = open_log(0)
    with largest_file(60):
        for step in (1, 2, 3):
            log.write({"step": step, "train/loss": 5.0})
        assert log.error.errno == errno.EFBIG
    log.flush()
    assert (tmp_path / "metrics.jsonl").read_text() == text_of(LOGGED[1:4]) and log.error is None
    monkeypatch.setattr(RunLog, "reopen_if_replaced", fail_to_read)
    log.flush()
    assert log.error is None


def fail_to_read(*arguments):
    raise OSError(errno.EIO, "Input/output error")


def test_lines_that_could_not_be_written_outlive_the_process(open_log, tmp_path, capsys):
    """They travel in the checkpoint, and stand in the log once."""
    log = open_log(0)
    with largest_file(60):
        for step in range(1, 6):
            log.write({"step": step, "train/loss": 5.0})
        pending = log.pending()
        assert [json.loads(line)["step"] for line in pending] == [2, 3, 4, 5]
        log.file = None  # killed
        log.close()
    assert capsys.readouterr().out.count("metrics.jsonl | not written") == 1
    for _ in range(2):
        log = open_log(4, pending)
        assert (tmp_path / "metrics.jsonl").read_text() == text_of(LOGGED[1:5])
        log.close()


@pytest.mark.parametrize(
    "steps, words",
    [((1, 2, 3), ""), ((1,), "2 of the 3 steps so far, between 2 and 3"), ((), "3 of the 3 steps")],
)
def test_steps_without_a_line_are_reported_when_a_run_resumes(
    open_log, tmp_path, capsys, steps, words
):
    (tmp_path / "metrics.jsonl").write_text(text_of([LOGGED[step] for step in steps]))
    open_log(3)
    out = capsys.readouterr().out
    assert words in out and bool(out) == bool(words)


@pytest.mark.parametrize("how", ["deleted", "replaced", "edited"])
def test_a_log_that_is_deleted_or_replaced_is_written_again(open_log, tmp_path, capsys, how):
    path = tmp_path / "metrics.jsonl"
    log = open_log(0)
    for step in range(1, 6):
        log.write({"step": step, "train/loss": 5.0})
        if step == 2 and how == "deleted":
            path.unlink()
        elif step == 2 and how == "replaced":
            path.with_name("other").write_text("{}\n")
            os.replace(path.with_name("other"), path)
        elif step == 2:  # with the same content, as `sed -i` and editors do
            path.with_name("other").write_bytes(path.read_bytes())
            os.replace(path.with_name("other"), path)
    assert path.read_text() == text_of(LOGGED[1:])
    assert capsys.readouterr().out.count("metrics.jsonl | was ") == 1
    assert (tmp_path / "metrics.jsonl.replaced").exists() == (how != "deleted")
    with pytest.raises(UserError, match="another process is writing"):
        open_log(0)


def test_a_log_that_cannot_be_opened_again_keeps_its_lines(open_log, tmp_path, monkeypatch):
    """It was deleted, and its new file cannot be opened at first: the next line brings them all."""
    log = open_log(0)
    log.write({"step": 1, "train/loss": 5.0})
    (tmp_path / "metrics.jsonl").unlink()

    def fail(path):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(runlog, "open_to_update", fail)
        log.write({"step": 2, "train/loss": 5.0})
        assert log.error.errno == errno.EMFILE and len(log.pending()) == 1
    log.write({"step": 3, "train/loss": 5.0})
    assert (tmp_path / "metrics.jsonl").read_text() == text_of(LOGGED[1:4]) and not log.error
    log.close()


class NotClosed(io.FileIO):
    """A file that a network disk cannot close; other threads ask for the log meanwhile."""

    def close(self):
        if not self.closed:
            super().close()
            assert self.log.file is not None
            raise OSError(errno.EIO, "Input/output error")


def test_a_log_whose_old_file_cannot_be_closed_goes_on(open_log, tmp_path, capsys):
    log = open_log(0)
    log.write({"step": 1, "train/loss": 5.0})
    log.file = NotClosed(tmp_path / "metrics.jsonl", "r+")
    log.file.log = log
    (tmp_path / "metrics.jsonl").unlink()
    for step in (2, 3):
        log.write({"step": step, "train/loss": 5.0})
    assert (tmp_path / "metrics.jsonl").read_text() == text_of(LOGGED[1:4])
    assert capsys.readouterr().out.count("not closed") == 1


def test_a_log_that_is_cut_under_the_run_has_no_hole(open_log, tmp_path, capsys):
    log = open_log(0)
    for step in range(1, 4):
        log.write({"step": step, "train/loss": 5.0})
        if step == 2:
            os.truncate(tmp_path / "metrics.jsonl", 0)
    assert (tmp_path / "metrics.jsonl").read_text() == text_of(LOGGED[3:4])
    assert "was cut from 62 to 0 bytes" in capsys.readouterr().out


JUNK = ["5", "null", "[]", '{"stew": 5}', '{"step": null}', '{"step": 9', "[" * 100_000, "\0\0"]


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: junk[:9])
def test_a_line_that_is_no_record_is_left_out(open_log, tmp_path, junk):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text_of([LOGGED[1], junk, LOGGED[2]]))
    assert [r["step"] for r in runlog.read_metrics(tmp_path)] == [1, 2]
    open_log(2)
    assert path.read_text() == text_of(LOGGED[1:3])


def test_nan_and_infinity_are_null(open_log, tmp_path):
    """JSON has no word for them: jq and JavaScript refuse Python's."""
    open_log(0).write({"step": 0, "val/loss": float("nan"), "b": -math.inf, "c": 1.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 0,
        "val/loss": None,
        "b": None,
        "c": 1.5,
    }


@pytest.fixture
def no_flock(monkeypatch):
    """A file system without locks: Lustre as it is mounted by default, some of FUSE."""

    def fail(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", fail)


@pytest.mark.usefixtures("no_flock")
def test_without_locks_the_process_that_writes_is_noticed_by_its_number(open_log, tmp_path, capsys):
    """One that was killed is not in the way."""
    (tmp_path / ".lock-log").write_text(f"{socket.gethostname()} {os.getppid()}")
    with pytest.raises(UserError, match=f"writing to .*process {os.getppid()} on .*hint: "):
        open_log(0)
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / ".lock-log").write_text(f"{socket.gethostname()} {ended.pid}")
    open_log(0).close()
    assert "has no locks" in capsys.readouterr().out
    assert names(tmp_path) == ["metrics.jsonl"]


def test_samples_are_not_cut_by_their_own_text(tmp_path):
    path = tmp_path / "samples.txt"
    odd = "so\n=== step 99, sample 7\nit ends"
    texts = [runlog.sample_text(step, 0, odd) for step in (10, 20, 30)]
    path.write_text("".join(texts))
    runlog.cut_samples(path, 30)
    assert path.read_text() == "".join(texts[:2])


def test_env_json_keeps_what_computed_the_earlier_parts():
    """Equal parts are one; what differs is named."""
    one = {"threads": 1, "torch": "2.13", "command": "a"}
    two = one | {"threads": 2, "command": "b"}
    first, changes = runlog.add_part(None, one, 0)
    assert (first, changes) == (one | {"began_at": [0], "earlier": []}, "")
    second, changes = runlog.add_part(first, one, 10)
    assert (second, changes) == (one | {"began_at": [0, 10], "earlier": []}, "")
    third, changes = runlog.add_part(second, two, 20)
    assert changes == "threads 1 -> 2"
    assert third == two | {"began_at": [20], "earlier": [one | {"began_at": [0, 10]}]}
    for damaged in (5, [], "x"):
        assert runlog.add_part(damaged, one, 0) == (one | {"began_at": [0], "earlier": []}, "")
    odd, _ = runlog.add_part(two | {"earlier": 5, "began_at": None}, one, 30)
    assert odd == one | {"began_at": [30], "earlier": [two | {"began_at": []}]}


# --------------------------------------------------------------------------------------------------
# limits of containers


def test_memory_limits_count_at_every_level(tmp_path):
    """Of version 2: Slurm and systemd set them above the group of the process."""
    files = {
        "job/memory.max": "1000\n",
        "job/memory.current": "300\n",
        "job/memory.stat": "anon 200\ninactive_file 100\n",
        "job/step/memory.max": "max\n",
        "job/step/memory.current": "300\n",
        "memory.current": "9000\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    folders = cgroup.control_groups("memory", tmp_path, "0::/job/step\n")
    assert cgroup.memory_left(folders) == 800  # what caches files can be freed
    (tmp_path / "job" / "memory.max").write_text("max\n")
    assert cgroup.memory_left(folders) is None


@pytest.mark.parametrize("path", ["/job", "/", "/outside/of/this/container", "//job", "/../.."])
def test_memory_limits_of_version_1(tmp_path, path):
    """Where a container lists a path that exists outside only, the root of its tree counts."""
    for folder in (tmp_path / "memory", tmp_path / "memory" / "job"):
        folder.mkdir(parents=True)
        (folder / "memory.limit_in_bytes").write_text("5000\n")
        (folder / "memory.usage_in_bytes").write_text("1000\n")
        (folder / "memory.stat").write_text("inactive_file 7\ntotal_inactive_file 50\n")
    listing = f"5:memory,hugetlb:{path}\n3:cpu,cpuacct:/x\n0::/\n1:name=systemd:/\n"
    assert cgroup.memory_left(cgroup.control_groups("memory", tmp_path, listing)) == 4050


def test_the_least_quota_of_cpus_counts(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "cpu.max").write_text("250000 100000\n")
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    assert cgroup.cpu_quota(cgroup.control_groups("cpu", tmp_path, "0::/a/b\n")) == 2.5
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    folders = cgroup.control_groups("cpu", tmp_path, "2:cpu:/\n")
    assert folders == [tmp_path / "cpu"] and cgroup.cpu_quota(folders) is None


@pytest.mark.parametrize("quota, threads", [(None, 8), (1.5, 2), (64.0, 8)])
def test_threads_follow_the_quota_of_cpus(monkeypatch, capsys, quota, threads):
    """Unless OMP_NUM_THREADS is given."""
    monkeypatch.setattr(world_module, "cpu_quota", lambda folders: quota)
    monkeypatch.delenv("OMP_NUM_THREADS")
    with torch_settings_restored():
        torch.set_num_threads(8)
        world_module.limit_threads()
        assert torch.get_num_threads() == threads
        assert ("threads | 2 of 8" in capsys.readouterr().out) == (threads == 2)
        torch.set_num_threads(8)
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
        world_module.limit_threads()
        assert torch.get_num_threads() == 8


# --------------------------------------------------------------------------------------------------
# the command line


def test_suggests_or_lists():
    words = ["max_lr", "max_steps", "min_lr", "seed"]
    assert suggest("max_step", words) == "did you mean max_steps?"
    assert suggest("max_lrr", words) == "did you mean max_lr or min_lr?"
    assert suggest("zzz", words) == "one of max_lr, max_steps, min_lr, seed"


def test_one_line_shortens():
    error = ValueError("a\nb   c\t" + "d" * 500)
    assert one_line(error) == "ValueError: a b c " + "d" * 154
    assert one_line(KeyError("x")) == "KeyError: 'x'"


@pytest.mark.parametrize("rank, printed", [(None, "hello\n"), ("0", "hello\n"), ("1", "")])
def test_say_is_silent_on_other_ranks(monkeypatch, capsys, rank, printed):
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    say("hello")
    assert capsys.readouterr().out == printed


class BrokenConsole(io.StringIO):
    """A console that cannot be written to."""

    def __init__(self, error: OSError):
        super().__init__()
        self.error = error

    def write(self, text: str):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device")])
def test_say_survives_a_console_that_is_gone(monkeypatch, error):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "stdout", BrokenConsole(error))
    say("hello")
    say("hello")


def test_say_survives_a_console_of_another_alphabet(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("Zürich")
    assert raw.getvalue() == b"Z?rich\n"


def test_control_characters_are_shown_and_not_sent(monkeypatch, capsys):
    """Whoever wrote them: in messages and in errors; newlines and tabs stay, other text, too."""
    monkeypatch.delenv("RANK", raising=False)
    nasty = "\x1b]52;c;eA==\x07\x9b2J\r\u202e\u2028\ud800"
    say(f"{nasty}\n\t日本")

    def main():
        raise UserError(nasty)

    with pytest.raises(SystemExit):
        command_line.run_script(main)
    shown = r"\x1b]52;c;eA==\x07\x9b2J\r\u202e\u2028\ud800"
    assert capsys.readouterr() == (f"{shown}\n\t日本\n", f"error: {shown}\n")


@pytest.mark.parametrize(
    "quoted",
    ["a\nerror: all is well", "x" * 10**7, "a\n" * 10**5, "\n       " * 10**5],
    ids=range(4),
)
def test_an_error_is_bounded_whatever_it_quotes(monkeypatch, capsys, quoted):
    """Text of a file forges no line of ours and hides no hint; problems stay one per line."""
    monkeypatch.setenv("RANK", "0")

    def main():
        raise UserError(f"B is 0; hint: --B\n       a weight is {quoted}; hint: copy it")

    with pytest.raises(SystemExit):
        command_line.run_script(main)
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "error: B is 0; hint: --B"
    assert all(line.startswith("       ") for line in others)
    assert others[-1].endswith("; hint: copy it") and sum(map(len, others)) < 10_000


@pytest.mark.parametrize("words", ["prepare.py --help", "prepare.py fineweb-edu --help"])
def test_a_reader_that_has_seen_enough_is_no_fault(words):
    """`python SCRIPT | true`: status 0 and nothing on stderr."""
    with subprocess.Popen(
        [sys.executable, "-u", *words.split()],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("rank, prefix", [("0", "error: "), ("3", "error (rank 3): ")])
def test_run_script_ends_user_errors_in_one_line(monkeypatch, capsys, rank, prefix):
    """Status 2 and no traceback."""
    monkeypatch.setenv("RANK", rank)

    def main():
        raise UserError("T 2 exceeds block_size 1; hint: --block_size 2")

    with pytest.raises(SystemExit) as e:
        command_line.run_script(main)
    assert e.value.code == 2
    output = capsys.readouterr()
    assert output.err == f"{prefix}T 2 exceeds block_size 1; hint: --block_size 2\n"
    assert output.out == ""


def test_ctrl_c_ends_a_script_as_any_program():
    """By the signal, for a shell's loop to end, too; what was printed comes out, no traceback."""
    code = (
        "import os, signal; from runtime.command_line import run_script\n"
        "def main():\n"
        "    print('so far')\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "run_script(main)"
    )
    done = run("-c", code)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "so far\n")
    assert done.stderr == "interrupted\n"


def test_run_script_leaves_other_errors_alone():
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        command_line.run_script(main)


@dataclass
class Options:
    """One option of each kind."""

    max_lr: float = 1e-3
    use_rope: bool = False
    steps: int = 1
    B: int | Literal["auto"] = 8
    mode: Literal["a", "b"] = "a"
    rest: str = ""
    end: int | None = None
    pair: tuple[float, float] = (0.9, 0.95)


@dataclass
class Places:
    """Paths of each kind."""

    files: tyro.conf.Positional[tuple[PathText, ...]] = ()
    out: PathText = ""
    more: tuple[PathText, ...] = ()
    maybe: PathText | None = None
    text: str = ""
    texts: tuple[str, ...] = ()


@pytest.mark.parametrize(
    "args, expected",
    [
        ("--max_lr 0.5 --use_rope True", Options(0.5, True)),
        ("--max-lr=0.5 --use-rope", Options(0.5, True)),
        ("--use_rope --max_lr 1e-4", Options(1e-4, True)),
        ("--use_rope yes", Options(use_rope=True)),
        ("--no-use-rope", Options()),
        ("--no_use_rope", Options()),
        ("--use_rope=false", Options()),
        ("--steps 1e4", Options(steps=10_000)),
        ("--steps 2**19", Options(steps=524_288)),
        ("--steps=10_000", Options(steps=10_000)),
        ("--B auto", Options(B="auto")),
        ("--B 1e1", Options(B=10)),
        ("--rest 2**3", Options(rest="2**3")),
        ("--rest=--text", Options(rest="--text")),
        ("--rest -text", Options(rest="-text")),
        ("--max_lr -1e-4", Options(-1e-4)),
        ("--end None", Options()),
        ("--end 3", Options(end=3)),
        ("--pair 1 2e-3", Options(pair=(1.0, 2e-3))),
    ],
)
def test_ways_to_write_an_option(args, expected):
    assert command_line.parse(Options, args.split()) == expected


@pytest.mark.parametrize(
    "args, words",
    [
        ("--max_l 1", "no option --max_l: did you mean max_lr?"),
        ("--lr 1", "no option --lr: it is --max_lr here"),
        ("--no-max_lr", "no option --no_max_lr"),
        ("--max_lr", "--max_lr has no value"),
        ("--max_lr x", "--max_lr is 'x', expected a number"),
        ("--steps 1.5", "--steps is '1.5', expected a whole number"),
        ("--steps 1e-3", "--steps is '1e-3', expected a whole number"),
        ("--use_rope maybe", "--use_rope is 'maybe', expected True or False"),
        ("--B many", "--B is 'many', expected a whole number or auto"),
        ("--mode c", "--mode is 'c', expected a or b"),
        ("--max_l 1 --steps x", "did you mean max_lr?; --steps is 'x'"),
        ("--steps 3 lr", "'lr' belongs to no option: it is --max_lr here"),
        ("steps 3", "'steps' belongs to no option"),
        ("--pair 1", "--pair is '1', expected 2 values"),
        ("--pair=1,2", "--pair is '1,2', expected 2 values"),
        ("--pair 1 x", "--pair is 'x', expected a number"),
        ("-x", "'-x' belongs to no option"),
    ],
)
def test_mistakes_in_options_are_one_line(args, words):
    with pytest.raises(UserError) as e:
        command_line.parse(Options, args.split(), advice={"lr": "it is --max_lr here"})
    assert words in str(e.value) and str(e.value).endswith("; hint: --help lists all options")
    assert "\n" not in str(e.value)


def test_values_may_look_like_options():
    """What is no name behind -- is a value, as is anything behind =."""
    words = ["--texts", "1+1=", "-5", "--> x", "--text", "--- Chapter 1"]
    parsed = command_line.parse(Places, words)
    assert (parsed.texts, parsed.text) == (("1+1=", "-5", "--> x"), "--- Chapter 1")
    assert command_line.parse(Places, ["--text=--out"]).text == "--out"


def test_a_tilde_is_the_home_directory_in_every_path(monkeypatch):
    """In options, behind =, in lists and in positional words; text stays as it is."""
    monkeypatch.setenv("HOME", "/h")
    words = "~/a b --out=~/c --more ~/d ~/e --maybe ~ --text ~/f".split()
    expected = Places(("/h/a", "b"), "/h/c", ("/h/d", "/h/e"), "/h", "~/f")
    assert command_line.parse(Places, words) == expected


def test_options_that_are_paths_are_of_that_type():
    """By their names, in every script but train_gpt2.py, where config.complete() replaces ~."""
    import audit
    import compare
    import generate
    import hellaswag
    import hf
    import prepare
    import study

    names = set(
        "model file data out data_root log_dir reference source root runs files run".split()
    )
    commands = [audit.Audit, compare.Comparison, study.Study, generate.Settings]
    commands += [hellaswag.Scoring, hf.import_, hf.export, *prepare.COMMANDS.values()]
    count = 0
    for command in commands:
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name in names and "Dataset" not in str(parameter.annotation):
                assert "PrimitiveConstructorSpec" in str(parameter.annotation), parameter
                count += 1
    assert count > 15


def test_what_tyro_refuses_is_one_line(monkeypatch, capsys):
    """Missing words, unknown commands: no box, and --help is still printed."""

    def export(run: tyro.conf.Positional[PathText]):
        """Export."""
        print("standard error of a command is left alone", file=sys.stderr)

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["hf.py", *words])
        command_line.parse_command({"export": export}, "Commands.")

    for words in ([], ["export"], ["exprt", "a"]):
        with pytest.raises(UserError, match="hint: --help lists all options") as e:
            command(*words)
        assert "\n" not in str(e.value) and "─" not in str(e.value)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit) as e:
        command("export", "--help")
    assert not e.value.code and "PATH" in capsys.readouterr().out
    command("export", "a")
    assert "left alone" in capsys.readouterr().err


def test_one_of_several_commands_is_run(monkeypatch):
    calls = []

    def export(path: str):
        calls.append(("export", path))

    def load(path: str):
        calls.append(("load", path))

    monkeypatch.setattr(sys, "argv", ["hf.py", "export", "--path", "a"])
    command_line.parse_command({"export": export, "load": load}, "Two commands.")
    assert calls == [("export", "a")]
