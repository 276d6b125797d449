"""The laws of runtime/ that need no training run: files, signals, torch's settings, messages.

    python -m pytest tests/test_runtime.py

Interrupted and resumed runs are in test_train.py and test_faults.py.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
import tyro
from conftest import ROOT
from test_shards import world

from config import preset
from model import GPT, GPTConfig
from optim import build
from runtime import command_line
from runtime.checkpoint import Saver, find
from runtime.command_line import PathText, UserError, near, one_line, say
from runtime.device import (
    choose_compute,
    not_deterministic,
    peak_flops,
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


def start_writer(path) -> subprocess.Popen:
    """Start a process that writes a file and waits for a line before the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "written\n"
    return process


def test_what_a_killed_process_left_is_removed_by_the_next_writer(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    process = start_writer(path)
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
    process = start_writer(path)
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
        stop.ask(UserError("a shard was cut"))
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
    stop.ask(first)
    stop.ask(second)
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
        with stop.compiling():
            watchdog.start()
            assert not ended.wait(1.5)  # it looks once a second
        assert ended.wait(5)
    finally:
        stop.close()
        watchdog.join()
    assert "no progress for 0.1 s" in capfd.readouterr().err


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
    assert not out_of_memory(RuntimeError("shapes differ"))


# --------------------------------------------------------------------------------------------------
# the command line


def test_near_suggests_or_lists():
    words = ["max_lr", "max_steps", "min_lr", "seed"]
    assert near("max_step", words) == "did you mean max_steps?"
    assert near("max_lrr", words) == "did you mean max_lr or min_lr?"
    assert near("zzz", words) == "one of max_lr, max_steps, min_lr, seed"


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
    nasty = "\x1b]52;c;eA==\x07\x9b2J\r\u202e"
    say(f"{nasty}\n\t日本")

    def main():
        raise UserError(nasty)

    with pytest.raises(SystemExit):
        command_line.run_script(main)
    shown = r"\x1b]52;c;eA==\x07\x9b2J\r\u202e"
    assert capsys.readouterr() == (f"{shown}\n\t日本\n", f"error: {shown}\n")


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
