"""python -m pytest -n 0 tests/test_gpu.py

What only a GPU can show; skipped everywhere else. `python -m bench suite` runs it first.
"""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run, write_shards

import hellaswag
import optim
from model import GPT, GPTConfig
from runtime.device import Compute
from runtime.world import World

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"
)


def losses_of(model, compiled: bool, dtype: torch.dtype, steps: int = 20) -> list[float]:
    """Return the losses of a few steps on one batch, starting from a copy of the model."""
    model = copy.deepcopy(model)
    compute = Compute(torch.device(DEVICE), dtype, compiled)
    train_model = compute.compile(model)
    optimizer = optim.adamw(model, 1e-3, (0.9, 0.95), 0.1)
    ids = torch.randint(4096, (4, 129), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    losses = []
    for _ in range(steps):
        with compute.autocast():
            loss = train_model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "switches",
    [dict(), dict(use_rope=True), dict(use_rope=True, use_swiglu=True), dict(arch="modern")],
    ids=["learned", "rope", "swiglu", "modern"],
)
def test_gpu_losses_are_those_of_the_plain_version(switches):
    """20 steps: compiled float32 as plain float32; compiled bf16, which has 8 bits, near it."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=128, vocab_size=4096, n_layer=2, n_head=4, n_embd=256, **switches)
    model = GPT(config).to(DEVICE)
    plain = losses_of(model, False, torch.float32)
    assert plain[-1] < plain[0] - 0.5
    np.testing.assert_allclose(losses_of(model, True, torch.float32), plain, atol=1e-3)
    np.testing.assert_allclose(losses_of(model, True, torch.bfloat16), plain, atol=5e-2)


def train(data, folder, name: str, device: str, nproc: int):
    """Train eight steps, with checkpoints at 4 and 8, or resume that run."""
    args = [*TINY, "--data_root", data, "--log_dir", folder, "--run_name", name]
    args[args.index("--device") + 1] = device
    args += "--deterministic True --warmup_steps 2 --save_interval 4 --max_steps 8".split()
    done = run("train_gpt2.py", "gpt2-rope", *args, nproc=nproc)
    assert done.returncode == 0, done.stdout + done.stderr


def train_losses(run_dir) -> list[float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["train/loss"] for record in records if "train/loss" in record]


@pytest.mark.parametrize("nproc", [0, 1])
def test_gpu_training_equals_the_cpus_and_resumes_bit_identically(tmp_path, nproc):
    """One micro-batch order, pinned copies, a saver's thread.

    Losses to 1e-3 of a CPU's, and a resumed run's own to the bit.
    """
    sizes = {"train": [6000, 4000], "val": [2000]}
    data = write_shards(tmp_path / "data", sizes, ids=512)
    train(data, tmp_path, "cpu", "cpu", 0)
    train(data, tmp_path, "gpu", DEVICE, nproc)
    train(data, tmp_path, "resumed", DEVICE, nproc)
    # back to the middle, as if the rest had never been
    shutil.rmtree(tmp_path / "resumed" / "ckpt" / "step_000008")
    (tmp_path / "resumed" / "finished.json").unlink()
    train(data, tmp_path, "resumed", DEVICE, nproc)
    losses = train_losses(tmp_path / "gpu")
    assert len(losses) == 8
    np.testing.assert_allclose(losses, train_losses(tmp_path / "cpu"), atol=1e-3)
    assert train_losses(tmp_path / "resumed") == losses


def test_gpu_hellaswag_equals_the_cpus_and_compiles_once():
    torch.manual_seed(5)
    model = GPT(GPTConfig(block_size=256, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        model.wte.weight.mul_(10)
    items = hellaswag.load_items(ROOT / "tests" / "hellaswag_items.jsonl", "gpt2")

    def evaluation(device: torch.device, compiled: bool) -> hellaswag.HellaSwag:
        compute = Compute(device, torch.float32, compiled)
        return hellaswag.HellaSwag(items, model.to(device), World(0, 1, device), compute, rows=2)

    expected = evaluation(torch.device("cpu"), False).losses()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()  # there is no public count of compiled graphs
    on_gpu = evaluation(torch.device(DEVICE), True)
    for _ in range(2):
        np.testing.assert_allclose(on_gpu.losses(), expected, atol=5e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1
