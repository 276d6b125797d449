"""python -m pytest tests/test_generate.py : sampling, from the function to the command line."""

import pytest
import torch

import checkpoint
import generate
import optim
from config import UserError
from conftest import run
from model import GPT, GPTConfig
from tokenizer import EOT, N_VOCAB


@pytest.fixture(scope="module", params=[False, True], ids=["learned", "rope"])
def model(request):
    torch.manual_seed(0)
    m = GPT(GPTConfig(block_size=16, vocab_size=50304, n_layer=2, n_head=2, n_embd=32, use_rope=request.param))
    with torch.no_grad():
        m.wte.weight.mul_(20)  # far from uniform, so that a wrong position or id shows
    return m


def test_greedy_equals_the_definition_within_and_beyond_the_context(model):
    """Each token is the argmax after the newest block_size tokens, over the ids that exist."""
    ids = torch.randint(N_VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))
    out = generate.sample(model, ids, 25, 0, 0, None)
    for t in range(5, 30):
        with torch.no_grad():
            expected = model(out[:, max(0, t - 16): t])[:, -1, :N_VOCAB].argmax(-1)
        assert torch.equal(out[:, t], expected)


def test_ids_that_pad_the_vocabulary_are_never_drawn(model):
    with torch.no_grad():
        saved = model.wte.weight[N_VOCAB:].clone()
        model.wte.weight[N_VOCAB:] = 1e3 * model.wte.weight[0]
        out = generate.sample(model, torch.zeros(4, 1, dtype=torch.int64), 20, 1.0, 0, torch.Generator().manual_seed(0))
        model.wte.weight[N_VOCAB:] = saved
    assert out.max() < N_VOCAB


def test_samples_follow_the_distribution(model):
    """2,000 draws of one token with top_k 5: frequencies within 5 standard errors of the renormalised probabilities."""
    ids = torch.zeros(2_000, 1, dtype=torch.int64)
    drawn = generate.sample(model, ids, 1, 2.0, 5, torch.Generator().manual_seed(3))[:, 1]
    with torch.no_grad():
        top = (model(ids[:1])[0, -1, :N_VOCAB] / 2.0).topk(5)
    p = top.values.softmax(-1)
    frequency = (drawn[:, None] == top.indices).double().mean(0)
    assert frequency.sum() == 1 and (abs(frequency - p) < 5 * (p * (1 - p) / 2_000).sqrt() + 1e-9).all()


def test_texts_are_a_function_of_the_seed_and_end_at_end_of_text(model, monkeypatch):
    a, b, c = (generate.sample_texts(model, "Hello", 2, 8, seed=s) for s in (1, 1, 2))
    assert a == b != c and all(t.startswith("Hello") for t in a)
    monkeypatch.setattr(generate, "sample", lambda m, idx, *_: torch.cat([idx, torch.tensor([[64, EOT, 65]])], 1))
    assert generate.sample_texts(model, "Hello", 1, 3) == ["Helloa"]


def test_command_line(model, tmp_path):
    path = checkpoint.save(tmp_path / "log" / "r" / "ckpt", 3, model, optim.adamw(model, 1e-3, (0.9, 0.95), 0.1), {})
    for where in (tmp_path / "log" / "r", path, path.parent):
        done = run("generate.py", "--model", where, "--prompt", "Hello", "--max_new_tokens", "3", "--device", "cpu")
        assert done.returncode == 0 and "Hello" in done.stdout, done.stderr
    for args, words in ((["--model", tmp_path / "nowhere"], "nowhere"), (["--temperature", "-1", "--n", "0"], "temperature is -1.0"),
                        (["--model", tmp_path], "no checkpoint in")):
        done = run("generate.py", *args)
        assert done.returncode == 2 and words in done.stderr and "hint:" in done.stderr and "Traceback" not in done.stderr


def test_newest_run(tmp_path, model):
    with pytest.raises(UserError, match="hint"):
        generate.newest_run(str(tmp_path))
