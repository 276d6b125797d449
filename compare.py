"""Runs side by side: one table and one picture. `python compare.py RUN...`

Runs that differ in their seeds alone are one group: mean and standard deviation. One standard deviation of this comparison,
s, is that of a run within its group, pooled over all groups of two runs and more. Two groups whose means are within 2 s of
each other show no difference.
"""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from config import FREE_ON_RESUME, TrainConfig
from runtime.command_line import UserError, one_line, parse, run_script, say
from runtime.runlog import read_metrics

# Okabe and Ito 2008: told apart with any colour vision. A preset has its colour in every picture; its T = 2048 is dashed.
COLOURS = {
    "gpt2-baseline": "#E69F00",
    "gpt2-periodicity-fix": "#CC79A7",
    "gpt2-lr-inc": "#999999",
    "gpt2-global-datafix": "#56B4E9",
    "gpt2-rope": "#0072B2",
    "gpt2-swiglu": "#009E73",
    "gpt2-modern": "#D55E00",
    "shakespeare": "#000000",
}
OTHER = "#555555"
AXES = {
    "step": "step (optimiser updates)",
    "tokens": "training tokens (millions)",
    "time": "training time (minutes, steps alone)",
}


@dataclasses.dataclass
class Run:
    """What a run directory holds."""

    name: str
    cfg: dict  # config.json
    train: np.ndarray  # (n, 2): x, training loss
    val: np.ndarray  # (m, 2): x, validation loss
    last: dict  # the last evaluation
    tok_s: float  # median of the steps

    @property
    def tokens(self) -> int:
        return self.last["step"] * self.cfg["total_batch"]


def read(run_dir: str, x: str) -> Run:
    """Raises UserError for a directory without a run, or a run without an evaluation."""
    try:
        cfg = dataclasses.asdict(TrainConfig()) | json.loads(
            Path(run_dir, "config.json").read_text()
        )
        records = read_metrics(Path(run_dir))
    except (OSError, ValueError) as e:
        raise UserError(
            f"{run_dir} is not a run ({one_line(e)}); hint: a directory in log/ with config.json and metrics.jsonl"
        )
    steps = [r for r in records if r.get("train/loss") is not None]
    evaluations = [r for r in records if "val/loss" in r]
    if not steps or not evaluations:
        raise UserError(
            f"{run_dir} has {len(steps)} steps and {len(evaluations)} evaluations so far; hint: at least one of each"
        )
    minutes = np.cumsum([0.0, *(r["dt_ms"] / 60e3 for r in steps)])
    at = {
        "step": lambda step: step,
        "tokens": lambda step: step * cfg["total_batch"] / 1e6,
        "time": lambda step: np.interp(step, [0, *(r["step"] for r in steps)], minutes),
    }[x]
    points = lambda rows, key: np.array([(at(r["step"]), r[key]) for r in rows], float)
    return Run(
        Path(run_dir).name,
        cfg,
        points(steps, "train/loss"),
        points(evaluations, "val/loss"),
        evaluations[-1],
        statistics.median(r["tok_s"] for r in steps),
    )


def grouped(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs with the same decisive settings but for the seeds, under their preset's name and what tells them from others."""
    decisive = [
        f.name
        for f in dataclasses.fields(TrainConfig)
        if f.name not in FREE_ON_RESUME | {"seed", "data_seed"}
    ]
    key = lambda run: json.dumps([run.cfg[name] for name in decisive])
    groups = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    named = {}
    for group in groups.values():
        cfg, siblings = (
            group[0].cfg,
            [g[0].cfg for g in groups.values() if g[0].cfg["preset"] == group[0].cfg["preset"]],
        )
        derived = (
            {"min_lr", "embed_lr", "head_lr"} if len({s["max_lr"] for s in siblings}) > 1 else set()
        )
        differ = [n for n in decisive if n not in derived and any(s[n] != cfg[n] for s in siblings)]
        shown = (
            f"{n} {cfg[n]:.3g}" if isinstance(cfg[n], float) else f"{n} {cfg[n]}" for n in differ
        )
        named[" ".join([cfg["preset"], *shown])] = group
    return named


def losses(group: list[Run]) -> list[float]:
    return [run.last["val/loss"] for run in group]


def pooled(groups: list[list[Run]]) -> float | None:
    """Standard deviation of one run's final loss within its group; None where no group has two."""
    several = [losses(g) for g in groups if len(g) > 1]
    if not several:
        return None
    return (
        sum(statistics.variance(g) * (len(g) - 1) for g in several)
        / sum(len(g) - 1 for g in several)
    ) ** 0.5


def table(groups: dict[str, list[Run]], s: float | None) -> str:
    """Markdown: final values of each group, and its distance to the first."""
    first, rows = statistics.mean(losses(next(iter(groups.values())))), []
    for name, group in groups.items():
        mean, n = statistics.mean(losses(group)), len(group)
        spread = f" ± {statistics.stdev(losses(group)):.4f}" if n > 1 else ""
        hella = [run.last for run in group if run.last.get("val/hella_norm") is not None]
        # the items are the same ones for all seeds: their standard error does not shrink with seeds
        score = (
            f"{statistics.mean(r['val/hella_norm'] for r in hella):.4f} ± {statistics.mean(r['val/hella_se'] for r in hella):.4f}"
            if hella
            else "-"
        )
        away = (
            ""
            if not rows
            else f"{mean - first:+.4f}"
            + (
                " (one seed each)"
                if s is None
                else " no difference"
                if abs(mean - first) <= 2 * s
                else f" ({abs(mean - first) / s:.1f} s)"
                if s
                else ""
            )
        )
        rows.append(
            f"| {name} | {n if n > 1 else 'one'} | {group[0].tokens:,} | {mean:.4f}{spread} | {away} | {score} | "
            f"{statistics.median(run.tok_s for run in group):,.0f} |"
        )
    head = "| run | seeds | tokens | val loss, final (mean ± sd) | to the first | HellaSwag ± se | tok/s |\n|---|---|---|---|---|---|---|"
    return "\n".join([head, *rows])


def outside(run: Run, reference: Run, s: float | None, band: float) -> str | None:
    """Where a run's validation loss first leaves the band of a reference run: its loss at the same x, interpolated, give or
    take `band` of it, or 2 s where that is more. None where it stays inside.
    """
    for x, loss in run.val:
        if x <= reference.val[-1, 0]:
            expected = np.interp(x, *reference.val.T)
            if not abs(loss - expected) <= (
                width := max(band * expected, 2 * (s or 0))
            ):  # no number is outside, too
                return f"{run.name} leaves the band of {reference.name}: {loss:.4f} at {x:g}, expected {expected:.4f} ± {width:.4f}"
    return None


def picture(groups: dict[str, list[Run]], x: str, out: str):
    """Left: training loss, smoothed, and validation loss, the mean over seeds. Right: final losses, seed by seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(
        1, 2, figsize=(13, 5), width_ratios=(3, 2), layout="constrained"
    )
    for row, (name, group) in enumerate(groups.items()):
        preset = group[0].cfg["preset"]
        style = dict(
            color=COLOURS.get(preset.removesuffix("-t2048"), OTHER),
            linestyle="--" if preset.endswith("-t2048") else "-",
        )
        for run in group:
            n = max(1, len(run.train) // 25)
            smooth = np.convolve(run.train[:, 1], np.ones(n) / n, "valid")
            left.plot(run.train[n - 1 :, 0], smooth, **style, linewidth=0.7, alpha=0.5)
            right.plot(
                run.last["val/loss"], row, "o", color=style["color"], markersize=5, alpha=0.7
            )
        m = min(len(run.val) for run in group)
        left.plot(
            group[0].val[:m, 0],
            np.mean([run.val[:m, 1] for run in group], axis=0),
            **style,
            marker="o",
            markersize=3,
            label=name,
        )
        right.plot(
            [statistics.mean(losses(group))] * 2,
            [row - 0.35, row + 0.35],
            color=style["color"],
            linewidth=2,
        )
    final = [loss for group in groups.values() for loss in losses(group)]
    left.set(
        xlabel=AXES[x],
        ylabel="loss (nats per token)",
        ylim=(min(final) - 0.2, min(final) + 3),
        title="validation loss (points), training loss (thin)",
    )
    left.legend(frameon=False, fontsize=7)
    right.set(
        xlabel="final validation loss (nats per token)",
        yticks=range(len(groups)),
        title="each seed, and the mean (bar)",
    )
    right.set_yticklabels(list(groups), fontsize=7)
    right.invert_yaxis()
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    fig.savefig(out, dpi=150)
    plt.close(fig)


def curves(run_dir: Path):
    """Draw curves.png from metrics.jsonl: training and validation loss, HellaSwag when it was measured."""
    from matplotlib.figure import Figure

    records = read_metrics(run_dir)
    points = lambda key: [(r["step"], r[key]) for r in records if r.get(key) is not None]
    train, val, hella, bigram = (
        points("train/loss"),
        points("val/loss"),
        points("val/hella_norm"),
        points("val/bigram"),
    )
    fig = Figure(figsize=(11 if hella else 7, 4), layout="constrained")
    axes = fig.subplots(1, 2 if hella else 1, squeeze=False)
    left = axes[0][0]
    if train:
        left.plot(*zip(*train), color="#9ecae1", linewidth=1, label="training, one batch each")
    if val:
        left.plot(
            *zip(*val),
            "o-",
            color="#08519c",
            markersize=3,
            label=f"validation, last {val[-1][1]:.4f}",
        )
    if bigram:
        left.axhline(
            bigram[-1][1],
            color="#d95f0e",
            linestyle="--",
            linewidth=1,
            label=f"bigram model {bigram[-1][1]:.4f}",
        )
    low = min(v for _, v in train + val) if train + val else 0
    high = max(v for _, v in train + val) if train + val else 1
    left.set(
        title=Path(run_dir).name,
        xlabel="step (optimiser updates)",
        ylabel="loss (nats per token)",
        ylim=(low - 0.1, min(high, low + 3.5) + 0.1),
    )
    left.legend(frameon=False)
    if hella:
        axes[0][1].plot(*zip(*hella), "o-", color="#08519c", markersize=3)
        axes[0][1].axhline(
            0.294463,
            color="#d95f0e",
            linestyle="--",
            linewidth=1,
            label="OpenAI GPT-2 124M, 0.2945",
        )
        axes[0][1].set(title="HellaSwag", xlabel="step (optimiser updates)", ylabel="acc_norm")
        axes[0][1].legend(frameon=False)
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    fig.savefig(Path(run_dir) / "curves.png", dpi=120)


def main(
    runs: tyro.conf.Positional[tuple[str, ...]],
    x: Literal["step", "tokens", "time"] = "step",
    out: str = "compare.png",
    reference: str = "",
    band: float = 0.02,
):
    """One table and one picture of any runs; those that differ in their seeds alone are grouped.

    Args:
        runs: run directories; the group of the first one is what the others are compared with
        x: of the picture: step, tokens, or time (that of the steps, without evaluating and saving)
        out: picture to write
        reference: run directory; told is where another run's validation loss leaves its band
        band: width of that band to either side, as a share of the reference's loss; 2 standard deviations where that is more
    """
    if not runs:
        raise UserError("no run to compare; hint: python compare.py log/a log/b")
    groups = grouped([read(run, x) for run in dict.fromkeys(runs)])
    s = pooled(list(groups.values()))
    print(table(groups, s))
    print(
        "s: not known, no settings were run with two seeds"
        if s is None
        else f"s = {s:.4f}: standard deviation of one run within its group, pooled; no difference: within 2 s"
    )
    if reference:
        expected = read(reference, x)
        for run in (run for group in groups.values() for run in group):
            if (warning := outside(run, expected, s, band)) is not None:
                say(f"warning | {warning}")
    try:
        picture(groups, x, out)
    except ImportError:
        return say("picture | not drawn: matplotlib is missing; hint: pip install matplotlib")
    except OSError as e:
        raise UserError(f"cannot write {out} ({one_line(e)}); hint: --out another.png")
    say(f"picture | {out}")


if __name__ == "__main__":
    run_script(lambda: parse(main))
