"""Greedy decoding with a KV cache against transformers.generate, in several types of weights."""

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

import generate
from bench.common import REPO, Common, Side, alternate, report, speedup
from bench.transformers_gpt2 import as_transformers
from kernels.build import KernelError
from kernels.packed import pack
from model import GPT
from runtime.command_line import PathText, UserError
from runtime.device import autocast_dtype, pick_device
from tokenizer import N_VOCAB

TYPES = ("float32", "bfloat16")  # and, on a CPU, int8


@dataclass(frozen=True)
class GeneratePart(Common):
    """Time greedy decoding, prefill included, against transformers.generate.

    Each side in all its types of weights; on a CPU this repository also has int8, for one row.
    """

    # run directory, checkpoint, or Hugging Face GPT-2, with learned positions; random weights if
    # not given
    model: PathText = ""
    batches: tuple[int, ...] = (1, 16)  # rows decoded together
    # of transformers' weights and cache; default: float32, and bfloat16 where the device multiplies
    # it (elsewhere it is five times as slow). This repository always has both
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ()
    prompt_tokens: int = 16  # in each row, random
    new_tokens: int = 128  # in each row
    rounds: int = 3  # calls of each side
    # this repository's decoding step compiled, without packed weights; transformers is not compiled
    use_compile: bool = False

    @torch.no_grad()
    def measure(self) -> dict:
        """Return tokens per second, their ratios, and the floor: weights read once per token."""
        self.refuse_below_1("prompt_tokens", "new_tokens", "rounds", "batches")
        device = pick_device(self.device)
        model = self.load_model(self.model)
        models = self.in_all_types(model, device)
        read_speed = memory_speed(device)
        # all but the look-up in wpe; the embedding counts, because it is the head, too
        weights = model.num_params() - model.wpe.weight.numel()
        all_sides, ratios, same, floors, shares = {}, {}, {}, {}, {}
        for B in self.batches:
            sides = self.measure_batch(models, B, device)
            ratios |= ratios_of(sides, B)
            same[f"batch {B}"] = same_tokens(sides)
            for name, side in sides.items():
                key = f"{name}, batch {B}"
                all_sides[key] = side
                weight_bytes = weights * getattr(torch, name.split()[-1]).itemsize
                floors[key] = B * read_speed / weight_bytes
                shares[key] = f"{side.rate / floors[key]:.0%}"
        columns = {"floor": {key: f"{floor:,.1f}" for key, floor in floors.items()}}
        speeds = report("generation", "tok/s", all_sides, columns | {"share": shares})
        print(f"floor: weights read once per token at {read_speed / 1e9:.1f} GB/s, measured")
        known = [ratio for ratio in ratios.values() if ratio is not None]
        figures = {
            "deviation": deviations(model, models, device),
            "same_tokens": same,
            "floor_tok_s": floors,
            "read_gb_s": read_speed / 1e9,
        }
        return {"ratio": min(known, default=None)} | ratios | figures | speeds | self.used()

    def in_all_types(self, model: GPT, device: torch.device) -> dict[str, torch.nn.Module]:
        """Return the models of both sides, named by side and type of the weights."""
        packed = device.type == "cpu" and not self.use_compile
        has_bfloat16 = autocast_dtype(device, "auto") == torch.bfloat16
        baseline = as_transformers(model)
        models = {}
        for name in (*TYPES, "int8") if packed else TYPES:
            models[f"{REPO} {name}"] = in_type(model, name, device, packed)
        for name in self.dtypes or (TYPES if has_bfloat16 else ("float32",)):
            models[f"transformers {name}"] = in_type(baseline, name, device)
        return models

    def measure_batch(self, models: dict, B: int, device: torch.device) -> dict[str, Side]:
        """Time all sides on one batch of B rows."""
        step = generate.decode
        if self.use_compile:
            step = torch.compile(step, fullgraph=True, dynamic=False)
        ids = torch.randint(N_VOCAB, (B, self.prompt_tokens), device=device)
        sides = {}
        for name, model in models.items():
            if B == 1 or not name.endswith("int8"):
                continuation(model, ids, self.new_tokens, step, steps=3)  # warms up, compiles
                run = partial(continuation, model, ids, self.new_tokens, step)
                sides[name] = Side(run, B * self.new_tokens)
        alternate(sides, 0, self.rounds)
        return sides


def ratios_of(sides: dict[str, Side], B: int) -> dict[str, float | None]:
    """Compare both programs' fastest types without int8, and int8 with transformers' fastest."""
    fastest = {}
    for program in (REPO, "transformers"):
        types = [sides[f"{program} {t}"] for t in TYPES if f"{program} {t}" in sides]
        fastest[program] = min(types, key=lambda side: side.median)
    ratios = {f"batch{B}_ratio": speedup(fastest[REPO], fastest["transformers"])}
    if f"{REPO} int8" in sides:
        ratios["int8_ratio"] = speedup(sides[f"{REPO} int8"], fastest["transformers"])
    return ratios


def same_tokens(sides: dict[str, Side]) -> float | None:
    """Return the share of tokens on which both programs agree in float32."""
    both = [sides.get(f"{program} float32") for program in (REPO, "transformers")]
    if not all(side and side.fits for side in both):
        return None
    repo, baseline = (torch.tensor(side.result) for side in both)
    return (repo == baseline).float().mean().item()


def in_type(model, name: str, device: torch.device, packed: bool = False) -> torch.nn.Module:
    """Return a copy of a model on the device with weights of a type.

    Packed, as generate.py has them on a CPU. Raises UserError where the kernel does not work.
    """
    dtype = getattr(torch, name)
    if not packed or dtype == torch.float32:
        return copy.deepcopy(model).to(device, dtype)
    try:
        return pack(copy.deepcopy(model), dtype)
    except KernelError as e:
        raise UserError(f"packed.cpp does not work here ({e}); hint: install g++") from e


def continuation(
    model, ids: torch.Tensor, new_tokens: int, step: Callable, steps: int = 0
) -> list[list[int]]:
    """Return the greedy tokens that follow ids (B, T), a list per step; `steps`: only the first."""
    steps = steps or new_tokens
    if isinstance(model, GPT):
        greedy = generate.Sampling(temperature=0)
        tokens = generate.tokens(model, ids.tolist(), 1, new_tokens, greedy, step)
        return list(itertools.islice(tokens, steps))
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        max_new_tokens=steps,
        min_new_tokens=steps,
    )
    return out[:, ids.shape[1] :].t().tolist()


def memory_speed(device: torch.device) -> float:
    """Return the bytes per second at which memory is read: the best of ten sums of 512 MB."""
    numbers = torch.ones(2**27, device=device)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        numbers.sum().item()
        seconds.append(time.perf_counter() - started)
    return numbers.nbytes / min(seconds)


def deviations(model: GPT, models: dict, device: torch.device) -> dict:
    """Compare each of this repository's types with float32, on one text of random tokens.

    The largest difference of a logit beside the logits' standard deviation, and the share of
    positions where both prefer the same token.
    """
    T = min(512, model.config.block_size)
    ids = torch.randint(N_VOCAB, (1, T), device=device)
    expected = model.to(device)(ids)[..., :N_VOCAB]
    result = {}
    for name in ("bfloat16", "int8"):
        if f"{REPO} {name}" in models:
            logits = models[f"{REPO} {name}"](ids)[..., :N_VOCAB].float()
            result[name] = {
                "largest": (logits - expected).abs().max().item(),
                "std": expected.std().item(),
                "same_token": (logits.argmax(-1) == expected.argmax(-1)).float().mean().item(),
            }
    return result
