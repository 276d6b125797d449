"""Optimisers, learning-rate schedules, and what happens to gradients between the two."""

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch.nn import functional as F

# --------------------------------------------------------------------------------------------------------------------
# schedules: pure functions of the step (0-based), chosen by name
#
# All begin with a linear warm-up from max_lr / warmup_steps, so that the first step is not lost to a rate of 0, and give
# min_lr at max_steps and beyond.


def cosine(step: int, max_lr: float, min_lr: float, warmup_steps: int, max_steps: int) -> float:
    """Half a cosine from max_lr to min_lr."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (max_lr - min_lr)


def linear(step: int, max_lr: float, min_lr: float, warmup_steps: int, max_steps: int) -> float:
    """A straight line from max_lr to min_lr."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return (1 - done) * max_lr + done * min_lr  # exact at both ends


def constant_linear(
    step: int, max_lr: float, min_lr: float, warmup_steps: int, max_steps: int, decay: float = 0.7
) -> float:
    """max_lr, then a straight line to min_lr over the last `decay` of the steps (0.7: modded-nanogpt's readable script)."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    left = max(0.0, (max_steps - step) / max(1, max_steps))
    return min_lr + min(1.0, left / decay) * (max_lr - min_lr)


def muon_momentum(step: int, max_steps: int) -> float:
    """Muon's momentum: 0.85 to 0.95 over 300 steps (worth 0.013 nats in 3,200, modded-nanogpt), fewer in a shorter run."""
    return 0.85 + 0.1 * min(1.0, step / max(1, min(300, max_steps // 10)))


def set_rates(optimizer: torch.optim.Optimizer, lr: float, step: int, max_steps: int):
    """The schedule's rate, times each group's scale; and the momentum of the step, where there is Muon."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)
        if "momentum" in group:
            group["momentum"] = muon_momentum(step, max_steps)


# --------------------------------------------------------------------------------------------------------------------
# AdamW


def adamw(
    model: torch.nn.Module, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and embeddings only: pulling biases and norms to 0 has no purpose.

    eps 1e-8 as in the published runs. Fused: one kernel over all parameters (CPU and CUDA).
    """
    params = list(model.parameters())
    groups = [
        dict(params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),
        dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0),
    ]
    fused = params[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=fused)


# --------------------------------------------------------------------------------------------------------------------
# Muon


def build(cfg, model: torch.nn.Module, dtype: torch.dtype) -> torch.optim.Optimizer:
    """The optimiser that the settings name. dtype: of Muon's multiplications, the autocast type of the run."""
    if cfg.optimizer == "adamw":
        return adamw(model, cfg.max_lr, cfg.betas, cfg.weight_decay)
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    # eps, and a decay of 0.001, as in the script that the rates are from (config.py)
    others = torch.optim.AdamW(
        [
            dict(params=[model.wte.weight], scale=cfg.embed_lr / cfg.max_lr),
            dict(params=[model.lm_head.weight], scale=cfg.head_lr / cfg.max_lr),
        ],
        lr=cfg.max_lr,
        betas=cfg.betas,
        eps=1e-10,
        weight_decay=0.001,
        fused=fused,
    )
    return Muon(dict(model.h.named_parameters()), others, cfg.max_lr, cfg.weight_decay, dtype)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for hidden matrices, and the given AdamW for all else, as one optimiser.

    The momentum of a matrix replaced by the nearest orthogonal one: every direction moves by lr. As torch.optim.Muon, but
    matrices of one shape are multiplied together, each process takes its share of them and hands it round, and the
    q, k and v of an attention layer are three matrices. All of the momentum is kept by every process: the first one alone
    writes a checkpoint, from which any number goes on.
    """

    def __init__(
        self,
        matrices: dict[str, torch.nn.Parameter],
        others: torch.optim.AdamW,
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
    ):
        super().__init__(
            [dict(params=list(matrices.values()))],
            dict(lr=lr, weight_decay=weight_decay, momentum=0.95, fused=others.defaults["fused"]),
        )
        self.parts = {p: 3 if "c_attn" in name else 1 for name, p in matrices.items()}
        self.others, self.dtype, others.state = (
            others,
            dtype,
            self.state,
        )  # one state and one list of groups for both
        self.param_groups += others.param_groups

    @torch.no_grad()
    def step(self):
        """One update; none at all where found_inf (see step_if) is 1."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            self.others.found_inf = found_inf
        self.others.step()
        group, by_shape = self.param_groups[0], defaultdict(list)
        for p in group["params"]:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            for part in zip(
                *(t.chunk(self.parts[p]) for t in (p, p.grad, self.state[p]["momentum_buffer"]))
            ):
                by_shape[part[0].shape].append(part)
        for (rows, columns), parts in by_shape.items():
            weights, grads, momenta = map(list, zip(*parts))
            g, m = torch.stack(grads), torch.stack(momenta)  # (n, rows, columns)
            lr = group["lr"]
            if found_inf is not None:  # the momentum stays: lerp between equals is exact
                g, lr = torch.where(found_inf > 0, m, g), lr * (1 - found_inf)
            m.lerp_(g, 1 - group["momentum"])
            torch._foreach_copy_(momenta, m.unbind())
            update = self.orthogonal(g.lerp(m, group["momentum"]))  # Nesterov
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
            # a tall matrix has columns of length 1 and so shorter rows, which are what the layer's outputs come from
            torch._foreach_add_(weights, (update * (-lr * max(1, rows / columns) ** 0.5)).unbind())

    def orthogonal(self, x: torch.Tensor) -> torch.Tensor:
        """newton_schulz() of each matrix of x (n, rows, columns), float32; the same on all processes, which share the work."""
        n, (rank, world) = (
            len(x),
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1),
        )
        share = -(-n // world)
        mine = newton_schulz(x[rank * share : (rank + 1) * share].to(self.dtype))
        if world == 1:
            return mine.float()
        mine = F.pad(mine, (0, 0, 0, 0, 0, share - len(mine)))
        every = mine.new_empty(world * share, *x.shape[1:])
        dist.all_gather_into_tensor(every, mine)
        return every[:n].float()


def newton_schulz(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About U V^T for each matrix U S V^T of x (n, rows, columns).

    Singular values above 0.005 of a matrix's length come to between 0.7 and 1.2, smaller ones stay smaller. The polynomial
    of Jordan et al. 2024: its slope at 0 counts for more than the value that it settles at.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    polynomial = lambda gram: torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
    if x.dtype == torch.float32 and x.shape[2] >= 2 * x.shape[1]:
        # The rounds by Gram matrices alone: 25 n^3 multiplications for n x 4n instead of 45, two thirds of the time on a CPU.
        # Rounding grows by a^2 a round, which float32 has room for (2e-4 of the update) and bfloat16 has not
        gram, product = x @ x.mT, None
        for left in reversed(range(steps)):
            factor = polynomial(gram)
            factor.diagonal(dim1=1, dim2=2).add_(a)
            product = factor if product is None else factor @ product
            gram = factor @ gram @ factor if left else gram
        x = product @ x
    else:
        for _ in range(steps):
            x = torch.baddbmm(x, polynomial(x @ x.mT), x, beta=a)
    return x.mT if tall else x


# --------------------------------------------------------------------------------------------------------------------
# between gradients and optimiser


def step_if(healthy: torch.Tensor, optimizer: torch.optim.Optimizer):
    """optimizer.step(), or nothing at all where `healthy` (0-d bool, on the device) is False.

    The fused kernels look at found_inf, which is there for gradient scalers, themselves: nothing waits for the device.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = (~healthy).float()
        optimizer.step()
    elif healthy:
        optimizer.step()


def add_in_order(
    parameters: list[torch.nn.Parameter], loss: torch.Tensor, sums: list | None
) -> list[torch.Tensor]:
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
