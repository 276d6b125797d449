"""python -m pytest -n 0 tests/test_gpu.py : what only a GPU can show; everywhere else skipped. bench.py suite runs it first."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run, write_shards

import hellaswag
import optim
from distributed import World
from model import GPT, GPTConfig

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"
)


def losses_of(model, compiled: bool, dtype: torch.dtype, steps: int = 20) -> list[float]:
    """Losses of a few steps on one batch, starting from a copy of the model."""
    model = copy.deepcopy(model)
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    optimizer = optim.adamw(model, 1e-3, (0.9, 0.95), 0.1)
    ids, found = (
        torch.randint(4096, (4, 129), generator=torch.Generator().manual_seed(1)).to(DEVICE),
        [],
    )
    for _ in range(steps):
        with torch.autocast(DEVICE, dtype=dtype, enabled=dtype != torch.float32):
            loss = forward(ids[:, :-1], ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    "switches",
    [dict(), dict(use_rope=True), dict(use_rope=True, use_swiglu=True), dict(arch="modern")],
    ids=["learned", "rope", "swiglu", "modern"],
)
def test_gpu_losses_are_those_of_the_plain_version(switches):
    """20 steps: compiled float32 as plain float32; compiled bf16, which has 8 bits, near it."""
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(block_size=128, vocab_size=4096, n_layer=2, n_head=4, n_embd=256, **switches)
    ).to(DEVICE)
    plain = losses_of(model, False, torch.float32)
    assert plain[-1] < plain[0] - 0.5
    np.testing.assert_allclose(losses_of(model, True, torch.float32), plain, atol=1e-3)
    np.testing.assert_allclose(losses_of(model, True, torch.bfloat16), plain, atol=5e-2)


@pytest.mark.parametrize("nproc", [0, 1])
def test_gpu_training_equals_the_cpus_and_resumes_with_the_same_bits(tmp_path, nproc):
    """One micro-batch order, pinned copies, a saver's thread: losses to 1e-3 of a CPU's, and a resumed run's own to the bit."""
    data, found = (
        write_shards(tmp_path / "data", {"train": [6000, 4000], "val": [2000]}, ids=512),
        {},
    )
    for name, device, steps in (
        ("cpu", "cpu", (8,)),
        ("gpu", DEVICE, (8,)),
        ("resumed", DEVICE, (4, 8)),
    ):
        for until in steps:
            args = [
                *TINY,
                "--data_root",
                data,
                "--log_dir",
                tmp_path,
                "--run_name",
                name,
                "--deterministic",
                "True",
                "--warmup_steps",
                "2",
                "--save_interval",
                "4",
            ]
            args[args.index("--device") + 1] = device
            done = run(
                "train_gpt2.py",
                "gpt2-rope",
                *args,
                "--max_steps",
                "8",
                nproc=nproc if device != "cpu" else 0,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            if until == 4:  # back to the middle, as if the rest had never been
                shutil.rmtree(tmp_path / name / "ckpt" / "step_000008")
                (tmp_path / name / "finished.json").unlink()
        records = [
            json.loads(line)
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        found[name] = [r["train/loss"] for r in records if "train/loss" in r]
    assert len(found["gpu"]) == 8
    np.testing.assert_allclose(found["gpu"], found["cpu"], atol=1e-3)
    assert found["resumed"] == found["gpu"]


def test_gpu_hellaswag_equals_the_cpus_and_compiles_once():
    torch.manual_seed(5)
    model = GPT(GPTConfig(block_size=256, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        model.wte.weight.mul_(10)
    items = hellaswag.load(ROOT / "tests" / "hellaswag_items.jsonl", "gpt2")
    plain = lambda: torch.autocast(DEVICE, enabled=False)
    expected = hellaswag.HellaSwag(
        items, model, World(0, 1, torch.device("cpu")), plain, rows=2
    ).losses()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    on_gpu = hellaswag.HellaSwag(
        items, model.to(DEVICE), World(0, 1, torch.device(DEVICE)), plain, compiled=True, rows=2
    )
    for _ in range(2):
        np.testing.assert_allclose(on_gpu.losses(), expected, atol=5e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1
