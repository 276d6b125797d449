"""Sample from a model.

    python generate.py                                             the newest run in log/, prompts typed at the terminal
    python generate.py --model log/shakespeare --prompt "ROMEO:" --n 2 --max_new_tokens 300
    python generate.py --model gpt2 --prompt "Hello, I'm a language model," "Once upon a time" --temperature 0.8
    python generate.py --file prompts.txt --stop $'\\n\\n' --json True > out.jsonl       one prompt a line; - = stdin

Sample i of a prompt is a function of (model, prompt, seed, i) and of how it is drawn: it depends neither on the other
prompts nor on how many samples there are.
"""

import codecs
import collections
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Literal

import torch

import hf
from kernels.build import KernelError
from kernels.packed import pack
from model import GPT, KVCache
from runtime.command_line import UserError, one_line, parse, run_script
from runtime.device import autocast_dtype, compile_error, pick_device
from tokenizer import EOT, N_VOCAB, gpt2

# --------------------------------------------------------------------------------------------------------------------
# from tokens to tokens


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0  # below 1 sharper, above 1 flatter, 0 always the likeliest token
    top_k: int = 50  # draw among the k likeliest tokens; 0 = all
    top_p: float = (
        1.0  # draw among the likeliest tokens that together have this probability; 1 = all
    )
    seed: int = 42  # same seed, same text


def uniforms(seed: int, n: int, steps: int) -> torch.Tensor:
    """The random numbers in [0, 1) of n samples, (n, steps): each row from a generator of its own, on the CPU."""
    generators = [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63) for i in range(n)]
    return torch.stack([torch.rand(steps, generator=g, dtype=torch.float64) for g in generators])


def draw(logits: torch.Tensor, u: torch.Tensor, how: Sampling) -> torch.Tensor:
    """Next ids (B,) for logits (B, V): where the cumulative distribution passes u (B,).

    One random number a token and row: V numbers for a Gumbel maximum would take longer than the model (0.3 ms a row).
    """
    if how.temperature == 0:
        return logits.argmax(-1)
    ids = None
    if how.top_k or how.top_p < 1:
        logits, ids = logits.topk(
            min(how.top_k or logits.shape[-1], logits.shape[-1])
        )  # likeliest first
    p = (logits.float() / how.temperature).softmax(-1)
    p = p if p.device.type == "mps" else p.double()  # MPS has no doubles
    cdf = p.cumsum(-1)
    total = cdf.masked_fill(cdf - p >= how.top_p, 0).amax(
        -1, keepdim=True
    )  # of those that may be drawn: at least one
    chosen = torch.searchsorted(cdf, u[:, None].to(p) * total, right=True).clamp(
        max=p.shape[-1] - 1
    )
    return (chosen if ids is None else ids.gather(-1, chosen))[:, 0]


def decode(model: GPT, idx: torch.Tensor, cache: KVCache, last: torch.Tensor) -> torch.Tensor:
    """Logits (B, N_VOCAB) of what follows token `last` (B,) of each row of idx (B, T); the cache grows by idx.

    The head is the dearest matrix: it is applied to one token a row. Ids that only pad the vocabulary are left out.
    """
    hidden = model.trunk(idx, cache=cache)  # (B, T, C)
    return model.head(hidden[torch.arange(len(idx), device=idx.device), last])[:, :N_VOCAB]


def prefill(model: GPT, texts: list[list[int]], size: int) -> tuple[KVCache, torch.Tensor]:
    """A cache of `size` tokens with all texts, each in a row, and the logits of what follows them (B, N_VOCAB)."""
    weight = model.wte.weight
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    cache = KVCache(model.config, len(texts), size, weight.device, dtype)
    lengths = torch.tensor([len(text) for text in texts], device=weight.device)
    idx = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(text) for text in texts], batch_first=True
    )  # on the right
    logits = decode(model, idx.to(weight.device), cache, lengths - 1)
    cache.lengths.copy_(lengths)  # what was computed for the padding is written over
    return cache, logits


@torch.no_grad()
def tokens(
    model: GPT,
    prompts: list[list[int]],
    n: int,
    max_new_tokens: int,
    how: Sampling,
    decode: Callable = decode,
) -> Iterator[list[int]]:
    """Yields max_new_tokens times the next id of each of n samples of each prompt (samples of a prompt side by side).

    Prompts have 1 to block_size tokens. A row whose context is full goes on from the last half of it. `decode` may be
    a compiled decode(): apart from prefills it is called with one shape.
    """
    block, half = model.config.block_size, max(1, model.config.block_size // 2)
    texts = [list(prompt) for prompt in prompts for _ in range(n)]
    held = [len(text) for text in texts]  # tokens in each row of the cache
    size = min(block, max(held) + max_new_tokens)
    first, logits = prefill(model, prompts, size)
    source = [i for i in range(len(prompts)) for _ in range(n)]
    cache, logits = (
        KVCache(model.config, len(texts), size, logits.device, first.k.dtype),
        logits[source],
    )
    cache.put(list(range(len(texts))), first, source)
    u, last = (
        uniforms(how.seed, n, max_new_tokens).repeat(len(prompts), 1),
        torch.zeros_like(cache.lengths),
    )
    for t in range(max_new_tokens):
        if t:
            full = [row for row, count in enumerate(held) if count == block]
            if full:
                cache.lengths[full] = (
                    0  # the step for the other rows writes somewhere in these, too
                )
            if len(full) < len(held):
                logits = decode(model, ids[:, None], cache, last)
            if full:
                halves, logits[full] = prefill(model, [texts[row][-half:] for row in full], size)
                cache.put(full, halves, list(range(len(full))))
            held = [half if count == block else count + 1 for count in held]
        ids = draw(logits, u[:, t], how)
        new = ids.tolist()
        for text, token in zip(texts, new):
            text.append(token)
        yield new


# --------------------------------------------------------------------------------------------------------------------
# from tokens to text


class Text:
    """One sample's text as tokens come: add() returns what is certain by now.

    Bytes that are not yet a character wait for the next token, and so does what may become a stop string. Ends at
    <|endoftext|> and at a stop string, which are not part of it; `ended` then says by which.
    """

    def __init__(self, stop: tuple[str, ...] = ()):
        self.stop, self.text, self.waits, self.count, self.ended = stop, "", "", 0, ""
        self.characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        self.count += 1
        if token == EOT:
            return self.end("<|endoftext|>")
        for c in self.characters.decode(gpt2().decode_single_token_bytes(token)):
            self.waits += c
            if found := [s for s in self.stop if self.waits.endswith(s)]:
                self.ended = max(found, key=len)
                return self.release(len(self.waits) - len(self.ended))
        begun = max(
            (k for s in self.stop for k in range(len(s)) if self.waits.endswith(s[:k])), default=0
        )
        return self.release(len(self.waits) - begun)

    def end(self, why: str) -> str:
        """The rest, when no more tokens come."""
        self.ended, self.waits = why, self.waits + self.characters.decode(b"", final=True)
        return self.release(len(self.waits))

    def release(self, n: int) -> str:
        out, self.waits = self.waits[:n], self.waits[n:]
        self.text += out
        return out


def sample_texts(
    model: GPT,
    prompt: str,
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 50,
    seed: int = 42,
    stopped=lambda: False,
) -> list[str]:
    """n continuations of a prompt, prompt included, each up to its first <|endoftext|>. A function of the arguments.

    An empty prompt means the beginning of a document; of one longer than the context the end counts. Ends early once
    stopped() is true.
    """
    ids = (gpt2().encode_ordinary(prompt) or [EOT])[-model.config.block_size :]
    texts = [Text() for _ in range(n)]
    for _ in stream(
        tokens(model, [ids], n, max_new_tokens, Sampling(temperature, top_k, seed=seed)), texts
    ):
        if stopped():
            break
    return [prompt + text.text for text in texts]


def stream(steps: Iterator[list[int]], texts: list[Text]) -> Iterator[list[str]]:
    """Feeds texts with tokens until all have ended, and yields what each step adds to each."""
    for new in steps:
        yield ["" if text.ended else text.add(token) for text, token in zip(texts, new)]
        if all(text.ended for text in texts):
            return
    yield ["" if text.ended else text.end("max_new_tokens") for text in texts]


# --------------------------------------------------------------------------------------------------------------------
# the model


def of_type(model: GPT, dtype: str, device: torch.device, packed: bool = True) -> GPT:
    """The float32 model on a device, with weights of a type: on a CPU packed for decoding, where that can be.

    Raises UserError for int8 where it cannot.
    """
    wanted = torch.int8 if dtype == "int8" else autocast_dtype(device, dtype)
    why = None if wanted == torch.float32 else "torch.compile" if not packed else device.type
    if why == "cpu":
        try:
            return pack(model, wanted)
        except KernelError as e:
            why = str(e)
    if wanted == torch.int8:
        raise UserError(
            f"int8 weights need a CPU and a kernel of packed.cpp, here: {why}; hint: --dtype bfloat16"
        )
    return model.to(device, wanted)


# --------------------------------------------------------------------------------------------------------------------
# the command line


def encode(prompt: str, block_size: int) -> list[int]:
    """Ids of a prompt; an empty one is the beginning of a document. Raises UserError when the model cannot hold it."""
    ids = gpt2().encode_ordinary(prompt) or [EOT]
    if len(ids) > block_size:
        raise UserError(
            f"the prompt {prompt[:20]!r}... has {len(ids)} tokens, the model's context {block_size}; "
            f"hint: shorten it, its last {block_size} tokens are all that a model could see"
        )
    return ids


def read_prompts(file: str) -> list[str]:
    """One prompt a line, empty lines left out; - = stdin. Raises UserError when there is none."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise UserError(
            f"{file} cannot be read ({one_line(e)}); hint: --file takes UTF-8 text, one prompt a line"
        )
    if not (prompts := [line for line in text.splitlines() if line.strip()]):
        raise UserError(f"no prompt in {'stdin' if file == '-' else file}; hint: --prompt TEXT")
    return prompts


def show(pieces: Iterator[list[str]], texts: list[Text], heads: list[str]):
    """Prints all texts, each under its head: the first that has not ended grows, those after it wait for their turn."""
    at = shown = 0
    for _ in pieces:
        while at < len(texts):
            whole = heads[at] + texts[at].text
            print(whole[shown:], end="", flush=True)
            shown = len(whole)
            if not texts[at].ended:
                break
            print()
            at, shown = at + 1, 0


@dataclass(frozen=True)
class Settings(Sampling):
    """Continue texts with a trained model. Without --prompt and --file: prompts come from stdin, or are typed in."""

    model: str = ""  # run directory, checkpoint, Hugging Face GPT-2 name or folder; else the newest run in log/
    prompt: tuple[str, ...] = ()  # texts to go on from; "" is the beginning of a document
    file: str = ""  # prompts, one a line; - = stdin
    n: int = 1  # samples of each prompt
    max_new_tokens: int = 200  # tokens in each at most; <|endoftext|> ends it, too
    stop: tuple[str, ...] = ()  # strings that end a text and are not part of it
    json: bool = False  # one JSON object a sample, when all are done
    # of the weights; bfloat16 and int8 are for speed (int8: on a CPU alone); auto = bfloat16 where the device multiplies it
    dtype: Literal["auto", "bfloat16", "float32", "int8"] = "auto"
    use_compile: bool = False  # torch.compile: minutes of waiting that long texts on a GPU pay back
    device: str = "auto"  # cuda, mps or cpu; auto takes the first of these that is there


def check(args: Settings):
    """Raises UserError with all that is wrong with the settings."""
    rules = (
        ("n", args.n > 0, "above 0"),
        ("max_new_tokens", args.max_new_tokens > 0, "above 0"),
        ("temperature", 0 <= args.temperature < float("inf"), "a number from 0"),
        ("top_k", 0 <= args.top_k <= N_VOCAB, f"0 to {N_VOCAB}"),
        ("top_p", 0 < args.top_p <= 1, "above 0, up to 1"),
        ("stop", "" not in args.stop, "strings of at least one character"),
    )
    wrong = [
        f"{name} is {getattr(args, name)}, must be {rule}; hint: --{name}"
        for name, ok, rule in rules
        if not ok
    ]
    if args.prompt and args.file:
        wrong.append(f"prompts on the command line and in {args.file}; hint: give one")
    if wrong:
        raise UserError("; ".join(wrong))


def prepare(args: Settings, where: str) -> tuple[GPT, Callable]:
    """The model of the wanted type on its device, and its decode(). Raises UserError for what cannot be."""
    device = pick_device(args.device)
    gpt = hf.load(where).eval()
    if gpt.config.vocab_size < N_VOCAB:
        raise UserError(
            f"{where} knows {gpt.config.vocab_size} tokens, GPT-2's tokenizer has {N_VOCAB}; "
            "hint: a model trained with --vocab_size 50304"
        )
    gpt = of_type(gpt, args.dtype, device, packed=not args.use_compile)
    if args.use_compile and (why := compile_error(device)):
        raise UserError(f"torch.compile does not work here ({why}); hint: --use_compile False")
    print(
        f"model | {where} | {gpt.num_params():,} parameters",
        flush=True,
        file=sys.stderr if args.json else sys.stdout,
    )
    return gpt, torch.compile(decode, fullgraph=True, dynamic=False) if args.use_compile else decode


def answer(args: Settings, gpt: GPT, step: Callable, prompts: list[str]):
    """All samples of the prompts on stdout, then tokens per second, prefill included (with --json on stderr)."""
    ids = [encode(prompt, gpt.config.block_size) for prompt in prompts]
    whose = [prompt for prompt in prompts for _ in range(args.n)]
    texts, t0 = [Text(args.stop) for _ in whose], time.perf_counter()
    pieces = stream(tokens(gpt, ids, args.n, args.max_new_tokens, args, step), texts)
    if args.json:
        collections.deque(pieces, maxlen=0)
        for i, (prompt, text) in enumerate(zip(whose, texts)):
            print(
                json.dumps(
                    dict(
                        prompt=prompt,
                        sample=i % args.n,
                        text=text.text,
                        tokens=text.count,
                        ended=text.ended,
                    )
                )
            )
    else:
        show(pieces, texts, ["-" * 80 + f"\n{prompt}" for prompt in whose])
    total, seconds = sum(text.count for text in texts), time.perf_counter() - t0
    print(
        f"speed | {total} tokens in {seconds:.2f} s | {total / seconds:.1f} tok/s",
        flush=True,
        file=sys.stderr if args.json else sys.stdout,
    )


def main():
    args = parse(Settings)
    check(args)
    typed = not (args.prompt or args.file) and sys.stdin.isatty()
    prompts = [] if typed else list(args.prompt) or read_prompts(args.file or "-")
    gpt, step = prepare(args, args.model or hf.newest_run())
    try:
        if not typed:
            return answer(args, gpt, step, prompts)
        while True:
            try:
                answer(args, gpt, step, [input("prompt> ")])
            except UserError as e:  # too long: the next one may not be
                print(f"error: {e}", file=sys.stderr)
    except (EOFError, KeyboardInterrupt):  # Ctrl-D, Ctrl-C
        print()
    except (
        BrokenPipeError
    ):  # the reader of a pipe has seen enough; nothing is left to flush at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_script(main)
