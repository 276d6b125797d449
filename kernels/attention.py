"""Causal attention on a CPU (attention.cpp), as an operator for torch.compile."""

import ctypes

import torch

from kernels.build import KernelError, load_library


def install_cpu_attention(model, dtype: torch.dtype) -> bool:
    """Speed up a model for a CPU: our attention kernel, and tanh computed by exponentials.

    Call it before torch.compile. dtype is the type of the matmuls. Returns False where there is no
    attention kernel for the model. What it saves in a step stands in notes/LOG.md.
    """
    from torch._inductor import config  # takes a second

    if hasattr(config.cpp, "use_decompose_tanh"):
        config.cpp.use_decompose_tanh = True
    head_width = model.config.n_embd // model.config.n_head
    if head_width % 32:
        return False
    try:
        library = load_library("attention.cpp")
    except KernelError:
        return False
    if not hasattr(library, f"forward_{type_name(dtype)}"):
        return False
    for block in model.h:
        block.attn.attend = attention
    return True


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def call(name: str, *tensors: torch.Tensor):
    """Call a function of attention.cpp: tensors (B, H, T, D) of one type, last stride 1."""
    described = []
    for x in tensors:
        described += [x.data_ptr(), *x.stride()[:3]]
    function = getattr(load_library("attention.cpp"), f"{name}_{type_name(tensors[0].dtype)}")
    function((ctypes.c_long * len(described))(*described), *map(ctypes.c_long, tensors[0].shape))


def empty_heads(x: torch.Tensor) -> torch.Tensor:
    """Allocate (B, H, T, D) that lies in memory as (B, T, H, D), as the layers around have it."""
    by_token = x.transpose(1, 2)
    return torch.empty_like(by_token, memory_format=torch.contiguous_format).transpose(1, 2)


def contiguous_rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Make the last axis (D) contiguous."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


# To torch.compile each of the two is one operator: it takes no longer to compile.
@torch.library.custom_op("gpt2::attention", mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute F.scaled_dot_product_attention(q, k, v, is_causal=True), (B, H, T, D) each.

    D must be a multiple of 32. Bit-identical each time, on any number of threads. Nothing is stored
    for the backward pass but q, k and v.
    """
    y = empty_heads(q)
    call("forward", *contiguous_rows(q, k, v), y)
    return y


@torch.library.custom_op("gpt2::attention_backward", mutates_args=())
def attention_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dy: torch.Tensor
) -> list[torch.Tensor]:
    """Compute the gradients of q, k and v from that of the output."""
    gradients = [empty_heads(q) for _ in "qkv"]
    call("backward", *contiguous_rows(q, k, v, dy), *gradients)
    return gradients


@attention.register_fake
def attention_shape(q, k, v):
    return empty_heads(q)


@attention_backward.register_fake
def attention_backward_shape(q, k, v, dy):
    return [empty_heads(q) for _ in "qkv"]


def save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, dy):
    return tuple(attention_backward(*ctx.saved_tensors, dy))


attention.register_autograd(backward, setup_context=save_inputs)
