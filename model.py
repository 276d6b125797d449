"""GPT-2 in plain PyTorch, with RoPE and SwiGLU as switches, and its modern successor as another.

arch "gpt2": the model of "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019) without dropout:
pre-norm blocks, biases, learned positions, tanh-GELU, output head tied to the token embedding.
arch "modern": what the open speed records on GPT-2 (124M) have kept, number for number what transformers'
NanoChatForCausalLM computes: RMSNorm without gains, also after the embedding and, behind RoPE, on queries and keys;
ReLU^2; no biases; matrices that write to the residual stream, and a head of its own, start at zero; capped logits.

Letters in the shape comments:
    B  sequences in a micro-batch     C  n_embd, width of the residual stream     V  vocab_size (rows, padded)
    T  tokens in a sequence           H  n_head, attention heads                  D  C / H, width of a head
    S  slots of a KVCache that attention reads

Depends on torch alone. Data, optimisers and Hugging Face live elsewhere (shards.py, optim.py, hf.py).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTConfig:
    """Everything that decides the shape of the network; stored with each checkpoint, which rebuilds from it."""

    block_size: int = 1024  # longest sequence the model accepts, tokens
    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50,257 ids padded to a multiple of 128 (faster matmuls)
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    use_rope: bool = (
        False  # rotary positions in each attention layer instead of a learned table at the input
    )
    use_swiglu: bool = False  # gated MLP of width 8/3 C instead of the tanh-GELU MLP of width 4 C (same parameters)
    arch: Literal["gpt2", "modern"] = "gpt2"  # modern: all of its parts together, RoPE included

    @property
    def modern(self) -> bool:
        return self.arch == "modern"

    @property
    def rotary(self) -> bool:
        return self.use_rope or self.modern


# --------------------------------------------------------------------------------------------------------------------
# rotary position embedding


def rope_tables(
    positions: torch.Tensor, head_dim: int, base: float = 10000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of RoPE (Su et al. 2021) at positions (..., T), each (..., T, D/2), float32.

    Pair i turns by base**(-2i/D) radians per position. Computed in each forward pass (a few microseconds beside
    milliseconds of matmul, and free once compiled) so that no buffer has to be stored, moved or resized.
    """
    freq = base ** (
        -torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    )  # (D/2,)
    angle = positions.float()[..., None] * freq  # (..., T, D/2)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn x (B, H, T, D) by position: element i pairs with i + D/2 ("rotate half", the GPT-NeoX and Llama layout).

    The turn is computed in float32 and returned in x's own type: bf16 angles lose whole positions beyond T = 256.
    """
    x1, x2 = x.float().chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)


# --------------------------------------------------------------------------------------------------------------------
# what decoding token by token needs


class KVCache:
    """Keys and values of the tokens that B sequences hold so far: all that the next token needs of them.

    Row i holds lengths[i] tokens at positions 0, 1, ...; rows may differ. What lies in later slots is hidden by the mask
    until it is written over, so a prompt may be padded on the right. Shapes never change: decoding compiles once.
    """

    def __init__(self, config: GPTConfig, B: int, size: int, device=None, dtype=None):
        shape = config.n_layer, B, config.n_head, size, config.n_embd // config.n_head
        self.size, self.lengths = size, torch.zeros(B, dtype=torch.int64, device=device)
        self.k, self.v = (
            torch.zeros(shape, device=device, dtype=dtype) for _ in "kv"
        )  # (n_layer, B, H, size, D)

    def update(self, layer: int, S: int, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        """Store k and v (B, H, T, D) of a layer at positions (B, T); its first S slots, (B, H, S, D) each."""
        rows = torch.arange(len(positions), device=k.device)[:, None]
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            store[rows, :, positions] = new.transpose(1, 2)
        return self.k[layer, :, :, :S], self.v[layer, :, :, :S]

    def put(self, rows: list[int], other: "KVCache", source: list[int]):
        """Copy rows of another cache of the same size over rows of this one: n samples share one prefill."""
        self.k[:, rows], self.v[:, rows] = other.k[:, source], other.v[:, source]
        self.lengths[rows] = other.lengths[source]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear, but by torch.mv for a single row on the CPU, where one token is decoded as fast as weights are read."""
    if (
        x.numel() > x.shape[-1]
        or not x.is_cpu
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return F.linear(x, weight, bias)
    y = torch.mv(weight, x.flatten()) if bias is None else torch.addmv(bias, weight, x.flatten())
    return y.view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


# --------------------------------------------------------------------------------------------------------------------
# the parts of a block


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """x / rms(x) over the last axis (Zhang and Sennrich 2019), without gains: the matrix that follows can hold them.

    Computed in float32 and returned in x's own type, as in transformers' NanoChat.
    """
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).type_as(x)


class RMSNorm(nn.Module):
    def forward(self, x):
        return rms_norm(x)


def norm(config: GPTConfig) -> nn.Module:
    return RMSNorm() if config.modern else nn.LayerNorm(config.n_embd)


class Attention(nn.Module):
    """Causal multi-head self-attention; one fused matrix for q, k and v, as published."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.qk_norm = config.n_head, config.modern
        self.causal = partial(
            F.scaled_dot_product_attention, is_causal=True
        )  # for a CPU kernels.py has a faster one
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=not config.modern)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=not config.modern)

    def forward(self, x, rope, mask, kept=None):
        B, T, C = x.shape
        heads = lambda z: z.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        q, k, v = map(heads, self.c_attn(x).split(C, dim=2))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if (
            self.qk_norm
        ):  # Henry et al. 2020: however large the weights become, no score exceeds sqrt(D)
            q, k = rms_norm(q), rms_norm(k)
        if kept is not None:
            k, v = kept(k, v)  # (B, H, S, D)
        y = (
            self.causal(q, k, v)
            if mask is None
            else F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        )  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class GeluMLP(nn.Module):
    """C -> 4C -> C with the tanh form of GELU: GPT-2 was trained with it, and the exact form gives other logits."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """silu(x W_gate) * (x W_fc), then W_proj (Shazeer 2020). Three matrices of width 8/3 C hold what two of 4 C do.

    The width is rounded up to a multiple of 8 for the tensor cores: 768 gives exactly 2,048.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        hidden = 8 * math.ceil(config.n_embd / 3)
        self.c_gate = Linear(config.n_embd, hidden)
        self.c_fc = Linear(config.n_embd, hidden)
        self.c_proj = Linear(hidden, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


class ReluSquaredMLP(nn.Module):
    """C -> 4C -> C with relu(x)^2, the best and cheapest activation of So et al. 2021 (Primer)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = Attention(config)
        self.ln_2 = norm(config)
        self.mlp = (ReluSquaredMLP if config.modern else SwiGLU if config.use_swiglu else GeluMLP)(
            config
        )

    def forward(self, x, rope, mask, kept=None):
        x = x + self.attn(self.ln_1(x), rope, mask, kept)
        return x + self.mlp(self.ln_2(x))


# --------------------------------------------------------------------------------------------------------------------
# the model


class GPT(nn.Module):
    """GPT-2. Parameters start from the global torch generator: call torch.manual_seed first.

    The head has no weight of its own (it reads wte) unless modern, and there are no buffers, so state_dict() holds each
    number once. Raises ValueError when n_embd does not divide into n_head heads (of even width, for RoPE).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head or (config.rotary and config.n_embd // config.n_head % 2):
            raise ValueError(
                f"n_embd {config.n_embd} does not divide into n_head {config.n_head} heads"
                + " of even width" * config.rotary
            )
        self.config = config
        self.recompute = False  # True: keep only each block's input, and compute the rest again in the backward pass
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.rotary:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = norm(config)
        if config.modern:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if (
                name.endswith("bias")
                or config.modern
                and name.endswith(("c_proj.weight", "lm_head.weight"))
            ):
                nn.init.zeros_(p)
            elif config.modern:
                # wte is normalised at once, and 1 suits its learning rate of 0.7; 1/sqrt(3 C), what torch gives a linear
                # layer, is 0.0208 at C = 768, so GPT-2's 0.02, but keeps activations alike at any width
                nn.init.normal_(p, std=1.0 if name == "wte.weight" else (3 * config.n_embd) ** -0.5)
            elif name.endswith("c_proj.weight"):
                # GPT-2 paper, section 2.3: 1/sqrt(N) on the N = 2 n_layer layers that add to the residual stream,
                # so that its variance at the top does not grow with depth
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def trunk(
        self,
        idx: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ):
        """Token ids (B, T) to the normalised residual stream (B, T, C), ready for the head.

        Rows that hold several texts say so: positions (B, T), all below block_size, in place of 0..T-1; mask (B, 1, T, T),
        true where a token (row) may look at another (column), in place of the causal one. With a cache, idx continues
        the tokens in it: they are seen, too, and idx is added. There must be room, and no position beyond block_size.
        """
        T = idx.shape[1]
        if positions is None and self.config.block_size < T:
            raise ValueError(f"sequence of {T} tokens exceeds block_size {self.config.block_size}")
        if cache is not None:
            positions = cache.lengths[:, None] + torch.arange(T, device=idx.device)  # (B, T)
            # on the CPU no more slots than are in use (sixteen rows, half full: attention in half the time); a GPU would
            # have to be waited for, and a compiled step has one shape
            S = (
                int(positions.max()) + 1
                if idx.is_cpu and not torch.compiler.is_compiling()
                else cache.size
            )
            hidden = torch.arange(S, device=idx.device) > positions[..., None]  # (B, T, S)
            # added to the scores: of a mask of bools each layer would make such numbers
            mask = torch.zeros(hidden.shape, device=idx.device, dtype=cache.k.dtype).masked_fill(
                hidden, -torch.inf
            )[:, None]
            cache.lengths += T
        x, rope = self.wte(idx), None  # (B, T, C)
        if self.config.modern:
            x = rms_norm(x)
        if self.config.rotary:
            at = torch.arange(T, device=idx.device) if positions is None else positions[:, None]
            rope = rope_tables(at, self.config.n_embd // self.config.n_head)
        else:
            x = x + (self.wpe.weight[:T] if positions is None else self.wpe(positions))
        for i, block in enumerate(self.h):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(
                    x, rope, mask, None if cache is None else partial(cache.update, i, S, positions)
                )
        return self.ln_f(x)

    @property
    def head_weight(self) -> nn.Parameter:
        """The matrix (V, C) of the head: the embedding's (tied), or modern's own."""
        return self.lm_head.weight if self.config.modern else self.wte.weight

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Residual stream (..., C) to logits (..., V)."""
        return self.cap(linear(x, self.head_weight))

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """modern: 15 tanh(z / 15), float32 (the soft cap of Gemma 2, Riviere et al. 2024).

        By way of the sigmoid: compiled for a CPU, head and loss take 11% less time than with tanh (two AVX2 cores).
        """
        return 30 * torch.sigmoid(logits.float() * (2 / 15)) - 15 if self.config.modern else logits

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, reduction: str = "mean"
    ) -> torch.Tensor:
        """Loss in nats when targets (B, T) are given, otherwise logits (B, T, V).

        Targets of -1 do not count. reduction as in F.cross_entropy; "none" gives (B, T). Never both loss and logits:
        at B = 64, T = 1024 the logits are 6.6 GB in bf16, and returning them keeps the compiler from fusing them away.
        """
        logits = self.head(self.trunk(idx))  # (B, T, V)
        if targets is None:
            return logits
        loss = F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction
        )
        return loss.view_as(targets) if reduction == "none" else loss

    def num_params(self) -> int:
        """All parameters, the tied head once: 124.48M for the default configuration."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> float:
        """Floating-point operations of one training token, forward and backward: 6 N + 12 L C T (PaLM, appendix B).

        N counts the parameters that take part in a matmul: the head does, tied or not, the look-ups in wte and wpe do not.
        """
        N = self.head_weight.numel() + sum(
            p.numel() for b in self.h for p in b.parameters() if p.dim() == 2
        )
        return 6 * N + 12 * self.config.n_layer * self.config.n_embd * T
