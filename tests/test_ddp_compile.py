"""python -m pytest tests/test_ddp_compile.py [-m slow]

DistributedDataParallel around a compiled model, which the compiler cuts into DDP's buckets.
"""

import json
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, run, write_shards

import config
import train_gpt2

# 36 MB of weights: DDP's buckets hold 25 MiB
SIZE = {"n_embd": 256, "vocab_size": 29696, "total_batch": 256, "B": 2}
# Runs of the same two processes; rank 0 prints a line for each: its log, and how many graphs were
# compiled
SCRIPT = """
import json, sys, torch, torch.distributed as dist
import compare, config, train_gpt2
from torch._dynamo.backends.registry import lookup_backend

compare.curves = lambda run_dir: None  # takes 0.2 s each time
backend, runs = json.loads(sys.argv[1])
compile_graph = lookup_backend(backend)
compile_model = torch.compile

def compile_and_count(graph, inputs):
    counts["training" if torch.is_grad_enabled() else "evaluation"] += 1
    return compile_graph(graph, inputs)

def compile_counted(model, **options):
    return compile_model(model, backend=compile_and_count, **options)

torch.compile = compile_counted
for changes in runs:
    counts = {"training": 0, "evaluation": 0}
    result = train_gpt2.train(config.preset("gpt2-rope", **changes))
    if dist.get_rank() == 0:
        print("RESULT", json.dumps([result.records, counts]), flush=True)
dist.destroy_process_group()
"""


def losses(records: list[dict]) -> list[float]:
    return [r[key] for r in records for key in ("train/loss", "val/loss") if key in r]


# (B, recompute)
ONE = (("auto", True),)
ALL = (*ONE, (2, False), (2, True), ("auto", False))


def train_all(folder: Path, backend: str, runs: dict[str, dict], nproc: int) -> dict[str, tuple]:
    """Train settings by run name under DDP; return log and numbers of graphs of each."""
    script = folder / "train_all.py"
    script.write_text(SCRIPT)
    changes = [settings | {"run_name": name} for name, settings in runs.items()]
    arguments = json.dumps([backend, changes])
    done = run(script, arguments, nproc=nproc, env={"PYTHONPATH": str(ROOT)}, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    results = [json.loads(line.removeprefix("RESULT")) for line in lines]
    return dict(zip(runs, results, strict=True))


def settings_of(folder: Path, device: str = "cpu") -> dict:
    """Write shards, and return what all runs of this file have in common."""
    data = write_shards(folder / "data", {"train": [6000, 4000], "val": [2000]}, ids=512)
    places = {"data_root": str(data), "log_dir": str(folder), "device": device}
    return SMALL | SIZE | places | {"max_steps": 2}


@pytest.mark.parametrize(
    "backend, cases", [("aot_eager", ONE), pytest.param("inductor", ALL, marks=pytest.mark.slow)]
)
def test_ddp_around_a_compiled_model_equals_one_plain_process(tmp_path, backend, cases):
    """The same losses on two ranks; slow, with --B fixed and auto, with and without --recompute.

    The graph is cut in all of them, alike: gradients are sent while others are computed.
    """
    common = settings_of(tmp_path)
    runs = {}
    for B, recompute in cases:
        own = {"B": B, "recompute": recompute, "use_compile": True}
        runs[f"{B}-{recompute}"] = common | own
    results = train_all(tmp_path, backend, runs, nproc=2)
    plain = train_gpt2.train(config.preset("gpt2-rope", **common, run_name="plain"))
    expected = losses(plain.records)
    assert len(expected) == 4
    for name, (records, counts) in results.items():
        assert losses(records) == pytest.approx(expected, abs=2e-5), name
        # one to try the compiler, one of the model if DDP were not noticed
        assert counts["training"] > 2, name
    assert len({counts["training"] for _, counts in results.values()}) == 1
