"""The laws of optim.py: learning rates, AdamW, skipped steps, sums of gradients.

python -m pytest tests/test_optim.py
"""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import optim
from config import TrainConfig, preset
from model import GPT, GPTConfig

TINY = {"block_size": 16, "vocab_size": 97, "n_layer": 2, "n_head": 4, "n_embd": 32}


def give_gradients(model: GPT, seed: int):
    """Set random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def set_rate(optimizer: torch.optim.Optimizer, lr: float):
    for group in optimizer.param_groups:
        group["lr"] = lr


# --------------------------------------------------------------------------------------------------
# learning rates


def rates(schedule: str, *, warmup_steps: int, max_steps: int, max_lr: float, min_lr: float):
    """Return the learning rates of a schedule, five steps beyond its end."""
    cfg = preset(
        "gpt2-baseline",
        schedule=schedule,
        warmup_steps=warmup_steps,
        max_steps=max_steps,
        max_lr=max_lr,
        min_lr=min_lr,
    )
    return [optim.learning_rate(cfg, step) for step in range(max_steps + 5)]


def test_cosine_at_its_corners():
    """Those of gpt2-baseline; the warm-up's last step and the cosine's first have one rate."""
    cfg = preset("gpt2-baseline", min_lr=6e-5)
    lr = [optim.learning_rate(cfg, step) for step in range(30001)]
    assert lr[0] == pytest.approx(6e-4 / 715)  # the first step is not lost to a rate of 0
    assert lr[714] == lr[715] == pytest.approx(6e-4)
    assert lr[715 + (19073 - 715) // 2] == pytest.approx((6e-4 + 6e-5) / 2)
    third = 6e-5 + 5.4e-4 * (1 + math.cos(math.pi / 3)) / 2
    assert lr[715 + (19073 - 715) // 3] == pytest.approx(third, rel=1e-3)
    assert lr[19072] == pytest.approx(6e-5, rel=1e-4)
    assert lr[19073] == lr[30000] == pytest.approx(6e-5)


def test_cosine_without_warm_up_and_with_nothing_else():
    lr = rates("cosine", warmup_steps=0, max_steps=10, max_lr=1e-3, min_lr=1e-4)
    assert lr[0] == 1e-3
    lr = rates("cosine", warmup_steps=10, max_steps=10, max_lr=1e-3, min_lr=1e-4)
    assert lr[5] == pytest.approx(6e-4)


def test_constant_linear_at_its_corners():
    """gpt2-modern's: constant for the first 30%, then a straight line to 0."""
    lr = rates("constant_linear", warmup_steps=0, max_steps=1000, max_lr=0.025, min_lr=0.0)
    assert lr[0] == lr[299] == lr[300] == 0.025
    assert lr[301] == pytest.approx(0.025 * 699 / 700)
    assert lr[650] == pytest.approx(0.0125)
    assert lr[999] == pytest.approx(0.025 / 700)
    assert lr[1000] == lr[1004] == 0
    lr = rates("constant_linear", warmup_steps=10, max_steps=100, max_lr=1.0, min_lr=0.1)
    assert lr[4] == pytest.approx(0.5)  # warm-up
    last = optim.constant_linear(99, 1.0, 0.1, 100, decay=0.1)
    assert last == pytest.approx(0.1 + 0.9 / 10)


def test_every_preset_names_its_schedule():
    """At the end of the warm-up every preset is at max_lr, at max_steps at min_lr."""
    for name, schedule in (("gpt2-rope", "cosine"), ("gpt2-modern", "constant_linear")):
        cfg = preset(name)
        assert cfg.schedule == schedule
        assert optim.learning_rate(cfg, cfg.warmup_steps) == cfg.max_lr
        assert optim.learning_rate(cfg, cfg.max_steps) == cfg.min_lr


@pytest.mark.parametrize("schedule", ["cosine", "constant_linear"])
@given(
    max_lr=st.floats(1e-6, 1.0),
    share=st.floats(0, 1),
    warmup=st.integers(0, 50),
    length=st.integers(1, 100),
)
def test_schedules_rise_then_never_rise_again(schedule, max_lr, share, warmup, length):
    """They rise during the warm-up; after it they fall or stay, between max_lr and min_lr."""
    min_lr = share * max_lr
    lr = rates(
        schedule,
        warmup_steps=warmup,
        max_steps=warmup + length,
        max_lr=max_lr,
        min_lr=min_lr,
    )
    assert all(0 <= rate <= max_lr * (1 + 1e-9) for rate in lr)
    assert all(a < b for a, b in zip(lr[:warmup], lr[1:warmup]))
    assert all(a >= b - 1e-12 for a, b in zip(lr[warmup:], lr[warmup + 1 :]))
    assert min(lr[warmup:]) >= min_lr * (1 - 1e-9)


# --------------------------------------------------------------------------------------------------
# AdamW


@pytest.mark.parametrize("switches", [{}, {"use_rope": True, "use_swiglu": True}], ids=str)
def test_each_parameter_is_in_one_group_and_matrices_alone_decay(switches):
    model = GPT(GPTConfig(**TINY, **switches))
    optimizer = optim.adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    groups = optimizer.param_groups
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())
    decayed = {p for group in groups if group["weight_decay"] for p in group["params"]}
    vectors = {p for name, p in model.named_parameters() if name.endswith("bias") or "ln_" in name}
    assert decayed == set(model.parameters()) - vectors
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
    assert all(group["betas"] == (0.9, 0.95) for group in groups)
    assert all(group["eps"] == 1e-8 for group in groups)


def decay_of(p: torch.Tensor) -> float:
    """Return the decay of a parameter: of matrices only."""
    return 0.1 if p.dim() == 2 else 0.0


def plain_adamw(model: GPT) -> torch.optim.AdamW:
    """Build torch's plain loop, one group per parameter."""
    groups = [{"params": [p], "weight_decay": decay_of(p)} for p in model.parameters()]
    return torch.optim.AdamW(
        groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False
    )


def test_adamw_equals_its_formula():
    """Ten steps: decoupled decay in full (Loshchilov and Hutter 2019), and torch's loop.

    The formula is computed in float64.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY))
    reference = copy.deepcopy(model)
    optimizer = optim.adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    plain = plain_adamw(reference)
    parameters = dict(model.named_parameters())
    # weight and the two moments, in float64
    formula = {name: (p.detach().double(), 0.0, 0.0) for name, p in parameters.items()}
    for t in range(1, 11):
        lr = 1e-3 * t / 10  # the schedule changes it at every step
        set_rate(optimizer, lr)
        set_rate(plain, lr)
        give_gradients(model, seed=t)
        give_gradients(reference, seed=t)
        for name, p in parameters.items():
            w, m, v = formula[name]
            m = 0.9 * m + 0.1 * p.grad.double()
            v = 0.95 * v + 0.05 * p.grad.double() ** 2
            update = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            formula[name] = (w - lr * update - lr * decay_of(p) * w, m, v)
        optimizer.step()
        plain.step()
    for (name, p), q in zip(parameters.items(), reference.parameters()):
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
        torch.testing.assert_close(p, before[name] * (1 - 1e-2 * decay_of(p)))


# --------------------------------------------------------------------------------------------------
# skipped steps


def weights_and_moments(model: GPT, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [t for p in model.parameters() for t in optimizer.state[p].values()]
    return [p.detach() for p in model.parameters()] + moments


def build(cfg: TrainConfig) -> tuple[GPT, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY, use_rope=cfg.use_rope, arch=cfg.arch))
    return model, optim.build(cfg, model, torch.float32)


def three_steps(model: GPT, optimizer: torch.optim.Optimizer, bad_before: int | None):
    """Make three updates, and before one of them a skipped one of NaN and infinite gradients."""
    for step in range(3):
        if step == bad_before:
            give_gradients(model, seed=9)
            next(model.h.parameters()).grad[0] = math.nan
            model.wte.weight.grad[1] = math.inf
            optim.step_if_finite(torch.tensor(False), optimizer)
        give_gradients(model, seed=step)
        optim.step_if_finite(torch.tensor(True), optimizer)


@pytest.mark.parametrize("name", ["gpt2-modern", "gpt2-rope"])
@pytest.mark.parametrize("bad_before", [0, 2])
def test_a_skipped_step_leaves_no_trace(name, bad_before):
    """Weights and moments are bit-identical to those of the three steps alone."""
    results = []
    for skips in (None, bad_before):
        model, optimizer = build(preset(name))
        three_steps(model, optimizer, skips)
        results.append(weights_and_moments(model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_step_is_skipped_without_fused_kernels(monkeypatch):
    """On devices without them step_if_finite decides on the host."""
    monkeypatch.setattr(optim, "has_fused_kernels", lambda model: False)
    results = []
    for skips in (None, 1):
        model, optimizer = build(preset("gpt2-rope"))
        assert not optimizer.defaults["fused"]
        three_steps(model, optimizer, skips)
        results.append(weights_and_moments(model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --------------------------------------------------------------------------------------------------
# gradients


def micro_batches(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return list(torch.randint(97, (n, 2, 17), generator=generator))


def loss_of(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    return model(ids[:, :-1], ids[:, 1:])


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_micro_steps_add_up_to_the_global_batch(in_order, clip):
    """Mean loss, gradient and its norm before clipping are those of one large batch.

    Twice, so that nothing of a step is left for the next one.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY))
    reference = copy.deepcopy(model)
    expected_loss = loss_of(reference, torch.cat(micro_batches(3)))
    expected_loss.backward()
    expected_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip or math.inf)
    gradients = optim.Gradients(model, ddp=None, micro_steps=3, in_order=in_order)
    for _ in range(2):
        for ids in micro_batches(3):
            gradients.sync(last=False)
            gradients.add(loss_of(model, ids))
        loss, norm = gradients.finish(clip)
        torch.testing.assert_close(loss, expected_loss.detach())
        torch.testing.assert_close(norm, expected_norm)
        assert norm > 0.1  # clipping has something to do
        for p, q in zip(model.parameters(), reference.parameters()):
            torch.testing.assert_close(p.grad, q.grad)
        model.zero_grad(set_to_none=True)
