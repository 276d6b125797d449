"""The laws of audit.py: what it counts is so, and it finds damage.

python -m pytest tests/test_audit.py
"""

import os
import subprocess

import numpy as np
import pytest
from conftest import ROOT, python, run, write_shards
from test_shard_files import flip, with_manifest
from test_shards import DATA_ORDERS, open_windows

import shards
from audit import Audit, times_seen
from config import preset
from runtime.command_line import parse

# 480 windows of at most 186 per epoch: 2.6 epochs
RUN = {"T": 16, "world_size": 4, "B": 2, "total_batch": 512, "max_steps": 15}
SIZES = {"train": [1000, 2000], "val": [300]}


def audited(folder, capsys, **changes) -> tuple[int, list[tuple[str, list[str]]], list[str]]:
    """Return the exit status of an audit, its table as (row, cells), and what it calls wrong."""
    with pytest.raises(SystemExit) as e:
        Audit(str(folder), **(RUN | changes)).run()
    lines = capsys.readouterr().out.splitlines()
    table = [(line[:24].strip(), line[24:].split()) for line in lines]
    wrong = [line for line in lines if line.startswith("wrong: ")]
    return int(e.value.code), table, wrong


def cells(table: list[tuple[str, list[str]]], row: str) -> list[str]:
    """Return the cells of the first row of that name."""
    return next(cells for name, cells in table if name == row)


@pytest.mark.parametrize("data_order", DATA_ORDERS)
def test_audit_of_good_shards(tmp_path, capsys, data_order):
    """Each window of an epoch is read once by all processes together, a quarter of them by each."""
    folder = with_manifest(write_shards(tmp_path, SIZES))
    status, table, wrong = audited(folder, capsys, data_order=data_order)
    assert status == 0
    assert not wrong
    documents = sum((np.load(path) == 50256).sum() for path in folder.glob("*train*.npy"))
    assert cells(table, "train, shards: 2") == ["3,000", "186", str(documents)]
    assert cells(table, "val, shards: 1")[:2] == ["300", "18"]
    w = open_windows(folder, 16, data_order, 1337)
    for epoch in (0, 1):
        counts = [str(w.per_epoch(epoch)), str(w.left_out(epoch).sum())]
        assert cells(table, f"all, epoch {epoch}") == [*counts, "0.0000%", "100.0000%", "0.0000%"]
    part = (480 - w.epoch_start(2)) / w.per_epoch(2)
    assert cells(table, "all, epoch 2")[2:] == [f"{1 - part:.4%}", f"{part:.4%}", "0.0000%"]
    least = cells(table, "a process, least")
    most = cells(table, "a process, most")
    assert float(least[3][:-1]) <= 25 <= float(most[3][:-1]) < 28
    assert most[4] == "0.0000%"


@pytest.mark.parametrize("name", ["shakespeare", "gpt2-periodicity-fix", "gpt2-rope-t2048"])
def test_the_run_is_that_of_a_preset(tmp_path, capsys, name):
    """Its order, T and batch, and its length in epochs; options replace them."""
    cfg = preset(name)
    folder = write_shards(tmp_path, {"train": [500_000], "val": [3000]})
    batch = dict(total_batch=2 * cfg.T, B=1)
    for changes in (batch, batch | {"max_steps": 7}):
        with pytest.raises(SystemExit) as e:
            Audit(str(folder), preset=name, **changes).run()
        assert not e.value.code
        steps = changes.get("max_steps", cfg.max_steps)
        if cfg.epochs and "max_steps" not in changes:
            steps = open_windows(folder, cfg.T, cfg.data_order, cfg.data_seed).in_epochs(4) // 2
        run_line = f"run: {steps:,} steps, {2 * steps:,} windows, "
        end = f" epochs, {cfg.data_order} order, seed {cfg.data_seed}"
        line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("run: "))
        assert line.startswith(run_line) and line.endswith(end), line


def test_audit_does_not_depend_on_the_layout(tmp_path, capsys):
    folder = write_shards(tmp_path, SIZES)
    tables = []
    for world_size, B in ((1, 1), (2, 8), (32, 1)):
        _, table, _ = audited(folder, capsys, world_size=world_size, B=B)
        tables.append([row for row in table if row[0].startswith("all, ")])
    assert len(tables[0]) == 3
    assert tables[0] == tables[1] == tables[2]


def cut_all(folder):
    for path in folder.glob("*train*.npy"):
        path.write_bytes(b"")


DAMAGES = {  # what is done to the folder, what the audit says
    "hash": (
        lambda folder: flip(folder / "data_train_000001.npy"),
        "data_train_000001.npy: its SHA-256",
    ),
    "cut": (
        lambda folder: os.truncate(folder / "data_train_000000.npy", 1000),
        "header says 1000 tokens = 2128 bytes",
    ),
    "missing": (
        lambda folder: (folder / "data_val_000000.npy").rename(folder / "data_val_000001.npy"),
        "but not there",
    ),
    "unlisted": (
        lambda folder: np.save(folder / "data_train_000009.npy", np.zeros(99, np.uint16)),
        "no such shard, on disk 99",
    ),
    "all": (cut_all, "data_train_000001.npy: "),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_audit_finds_damage(tmp_path, capsys, name):
    folder = with_manifest(write_shards(tmp_path, SIZES))
    damage, words = DAMAGES[name]
    damage(folder)
    status, _, wrong = audited(folder, capsys)
    assert status == 1
    assert any(words in line for line in wrong), wrong


def test_audit_finds_a_directory_that_is_not_complete(tmp_path, capsys):
    folder = with_manifest(write_shards(tmp_path, SIZES), complete=False)
    status, _, wrong = audited(folder, capsys)
    assert status == 1
    assert len(wrong) == 1
    assert "is not complete; the command that began it resumes it" in wrong[0]


def test_audit_finds_ids_of_another_tokenizer(tmp_path, capsys):
    """Unless it is asked for headers and order only."""
    folder = write_shards(tmp_path, SIZES)
    np.save(folder / "data_train_000001.npy", np.full(2000, 50300, np.uint16))
    status, _, wrong = audited(folder, capsys)
    assert status == 1
    assert len(wrong) == 1
    assert "000001.npy: 2,000 ids above 50256" in wrong[0]
    assert audited(folder, capsys, contents=False)[0] == 0


def test_audit_counts(tmp_path, capsys, monkeypatch):
    """With an order that is no permutation half of the windows are never read, the others twice."""
    folder = write_shards(tmp_path, SIZES)
    monkeypatch.setattr(shards, "order", lambda seed, epoch, n, i: np.asarray(i) // 2 * 2)
    status, table, wrong = audited(folder, capsys, data_order="global")
    assert status == 1
    assert len(wrong) == 3
    assert "epoch 0: 0 windows are read once, 93 more often, 93 never" in wrong[0]
    assert cells(table, "all, epoch 0")[2:] == ["50.0000%", "0.0000%", "50.0000%"]


@pytest.mark.parametrize(
    "seeds, never, once, more",
    [([7, 7, 7, 7], 0, 1, 0), ([7, 8, 9, 10], 0.316, 0.422, 0.262)],
    ids=["one seed", "a seed per process"],
)
def test_a_shuffle_of_its_own_for_each_process_loses_windows(tmp_path, seeds, never, once, more):
    """Negative control, the predecessor's bug: 4 processes miss (3/4)**4 = 31.6% of an epoch."""
    np.save(tmp_path / "zeros_train_0.npy", np.zeros(1_600_001, np.uint16))
    seen = np.zeros(100_000, np.uint16)
    for rank, seed in enumerate(seeds):
        w = open_windows(tmp_path, 16, "global", seed)
        seen += times_seen(w, 0, 100_000, 4, rank, 4)
    shares = np.bincount(seen.clip(max=2), minlength=3) / 100_000
    assert shares == pytest.approx([never, once, more], abs=0.005)


def test_audit_from_the_command_line(tmp_path):
    """Status 0 and a last line when all is well; a user's mistake is one line and status 2."""
    folder = write_shards(tmp_path, SIZES)
    settings = [word for key, value in RUN.items() for word in (f"--{key}", value)]
    good = run("audit.py", folder, *settings)
    assert good.returncode == 0, good.stderr
    assert "nothing wrong" in good.stdout
    assert "2.581 epochs" in good.stdout
    bad = run("audit.py", folder, "--T", "16", "--total_batch", "100")
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: total_batch 100 ")
    assert bad.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words, contents",
    [("--contents DIR", True), ("--no-contents DIR", False), ("DIR --contents off", False)],
)
def test_a_flag_does_not_take_the_directory_for_its_value(words, contents):
    audit = parse(Audit, words.split())
    assert (audit.root, audit.contents) == ("DIR", contents)


SAYS = "from runtime.command_line import run_script; run_script(lambda: print('x'))"
BREAKS = SAYS.replace("print('x')", "(_ for _ in ()).throw(BrokenPipeError('of a bug'))")


def test_a_reader_who_has_seen_enough_changes_nothing(tmp_path):
    """`audit.py DIR | head -1`: the status is that of the shards, and nothing is on stderr.

    Nor is there a traceback of other scripts, unless another pipe broke.
    """
    folder = with_manifest(write_shards(tmp_path, SIZES))
    settings = [word for key, value in RUN.items() for word in (f"--{key}", value)]
    for statuses, *command in (([0], "audit.py", folder, *settings), ([0, 141], "-c", SAYS)):
        reading, writing = os.pipe()
        os.close(reading)
        with open(tmp_path / "stderr", "w") as stderr, open(writing, "w") as pipe:
            done = subprocess.run(python(*command), cwd=ROOT, stdout=pipe, stderr=stderr)
        assert done.returncode in statuses and (tmp_path / "stderr").read_text() == ""
    assert "of a bug" in run("-c", BREAKS).stderr
