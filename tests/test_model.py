"""python -m pytest tests/test_model.py

The laws of model.py: equality with transformers (logits, gradients, training steps), RoPE, SwiGLU, modern, causality,
initial weights, counts. Everything runs in float32 on the CPU, and takes a few seconds.
"""

import dataclasses
import math

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

SHAPE = dict(block_size=16, vocab_size=97, n_layer=3, n_head=4, n_embd=48)
SWITCHES = [
    dict(),
    dict(use_rope=True),
    dict(use_swiglu=True),
    dict(use_rope=True, use_swiglu=True),
    dict(arch="modern"),
]


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Weights far from initial ones, and independent of them. With biases 0, LayerNorm weights 1 and activations near 0
    a bias left out or the wrong GELU would not show.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            mean = 1.0 if p.dim() == 1 and name.endswith("weight") else 0.0
            p.copy_(
                mean + (0.15 if p.dim() == 2 else 0.3) * torch.randn(p.shape, generator=generator)
            )
    return model


def conv1d(name: str) -> bool:
    """Whether transformers keeps this weight transposed (OpenAI's Conv1D): all matrices of the blocks."""
    return name.startswith("h.") and name.endswith(
        ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    )


def twin(model: GPT) -> transformers.GPT2LMHeadModel:
    """transformers' GPT-2 with the same weights and no dropout. Written out here: hf.py is not to be its own judge."""
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
    theirs = transformers.GPT2LMHeadModel(config).train()
    weights = {f"transformer.{k}": w.t() if conv1d(k) else w for k, w in model.state_dict().items()}
    theirs.load_state_dict(weights | {"lm_head.weight": model.wte.weight})
    return theirs


def tokens(B: int, T: int, vocab_size: int = 97, seed: int = 2) -> torch.Tensor:
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------------------
# equality with transformers


def test_logits_and_gradients_equal_transformers():
    ours = lively(GPT(GPTConfig(**SHAPE)))
    theirs = twin(ours)
    ids = tokens(3, 16)
    logits, reference = ours(ids), theirs(ids).logits
    assert reference.std() > 0.5  # the comparison is about something
    torch.testing.assert_close(logits, reference, atol=1e-4, rtol=0)
    loss, reference = (
        ours(ids[:, :-1], ids[:, 1:]),
        theirs(ids, labels=ids).loss,
    )  # transformers shifts by itself
    torch.testing.assert_close(loss, reference, atol=1e-5, rtol=0)
    loss.backward()
    reference.backward()
    expected = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert p.grad.abs().max() > 1e-4, name
        reference = expected[name].t() if conv1d(name) else expected[name]
        torch.testing.assert_close(p.grad, reference, atol=1e-4, rtol=0, msg=name)


def nanochat(model: GPT, gradients: bool = False) -> dict[str, torch.Tensor]:
    """Weights of a modern model, or their gradients, under the names of NanoChatForCausalLM. Its angles have the other sign:
    the halves of each head's queries and keys change places. Written out here, as twin() is.
    """
    H, out = model.config.n_head, {}
    swapped = lambda w: w.view(H, 2, -1, w.shape[1]).flip(1).reshape(w.shape)
    named = {name: p.grad if gradients else p.detach() for name, p in model.named_parameters()}
    for i in range(model.config.n_layer):
        q, k, v = named[f"h.{i}.attn.c_attn.weight"].chunk(3)
        parts = dict(
            q_proj=swapped(q),
            k_proj=swapped(k),
            v_proj=v,
            o_proj=named[f"h.{i}.attn.c_proj.weight"],
        )
        out |= {f"model.layers.{i}.self_attn.{name}.weight": w for name, w in parts.items()}
        out |= {
            f"model.layers.{i}.mlp.fc1.weight": named[f"h.{i}.mlp.c_fc.weight"],
            f"model.layers.{i}.mlp.fc2.weight": named[f"h.{i}.mlp.c_proj.weight"],
        }
    return out | {
        "model.embed_tokens.weight": named["wte.weight"],
        "lm_head.weight": named["lm_head.weight"],
    }


def test_modern_equals_nanochat():
    """Logits, loss and gradients of transformers' NanoChatForCausalLM; logits beyond where the cap bends."""
    ours = lively(GPT(GPTConfig(**SHAPE, arch="modern")))
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
    theirs = transformers.NanoChatForCausalLM(config)
    with torch.no_grad():
        ours.lm_head.weight.mul_(5)
    theirs.load_state_dict(nanochat(ours))
    ids = tokens(3, 16)
    logits, reference = ours(ids), theirs(ids).logits
    assert reference.std() > 2 and reference.abs().max() > 10
    torch.testing.assert_close(logits, reference, atol=1e-4, rtol=0)
    loss, reference = ours(ids[:, :-1], ids[:, 1:]), theirs(ids, labels=ids).loss
    torch.testing.assert_close(loss, reference, atol=1e-5, rtol=0)
    loss.backward()
    reference.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert expected.keys() == (found := nanochat(ours, gradients=True)).keys()
    for name, grad in found.items():
        assert grad.abs().max() > 1e-4, name
        torch.testing.assert_close(grad, expected[name], atol=1e-4, rtol=0, msg=name)


# Losses of ten AdamW steps (learning rate 1e-3, betas 0.9 and 0.95, decay 0.1 on matrices, clip 1.0), written down at
# the first version of model.py: a change that is not meant to change the mathematics must not change them. With one
# thread or two, AVX512, AVX2 or neither, they differ by 1e-6.
GOLDEN = {
    "gpt2": [
        5.420509,
        5.179187,
        4.779373,
        4.714558,
        4.50743,
        4.465339,
        4.285992,
        4.263925,
        4.076852,
        4.063936,
    ],
    "rope": [
        5.313504,
        5.101813,
        4.686407,
        4.712122,
        4.319133,
        4.418594,
        4.053945,
        4.165305,
        3.822676,
        3.905782,
    ],
    "swiglu": [
        4.894007,
        4.965299,
        4.296363,
        4.572083,
        3.968287,
        4.231745,
        3.660979,
        3.892788,
        3.367544,
        3.567519,
    ],
}


def ten_losses(model: torch.nn.Module, loss_of, optimizer: torch.optim.Optimizer) -> list[float]:
    batches, losses = (
        [tokens(4, 17, seed=s) for s in (10, 11)],
        [],
    )  # two batches in turn: the loss comes down
    for step in range(10):
        loss = loss_of(batches[step % 2])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


# The same of 20 steps of gpt2-modern's optimiser (at a fifth of its rates) and schedule.
GOLDEN_MODERN = [
    5.09182,
    5.19277,
    3.70017,
    3.92263,
    2.86856,
    3.03206,
    2.40189,
    2.52102,
    2.10618,
    2.15089,
    1.89398,
    1.89655,
    1.72571,
    1.72893,
    1.60248,
    1.60764,
    1.51268,
    1.52372,
    1.45439,
    1.47629,
]


def test_twenty_steps_of_modern_equal_golden_losses():
    cfg = dataclasses.replace(
        preset("gpt2-modern"), max_lr=0.005, embed_lr=0.14, head_lr=0.0008, max_steps=20
    )
    model = lively(GPT(GPTConfig(**SHAPE | dict(block_size=17), arch="modern")))
    optimizer, losses = optim.build(cfg, model, torch.float32), []
    for step in range(20):
        ids = tokens(4, 17, seed=10 + step % 2)
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optim.set_rates(
            optimizer, optim.constant_linear(step, cfg.max_lr, cfg.min_lr, 0, 20), step, 20
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert losses == pytest.approx(GOLDEN_MODERN, abs=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "rope", "swiglu"])
def test_ten_steps_equal_golden_losses_and_transformers(name):
    switches = dict(
        gpt2=dict(), rope=dict(use_rope=True), swiglu=dict(use_rope=True, use_swiglu=True)
    )[name]
    ours = lively(GPT(GPTConfig(**SHAPE | dict(block_size=17), **switches)))
    theirs = twin(ours) if name == "gpt2" else None  # before the weights change
    losses = ten_losses(
        ours, lambda ids: ours(ids[:, :-1], ids[:, 1:]), optim.adamw(ours, 1e-3, (0.9, 0.95), 0.1)
    )
    assert losses[-1] < losses[0] - 0.5
    assert losses == pytest.approx(GOLDEN[name], abs=1e-4)
    if theirs is not None:
        decay = [p for p in theirs.parameters() if p.dim() >= 2]
        others = [p for p in theirs.parameters() if p.dim() < 2]
        reference = torch.optim.AdamW(
            [dict(params=decay, weight_decay=0.1), dict(params=others, weight_decay=0.0)],
            lr=1e-3,
            betas=(0.9, 0.95),
            eps=1e-8,
        )
        expected = ten_losses(theirs, lambda ids: theirs(ids, labels=ids).loss, reference)
        assert losses == pytest.approx(expected, abs=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# RoPE


def vectors(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rope_scores_depend_on_distance_alone():
    cos, sin = rope_tables(torch.arange(64), 16)
    q, k = (
        v.expand(1, 1, 64, 16) for v in vectors(2, 1, 1, 1, 16)
    )  # one query and one key, at every position
    scores = (rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(2, 3))[0, 0]  # (64, 64)
    for distance in range(-63, 64):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)
    assert scores[0].std() > 0.1  # and they do depend on it


def test_rope_turns_and_turns_back():
    x, (cos, sin) = vectors(2, 3, 32, 16), rope_tables(torch.arange(32), 16)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, :, 0], x[:, :, 0], atol=0, rtol=0)  # position 0 stays
    assert (turned[:, :, 1:] - x[:, :, 1:]).norm(dim=-1).min() > 0.1
    torch.testing.assert_close(rotate(turned, cos, -sin), x, atol=1e-5, rtol=0)
    # pair i turns by 10000**(-2i/D) a position: the first by one radian, the last of 8 by 10000**(-7/8)
    torch.testing.assert_close(
        cos[1], torch.tensor([math.cos(10000 ** (-2 * i / 16)) for i in range(8)])
    )
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_rope_equals_gpt_neox():
    config = transformers.GPTNeoXConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=128
    )
    config.rope_parameters = dict(
        rope_type="default", rope_theta=10000.0, partial_rotary_factor=1.0
    )  # rotary_pct 1
    q, k = vectors(2, 2, 4, 128, 16)  # (B, H, T, D) each
    reference = apply_rotary_pos_emb(
        q, k, *GPTNeoXRotaryEmbedding(config)(q, torch.arange(128)[None])
    )
    cos, sin = rope_tables(torch.arange(128), 16)
    torch.testing.assert_close(rotate(q, cos, sin), reference[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(rotate(k, cos, sin), reference[1], atol=1e-5, rtol=0)


def test_rope_is_the_only_source_of_positions():
    """With the rotation taken away, a RoPE model cannot tell the order of the tokens before the last one."""
    model = lively(GPT(GPTConfig(**SHAPE | dict(n_layer=1), use_rope=True)))
    ids = tokens(1, 12)
    swapped = ids[:, [1, 0, *range(2, 12)]]
    assert (model(ids) - model(swapped))[0, -1].abs().max() > 1e-3
    assert not hasattr(model, "wpe")
    still = torch.ones(12, 6), torch.zeros(12, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.rope_tables", lambda *_: still)
        torch.testing.assert_close(model(ids)[0, -1], model(swapped)[0, -1], atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------------------------
# SwiGLU, causality, loss


def test_swiglu_equals_its_formula():
    mlp, x = lively(SwiGLU(GPTConfig(n_embd=48))), vectors(2, 5, 48)
    gate, value = x @ mlp.c_gate.weight.T + mlp.c_gate.bias, x @ mlp.c_fc.weight.T + mlp.c_fc.bias
    expected = (gate / (1 + torch.exp(-gate)) * value) @ mlp.c_proj.weight.T + mlp.c_proj.bias
    torch.testing.assert_close(mlp(x), expected, atol=1e-4, rtol=0)


def test_swiglu_width_and_size():
    with torch.device("meta"):
        gelu, swiglu = GPT(GPTConfig()), GPT(GPTConfig(use_swiglu=True))
        assert (
            SwiGLU(GPTConfig(n_embd=100)).c_fc.out_features == 272
        )  # 8/3 * 100 = 266.7, up to a multiple of 8
    assert swiglu.h[0].mlp.c_fc.out_features == swiglu.h[0].mlp.c_gate.out_features == 2048
    size = lambda module: sum(p.numel() for p in module.parameters())
    assert size(swiglu.h[0].mlp) == pytest.approx(size(gelu.h[0].mlp), rel=0.01)


@pytest.mark.parametrize("switches", SWITCHES)
def test_no_token_sees_the_future(switches):
    model = lively(GPT(GPTConfig(**SHAPE, **switches)))
    ids = tokens(2, 16)
    logits = model(ids)
    for t in (1, 7, 15):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % 97
        after = model(changed)
        torch.testing.assert_close(after[:, :t], logits[:, :t], atol=1e-5, rtol=0)
        assert (after[:, t:] - logits[:, t:]).abs().amax(
            dim=(0, 2)
        ).min() > 1e-3  # all later ones see it
    torch.testing.assert_close(
        model(ids[:, :9]), logits[:, :9], atol=1e-5, rtol=0
    )  # a shorter sequence is a prefix


def test_loss_reductions_and_targets_that_do_not_count():
    model = lively(GPT(GPTConfig(**SHAPE)))
    x, y = tokens(3, 8), tokens(3, 8, seed=4)
    expected = -F.log_softmax(model(x), dim=-1).gather(2, y[..., None])[..., 0]  # (B, T)
    torch.testing.assert_close(model(x, y, reduction="none"), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(x, y, reduction="sum"), expected.sum(), atol=1e-3, rtol=0)
    torch.testing.assert_close(model(x, y), expected.mean(), atol=1e-5, rtol=0)
    counts = torch.rand(3, 8, generator=torch.Generator().manual_seed(5)) < 0.5
    y = y.masked_fill(~counts, -1)
    assert model(x, y, reduction="none")[~counts].eq(0).all()
    torch.testing.assert_close(
        model(x, y, reduction="none")[counts], expected[counts], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(model(x, y), expected[counts].mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        model(x, y, reduction="sum"), expected[counts].sum(), atol=1e-3, rtol=0
    )


# --------------------------------------------------------------------------------------------------------------------
# initial weights, counts, refusals


@pytest.mark.parametrize("switches", SWITCHES)
def test_initial_weights(switches):
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
        else:  # 8,192 values and more: the standard error of their deviation is below 1%
            std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
            if config.modern:
                std = 1.0 if name == "wte.weight" else 1 / math.sqrt(3 * 128)
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


@pytest.mark.parametrize("switches", SWITCHES)
def test_state_dict_holds_each_number_once(switches):
    model = GPT(GPTConfig(**SHAPE, **switches))
    state = model.state_dict()
    assert state.keys() == dict(model.named_parameters()).keys() and not list(model.buffers())
    assert any("lm_head" in name for name in state) == model.config.modern
    assert sum(w.numel() for w in state.values()) == model.num_params()


def test_parameters_and_flops_of_the_published_sizes():
    with torch.device("meta"):
        model = GPT(GPTConfig())
        assert model.num_params() == 124_475_904
        # 6 N + 12 L C T, N = tied head + 12 C^2 a layer
        assert (
            model.flops_per_token(1024)
            == 6 * (50304 * 768 + 12 * 12 * 768**2) + 12 * 12 * 768 * 1024
            == 854_654_976
        )
        assert GPT(GPTConfig(vocab_size=50257)).num_params() == 124_439_808  # OpenAI's own
        assert (
            GPT(GPTConfig(vocab_size=50257, n_layer=48, n_head=25, n_embd=1600)).num_params()
            == 1_557_611_200
        )
        assert GPT(GPTConfig(use_rope=True)).num_params() == 124_475_904 - 1024 * 768
        modern = GPT(
            GPTConfig(n_head=6, arch="modern")
        )  # no biases, no gains, two matrices of the vocabulary
        assert modern.num_params() == 2 * 50304 * 768 + 12 * 12 * 768**2
        assert modern.flops_per_token(1024) == model.flops_per_token(
            1024
        )  # the look-up is no matmul


def test_refusals():
    with pytest.raises(ValueError, match="n_embd 48 .* n_head 5"):
        GPT(GPTConfig(**SHAPE | dict(n_head=5)))
    with pytest.raises(ValueError, match="n_embd 36 .* n_head 4 heads of even width"):
        GPT(GPTConfig(**SHAPE | dict(n_embd=36), use_rope=True))
    with pytest.raises(ValueError, match="n_head 4 heads of even width"):
        GPT(GPTConfig(**SHAPE | dict(n_embd=36), arch="modern"))
    GPT(GPTConfig(**SHAPE | dict(n_embd=36)))  # heads of odd width are fine without RoPE
    with pytest.raises(ValueError, match="17 tokens .* block_size 16"):
        GPT(GPTConfig(**SHAPE))(tokens(1, 17))


@pytest.mark.parametrize(
    "switches", [dict(), dict(use_rope=True, use_swiglu=True), dict(arch="modern")]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputing_changes_nothing(switches, compiled):
    """Loss and gradients with activations computed twice are those with activations kept."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16, **switches))
    idx, found = torch.randint(64, (2, 17)), []
    for model.recompute in (False, True):
        loss = (torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model)(
            idx[:, :-1], idx[:, 1:]
        )
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    for a, b in zip(*found):
        assert torch.equal(a, b)
