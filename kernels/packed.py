"""A model with bfloat16 or int8 weights: decoding on a CPU is bound by reading the weights.

Everything else is float32: activations, sums, cache, biases and norms. The kernel is packed.cpp.
`python -m bench generate` measures what it saves; notes/LOG.md has figures. Run on AVX2 and
AVX-512.
"""

import ctypes

import torch
import torch.nn as nn

from kernels.build import load_library


class PackedLinear(nn.Module):
    """y = x W^T + b in float32, W stored as bfloat16, or as int8 with one scale per row of W."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.N, self.K = weight.shape
        # the kernel takes 16 rows and 4 columns at a time
        padded = torch.zeros(-(-self.N // 16) * 16, -(-self.K // 4) * 4)
        padded[: self.N, : self.K] = weight
        scale = torch.ones(len(padded))
        if dtype == torch.int8:
            scale = (padded.abs().amax(1) / 127).clamp(min=1e-12)
            padded = (padded / scale[:, None]).round()
        blocks = padded.to(dtype).view(-1, 16, padded.shape[1]).transpose(1, 2)  # (N/16, K, 16)
        self.register_buffer("weight", blocks.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", torch.zeros(len(padded)))
        if bias is not None:
            self.bias[: self.N] = bias.detach()
        name = str(dtype).removeprefix("torch.")
        self.kernel = getattr(load_library("packed.cpp"), f"linear_{name}")
        buffers = (self.weight, self.scale, self.bias)
        self.pointers = [ctypes.c_void_p(t.data_ptr()) for t in buffers]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        M = x.numel() // self.K
        blocks, K, _ = self.weight.shape
        rows = nn.functional.pad(x.reshape(M, self.K).float(), (0, K - self.K))
        columns = rows.t().contiguous()  # (K, M)
        y = torch.empty(M, 16 * blocks)
        self.kernel(
            ctypes.c_void_p(columns.data_ptr()),
            *self.pointers,
            ctypes.c_void_p(y.data_ptr()),
            *map(ctypes.c_long, (M, K, 16 * blocks)),
        )
        return y[:, : self.N].view(*x.shape[:-1], self.N)


def pack(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a float32 GPT on the CPU with packed weights in all its matmuls.

    It shares the rest with the given model, the embedding's look-up included (float32: a token
    reads one row of it). Raises KernelError where packed.cpp cannot be compiled.
    """
    with torch.device("meta"):
        packed = type(model)(model.config)
    packed.load_state_dict(model.state_dict(), assign=True)
    for block in packed.h:
        for part in (block.attn, block.mlp):
            for name, layer in part.named_children():
                setattr(part, name, PackedLinear(layer.weight.detach(), layer.bias, dtype))
    head_matmul = PackedLinear(packed.head_weight.detach(), None, dtype)

    def head(x: torch.Tensor) -> torch.Tensor:
        return packed.cap(head_matmul(x))

    packed.head = head
    return packed
