"""Compare runs in a table and a picture; say whether a run is healthy; draw a run's curves.

    python compare.py log/a log/b log/c     a table, and compare.png
    python compare.py log/a                 log/a/curves.png again
    python compare.py log/a --reference log/reference/published-gpt2-baseline     is it healthy?

Runs that differ in nothing but their seeds are one group; data sets are identified by the name of
their directory. A second run with the same settings and seeds, as after an edit of the code, goes
into another group, and so do diverged and unfinished runs, which are not compared. The difference
of two means has the standard error se = s * sqrt(1/n1 + 1/n2), where s is the standard deviation of
a run's final loss within its group: of these two groups if both have several runs, otherwise of all
groups, assuming equal variances. A difference counts as shown when it exceeds t * se, where t is
Student's for 95% and the degrees of freedom (df) of s.
"""

import dataclasses
import json
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from config import FREE_ON_RESUME, TrainConfig, differences
from runtime.command_line import PathText, UserError, one_line, parse, run_script, say
from runtime.files import read_json
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
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # 95%, for df 1 to 10
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
    tokens_trained: int
    unfinished: str  # "diverged", "step 5 of 20", or "" for a run that has reached its end
    commits: set[str]  # of the code, from env.json

    @property
    def loss(self) -> float:
        """The final validation loss; NaN for a run that has diverged before its first one."""
        return float(self.val[-1, 1]) if len(self.val) else math.nan

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
    def unfinished(self) -> str:
        return self.runs[0].unfinished

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
    last_step = max((r["step"] for r in steps + evaluations), default=0)
    unfinished = progress(run_dir, cfg, evaluations, last_step)
    if unfinished != "diverged" and not any(r["step"] for r in evaluations):
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
        tokens_trained=last_step * cfg["total_batch"],
        unfinished=unfinished,
        commits=commits_of(run_dir),
    )


def progress(run_dir: str, cfg: dict, evaluations: list[dict], last_step: int) -> str:
    """Return "" for a run that has reached its end, "diverged", or how far it has come."""
    last = evaluations[-1] if evaluations else {"step": 0, "val/loss": None}
    not_a_number = last["step"] and not math.isfinite(last["val/loss"] or math.nan)
    if not_a_number or Path(run_dir, "diverged.json").exists():
        return "diverged"
    # the published runs were last evaluated one step before max_steps
    if last["step"] >= cfg["max_steps"] - 1:
        return ""
    if last_step == cfg["max_steps"]:
        return "not evaluated at its end"
    return f"step {last_step:,} of {cfg['max_steps']:,}"


def commits_of(run_dir: str) -> set[str]:
    """Return the commits of all parts of a run; the empty set where env.json does not tell."""
    try:
        env = read_json(Path(run_dir, "env.json"))
        return {part["commit"] for part in [env, *env.get("earlier", [])] if part["commit"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


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
    """Group the runs with the same decisive settings, apart from the seeds."""
    by_settings = {}
    repeats = Counter()
    for run in runs:
        settings = json.dumps([decisive_settings(run), run.unfinished])
        seeds = run.cfg["seed"], run.cfg["data_seed"]
        by_settings.setdefault((settings, repeats[settings, seeds]), []).append(run)
        repeats[settings, seeds] += 1
    groups = []
    for (_, repeat), members in by_settings.items():
        cfg = decisive_settings(members[0])
        siblings = [decisive_settings(group[0]) for group in by_settings.values()]
        siblings = [c for c in siblings if c["preset"] == cfg["preset"]]
        words = [cfg["preset"]]
        for name, value in cfg.items():
            if any(c[name] != value for c in siblings) and not follows_max_lr(name, siblings):
                value = f"{value:.3g}" if isinstance(value, float) else value
                words.append(f"{name} {'none' if value == '' else value}")
        name = " ".join(words)
        if members[0].unfinished:
            name += f", {members[0].unfinished}"
        if repeat:
            name += f", again: {members[0].name}"
        groups.append(RunGroup(name, members))
    return groups


def decisive_settings(run: LoggedRun) -> dict:
    """Return the settings that decide what is learned from which data and how it is measured."""
    measured_on = {"val_tokens", "hellaswag_limit"}
    free = FREE_ON_RESUME - measured_on | {"seed", "data_seed"}
    settings = {f.name: run.cfg[f.name] for f in dataclasses.fields(TrainConfig)}
    settings = {name: value for name, value in settings.items() if name not in free}
    return settings | {"data_root": Path(run.cfg["data_root"]).name}


def follows_max_lr(name: str, cfgs: list[dict]) -> bool:
    """Return whether a setting is a learning rate that max_lr determines: no need to name it."""
    if name not in ("min_lr", "embed_lr", "head_lr"):
        return False
    return len({(c["max_lr"], c[name]) for c in cfgs}) == len({c["max_lr"] for c in cfgs})


# --------------------------------------------------------------------------------------------------
# table and verdicts


def pooled_deviation(groups: list[RunGroup]) -> tuple[float, int]:
    """Return s and its degrees of freedom, 0 when no group has two finished runs."""
    several = [g.losses for g in groups if len(g.runs) > 1 and not g.unfinished]
    df = sum(len(losses) - 1 for losses in several)
    squares = sum(statistics.variance(losses) * (len(losses) - 1) for losses in several)
    return (squares / max(1, df)) ** 0.5, df


def student_t(df: int) -> float:
    """Return the 97.5% point of Student's distribution: two-sided, 95% (Fisher and Cornish)."""
    if df <= len(STUDENT_T):
        return STUDENT_T[df - 1]
    return 1.96 + 2.37 / df + 2.82 / df**2


def table(groups: list[RunGroup]) -> str:
    """Return a Markdown table: final values of each group, its distance to the first finished."""
    lines = [
        "| run | seeds | tokens | val loss, final (mean ± sd) | to the first ± se | HellaSwag ± se "
        "| tok/s |",
        "|---|---|---|---|---|---|---|",
    ]
    first = next((group for group in groups if not group.unfinished), groups[0])
    for group in groups:
        seeds, loss = "one", f"{group.mean:.4f}"
        if len(group.runs) > 1:
            seeds = str(len(group.runs))
            if group.unfinished != "diverged":
                loss += f" ± {statistics.stdev(group.losses):.4f}"
        away = difference(group, first, groups) if group is not first else ""
        speeds = [run.tok_s for run in group.runs if run.tok_s is not None]
        speed = f"{statistics.median(speeds):,.0f}" if speeds else "-"
        tokens = max(run.tokens_trained for run in group.runs)
        cells = [group.name, seeds, f"{tokens:,}", loss, away]
        lines.append(f"| {' | '.join([*cells, hellaswag_score(group), speed])} |")
    return "\n".join(lines)


def difference(group: RunGroup, first: RunGroup, groups: list[RunGroup]) -> str:
    """Return the difference of two groups' mean losses, its standard error and a verdict."""
    if group.unfinished or first.unfinished:
        return "-"
    both_several = len(group.runs) > 1 and len(first.runs) > 1
    s, df = pooled_deviation([group, first] if both_several else groups)
    mean = group.mean - first.mean
    if df == 0:
        return f"{mean:+.4f} (one seed each)"
    se = s * (1 / len(group.runs) + 1 / len(first.runs)) ** 0.5
    t = student_t(df)
    verdict = "shown" if abs(mean) > t * se else "not shown"
    return f"{mean:+.4f} ± {se:.4f}, {verdict} (df {df}: t {t:.2f})"


def hellaswag_score(group: RunGroup) -> str:
    """Return a group's mean acc_norm and its standard error.

    The items are the same for all seeds, so more seeds do not make that error smaller.
    """
    last = [run.evaluations[-1] for run in group.runs if run.evaluations]
    scores = [r["val/hella_norm"] for r in last if r.get("val/hella_norm") is not None]
    errors = [r["val/hella_se"] for r in last if r.get("val/hella_se") is not None]
    if not scores:
        return "-"
    error = f" ± {statistics.mean(errors):.4f}" if errors else ""
    return f"{statistics.mean(scores):.4f}{error}"


def verdict(run: LoggedRun, reference: LoggedRun, band: float) -> str:
    """Say whether a run's validation loss stays in a reference's band, or where it leaves it.

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
        left.plot(*mean_curve(group).T, **style, marker="o", markersize=3)
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


def mean_curve(group: RunGroup, key: str = "val/loss") -> np.ndarray:
    """Return (n, 2): the mean over runs of position and value, at the steps that all evaluated."""
    values = [
        {r["step"]: (x, r[key]) for x, r in zip(run.val[:, 0], run.evaluations)}
        for run in group.runs
    ]
    common = sorted(set.intersection(*map(set, values)))
    points = np.array([[run[step] for step in common] for run in values], float)
    return points.mean(axis=0).reshape(-1, 2)


def limits(losses: list[float]) -> tuple[float, float]:
    """Return the limits of an axis for the finite losses, with 5% of space at both ends."""
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
    baseline = dict(color="#d95f0e", linestyle="--", linewidth=1)
    if train:
        axes[0].plot(*zip(*train), color="#9ecae1", linewidth=1, label="training, one batch each")
    if val:
        label = f"validation, last {val[-1][1]:.4f}"
        axes[0].plot(*zip(*val), **measured, label=label)
    if bigram:
        loss = bigram[-1][1]
        axes[0].axhline(loss, **baseline, label=f"bigram model {loss:.4f}")
    low, high = limits([loss for _, loss in train + val])
    axes[0].set(ylabel="loss (nats per token)", ylim=(low, min(high, low + 4)))
    axes[0].set_title(Path(run_dir).resolve().name)
    if hella:
        label = f"OpenAI GPT-2 124M, {OPENAI_GPT2_HELLASWAG:.4f}"
        axes[1].plot(*zip(*hella), **measured)
        axes[1].axhline(OPENAI_GPT2_HELLASWAG, **baseline, label=label)
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
    """Return why there is no picture: matplotlib raises errors of many types."""
    if isinstance(e, ImportError):
        return "not drawn: matplotlib is missing; hint: pip install matplotlib"
    return f"not drawn: {one_line(e)}"


# --------------------------------------------------------------------------------------------------
# command line


def warn_of_commits(groups: list[RunGroup]):
    """Warn of groups that were made by different code: an edit is not a setting and has no name."""
    for group in groups:
        commits = set.union(*(run.commits for run in group.runs))
        if len(group.runs) > 1 and len(commits) > 1:
            say(
                f"{group.name}: made by different code ({', '.join(sorted(commits))}); "
                "hint: a preset of its own tells an edited model apart"
            )


def main(args: Comparison):
    if not args.runs:
        raise UserError("no run to compare; hint: python compare.py log/a log/b")
    # log/study/* also matches the picture that study.py leaves there
    folders = [run_dir for run_dir in args.runs if not Path(run_dir).is_file()] or args.runs
    once = {Path(run_dir).resolve(): run_dir for run_dir in folders}
    runs = [read_run(run_dir, args.x) for run_dir in once.values()]
    groups = grouped(runs)
    out = args.out if len(runs) > 1 else Path(folders[0]) / "curves.png"
    if len(runs) > 1:
        say(table(groups))
        s, df = pooled_deviation(groups)
        if df == 0:
            say("s: not known, no settings have two finished seeds")
        else:
            finished = [g for g in groups if not g.unfinished]
            several = [g.name for g in finished if len(g.runs) > 1]
            say(
                f"s = {s:.4f} (df {df}): standard deviation of a run within its group, from the "
                f"seeds of {', '.join(several)}; se = s * sqrt(1/n1 + 1/n2), with s of the two "
                "groups if both have several seeds; shown: beyond t * se (95%)"
            )
            if len(several) < len(finished):
                say("settings with one seed are assumed to have this s; hint: study.py --seeds 3")
        warn_of_commits(groups)
    if args.reference:
        reference = read_run(args.reference, "step")
        if reference.unfinished == "diverged":
            raise UserError(f"{args.reference} has diverged; hint: a healthy run for --reference")
        for run in runs:
            say(f"reference | {verdict(run, reference, args.band)}")
    try:
        if len(runs) > 1:
            picture(groups, args.x, out)
        else:
            curves(folders[0])
        say(f"picture | {out}")
    except OSError as e:
        raise UserError(f"cannot write {out} ({one_line(e)}); hint: --out another.png") from e
    except UserError:
        raise
    except Exception as e:
        say(f"picture | {not_drawn(e)}")


if __name__ == "__main__":
    run_script(lambda: main(parse(Comparison)))
