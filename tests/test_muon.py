"""The laws of muon.py: equal to torch's Muon and to a plain loop, on one process and on two.

python -m pytest tests/test_muon.py
"""

import math

import pytest
import strict_group
import torch
import torch.distributed as dist
from conftest import FORKSERVER
from test_optim import TINY, give_gradients

import optim
from config import preset
from model import GPT, GPTConfig
from muon import Muon, muon_momentum, newton_schulz


def modern(dtype: torch.dtype = torch.float32) -> tuple[GPT, Muon]:
    """Build a tiny modern model and its optimizer, whose matmuls are in dtype."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | {"n_layer": 3}, arch="modern"))
    return model, optim.build(preset("gpt2-modern"), model, dtype)


def split(name: str, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split q, k and v, which are three matrices to Muon."""
    return t.chunk(3 if "c_attn" in name else 1)


def hidden_matrices(model: GPT) -> list[torch.Tensor]:
    """Return copies of the hidden matrices."""
    named = model.h.named_parameters()
    return [part for name, p in named for part in split(name, p.detach().clone())]


def hidden_gradients(model: GPT) -> list[torch.Tensor]:
    named = model.h.named_parameters()
    return [part for name, p in named for part in split(name, p.grad.clone())]


def plain_newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """Iterate on one matrix, as in Jordan's post."""
    y = x.T if len(x) > x.shape[1] else x
    y = y / y.norm()
    for _ in range(5):
        a = y @ y.T
        y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
    return y.T if len(x) > x.shape[1] else y


class PlainMuon:
    """Muon's formula, one matrix after the other, in float32."""

    def __init__(self, weights: list[torch.nn.Parameter]):
        self.weights = weights
        self.momenta = [torch.zeros_like(w) for w in weights]

    def step(self, lr: float, momentum: float):
        for w, m in zip(self.weights, self.momenta):
            m.mul_(momentum).add_(w.grad, alpha=1 - momentum)
            update = plain_newton_schulz(momentum * m + (1 - momentum) * w.grad)
            scale = max(1, w.shape[0] / w.shape[1]) ** 0.5
            w.data = w.data * (1 - lr * 0.05) - lr * scale * update


class TorchMuon:
    """torch.optim.Muon, whose matmuls are in bf16."""

    def __init__(self, weights: list[torch.nn.Parameter]):
        self.optimizer = torch.optim.Muon(weights, lr=0.025, weight_decay=0.05, momentum=0.95)

    def step(self, lr: float, momentum: float):
        self.optimizer.param_groups[0].update(lr=lr, momentum=momentum)
        self.optimizer.step()


def test_muon_momentum_at_its_corners():
    """0.85 to 0.95 over 300 steps, over a tenth of a shorter run."""
    for max_steps, steps in ((3000, (0, 150, 300, 2999)), (60, (0, 3, 6, 59))):
        momenta = [muon_momentum(step, max_steps) for step in steps]
        assert momenta == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert [muon_momentum(step, 1) for step in (0, 1)] == pytest.approx([0.85, 0.95])


@pytest.mark.parametrize(
    "dtype, reference_class, tolerance",
    [(torch.bfloat16, TorchMuon, 0.03), (torch.float32, PlainMuon, 2e-5)],
    ids=["torch's in bf16", "plain loop in float32"],
)
def test_muon_equals(dtype, reference_class, tolerance):
    """Five steps on random gradients, while rate and momentum change.

    In bf16 the two round in another order: each step's update agrees to 1%, while updates of other
    gradients have nothing in common.
    """
    model, optimizer = modern(dtype)
    weights = [torch.nn.Parameter(w) for w in hidden_matrices(model)]
    reference = reference_class(weights)
    for step in range(5):
        before = hidden_matrices(model)
        lr, momentum = 0.025 * (1 - step / 10), muon_momentum(step, 50)
        optim.set_rates(optimizer, lr, step, 50)
        give_gradients(model, seed=step)
        for w, grad in zip(weights, hidden_gradients(model)):
            w.grad = grad
        optimizer.step()
        reference.step(lr, momentum)
        for actual, expected, old in zip(hidden_matrices(model), weights, before):
            moved = (actual - old).norm()
            assert moved > 0.01
            assert (actual - expected).norm() < tolerance * moved, step


def test_newton_schulz_makes_matrices_nearly_orthogonal():
    """Singular values near 1; random square matrices have some near 0, which stay smaller."""
    for shape in ((3, 32, 32), (2, 128, 32), (2, 32, 128)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        values = torch.linalg.svdvals(newton_schulz(x))
        assert values.max() < 1.3
        assert values.median() > 0.6
        if shape[1] != shape[2]:
            assert values.min() > 0.6
    assert newton_schulz(torch.zeros(1, 8, 8)).eq(0).all()


@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 1e-8])
def test_long_matrices_by_gram_matrices_are_the_plain_loop(smallest):
    """In float32, to 5e-4 of the update, over eight orders of singular values, tall and wide."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(96, 96, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(384, 96, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, math.log10(smallest), 96, dtype=torch.float64)
    wide = left * values @ right.T
    expected = plain_newton_schulz(wide)
    for x, reference in ((wide, expected), (wide.T, expected.T)):
        error = newton_schulz(x.float()[None])[0] - reference
        assert error.norm() < 5e-4 * reference.norm()


def test_embedding_and_head_are_adamws_at_rates_of_their_own():
    """Each parameter is in one group; the schedule scales all rates alike; decay is 0.001."""
    model, optimizer = modern()
    parameters = dict(model.named_parameters())
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(parameters.values())
    reference = {
        name: torch.nn.Parameter(parameters[name].detach().clone())
        for name in ("wte.weight", "lm_head.weight")
    }
    groups = [
        {"params": [reference["wte.weight"]], "lr": 0.7},
        {"params": [reference["lm_head.weight"]], "lr": 0.004},
    ]
    plain = torch.optim.AdamW(
        groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.001, foreach=False
    )
    for step, factor in enumerate((1.0, 0.5, 0.25)):
        optim.set_rates(optimizer, 0.025 * factor, step, 100)
        plain.param_groups[0]["lr"] = 0.7 * factor
        plain.param_groups[1]["lr"] = 0.004 * factor
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.025 * factor, 0.7 * factor, 0.004 * factor])
        give_gradients(model, seed=step)
        for name, p in reference.items():
            p.grad = parameters[name].grad.clone()
        optimizer.step()
        plain.step()
    assert {name for name in parameters if not name.startswith("h.")} == set(reference)
    for name, p in reference.items():
        torch.testing.assert_close(parameters[name], p, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------
# two processes


def two_steps(rank: int, world_size: int, rendezvous: str, path: str):
    """Make two steps on gradients that all processes have; save weights and state (a process)."""
    torch.set_num_threads(1)
    if world_size > 1:
        strict_group.install()
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    tensors = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = modern(dtype)
        for step in range(2):
            give_gradients(model, seed=step)
            optimizer.step()
        for name, p in model.named_parameters():
            tensors[f"{dtype} {name}"] = p.detach()
            for key, t in optimizer.state[p].items():
                tensors[f"{dtype} {name} {key}"] = t
    torch.save(tensors, path)
    if world_size > 1:
        dist.destroy_process_group()


# launch: torch is preloaded in the server that these processes are forked from
@pytest.mark.usefixtures("launch")
def test_two_processes_share_the_work_and_end_with_the_same(tmp_path):
    """Weights and state, in both types, are those of one process.

    Three layers, so that their three tall matrices do not divide by two.
    """
    two_steps(0, 1, "", str(tmp_path / "one"))
    processes = []
    for rank in range(2):
        arguments = (rank, 2, f"file://{tmp_path}/rendezvous", str(tmp_path / f"two.{rank}"))
        processes.append(FORKSERVER.Process(target=two_steps, args=arguments))
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    expected = torch.load(tmp_path / "one")
    for rank in range(2):
        tensors = torch.load(tmp_path / f"two.{rank}")
        assert tensors.keys() == expected.keys()
        for name, t in tensors.items():
            torch.testing.assert_close(t, expected[name], atol=1e-6, rtol=0, msg=name)
