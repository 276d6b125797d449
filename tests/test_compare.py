"""python -m pytest tests/test_compare.py : grouping by seed, what counts as a difference, the band, the picture."""

import dataclasses
import json

import pytest
from conftest import run

import compare
from config import UserError, preset


@pytest.fixture
def make(tmp_path):
    """make(name, preset, final loss, **settings) writes a run of 20 steps whose validation loss falls in a straight line."""

    def go(name, base, final, steps=20, hella=None, dt_ms=3000.0, **settings):
        folder = tmp_path / name
        folder.mkdir()
        cfg = dataclasses.asdict(preset(base)) | dict(run_name=name, total_batch=1000) | settings
        (folder / "config.json").write_text(json.dumps(cfg))
        records = []
        for step in range(0, steps + 1):
            if step:
                records.append(
                    {"step": step, "train/loss": 10.0, "dt_ms": dt_ms, "tok_s": 1e6 / dt_ms}
                )
            if step % 5 == 0:
                record = {"step": step, "val/loss": 10 + (final - 10) * step / max(1, steps)}
                records.append(
                    record | ({"val/hella_norm": hella, "val/hella_se": 0.02} if hella else {})
                )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        return str(folder)

    return go


def rows(out: str) -> dict[str, list[str]]:
    """The cells of each line of the table, by its first one."""
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in out.splitlines()
        if line.startswith("| ")
    ]
    return {row[0]: row[1:] for row in table[1:]}


def test_seeds_are_grouped_and_small_differences_are_none(make, tmp_path, capsys):
    """Standard deviations of 0.01 and 0.03, so s^2 = (2 * 0.01^2 + 0.03^2 * 2) / 4 and 2 s = 0.0447: 0.04 is no difference, 0.05 is."""
    runs = [
        make(f"a{i}", "gpt2-baseline", 5 + d, seed=i, data_seed=i, hella=0.25)
        for i, d in enumerate((-0.01, 0, 0.01))
    ]
    runs += [make(f"b{i}", "gpt2-rope", 4.96 + d, seed=i) for i, d in enumerate((-0.03, 0, 0.03))]
    runs += [make("c", "gpt2-swiglu", 5.05), make("d", "gpt2-modern", 4.5, steps=10, dt_ms=2000.0)]
    compare.main(tuple(runs), out=str(tmp_path / "p.png"))
    out = capsys.readouterr().out
    found = rows(out)
    assert found["gpt2-baseline"] == [
        "3",
        "20,000",
        "5.0000 ± 0.0100",
        "",
        "0.2500 ± 0.0200",
        "333",
    ]
    assert found["gpt2-rope"] == [
        "3",
        "20,000",
        "4.9600 ± 0.0300",
        "-0.0400 no difference",
        "-",
        "333",
    ]
    assert found["gpt2-swiglu"] == ["one", "20,000", "5.0500", "+0.0500 (2.2 s)", "-", "333"]
    assert found["gpt2-modern"] == ["one", "10,000", "4.5000", "-0.5000 (22.4 s)", "-", "500"]
    assert "s = 0.0224" in out and (tmp_path / "p.png").stat().st_size > 10_000


def test_other_settings_are_other_groups_with_names_that_tell(make, tmp_path, capsys):
    runs = [
        make("a", "gpt2-rope", 5.0, max_lr=1e-3, min_lr=1e-4),
        make("b", "gpt2-rope", 5.1, max_lr=2e-3, min_lr=2e-4),
        make("c", "gpt2-rope", 5.2, max_lr=2e-3, min_lr=2e-4, seed=7, B=1),
    ]
    compare.main(tuple(runs), x="time", out=str(tmp_path / "p.png"))
    found = rows(capsys.readouterr().out)
    assert found.keys() == {"gpt2-rope max_lr 0.001", "gpt2-rope max_lr 0.002"}
    assert found["gpt2-rope max_lr 0.002"][0] == "2"


def test_one_seed_each_shows_nothing(make, tmp_path, capsys):
    compare.main(
        (make("a", "gpt2-baseline", 5.0), make("b", "gpt2-rope", 4.0)), out=str(tmp_path / "p.png")
    )
    out = capsys.readouterr().out
    assert rows(out)["gpt2-rope"][3] == "-1.0000 (one seed each)" and "s: not known" in out


def test_a_run_that_leaves_the_band_of_a_reference_is_told(make, tmp_path, capsys):
    """Its loss at 10 of 20 steps, interpolated from 0, 5, 10 ...: 7.5; 2% of that is 0.15."""
    reference, inside = (make(n, "gpt2-baseline", f) for n, f in (("ref", 5.0), ("in", 5.05)))
    outside = make("out", "gpt2-lr-inc", 5.3)
    nan = make("nan", "gpt2-rope", float("nan"))
    compare.main((inside, outside, nan), reference=reference, out=str(tmp_path / "p.png"))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert (
        len(warnings) == 2
        and "out leaves the band of ref" in warnings[0]
        and "nan leaves" in warnings[1]
    )
    compare.main((inside, outside), reference=reference, band=0.1, out=str(tmp_path / "p.png"))
    assert "warning" not in capsys.readouterr().out


def test_the_axes_count_what_they_say(make):
    """20 steps of 1,000 tokens and 3 seconds."""
    folder = make("a", "gpt2-baseline", 5.0)
    assert [
        compare.read(folder, x).val[-1, 0] for x in ("step", "tokens", "time")
    ] == pytest.approx([20, 0.02, 1.0])


def test_every_preset_of_the_readme_has_a_colour_of_its_own():
    assert (
        len(set(compare.COLOURS.values())) == len(compare.COLOURS) == 8
        and compare.OTHER not in compare.COLOURS.values()
    )


def test_mistakes_are_one_line(make, tmp_path):
    (tmp_path / "empty").mkdir()
    for argv, words in (
        ([tmp_path / "empty"], "is not a run"),
        ([], "hint: "),
        ([make("a", "gpt2-rope", 5.0), "--out", "/no/p.png"], "cannot write"),
    ):
        done = run("runlog.py", "compare", *argv)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )
    with pytest.raises(UserError, match="0 steps and 1 evaluations"):
        compare.main((make("b", "gpt2-rope", 5.0, steps=0),))
