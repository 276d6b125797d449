"""Which presets are better, by how much, and is that more than chance? At a size that two CPU cores can train.

    python prepare.py files edu_docs.jsonl.gz --out data/edu --shard_tokens 100000    or any other shards
    python study.py --data_root data/edu                                              all runs, the table, the picture
    python study.py --data_root data/edu --stage sweep                                learning rates alone

Each run is train_gpt2.py in a process of its own, in LOG_DIR/NAME: a finished one is skipped, an interrupted one goes on. So
the study can be stopped by Ctrl-C or SIGTERM at any time, and goes on by the same command; also from the runs on record, after
`cp -r log/reference/study log/study`. On a GPU when there is one.

13 layers, 256 wide: 10.2M parameters beside the embedding. 128 steps of 8,192 tokens, 1.05M tokens a run; modern gets half
the steps, under a schedule of its own. Learning rates: three values each, and further ones while the best is at an edge
(AdamW's begin below 2e-3, where the loss has spikes). Then three seeds (of weights and data order) at the best rate, and with
one seed the published steps on the way from gpt2-baseline to gpt2-swiglu. All batches come from the global permutation, but
for the three runs that are about the order. AdamW warms up for 6 steps everywhere: in proportion to the presets it would be
1 to 4.
"""

import json
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

from runtime.command_line import UserError, run_script

SHAPE = dict(
    n_layer=13,
    n_embd=256,
    n_head=4,
    T=256,
    B=8,
    total_batch=8192,
    data_order="global",
    val_tokens=65536,
    eval_interval=64,
    save_interval=16,
    keep_last=1,
    hellaswag_limit=200,
    n_samples=0,
    wandb="off",
)
SWEEPS = {
    "gpt2-modern": (0.0125, 0.025, 0.05),
    "gpt2-baseline": (5e-4, 1e-3, 2e-3),
    "gpt2-rope": (5e-4, 1e-3, 2e-3),
}
SEEDS = (1, 2, 3)


class Run(NamedTuple):
    preset: str
    lr: float
    seed: int = SEEDS[0]
    order: str = "global"

    @property
    def name(self) -> str:
        return f"{self.preset}-{self.lr:.3g}-seed{self.seed}"

    def settings(self, steps: int) -> dict:
        """What the run has beside its preset. Muon: embedding and head keep their rates' relation to that of the matrices."""
        own = dict(max_steps=steps, warmup_steps=steps * 6 // 128)
        if self.preset == "gpt2-modern":  # heads of 128, as in the preset
            own = dict(
                max_steps=steps // 2, n_head=2, embed_lr=28 * self.lr, head_lr=0.16 * self.lr
            )
        return (
            SHAPE
            | own
            | dict(max_lr=self.lr, seed=self.seed, data_seed=self.seed, data_order=self.order)
        )


@dataclass(frozen=True)
class Study:
    """Runs of the presets at a small size, one after the other; then their table and picture."""

    data_root: str  # directory of token shards (prepare.py)
    log_dir: str = "log/study"  # parent of the run directories
    stage: Literal["all", "sweep"] = "all"  # sweep: the learning rates alone
    steps: int = 128  # of each run; modern takes half of them
    device: str = "auto"  # cuda, mps or cpu; auto takes the first of these that is there


def train(run: Run, args: Study) -> float:
    """The last validation loss of a run: trained now, or from where it stopped, unless it is finished."""
    done = Path(args.log_dir, run.name, "finished.json")
    if not done.exists():
        settings = run.settings(args.steps) | dict(
            run_name=run.name, log_dir=args.log_dir, data_root=args.data_root, device=args.device
        )
        command = [
            str(Path(__file__).with_name("train_gpt2.py")),
            run.preset,
            *(str(x) for name, value in settings.items() for x in (f"--{name}", value)),
        ]
        print("$ python", shlex.join(command), flush=True)
        process = subprocess.Popen([sys.executable, *command])
        for number in (signal.SIGINT, signal.SIGTERM):  # the run saves, and we wait for it
            signal.signal(number, lambda *_: process.terminate())
        if process.wait() or not done.exists():
            raise UserError(
                f"{run.name} ended with status {process.returncode}; hint: the same command again goes on with it"
            )
    return json.loads(done.read_text())["val_loss"]


def sweep(preset: str, args: Study) -> dict[float, float]:
    """Learning rates and their losses, the best one first. It is no edge: half of it and twice as much are among them."""
    losses = {lr: train(Run(preset, lr), args) for lr in SWEEPS[preset]}
    while (best := min(losses, key=losses.get)) in (min(losses), max(losses)):
        beyond = best / 2 if best == min(losses) else best * 2
        losses[beyond] = train(Run(preset, beyond), args)
    losses = dict(sorted(losses.items(), key=lambda pair: pair[1]))
    print(
        f"study | {preset} | " + ", ".join(f"lr {lr:g}: {loss:.4f}" for lr, loss in losses.items()),
        flush=True,
    )
    return losses


def ladder(baseline: float, rope: float) -> list[Run]:
    """The published steps: a careful learning rate, in the order of the files; documents shuffled; three times that rate;
    SwiGLU at its share of RoPE's rate. (The global permutation and RoPE are among the tuned runs.)
    """
    return [
        Run("gpt2-baseline", baseline / 3, order="sequential"),
        Run("gpt2-periodicity-fix", baseline / 3, order="documents"),
        Run("gpt2-lr-inc", baseline, order="documents"),
        Run("gpt2-swiglu", rope * 1.5 / 1.8),
    ]


def main(args: Study):
    if args.steps < 2:
        raise UserError(
            f"steps is {args.steps}, must be at least 2: modern takes half of them; hint: --steps 128"
        )
    best, runs = {}, []

    def add(more: list[Run]):
        for run in more:
            train(run, args)
        runs.extend(more)

    for preset in (
        SWEEPS
    ):  # all tuned runs of a preset before the next preset: a stopped study has whole rows
        losses = sweep(preset, args)
        best[preset] = next(iter(losses))
        runs += [Run(preset, lr) for lr in losses]
        if args.stage == "all":
            add([Run(preset, best[preset], seed) for seed in SEEDS[1:]])
    if args.stage == "all":
        add(ladder(best["gpt2-baseline"], best["gpt2-rope"]))
    runs.sort(
        key=lambda run: run[:2] != ("gpt2-baseline", best["gpt2-baseline"])
    )  # the others are compared with the first
    import compare

    compare.main(
        tuple(str(Path(args.log_dir, run.name)) for run in runs),
        x="tokens",
        out=str(Path(args.log_dir, "compare.png")),
    )


if __name__ == "__main__":
    run_script(
        lambda: main(tyro.cli(Study, use_underscores=True, config=(tyro.conf.FlagConversionOff,)))
    )
