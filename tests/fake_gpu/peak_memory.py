"""Print the peak memory of an uncompiled training step at full size, on fake CUDA tensors.

    python peak_memory.py PRESET B [RECOMPUTE]

Bytes of parameters, moments, gradients, activations. Attention is FlashAttention, which stores no
(T, T) matrix. What the allocator rounds up and the context of the device are not in it.
"""

import fake_cuda  # before torch  # isort: skip

import dataclasses
import os
import sys

import torch
from torch.distributed._tools.mem_tracker import MemTracker

import config
import optim
from model import GPT, GPTConfig


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Do what causal attention does on a GPU; on a fake one torch would choose plain matmuls."""
    qkv = (t.bfloat16() for t in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(*qkv, 0.0, is_causal=True)[0]


def measure(preset: str, B: int, recompute: bool) -> int:
    """Return the peak of one step, at the preset's size."""
    cfg = config.preset(preset)
    shape = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(GPTConfig)}
    with torch.device("cuda"):
        model = GPT(GPTConfig(**shape))
        ids = torch.zeros(B, cfg.T, dtype=torch.int64)
    for block in model.h:
        block.attn.attend = flash_attention
    model.recompute = recompute
    optimizer = optim.build(cfg, model, torch.bfloat16)
    for p in model.parameters():  # a first step makes the moments
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    gradients = optim.Gradients(model, None, 1, in_order=False)
    memory = MemTracker()
    memory.track_external(model, optimizer, ids)
    with memory:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, ids)
        gradients.add(loss)
        loss, _ = gradients.finish(cfg.grad_norm_clip)
        optim.step_if_finite(torch.isfinite(loss), optimizer)
    return max(memory.get_tracker_snapshot("peak")[torch.device("cuda", 0)].values())


def main():
    preset, B, recompute = sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["True"]
    with fake_cuda.fake_cuda():
        print(measure(preset, B, recompute))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
