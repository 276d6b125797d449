"""python -m pytest tests/test_optim.py

The learning-rate schedules at their corners and between them; parameter groups; AdamW against torch's plain one; Muon against
torch's and against a plain loop, on one process and on two; steps that are skipped.
"""

import copy
import dataclasses
import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import optim
from config import preset
from model import GPT, GPTConfig

TINY = dict(block_size=16, vocab_size=97, n_layer=2, n_head=4, n_embd=32)


def test_cosine_at_its_corners():
    lr = lambda step: optim.cosine(
        step, max_lr=6e-4, min_lr=6e-5, warmup_steps=715, max_steps=19073
    )
    assert lr(0) == pytest.approx(6e-4 / 715)  # the first step is not lost to a rate of 0
    assert (
        lr(714) == lr(715) == pytest.approx(6e-4)
    )  # the last step of the warm-up, the first of the cosine
    assert lr(715 + (19073 - 715) // 2) == pytest.approx((6e-4 + 6e-5) / 2)
    assert lr(715 + (19073 - 715) // 3) == pytest.approx(
        6e-5 + 5.4e-4 * (1 + math.cos(math.pi / 3)) / 2, rel=1e-3
    )
    assert lr(19072) == pytest.approx(6e-5, rel=1e-4)
    assert lr(19073) == lr(30000) == pytest.approx(6e-5)
    assert optim.cosine(0, 1e-3, 1e-4, 0, 10) == 1e-3  # no warm-up
    assert optim.cosine(5, 1e-3, 1e-4, 10, 10) == pytest.approx(6e-4)  # nothing but warm-up


def test_linear_at_its_corners():
    lr = lambda step: optim.linear(step, max_lr=1e-3, min_lr=1e-4, warmup_steps=10, max_steps=110)
    assert lr(0) == pytest.approx(1e-4) and lr(9) == lr(10) == 1e-3
    assert lr(60) == pytest.approx(5.5e-4) and lr(85) == pytest.approx(3.25e-4)
    assert lr(110) == lr(999) == pytest.approx(1e-4)


def test_constant_linear_at_its_corners():
    lr = lambda step: optim.constant_linear(
        step, max_lr=0.025, min_lr=0.0, warmup_steps=0, max_steps=1000
    )
    assert lr(0) == lr(299) == lr(300) == 0.025  # the first 30%
    assert lr(301) == pytest.approx(0.025 * 699 / 700) and lr(650) == pytest.approx(0.0125)
    assert lr(999) == pytest.approx(0.025 / 700) and lr(1000) == lr(2000) == 0
    assert optim.constant_linear(4, 1.0, 0.1, 10, 100) == pytest.approx(0.5)  # warm-up
    assert optim.constant_linear(99, 1.0, 0.1, 10, 100, decay=0.1) == pytest.approx(0.1 + 0.9 / 10)


def test_muon_momentum_at_its_corners():
    assert [optim.muon_momentum(step, 3000) for step in (0, 150, 300, 2999)] == pytest.approx(
        [0.85, 0.9, 0.95, 0.95]
    )
    assert [optim.muon_momentum(step, 60) for step in (0, 3, 6, 59)] == pytest.approx(
        [0.85, 0.9, 0.95, 0.95]
    )
    assert [optim.muon_momentum(step, 1) for step in (0, 1)] == pytest.approx([0.85, 0.95])


@pytest.mark.parametrize("schedule", [optim.cosine, optim.linear, optim.constant_linear])
@given(
    max_lr=st.floats(1e-6, 1.0),
    share=st.floats(0, 1),
    warmup=st.integers(0, 50),
    length=st.integers(1, 100),
)
def test_schedules_rise_then_never_rise_again(schedule, max_lr, share, warmup, length):
    lrs = [
        schedule(step, max_lr, share * max_lr, warmup, warmup + length)
        for step in range(warmup + length + 5)
    ]
    assert all(0 <= lr <= max_lr * (1 + 1e-9) for lr in lrs)
    assert all(a < b for a, b in zip(lrs[:warmup], lrs[1:warmup]))
    assert all(a >= b - 1e-12 for a, b in zip(lrs[warmup:], lrs[warmup + 1 :]))
    assert min(lrs[warmup:]) >= share * max_lr * (1 - 1e-9)


@pytest.mark.parametrize("switches", [dict(), dict(use_rope=True, use_swiglu=True)])
def test_each_parameter_is_in_one_group_and_matrices_alone_decay(switches):
    model = GPT(GPTConfig(**TINY, **switches))
    optimizer = optim.adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(model.parameters())
    decayed = {
        p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]
    }
    assert decayed == {
        p for name, p in model.named_parameters() if not name.endswith("bias") and "ln_" not in name
    }
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
    assert all(
        group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 for group in optimizer.param_groups
    )


def test_adamw_equals_its_formula():
    """Ten steps: decoupled weight decay in full (Loshchilov and Hutter 2019, algorithm 2), and torch's plain loop."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY))
    reference = copy.deepcopy(model)
    optimizer = optim.adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    groups = [
        dict(params=[p], weight_decay=0.1 if p.dim() == 2 else 0.0) for p in reference.parameters()
    ]
    plain = torch.optim.AdamW(
        groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False
    )
    formula = {
        name: (p.detach().double(), 0.0, 0.0) for name, p in model.named_parameters()
    }  # weight, two moments
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
        torch.testing.assert_close(
            p, before[name] * (1 - 1e-2 * 0.1) if p.dim() == 2 else before[name]
        )


# --------------------------------------------------------------------------------------------------------------------
# Muon

MODERN = dataclasses.replace(preset("gpt2-modern"), min_lr=0.0)


def modern(dtype=torch.float32) -> tuple[GPT, optim.Muon]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | dict(n_layer=3), arch="modern"))
    return model, optim.build(MODERN, model, dtype)


def give_gradients(model: GPT, seed: int):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g)


def plain_newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """One matrix in float32, as in Jordan's post."""
    y = x.T if len(x) > x.shape[1] else x
    y = y / y.norm()
    for _ in range(5):
        a = y @ y.T
        y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
    return y.T if len(x) > x.shape[1] else y


def separate_matrices(model: GPT) -> list[torch.Tensor]:
    """Copies of the hidden matrices, q, k and v apart."""
    return [
        part
        for name, p in model.h.named_parameters()
        for part in p.detach().clone().chunk(3 if "c_attn" in name else 1)
    ]


def test_muon_equals_torchs_in_bf16_and_a_plain_loop_in_float32():
    """Five steps on random gradients, the rate and the momentum changing. In bf16 the two round in another order: each step's
    update agrees to 1%, while updates of other gradients have nothing in common.
    """
    for dtype in (torch.bfloat16, torch.float32):
        model, optimizer = modern(dtype)
        weights = [torch.nn.Parameter(w) for w in separate_matrices(model)]
        theirs = torch.optim.Muon(weights, lr=0.025, weight_decay=0.05, momentum=0.95)
        momenta = [torch.zeros_like(w) for w in weights]
        for step in range(5):
            before = separate_matrices(model)
            lr, momentum = 0.025 * (1 - step / 10), optim.muon_momentum(step, 50)
            optim.set_rates(optimizer, lr, step, 50)
            theirs.param_groups[0].update(lr=lr, momentum=momentum)
            give_gradients(model, seed=step)
            grads = [
                g
                for name, p in model.h.named_parameters()
                for g in p.grad.chunk(3 if "c_attn" in name else 1)
            ]
            for w, g in zip(weights, grads):
                w.grad = g.clone()
            optimizer.step()
            if dtype == torch.bfloat16:
                theirs.step()
            for w, g, m in zip(weights, grads, momenta):
                if dtype == torch.float32:
                    m.mul_(momentum).add_(g, alpha=1 - momentum)
                    update = plain_newton_schulz(momentum * m + (1 - momentum) * g)
                    w.data = (
                        w.data * (1 - lr * 0.05)
                        - lr * max(1, w.shape[0] / w.shape[1]) ** 0.5 * update
                    )
            for ours, expected, old in zip(separate_matrices(model), weights, before):
                error, moved = (ours - expected).norm(), (ours - old).norm()
                assert (
                    moved > 0.01 and error < (0.03 if dtype == torch.bfloat16 else 2e-5) * moved
                ), (dtype, step, error / moved)


def test_newton_schulz_makes_matrices_nearly_orthogonal():
    for shape in ((3, 32, 32), (2, 128, 32), (2, 32, 128)):
        values = torch.linalg.svdvals(
            optim.newton_schulz(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        )
        assert (
            values.min() > 0.6 and values.max() < 1.3 or shape[1] == shape[2]
        )  # square ones have values near 0, too
        assert values.max() < 1.3 and values.median() > 0.6
    assert optim.newton_schulz(torch.zeros(1, 8, 8)).eq(0).all()


def test_long_matrices_by_gram_matrices_are_the_plain_loop():
    """In float32, to 5e-4 of the update, also where singular values span eight orders of magnitude; tall and wide alike."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    for smallest in (1e-2, 1e-4, 1e-8):
        left, right = torch.linalg.qr(normal(96, 96))[0], torch.linalg.qr(normal(384, 96))[0]
        x = left * torch.logspace(0, math.log10(smallest), 96, dtype=torch.float64) @ right.T
        expected = plain_newton_schulz(x)
        for y, wanted in ((x, expected), (x.T, expected.T)):
            found = optim.newton_schulz(y.float()[None])[0]
            assert (found - wanted).norm() < 5e-4 * wanted.norm()


def test_embedding_and_head_are_adamws_at_rates_of_their_own():
    """Each parameter is in one group; the schedule scales all rates alike; betas (0.8, 0.95), decay 0.001."""
    model, optimizer = modern()
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(model.parameters())
    reference = {
        name: torch.nn.Parameter(p.detach().clone())
        for name, p in model.named_parameters()
        if not name.startswith("h.")
    }
    plain = torch.optim.AdamW(
        [
            dict(params=[reference["wte.weight"]], lr=0.7),
            dict(params=[reference["lm_head.weight"]], lr=0.004),
        ],
        betas=(0.8, 0.95),
        eps=1e-10,
        weight_decay=0.001,
        foreach=False,
    )
    for step, factor in enumerate((1.0, 0.5, 0.25)):
        optim.set_rates(optimizer, 0.025 * factor, step, 100)
        plain.param_groups[0]["lr"], plain.param_groups[1]["lr"] = 0.7 * factor, 0.004 * factor
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [0.025 * factor, 0.7 * factor, 0.004 * factor]
        )
        give_gradients(model, seed=step)
        for name, p in reference.items():
            p.grad = dict(model.named_parameters())[name].grad.clone()
        optimizer.step()
        plain.step()
    for name, p in reference.items():
        torch.testing.assert_close(dict(model.named_parameters())[name], p, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gpt2-modern", "gpt2-rope"])
@pytest.mark.parametrize("when", [0, 2])
def test_a_skipped_step_leaves_no_trace(name, when):
    """Three steps, with one of bad gradients before or among them, end with the bits of three steps alone."""
    found = []
    for skips in (False, True):
        torch.manual_seed(0)
        cfg = dataclasses.replace(preset(name), min_lr=0.0)
        model = GPT(GPTConfig(**TINY, use_rope=cfg.use_rope, arch=cfg.arch))
        optimizer = optim.build(cfg, model, torch.float32)
        for step in range(3):
            if skips and step == when:
                give_gradients(model, seed=9)
                next(model.h.parameters()).grad[0], model.wte.weight.grad[1] = (
                    float("nan"),
                    float("inf"),
                )
                optim.step_if(torch.tensor(False), optimizer)
            give_gradients(model, seed=step)
            optim.step_if(torch.tensor(True), optimizer)
        found.append(
            [
                *model.parameters(),
                *(t for p in model.parameters() for t in optimizer.state[p].values()),
            ]
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def two_steps(rank: int, world: int, meet: str, out: str):
    """What one process does: two steps on gradients that all of them have, then its weights into a file."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    result = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = modern(dtype)
        for step in range(2):
            give_gradients(model, seed=step)
            optimizer.step()
        result |= {f"{dtype} {name}": p.detach() for name, p in model.named_parameters()}
        result |= {
            f"{dtype} {name} {key}": t
            for name, p in model.named_parameters()
            for key, t in optimizer.state[p].items()
        }
    torch.save(result, f"{out}.{rank}")
    if world > 1:
        dist.destroy_process_group()


def test_two_processes_share_the_work_and_end_with_the_same(tmp_path):
    """Weights and state, in both types, are those of one process; three layers, so that their three tall matrices do not divide by two."""
    two_steps(0, 1, "", str(tmp_path / "one"))
    context = multiprocessing.get_context("spawn")
    both = [
        context.Process(
            target=two_steps, args=(rank, 2, f"file://{tmp_path}/meet", str(tmp_path / "two"))
        )
        for rank in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    expected = torch.load(tmp_path / "one.0")
    for rank in range(2):
        for name, t in torch.load(tmp_path / f"two.{rank}").items():
            torch.testing.assert_close(t, expected[name], atol=1e-6, rtol=0, msg=name)
