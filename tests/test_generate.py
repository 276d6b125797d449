"""python -m pytest tests/test_generate.py : decoding with a cache against recomputing all, sampling, text, command line."""

import dataclasses
import json
import os
import pty
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import generate
import kernels
import optim
import packed
from config import UserError, command_line
from generate import Sampling, Text
from model import GPT, GPTConfig, KVCache
from tokenizer import EOT, N_VOCAB, gpt2

GREEDY, BLOCK = Sampling(temperature=0), 16


def make_model(**switches) -> GPT:
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(block_size=BLOCK, vocab_size=50304, n_layer=2, n_head=2, n_embd=32, **switches)
    )
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)  # far from uniform, so that a wrong position or id shows
    return model


@pytest.fixture(
    scope="module",
    params=[{}, dict(use_rope=True), dict(use_rope=True, use_swiglu=True), dict(arch="modern")],
    ids=["learned", "rope", "swiglu", "modern"],
)
def model(request):
    return make_model(**request.param)


def prompts(*lengths) -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(N_VOCAB, (length,), generator=g).tolist() for length in lengths]


@torch.no_grad()
def naive(model: GPT, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The oracle: everything recomputed for each token. A context that is full is cropped to its last half."""
    start, ids = 0, list(prompt)
    for _ in range(max_new_tokens):
        if len(ids) - start > BLOCK:
            start = len(ids) - BLOCK // 2
        ids.append(model(torch.tensor([ids[start:]]))[0, -1, :N_VOCAB].argmax().item())
    return ids[len(prompt) :]


def decoded(model, texts, n=1, max_new_tokens=40, how=GREEDY, **more) -> list[list[int]]:
    return [
        list(row) for row in zip(*generate.tokens(model, texts, n, max_new_tokens, how, **more))
    ]


# --------------------------------------------------------------------------------------------------------------------
# the cache


def test_greedy_tokens_equal_the_oracle_within_and_beyond_the_context(model):
    """Prompts of all lengths in one batch, so that rows fill their context at different times and more than once."""
    texts = prompts(1, 5, 5, BLOCK // 2, BLOCK - 1, BLOCK)
    rows = decoded(model, texts)
    for text, row in zip(texts, rows):
        assert row == naive(model, text, 40)
    assert min(len(set(row)) for row in rows) >= 5  # no row that only repeats itself


@torch.no_grad()
def test_logits_do_not_depend_on_how_the_tokens_come(model):
    """All at once, one by one, in two parts; rows of different lengths behind padding: the same to rounding."""
    a, b = torch.tensor(prompts(12, 12))
    expected = model(torch.stack((a, b)))
    for parts in ([12], [1] * 12, [5, 7]):
        cache, out = KVCache(model.config, 2, 14), []
        for part in torch.stack((a, b)).split(parts, dim=1):
            out.append(model.head(model.trunk(part, cache=cache)))
        torch.testing.assert_close(torch.cat(out, 1), expected, atol=1e-4, rtol=0)
        assert cache.lengths.tolist() == [12, 12]
    cache, logits = generate.prefill(model, [a[:3].tolist(), b[:9].tolist()], 14)
    torch.testing.assert_close(
        logits, torch.stack((expected[0, 2], expected[1, 8]))[:, :N_VOCAB], atol=1e-4, rtol=0
    )
    logits = generate.decode(
        model, torch.stack((a[3:4], b[9:10])), cache, torch.zeros(2, dtype=torch.int64)
    )
    torch.testing.assert_close(
        logits, torch.stack((expected[0, 3], expected[1, 9]))[:, :N_VOCAB], atol=1e-4, rtol=0
    )


def test_decoding_has_one_shape(model):
    """Rows of different lengths, beyond the context: a compiled step is built once."""
    shapes = set()

    def step(model, idx, cache, last):
        shapes.add((idx.shape, cache.k.shape, last.shape))
        return generate.decode(model, idx, cache, last)

    rows = decoded(model, prompts(3, 9), n=2, decode=step)
    assert shapes == {((4, 1), (2, 4, 2, BLOCK, 16), (4,))}
    torch._dynamo.reset()
    compiled = torch.compile(generate.decode, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert decoded(model, prompts(3, 9), n=2, decode=compiled) == rows


def test_autocast_as_in_training(model):
    """The cache has autocast's type, and the text is that of the same model without a cache under autocast."""
    text = prompts(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate.prefill(model, text, 8)[0].k.dtype == torch.bfloat16
        assert decoded(model, text, max_new_tokens=5)[0] == naive(model, text[0], 5)


# --------------------------------------------------------------------------------------------------------------------
# drawing


def test_a_sample_depends_neither_on_n_nor_on_its_neighbours(model):
    a, b, c = prompts(4, 11, 2)
    how = Sampling(top_p=0.95)
    together = decoded(model, [a, b, c], 3, how=how)
    assert len(set(map(tuple, together))) == 9
    for i, text in enumerate((a, b, c)):
        assert decoded(model, [text], 3, how=how) == together[3 * i : 3 * i + 3]
        assert decoded(model, [text], 2, how=how) == together[3 * i : 3 * i + 2]
    assert decoded(model, [a], 1, max_new_tokens=7, how=how)[0] == together[0][:7]
    assert decoded(model, [a], 3, how=dataclasses.replace(how, seed=1)) != together[:3]


@pytest.mark.parametrize(
    "how, kept",
    [
        (Sampling(2.0, 0), 8),
        (Sampling(2.0, 5), 5),
        (Sampling(2.0, 0, 0.8), 4),
        (Sampling(2.0, 3, 0.8), 2),
        (Sampling(2.0, 0, 1e-9), 1),
    ],
)
def test_draws_follow_the_distribution(how, kept):
    """20,000 draws: frequencies within 5 standard errors of the probabilities, renormalised over the kept tokens."""
    logits = 2 * torch.tensor([1.5, 0.5, 2.5, 1.0, -1.0, 2.0, 0.0, -0.5])
    p = (logits / 2).softmax(
        -1
    )  # 0.09, 0.03, 0.45 ... in this order; sorted: 0.38, 0.23, 0.14, 0.085, 0.05, ...
    p[p.argsort()[: 8 - kept]] = 0
    p /= p.sum()
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    drawn = generate.draw(logits.expand(20_000, -1), u, how)
    frequency = drawn.bincount(minlength=8) / 20_000
    assert (abs(frequency - p) <= 5 * (p * (1 - p) / 20_000).sqrt()).all()


def test_the_ends_of_the_distribution():
    """u of 0 and just below 1, and tokens that have probability 0: only tokens that may be drawn."""
    logits = torch.tensor([[-torch.inf, 0, 1, 1, -200]])
    for u, expected in ((0.0, 1), (1 - 2**-53, 3)):
        for how in (Sampling(top_k=0), Sampling(top_k=0, temperature=0.5)):
            assert (
                generate.draw(logits, torch.tensor([u], dtype=torch.float64), how).item()
                == expected
            )
    assert generate.draw(logits, torch.tensor([0.9999]), Sampling(top_k=2)).item() in (2, 3)


def test_ids_that_pad_the_vocabulary_are_never_drawn(model):
    with torch.no_grad():
        saved = model.wte.weight[N_VOCAB:].clone()
        model.wte.weight[N_VOCAB:] = 1e3 * model.wte.weight[0]
        rows = decoded(model, [[0]], 4, 20, Sampling(top_k=0))
        model.wte.weight[N_VOCAB:] = saved
    assert max(map(max, rows)) < N_VOCAB


# --------------------------------------------------------------------------------------------------------------------
# text


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text().map(gpt2().encode_ordinary), st.lists(st.integers(0, EOT - 1))))
def test_streamed_text_is_the_decoded_text(ids):
    """Characters split over tokens come whole; bytes that are no text become the same replacement characters."""
    text = Text()
    pieces = [text.add(i) for i in ids] + [text.end("max_new_tokens")]
    assert "".join(pieces) == text.text == gpt2().decode(ids)


def test_no_half_character_is_ever_shown():
    ids, text = gpt2().encode_ordinary("日本語 🙂 é"), Text()
    pieces = [text.add(i) for i in ids]
    assert "".join(pieces) == "日本語 🙂 é" and "" in pieces and "\ufffd" not in "".join(pieces)


@settings(max_examples=200, deadline=None)
@given(
    st.text("abc ", max_size=12),
    st.lists(st.text("abc ", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_stop_strings_end_the_text_wherever_tokens_divide_them(whole, stop, data):
    """The text is cut before the first stop string, and nothing that was shown is taken back."""
    text, shown = Text(tuple(stop)), ""
    for c in whole:
        if not text.ended:
            shown += text.add(gpt2().encode_single_token(c))
            assert not any(s in shown for s in stop)
    if not text.ended:
        shown += text.end("max_new_tokens")
    _, start = min(
        ((at + len(s), at) for s in stop if (at := whole.find(s)) >= 0), default=(0, len(whole))
    )
    assert shown == text.text == whole[:start] and (text.ended in stop) == any(
        s in whole for s in stop
    )


def test_texts_end_one_by_one_and_then_all():
    texts = [Text(), Text(("b",))]
    steps = iter([[64, 64], [EOT, 64], [64, 65], [64, 64]])
    assert list(generate.stream(steps, texts)) == [["a", "a"], ["", "a"], ["", ""]]
    assert [t.ended for t in texts] == ["<|endoftext|>", "b"] and [t.count for t in texts] == [2, 3]
    assert next(steps) == [64, 64]  # nothing is computed that nobody waits for


def test_sample_texts_are_a_function_of_the_arguments(model):
    """Prompt included; too long ones are read from their end; stopped() ends them early."""
    a, b, c = (generate.sample_texts(model, "Hello", 2, 8, seed=s) for s in (1, 1, 2))
    assert a == b != c and all(t.startswith("Hello") for t in a)
    assert generate.sample_texts(model, "", 1, 3)[0] and generate.sample_texts(
        model, "word " * 50, 1, 3
    )
    assert generate.sample_texts(model, "Hello", 1, 8, seed=1, stopped=lambda: True)[0] != a[0]


# --------------------------------------------------------------------------------------------------------------------
# packed weights


needs_kernel = pytest.mark.skipif(
    isinstance(kernels.compiled("packed.cpp"), str),
    reason="no g++: generate.py falls back to torch's kernels",
)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@torch.no_grad()
def test_packed_weights_multiply_like_the_rounded_ones(dtype):
    """Any number of rows, widths that are no multiple of the kernel's steps, a row of zeros: float32's rounding and no more."""
    torch.manual_seed(0)
    for K, N in ((64, 48), (30, 50), (768, 17)):
        layer = torch.nn.Linear(K, N)
        layer.weight[3] = 0
        quick = packed.PackedLinear(layer.weight, layer.bias, dtype)
        step = layer.weight.abs().amax(1, keepdim=True) / 127
        rounded = (
            (layer.weight / step.clamp(min=1e-12)).round() * step
            if dtype == torch.int8
            else layer.weight.bfloat16().float()
        )
        for M in (1, 2, 3, 7, 16, 31):
            x = torch.randn(M, 1, K)
            torch.testing.assert_close(
                quick(x), torch.nn.functional.linear(x, rounded, layer.bias), atol=1e-5, rtol=1e-5
            )


@needs_kernel
@torch.no_grad()
def test_weights_of_fewer_bits_are_close(monkeypatch):
    """Logits within 5% of their spread, bfloat16 closer than int8; without the kernel torch's bfloat16, and no int8."""
    model, ids = make_model(), torch.tensor(prompts(BLOCK))
    expected = model(ids)
    cpu = torch.device("cpu")
    off = [
        (generate.of_type(model, dtype, cpu)(ids) - expected).std()
        for dtype in ("float32", "bfloat16", "int8")
    ]
    assert off[0] == 0 < off[1] < off[2] < 0.05 * expected.std()
    monkeypatch.setattr(generate, "compiled", lambda source: "no g++")
    with pytest.raises(UserError, match="no g\\+\\+; hint"):
        generate.of_type(model, "int8", cpu)
    assert generate.of_type(model, "bfloat16", cpu)(ids).dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------------------------------
# the command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with one checkpoint."""
    run_dir, model = tmp_path_factory.mktemp("work") / "log" / "r", make_model(use_rope=True)
    checkpoint.save(run_dir / "ckpt", 3, model, optim.adamw(model, 1e-3, (0.9, 0.95), 0.1), {})
    return run_dir


def command(monkeypatch, capsys, *args) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `python generate.py args`, without the seconds that imports take."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, args)])
    try:
        command_line(generate.main)
        status = 0
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


def test_the_newest_run_continues_a_prompt(saved):
    """As a user calls it, in a directory with log/: header, prompt and text, speed."""
    done = run(
        ROOT / "generate.py",
        "--prompt",
        "Hello",
        "--max_new_tokens",
        "3",
        "--device",
        "cpu",
        cwd=saved.parent.parent,
    )
    out = done.stdout.splitlines()
    assert done.returncode == 0 and out[0].startswith("model | log/r | ") and out[1] == "-" * 80, (
        done.stderr
    )
    assert (
        out[2].startswith("Hello")
        and out[-1].startswith("speed | 3 tokens in ")
        and out[-1].endswith(" tok/s")
    )


def test_prompts_from_command_line_file_and_stdin_give_the_same_texts(
    saved, tmp_path, monkeypatch, capsys
):
    """A run directory, a checkpoint or the directory of checkpoints; a prompt a line; text streamed or as JSON."""
    common = ["--max_new_tokens", 6, "--n", 2, "--device", "cpu", "--seed", 7]
    status, out, err = command(
        monkeypatch, capsys, "--model", saved, "--prompt", "Hello", "A longer prompt", *common
    )
    assert (
        status == 0
        and out.count("A longer prompt") == 2
        and "speed | 24 tokens in " in out
        and not err
    )
    texts = out.split("speed | ")[0].split("-" * 80 + "\n")[1:]
    (tmp_path / "prompts.txt").write_text("Hello\n\nA longer prompt\n")
    monkeypatch.setattr(sys, "stdin", open(tmp_path / "prompts.txt"))
    for source in (
        ["--model", saved / "ckpt", "--file", tmp_path / "prompts.txt"],
        ["--model", saved / "ckpt" / "step_000003"],
    ):
        status, out, err = command(monkeypatch, capsys, *source, *common, "--json", True)
        rows = [json.loads(line) for line in out.splitlines()]
        assert (
            status == 0
            and [r["prompt"] + r["text"] + "\n" for r in rows] == texts
            and "speed | 24 tokens" in err
        )
        assert [(r["sample"], r["tokens"], r["ended"]) for r in rows] == [
            (i, 6, "max_new_tokens") for i in (0, 1)
        ] * 2


def test_all_kinds_of_numbers(saved, monkeypatch, capsys):
    for dtype in ("bfloat16", "float32", "int8")[
        : 2 + (not isinstance(kernels.compiled("packed.cpp"), str))
    ]:
        status, out, _ = command(
            monkeypatch,
            capsys,
            "--model",
            saved,
            "--prompt",
            "Hello",
            "--dtype",
            dtype,
            "--max_new_tokens",
            20,
            "--device",
            "cpu",
            "--temperature",
            0,
        )
        assert status == 0 and "20 tokens" in out


def test_at_a_terminal_it_asks_again_and_again(saved):
    """A prompt that is too long is told, and the next one answered; Ctrl-D ends."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable,
            ROOT / "generate.py",
            "--model",
            saved,
            "--max_new_tokens",
            "3",
            "--device",
            "cpu",
        ],
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.write(master, b"Hello\n" + b"word " * 40 + b"\n\n\x04")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.count("speed | 3 tokens") == 2 and "Hello" in out, err
    assert err.startswith("error: the prompt 'word word") and "Traceback" not in err


def test_mistakes_are_one_line(saved, tmp_path, monkeypatch, capsys):
    """Each with what is wrong and a hint, status 2, before or instead of any text."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / "cut")
    with open(tmp_path / "cut" / "ckpt" / "step_000003" / "model.safetensors", "r+b") as f:
        f.truncate(1000)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(
        json.dumps(
            dict(model_type="gpt2", n_positions=8, vocab_size=97, n_layer=1, n_head=2, n_embd=16)
        )
    )
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"\x10" * 100)
    (tmp_path / "foreign.pt").write_bytes(b"PK")
    small = GPT(GPTConfig(block_size=8, vocab_size=97, n_layer=1, n_head=2, n_embd=16))
    checkpoint.save(
        tmp_path / "small" / "ckpt", 1, small, optim.adamw(small, 1e-3, (0.9, 0.95), 0.1), {}
    )
    (tmp_path / "empty.txt").write_text("\n \n")
    hello = ["--prompt", "Hello", "--device", "cpu"]
    for args, words in (
        (["--prompt", "a"], "no run with a checkpoint in log/"),
        (["--model", "nowhere", *hello], "'nowhere' is neither a folder nor a name"),
        (["--model", "foreign.pt", *hello], "no checkpoint in foreign.pt"),
        (["--model", tmp_path, *hello], "no checkpoint in"),
        (["--model", "cut", *hello], "no good checkpoint in cut/ckpt"),
        (["--model", "cut/ckpt/step_000003", *hello], "model.safetensors is damaged"),
        (["--model", "hf", *hello], "model.safetensors cannot be read"),
        (["--model", "small", *hello], "small knows 97 tokens"),
        (["--model", saved, "--prompt", "word " * 17], "has 18 tokens, the model's context 16"),
        (["--file", "empty.txt"], "no prompt in empty.txt"),
        (["--file", "foreign.txt"], "foreign.txt cannot be read"),
        (["--file", "empty.txt", "--prompt", "a"], "prompts on the command line and in empty.txt"),
        (
            ["--n", 0, "--temperature", -1],
            "n is 0, must be above 0; hint: --n; temperature is -1.0",
        ),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top_k", -1], "top_k is -1"),
        (["--top_p", 1.5], "top_p is 1.5"),
        (["--stop", ""], "stop is ('',)"),
        (["--max_new_tokens", 0], "max_new_tokens is 0"),
    ):
        status, out, err = command(monkeypatch, capsys, *args)
        assert (
            status == 2
            and err.startswith("error: ")
            and words in err
            and "hint:" in err
            and err.count("\n") == 1
        ), (args, err)


def test_newest_run(tmp_path):
    with pytest.raises(UserError, match="hint"):
        generate.newest_run(str(tmp_path))
