"""python -m pytest tests/test_strict_nccl.py

Every preset on two ranks of a process group that refuses what NCCL refuses (strict_group.py).
"""

import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL, run, write_shards
from strict_group import COLLECTIVES, check

from config import PRESETS

# Trains presets one after the other in the same two processes; rank 0 prints a line for each.
# At last a call that gloo would take.
SCRIPT = """
import json, sys, torch, torch.distributed as dist
import compare, config, train_gpt2

compare.curves = lambda run_dir: None  # takes 0.2 s each time
for name, changes in json.loads(sys.argv[1]):
    error = None
    try:
        cfg = config.preset(name, **changes)
        result = train_gpt2.train(cfg)
        assert result.finished and result.step == cfg.max_steps
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
    if dist.get_rank() == 0:
        print("OUTCOME", json.dumps([changes["run_name"], error]), flush=True)
try:
    dist.all_reduce(torch.zeros(2, 3).T)
except ValueError as e:
    if dist.get_rank() == 0:
        print("OUTCOME", json.dumps(["strided", str(e)]), flush=True)
dist.destroy_process_group()
"""
RUNS = [*product(PRESETS, [False]), ("gpt2-rope", True), ("gpt2-modern", True)]


def train_all(folder: Path, runs: list[tuple[str, dict]], nproc: int) -> dict[str, str | None]:
    """Train presets with changes in one strict group; return the error of each by run name."""
    script = folder / "train_all.py"
    script.write_text(SCRIPT)
    done = run(script, json.dumps(runs), nproc=nproc, env={"PYTHONPATH": str(ROOT)})
    lines = [line for line in done.stdout.splitlines() if line.startswith("OUTCOME")]
    errors = dict(json.loads(line.removeprefix("OUTCOME")) for line in lines)
    for _, changes in runs:
        errors.setdefault(changes["run_name"], f"did not end: {done.stderr}")
    return errors


def train_presets(folder: Path, nproc: int, device: str) -> dict[str, str | None]:
    """Train all RUNS, tiny, for three steps; return the error of each by run name."""
    data = write_shards(folder / "data", {"train": [6000, 4000], "val": [2000]}, ids=512)
    places = {"data_root": str(data), "log_dir": str(folder), "device": device}
    runs = []
    for preset, deterministic in RUNS:
        name = f"{preset}-deterministic" if deterministic else preset
        own = {"run_name": name, "deterministic": deterministic, "epochs": None, "max_steps": 3}
        runs.append((preset, SMALL | places | own))
    return train_all(folder, runs, nproc)


def test_every_preset_calls_collectives_as_nccl_demands(tmp_path):
    """Three steps of each on two ranks: contiguous tensors, on one device, of types NCCL has.

    The control: a strided tensor, which gloo would take, ends a run.
    """
    errors = train_presets(tmp_path, 2, "cpu")
    assert errors.pop("strided") == "Tensors must be contiguous: all_reduce (3, 2) strides (1, 3)"
    assert errors == dict.fromkeys(errors)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([torch.zeros(2, 3).T], "contiguous"),
        ([[torch.zeros(2, 3), torch.zeros(3, 2).T]], "contiguous"),
        ([torch.zeros(2, device="meta")], "No back end"),
        ([torch.zeros(2, dtype=torch.int16)], "no such type"),
        ([torch.zeros(2, dtype=torch.complex64)], "no such type"),
        ([torch.zeros(2, 2).to_sparse()], "dense"),
        ([torch.zeros(4), torch.zeros(2, dtype=torch.bfloat16)], "one type"),
        ([torch.zeros(2, dtype=torch.int32), dist.ReduceOp.BOR], "bitwise"),
    ],
)
def test_what_nccl_refuses(arguments, message):
    """Strides, devices, types, sparse tensors, a mixture of types, bitwise reductions."""
    with pytest.raises(ValueError, match=message):
        check("all_reduce", arguments)


def test_what_nccl_takes():
    check("all_reduce", [torch.zeros(2, dtype=torch.int32), dist.ReduceOp.MAX])
    check("all_gather", [[torch.zeros(2), torch.zeros(2)], torch.zeros(2)])
    check("broadcast", [torch.zeros(3, 1).T, 0])  # the stride of an axis of 1 does not count


def test_all_collectives_of_the_code_are_checked():
    """Each function of torch.distributed that the code calls is strict or takes no tensor."""
    without_tensors = set(
        "DistNetworkError DistStoreError PrefixStore ReduceOp all_gather_object "
        "broadcast_object_list destroy_process_group get_rank get_world_size init_process_group "
        "is_initialized".split()
    )
    used = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("runtime/*.py"), *ROOT.glob("bench/*.py")]:
        used |= set(re.findall(r"\bdist\.(\w+)", path.read_text()))
    assert {"all_reduce", "all_gather_into_tensor"} <= used
    assert used <= {*COLLECTIVES, *without_tensors}
