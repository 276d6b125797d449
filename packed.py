"""A model whose weights are bfloat16 or int8, for decoding on a CPU, where a token takes as long as they take to be read.

Everything else is float32: activations, sums, cache, biases and norms. The kernel (packed.cpp) is compiled for the processor
when it is first wanted, in about two seconds. Forty matrices of 3072 x 768, two cores with AVX2: one row takes F.linear 39 ms in
float32, this kernel 14 in bfloat16 and 10.5 in int8; 16 rows take 79 and 32 (notes/LOG.md). `python bench.py generate` measures
what is left of it in a whole step. It has run on AVX2 and AVX-512.
"""

import ctypes

import torch
import torch.nn as nn

from kernels import compiled
from model import GPT


class PackedLinear(nn.Module):
    """y = x W^T + b in float32, W kept as bfloat16, or as int8 with one scale for each row of W."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.N, self.K = weight.shape
        padded = torch.zeros(-(-self.N // 16) * 16, -(-self.K // 4) * 4)  # the kernel's steps
        padded[: self.N, : self.K] = weight
        scale = (
            (padded.abs().amax(1) / 127).clamp(min=1e-12)
            if dtype == torch.int8
            else torch.ones(len(padded))
        )
        padded = (padded / scale[:, None]).round() if dtype == torch.int8 else padded
        blocks = (
            padded.to(dtype).view(-1, 16, padded.shape[1]).transpose(1, 2).contiguous()
        )  # (N/16, K, 16)
        self.register_buffer("weight", blocks)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", torch.zeros(len(padded)))
        if bias is not None:
            self.bias[: self.N] = bias.detach()
        self.run = getattr(compiled("packed.cpp"), f"linear_{str(dtype).removeprefix('torch.')}")
        self.fixed = [ctypes.c_void_p(t.data_ptr()) for t in (self.weight, self.scale, self.bias)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        M, (blocks, K, _) = x.numel() // self.K, self.weight.shape
        columns = (
            nn.functional.pad(x.reshape(M, self.K).float(), (0, K - self.K)).t().contiguous()
        )  # (K, M)
        y = torch.empty(M, 16 * blocks)
        self.run(
            ctypes.c_void_p(columns.data_ptr()),
            *self.fixed,
            ctypes.c_void_p(y.data_ptr()),
            *map(ctypes.c_long, (M, K, 16 * blocks)),
        )
        return y[:, : self.N].view(*x.shape[:-1], self.N)


class PackedGPT(GPT):
    """A float32 model on the CPU with packed weights in all its matmuls. The rest it shares with the given one, the
    embedding's look-up included (float32: a token reads one row of it).
    """

    def __init__(self, model: GPT, dtype: torch.dtype):
        with torch.device("meta"):
            super().__init__(model.config)
        self.load_state_dict(model.state_dict(), assign=True)
        self.out = PackedLinear(self.head_weight.detach(), None, dtype)
        for part in (part for block in self.h for part in (block.attn, block.mlp)):
            for name, layer in part.named_children():
                setattr(part, name, PackedLinear(layer.weight.detach(), layer.bias, dtype))

    def head(self, x: torch.Tensor) -> torch.Tensor:
        return self.cap(self.out(x))
