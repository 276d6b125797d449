"""Kernels of our own for a CPU, in C++, compiled for the processor when they are first wanted: attention here, packed.cpp in packed.py."""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch

from config import one_line


@functools.cache
def compiled(source: str) -> ctypes.CDLL | str:
    """The functions of a source file, or why there are none. OpenMP's threads are torch's: the library is loaded already."""
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/kernels.so"
        try:
            subprocess.run(
                [
                    "g++",
                    "-O3",
                    "-march=native",
                    "-fopenmp",
                    "-shared",
                    "-fPIC",
                    Path(__file__).with_name(source),
                    "-o",
                    library,
                ],
                check=True,
                capture_output=True,
                text=True,
            )
            return ctypes.CDLL(library)
        except (OSError, subprocess.CalledProcessError) as e:
            return one_line(e)


# --------------------------------------------------------------------------------------------------------------------
# causal attention (attention.cpp)


def speed_up(model, dtype: torch.dtype) -> bool:
    """What a model that is compiled for a CPU, and multiplies in dtype, gains by: call it before torch.compile.

    tanh by way of the exponential (GELU of 124M, B = 4, T = 1024: 90 ms of a step instead of 205, bfloat16, two AVX512-BF16
    cores), and `attention` in its layers, one of which takes 35 ms forward and backward, by torch's own kernel 138 (in float32
    61 and 190; on two cores with AMX 50 and 133 in bfloat16). False where there is none for them.
    """
    from torch._inductor import config  # takes a second

    if hasattr(config.cpp, "use_decompose_tanh"):
        config.cpp.use_decompose_tanh = True
    D = model.config.n_embd // model.config.n_head
    if D % 32 or not hasattr(
        compiled("attention.cpp"), f"forward_{str(dtype).removeprefix('torch.')}"
    ):
        return False
    for block in model.h:
        block.attn.causal = attention
    return True


def run(name: str, *tensors: torch.Tensor):
    """Call a function of attention.cpp: tensors (B, H, T, D) of one type, whose last stride is 1."""
    described = (ctypes.c_long * (4 * len(tensors)))(
        *(n for x in tensors for n in (x.data_ptr(), *x.stride()[:3]))
    )
    call = getattr(
        compiled("attention.cpp"), f"{name}_{str(tensors[0].dtype).removeprefix('torch.')}"
    )
    call(described, *map(ctypes.c_long, tensors[0].shape))


def like_heads(x: torch.Tensor) -> torch.Tensor:
    """Room for (B, H, T, D) that lies in memory as (B, T, H, D), as the layers before and after have it."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )


def rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """With the D numbers of a token and head side by side."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


# To torch.compile each of the two is one operator: it takes no longer to compile.
@torch.library.custom_op("gpt2::attention", mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What F.scaled_dot_product_attention(q, k, v, is_causal=True) gives, (B, H, T, D) each; D a multiple of 32.

    The same bits each time, on any number of threads. Nothing is kept for the backward pass but q, k and v.
    """
    y = like_heads(q)
    run("forward", *rows(q, k, v), y)
    return y


@torch.library.custom_op("gpt2::attention_backward", mutates_args=())
def attention_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dy: torch.Tensor
) -> list[torch.Tensor]:
    """Gradients of q, k and v from that of the output."""
    gradients = [like_heads(q) for _ in "qkv"]
    run("backward", *rows(q, k, v, dy), *gradients)
    return gradients


attention.register_fake(lambda q, k, v: like_heads(q))
attention_backward.register_fake(lambda q, k, v, dy: [like_heads(q) for _ in "qkv"])
attention.register_autograd(
    lambda ctx, dy: tuple(attention_backward(*ctx.saved_tensors, dy)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
