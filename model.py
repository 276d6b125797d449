"""GPT-2 in plain PyTorch, with RoPE and SwiGLU as switches, and its modern successor as another.

arch "gpt2": the model of "Language Models are Unsupervised Multitask Learners" (Radford et al.
2019) without dropout: pre-norm blocks, biases, learned positions, tanh-GELU, head tied to the token
embedding.

arch "modern": the changes that the modded-nanogpt records kept. It computes the same numbers as
transformers' NanoChatForCausalLM: RMSNorm without gains, also after the embedding and, behind RoPE,
on queries and keys; ReLU^2; no biases; output projections and untied head start at zero; logits
soft-capped.

Letters in the shape comments:
    B  sequences in a micro-batch     C  n_embd, width of the residual stream
    T  tokens in a sequence           H  n_head, attention heads
    V  vocab_size (rows, padded)      D  C / H, width of a head
    S  slots of a KVCache that attention reads

Depends on torch alone.
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
    """Everything that decides the shape of the network; checkpoints store it."""

    block_size: int = 1024  # longest sequence the model accepts, tokens
    # rows of the embedding: GPT-2's 50,257 ids padded to a multiple of 128 (faster matmuls)
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    # rotary positions in each attention layer instead of a learned table at the input
    use_rope: bool = False
    # gated MLP of width 8/3 C instead of the tanh-GELU MLP of width 4 C (same parameters)
    use_swiglu: bool = False
    arch: Literal["gpt2", "modern"] = "gpt2"  # modern: all of its parts together, RoPE included

    @property
    def modern(self) -> bool:
        return self.arch == "modern"

    @property
    def rotary(self) -> bool:
        return self.use_rope or self.modern


# --------------------------------------------------------------------------------------------------
# rotary position embedding


def rope_tables(
    positions: torch.Tensor, head_dim: int, base: float = 10000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of RoPE (Su et al. 2021) at positions (...), each (..., D/2).

    Pair i turns by base**(-2i/D) radians per position; float32. Made once in each forward pass,
    within microseconds, so that no buffer has to be stored, moved or resized.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    freq = base ** (-exponents / head_dim)  # (D/2,)
    angle = positions.float()[..., None] * freq  # (..., D/2)
    return angle.cos(), angle.sin()


# One operator to torch.compile, which would compute pow, cos and sin again in every layer
rope_operator = torch.library.custom_op("gpt2::rope_tables", rope_tables, mutates_args=())
rope_operator.register_fake(rope_tables)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn x (..., D) by position: element i pairs with i + D/2, as in GPT-NeoX and Llama.

    The tables are broadcast to (..., D/2). Computed in float32 and returned in x's own type: bf16
    angles lose whole positions beyond T = 256.
    """
    x1, x2 = x.float().chunk(2, dim=-1)  # (..., D/2) each
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)


# --------------------------------------------------------------------------------------------------
# what decoding token by token needs


class KVCache:
    """Keys and values of the tokens decoded so far, for B sequences.

    Row i holds lengths[i] tokens at positions 0, 1, ...; rows may differ. Slots beyond lengths[i]
    are masked until they are overwritten, so prompts may be right-padded. Shapes are fixed: a
    compiled decoder compiles once.
    """

    def __init__(self, config: GPTConfig, B: int, size: int, device=None, dtype=None):
        shape = config.n_layer, B, config.n_head, size, config.n_embd // config.n_head
        self.size = size
        self.lengths = torch.zeros(B, dtype=torch.int64, device=device)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # (n_layer, B, H, size, D)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def update(self, layer: int, S: int, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        """Write a layer's k and v (B, H, T, D) at positions (B, T); return its first S slots."""
        rows = torch.arange(len(positions), device=k.device)[:, None]
        self.k[layer][rows, :, positions] = k.transpose(1, 2)
        self.v[layer][rows, :, positions] = v.transpose(1, 2)
        return self.k[layer, :, :, :S], self.v[layer, :, :, :S]

    def put(self, rows: list[int], other: "KVCache", source: list[int]):
        """Copy rows of another cache of the same size: n samples share one prefill."""
        self.k[:, rows] = other.k[:, source]
        self.v[:, rows] = other.v[:, source]
        self.lengths[rows] = other.lengths[source]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute F.linear; for a single row on the CPU by torch.mv, which is faster there.

    Decoding one token is bound by reading the weights.
    """
    single_row = x.numel() == x.shape[-1]
    plain_cpu = x.is_cpu and not torch.is_autocast_enabled("cpu")
    if not single_row or not plain_cpu or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if bias is None:
        y = torch.mv(weight, x.flatten())
    else:
        y = torch.addmv(bias, weight, x.flatten())
    return y.view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


# --------------------------------------------------------------------------------------------------
# the parts of a block


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """Return x / rms(x) over the last axis (Zhang and Sennrich 2019).

    There is no learned gain, which the next matrix can absorb. Computed in float32 and returned in
    x's own type, as in transformers' NanoChat.
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
        self.n_head = config.n_head
        self.qk_norm = config.modern
        # kernels/attention.py replaces it on a CPU
        self.attend = partial(F.scaled_dot_product_attention, is_causal=True)
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=not config.modern)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=not config.modern)

    def forward(self, x, rope, mask, update_cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q, k, v = (x.view(B, T, self.n_head, -1) for x in (q, k, v))  # (B, T, H, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if self.qk_norm:
            # Henry et al. 2020: however large the weights become, no score exceeds sqrt(D)
            q, k = rms_norm(q), rms_norm(k)
        # after RoPE: before it, this transpose costs copies of q, k and their gradients on a GPU
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        if update_cache is not None:
            k, v = update_cache(k, v)  # (B, H, S, D)
        if mask is None:
            y = self.attend(q, k, v)  # (B, H, T, D)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class GeluMLP(nn.Module):
    """C -> 4C -> C with the tanh form of GELU, not the exact one: GPT-2 was trained with it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """silu(x W_gate) * (x W_fc), then W_proj (Shazeer 2020).

    Three matrices of width 8/3 C have as many parameters as two of width 4 C. The width is rounded
    up to a multiple of 8 for the tensor cores: 768 gives exactly 2,048.
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


def mlp(config: GPTConfig) -> nn.Module:
    if config.modern:
        return ReluSquaredMLP(config)
    if config.use_swiglu:
        return SwiGLU(config)
    return GeluMLP(config)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = Attention(config)
        self.ln_2 = norm(config)
        self.mlp = mlp(config)

    def forward(self, x, rope, mask, update_cache=None):
        x = x + self.attn(self.ln_1(x), rope, mask, update_cache)
        return x + self.mlp(self.ln_2(x))


# --------------------------------------------------------------------------------------------------
# the model


class GPT(nn.Module):
    """GPT-2. Parameters are drawn from the global torch generator: call torch.manual_seed first.

    The head has no weight of its own (it reads wte) unless modern, and there are no buffers, so
    state_dict() holds each number once. Raises ValueError when n_embd does not divide into n_head
    heads (of even width, for RoPE).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        divisor = config.n_head
        heads = f"n_head {config.n_head} heads"
        if config.rotary:
            divisor *= 2
            heads += " of even width"
        if config.n_embd % divisor:
            raise ValueError(f"n_embd {config.n_embd} does not divide into {heads}")
        self.config = config
        # activation checkpointing: keep each block's input, recompute the rest in the backward pass
        self.recompute = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.rotary:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = norm(config)
        if config.modern:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            self.initialise(name, parameter)

    def initialise(self, name: str, parameter: nn.Parameter):
        config = self.config
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() < 2:
            pass  # gains of LayerNorm: 1
        elif config.modern and name.endswith(("c_proj.weight", "lm_head.weight")):
            nn.init.zeros_(parameter)
        elif config.modern and name == "wte.weight":
            # normalised at once; 1 suits its learning rate of 0.7
            nn.init.normal_(parameter, std=1.0)
        elif config.modern:
            # 1/sqrt(3 C), what torch gives a linear layer: 0.0208 at C = 768, so GPT-2's 0.02, but
            # activations stay alike at any width
            nn.init.normal_(parameter, std=(3 * config.n_embd) ** -0.5)
        elif name.endswith("c_proj.weight"):
            # GPT-2 paper, section 2.3: 1/sqrt(N) on the N = 2 n_layer layers that add to the
            # residual stream, so that its variance at the top does not grow with depth
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
        else:
            nn.init.normal_(parameter, std=0.02)

    def trunk(
        self,
        idx: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Turn token ids (B, T) into the normalised residual stream (B, T, C), ready for the head.

        For rows that hold several texts give positions (B, T) instead of 0..T-1, and mask (B, 1, T,
        T), true where a query (row) may attend to a key (column), instead of the causal mask. With
        a cache, idx continues the cached tokens and is appended to it; positions must stay below
        block_size.
        """
        T = idx.shape[1]
        if positions is None and self.config.block_size < T:
            raise ValueError(f"sequence of {T} tokens exceeds block_size {self.config.block_size}")
        if cache is not None:
            positions = cache.lengths[:, None] + torch.arange(T, device=idx.device)  # (B, T)
            mask = self.cache_mask(cache, positions)  # (B, 1, T, S)
            cache.lengths += T
        x, rope = self.embed(idx, positions)  # (B, T, C)
        for i, block in enumerate(self.h):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            elif cache is not None:
                x = block(x, rope, mask, partial(cache.update, i, mask.shape[-1], positions))
            else:
                x = block(x, rope, mask)
        return self.ln_f(x)

    def embed(self, idx: torch.Tensor, positions: torch.Tensor | None):
        """Return the input of the first block (B, T, C), and the tables of RoPE, or None."""
        T = idx.shape[1]
        x = self.wte(idx)
        if self.config.modern:
            x = rms_norm(x)
        if self.config.rotary:
            tables = rope_operator if torch.compiler.is_compiling() else rope_tables
            if positions is None:
                positions = torch.arange(T, device=idx.device)  # (T,)
            # (T, 1, D/2) or (B, T, 1, D/2): the same for all heads
            return x, tables(positions[..., None], self.config.n_embd // self.config.n_head)
        if positions is None:
            return x + self.wpe.weight[:T], None
        return x + self.wpe(positions), None

    def cache_mask(self, cache: KVCache, positions: torch.Tensor) -> torch.Tensor:
        """Return what is added to the scores, (B, 1, T, S): -inf for slots after a token."""
        S = cache.size
        if positions.is_cpu and not torch.compiler.is_compiling():
            # CPU: attend only to the slots in use (half the time with 16 half-full rows). A GPU
            # would have to sync to know them, and a compiled step has one shape.
            S = int(positions.max()) + 1
        slots = torch.arange(S, device=positions.device)
        hidden = slots > positions[..., None]  # (B, T, S)
        # a float mask, made once: SDPA would convert a boolean one in every layer
        zeros = torch.zeros(hidden.shape, device=positions.device, dtype=cache.k.dtype)
        return zeros.masked_fill(hidden, -torch.inf)[:, None]

    @property
    def head_weight(self) -> nn.Parameter:
        """The matrix (V, C) of the head: the embedding's (tied), or modern's own."""
        return self.lm_head.weight if self.config.modern else self.wte.weight

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Turn the residual stream (..., C) into logits (..., V)."""
        return self.cap(linear(x, self.head_weight))

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """Soft-cap modern's logits: 15 tanh(z / 15), float32 (Gemma 2, Riviere et al. 2024).

        Written with a sigmoid, 15 tanh(z / 15) = 30 sigmoid(2 z / 15) - 15: 11% faster for head and
        loss when compiled for a CPU (two AVX2 cores).
        """
        if not self.config.modern:
            return logits
        return 30 * torch.sigmoid(logits.float() * (2 / 15)) - 15

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, reduction: str = "mean"
    ) -> torch.Tensor:
        """Return the loss in nats when targets (B, T) are given, otherwise logits (B, T, V).

        Targets of -1 do not count; reduction is "mean" or "sum". Never both loss and logits: at B =
        64, T = 1024 the logits are 6.6 GB in bf16, and returning them keeps the compiler from
        fusing them away.
        """
        logits = self.head(self.trunk(idx))  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction
        )

    def num_params(self) -> int:
        """Count all parameters, the tied head once: 124.48M for the default configuration."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> float:
        """Count the floating-point operations of one training token, forward and backward.

        6 N + 12 L C T (PaLM, appendix B). N counts the parameters that take part in a matmul: the
        head does, tied or not, the look-ups in wte and wpe do not.
        """
        matrices = [p for block in self.h for p in block.parameters() if p.dim() == 2]
        N = self.head_weight.numel() + sum(p.numel() for p in matrices)
        return 6 * N + 12 * self.config.n_layer * self.config.n_embd * T
