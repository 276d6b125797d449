"""Test the laws of kernels/attention.py.

Attention and its gradients are torch's, to rounding, on every processor, and bit-identical on any
number of threads; training with the kernel is training without it.
"""

import copy
import ctypes
import functools
import platform

import pytest
import torch
from torch.nn import functional as F

import optim
from config import preset
from kernels import attention as kernel
from kernels import build
from kernels.attention import attention, install_cpu_attention
from model import GPT, GPTConfig
from runtime.device import autocast

CPU = torch.device("cpu")

# as on processors without AMX, without AVX-512
FLAGS = [()]
if platform.machine() == "x86_64":
    FLAGS += [("-mno-amx-bf16",), ("-mno-avx512f",)]


def compiles() -> bool:
    try:
        build.load_library("attention.cpp")
    except build.KernelError:
        return False
    return True


pytestmark = pytest.mark.skipif(not compiles(), reason="no g++: torch's own attention runs")


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return ((x - exact).norm() / exact.norm()).item()


def dtypes() -> list[torch.dtype]:
    """List the types that the kernel in use has."""
    library = kernel.load_library("attention.cpp")
    both = (torch.float32, torch.bfloat16)
    return [dtype for dtype in both if hasattr(library, f"forward_{kernel.type_name(dtype)}")]


def heads(B: int, T: int, H: int, D: int, n: int = 3) -> list[torch.Tensor]:
    """Make n tensors (B, H, T, D), in memory as one matmul for all of them leaves them."""
    x = torch.randn(B, T, n * H * D, generator=torch.Generator().manual_seed(T))
    return [z.view(B, T, H, D).transpose(1, 2) for z in x.split(H * D, dim=2)]


def results(function, inputs, dtype) -> list[torch.Tensor]:
    """Return the output, and the gradients of q, k and v."""
    q, k, v = (x.to(dtype).detach().requires_grad_() for x in inputs[:3])
    y = function(q, k, v)
    gradients = torch.autograd.grad(y, (q, k, v), inputs[3].to(dtype))
    return [x.detach().double() for x in (y, *gradients)]


@functools.cache
def compiled_with(flags: tuple[str, ...]) -> ctypes.CDLL:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(build, "FLAGS", (*build.FLAGS, *flags))
        return build.load_library.__wrapped__("attention.cpp")


@pytest.fixture(params=FLAGS, ids=lambda flags: " ".join(flags) or "native")
def processor(request, monkeypatch):
    """Put attention.cpp, compiled with other flags, in the place of the one in use."""
    if request.param:
        monkeypatch.setattr(kernel, "load_library", lambda source: compiled_with(request.param))


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 32), (2, 31, 3, 64), (1, 33, 2, 128), (2, 300, 2, 64), (1, 1024, 2, 32)],
    ids=str,
)
def test_attention_equals_torch(processor, shape):
    """As near to float64 as torch's own, or 2e-6 in float32, where the order of sums differs."""
    inputs = [x.bfloat16() for x in heads(*shape, n=4)]
    exact = results(sdpa, inputs, torch.float64)
    for dtype in dtypes():
        ours = results(attention, inputs, dtype)
        torchs = results(sdpa, inputs, dtype)
        for x, from_torch, y in zip(ours, torchs, exact):
            both_zero = y.norm() == 0 == x.norm()
            assert both_zero or error(x, y) < max(1.2 * error(from_torch, y), 2e-6)


def test_large_scores_and_nan(processor):
    """Scores too large for a plain exponential; a NaN reaches all tokens that see it."""
    q, k, v = heads(1, 70, 1, 32)
    for dtype in dtypes():
        big = [x.to(dtype) for x in (30 * q, 30 * k, v)]
        exact = sdpa(*(x.double() for x in big))
        tolerance = 1e-5 if dtype == torch.float32 else 0.01
        assert error(attention(*big).double(), exact) < tolerance
        for which in range(3):
            broken = [x.to(dtype, copy=True) for x in (q, k, v)]
            broken[which][0, 0, 40] = torch.nan
            is_nan = attention(*broken)[0, 0].isnan()  # (T, D)
            last = 41 if which == 0 else None  # a query's NaN stays in its row
            assert is_nan[40:last].all()


def test_bit_identical_on_any_number_of_threads():
    inputs = heads(2, 100, 3, 64, n=4)
    threads = torch.get_num_threads()
    runs = []
    try:
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            runs.append([x for dtype in dtypes() for x in results(attention, inputs, dtype)])
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


def test_attention_is_an_operator():
    """Shapes, strides and gradients are what torch.compile is told, for inputs in any layout."""
    for q, k, v in (
        heads(2, 50, 3, 32),
        [torch.randn(2, 3, 50, 32) for _ in "qkv"],
        [torch.randn(2, 3, 32, 50).mT for _ in "qkv"],
    ):
        inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
        torch.library.opcheck(attention, inputs)
        assert torch.allclose(attention(q, k, v), sdpa(q, k, v), atol=1e-5)


@pytest.mark.parametrize("switches", [{}, {"use_rope": True}, {"arch": "modern"}], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_twenty_steps_as_without(switches, recompute):
    """Twenty steps of training have the losses of torch's own attention, to 1e-5."""
    torch.manual_seed(5)
    plain = GPT(GPTConfig(block_size=48, vocab_size=97, n_layer=2, n_head=2, n_embd=64, **switches))
    quick = copy.deepcopy(plain)
    quick.recompute = recompute
    assert install_cpu_attention(quick, torch.float32)
    ids = torch.randint(97, (2, 49), generator=torch.Generator().manual_seed(6))
    losses = []
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


@pytest.fixture
def kernel_calls(monkeypatch) -> list[tuple[str, torch.dtype]]:
    """Record the calls of attention.cpp: name and type."""
    calls = []
    call = kernel.call

    def recorded(name, *tensors):
        calls.append((name, tensors[0].dtype))
        call(name, *tensors)

    monkeypatch.setattr(kernel, "call", recorded)
    return calls


def test_under_autocast_and_compiled(kernel_calls):
    """Each layer calls the kernel of autocast's type once per pass, compiled or not."""
    # a function compiles eight times per process, and other tests compile the same one
    torch._dynamo.reset()
    torch.manual_seed(5)
    model = GPT(GPTConfig(block_size=48, vocab_size=97, n_layer=2, n_head=2, n_embd=64))
    ids = torch.randint(97, (2, 49))
    for dtype in dtypes():
        assert install_cpu_attention(model, dtype)
        exact = model(ids[:, :-1], ids[:, 1:]).item()
        kernel_calls.clear()
        losses = []
        for compiled in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
            with autocast(CPU, dtype):
                loss = compiled(ids[:, :-1], ids[:, 1:])
            loss.backward()
            losses.append(loss.item())
        assert kernel_calls == 2 * (2 * [("forward", dtype)] + 2 * [("backward", dtype)])
        tolerance = 1e-5 if dtype == torch.float32 else 0.01
        assert losses == pytest.approx([exact, exact], abs=tolerance)


def test_without_a_kernel_torchs_attention_stays(monkeypatch):
    """Heads of other widths, other types, no compiler."""
    config = {"block_size": 16, "vocab_size": 97, "n_layer": 1, "n_head": 2}
    assert not install_cpu_attention(GPT(GPTConfig(**config, n_embd=96)), torch.float32)
    assert not install_cpu_attention(GPT(GPTConfig(**config, n_embd=64)), torch.float64)

    def no_compiler(source):
        raise build.KernelError("FileNotFoundError: g++")

    monkeypatch.setattr(kernel, "load_library", no_compiler)
    model = GPT(GPTConfig(**config, n_embd=64))
    assert not install_cpu_attention(model, torch.float32)
    assert model(torch.zeros(1, 16, dtype=torch.int64)).isfinite().all()
