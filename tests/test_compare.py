"""python -m pytest tests/test_compare.py : grouping, differences, the band, pictures."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from conftest import ROOT, run

import compare
import config
from compare import Comparison
from runtime.command_line import UserError

PUBLISHED = ROOT / "log" / "reference" / "published-gpt2-baseline"


def write_run(folder, base: str, losses: dict[int, float], **settings) -> str:
    """Write a run that has evaluations alone: its validation loss at each step."""
    folder.mkdir()
    cfg = config.as_stored(config.preset(base)) | settings
    (folder / "config.json").write_text(json.dumps(cfg))
    records = [{"step": step, "val/loss": loss} for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(folder)


@pytest.fixture
def make(tmp_path):
    """make(name, preset, final loss, **settings) writes a run of 20 steps.

    Its validation loss falls from 10 in a straight line.
    """

    def go(name, base, final, steps=20, hella=None, dt_ms=3000.0, **settings):
        settings = {"max_steps": steps} | settings
        folder = tmp_path / name
        losses = {step: 10 + (final - 10) * step / max(1, steps) for step in range(0, steps + 1, 5)}
        write_run(folder, base, losses, **{"run_name": name, "total_batch": 1000} | settings)
        scores = {"val/hella_norm": hella, "val/hella_se": 0.02} if hella else {}
        lines = []
        for step in range(steps + 1):
            if step:
                speed = {"dt_ms": dt_ms, "tok_s": 1e6 / dt_ms}
                lines.append({"step": step, "train/loss": 10.0} | speed)
            if step in losses:
                lines.append({"step": step, "val/loss": losses[step]} | scores)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
        return str(folder)

    return go


def show(tmp_path, *runs, **options):
    compare.main(Comparison(runs, out=str(tmp_path / "p.png"), **options))


def rows(out: str) -> dict[str, list[str]]:
    """The cells of each line of the table, by its first one."""
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in out.splitlines()
        if line.startswith("| ")
    ]
    return {row[0]: row[1:] for row in table[1:]}


# --------------------------------------------------------------------------------------------------
# table


def test_seeds_are_grouped_and_small_differences_are_none(make, tmp_path, capsys):
    """Standard deviations of 0.01 and 0.03, so s^2 = (2 * 0.01^2 + 2 * 0.03^2) / 4, df 4.

    Between three seeds and three the standard error is s * sqrt(2/3), between three and one
    s * sqrt(4/3): below 2.78 of them, Student's t for df 4, no difference is shown.
    """
    runs = [
        make(f"a{i}", "gpt2-baseline", 5 + d, seed=i, data_seed=i, hella=0.25)
        for i, d in enumerate((-0.01, 0, 0.01))
    ]
    runs += [make(f"b{i}", "gpt2-rope", 4.96 + d, seed=i) for i, d in enumerate((-0.03, 0, 0.03))]
    runs += [make("c", "gpt2-swiglu", 5.05), make("d", "gpt2-modern", 4.5, steps=10, dt_ms=2000.0)]
    show(tmp_path, *runs)
    out = capsys.readouterr().out
    lines = {name: " | ".join(cells) for name, cells in rows(out).items()}
    t = "shown (df 4: t 2.78)"
    assert lines == {
        "gpt2-baseline": "3 | 20,000 | 5.0000 ± 0.0100 |  | 0.2500 ± 0.0200 | 333",
        "gpt2-rope": f"3 | 20,000 | 4.9600 ± 0.0300 | -0.0400 ± 0.0183, not {t} | - | 333",
        "gpt2-swiglu": f"one | 20,000 | 5.0500 | +0.0500 ± 0.0258, not {t} | - | 333",
        "gpt2-modern": f"one | 10,000 | 4.5000 | -0.5000 ± 0.0258, {t} | - | 500",
    }
    assert "s = 0.0224 (df 4)" in out and "from the seeds of gpt2-baseline, gpt2-rope;" in out
    assert "settings with one seed are assumed to have this s" in out
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_two_groups_with_seeds_are_compared_by_their_own_spread(make, tmp_path, capsys):
    """Other runs beside them, here with a far smaller spread, do not change the verdict."""
    runs = [make(f"a{i}", "gpt2-baseline", 5 + d, seed=i) for i, d in enumerate((-0.05, 0, 0.05))]
    runs += [make(f"b{i}", "gpt2-rope", 4.9 + d, seed=i) for i, d in enumerate((-0.05, 0, 0.05))]
    show(tmp_path, *runs)
    alone = rows(capsys.readouterr().out)["gpt2-rope"]
    runs += [make(f"c{i}", "gpt2-modern", 4 + d, seed=i) for i, d in enumerate((-0.001, 0, 0.001))]
    show(tmp_path, *runs)
    out = capsys.readouterr().out
    assert rows(out)["gpt2-rope"] == alone and "settings with one seed" not in out
    assert alone[3] == "-0.1000 ± 0.0408, not shown (df 4: t 2.78)"


@pytest.mark.parametrize("df, t", [(1, 12.706), (4, 2.776), (10, 2.228), (11, 2.201), (30, 2.042)])
def test_student_t(df, t):
    """The two-sided 95% points of every statistical table."""
    assert compare.student_t(df) == pytest.approx(t, abs=6e-3)


def test_what_has_not_finished_is_a_row_of_its_own(make, tmp_path, capsys):
    """Diverged or stopped runs are no part of a mean, of s, of a verdict."""
    runs = [make(f"a{i}", "gpt2-rope", 5 + d, seed=i) for i, d in enumerate((-0.01, 0, 0.01))]
    runs += [make(f"nan{i}", "gpt2-rope", float("nan"), seed=i) for i in range(2)]
    runs += [make("marked", "gpt2-rope", 9.0, seed=5, max_lr=1.0)]
    (tmp_path / "marked" / "diverged.json").write_text("{}")
    (tmp_path / "marked" / "metrics.jsonl").write_text('{"step": 0, "val/loss": 10.0}\n')
    runs += [make("short", "gpt2-rope", 8.0, steps=10, seed=6, max_steps=20)]
    show(tmp_path, *runs)
    out = capsys.readouterr().out
    table = rows(out)
    low = "gpt2-rope max_lr 0.0015"
    assert table[low][:3] == ["3", "20,000", "5.0000 ± 0.0100"]
    assert table[f"{low}, diverged"][:4] == ["2", "20,000", "nan", "-"]
    assert table["gpt2-rope max_lr 1, diverged"][:2] == ["one", "0"]
    assert table[f"{low}, step 10 of 20"][1:4] == ["10,000", "8.0000", "-"]
    assert "s = 0.0100 (df 2)" in out


def test_a_mean_curve_is_of_the_steps_that_all_have(make):
    """Evaluated every 5 and every 10 steps, two equal runs have one curve."""
    often, seldom = make("a", "gpt2-rope", 5.0), make("b", "gpt2-rope", 5.0, seed=2)
    path = Path(seldom, "metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if "val/loss" not in line or json.loads(line)["step"] % 10 == 0]
    path.write_text("".join(kept))
    (group,) = compare.grouped([compare.read_run(folder, "step") for folder in (often, seldom)])
    assert compare.mean_curve(group).tolist() == [[0, 10], [10, 7.5], [20, 5]]


@pytest.mark.parametrize(
    "name, values, names",
    [
        ("data_root", ("data/edu", "/x/code"), ("data_root edu", "data_root code")),
        ("val_tokens", (1024, 4096), ("val_tokens 1024", "val_tokens 4096")),
        ("init_from", ("", "gpt2"), ("init_from none", "init_from gpt2")),
    ],
)
def test_other_data_and_another_measurement_are_other_groups(
    make, tmp_path, capsys, name, values, names
):
    runs = [make(str(i), "gpt2-rope", 5.0, **{name: value}) for i, value in enumerate(values)]
    show(tmp_path, *runs)
    assert [*rows(capsys.readouterr().out)] == [f"gpt2-rope {name}" for name in names]


def test_a_seed_counts_once(make, tmp_path, capsys):
    """What repeats seeds, as runs of edited code do, is another group: else nothing tells them."""
    runs = [make(f"a{i}", "gpt2-rope", 5.0 + i / 100, seed=i) for i in range(2)]
    runs += [make(f"edited{i}", "gpt2-rope", 4.0 + i / 100, seed=i) for i in range(2)]
    show(tmp_path, *runs)
    table = rows(capsys.readouterr().out)
    assert table["gpt2-rope"][:3] == ["2", "20,000", "5.0050 ± 0.0071"]
    assert table["gpt2-rope, again: edited0"][:3] == ["2", "20,000", "4.0050 ± 0.0071"]
    assert table["gpt2-rope, again: edited0"][3].startswith("-1.0000 ± 0.0071, shown")


def test_a_group_made_by_different_code_is_told(make, tmp_path, capsys):
    """Also when one run was resumed by other code."""
    runs = [make(str(i), "gpt2-rope", 5.0 + i, seed=i) for i in range(2)]
    Path(runs[0], "env.json").write_text('{"commit": "74464a1"}')
    resumed = '{"commit": "74464a1", "earlier": [{"commit": "14d2e84"}, {"commit": null}]}'
    Path(runs[1], "env.json").write_text(resumed)
    show(tmp_path, *runs)
    assert "gpt2-rope: made by different code (14d2e84, 74464a1)" in capsys.readouterr().out


@pytest.mark.parametrize("env", ["", "[]", '{"commit": ["a"]}', '{"earlier": 5}'])
def test_code_that_is_not_known_is_no_matter(make, tmp_path, capsys, env):
    runs = [make(str(i), "gpt2-rope", 5.0 + i, seed=i) for i in range(2)]
    Path(runs[0], "env.json").write_text(env)
    show(tmp_path, *runs)
    assert "different code" not in capsys.readouterr().out


def test_the_first_finished_group_is_what_others_are_compared_with(make, tmp_path, capsys):
    runs = [make("bad", "gpt2-rope", float("nan"), max_lr=1.0)]
    runs += [make("a", "gpt2-rope", 5.0), make("b", "gpt2-baseline", 5.1)]
    show(tmp_path, *runs)
    table = rows(capsys.readouterr().out)
    differences = [row[3] for row in table.values()]
    assert differences == ["-", "", "+0.1000 (one seed each)"]


def test_a_diverged_run_is_no_reference(make, tmp_path):
    bad, good = make("bad", "gpt2-rope", float("nan")), make("good", "gpt2-rope", 5.0)
    with pytest.raises(UserError, match="bad has diverged; hint: a healthy run"):
        show(tmp_path, good, reference=bad)


def test_files_beside_the_runs_are_passed_over(make, tmp_path, capsys):
    """`log/study/*` names the picture, too, that study.py puts there."""
    runs = [make(str(i), "gpt2-rope", 5.0 + i, seed=i) for i in range(2)]
    show(tmp_path, *runs)
    show(tmp_path, *runs, str(tmp_path / "p.png"))
    assert rows(capsys.readouterr().out)["gpt2-rope"][0] == "2"


def test_other_settings_are_other_groups_with_names_that_tell(make, tmp_path, capsys):
    runs = [
        make("a", "gpt2-rope", 5.0, max_lr=1e-3, min_lr=1e-4),
        make("b", "gpt2-rope", 5.1, max_lr=2e-3, min_lr=2e-4),
        make("c", "gpt2-rope", 5.2, max_lr=2e-3, min_lr=2e-4, seed=7, B=1),
    ]
    show(tmp_path, *runs, x="time")
    table = rows(capsys.readouterr().out)
    assert table.keys() == {"gpt2-rope max_lr 0.001", "gpt2-rope max_lr 0.002"}
    assert table["gpt2-rope max_lr 0.002"][0] == "2"


def test_a_rate_that_does_not_follow_max_lr_is_named(make, tmp_path, capsys):
    """Of two runs with the same max_lr and another min_lr none may get the other's name."""
    for name, max_lr, min_lr in (("a", 1e-3, 1e-4), ("b", 2e-3, 2e-4), ("c", 1e-3, 0.0)):
        make(name, "gpt2-rope", 5.0, max_lr=max_lr, min_lr=min_lr)
    show(tmp_path, *(str(tmp_path / name) for name in "abc"))
    assert rows(capsys.readouterr().out).keys() == {
        "gpt2-rope max_lr 0.001 min_lr 0.0001",
        "gpt2-rope max_lr 0.002 min_lr 0.0002",
        "gpt2-rope max_lr 0.001 min_lr 0",
    }


def test_one_seed_each_shows_nothing(make, tmp_path, capsys):
    show(tmp_path, make("a", "gpt2-baseline", 5.0), make("b", "gpt2-rope", 4.0))
    out = capsys.readouterr().out
    assert rows(out)["gpt2-rope"][3] == "-1.0000 (one seed each)" and "s: not known" in out


# --------------------------------------------------------------------------------------------------
# the band of a reference


def verdicts(capsys) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix("reference | ") for line in lines if line.startswith("reference")]


def test_each_run_is_told_whether_it_is_in_the_band_of_a_reference(make, tmp_path, capsys):
    """Losses 10, 8.75, 7.5, 6.25, 5 at steps 0 to 20, against others at the same steps."""
    reference = make("ref", "gpt2-baseline", 5.0)
    inside = make("in", "gpt2-baseline", 5.05)
    above = make("above", "gpt2-lr-inc", 5.25)
    below = make("below", "gpt2-baseline", 4.0)
    nan = make("nan", "gpt2-rope", float("nan"))
    show(tmp_path, inside, above, below, nan, reference=reference, x="tokens")
    lines = verdicts(capsys)
    assert lines[0] == "in is healthy: within 2% of ref at all 4 evaluations"
    assert lines[1].startswith(
        "above leaves the band of ref at step 15, above it: val loss 6.4375, expected 6.2500 ± 2%; "
        "outside at 2 of 4 evaluations; other settings: "
    )
    assert "max_lr 0.0006 -> 0.0015" in lines[1] and "data_order sequential" in lines[1]
    assert "at step 5, below it (better): val loss 8.5000, expected 8.7500" in lines[2]
    assert "other settings: none" in lines[2]
    assert "nan leaves the band of ref at step 5, no longer a number: val loss nan" in lines[3]
    assert "outside at 4 of 4" in lines[3]
    show(tmp_path, inside, above, reference=reference, band=0.1)
    assert [line.split(":")[0] for line in verdicts(capsys)] == [
        "in is healthy",
        "above is healthy",
    ]


def test_a_run_of_another_batch_is_compared_by_tokens(make, tmp_path, capsys):
    """Half the batch and twice the steps; only what the reference has been trained for counts."""
    reference = make("ref", "gpt2-baseline", 5.0)
    longer = {0: 11.0, 2: 9.9, 20: 7.5, 40: 5.0, 60: 1.0}
    settings = dict(run_name="half", total_batch=500)
    half = write_run(tmp_path / "half", "gpt2-baseline", longer, **settings)
    compare.main(Comparison((half,), reference=reference))
    assert verdicts(capsys) == ["half is healthy: within 2% of ref at all 2 evaluations"]
    short = write_run(tmp_path / "short", "gpt2-baseline", {0: 11.0, 4: 9.9}, total_batch=500)
    compare.main(Comparison((short,), reference=reference))
    assert "short cannot be compared with ref: no evaluation between 5,000" in verdicts(capsys)[0]


def test_the_published_baseline_is_a_reference_that_ships(tmp_path, capsys):
    """Evaluated every 250 steps, a loss on its way is healthy at all 77 evaluations.

    The way between its points is a power law through each two of them: what loss curves look like.
    """
    records = [json.loads(line) for line in (PUBLISHED / "metrics.jsonl").read_text().splitlines()]
    steps = np.array([r["step"] for r in records])
    known = np.array([r["val/loss"] for r in records])
    assert (len(steps), steps[0], steps[-1]) == (12, 250, 19072)
    assert (known[0], known[-1], records[-1]["val/hella_norm"]) == (6.1668, 3.0656, 0.3066)
    stored = json.loads((PUBLISHED / "config.json").read_text())
    assert "published" in stored.pop("source")
    assert stored == config.as_stored(config.preset("gpt2-baseline"))

    at = np.array([*range(250, 19073, 250), 19073])
    losses = np.exp(np.interp(np.log(at), np.log(steps), np.log(known)))
    good = {0: 10.99} | dict(zip(at.tolist(), losses.tolist()))
    bad = good | {12000: 3.4, 12250: 3.4}
    folders = [
        write_run(tmp_path / name, "gpt2-baseline", curve)
        for name, curve in (("good", good), ("bad", bad))
    ]
    show(tmp_path, *folders, str(PUBLISHED), reference=str(PUBLISHED))
    lines = verdicts(capsys)
    name = PUBLISHED.name
    assert lines[0] == f"good is healthy: within 2% of {name} at all 77 evaluations"
    assert lines[1].startswith(f"bad leaves the band of {name} at step 12,000, above it: ")
    assert "outside at 2 of 77 evaluations" in lines[1]
    assert lines[2] == f"{name} is healthy: within 2% of {name} at all 12 evaluations"


# --------------------------------------------------------------------------------------------------
# pictures


def test_the_axes_count_what_they_say(make):
    """20 steps of 1,000 tokens and 3 seconds."""
    folder = make("a", "gpt2-baseline", 5.0)
    ends = [compare.read_run(folder, x).val[-1, 0] for x in ("step", "tokens", "time")]
    assert ends == pytest.approx([20, 0.02, 1.0])


def test_one_run_alone_gets_its_curves_again(make, tmp_path, capsys):
    folder = make("a", "gpt2-baseline", 5.0, hella=0.25)
    show(tmp_path, folder)
    assert (tmp_path / "a" / "curves.png").stat().st_size > 10_000
    assert not (tmp_path / "p.png").exists()
    assert capsys.readouterr().out == f"picture | {tmp_path / 'a' / 'curves.png'}\n"


def test_a_picture_that_fails_leaves_the_table(make, tmp_path, monkeypatch, capsys):
    """Whatever matplotlib raises, here RuntimeError: TeX is wanted and not installed."""
    if shutil.which("latex"):
        pytest.skip("needs a machine without LaTeX")
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    a, b = make("a", "gpt2-baseline", 5.0), make("b", "gpt2-rope", 4.0)
    show(tmp_path, a, b)
    out = capsys.readouterr().out
    assert len(rows(out)) == 2 and "picture | not drawn: RuntimeError" in out
    show(tmp_path, a)
    assert capsys.readouterr().out.startswith("picture | not drawn: RuntimeError")


@pytest.mark.parametrize(
    "steps", ["", '{"step": 0, "val/loss": NaN}\n{"step": 1, "train/loss": 5}\n']
)
def test_curves_are_drawn_of_whatever_is_logged(make, tmp_path, steps):
    """Of a run that has just begun, and of one whose loss is not a number."""
    folder = make("a", "gpt2-baseline", 5.0)
    (tmp_path / "a" / "metrics.jsonl").write_text(steps)
    compare.curves(folder)
    assert (tmp_path / "a" / "curves.png").stat().st_size > 5_000


def test_pictures_leave_matplotlib_as_it_was(make, tmp_path):
    """In a thread of a training process or a notebook: pyplot is not even imported."""
    runs = [make("a", "gpt2-baseline", 5.0), make("b", "gpt2-rope", 4.0)]
    script = (
        "import sys, matplotlib, compare\n"
        "a, b, out = sys.argv[1:]\n"
        "compare.curves(a)\n"
        "compare.main(compare.Comparison((a, b), out=out))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert matplotlib.get_backend(auto_select=False) is None\n"
    )
    command = [sys.executable, "-c", script, *runs, str(tmp_path / "p.png")]
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    threads = [threading.Thread(target=compare.curves, args=(folder,)) for folder in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((tmp_path / name / "curves.png").exists() for name in "ab")


def test_every_preset_of_the_readme_has_a_colour_of_its_own():
    assert len(set(compare.COLOURS.values())) == len(compare.COLOURS) == 8
    assert compare.OTHER not in compare.COLOURS.values()


def test_mistakes_are_one_line(make, tmp_path):
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    runs = make("a", "gpt2-rope", 5.0), make("b", "gpt2-rope", 5.0)
    done = run("compare.py", empty)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {empty} is not a run")
    assert done.stderr.count("\n") == 1 and "hint: " in done.stderr
    for args, words in (
        (Comparison(), "no run to compare"),
        (Comparison(runs, out="/no/p.png"), "cannot write /no/p.png"),
        (Comparison(runs, out="p.txt"), "cannot write p.txt: its ending is none of"),
        (Comparison(runs, reference=empty), "is not a run"),
        (Comparison((str(PUBLISHED),), x="time"), "has no times of its steps"),
        (Comparison((make("c", "gpt2-rope", 5.0, steps=0),)), "0 steps and 1 evaluations"),
    ):
        with pytest.raises(UserError, match=f"{words}.*hint: "):
            compare.main(args)
