"""HellaSwag: packed rows against one item at a time."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import hellaswag
from bench.common import REPO, Common, Side, Type, alternate, report, speedup
from runtime.command_line import PathText, UserError
from runtime.device import Compute, choose_compute, keep_freed_memory, pick_device
from runtime.world import World

BASELINE = "baseline loop"


@dataclass(frozen=True)
class HellaSwagPart(Common):
    """Time HellaSwag, gpt2 protocol, and count where the two sides choose differently.

    The baseline loop scores one item at a time: four padded rows, all logits.
    """

    model: PathText = (
        ""  # run directory, checkpoint, or Hugging Face GPT-2; random weights if not given
    )
    data: PathText = str(hellaswag.DATA)  # jsonl or jsonl.gz
    items: int = 100  # spread over the set, the same ones in each call
    rounds: int = 3  # calls of each side
    dtype: Type = "auto"  # of the matmuls; auto = bfloat16 where the device has it

    def measure(self) -> dict:
        """Score the same items with the same weights on both sides."""
        self.refuse_below_1("items", "rounds")
        if not Path(self.data).exists():
            raise UserError(
                f"no such file: {self.data}; hint: --data FILE (python hellaswag.py fetches it)"
            )
        device = pick_device(self.device)
        if device.type == "cpu":
            keep_freed_memory()
        compute = choose_compute(device, self.dtype, use_compile=device.type == "cuda")
        model = self.load_model(self.model).to(device)
        items = hellaswag.load_items(Path(self.data), "gpt2", self.items)
        packed = hellaswag.HellaSwag(items, model, World(0, 1, device), compute)
        n = len(items.labels)
        sides = {
            REPO: Side(packed.losses, n),
            BASELINE: Side(lambda: baseline_losses(model, items, compute), n),
        }
        alternate(sides, 1, self.rounds)
        speeds = report("HellaSwag", "items/s", sides)
        repo, baseline = sides[REPO], sides[BASELINE]
        result = {"ratio": speedup(repo, baseline)} | speeds
        if repo.fits and baseline.fits:
            losses = {BASELINE: baseline.result}
            if compute.dtype != torch.float32:  # says how much of a difference is rounding
                in_float32 = Compute(device, torch.float32, compiled=False)
                losses["float32"] = baseline_losses(model, items, in_float32)
            result |= agreement(repo.result, losses, items.divisors.reshape(-1, 4))
        return result | self.used()


@torch.no_grad()
def baseline_losses(model, items: hellaswag.Items, compute: Compute) -> np.ndarray:
    """Return the summed loss of each ending, (n, 4), as build-nanogpt and its followers get it."""
    lengths = items.lengths.sum(1)
    starts = lengths.cumsum() - lengths
    losses = []
    for first in range(0, len(lengths), 4):
        T = lengths[first : first + 4].max()
        idx = torch.zeros(4, T, dtype=torch.long)
        scored = torch.zeros(4, T)
        for row, text in enumerate(range(first, first + 4)):
            start, n = starts[text], lengths[text]
            idx[row, :n] = torch.from_numpy(items.tokens[start : start + n].astype(np.int64))
            scored[row, items.lengths[text, 0] : n] = 1
        idx = idx.to(compute.device)
        scored = scored.to(compute.device)
        with compute.autocast():
            logits = model(idx)  # (4, T, V)
        predictions = logits[:, :-1].float().flatten(0, 1)
        nats = F.cross_entropy(predictions, idx[:, 1:].flatten(), reduction="none")
        losses.append((nats.view(4, -1) * scored[:, 1:]).sum(1).tolist())
    return np.array(losses)


def agreement(ours: np.ndarray, others: dict[str, np.ndarray], tokens: np.ndarray) -> dict:
    """Count and print the items for which sides choose differently, and the largest difference."""
    counts = {"other_choices": other_choices(ours, others[BASELINE], tokens)}
    if "float32" in others:
        counts["other_than_float32"] = other_choices(ours, others["float32"], tokens)
        between_others = other_choices(others[BASELINE], others["float32"], tokens)
        counts["baseline_other_than_float32"] = between_others
    difference = np.abs(ours - others[BASELINE]).max().item()
    listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
    print(f"largest difference of a loss {difference:.1e}; of {len(ours)} items, {listed}")
    return counts | {"largest_difference": difference}


def other_choices(a: np.ndarray, b: np.ndarray, tokens: np.ndarray) -> int:
    """Count the items (n, 4) for which two sets of losses choose differently, by sum or per token.

    Margins below 1e-5 in b do not count.
    """
    differ = np.zeros(len(a), bool)
    for x, y in ((a, b), (a / tokens, b / tokens)):
        best = np.sort(y, 1)
        differ |= (x.argmin(1) != y.argmin(1)) & (best[:, 1] - best[:, 0] > 1e-5)
    return int(differ.sum())
