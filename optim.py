"""Optimizers, learning-rate schedules, gradient accumulation."""

import math

import torch
import torch.distributed as dist

from muon import Muon, muon_momentum

# --------------------------------------------------------------------------------------------------
# schedules: pure functions of the step (0-based)


def learning_rate(cfg, step: int) -> float:
    """Return the learning rate of a step: a linear warm-up, then the schedule that cfg names.

    The warm-up begins at max_lr / warmup_steps, so that the first step is not lost to a rate of 0.
    At max_steps and beyond the rate is min_lr.
    """
    if step < cfg.warmup_steps:
        return cfg.max_lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "cosine":
        return cosine(step, cfg.max_lr, cfg.min_lr, cfg.warmup_steps, cfg.max_steps)
    return constant_linear(step, cfg.max_lr, cfg.min_lr, cfg.max_steps)


def cosine(step: int, max_lr: float, min_lr: float, warmup_steps: int, max_steps: int) -> float:
    """Follow half a cosine from max_lr to min_lr."""
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (max_lr - min_lr)


def constant_linear(
    step: int, max_lr: float, min_lr: float, max_steps: int, decay: float = 0.7
) -> float:
    """Stay at max_lr, then follow a straight line to min_lr over the last `decay` of the steps.

    0.7: modded-nanogpt's readable script.
    """
    left = max(0.0, (max_steps - step) / max(1, max_steps))
    return min_lr + min(1.0, left / decay) * (max_lr - min_lr)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, step: int, max_steps: int):
    """Set the rate of each group, lr times its scale, and Muon's momentum."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)
        if "momentum" in group:
            group["momentum"] = muon_momentum(step, max_steps)


# --------------------------------------------------------------------------------------------------
# optimizers


def build(cfg, model: torch.nn.Module, dtype: torch.dtype) -> torch.optim.Optimizer:
    """Build the optimizer that cfg names; dtype, the run's autocast type, is for Muon's matmuls."""
    if cfg.optimizer == "adamw":
        return adamw(model, cfg.max_lr, cfg.betas, cfg.weight_decay)
    # eps, and a decay of 0.001, as in the script that the rates are from (config.py)
    adam = torch.optim.AdamW(
        [
            {"params": [model.wte.weight], "scale": cfg.embed_lr / cfg.max_lr},
            {"params": [model.lm_head.weight], "scale": cfg.head_lr / cfg.max_lr},
        ],
        lr=cfg.max_lr,
        betas=cfg.betas,
        eps=1e-10,
        weight_decay=0.001,
        fused=has_fused_kernels(model),
    )
    matrices = dict(model.h.named_parameters())
    return Muon(matrices, adam, cfg.max_lr, cfg.weight_decay, dtype)


def adamw(
    model: torch.nn.Module, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Build AdamW with weight decay on matrices and embeddings only.

    Pulling biases and norms to 0 has no purpose. eps 1e-8 as in the published runs. Fused: one
    kernel over all parameters (CPU and CUDA).
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=has_fused_kernels(model))


def has_fused_kernels(model: torch.nn.Module) -> bool:
    return next(model.parameters()).device.type in ("cpu", "cuda")


def step_if_finite(finite: torch.Tensor, optimizer: torch.optim.Optimizer):
    """Call optimizer.step() if `finite` (0-d bool, on the device).

    Fused kernels skip the update on the device when found_inf, a hook for gradient scalers, is 1:
    no GPU sync.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = (~finite).float()
        optimizer.step()
    elif finite:
        optimizer.step()


# --------------------------------------------------------------------------------------------------
# gradients


class Gradients:
    """Gradients of all micro-steps and all processes, added up in p.grad, and the mean loss.

    DDP adds them up in the last backward pass. With in_order they are added one after the other, in
    the order of the global batch: slower, but any number of processes computes bit-identical sums.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        ddp: torch.nn.Module | None,
        micro_steps: int,
        in_order: bool,
    ):
        self.parameters = list(model.parameters())
        self.ddp = ddp
        self.in_order = in_order
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        # DDP divides by world_size itself
        self.divisor = micro_steps if ddp else micro_steps * self.world_size
        self.restart()

    def restart(self):
        self.loss = torch.zeros((), device=self.parameters[0].device)
        self.sums: list[torch.Tensor] | None = None  # in order: gradients, then the loss

    def sync(self, last: bool):
        """Let DDP exchange gradients in the last micro-step only.

        Call it before the forward pass, where DDP reads the flag.
        """
        if self.ddp:
            self.ddp.require_backward_grad_sync = last

    def add(self, loss: torch.Tensor):
        """Run the backward pass of a micro-step's mean loss."""
        loss = loss / self.divisor
        loss.backward()
        self.loss += loss.detach()
        if self.in_order:
            self.sums = add_in_order(self.parameters, loss, self.sums)

    def finish(self, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean loss of the global batch and the gradient's norm before clipping."""
        if self.in_order:
            *grads, loss = self.sums
            for p, grad in zip(self.parameters, grads):
                p.grad = grad
        else:
            loss = self.loss
            if dist.is_initialized():
                dist.all_reduce(loss)
            loss = loss / self.world_size
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters])
        if clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, clip, norm)
        self.restart()
        return loss, norm


def add_in_order(
    parameters: list[torch.nn.Parameter], loss: torch.Tensor, sums: list[torch.Tensor] | None
) -> list[torch.Tensor]:
    """Add the gradients and loss of this micro-step to `sums`, and clear p.grad.

    Process by process in rank order: floating-point sums depend on their order, and this one is
    that of the micro-batches in the global batch, however many processes share them. Costs one
    gradient per process in memory and traffic.
    """
    own = [p.grad for p in parameters] + [loss.detach()]
    for rank in range(dist.get_world_size() if dist.is_initialized() else 1):
        received = own
        if dist.is_initialized():
            received = [t.clone(memory_format=torch.contiguous_format) for t in own]
            for t in received:
                dist.broadcast(t, rank)
        if sums is None:
            sums = received
        else:
            sums = [a + b for a, b in zip(sums, received)]
    for p in parameters:
        p.grad = None
    return sums
