"""Train, evaluate, score and decode on fake CUDA tensors; print a line of JSON for each case.

    python cases.py HELLASWAG_ITEMS

[name, None], or [name, the error].
"""

import fake_cuda  # before torch  # isort: skip

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import config
import generate
import hellaswag
import optim
import shards
from model import GPT, GPTConfig, KVCache
from runtime.device import Compute, autocast_dtype, pick_device
from runtime.world import World

T = 64
SIZES = {"block_size": 128, "vocab_size": 512, "n_layer": 2, "n_head": 2, "n_embd": 64}


SWITCHES = ("use_rope", "use_swiglu", "arch")


def distinct_presets() -> list[str]:
    """Return one preset for each kind of model and optimizer that presets have."""
    fields = (*SWITCHES, "optimizer", "schedule", "grad_norm_clip")
    names = {}
    for name in config.PRESETS:
        cfg = config.preset(name)
        names.setdefault(tuple(getattr(cfg, field) for field in fields), name)
    return list(names.values())


def build(preset: str) -> tuple[config.TrainConfig, GPT, Compute]:
    """Return a preset's settings, its model at a tiny size, and how a GPU computes."""
    cfg = config.preset(preset)
    switches = {name: getattr(cfg, name) for name in SWITCHES}
    device = pick_device("auto")
    with torch.device(device):
        model = GPT(GPTConfig(**SIZES, **switches))
    return cfg, model, Compute(device, autocast_dtype(device, "auto"), compiled=False)


def on_gpu(*tensors: torch.Tensor):
    assert {tensor.device.type for tensor in tensors} == {"cuda"}


def batch(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x, y as the loader makes them from the shards' 16-bit ids."""
    x, y = shards.to_ids(torch.zeros(4, T + 1, dtype=torch.int16), device)
    on_gpu(x, y)
    assert x.is_contiguous() and y.is_contiguous() and x.dtype == y.dtype == torch.int64
    return x, y


def train(preset: str, recompute: bool, in_order: bool = False):
    """Make two steps of two micro-steps each, as train_gpt2.train_loop() does."""
    cfg, model, compute = build(preset)
    model.recompute = recompute
    optimizer = optim.build(cfg, model, compute.dtype)
    gradients = optim.Gradients(model, None, 2, in_order)
    for step in range(2):
        optim.set_rates(optimizer, optim.learning_rate(cfg, step), step, cfg.max_steps)
        for _ in range(2):
            with compute.autocast():
                loss = model(*batch(compute.device))
            assert loss.dtype == torch.float32
            gradients.add(loss)
        loss, norm = gradients.finish(cfg.grad_norm_clip)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        on_gpu(loss, norm, finite, *(p.grad for p in model.parameters()))
        optim.step_if_finite(finite, optimizer)
        optimizer.zero_grad(set_to_none=True)
    state = [value for values in optimizer.state.values() for value in values.values()]
    assert len(optimizer.state) == len(list(model.parameters()))
    on_gpu(*model.parameters(), *state)


@torch.no_grad()
def evaluate(preset: str):
    """Sum the losses of a validation batch."""
    _, model, compute = build(preset)
    with compute.autocast():
        loss = model(*batch(compute.device), "sum")
    on_gpu(loss)
    assert loss.dtype == torch.float32


@torch.no_grad()
def score(preset: str, path: Path):
    """Score packed HellaSwag rows, whose mask is a boolean one."""
    _, model, compute = build(preset)
    items = hellaswag.load_items(path, "gpt2")
    packed = hellaswag.HellaSwag(items, model, World(0, 1, compute.device), compute, rows=2)
    with compute.autocast():
        losses = [packed.score(model, rows) for rows in packed.batches]
    on_gpu(*losses)
    assert {loss.dtype for loss in losses} == {torch.float32}


@torch.no_grad()
def decode(preset: str, in_bfloat16: bool):
    """Fill a cache with two texts, draw a token each in three ways, and decode it.

    In float32 weights under autocast, as samples during training; or in bfloat16 weights.
    """
    if in_bfloat16:
        torch.set_default_dtype(torch.bfloat16)
    try:
        _, model, compute = build(preset)
    finally:
        torch.set_default_dtype(torch.float32)
    u = generate.uniforms(1, 2, 3)
    nucleus = generate.Sampling(top_k=0, top_p=0.9)
    with torch.autocast("cuda", torch.bfloat16, enabled=not in_bfloat16):
        for sampling in (generate.Sampling(), generate.Sampling(temperature=0), nucleus):
            cache, logits = generate.prefill(model, [[1, 2, 3], [4, 5]], 40)
            ids = generate.draw(logits, u[:, 0], sampling)
            logits = generate.decode(model, ids[:, None], cache, torch.zeros_like(cache.lengths))
            on_gpu(ids, logits, cache.k, cache.v, cache.lengths)
            assert cache.k.dtype == torch.bfloat16
    copies = KVCache(model.config, 4, 40, compute.device, cache.k.dtype)
    copies.put([0, 1, 2, 3], cache, [0, 0, 1, 1])
    on_gpu(copies.k, copies.lengths)


def two_devices():
    """Add a CPU tensor to a CUDA one: the control, which must fail."""
    torch.zeros(2, 2) + torch.zeros(2, 2, device="cuda")


def two_types():
    """Multiply bfloat16 by float32 outside autocast: the control, which must fail."""
    torch.zeros(2, 2, device="cuda", dtype=torch.bfloat16) @ torch.zeros(2, 2, device="cuda")


def report(name: str, case: Callable, *args):
    """Run a case, and print its name and its error, if any, with the place in the code."""
    error = None
    try:
        case(*args)
    except Exception as e:
        frames = traceback.extract_tb(e.__traceback__)
        outside = ("site-packages", "fake_cuda.py")
        own = [f for f in frames if not any(name in f.filename for name in outside)][-1]
        error = f"{type(e).__name__} at {Path(own.filename).name}:{own.lineno} {own.line}: {e}"
    print(json.dumps([name, error]), flush=True)


def main():
    items = Path(sys.argv[1])
    with fake_cuda.fake_cuda():
        report("control: two devices", two_devices)
        report("control: two types", two_types)
        for preset in distinct_presets():
            for recompute in (False, True):
                report(f"{preset} train recompute={recompute}", train, preset, recompute)
            report(f"{preset} train in order", train, preset, False, True)
            report(f"{preset} evaluate", evaluate, preset)
            report(f"{preset} score", score, preset, items)
            for in_bfloat16 in (False, True):
                report(f"{preset} decode bfloat16={in_bfloat16}", decode, preset, in_bfloat16)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
