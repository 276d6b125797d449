"""Muon: an optimizer for hidden matrices, which moves every direction of a matrix alike."""

from collections import defaultdict

import torch
import torch.distributed as dist
from torch.nn import functional as F


def muon_momentum(step: int, max_steps: int) -> float:
    """Return Muon's momentum: 0.85 to 0.95 over 300 steps, fewer in a shorter run.

    Worth 0.013 nats in 3,200 steps (modded-nanogpt).
    """
    return 0.85 + 0.1 * min(1.0, step / max(1, min(300, max_steps // 10)))


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for hidden matrices and a given AdamW for the rest, in one.

    A matrix moves by about the orthogonal matrix nearest to its Nesterov momentum, times lr, so
    that every direction moves alike. Like torch.optim.Muon, but matrices of one shape are
    multiplied together, each process computes its share of them, and the q, k and v of an attention
    layer are three matrices. Every process keeps all of the momentum: rank 0 alone writes a
    checkpoint, from which any number of processes resumes.
    """

    def __init__(
        self,
        matrices: dict[str, torch.nn.Parameter],
        adam: torch.optim.AdamW,
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": 0.95,
            "fused": adam.defaults["fused"],
        }
        super().__init__([{"params": list(matrices.values())}], defaults)
        self.parts = {p: 3 if "c_attn" in name else 1 for name, p in matrices.items()}
        self.adam = adam
        self.dtype = dtype
        adam.state = self.state  # one state and one list of groups for both
        self.param_groups += adam.param_groups

    @torch.no_grad()
    def step(self):
        """Make one update; none at all where found_inf (see step_if_finite) is 1."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            self.adam.found_inf = found_inf
        self.adam.step()
        by_shape = defaultdict(list)
        for p in self.param_groups[0]["params"]:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            tensors = (p, p.grad, self.state[p]["momentum_buffer"])
            for part in zip(*(t.chunk(self.parts[p]) for t in tensors)):
                by_shape[part[0].shape].append(part)
        for parts in by_shape.values():
            self.update_matrices(parts, found_inf)

    def update_matrices(self, parts: list[tuple], found_inf: torch.Tensor | None):
        """Update the matrices of one shape: (weight, gradient, momentum) each."""
        group = self.param_groups[0]
        lr = group["lr"]
        weights, grads, momenta = map(list, zip(*parts))
        g, m = torch.stack(grads), torch.stack(momenta)  # (n, rows, columns)
        if found_inf is not None:
            # skipped step: lerp(m, m) leaves the momentum bit-identical
            g = torch.where(found_inf > 0, m, g)
            lr = lr * (1 - found_inf)
        m.lerp_(g, 1 - group["momentum"])
        torch._foreach_copy_(momenta, m.unbind())
        update = self.orthogonal(g.lerp(m, group["momentum"]))  # Nesterov
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        # scale tall matrices up: their columns have length 1, so their rows, which make the
        # outputs, are shorter
        rows, columns = weights[0].shape
        scale = max(1, rows / columns) ** 0.5
        torch._foreach_add_(weights, (update * (-lr * scale)).unbind())

    def orthogonal(self, x: torch.Tensor) -> torch.Tensor:
        """Return newton_schulz() of each matrix of x (n, rows, columns), float32.

        The processes share the work; all of them return the same.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return newton_schulz(x.to(self.dtype)).float()
        n, rank, world_size = len(x), dist.get_rank(), dist.get_world_size()
        share = -(-n // world_size)
        part = newton_schulz(x[rank * share : (rank + 1) * share].to(self.dtype))
        # newton_schulz returns a transposed view of a tall matrix; NCCL takes contiguous tensors
        part = F.pad(part, (0, 0, 0, 0, 0, share - len(part))).contiguous()
        everything = part.new_empty(world_size * share, *x.shape[1:])
        dist.all_gather_into_tensor(everything, part)
        return everything[:n].float()


def newton_schulz(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Return about U V^T for each matrix U S V^T of x (n, rows, columns).

    Maps singular values above 0.005 of the Frobenius norm into [0.68, 1.16]; smaller ones stay
    smaller. The polynomial of Jordan et al. 2024: its slope at 0 counts for more than the value
    that it settles at.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if x.dtype == torch.float32 and x.shape[2] >= 2 * x.shape[1]:
        # By Gram matrices alone: 25 n^3 multiplications for n x 4n instead of 45, two thirds of the
        # time on a CPU. Rounding grows by a^2 per step, which float32 has room for (2e-4 of the
        # update) and bfloat16 has not.
        gram = x @ x.mT
        product = None
        for step in range(steps):
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
            factor.diagonal(dim1=1, dim2=2).add_(a)
            product = factor if product is None else factor @ product
            if step < steps - 1:
                gram = factor @ gram @ factor
        x = product @ x
    else:
        for _ in range(steps):
            gram = x @ x.mT
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
            x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
