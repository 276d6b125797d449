"""Optimiser, learning-rate schedule, and what happens to gradients between the two."""

import math

import torch
import torch.distributed as dist


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


def step_if(healthy: torch.Tensor, optimizer: torch.optim.Optimizer):
    """optimizer.step(), or nothing at all where `healthy` (0-d bool, on the device) is False.

    The fused kernels look at found_inf, which is there for gradient scalers, themselves: nothing waits for the device.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = (~healthy).float()
        optimizer.step()
    elif healthy:
        optimizer.step()


def add_in_order(parameters: list[torch.nn.Parameter], loss: torch.Tensor, sums: list | None) -> list[torch.Tensor]:
    """sums + this micro-batch's gradients and loss, of all processes one after the other; takes the gradients away.

    Floating-point sums depend on their order. Here it is that of the micro-batches in the global batch, however many
    processes share them, so every split gives the same bits. Costs one gradient per process in memory and traffic.
    """
    mine = [p.grad for p in parameters] + [loss.detach()]
    for rank in range(dist.get_world_size() if dist.is_initialized() else 1):
        if dist.is_initialized():
            theirs = [t.clone() for t in mine]
            for t in theirs:
                dist.broadcast(t, rank)
        else:
            theirs = mine
        sums = theirs if sums is None else [a + b for a, b in zip(sums, theirs)]
    for p in parameters:
        p.grad = None
    return sums
