"""The laws of model.py: equal to transformers, RoPE, SwiGLU, causality, initial weights, counts.

    python -m pytest tests/test_model.py

Everything runs in float32 on the CPU.
"""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXRotaryEmbedding,
    apply_rotary_pos_emb,
)

import optim
from config import preset
from model import GPT, GPTConfig, SwiGLU, rope_tables, rotate

SHAPE = {"block_size": 16, "vocab_size": 97, "n_layer": 3, "n_head": 4, "n_embd": 48}
SWITCHES = [
    {},
    {"use_rope": True},
    {"use_swiglu": True},
    {"use_rope": True, "use_swiglu": True},
    {"arch": "modern"},
]


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Draw weights far from initial ones, and independent of them.

    With biases 0, LayerNorm weights 1 and activations near 0 a bias left out or the wrong GELU
    would not show.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            mean = 1.0 if p.dim() == 1 and name.endswith("weight") else 0.0
            std = 0.15 if p.dim() == 2 else 0.3
            p.copy_(mean + std * torch.randn(p.shape, generator=generator))
    return model


def tiny(**changes) -> GPT:
    """Build a lively model of SHAPE with changes."""
    return lively(GPT(GPTConfig(**SHAPE | changes)))


def tokens(B: int, T: int, vocab_size: int = 97, seed: int = 2) -> torch.Tensor:
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def vectors(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, atol: float, name: str = ""):
    """Assert that tensors agree to an absolute tolerance."""
    torch.testing.assert_close(
        actual, expected, atol=atol, rtol=0, msg=lambda text: f"{name} {text}"
    )


# --------------------------------------------------------------------------------------------------
# equality with transformers


def is_conv1d(name: str) -> bool:
    """Tell whether transformers keeps this weight transposed (OpenAI's Conv1D)."""
    matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return name.startswith("h.") and name.endswith(matrices)


def as_transformers(model: GPT) -> transformers.GPT2LMHeadModel:
    """Build transformers' GPT-2 with the same weights and no dropout.

    Written out here: hf.py is not to be its own judge.
    """
    c = model.config
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.block_size,
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    reference = transformers.GPT2LMHeadModel(config).train()
    weights = {"lm_head.weight": model.wte.weight}
    for name, weight in model.state_dict().items():
        weights[f"transformer.{name}"] = weight.t() if is_conv1d(name) else weight
    reference.load_state_dict(weights)
    return reference


def test_logits_and_gradients_equal_transformers():
    model = tiny()
    reference = as_transformers(model)
    ids = tokens(3, 16)
    expected = reference(ids).logits
    assert expected.std() > 0.5  # the comparison is about something
    assert_near(model(ids), expected, atol=1e-4)
    loss = model(ids[:, :-1], ids[:, 1:])
    expected_loss = reference(ids, labels=ids).loss  # it shifts the labels itself
    assert_near(loss, expected_loss, atol=1e-5)
    loss.backward()
    expected_loss.backward()
    expected_grads = {
        name.removeprefix("transformer."): p.grad for name, p in reference.named_parameters()
    }
    assert expected_grads.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 1e-4, name
        expected = expected_grads[name]
        assert_near(p.grad, expected.t() if is_conv1d(name) else expected, atol=1e-4, name=name)


def swap_halves(weight: torch.Tensor, n_head: int) -> torch.Tensor:
    """Swap the halves of each head's rows: NanoChat's angles have the other sign."""
    return weight.view(n_head, 2, -1, weight.shape[1]).flip(1).reshape(weight.shape)


def as_nanochat(model: GPT, gradients: bool = False) -> dict[str, torch.Tensor]:
    """Return a modern model's weights, or gradients, under the names of NanoChatForCausalLM.

    Written out here, as as_transformers() is.
    """
    H = model.config.n_head
    tensors = {name: p.grad if gradients else p.detach() for name, p in model.named_parameters()}
    named = {
        "model.embed_tokens.weight": tensors["wte.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    for i in range(model.config.n_layer):
        q, k, v = tensors[f"h.{i}.attn.c_attn.weight"].chunk(3)
        layer = f"model.layers.{i}"
        named |= {
            f"{layer}.self_attn.q_proj.weight": swap_halves(q, H),
            f"{layer}.self_attn.k_proj.weight": swap_halves(k, H),
            f"{layer}.self_attn.v_proj.weight": v,
            f"{layer}.self_attn.o_proj.weight": tensors[f"h.{i}.attn.c_proj.weight"],
            f"{layer}.mlp.fc1.weight": tensors[f"h.{i}.mlp.c_fc.weight"],
            f"{layer}.mlp.fc2.weight": tensors[f"h.{i}.mlp.c_proj.weight"],
        }
    return named


def test_modern_equals_nanochat():
    """Logits, loss and gradients; logits beyond where the cap bends."""
    model = tiny(arch="modern")
    config = transformers.NanoChatConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=16,
        pad_token_id=None,
        use_cache=False,
    )
    reference = transformers.NanoChatForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    reference.load_state_dict(as_nanochat(model))
    ids = tokens(3, 16)
    expected = reference(ids).logits
    assert expected.std() > 2
    assert expected.abs().max() > 10
    assert_near(model(ids), expected, atol=1e-4)
    loss = model(ids[:, :-1], ids[:, 1:])
    expected_loss = reference(ids, labels=ids).loss
    assert_near(loss, expected_loss, atol=1e-5)
    loss.backward()
    expected_loss.backward()
    expected_grads = {name: p.grad for name, p in reference.named_parameters()}
    grads = as_nanochat(model, gradients=True)
    assert expected_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert grad.abs().max() > 1e-4, name
        assert_near(grad, expected_grads[name], atol=1e-4, name=name)


# --------------------------------------------------------------------------------------------------
# golden losses
#
# Written down at the first version of model.py: a change that is not meant to change the
# mathematics must not change them. With one thread or two, AVX512, AVX2 or neither, they differ by
# 1e-6.

# fmt: off
# ten steps of AdamW: learning rate 1e-3, betas 0.9 and 0.95, decay 0.1 on matrices, clip 1.0
GOLDEN = {
    "gpt2": [
        5.420509, 5.179187, 4.779373, 4.714558, 4.50743,
        4.465339, 4.285992, 4.263925, 4.076852, 4.063936,
    ],
    "rope": [
        5.313504, 5.101813, 4.686407, 4.712122, 4.319133,
        4.418594, 4.053945, 4.165305, 3.822676, 3.905782,
    ],
    "swiglu": [
        4.894007, 4.965299, 4.296363, 4.572083, 3.968287,
        4.231745, 3.660979, 3.892788, 3.367544, 3.567519,
    ],
}
# twenty steps of gpt2-modern's optimizer, at a fifth of its rates, and schedule
GOLDEN_MODERN = [
    5.09182, 5.19277, 3.70017, 3.92263, 2.86856, 3.03206, 2.40189, 2.52102, 2.10618, 2.15089,
    1.89398, 1.89655, 1.72571, 1.72893, 1.60248, 1.60764, 1.51268, 1.52372, 1.45439, 1.47629,
]
# fmt: on
GOLDEN_SWITCHES = {
    "gpt2": {},
    "rope": {"use_rope": True},
    "swiglu": {"use_rope": True, "use_swiglu": True},
}


def alternating_batch(step: int) -> torch.Tensor:
    """Return one of two batches in turn, so that the loss comes down."""
    return tokens(4, 17, seed=10 + step % 2)


def ten_losses(
    model: torch.nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> list[float]:
    losses = []
    for step in range(10):
        loss = loss_of(alternating_batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def adamw_of_torch(model: torch.nn.Module) -> torch.optim.AdamW:
    """Build torch's AdamW with decay on matrices only, without optim.py."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)


@pytest.mark.parametrize("name", GOLDEN)
def test_ten_steps_equal_golden_losses_and_transformers(name):
    model = tiny(block_size=17, **GOLDEN_SWITCHES[name])
    reference = as_transformers(model) if name == "gpt2" else None  # before the weights change
    optimizer = optim.adamw(model, 1e-3, (0.9, 0.95), 0.1)
    losses = ten_losses(model, lambda ids: model(ids[:, :-1], ids[:, 1:]), optimizer)
    assert losses[-1] < losses[0] - 0.5
    assert losses == pytest.approx(GOLDEN[name], abs=1e-4)
    if reference is not None:
        optimizer = adamw_of_torch(reference)
        expected = ten_losses(reference, lambda ids: reference(ids, labels=ids).loss, optimizer)
        assert losses == pytest.approx(expected, abs=1e-4)


def test_twenty_steps_of_modern_equal_golden_losses():
    rates = {"max_lr": 0.005, "embed_lr": 0.14, "head_lr": 0.0008}
    cfg = dataclasses.replace(preset("gpt2-modern"), max_steps=20, **rates)
    model = tiny(block_size=17, arch="modern")
    optimizer = optim.build(cfg, model, torch.float32)
    losses = []
    for step in range(20):
        ids = alternating_batch(step)
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optim.set_rates(optimizer, optim.learning_rate(cfg, step), step, cfg.max_steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert losses == pytest.approx(GOLDEN_MODERN, abs=1e-3)


# --------------------------------------------------------------------------------------------------
# RoPE


def test_rope_scores_depend_on_distance_alone():
    cos, sin = rope_tables(torch.arange(64), 16)
    # one query and one key, at every position
    q, k = (v.expand(1, 1, 64, 16) for v in vectors(2, 1, 1, 1, 16))
    scores = (rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(2, 3))[0, 0]  # (64, 64)
    for distance in range(-63, 64):
        diagonal = scores.diagonal(distance)
        assert_near(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)
    assert scores[0].std() > 0.1  # and they do depend on it


def test_rope_turns_and_turns_back():
    """Lengths and position 0 stay; pair i turns by 10000**(-2i/D) radians per position.

    That is one radian for the first pair and 10000**(-7/8) for the last of 8.
    """
    x = vectors(2, 3, 32, 16)
    cos, sin = rope_tables(torch.arange(32), 16)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert_near(turned[:, :, 0], x[:, :, 0], atol=0)
    assert (turned[:, :, 1:] - x[:, :, 1:]).norm(dim=-1).min() > 0.1
    assert_near(rotate(turned, cos, -sin), x, atol=1e-5)
    expected = torch.tensor([math.cos(10000 ** (-2 * i / 16)) for i in range(8)])
    torch.testing.assert_close(cos[1], expected)
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_rope_equals_gpt_neox():
    config = transformers.GPTNeoXConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=128
    )
    config.rope_parameters = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    }
    q, k = vectors(2, 2, 4, 128, 16)  # (B, H, T, D) each
    tables = GPTNeoXRotaryEmbedding(config)(q, torch.arange(128)[None])
    expected_q, expected_k = apply_rotary_pos_emb(q, k, *tables)
    cos, sin = rope_tables(torch.arange(128), 16)
    assert_near(rotate(q, cos, sin), expected_q, atol=1e-5)
    assert_near(rotate(k, cos, sin), expected_k, atol=1e-5)


def test_rope_is_the_only_source_of_positions(monkeypatch):
    """Without the rotation, a RoPE model cannot tell the order of the tokens before the last."""
    model = tiny(n_layer=1, use_rope=True)
    ids = tokens(1, 12)
    swapped = ids[:, [1, 0, *range(2, 12)]]
    assert (model(ids) - model(swapped))[0, -1].abs().max() > 1e-3
    assert not hasattr(model, "wpe")
    no_turn = torch.ones(12, 1, 6), torch.zeros(12, 1, 6)
    monkeypatch.setattr("model.rope_tables", lambda *_: no_turn)
    assert_near(model(ids)[0, -1], model(swapped)[0, -1], atol=1e-5)


# --------------------------------------------------------------------------------------------------
# SwiGLU, causality, loss


def test_swiglu_equals_its_formula():
    mlp = lively(SwiGLU(GPTConfig(n_embd=48)))
    x = vectors(2, 5, 48)
    gate = x @ mlp.c_gate.weight.T + mlp.c_gate.bias
    value = x @ mlp.c_fc.weight.T + mlp.c_fc.bias
    hidden = gate / (1 + torch.exp(-gate)) * value
    assert_near(mlp(x), hidden @ mlp.c_proj.weight.T + mlp.c_proj.bias, atol=1e-4)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_swiglu_width_and_size():
    """Width 8/3 C, up to a multiple of 8, so as many parameters as the MLP that it replaces."""
    with torch.device("meta"):
        gelu, swiglu = (GPT(GPTConfig(use_swiglu=switch)).h[0].mlp for switch in (False, True))
        narrow = SwiGLU(GPTConfig(n_embd=100))
    assert narrow.c_fc.out_features == 272  # 8/3 * 100 = 266.7
    assert swiglu.c_fc.out_features == swiglu.c_gate.out_features == 2048
    assert count(swiglu) == pytest.approx(count(gelu), rel=0.01)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_no_token_sees_the_future(switches):
    """Logits before a changed token stay, all others change; a shorter sequence is a prefix."""
    model = tiny(**switches)
    ids = tokens(2, 16)
    logits = model(ids)
    for t in (1, 7, 15):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % 97
        after = model(changed)
        assert_near(after[:, :t], logits[:, :t], atol=1e-5)
        assert (after[:, t:] - logits[:, t:]).abs().amax(dim=(0, 2)).min() > 1e-3
    assert_near(model(ids[:, :9]), logits[:, :9], atol=1e-5)


def test_loss_reductions_and_targets_that_do_not_count():
    """The loss is the mean or the sum of -log p over the targets that are not -1."""
    model = tiny()
    x, y = tokens(3, 8), tokens(3, 8, seed=4)
    logits = model(x)
    nats = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(3, 8)
    log_p = F.log_softmax(logits, dim=-1).gather(2, y[..., None])[..., 0]  # (B, T)
    assert_near(nats, -log_p, atol=1e-5)
    assert_near(model(x, y, reduction="sum"), nats.sum(), atol=1e-3)
    assert_near(model(x, y), nats.mean(), atol=1e-5)
    counts = torch.rand(3, 8, generator=torch.Generator().manual_seed(5)) < 0.5
    assert 0 < counts.sum() < 24
    y = y.masked_fill(~counts, -1)
    assert_near(model(x, y), nats[counts].mean(), atol=1e-5)
    assert_near(model(x, y, reduction="sum"), nats[counts].sum(), atol=1e-3)


# --------------------------------------------------------------------------------------------------
# initial weights, counts, refusals


def expected_std(name: str, config: GPTConfig) -> float:
    """Return the standard deviation of a matrix's initial weights."""
    if config.modern:
        return 1.0 if name == "wte.weight" else 1 / math.sqrt(3 * config.n_embd)
    return 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_initial_weights(switches):
    """As published; the loss is then that of guessing.

    Matrices have 8,192 values and more: the standard error of their deviation is below 1%.
    """
    torch.manual_seed(0)
    config = GPTConfig(block_size=64, vocab_size=512, n_layer=6, n_head=4, n_embd=128, **switches)
    model = GPT(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert p.eq(0).all(), name
        elif ".ln_" in name or name.startswith("ln_"):
            assert p.eq(1).all(), name
        elif config.modern and ("c_proj" in name or "lm_head" in name):
            assert p.eq(0).all(), name
        else:
            std = expected_std(name, config)
            assert p.std().item() == pytest.approx(std, rel=0.04), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name
    x, y = tokens(8, 64, 512), tokens(8, 64, 512, seed=6)
    assert model(x, y).item() == pytest.approx(math.log(512), abs=0.1)


def test_same_seed_same_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in GPT(GPTConfig(**SHAPE)).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_state_dict_holds_each_number_once(switches):
    """The tied head has no entry, and there are no buffers."""
    model = GPT(GPTConfig(**SHAPE, **switches))
    state = model.state_dict()
    assert state.keys() == dict(model.named_parameters()).keys()
    assert not list(model.buffers())
    assert any("lm_head" in name for name in state) == model.config.modern
    assert sum(weight.numel() for weight in state.values()) == model.num_params()


def test_parameters_and_flops_of_the_published_sizes():
    """OpenAI's counts at 50,257 rows; modern has no biases and gains, and an untied head.

    FLOPs are 6 N + 12 L C T with N = head + 12 C^2 per layer, whether the head is tied or not.
    """
    with torch.device("meta"):
        small = GPT(GPTConfig())
        published = GPT(GPTConfig(vocab_size=50257))
        xl = GPT(GPTConfig(vocab_size=50257, n_layer=48, n_head=25, n_embd=1600))
        rope = GPT(GPTConfig(use_rope=True))
        modern = GPT(GPTConfig(n_head=6, arch="modern"))
    assert small.num_params() == 124_475_904
    assert published.num_params() == 124_439_808
    assert xl.num_params() == 1_557_611_200
    assert rope.num_params() == 124_475_904 - 1024 * 768
    assert modern.num_params() == 2 * 50304 * 768 + 12 * 12 * 768**2
    flops = 6 * (50304 * 768 + 12 * 12 * 768**2) + 12 * 12 * 768 * 1024
    assert small.flops_per_token(1024) == modern.flops_per_token(1024) == flops == 854_654_976


def test_refusals():
    """Heads that do not divide or, with RoPE, have an odd width; sequences beyond block_size."""
    with pytest.raises(ValueError, match="n_embd 48 .* n_head 5"):
        GPT(GPTConfig(**SHAPE | {"n_head": 5}))
    with pytest.raises(ValueError, match="n_embd 36 .* n_head 4 heads of even width"):
        GPT(GPTConfig(**SHAPE | {"n_embd": 36}, use_rope=True))
    with pytest.raises(ValueError, match="n_head 4 heads of even width"):
        GPT(GPTConfig(**SHAPE | {"n_embd": 36}, arch="modern"))
    GPT(GPTConfig(**SHAPE | {"n_embd": 36}))
    with pytest.raises(ValueError, match="17 tokens .* block_size 16"):
        GPT(GPTConfig(**SHAPE))(tokens(1, 17))


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize(
    "switches", [{}, {"use_rope": True, "use_swiglu": True}, {"arch": "modern"}], ids=str
)
def test_recomputing_changes_nothing(switches, compiled):
    """Loss and gradients with activations computed twice are those with activations stored."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16, **switches))
    ids = torch.randint(64, (2, 17))
    results = []
    for recompute in (False, True):
        model.recompute = recompute
        forward = model
        if compiled:
            forward = torch.compile(model, fullgraph=True, backend="aot_eager")
        loss = forward(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    for stored, recomputed in zip(*results, strict=True):
        assert torch.equal(stored, recomputed)
