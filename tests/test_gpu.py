"""python -m pytest -n 0 tests/test_gpu.py

What only a GPU can show; skipped everywhere else. `python -m bench suite` runs it first, and
notes/gpu.md says what to make of it. TEST_DEVICE=cpu: what a CPU can run of it, to try the tests.
"""

import copy
import json
import os

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, TINY, run, weights, write_shards
from test_ddp_compile import losses, settings_of
from test_ddp_compile import train_all as train_compiled
from test_fake_cuda import PEAKS
from test_strict_nccl import train_all, train_presets

import config
import generate
import hellaswag
import optim
import train_gpt2
from bench.common import REPO
from bench.step import StepPart, peak_memory
from model import GPT, GPTConfig
from runtime.device import Compute
from runtime.runlog import read_metrics
from runtime.world import World

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
# processes, where several are wanted: one for each GPU
GPUS = max(1, torch.cuda.device_count()) if DEVICE == "cuda" else 2
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"
)
on_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
TESTS_PATH = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
SWITCHES = {
    "learned": {},
    "rope": {"use_rope": True},
    "swiglu": {"use_rope": True, "use_swiglu": True},
    "modern": {"arch": "modern"},
}


@pytest.fixture(autouse=True)
def compile_anew():
    """Forget what other tests compiled: torch compiles a function at most eight times."""
    torch.compiler.reset()


def tiny_data(folder):
    return write_shards(folder / "data", {"train": [6000, 4000], "val": [2000]}, ids=512)


# --------------------------------------------------------------------------------------------------
# numbers: a model on one GPU against float32, on the CPU or uncompiled


def losses_of(model, compiled: bool, dtype: torch.dtype, steps: int = 20) -> list[float]:
    """Return the losses of a few steps on one batch, starting from a copy of the model."""
    model = copy.deepcopy(model)
    compute = Compute(torch.device(DEVICE), dtype, compiled)
    train_model = compute.compile(model)
    optimizer = optim.adamw(model, 1e-3, (0.9, 0.95), 0.1)
    ids = torch.randint(4096, (4, 129), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    by_step = []
    for _ in range(steps):
        with compute.autocast():
            loss = train_model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        by_step.append(loss.item())
    return by_step


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_gpu_losses_are_those_of_the_plain_version(switches):
    """20 steps: compiled float32 as plain float32; compiled bf16, which has 8 bits, near it."""
    torch.manual_seed(0)
    shape = {"block_size": 128, "vocab_size": 4096, "n_layer": 2, "n_head": 4, "n_embd": 256}
    model = GPT(GPTConfig(**shape, **switches)).to(DEVICE)
    plain = losses_of(model, False, torch.float32)
    assert plain[-1] < plain[0] - 0.5
    np.testing.assert_allclose(losses_of(model, True, torch.float32), plain, atol=1e-3)
    np.testing.assert_allclose(losses_of(model, True, torch.bfloat16), plain, atol=5e-2)


def decided_model(switches: dict) -> GPT:
    """Return a model, on the CPU, whose logits depend on the context: they spread by 0.7."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(block_size=256, n_layer=2, n_head=2, n_embd=128, **switches))
    with torch.no_grad():
        model.wte.weight.mul_(3)
        for name, p in model.named_parameters():
            if model.config.modern and name.endswith(("c_proj.weight", "lm_head.weight")):
                torch.nn.init.normal_(p, std=0.06)  # they begin at 0
    return model


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_gpu_hellaswag_equals_the_cpus_and_compiles_once(switches, dtype, atol):
    """Nats per token of packed rows: the boolean mask is the one meant, in either type.

    On a CPU bf16 is 0.0025 off; without the mask float32 would be 0.05 off.
    """
    model = decided_model(switches)
    items = hellaswag.load_items(ROOT / "tests" / "hellaswag_items.jsonl", "gpt2")
    tokens = items.lengths[:, 1].reshape(-1, 4)

    def evaluation(device: torch.device, compute: Compute) -> hellaswag.HellaSwag:
        return hellaswag.HellaSwag(items, model.to(device), World(0, 1, device), compute, rows=2)

    cpu, device = torch.device("cpu"), torch.device(DEVICE)
    expected = evaluation(cpu, Compute(cpu, torch.float32, compiled=False)).losses()
    torch._dynamo.utils.counters.clear()  # there is no public count of compiled graphs
    on_device = evaluation(device, Compute(device, dtype, compiled=True))
    for _ in range(2):
        np.testing.assert_allclose(on_device.losses() / tokens, expected / tokens, atol=atol)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1


@pytest.mark.parametrize(
    "kind, atol", [("float32", 1e-3), ("autocast", 5e-2), ("bfloat16 weights", 5e-2)]
)
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@torch.no_grad()
def test_gpu_decoding_with_a_cache_is_the_whole_forward_pass(switches, kind, atol):
    """Logits of three rows of 100, 37 and 1 tokens, five tokens on: those of float32 on the CPU.

    The additive mask hides the padding and the slots to come, and nothing else. On a CPU bf16 is
    0.02 off; without the context the logits would be 1.5 off.
    """
    model = decided_model(switches)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(50257, (n,), generator=generator).tolist() for n in (100, 37, 1)]
    more = torch.randint(50257, (3, 5), generator=generator)
    expected = []
    for text, new in zip(texts, more.tolist()):
        logits = model(torch.tensor([text + new]))[0, len(text) :, : generate.N_VOCAB]
        expected.append(logits)  # (5, N_VOCAB)
    device = torch.device(DEVICE)
    weight_type = "bfloat16" if kind == "bfloat16 weights" else "float32"
    model = generate.to_dtype(model, weight_type, device, packed=False)
    cpu = torch.zeros(3, dtype=torch.int64)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=kind == "autocast"):
        cache, _ = generate.prefill(model, texts, 160)
        for t in range(5):
            ids = more[:, t : t + 1].to(device)
            logits = generate.decode(model, ids, cache, cpu.to(device))
            want = torch.stack([of_row[t] for of_row in expected])
            torch.testing.assert_close(logits.float().cpu(), want, atol=atol, rtol=0)


# --------------------------------------------------------------------------------------------------
# training on one GPU, and on all


# Rank 0 gets a signal at step 5.
STOPPED = """
import os, signal, train_gpt2
from conftest import at_step
from runtime.command_line import run_script

def stop(step):
    if os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGTERM)

with at_step(stop, only=5):
    run_script(train_gpt2.main)
"""


def train_losses(run_dir) -> list[float]:
    return [record["train/loss"] for record in read_metrics(run_dir) if "train/loss" in record]


@pytest.mark.parametrize("nproc", [0, GPUS])
def test_gpu_training_equals_the_cpus_and_resumes_after_sigterm(tmp_path, nproc):
    """One order of micro-batches, pinned copies, a checkpoint when stopped.

    Losses to 1e-3 of a CPU's; a run stopped by SIGTERM ends in the bits of one that was not.
    """
    stopped = tmp_path / "stopped.py"
    stopped.write_text(STOPPED)
    args = [*TINY, "--data_root", tiny_data(tmp_path), "--log_dir", tmp_path]
    args += "--deterministic True --warmup_steps 2 --save_interval 4 --max_steps 8".split()
    outputs = {}
    for name, script, device, processes in (
        ("cpu", "train_gpt2.py", "cpu", 0),
        ("gpu", "train_gpt2.py", DEVICE, nproc),
        ("stopped", stopped, DEVICE, nproc),
        ("stopped", "train_gpt2.py", DEVICE, nproc),
    ):
        args[args.index("--device") + 1] = device
        done = run(script, "gpt2-rope", *args, "--run_name", name, nproc=processes, env=TESTS_PATH)
        outputs[name, script] = done.stdout
        assert script == stopped or done.returncode == 0, done.stdout + done.stderr
    assert "interrupted by SIGTERM at step 5" in outputs["stopped", stopped]
    assert "resume | step 5" in outputs["stopped", "train_gpt2.py"]
    on_gpu = train_losses(tmp_path / "gpu")
    assert len(on_gpu) == 8
    np.testing.assert_allclose(on_gpu, train_losses(tmp_path / "cpu"), atol=1e-3)
    assert train_losses(tmp_path / "stopped") == on_gpu
    assert weights(tmp_path / "stopped") == weights(tmp_path / "gpu")


@pytest.mark.parametrize("nproc", sorted({1, GPUS}))
def test_gpu_every_preset_trains_over_nccl(tmp_path, nproc):
    """Three steps of each, DDP and Muon's shares included, on one GPU and on all."""
    errors = train_presets(tmp_path, nproc, DEVICE)
    assert "contiguous" in errors.pop("strided")
    assert errors == dict.fromkeys(errors)


def test_gpu_deterministic_runs_are_bit_identical(tmp_path):
    """T = 1024, D = 64, bf16, where attention's backward pass adds up many blocks: 3 steps.

    Twice on one GPU and, with the same B, on all of them: equal losses, norms and weights.
    """
    data = write_shards(tmp_path / "data", {"train": [60000, 40000], "val": [9000]}, ids=512)
    common = SMALL | {"data_root": str(data), "log_dir": str(tmp_path), "device": DEVICE}
    common |= {"deterministic": True, "dtype": "bfloat16", "max_steps": 3, "log_interval": 1}
    common |= {"T": 1024, "B": 1, "total_batch": 8192, "val_tokens": 8192}
    heads = {"gpt2-rope": {"n_embd": 256, "n_head": 4}, "gpt2-modern": {"n_embd": 256, "n_head": 4}}
    records = {}
    for nproc, repetitions in ((1, "ab"), (GPUS, "c")):
        runs = []
        for preset in heads:
            for repetition in repetitions:
                own = {"run_name": f"{preset}-{repetition}"}
                runs.append((preset, common | heads[preset] | own))
        errors = train_all(tmp_path, runs, nproc)
        errors.pop("strided")
        assert errors == dict.fromkeys(errors)
    for preset in heads:
        names = [f"{preset}-{repetition}" for repetition in "abc"]
        for name in names:
            keys = ("train/loss", "train/norm", "val/loss")
            rows = [[r.get(key) for key in keys] for r in read_metrics(tmp_path / name)]
            records[name] = rows, weights(tmp_path / name)
        assert len({json.dumps(records[name]) for name in names}) == 1, preset


def test_gpu_ddp_around_a_compiled_model_equals_one_plain_process(tmp_path):
    """On all GPUs, in bf16: losses within 0.05 of one uncompiled process in float32."""
    common = settings_of(tmp_path, DEVICE)
    compiled = common | {"use_compile": True, "dtype": "bfloat16"}
    runs = {"fixed": compiled | {"B": 2 // min(GPUS, 2)}, "auto": compiled | {"B": "auto"}}
    results = train_compiled(tmp_path, "inductor", runs, GPUS)
    plain = train_gpt2.train(config.preset("gpt2-rope", **common, run_name="plain"))
    for name, (records, _) in results.items():
        assert losses(records) == pytest.approx(losses(plain.records), abs=5e-2), name


# --------------------------------------------------------------------------------------------------
# what the host and the memory do


# From the third step on (DDP arranges its buckets in the second), whatever makes the host wait for
# the device is an error, until the log is read. The loader's thread may wait: it asks instead.
WITHOUT_SYNC = """
import sys, time, torch, torch.distributed as dist
import config, train_gpt2
from conftest import at_step
from runtime.meter import Meter

flush = Meter.flush

def mode(name):
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(name)

def flush_freely(meter, *args, **kwargs):
    mode("default")
    return flush(meter, *args, **kwargs)

def wait(stream):
    while not stream.query():
        time.sleep(1e-4)

def begin(step):
    if step >= 2:
        checked.append(step)
        mode("error")

Meter.flush = flush_freely
torch.cuda.Stream.synchronize = wait
checked = []
preset, changes = sys.argv[1], eval(sys.argv[2])
with at_step(begin):
    train_gpt2.train(config.preset(preset, **changes))
print("CHECKED", checked)
if torch.cuda.is_available():
    mode("error")
    try:
        torch.ones(1, device="cuda").item()
    except RuntimeError:
        print("CONTROL")
    mode("default")
"""


@pytest.mark.parametrize("nproc", [0, 1])
@pytest.mark.parametrize("preset, use_compile", [("gpt2-rope", True), ("gpt2-modern", False)])
def test_gpu_no_hidden_synchronisation_in_a_step(tmp_path, preset, use_compile, nproc):
    """The host never waits for the device between two log lines, with AdamW, Muon, and DDP."""
    script = tmp_path / "without_sync.py"
    script.write_text(WITHOUT_SYNC)
    places = {"data_root": str(tiny_data(tmp_path)), "log_dir": str(tmp_path), "device": DEVICE}
    own = {"use_compile": use_compile, "max_steps": 6, "log_interval": 2, "dtype": "bfloat16"}
    changes = SMALL | places | own
    done = run(script, preset, repr(changes), nproc=nproc, env=TESTS_PATH)
    assert "CHECKED [2, 3, 4, 5]" in done.stdout, done.stdout + done.stderr
    assert DEVICE != "cuda" or "CONTROL" in done.stdout


@on_cuda
@pytest.mark.skipif(GPUS < 2, reason="needs a second GPU")
def test_gpu_ranks_keep_to_their_own_device(tmp_path):
    """No context on another rank's GPU, which takes half a gigabyte there."""
    script = tmp_path / "contexts.py"
    script.write_text(
        "import sys, torch, torch.distributed as dist, config, train_gpt2\n"
        "train_gpt2.train(config.preset('gpt2-rope', **eval(sys.argv[1])))\n"
        "used = [i for i in range(torch.cuda.device_count())\n"
        "        if torch._C._cuda_hasPrimaryContext(i)]\n"
        "print('USED', used == [dist.get_rank()], flush=True)\n"
    )
    places = {"data_root": str(tiny_data(tmp_path)), "log_dir": str(tmp_path), "device": DEVICE}
    changes = SMALL | places | {"max_steps": 3}
    done = run(script, repr(changes), nproc=GPUS, env=TESTS_PATH)
    assert done.stdout.count("USED True") == GPUS, done.stdout + done.stderr


@on_cuda
@pytest.mark.parametrize("preset", ["gpt2-baseline", "gpt2-rope"])
def test_gpu_peak_memory_of_a_step_of_64_sequences(preset):
    """124M, compiled: less than the same step uncompiled, as simulated (test_fake_cuda.py)."""
    if torch.cuda.get_device_properties(0).total_memory < 75e9:
        pytest.skip("needs a GPU of 80 GB")
    peak = peak_memory(StepPart(preset=preset, B=64, device=DEVICE), REPO)
    print(f"{preset}: {peak / 1e9:.1f} GB")
    assert 20 < peak / 1e9 < PEAKS[preset, False]
