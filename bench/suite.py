"""All that a GPU is asked, in one call: notes/gpu.md says what the results mean."""

import json
import multiprocessing
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from runtime.command_line import PathText
from runtime.device import autocast_dtype, pick_device
from runtime.runlog import environment

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class SuitePart:
    """Run the tests that need a GPU, then measure, the most wanted first, until the time is up.

    Each in a process of its own. One that fails is reported, and the next one follows.
    """

    minutes: float = 30  # no measurement starts later
    tests: bool = True  # tests/test_gpu.py first: about 5 minutes (estimated)
    steps: int = 20  # timed steps of each side
    device: str = "cuda"  # of all of them
    out: PathText = "log/reference"  # directory of bench_DEVICE.jsonl; each result adds a line

    def measure(self) -> dict:
        """Run everything; ratio: that of the first measurement."""
        started = time.monotonic()
        pick_device(self.device)  # a mistake ends here
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            machine = pool.submit(describe_machine, self.device).result()
        name = re.sub(r"[^A-Za-z0-9]+", "_", machine["device"]).strip("_")
        path = ROOT / self.out / f"bench_{name}.jsonl"
        add_line(path, {"part": "machine"} | machine)
        failed = []
        if self.tests:
            result = run_tests()
            add_line(path, result)
            failed = result["failed"]
        deadline = started + 60 * self.minutes
        results, failed_variants, left_out = run_variants(self.variants(), path, deadline)
        ratio = results[0]["ratio"] if results else None
        outcome = {"failed": failed + failed_variants, "not_run": left_out, "file": str(path)}
        return {"ratio": ratio} | outcome | asdict(self)

    def variants(self) -> list[list[str]]:
        """Return the command lines of the parts, the most wanted first."""
        device = ["--device", self.device]
        step = ["step", *device, "--steps", str(self.steps)]
        both = [*step, "--B", "64", "--preset", "gpt2-rope", "--against", "gpt2-baseline"]
        no_memory = ["--memory", "False"]
        transformers = ["transformers", "transformers-compiled"]
        return [
            # presets against the baseline
            both,
            [*step, "--B", "64", "--preset", "gpt2-modern", "--against", "gpt2-baseline"],
            # transformers needs 92 GB at B = 64 (simulated), so half of it on a card of 80
            [*step, "--B", "32", "--against", *transformers],
            [*both, *no_memory, "--attention", "cudnn"],
            [*both, *no_memory, "--attention", "flash"],
            [*step, "--B", "128", "--preset", "gpt2-rope", "--against", "gpt2-baseline"],
            ["profile", *device, "--B", "64", "--preset", "gpt2-rope"],
            ["hellaswag", *device, "--items", "1000"],
            ["generate", *device, "--use_compile", "True"],
            [*both, "--recompute", "True"],
            [*both[:-3], "gpt2-swiglu", "--against", "gpt2-baseline", *no_memory],
            [*both, *no_memory, "--compile_mode", "max-autotune-no-cudagraphs"],
            [*both, *no_memory, "--attention", "efficient"],
            [*step, "--B", "64", "--against", *transformers],
            ["sweep", *device, "--steps", str(self.steps), "--Bs", "8", "16", "32", "64"],
        ]


def add_line(path: Path, record: dict):
    """Append a record to a file, as one line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f:
        f.write(json.dumps(record) + "\n")


# --------------------------------------------------------------------------------------------------
# what comes before the measurements


def describe_machine(name: str) -> dict:
    """Return versions and hardware, and the kernels that a causal attention runs there."""
    device = pick_device(name)
    world_size = torch.cuda.device_count() if device.type == "cuda" else 1
    return environment(device, world_size) | {"attention": attention_kernels(device)}


def attention_kernels(device: torch.device) -> list[str]:
    """Return the names of the kernels of attention, forward and backward, as a step calls it."""
    on_gpu = device.type == "cuda"
    shape = (4, 12, 1024, 64)  # (B, H, T, D) of GPT-2
    dtype = autocast_dtype(device, "auto")
    qkv = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as recorded:
        F.scaled_dot_product_attention(*qkv, is_causal=True).sum().backward()
    names = {event.key for event in recorded.key_averages()}
    return sorted(n[:80] for n in names if re.search("attention|flash|fmha|cudnn|sdpa", n))


def run_tests() -> dict:
    """Run the tests that need a GPU; return how many passed, and which failed."""
    # one -q is in pyproject.toml; with a second the counts would not be printed
    command = [sys.executable, "-m", "pytest", "-n", "0", "-rfEs", "tests/test_gpu.py"]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    output = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        output += line
    status = process.wait()
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M)
    if status and not failed:
        failed = [f"pytest: exit status {status}"]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|skipped)", output)}
    seconds = round(time.monotonic() - started)
    return {"part": "tests", "failed": failed, "seconds": seconds} | counts


# --------------------------------------------------------------------------------------------------
# the measurements


def run_variants(
    variants: list[list[str]], path: Path, deadline: float
) -> tuple[list[dict], list[str], list[str]]:
    """Run `python -m bench` with each command line, and append the results to a file.

    Returns the results, the command lines that failed, and those not run: none begins later than
    the deadline (time.monotonic()).
    """
    results, failed, left_out = [], [], []
    for variant in variants:
        if time.monotonic() > deadline:
            left_out.append(" ".join(variant))
            continue
        print("\n$ python -m bench", *variant, flush=True)
        command = [sys.executable, "-m", "bench", *variant]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        if done.returncode:
            failed.append(" ".join(variant))
            add_line(path, {"part": variant[0], "command": variant, "failed": done.returncode})
            continue
        results.append(json.loads(done.stdout.strip().splitlines()[-1]))
        add_line(path, results[-1])
    for title, commands in (("failed", failed), ("not run", left_out)):
        if commands:
            print(f"{title} |", " | ".join(commands))
    return results, failed, left_out
