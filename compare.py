"""Compare runs in a table and a picture; tell whether a run is healthy; draw a run's curves.

    python compare.py log/a log/b log/c     a table, and compare.png
    python compare.py log/a                 log/a/curves.png again
    python compare.py log/a --reference log/reference/published-gpt2-baseline     is it healthy?

Runs that differ in nothing but their seeds are one group. s is the standard deviation of a run's
final loss within its group, pooled over all groups of two and more runs. The difference of two
means has the standard error se = s * sqrt(1/n1 + 1/n2), and is shown from 2 se on.
"""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from config import FREE_ON_RESUME, TrainConfig, differences
from runtime.command_line import PathText, UserError, one_line, parse, run_script, say
from runtime.runlog import read_metrics

# Okabe and Ito 2008: distinct with any colour vision. A preset has its colour in every picture.
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
LINES = ("-", "--", ":", "-.")  # groups of one colour, in the order of the table
AXES = {
    "step": "step (optimizer updates)",
    "tokens": "training tokens (millions)",
    "time": "training time (minutes, steps alone)",
}
OPENAI_GPT2_HELLASWAG = 0.294463  # acc_norm of OpenAI's 124M, by mean loss per token


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Compare runs; those that differ in nothing but their seeds are grouped."""

    # run directories; the group of the first one is what the others are compared with
    runs: tyro.conf.Positional[tuple[PathText, ...]] = ()
    # axis of the picture: step, tokens, or time (without evaluating and saving)
    x: Literal["step", "tokens", "time"] = "step"
    out: PathText = "compare.png"  # picture of several runs
    # directory of a healthy run: where does the validation loss of the others leave its band?
    reference: PathText = ""
    band: float = 0.02  # width of that band to either side, as a share of the reference's loss


@dataclasses.dataclass(frozen=True)
class LoggedRun:
    """What a run directory holds."""

    name: str
    cfg: dict  # config.json
    train: np.ndarray  # (n, 2): x, training loss; empty for a record of evaluations alone
    val: np.ndarray  # (m, 2): x, validation loss
    evaluations: list[dict]
    tok_s: float | None  # median of the steps

    @property
    def loss(self) -> float:
        """The final validation loss; null stands for NaN."""
        return float(self.val[-1, 1])

    @property
    def tokens(self) -> np.ndarray:
        """Training tokens at each evaluation (m,)."""
        return np.array([r["step"] for r in self.evaluations]) * self.cfg["total_batch"]


@dataclasses.dataclass(frozen=True)
class RunGroup:
    """Runs with the same settings and different seeds."""

    name: str  # the preset, and the settings that tell it from other groups
    runs: list[LoggedRun]

    @property
    def losses(self) -> list[float]:
        return [run.loss for run in self.runs]

    @property
    def preset(self) -> str:
        return self.runs[0].cfg["preset"]

    @property
    def mean(self) -> float:
        return statistics.mean(self.losses)


# --------------------------------------------------------------------------------------------------
# reading


def read_run(run_dir: str, x: str) -> LoggedRun:
    """Read a run. Raises UserError for a directory without one, or without a trained evaluation."""
    fields = {f.name for f in dataclasses.fields(TrainConfig)}
    try:
        stored = json.loads(Path(run_dir, "config.json").read_text())
        records = read_metrics(run_dir)
        if not isinstance(stored, dict):
            raise ValueError("config.json holds no settings")
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(
            f"{run_dir} is not a run ({one_line(e)}); "
            "hint: a directory in log/ with config.json and metrics.jsonl"
        ) from e
    cfg = dataclasses.asdict(TrainConfig()) | {k: v for k, v in stored.items() if k in fields}
    steps = [r for r in records if r.get("train/loss") is not None]
    evaluations = [r for r in records if "val/loss" in r]
    if not evaluations or evaluations[-1]["step"] == 0:
        raise UserError(
            f"{run_dir} has {len(steps)} steps and {len(evaluations)} evaluations so far; "
            "hint: wait for the first evaluation after step 0"
        )
    if x == "time" and not steps:
        raise UserError(f"{run_dir} has no times of its steps; hint: --x step or --x tokens")
    return LoggedRun(
        name=Path(run_dir).resolve().name,
        cfg=cfg,
        train=points(steps, "train/loss", x, cfg, steps),
        val=points(evaluations, "val/loss", x, cfg, steps),
        evaluations=evaluations,
        tok_s=statistics.median(r["tok_s"] for r in steps) if steps else None,
    )


def points(records: list[dict], key: str, x: str, cfg: dict, steps: list[dict]) -> np.ndarray:
    """Return (n, 2): the position on the axis x, and the value of `key`, of each record."""
    position = np.array([r["step"] for r in records], float)
    if x == "tokens":
        position *= cfg["total_batch"] / 1e6
    if x == "time":
        minutes = np.cumsum([0.0, *(r["dt_ms"] / 60e3 for r in steps)])
        position = np.interp(position, [0, *(r["step"] for r in steps)], minutes)
    return np.stack([position, np.array([r[key] for r in records], float)], axis=1)


def grouped(runs: list[LoggedRun]) -> list[RunGroup]:
    """Group the runs whose settings are the same but for seeds and what does not matter."""
    fields = [f.name for f in dataclasses.fields(TrainConfig)]
    decisive = [name for name in fields if name not in FREE_ON_RESUME | {"seed", "data_seed"}]
    by_settings = {}
    for run in runs:
        key = json.dumps([run.cfg[name] for name in decisive])
        by_settings.setdefault(key, []).append(run)
    groups = []
    for members in by_settings.values():
        cfg = members[0].cfg
        siblings = [g[0].cfg for g in by_settings.values() if g[0].cfg["preset"] == cfg["preset"]]
        words = [cfg["preset"]]
        for name in decisive:
            if any(c[name] != cfg[name] for c in siblings) and not follows_max_lr(name, siblings):
                value = f"{cfg[name]:.3g}" if isinstance(cfg[name], float) else cfg[name]
                words.append(f"{name} {value}")
        groups.append(RunGroup(" ".join(words), members))
    return groups


def follows_max_lr(name: str, cfgs: list[dict]) -> bool:
    """Tell whether a setting is another learning rate, the same for each max_lr: no need to say."""
    if name not in ("min_lr", "embed_lr", "head_lr"):
        return False
    return len({(c["max_lr"], c[name]) for c in cfgs}) == len({c["max_lr"] for c in cfgs})


# --------------------------------------------------------------------------------------------------
# table and verdicts


def pooled_deviation(groups: list[RunGroup]) -> float | None:
    """Return s; None when no group has two runs."""
    several = [g.losses for g in groups if len(g.losses) > 1]
    if not several:
        return None
    squares = sum(statistics.variance(losses) * (len(losses) - 1) for losses in several)
    return (squares / sum(len(losses) - 1 for losses in several)) ** 0.5


def table(groups: list[RunGroup], s: float | None) -> str:
    """Return a Markdown table: final values of each group, and its distance to the first."""
    lines = [
        "| run | seeds | tokens | val loss, final (mean ± sd) | to the first ± se | HellaSwag ± se "
        "| tok/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for i, group in enumerate(groups):
        seeds, loss = "one", f"{group.mean:.4f}"
        if len(group.runs) > 1:
            seeds, loss = str(len(group.runs)), f"{loss} ± {statistics.stdev(group.losses):.4f}"
        away = difference(group, groups[0], s) if i else ""
        speeds = [run.tok_s for run in group.runs if run.tok_s is not None]
        speed = f"{statistics.median(speeds):,.0f}" if speeds else "-"
        cells = [group.name, seeds, f"{group.runs[0].tokens[-1]:,}", loss, away]
        lines.append(f"| {' | '.join([*cells, hellaswag_score(group), speed])} |")
    return "\n".join(lines)


def difference(group: RunGroup, first: RunGroup, s: float | None) -> str:
    """Return the difference of two groups' mean losses, its standard error and a verdict."""
    mean = group.mean - first.mean
    if s is None:
        return f"{mean:+.4f} (one seed each)"
    se = s * (1 / len(group.runs) + 1 / len(first.runs)) ** 0.5
    if abs(mean) < 2 * se:
        return f"{mean:+.4f} ± {se:.4f}, not shown"
    if se == 0:
        return f"{mean:+.4f}"
    return f"{mean:+.4f} ± {se:.4f} ({abs(mean) / se:.1f} se)"


def hellaswag_score(group: RunGroup) -> str:
    """Return a group's mean acc_norm and its standard error.

    The items are the same for all seeds, so more seeds do not make that error smaller.
    """
    last = [run.evaluations[-1] for run in group.runs]
    scores = [r["val/hella_norm"] for r in last if r.get("val/hella_norm") is not None]
    errors = [r["val/hella_se"] for r in last if r.get("val/hella_se") is not None]
    if not scores:
        return "-"
    error = f" ± {statistics.mean(errors):.4f}" if errors else ""
    return f"{statistics.mean(scores):.4f}{error}"


def verdict(run: LoggedRun, reference: LoggedRun, band: float) -> str:
    """Tell whether a run's validation loss stays in the band of a reference, or where it leaves it.

    Compared by training tokens, at the run's evaluations from the reference's first one on.
    """
    trained = reference.tokens > 0
    tokens, losses = reference.tokens[trained], reference.val[trained, 1]
    # the published baseline was last evaluated one step before its end
    compared = (run.tokens >= tokens[0]) & (run.tokens <= 1.01 * tokens[-1])
    if not compared.any():
        return (
            f"{run.name} cannot be compared with {reference.name}: no evaluation between "
            f"{tokens[0]:,} and {tokens[-1]:,} training tokens"
        )
    actual = run.val[compared, 1]
    # in log tokens, where loss curves are nearly straight: in tokens the expected loss would be up
    # to 3% too high between the points of the published baseline
    expected = np.interp(np.log(run.tokens[compared]), np.log(tokens), losses)
    off = actual / expected - 1
    outside = np.flatnonzero(~(abs(off) <= band))  # a NaN is outside
    n = len(actual)
    if not len(outside):
        return (
            f"{run.name} is healthy: within {100 * band:g}% of {reference.name} "
            f"at all {n} evaluations"
        )
    i = outside[0]
    step = run.tokens[compared][i] // run.cfg["total_batch"]
    direction = "above it" if off[i] > 0 else "below it (better)"
    if np.isnan(off[i]):
        direction = "no longer a number"
    settings = differences(TrainConfig(**run.cfg), reference.cfg)
    return (
        f"{run.name} leaves the band of {reference.name} at step {step:,}, {direction}: val loss "
        f"{actual[i]:.4f}, expected {expected[i]:.4f} ± {100 * band:g}%; outside at "
        f"{len(outside)} of {n} evaluations; other settings: {settings or 'none'}; "
        f"data: {Path(run.cfg['data_root']).name}, {Path(reference.cfg['data_root']).name}"
    )


# --------------------------------------------------------------------------------------------------
# pictures. matplotlib's Figure instead of pyplot: no global state, so it works in threads and
# leaves a notebook's backend alone


def picture(groups: list[RunGroup], x: str, out: str):
    """Draw the curves of all groups; beside them, which is also the legend, their final losses."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(12, max(4.0, 2 + 0.25 * len(groups))), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(3, 2))
    runs = [run for group in groups for run in group.runs]
    # the first tenth of a run would leave four fifths of the picture empty
    low, high = limits([loss for r in runs for at, loss in r.val if at >= 0.1 * r.val[-1, 0]])
    colours = []
    for row, group in enumerate(groups):
        colour = COLOURS.get(group.preset.removesuffix("-t2048"), OTHER)
        style = dict(color=colour, linestyle=LINES[colours.count(colour) % len(LINES)])
        colours.append(colour)
        for run in group.runs:
            if len(run.train):
                n = max(1, len(run.train) // 25)
                smooth = np.convolve(run.train[:, 1], np.ones(n) / n, "valid")
                left.plot(run.train[n - 1 :, 0], smooth, color=colour, linewidth=0.7, alpha=0.4)
        m = min(len(run.val) for run in group.runs)
        mean = np.mean([run.val[:m, 1] for run in group.runs], axis=0)
        left.plot(group.runs[0].val[:m, 0], mean, **style, marker="o", markersize=3)
        right.axhline(row, **style, linewidth=1, alpha=0.5)
        right.plot(group.losses, [row] * len(group.losses), "o", color=colour, alpha=0.7)
        right.plot([group.mean] * 2, [row - 0.2, row + 0.2], color=colour, linewidth=2)
    left.set(xlabel=AXES[x], ylabel="loss (nats per token)", ylim=(low, high))
    left.set_title("validation loss (points), training loss (thin)", fontsize=10)
    right.set(xlabel="final validation loss (nats per token)", yticks=range(len(groups)))
    right.set_title("each seed, and the mean (bar)", fontsize=10)
    right.set_yticklabels([group.name for group in groups], fontsize=9)
    right.invert_yaxis()
    save_figure(fig, out)


def limits(losses: list[float]) -> tuple[float, float]:
    """Return an axis for losses with 5% of space at both ends; leaves NaN and infinite ones out."""
    finite = [loss for loss in losses if np.isfinite(loss)] or [0.0, 1.0]
    space = max(0.05 * (max(finite) - min(finite)), 0.01)
    return min(finite) - space, max(finite) + space


def curves(run_dir: str | Path):
    """Draw curves.png from metrics.jsonl: training and validation loss, HellaSwag if measured."""
    from matplotlib.figure import Figure

    records = read_metrics(run_dir)
    keys = ("train/loss", "val/loss", "val/bigram", "val/hella_norm")
    train, val, bigram, hella = (
        [(r["step"], r[key]) for r in records if r.get(key) is not None] for key in keys
    )
    fig = Figure(figsize=(11 if hella else 7, 4), layout="constrained")
    axes = fig.subplots(1, 2 if hella else 1, squeeze=False)[0]
    measured = dict(color="#08519c", marker="o", markersize=3)
    yardstick = dict(color="#d95f0e", linestyle="--", linewidth=1)
    if train:
        axes[0].plot(*zip(*train), color="#9ecae1", linewidth=1, label="training, one batch each")
    if val:
        label = f"validation, last {val[-1][1]:.4f}"
        axes[0].plot(*zip(*val), **measured, label=label)
    if bigram:
        loss = bigram[-1][1]
        axes[0].axhline(loss, **yardstick, label=f"bigram model {loss:.4f}")
    low, high = limits([loss for _, loss in train + val])
    axes[0].set(ylabel="loss (nats per token)", ylim=(low, min(high, low + 4)))
    axes[0].set_title(Path(run_dir).resolve().name)
    if hella:
        label = f"OpenAI GPT-2 124M, {OPENAI_GPT2_HELLASWAG:.4f}"
        axes[1].plot(*zip(*hella), **measured)
        axes[1].axhline(OPENAI_GPT2_HELLASWAG, **yardstick, label=label)
        axes[1].set(title="HellaSwag", ylabel="acc_norm")
    for ax in axes:
        ax.set_xlabel(AXES["step"])
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False)
    save_figure(fig, Path(run_dir) / "curves.png")


def save_figure(fig, path: str | Path):
    """Write a figure. Raises UserError for an ending that matplotlib does not know."""
    endings = fig.canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in endings:
        raise UserError(
            f"cannot write {path}: its ending is none of {', '.join(sorted(endings))}; "
            "hint: --out another.png"
        )
    for ax in fig.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    fig.savefig(path, dpi=130)


def not_drawn(e: Exception) -> str:
    """Say why there is no picture, whatever it was: matplotlib's errors have many types."""
    if isinstance(e, ImportError):
        return "not drawn: matplotlib is missing; hint: pip install matplotlib"
    return f"not drawn: {one_line(e)}"


# --------------------------------------------------------------------------------------------------
# command line


def main(args: Comparison):
    if not args.runs:
        raise UserError("no run to compare; hint: python compare.py log/a log/b")
    once = {Path(run_dir).resolve(): run_dir for run_dir in args.runs}
    runs = [read_run(run_dir, args.x) for run_dir in once.values()]
    groups = grouped(runs)
    out = args.out if len(runs) > 1 else Path(args.runs[0]) / "curves.png"
    if len(runs) > 1:
        s = pooled_deviation(groups)
        say(table(groups, s))
        if s is None:
            say("s: not known, no settings were run with two seeds")
        else:
            meaning = "standard deviation of one run within its group, pooled"
            say(f"s = {s:.4f}: {meaning}; se: s * sqrt(1/n1 + 1/n2); not shown: below 2 se")
    if args.reference:
        reference = read_run(args.reference, "step")
        for run in runs:
            say(f"reference | {verdict(run, reference, args.band)}")
    try:
        if len(runs) > 1:
            picture(groups, args.x, out)
        else:
            curves(args.runs[0])
        say(f"picture | {out}")
    except OSError as e:
        raise UserError(f"cannot write {out} ({one_line(e)}); hint: --out another.png") from e
    except UserError:
        raise
    except Exception as e:
        say(f"picture | {not_drawn(e)}")


if __name__ == "__main__":
    run_script(lambda: main(parse(Comparison)))
