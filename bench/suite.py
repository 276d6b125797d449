"""All that a GPU is asked, in one call."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.device import pick_device
from runtime.runlog import environment

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class SuitePart:
    """Run the tests that need a GPU, then the step's variants, profile, HellaSwag and decoding.

    Each in a process of its own. One that fails is reported, and the next one follows.
    """

    steps: int = 20  # timed steps of each variant
    device: str = "cuda"  # of all of them
    out: str = "log/reference"  # directory of bench_DEVICE.jsonl; each result adds a line

    def measure(self) -> dict:
        """Run everything; ratio: that of the first variant."""
        device = environment(pick_device(self.device), 1)["device"]
        path = Path(self.out) / f"bench_{re.sub(r'[^A-Za-z0-9]+', '_', device).strip('_')}.jsonl"
        tests = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/test_gpu.py"]
        failed = ["pytest"] if subprocess.run(tests, cwd=ROOT).returncode else []
        results, failed_variants = run_variants(self.variants(), path)
        ratio = results[0]["ratio"] if results else None
        return {"ratio": ratio, "failed": failed + failed_variants} | asdict(self)

    def variants(self) -> list[list[str]]:
        """Return the command lines of the parts, the most wanted first."""
        device = ["--device", self.device]
        step = ["step", *device, "--steps", str(self.steps)]
        big = [*step, "--memory", "False", "--B", "64"]
        return [
            # transformers needs 92 GB at B = 64 (simulated), so half of it on a card of 80
            [*step, "--B", "32", "--against", "transformers", "transformers-compiled"],
            [*step, "--B", "64", "--against", "transformers", "transformers-compiled"],
            [*step, "--B", "128"],
            *([*big, "--attention", kind] for kind in ("flash", "cudnn", "efficient")),
            [*big, "--compile_mode", "max-autotune-no-cudagraphs"],
            [*step, "--B", "64", "--recompute", "True"],
            *([*big, "--preset", name] for name in ("gpt2-rope", "gpt2-swiglu")),
            [*big, "--preset", "gpt2-modern", "--against", "gpt2-baseline"],
            ["profile", *device, "--B", "64"],
            ["sweep", *device, "--steps", str(self.steps), "--Bs", "8", "16", "32", "64"],
            ["hellaswag", *device, "--items", "1000"],
            ["generate", *device, "--use_compile", "True"],
        ]


def run_variants(variants: list[list[str]], path: Path) -> tuple[list[dict], list[str]]:
    """Run `python -m bench` with each command line, and append the results to a file.

    Returns the results, and the command lines that failed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    results, failed = [], []
    for variant in variants:
        print("\n$ python -m bench", *variant, flush=True)
        command = [sys.executable, "-m", "bench", *variant]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        if done.returncode:
            failed.append(" ".join(variant))
            continue
        results.append(json.loads(done.stdout.strip().splitlines()[-1]))
        with open(path, "a") as f:
            f.write(json.dumps(results[-1]) + "\n")
    if failed:
        print("failed |", " | ".join(failed))
    return results, failed
