"""python -m pytest tests/test_optim.py

The learning-rate schedules at their corners and between them; parameter groups; AdamW against torch's plain one, Muon against
torch's, on one process and on two.
"""

import copy
import math

import pytest
import torch
from hypothesis import given, strategies as st

import optim
from config import preset
from conftest import ROOT, run
from model import GPT, GPTConfig

TINY = dict(block_size=16, vocab_size=97, n_layer=2, n_head=4, n_embd=32)


def test_cosine_at_its_corners():
    lr = lambda step: optim.cosine(step, max_lr=6e-4, min_lr=6e-5, warmup_steps=715, max_steps=19073)
    assert lr(0) == pytest.approx(6e-4 / 715)  # the first step is not lost to a rate of 0
    assert lr(714) == lr(715) == pytest.approx(6e-4)  # the last step of the warm-up, the first of the cosine
    assert lr(715 + (19073 - 715) // 2) == pytest.approx((6e-4 + 6e-5) / 2)
    assert lr(715 + (19073 - 715) // 3) == pytest.approx(6e-5 + 5.4e-4 * (1 + math.cos(math.pi / 3)) / 2, rel=1e-3)
    assert lr(19072) == pytest.approx(6e-5, rel=1e-4)
    assert lr(19073) == lr(30000) == pytest.approx(6e-5)
    assert optim.cosine(0, 1e-3, 1e-4, 0, 10) == 1e-3  # no warm-up
    assert optim.cosine(5, 1e-3, 1e-4, 10, 10) == pytest.approx(6e-4)  # nothing but warm-up


@given(max_lr=st.floats(1e-6, 1.0), share=st.floats(0, 1), warmup=st.integers(0, 50), length=st.integers(1, 100))
def test_cosine_rises_then_never_rises_again(max_lr, share, warmup, length):
    lrs = [optim.cosine(step, max_lr, share * max_lr, warmup, warmup + length) for step in range(warmup + length + 5)]
    assert all(0 <= lr <= max_lr * (1 + 1e-9) for lr in lrs)
    assert all(a < b for a, b in zip(lrs[:warmup], lrs[1:warmup]))
    assert all(a >= b - 1e-12 for a, b in zip(lrs[warmup:], lrs[warmup + 1:]))
    assert min(lrs[warmup:]) >= share * max_lr * (1 - 1e-9)


@pytest.mark.parametrize("switches", [dict(), dict(use_rope=True, use_swiglu=True)])
def test_each_parameter_is_in_one_group_and_matrices_alone_decay(switches):
    model = GPT(GPTConfig(**TINY, **switches))
    optimizer = optim.adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(model.parameters())
    decayed = {p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {p for name, p in model.named_parameters() if not name.endswith("bias") and "ln_" not in name}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 for group in optimizer.param_groups)


def test_adamw_equals_its_formula():
    """Ten steps: decoupled weight decay in full (Loshchilov and Hutter 2019, algorithm 2), and torch's plain loop."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY))
    reference = copy.deepcopy(model)
    optimizer = optim.adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    groups = [dict(params=[p], weight_decay=0.1 if p.dim() == 2 else 0.0) for p in reference.parameters()]
    plain = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    formula = {name: (p.detach().double(), 0.0, 0.0) for name, p in model.named_parameters()}  # weight, two moments
    for t in range(1, 11):
        lr = 1e-3 * t / 10  # the schedule changes it at every step
        for group in optimizer.param_groups + plain.param_groups:
            group["lr"] = lr
        for (name, p), q in zip(model.named_parameters(), reference.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
            w, m, v = formula[name]
            m, v = 0.9 * m + 0.1 * p.grad.double(), 0.95 * v + 0.05 * p.grad.double() ** 2
            update = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            formula[name] = (w - lr * update - lr * (0.1 if p.dim() == 2 else 0.0) * w, m, v)
        optimizer.step()
        plain.step()
    for (name, p), q in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0, msg=name)
        torch.testing.assert_close(p.double(), formula[name][0], atol=1e-6, rtol=0, msg=name)


def test_decay_alone_shrinks_matrices_and_leaves_vectors():
    model = GPT(GPTConfig(**TINY))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optim.adamw(model, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] * (1 - 1e-2 * 0.1) if p.dim() == 2 else before[name])


# ---- schedules by name ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule", [optim.cosine, optim.linear, optim.constant_linear])
def test_every_schedule_warms_up_reaches_its_peak_and_ends_at_the_minimum(schedule):
    lr = lambda step, warmup=10: schedule(step, 1.0, 0.1, warmup, 110)
    assert [lr(0), lr(9), lr(10)] == pytest.approx([0.1, 1.0, 1.0]) and lr(0, 0) == 1.0
    assert lr(110) == lr(500) == pytest.approx(0.1)
    rates = [lr(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_the_lines_are_straight():
    assert optim.linear(60, 1.0, 0.0, 10, 110) == pytest.approx(0.5)
    lr = lambda step: optim.constant_linear(step, 1.0, 0.0, 0, 100)
    assert lr(29) == lr(30) == 1.0 and lr(65) == pytest.approx(0.5) and lr(93) == pytest.approx(0.1)
    assert [optim.muon_momentum(s, 10_000) for s in (0, 150, 300, 9_000)] == pytest.approx([0.85, 0.9, 0.95, 0.95])


# ---- Muon ----------------------------------------------------------------------------------------------------------

def modern() -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(**TINY, arch="modern"))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    return model


def some_gradients(model: GPT, step: int):
    g = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g)


def muon_steps(model: GPT, dtype: torch.dtype, steps: int = 3, healthy=lambda step: True) -> GPT:
    optimizer = optim.build(preset("gpt2-modern"), model, dtype)
    for step in range(steps):
        some_gradients(model, step)
        optim.set_rates(optimizer, 0.02, 300, 10_000)
        optim.step_if(torch.tensor(healthy(step)), optimizer)
    return model


def torch_muon_steps(model: GPT, steps: int = 3) -> GPT:
    """torch.optim.Muon, which multiplies in bfloat16, on each matrix by itself; q, k and v cut apart."""
    parts = {name: [torch.nn.Parameter(c.clone()) for c in p.detach().chunk(3 if "c_attn" in name else 1)]
             for name, p in model.h.named_parameters()}
    optimizer = torch.optim.Muon([part for some in parts.values() for part in some], lr=0.02, weight_decay=0.05, momentum=0.95)
    for step in range(steps):
        some_gradients(model, step)
        for name, p in model.h.named_parameters():
            for part, grad in zip(parts[name], p.grad.chunk(len(parts[name]))):
                part.grad = grad.clone()
        optimizer.step()
    with torch.no_grad():
        for name, p in model.h.named_parameters():
            p.copy_(torch.cat(parts[name]))
    return model


def test_muon_equals_torchs(monkeypatch):
    """In bfloat16 to its rounding; in float32, with torch's multiplications in float32 as well, to float32's."""
    for dtype, atol in ((torch.bfloat16, 3e-3), (torch.float32, 2e-6)):
        if dtype == torch.float32:
            monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
        ours, theirs = muon_steps(modern(), dtype), torch_muon_steps(modern())
        for (name, a), b, before in zip(ours.h.named_parameters(), theirs.h.parameters(), modern().h.parameters()):
            torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=lambda m: f"{name}: {m}")
            assert (a - before).abs().max() > 3 * atol


def test_an_unhealthy_step_changes_nothing():
    """Not the weights, and not a later step by its momentum; bad numbers in the gradient included."""
    model, before = modern(), modern()
    optimizer = optim.build(preset("gpt2-modern"), model, torch.float32)
    for step, healthy in enumerate((False, True)):
        some_gradients(model, 0)
        if not healthy:
            next(model.h.parameters()).grad[0, 0] = math.nan
        optim.set_rates(optimizer, 0.02, 300, 10_000)
        optim.step_if(torch.tensor(healthy), optimizer)
        if not healthy:
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    expected = muon_steps(modern(), torch.float32, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters()))


def test_muon_on_two_processes_is_muon_on_one(tmp_path):
    """Each orthogonalises its share of the matrices, an odd number of them included; both end with the same weights."""
    (tmp_path / "two.py").write_text(f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch, torch.distributed as dist, test_optim
dist.init_process_group("gloo")
torch.save(test_optim.muon_steps(test_optim.modern(), torch.float32).state_dict(), f"{tmp_path}/{{dist.get_rank()}}.pt")
dist.barrier()
dist.destroy_process_group()
""")
    done = run(tmp_path / "two.py", nproc=2)
    assert done.returncode == 0, done.stderr
    expected = muon_steps(modern(), torch.float32).state_dict()
    zero, one = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, w in expected.items():
        assert torch.equal(zero[name], one[name])
        torch.testing.assert_close(zero[name], w, atol=1e-6, rtol=0)
