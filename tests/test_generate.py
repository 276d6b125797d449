"""Test decoding with a cache against recomputing everything, sampling, text, the command line."""

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

import generate
import hf
from generate import Sampling, Text
from kernels import packed
from kernels.build import KernelError, load_library
from model import GPT, GPTConfig, KVCache
from runtime import checkpoint
from runtime.command_line import UserError, run_script
from tokenizer import EOT, N_VOCAB, gpt2

GREEDY = Sampling(temperature=0)
BLOCK = 16
CPU = torch.device("cpu")


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
    params=[{}, {"use_rope": True}, {"use_rope": True, "use_swiglu": True}, {"arch": "modern"}],
    ids=["learned", "rope", "swiglu", "modern"],
)
def model(request):
    return make_model(**request.param)


def prompts(*lengths) -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(N_VOCAB, (length,), generator=g).tolist() for length in lengths]


@torch.no_grad()
def naive(model: GPT, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Recompute everything for each token; a full context is cropped to its last half."""
    start = 0
    ids = list(prompt)
    for _ in range(max_new_tokens):
        if len(ids) - start > BLOCK:
            start = len(ids) - BLOCK // 2
        ids.append(model(torch.tensor([ids[start:]]))[0, -1, :N_VOCAB].argmax().item())
    return ids[len(prompt) :]


def decoded(model, texts, n=1, max_new_tokens=40, sampling=GREEDY, **options) -> list[list[int]]:
    """Return the new tokens of each row."""
    steps = generate.tokens(model, texts, n, max_new_tokens, sampling, **options)
    return [list(row) for row in zip(*steps)]


# --------------------------------------------------------------------------------------------------
# the cache


def test_greedy_tokens_equal_the_oracle_within_and_beyond_the_context(model):
    """Prompts of all lengths in one batch, so that rows fill up at different times, repeatedly."""
    texts = prompts(1, 5, 5, BLOCK // 2, BLOCK - 1, BLOCK)
    rows = decoded(model, texts)
    for text, row in zip(texts, rows):
        assert row == naive(model, text, 40)
    assert min(len(set(row)) for row in rows) >= 5  # no row that only repeats itself


def assert_close(logits: torch.Tensor, expected: list[torch.Tensor] | torch.Tensor):
    if isinstance(expected, list):
        expected = torch.stack(expected)[:, :N_VOCAB]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_logits_do_not_depend_on_how_the_tokens_come(model):
    """All at once, one by one, in two parts, rows padded to one length: equal to rounding."""
    a, b = torch.tensor(prompts(12, 12))
    expected = model(torch.stack((a, b)))
    for parts in ([12], [1] * 12, [5, 7]):
        cache = KVCache(model.config, 2, 14)
        out = []
        for part in torch.stack((a, b)).split(parts, dim=1):
            out.append(model.head(model.trunk(part, cache=cache)))
        assert_close(torch.cat(out, 1), expected)
        assert cache.lengths.tolist() == [12, 12]
    cache, logits = generate.prefill(model, [a[:3].tolist(), b[:9].tolist()], 14)
    assert_close(logits, [expected[0, 2], expected[1, 8]])
    first = torch.zeros(2, dtype=torch.int64)
    logits = generate.decode(model, torch.stack((a[3:4], b[9:10])), cache, first)
    assert_close(logits, [expected[0, 3], expected[1, 9]])


def test_decoding_has_one_shape(model):
    """Rows of different lengths, beyond the context: a compiled step is built once."""
    shapes = set()

    def recorded(model, idx, cache, last):
        shapes.add((idx.shape, cache.k.shape, last.shape))
        return generate.decode(model, idx, cache, last)

    rows = decoded(model, prompts(3, 9), n=2, decode_step=recorded)
    assert shapes == {((4, 1), (2, 4, 2, BLOCK, 16), (4,))}
    torch._dynamo.reset()
    compiled = torch.compile(generate.decode, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert decoded(model, prompts(3, 9), n=2, decode_step=compiled) == rows


def test_autocast_as_in_training(model):
    """The cache has autocast's type; the text is that without a cache under autocast."""
    text = prompts(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate.prefill(model, text, 8)[0].k.dtype == torch.bfloat16
        assert decoded(model, text, max_new_tokens=5)[0] == naive(model, text[0], 5)


# --------------------------------------------------------------------------------------------------
# drawing


def test_a_sample_depends_neither_on_n_nor_on_its_neighbours(model):
    a, b, c = prompts(4, 11, 2)
    sampling = Sampling(top_p=0.95)
    together = decoded(model, [a, b, c], 3, sampling=sampling)
    assert len(set(map(tuple, together))) == 9
    for i, text in enumerate((a, b, c)):
        assert decoded(model, [text], 3, sampling=sampling) == together[3 * i : 3 * i + 3]
        assert decoded(model, [text], 2, sampling=sampling) == together[3 * i : 3 * i + 2]
    assert decoded(model, [a], 1, max_new_tokens=7, sampling=sampling)[0] == together[0][:7]
    other_seed = dataclasses.replace(sampling, seed=1)
    assert decoded(model, [a], 3, sampling=other_seed) != together[:3]


@pytest.mark.parametrize(
    "sampling, n_possible",
    [
        (Sampling(2.0, 0), 8),
        (Sampling(2.0, 5), 5),
        (Sampling(2.0, 0, 0.8), 4),
        (Sampling(2.0, 3, 0.8), 2),
        (Sampling(2.0, 0, 1e-9), 1),
    ],
)
def test_draws_follow_the_distribution(sampling, n_possible):
    """Frequencies of 20,000 draws are within 5 standard errors of the truncated probabilities."""
    logits = 2 * torch.tensor([1.5, 0.5, 2.5, 1.0, -1.0, 2.0, 0.0, -0.5])
    p = (logits / 2).softmax(-1)  # sorted: 0.38, 0.23, 0.14, 0.085, 0.05, ...
    p[p.argsort()[: 8 - n_possible]] = 0
    p /= p.sum()
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    drawn = generate.draw(logits.expand(20_000, -1), u, sampling)
    frequency = drawn.bincount(minlength=8) / 20_000
    assert (abs(frequency - p) <= 5 * (p * (1 - p) / 20_000).sqrt()).all()


def test_the_ends_of_the_distribution():
    """u of 0 and just below 1, and tokens of probability 0: only tokens that may be drawn."""
    logits = torch.tensor([[-torch.inf, 0, 1, 1, -200]])
    for u, expected in ((0.0, 1), (1 - 2**-53, 3)):
        u = torch.tensor([u], dtype=torch.float64)
        for sampling in (Sampling(top_k=0), Sampling(top_k=0, temperature=0.5)):
            assert generate.draw(logits, u, sampling).item() == expected
    assert generate.draw(logits, torch.tensor([0.9999]), Sampling(top_k=2)).item() in (2, 3)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-38, 1e-40, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = torch.randn(64, 97, generator=torch.Generator().manual_seed(2)) * 20
    u = torch.rand(64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for top_k in (0, 50):
        drawn = generate.draw(logits, u, Sampling(temperature, top_k))
        assert torch.equal(drawn, logits.argmax(-1))


def test_ids_that_pad_the_vocabulary_are_never_drawn(model):
    with torch.no_grad():
        saved = model.wte.weight[N_VOCAB:].clone()
        model.wte.weight[N_VOCAB:] = 1e3 * model.wte.weight[0]
        rows = decoded(model, [[0]], 4, 20, Sampling(top_k=0))
        model.wte.weight[N_VOCAB:] = saved
    assert max(map(max, rows)) < N_VOCAB


# --------------------------------------------------------------------------------------------------
# text


@settings(max_examples=200)
@given(st.one_of(st.text().map(gpt2().encode_ordinary), st.lists(st.integers(0, EOT - 1))))
def test_streamed_text_is_the_decoded_text(ids):
    """Split characters come in one piece; invalid bytes become the same replacement characters."""
    text = Text()
    pieces = [text.add(i) for i in ids] + [text.end("max_new_tokens")]
    assert "".join(pieces) == text.text == gpt2().decode(ids)


def test_no_half_character_is_ever_shown():
    text = Text()
    pieces = [text.add(i) for i in gpt2().encode_ordinary("日本語 🙂 é")]
    assert "".join(pieces) == "日本語 🙂 é"
    assert "" in pieces
    assert "\ufffd" not in "".join(pieces)


@settings(max_examples=200)
@given(
    st.text("abc ", max_size=12),
    st.lists(st.text("abc ", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_end_the_text_wherever_tokens_divide_them(whole, stop):
    """The text is cut before the first stop string, and nothing that was shown is taken back."""
    text = Text(tuple(stop))
    shown = ""
    for c in whole:
        if not text.ended:
            shown += text.add(gpt2().encode_single_token(c))
            assert not any(s in shown for s in stop)
    if not text.ended:
        shown += text.end("max_new_tokens")
    stops = [(whole.find(s) + len(s), whole.find(s)) for s in stop if s in whole]
    _, start = min(stops, default=(0, len(whole)))
    assert shown == text.text == whole[:start]
    assert (text.ended in stop) == any(s in whole for s in stop)


def test_texts_end_one_by_one_and_then_all():
    """A text that has ended gets no more tokens; after the last one no step is computed."""
    texts = [Text(), Text(("b",))]
    steps = iter([[64, 64], [EOT, 64], [64, 65], [64, 64]])
    assert list(generate.stream(steps, texts)) == [["a", "a"], ["", "a"], ["", ""]]
    assert [text.ended for text in texts] == ["<|endoftext|>", "b"]
    assert [text.count for text in texts] == [2, 3]
    assert next(steps) == [64, 64]


def test_no_step_is_computed_after_the_last_token(model):
    calls = []

    def recorded(*args):
        calls.append(args)
        return generate.decode(*args)

    assert len(list(generate.tokens(model, prompts(3), 1, 4, GREEDY, recorded))) == 4
    assert len(calls) == 3  # the first token comes from the prefill


def test_sample_texts_are_a_function_of_the_arguments(model):
    """Prompt included; too long ones are read from their end; stopped() ends them early."""
    a, b, c = (generate.sample_texts(model, "Hello", 2, 8, seed=s) for s in (1, 1, 2))
    assert a == b != c
    assert all(text.startswith("Hello") for text in a)
    assert generate.sample_texts(model, "", 1, 3)[0]
    assert generate.sample_texts(model, "word " * 50, 1, 3)[0].startswith("word " * 50)
    assert generate.sample_texts(model, "Hello", 1, 8, seed=1, stopped=lambda: True)[0] != a[0]


# --------------------------------------------------------------------------------------------------
# packed weights


def packed_compiles() -> bool:
    try:
        load_library("packed.cpp")
    except KernelError:
        return False
    return True


needs_kernel = pytest.mark.skipif(
    not packed_compiles(), reason="no g++: generate.py falls back to torch's kernels"
)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@torch.no_grad()
def test_packed_weights_multiply_like_the_rounded_ones(dtype):
    """Equal to float32's rounding, for any number of rows, odd widths, and a row of zeros."""
    torch.manual_seed(0)
    for K, N in ((64, 48), (30, 50), (768, 17)):
        layer = torch.nn.Linear(K, N)
        layer.weight[3] = 0
        quick = packed.PackedLinear(layer.weight, layer.bias, dtype)
        if dtype == torch.int8:
            step = layer.weight.abs().amax(1, keepdim=True) / 127
            rounded = (layer.weight / step.clamp(min=1e-12)).round() * step
        else:
            rounded = layer.weight.bfloat16().float()
        for M in (1, 2, 3, 7, 16, 31):
            x = torch.randn(M, 1, K)
            expected = torch.nn.functional.linear(x, rounded, layer.bias)
            torch.testing.assert_close(quick(x), expected, atol=1e-5, rtol=1e-5)


@needs_kernel
@torch.no_grad()
def test_weights_of_fewer_bits_are_close():
    """Logits are within 5% of their spread, bfloat16 closer than int8."""
    model = make_model()
    ids = torch.tensor(prompts(BLOCK))
    expected = model(ids)
    off = []
    for dtype in ("float32", "bfloat16", "int8"):
        off.append((generate.to_dtype(model, dtype, CPU)(ids) - expected).std())
    assert off[0] == 0 < off[1] < off[2] < 0.05 * expected.std()


@torch.no_grad()
def test_without_packing_bfloat16_is_torchs_and_int8_an_error(monkeypatch):
    """Where packed.cpp cannot be compiled, with torch.compile, and on other devices."""
    ids = torch.tensor(prompts(BLOCK))
    unpacked = generate.to_dtype(make_model(), "bfloat16", CPU, packed=False)
    assert unpacked(ids).dtype == torch.bfloat16
    with pytest.raises(UserError, match="torch.compile; hint"):
        generate.to_dtype(make_model(), "int8", CPU, packed=False)
    with pytest.raises(UserError, match="meta.*; hint"):
        generate.to_dtype(make_model(), "int8", torch.device("meta"))

    def no_compiler(source):
        raise KernelError("no g++")

    monkeypatch.setattr(packed, "load_library", no_compiler)
    assert generate.to_dtype(make_model(), "bfloat16", CPU)(ids).dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"no g\+\+.*; hint"):
        generate.to_dtype(make_model(), "int8", CPU)


# --------------------------------------------------------------------------------------------------
# the command line


def write_checkpoint(run_dir, model: GPT, step: int):
    """Write a checkpoint without an optimizer: all that is read here."""
    state = {"gpt_config": dataclasses.asdict(model.config)}
    tensors = {"model.safetensors": model.state_dict()}
    checkpoint.write(run_dir / "ckpt", step, tensors, state)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run directory with one checkpoint."""
    run_dir = tmp_path_factory.mktemp("work") / "log" / "r"
    write_checkpoint(run_dir, make_model(use_rope=True), 3)
    return run_dir


def command(monkeypatch, capsys, *args) -> tuple[int, str, str]:
    """Call `python generate.py args` in this process; return exit status, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, args)])
    try:
        run_script(generate.main)
        status = 0
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


def test_the_newest_run_continues_a_prompt(run_dir):
    """As a user calls it, in a directory with log/: header, prompt and text, speed."""
    args = "--prompt Hello --max_new_tokens 3 --device cpu".split()
    done = run(ROOT / "generate.py", *args, cwd=run_dir.parent.parent)
    assert done.returncode == 0, done.stderr
    out = done.stdout.splitlines()
    assert out[0].startswith("model | log/r | ")
    assert out[1] == "-" * 80
    assert out[2].startswith("Hello")
    assert out[-1].startswith("speed | 3 tokens in ")
    assert out[-1].endswith(" tok/s")


def test_prompts_from_command_line_file_and_stdin_give_the_same_texts(
    run_dir, tmp_path, monkeypatch, capsys
):
    """From a run, its checkpoints or one of them; one prompt per line; streamed or as JSON."""
    common = ["--max_new_tokens", 6, "--n", 2, "--device", "cpu", "--seed", 7]
    prompts = ["--prompt", "Hello", "A longer prompt"]
    status, out, err = command(monkeypatch, capsys, "--model", run_dir, *prompts, *common)
    assert (status, err) == (0, "")
    assert out.count("A longer prompt") == 2
    assert "speed | 24 tokens in " in out
    texts = out.split("speed | ")[0].split("-" * 80 + "\n")[1:]

    file = tmp_path / "prompts.txt"
    file.write_text("Hello\n\nA longer prompt\n")
    from_file = ["--model", run_dir / "ckpt", "--file", file]
    from_stdin = ["--model", run_dir / "ckpt" / "step_000003"]
    with file.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        for source in (from_file, from_stdin):
            status, out, err = command(monkeypatch, capsys, *source, *common, "--json", True)
            assert status == 0
            assert "speed | 24 tokens" in err
            rows = [json.loads(line) for line in out.splitlines()]
            assert [row["prompt"] + row["text"] + "\n" for row in rows] == texts
            ends = [(row["sample"], row["tokens"], row["ended"]) for row in rows]
            assert ends == [(i, 6, "max_new_tokens") for i in (0, 1)] * 2


def test_prompts_of_a_file_end_where_lines_end(tmp_path):
    """At newlines alone, carriage returns aside, and without a byte order mark."""
    file = tmp_path / "prompts.txt"
    prompts = ["one\u2028still one", "two\x0cstill two\x85", "", "three"]
    for raw in ("\n".join(prompts), "\r\n".join(prompts) + "\r\n"):
        for mark in (b"", b"\xef\xbb\xbf"):
            file.write_bytes(mark + raw.encode())
            assert generate.read_prompts(str(file)) == [p for p in prompts if p]


def test_every_console_shows_what_it_can(run_dir):
    """Other alphabets, broken characters and escapes: replaced or written out, status 0."""
    args = ["--prompt", "π\x1b]0;x\x07日本", "--max_new_tokens", "20", "--device", "cpu"]
    env = {"PYTHONIOENCODING": "ascii"}
    done = run("generate.py", "--model", run_dir, *args, env=env)
    assert done.returncode == 0, done.stderr
    assert r"?\x1b]0;x\x07??" in done.stdout and "speed | 20 tokens" in done.stdout


def test_all_types_of_weights(run_dir, monkeypatch, capsys):
    dtypes = ["bfloat16", "float32"]
    if packed_compiles():
        dtypes.append("int8")
    args = "--prompt Hello --max_new_tokens 20 --device cpu --temperature 0 --dtype".split()
    for dtype in dtypes:
        status, out, _ = command(monkeypatch, capsys, "--model", run_dir, *args, dtype)
        assert status == 0
        assert "20 tokens" in out


def test_at_a_terminal_it_asks_again_and_again(run_dir):
    """A prompt that is too long is an error line, and the next one is answered; Ctrl-D ends."""
    master, slave = pty.openpty()
    args = "--max_new_tokens 3 --device cpu".split()
    process = subprocess.Popen(
        [sys.executable, ROOT / "generate.py", "--model", run_dir, *args],
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.write(master, b"Hello\n" + b"word " * 40 + b"\n\n\x04")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("speed | 3 tokens") == 2
    assert "Hello" in out
    assert err.startswith("error: the prompt 'word word")
    assert "Traceback" not in err


def test_mistakes_are_one_line(run_dir, tmp_path, monkeypatch, capsys):
    """Each with what is wrong and a hint, status 2, before or instead of any text."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_dir, tmp_path / "cut")
    with open(tmp_path / "cut" / "ckpt" / "step_000003" / "model.safetensors", "r+b") as f:
        f.truncate(1000)
    sizes = {"vocab_size": 97, "n_layer": 1, "n_head": 2, "n_embd": 16}
    hf_config = {"model_type": "gpt2", "n_positions": 8} | sizes
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(hf_config))
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"\x10" * 100)
    (tmp_path / "foreign.pt").write_bytes(b"PK")
    write_checkpoint(tmp_path / "small", GPT(GPTConfig(block_size=8, **sizes)), 1)
    (tmp_path / "empty.txt").write_text("\n \n")
    hello = ["--prompt", "Hello", "--device", "cpu"]
    for args, words in (
        (["--prompt", "a"], "no run with a checkpoint in log/"),
        (["--model", "nowhere", *hello], "'nowhere' is neither a folder nor a name"),
        (["--model", "foreign.pt", *hello], "no checkpoint in foreign.pt"),
        (["--model", tmp_path, *hello], "holds foreign.pt but no model.safetensors"),
        (["--model", "cut", *hello], "no valid checkpoint in cut/ckpt"),
        (["--model", "cut/ckpt/step_000003", *hello], "model.safetensors is damaged"),
        (["--model", "hf", *hello], "model.safetensors cannot be read"),
        (["--model", "small", *hello], "small knows 97 tokens"),
        (["--model", run_dir, "--prompt", "word " * 17], "has 18 tokens, the model's context 16"),
        (["--file", "empty.txt"], "no prompt in empty.txt"),
        (["--file", "foreign.txt"], "foreign.txt cannot be read"),
        (["--file", "empty.txt", "--prompt", "a"], "prompts on the command line and in empty.txt"),
        (["--n", 0, "--temperature", -1], "n is 0, must be above 0; hint: --n; temperature is -1"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top_k", -1], "top_k is -1"),
        (["--top_p", 1.5], "top_p is 1.5"),
        (["--stop", ""], "stop is ('',)"),
        (["--max_new_tokens", 0], "max_new_tokens is 0"),
    ):
        status, out, err = command(monkeypatch, capsys, *args)
        assert status == 2, (args, out, err)
        assert err.startswith("error: ") and err.count("\n") == 1, (args, err)
        assert words in err and "hint:" in err, (args, err)


def test_newest_run(tmp_path):
    """The run of the newest checkpoint, also one of a study; none is in log/reference.

    Without a run an error with a hint.
    """

    def save(name, age):
        state = tmp_path / name / "ckpt" / "step_000001" / "state.json"
        state.parent.mkdir(parents=True)
        state.touch()
        os.utime(state, (1e9 - age, 1e9 - age))

    save("reference", age=0)
    save("reference/a", age=0)
    with pytest.raises(UserError, match="no run with a checkpoint .*hint"):
        hf.newest_run(str(tmp_path))
    save("b", age=1)
    save("study/c", age=2)
    save("d", age=3)
    assert hf.newest_run(str(tmp_path)) == str(tmp_path / "b")
    shutil.rmtree(tmp_path / "b")
    assert hf.newest_run(str(tmp_path)) == str(tmp_path / "study" / "c")
