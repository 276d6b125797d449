"""Optimiser and learning-rate schedule."""

import math

import torch


def cosine(step: int, max_lr: float, min_lr: float, warmup_steps: int, max_steps: int) -> float:
    """Learning rate of an optimiser step (0-based): linear warm-up to max_lr, then half a cosine to min_lr.

    The first step is not lost to a rate of 0: warm-up begins at max_lr / warmup_steps. max_steps itself gives min_lr.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (max_lr - min_lr)


def adamw(model: torch.nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and embeddings only: pulling biases and norms to 0 has no purpose.

    eps 1e-8 as in the published runs. Fused: one kernel over all parameters (CPU and CUDA).
    """
    params = list(model.parameters())
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    fused = params[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=fused)
