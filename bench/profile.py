"""Where a training step of this repository spends its time, against a floor."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity

from bench.common import REPO, Side, alternate, table
from bench.step import StepSettings, training_step
from model import GPT
from runtime.command_line import UserError
from runtime.device import autocast_dtype, pick_device

KINDS = {  # patterns of the names of operators and kernels; the first that matches decides
    "attention": r"gpt2::attention|scaled_dot_product|flash|fmha|cudnn_generated",
    "matmul": r"^aten::(add|b|badd)?mm$|gemm|nvjet|cutlass|xmma",
    "cross-entropy": r"(cpp|triton)_.*(log_softmax|nll_loss)",
    "element-wise": (
        r"cpp_fused|triton_|CompiledFxGraph|^aten::(copy_|fill_|add|zero_|embedding|sum)"
    ),
    "optimizer, clip": r"adam|vector_norm|foreach|^aten::mul_|lpnorm|multi_tensor",
    "rest": r"",
}


@dataclass(frozen=True)
class ProfilePart(StepSettings):
    """Split the time of this repository's training step by kind of work."""

    B: int = 4  # sequences in the batch
    T: int = 1024  # tokens in a sequence

    def measure(self) -> dict:
        """Return milliseconds by kind, and the floor of each; ratio: the floor over the step."""
        from torch._inductor import config  # takes a second

        self.check("B", "T")
        device = pick_device(self.device)
        config.cpp.enable_kernel_profile = True  # names the generated kernels of a CPU
        run, model = training_step(self, REPO, self.B, self.T)
        side = Side(run)
        alternate({REPO: side}, self.warmup, self.steps)
        if not side.fits:
            raise UserError(f"a step of B = {self.B} does not fit in memory; hint: --B 1")
        ms, wall = by_kind(run, device)
        rates = device_rates(device, autocast_dtype(device, self.dtype))
        floor = floors(model, self.B * self.T, self.T, rates)
        rows = []
        for kind, value in ms.items():
            rows.append(
                [kind, f"{value:,.1f}", f"{value / wall:.1%}", f"{floor.get(kind, 0):,.1f}"]
            )
        rows.append(["step", f"{wall:,.1f}", "", f"{sum(floor.values()):,.1f}"])
        table(["kind", "ms", "share", "floor ms"], rows)
        print(
            f"median {side.median:,.1f} ms without the profiler; floor: matmul "
            f"{rates['matmul'] / 1e9:,.0f} GFLOP/s, copy {rates['copy'] / 1e9:,.1f} GB/s"
        )
        ratio = sum(floor.values()) / side.median
        figures = {"kind_ms": ms, "floor_ms": floor, "ms": side.ms, "rates": rates}
        return {"ratio": ratio} | figures | self.used()


def by_kind(run: Callable, device: torch.device) -> tuple[dict[str, float], float]:
    """Return the milliseconds of one call by kind of work, and its duration."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as recorded:
        started = time.perf_counter()
        run()
        wall = 1e3 * (time.perf_counter() - started)
    ms = dict.fromkeys(KINDS, 0.0)
    for event in recorded.key_averages():
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, event.key))
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        ms[kind] += microseconds / 1e3
    ms["host gaps"] = max(0.0, wall - sum(ms.values()))
    return ms, wall


def floors(model: GPT, tokens: int, T: int, rates: dict[str, float]) -> dict[str, float]:
    """Return the least milliseconds that the kinds of work can take in a step."""
    c = model.config
    attention_flops = tokens * 6 * c.n_layer * c.n_embd * T  # causal: half of T on average
    # AdamW: p, m and v are read and written, the gradient is read twice, in float32
    optimizer_bytes = 4 * 8 * model.num_params()
    return {
        "matmul": 1e3 * tokens * model.flops_per_token(0) / rates["matmul"],
        "attention": 1e3 * attention_flops / rates["matmul"],
        "optimizer, clip": 1e3 * optimizer_bytes / rates["copy"],
    }


def device_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return operations per second of a matmul, bytes per second of a copy: the best of ten.

    (4096, 768) @ (768, 3072); 256 MB, read and written.
    """
    a = torch.randn(4096, 768, device=device, dtype=dtype)
    b = torch.randn(768, 3072, device=device, dtype=dtype)
    source = torch.ones(2**26, device=device)
    target = source.clone()

    def run(work: Callable, *arguments):
        work(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize()

    sides = {
        "matmul": Side(lambda: run(torch.matmul, a, b), 2 * 4096 * 768 * 3072),
        "copy": Side(lambda: run(target.copy_, source), 2 * source.nbytes),
    }
    alternate(sides, 3, 10)
    return {name: 1e3 * side.amount / min(side.ms) for name, side in sides.items()}
