"""python -m pytest tests/test_kernels.py

The laws of kernels.py: attention and its gradients are those of torch, to rounding, on whatever processor; the same bits on any
number of threads; training through it is training without it.
"""

import copy
import platform
import subprocess

import pytest
import torch
from torch.nn import functional as F

import kernels
import optim
from config import preset
from model import GPT, GPTConfig

FLAGS = (
    [(), ("-mno-amx-bf16",), ("-mno-avx512f",)] if platform.machine() == "x86_64" else [()]
)  # as on processors without AMX, AVX-512
sdpa = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
error = lambda x, exact: ((x - exact).norm() / exact.norm()).item()
pytestmark = pytest.mark.skipif(
    isinstance(kernels.compiled("attention.cpp"), str), reason="no g++: torch's own attention runs"
)


def types() -> list[torch.dtype]:
    return [
        t
        for t in (torch.float32, torch.bfloat16)
        if hasattr(kernels.compiled("attention.cpp"), f"forward_{t}".replace("torch.", ""))
    ]


def heads(B: int, T: int, H: int, D: int, n: int = 3) -> list[torch.Tensor]:
    """(B, H, T, D) each, as a layer's one matrix for all of them leaves them in memory."""
    x = torch.randn(B, T, n * H * D, generator=torch.Generator().manual_seed(T))
    return [z.view(B, T, H, D).transpose(1, 2) for z in x.split(H * D, dim=2)]


def results(function, inputs, dtype) -> list[torch.Tensor]:
    """Output, and gradients of q, k and v."""
    q, k, v = (x.to(dtype).detach().requires_grad_() for x in inputs[:3])
    y = function(q, k, v)
    return [
        y.detach().double(),
        *(g.double() for g in torch.autograd.grad(y, (q, k, v), inputs[3].to(dtype))),
    ]


@pytest.fixture(params=FLAGS, ids=lambda flags: " ".join(flags) or "native")
def processor(request, monkeypatch):
    """attention.cpp compiled with other flags in the place of the one in use."""
    if request.param:
        run = subprocess.run
        monkeypatch.setattr(
            subprocess, "run", lambda command, **kw: run([*command, *request.param], **kw)
        )
        library = kernels.compiled.__wrapped__("attention.cpp")
        monkeypatch.setattr(kernels, "compiled", lambda source: library)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 32), (2, 31, 3, 64), (1, 33, 2, 128), (2, 300, 2, 64), (1, 1024, 2, 32)],
    ids=str,
)
def test_attention_equals_torch(processor, shape):
    """As near to float64 as torch's own is, or nearly: 2e-6 of the length in float32, where sums are taken in another order."""
    inputs = [x.bfloat16() for x in heads(*shape, n=4)]
    exact = results(sdpa, inputs, torch.float64)
    for dtype in types():
        for ours, theirs, y in zip(
            results(kernels.attention, inputs, dtype), results(sdpa, inputs, dtype), exact
        ):
            assert (
                error(ours, y) < max(1.2 * error(theirs, y), 2e-6) or y.norm() == 0 == ours.norm()
            )


def test_large_scores_and_numbers_that_are_none(processor):
    """Sums that would overflow without the largest score taken away; a token's NaN reaches all that see it."""
    q, k, v = heads(1, 70, 1, 32)
    for dtype in types():
        big = [x.to(dtype) for x in (30 * q, 30 * k, v)]
        assert error(kernels.attention(*big).double(), sdpa(*(x.double() for x in big))) < (
            1e-5 if dtype == torch.float32 else 0.01
        )
        for which in range(3):
            broken = [x.to(dtype, copy=True) for x in (q, k, v)]
            broken[which][0, 0, 40] = torch.nan
            found = kernels.attention(*broken)[0, 0].isnan()  # (T, D)
            assert found[40 : 41 if which == 0 else None].all()


def test_same_bits_on_any_number_of_threads():
    inputs = heads(2, 100, 3, 64, n=4)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            found.append([results(kernels.attention, inputs, dtype) for dtype in types()])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for x, y in zip(found[0], other) for a, b in zip(x, y))


def test_attention_is_an_operator():
    """Shapes, strides and gradients as torch.compile is told they are, for inputs in any layout."""
    for q, k, v in (
        heads(2, 50, 3, 32),
        [torch.randn(2, 3, 50, 32) for _ in "qkv"],
        [torch.randn(2, 3, 32, 50).mT for _ in "qkv"],
    ):
        torch.library.opcheck(
            kernels.attention, tuple(x.detach().requires_grad_() for x in (q, k, v))
        )
        assert torch.allclose(kernels.attention(q, k, v), sdpa(q, k, v), atol=1e-5)


@pytest.mark.parametrize("switches", [dict(), dict(use_rope=True), dict(arch="modern")], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_twenty_steps_as_without(switches, recompute):
    torch.manual_seed(5)
    plain = GPT(GPTConfig(block_size=48, vocab_size=97, n_layer=2, n_head=2, n_embd=64, **switches))
    quick = copy.deepcopy(plain)
    quick.recompute = recompute
    assert kernels.speed_up(quick, torch.float32)
    ids, losses = torch.randint(97, (2, 49), generator=torch.Generator().manual_seed(6)), []
    for model in (plain, quick):
        optimizer = optim.build(preset("gpt2-baseline"), model, torch.float32)
        losses.append([])
        for _ in range(20):
            loss = model(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.01


def test_under_autocast_and_compiled(monkeypatch):
    torch._dynamo.reset()  # one function compiles eight times in a process, and other tests compile it, too
    torch.manual_seed(5)
    model = GPT(GPTConfig(block_size=48, vocab_size=97, n_layer=2, n_head=2, n_embd=64))
    ids = torch.randint(97, (2, 49))
    for dtype in types():
        assert kernels.speed_up(model, dtype)
        exact, losses, calls, run = model(ids[:, :-1], ids[:, 1:]), [], [], kernels.run
        monkeypatch.setattr(
            kernels, "run", lambda name, *x: calls.append((name, x[0].dtype)) or run(name, *x)
        )
        for compiled in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                loss = compiled(ids[:, :-1], ids[:, 1:])
            loss.backward()
            losses.append(loss.item())
        monkeypatch.setattr(kernels, "run", run)
        assert calls == 2 * (2 * [("forward", dtype)] + 2 * [("backward", dtype)])
        assert losses == pytest.approx(
            [exact.item()] * 2, abs=1e-5 if dtype == torch.float32 else 0.01
        )


def test_where_there_is_none_for_them(monkeypatch):
    """Heads of other widths, other types, no compiler: torch's own stays."""
    config = dict(block_size=16, vocab_size=97, n_layer=1, n_head=2)
    assert not kernels.speed_up(GPT(GPTConfig(**config, n_embd=96)), torch.float32)
    assert not kernels.speed_up(GPT(GPTConfig(**config, n_embd=64)), torch.float64)
    monkeypatch.setattr(kernels, "compiled", lambda source: "FileNotFoundError: g++")
    model = GPT(GPTConfig(**config, n_embd=64))
    assert (
        not kernels.speed_up(model, torch.float32)
        and model(torch.zeros(1, 16, dtype=torch.int64)).isfinite().all()
    )
