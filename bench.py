"""Side-by-side measurements: this project against the usual way of doing the same thing, in one process.

    python bench.py step                                one training step, GPT-2 (124M), B = 4, T = 1024
    python bench.py step --size tiny --steps 20         in seconds
    python bench.py step --B 32 --device cuda

The two sides take turns (A B A B), so that whatever else the machine does meets both: the ratio travels, the absolute
figures are this machine's at this hour. Each part prints a table, then one line of JSON with `ratio`, above 1 when this
project is the faster one.
"""

import dataclasses
import json
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Callable, Literal

import torch
import tyro

import optim
from config import UserError, command_line
from distributed import autocast_dtype, compile_error, keep_freed_memory, pick_device
from model import GPT, GPTConfig
from runlog import environment

SIZES = {  # n_layer, n_head, n_embd
    "tiny": (2, 2, 64),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


# --------------------------------------------------------------------------------------------------------------------
# step: one training step


@dataclass(frozen=True)
class Step:
    """One training step against transformers.GPT2LMHeadModel: forward, backward, clip, fused AdamW, zero_grad."""

    size: Literal["tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"  # of both models
    B: int = 4  # sequences in the batch
    T: int = 1024  # tokens in a sequence
    vocab_size: int = 50304  # embedding rows of both models
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matmuls; auto = bfloat16 where the device has it
    steps: int = 10  # timed steps of each side
    warmup: int = 2  # steps of each side before the clock; the first one compiles
    device: str = "auto"  # cuda, mps or cpu; auto takes the first of these that is there
    use_compile: bool = True  # this project's model compiled, as in training; transformers runs as it comes
    use_rope: bool = False  # this project's model with rotary positions; the baseline keeps its table
    use_swiglu: bool = False  # this project's model with the gated MLP; the baseline keeps GELU


def step(args: Step) -> dict:
    """Both models on one random batch, with the same autocast, clipping and optimiser, and without dropout."""
    if wrong := [k for k in ("B", "T", "vocab_size", "steps", "warmup") if getattr(args, k) < 1]:
        raise UserError("; ".join(f"{k} is {getattr(args, k)}, must be at least 1" for k in wrong)
                        + f"; hint: --{wrong[0]} 1")
    device = pick_device(args.device)
    dtype = autocast_dtype(device, args.dtype)
    if device.type == "cpu":
        keep_freed_memory()  # as in training, and to the good of both sides
    if args.use_compile and (why := compile_error(device)):
        raise UserError(f"torch.compile does not work here ({why}); hint: install g++, or --use_compile False")
    shape = dict(zip(("n_layer", "n_head", "n_embd"), SIZES[args.size]), vocab_size=args.vocab_size)
    torch.manual_seed(42)
    ids = torch.randint(args.vocab_size, (args.B, args.T + 1), device=device)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()  # (B, T) each
    ours = GPT(GPTConfig(args.T, use_rope=args.use_rope, use_swiglu=args.use_swiglu, **shape)).to(device)
    compiled = torch.compile(ours, fullgraph=True, dynamic=False) if args.use_compile else ours
    theirs = transformers_gpt2(args.T, shape).to(device)

    def training_step(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> Callable[[], float]:
        optimizer = optim.adamw(model, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)

        def run() -> float:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = forward()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()  # waits for the device, on both sides

        return run

    # transformers shifts the labels itself, which leaves it one target less in each sequence
    ms, losses = take_turns({"ours": training_step(ours, lambda: compiled(x, y)),
                             "transformers": training_step(theirs, lambda: theirs(input_ids=x, labels=x).loss)},
                            args.warmup, args.steps)
    tok_s = {side: 1e3 * args.B * args.T / statistics.median(values) for side, values in ms.items()}
    print(f"\n{'one training step':20}{'tok/s':>10}{'median ms':>12}{'min':>10}{'max':>10}{'last loss':>12}")
    for side, values in ms.items():
        print(f"{side:20}{tok_s[side]:10,.0f}{statistics.median(values):12,.1f}{min(values):10,.1f}{max(values):10,.1f}"
              f"{losses[side]:12.4f}")
    used = dict(device=environment(device, 1)["device"], dtype=str(dtype).removeprefix("torch."))
    return dict(ratio=tok_s["ours"] / tok_s["transformers"], tok_s=tok_s["ours"], baseline_tok_s=tok_s["transformers"],
                ours_ms=ms["ours"], baseline_ms=ms["transformers"], **dataclasses.asdict(args) | used)


def transformers_gpt2(T: int, shape: dict) -> torch.nn.Module:
    """transformers' GPT-2 at its best: no dropout (the default 0.1 makes it several times slower), SDPA, no cache."""
    import transformers

    transformers.logging.set_verbosity_error()  # it warns about its own defaults
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_positions=T, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa", use_cache=False,
        **shape)).train()


# --------------------------------------------------------------------------------------------------------------------
# what all parts share


def take_turns(sides: dict[str, Callable], warmup: int, rounds: int) -> tuple[dict[str, list[float]], dict]:
    """Milliseconds of each side's calls, A B A B, after warm-up, and what each returned last.

    A call must not return before the device has done its work.
    """
    for side, run in sides.items():
        t0 = time.perf_counter()
        for _ in range(warmup):
            run()
        print(f"warm-up | {side} | {time.perf_counter() - t0:.1f} s", flush=True)
    ms, last = {side: [] for side in sides}, {}
    for _ in range(rounds):
        for side, run in sides.items():
            t0 = time.perf_counter()
            last[side] = run()
            ms[side].append(round(1e3 * (time.perf_counter() - t0), 3))
    return ms, last


PARTS = {"step": (Step, step)}


def main():
    settings = {name: kind for name, (kind, _) in PARTS.items()}
    args = tyro.extras.subcommand_cli_from_dict(settings, description=__doc__.split("\n")[0], use_underscores=True,
                                                config=(tyro.conf.FlagConversionOff,))
    part, run = next((name, run) for name, (kind, run) in PARTS.items() if kind is type(args))
    print(json.dumps(dict(part=part, **run(args), torch=torch.__version__, transformers=version("transformers"),
                          threads=torch.get_num_threads())))


if __name__ == "__main__":
    command_line(main)
