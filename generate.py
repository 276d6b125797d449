"""Sample from a model.

    python generate.py                    the newest run in log/, prompts typed at the terminal
    python generate.py --model log/shakespeare --prompt "ROMEO:" --n 2 --max_new_tokens 300
    python generate.py --model gpt2 --prompt "Hello, I'm a" "Once upon a time" --temperature 0.8
    python generate.py --file prompts.txt --stop $'\\n\\n' --json True > out.jsonl

A file has one prompt per line; "-" is stdin. In float32 sample i of a prompt is a function of
(model, prompt, seed, i) and the sampling settings: it depends neither on the other prompts nor on
the number of samples. In bfloat16 matrix shapes change the rounding, and with it some samples.
"""

import codecs
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import hf
from kernels.build import KernelError
from kernels.packed import pack
from model import GPT, KVCache
from runtime.command_line import PathText, UserError, one_line, parse, run_script, show
from runtime.device import autocast_dtype, compile_error, pick_device
from tokenizer import EOT, N_VOCAB, gpt2

# --------------------------------------------------------------------------------------------------
# from tokens to tokens


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0  # below 1 sharper, above 1 flatter, 0 always the likeliest token
    top_k: int = 50  # draw among the k likeliest tokens; 0 = all
    # draw among the likeliest tokens that together have this probability; 1 = all
    top_p: float = 1.0
    seed: int = 42  # same seed, same text


def uniforms(seed: int, n: int, steps: int) -> torch.Tensor:
    """Draw numbers in [0, 1) for n samples, (n, steps), each row from its own CPU generator."""
    generators = [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63) for i in range(n)]
    return torch.stack([torch.rand(steps, generator=g, dtype=torch.float64) for g in generators])


SMALLEST = torch.finfo(torch.float32).tiny  # below it, division is by 0


def draw(logits: torch.Tensor, u: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Draw ids (B,) from logits (B, V): the tokens where the cumulative distribution passes u (B,).

    Inverse-CDF sampling needs one random number per row. The Gumbel trick needs V of them (0.3 ms
    per row, longer than the model).
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    ids = None
    if sampling.top_k or sampling.top_p < 1:
        V = logits.shape[-1]
        logits, ids = logits.topk(min(sampling.top_k or V, V))  # likeliest first
    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)  # otherwise a tiny temperature makes infinities
    p = (logits / max(sampling.temperature, SMALLEST)).softmax(-1)
    # on the host: CUDA has no deterministic cumulative sum, MPS no float64
    p = p.cpu().double()
    cdf = p.cumsum(-1)
    excluded = cdf - p >= sampling.top_p  # never the first
    total = cdf.masked_fill(excluded, 0).amax(-1, keepdim=True)
    index = torch.searchsorted(cdf, u[:, None] * total, right=True)
    index = index.clamp(max=p.shape[-1] - 1).to(logits.device)
    if ids is not None:
        index = ids.gather(-1, index)
    return index[:, 0]


def decode(model: GPT, idx: torch.Tensor, cache: KVCache, last: torch.Tensor) -> torch.Tensor:
    """Append idx (B, T) to the cache; return logits (B, N_VOCAB) after token `last` (B,) of a row.

    The head is the largest matrix, so it is applied to one token per row. Ids that only pad the
    vocabulary are left out.
    """
    hidden = model.trunk(idx, cache=cache)  # (B, T, C)
    return model.head(hidden[torch.arange(len(idx), device=idx.device), last])[:, :N_VOCAB]


def prefill(model: GPT, texts: list[list[int]], size: int) -> tuple[KVCache, torch.Tensor]:
    """Return a cache of `size` slots with one text per row, and the next logits (B, N_VOCAB)."""
    weight = model.wte.weight
    device = weight.device
    dtype = weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    cache = KVCache(model.config, len(texts), size, device, dtype)
    lengths = torch.tensor([len(text) for text in texts], device=device)
    rows = [torch.tensor(text) for text in texts]
    idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right
    logits = decode(model, idx.to(device), cache, lengths - 1)
    cache.lengths.copy_(lengths)  # the slots of the padding are overwritten
    return cache, logits


@torch.no_grad()
def tokens(
    model: GPT,
    prompts: list[list[int]],
    n: int,
    max_new_tokens: int,
    sampling: Sampling,
    decode_step: Callable = decode,
) -> Iterator[list[int]]:
    """Yield max_new_tokens lists of next ids, one id per row.

    Rows are n samples of the first prompt, then of the second, ... Prompts have 1 to block_size
    tokens. A row whose context is full continues from the last half of it. decode_step may be a
    compiled decode(): prefills aside, it is called with one shape.
    """
    block_size = model.config.block_size
    half = max(1, block_size // 2)
    texts = [list(prompt) for prompt in prompts for _ in range(n)]
    lengths = [len(text) for text in texts]  # tokens in each row of the cache
    size = min(block_size, max(lengths) + max_new_tokens)
    u = uniforms(sampling.seed, n, max_new_tokens).repeat(len(prompts), 1)

    # the samples of a prompt share one prefill
    prompt_cache, logits = prefill(model, prompts, size)
    prompt_of_row = [i for i in range(len(prompts)) for _ in range(n)]
    cache = KVCache(model.config, len(texts), size, logits.device, prompt_cache.k.dtype)
    cache.put(list(range(len(texts))), prompt_cache, prompt_of_row)
    logits = logits[prompt_of_row]

    last = torch.zeros_like(cache.lengths)  # a step has one token per row: index 0 is the last
    for t in range(max_new_tokens):
        ids = draw(logits, u[:, t], sampling)
        new_ids = ids.tolist()
        for text, token in zip(texts, new_ids):
            text.append(token)
        yield new_ids
        if t == max_new_tokens - 1:
            return
        full = [row for row, length in enumerate(lengths) if length == block_size]
        if full:
            cache.lengths[full] = 0  # the step also writes to full rows: keep that inside the cache
        if len(full) < len(texts):
            logits = decode_step(model, ids[:, None], cache, last)
        if full:
            halves = [texts[row][-half:] for row in full]
            half_cache, logits[full] = prefill(model, halves, size)
            cache.put(full, half_cache, list(range(len(full))))
        lengths = [half if length == block_size else length + 1 for length in lengths]


# --------------------------------------------------------------------------------------------------
# from tokens to text


class Text:
    """Decodes one sample token by token: add() returns the text that can no longer change.

    Bytes that are not yet a character wait for the next token, and so does what may become a stop
    string. The text ends before <|endoftext|> or a stop string; `ended` then says which.
    """

    def __init__(self, stop: tuple[str, ...] = (), prompt: str = ""):
        self.stop = stop
        self.prompt = prompt
        self.text = ""
        self.pending = ""  # characters that may belong to a stop string
        self.count = 0  # tokens
        self.ended = ""
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        self.count += 1
        if token == EOT:
            return self.end("<|endoftext|>")
        for character in self.utf8.decode(gpt2().decode_single_token_bytes(token)):
            self.pending += character
            matches = [s for s in self.stop if self.pending.endswith(s)]
            if matches:
                self.ended = max(matches, key=len)
                return self.release(len(self.pending) - len(self.ended))
        beginnings = [s[:k] for s in self.stop for k in range(len(s))]
        may_stop = max((len(b) for b in beginnings if self.pending.endswith(b)), default=0)
        return self.release(len(self.pending) - may_stop)

    def end(self, reason: str) -> str:
        """Return the rest, when no more tokens come."""
        self.ended = reason
        self.pending += self.utf8.decode(b"", final=True)
        return self.release(len(self.pending))

    def release(self, n: int) -> str:
        """Move n pending characters to the text and return them."""
        released = self.pending[:n]
        self.pending = self.pending[n:]
        self.text += released
        return released


def stream(steps: Iterator[list[int]], texts: list[Text]) -> Iterator[list[str]]:
    """Feed texts with tokens until all have ended; yield what each step adds to each."""
    for new_ids in steps:
        yield ["" if text.ended else text.add(token) for text, token in zip(texts, new_ids)]
        if all(text.ended for text in texts):
            return
    yield ["" if text.ended else text.end("max_new_tokens") for text in texts]


def prompt_ids(prompt: str) -> list[int]:
    """Tokenize a prompt; an empty one is the beginning of a document.

    "<|endoftext|>" in it is that token, as in the tokenizer that hf.py exports. (In documents,
    prepare.py takes it for ordinary text.)
    """
    return gpt2().encode(prompt, allowed_special="all") or [EOT]


def sample_texts(
    model: GPT,
    prompt: str,
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 42,
    stopped: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Return n continuations of a prompt, each up to its first <|endoftext|>, prompt included.

    An empty prompt means the beginning of a document; of one longer than the context the end
    counts. Ends early once stopped() is true.
    """
    ids = prompt_ids(prompt)
    ids = ids[-model.config.block_size :]
    texts = [Text(prompt=prompt) for _ in range(n)]
    steps = tokens(model, [ids], n, max_new_tokens, Sampling(temperature, seed=seed))
    for _ in stream(steps, texts):
        if stopped():
            break
    return [text.prompt + text.text for text in texts]


# --------------------------------------------------------------------------------------------------
# the command line


@dataclass(frozen=True)
class Settings(Sampling):
    """Continue texts with a trained model. Prompts come from the options, stdin or the terminal."""

    # run directory, checkpoint, Hugging Face GPT-2 name or folder; default: the newest run in log/
    model: PathText = ""
    prompt: tuple[str, ...] = ()  # texts to continue; "" is the beginning of a document
    file: PathText = ""  # prompts, one per line; - = stdin
    n: int = 1  # samples of each prompt
    max_new_tokens: int = 200  # tokens in each at most; <|endoftext|> ends it, too
    stop: tuple[str, ...] = ()  # strings that end a text and are not part of it
    json: bool = False  # one JSON object per sample, when all are done
    # of the weights; int8 only on a CPU; auto = bfloat16 where the hardware multiplies it natively
    dtype: Literal["auto", "bfloat16", "float32", "int8"] = "auto"
    use_compile: bool = False  # takes minutes, worth it for long texts on a GPU
    device: str = "auto"  # cuda, mps or cpu; auto takes the first of these that exists


def check_settings(args: Settings):
    """Raise UserError with all that is wrong with the settings."""
    rules = (
        ("n", args.n > 0, "above 0"),
        ("max_new_tokens", args.max_new_tokens > 0, "above 0"),
        ("temperature", 0 <= args.temperature < float("inf"), "a number from 0"),
        ("top_k", 0 <= args.top_k <= N_VOCAB, f"0 to {N_VOCAB}"),
        ("top_p", 0 < args.top_p <= 1, "above 0, up to 1"),
        ("stop", "" not in args.stop, "strings of at least one character"),
    )
    wrong = []
    for name, valid, rule in rules:
        if not valid:
            wrong.append(f"{name} is {getattr(args, name)}, must be {rule}; hint: --{name}")
    if args.prompt and args.file:
        wrong.append(f"prompts on the command line and in {args.file}; hint: give one")
    if wrong:
        raise UserError("; ".join(wrong))


def read_prompts(file: str) -> list[str]:
    """Read one prompt per line, - = stdin, skipping empty lines. Raises UserError for none."""
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        text = raw.decode("utf-8-sig")  # without a byte order mark
    except (OSError, ValueError) as e:
        raise UserError(
            f"{file} cannot be read ({one_line(e)}); "
            "hint: --file takes UTF-8 text, one prompt per line"
        ) from e
    prompts = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"no prompt in {'stdin' if file == '-' else file}; hint: --prompt TEXT")
    return prompts


def encode_prompt(prompt: str, block_size: int) -> list[int]:
    """Tokenize a prompt. Raises UserError when it is longer than the context."""
    ids = prompt_ids(prompt)
    if len(ids) > block_size:
        raise UserError(
            f"the prompt {prompt[:20]!r}... has {len(ids)} tokens, the model's context "
            f"{block_size}; hint: shorten it"
        )
    return ids


def to_dtype(model: GPT, dtype: str, device: torch.device, packed: bool = True) -> GPT:
    """Move a float32 model to a device, with weights of a type; pack them for decoding on a CPU.

    bfloat16 weights stay unpacked where packed.cpp cannot be compiled. Raises UserError for int8
    weights that cannot be packed.
    """
    weight_dtype = autocast_dtype(device, dtype)
    if packed and device.type == "cpu" and weight_dtype != torch.float32:
        try:
            return pack(model, weight_dtype)
        except KernelError as e:
            if weight_dtype == torch.int8:
                raise UserError(
                    f"int8 weights need packed.cpp ({e}); hint: --dtype bfloat16"
                ) from e
    elif weight_dtype == torch.int8:
        raise UserError(
            f"int8 weights need a CPU, here {device.type}, and no torch.compile; "
            "hint: --dtype bfloat16"
        )
    return model.to(device, weight_dtype)


def load_model(args: Settings) -> tuple[GPT, Callable]:
    """Return the model, ready on its device, and its decode(). Raises UserError."""
    source = args.model or hf.newest_run()
    device = pick_device(args.device)
    model = hf.load_for_text(source).eval()
    n_parameters = model.num_params()  # packed weights are not parameters
    model = to_dtype(model, args.dtype, device, packed=not args.use_compile)
    decode_step = decode
    if args.use_compile:
        error = compile_error(device)
        if error:
            raise UserError(
                f"torch.compile does not work here ({error}); hint: --use_compile False"
            )
        decode_step = torch.compile(decode, fullgraph=True, dynamic=False)
    print_status(args, f"model | {source} | {n_parameters:,} parameters")
    return model, decode_step


def print_status(args: Settings, line: str):
    """Print a line that is not a sample: on stderr when stdout is JSON."""
    show(f"{line}\n", sys.stderr if args.json else sys.stdout)


def respond(args: Settings, model: GPT, decode_step: Callable, prompts: list[str]):
    """Print all samples of the prompts, then tokens per second, prefill included."""
    ids = [encode_prompt(prompt, model.config.block_size) for prompt in prompts]
    texts = [Text(args.stop, prompt) for prompt in prompts for _ in range(args.n)]
    started = time.perf_counter()
    steps = tokens(model, ids, args.n, args.max_new_tokens, args, decode_step)
    if args.json:
        for _ in stream(steps, texts):
            pass
        for i, text in enumerate(texts):
            record = {"prompt": text.prompt, "sample": i % args.n, "text": text.text}
            record |= {"tokens": text.count, "ended": text.ended}
            show(f"{json.dumps(record)}\n")
    else:
        print_texts(stream(steps, texts), texts)
    total = sum(text.count for text in texts)
    seconds = time.perf_counter() - started
    rate = total / seconds
    print_status(args, f"speed | {total} tokens in {seconds:.2f} s | {rate:.1f} tok/s")


def print_texts(pieces: Iterator[list[str]], texts: list[Text]):
    """Print texts as they grow: the first that has not ended; those after it wait."""
    current = 0
    printed = 0  # characters of the current text, its heading included
    for _ in pieces:
        while current < len(texts):
            text = texts[current]
            whole = f"{'-' * 80}\n{text.prompt}{text.text}"
            show(whole[printed:])
            printed = len(whole)
            if not text.ended:
                break
            show("\n")
            current += 1
            printed = 0


def ask_for_prompts(args: Settings, model: GPT, decode_step: Callable):
    """Respond to prompts typed at the terminal, until Ctrl-D or Ctrl-C."""
    while True:
        try:
            respond(args, model, decode_step, [input("prompt> ")])
        except UserError as e:  # too long: the next one may not be
            show(f"error: {e}\n", sys.stderr)


def main():
    args = parse(Settings)
    check_settings(args)
    prompts = list(args.prompt)
    typed = not prompts and not args.file and sys.stdin.isatty()
    if not prompts and not typed:
        prompts = read_prompts(args.file or "-")
    model, decode_step = load_model(args)
    try:
        if typed:
            ask_for_prompts(args, model, decode_step)
        else:
            respond(args, model, decode_step, prompts)
    except (EOFError, KeyboardInterrupt):
        show("\n")


if __name__ == "__main__":
    run_script(main)
