"""python -m pytest tests/test_optim.py

The learning-rate schedule at its corners and between them; parameter groups; AdamW against torch's plain one.
"""

import copy
import math

import pytest
import torch
from hypothesis import given, strategies as st

import optim
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
