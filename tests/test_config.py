"""The laws of config.py: presets are complete, mistakes are named, what may change on resuming.

python -m pytest tests/test_config.py
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import write_shards

from config import (
    FREE_ON_RESUME,
    PRESETS,
    TrainConfig,
    as_stored,
    differences,
    from_command_line,
    preset,
    preset_defaults,
)
from preflight import NOT_NEGATIVE, POSITIVE, check, problems
from runtime.command_line import UserError
from runtime.world import World

FIELDS = {field.name for field in dataclasses.fields(TrainConfig)}

CHANGES = [
    {},
    {"max_steps": 100},
    {"max_steps": 100, "warmup_steps": 7},
    {"max_steps": 40_000},
    {"epochs": 2.5},
    {"max_lr": 1e-3},
    {"max_lr": 1e-3, "min_lr": 0.0},
    {"T": 512, "B": "auto"},
    {"T": 512, "block_size": 4096},
    {"betas": (0.8, 0.9), "run_name": "mine", "use_compile": False},
]


def as_options(changes: dict) -> list[str]:
    """Return settings as words of the command line."""
    words = []
    for name, value in changes.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name}", *map(str, values)]
    return words


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_with_changes_is_what_the_command_line_gives(name, changes):
    assert preset(name, **changes) == from_command_line([name, *as_options(changes)])[0]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_complete_and_pass_the_check(name):
    """Nothing that follows from other settings is left open, and nothing is wrong."""
    cfg = preset(name)
    assert cfg.preset == cfg.run_name == name
    assert cfg.block_size == cfg.T
    min_lr = preset_defaults(name).min_lr
    assert cfg.min_lr == (pytest.approx(cfg.max_lr / 10) if min_lr is None else min_lr)
    assert [field for field in FIELDS if getattr(cfg, field) is None] in ([], ["epochs"])
    assert problems(cfg, world_size=1) == []


def test_what_follows_from_other_settings_follows_the_changes():
    """A shorter run keeps its share of warm-up, unless it is given; steps replace epochs."""
    cfg, notes = from_command_line(["gpt2-rope", "--max_steps", "1907"])
    assert cfg.warmup_steps == 300 * 1907 // 19073
    assert len(notes) == 1
    assert "max_steps 1907 instead of 19073" in notes[0]
    assert "300 to 29 steps" in notes[0]
    assert preset("gpt2-rope", max_steps=1907, warmup_steps=300).warmup_steps == 300
    assert preset("gpt2-rope", max_steps=40_000).warmup_steps == 300
    assert preset("gpt2-rope-t2048").epochs == 4
    assert preset("gpt2-rope-t2048", max_steps=7).epochs is None
    assert preset("gpt2-rope", max_lr=1e-3).min_lr == pytest.approx(1e-4)
    assert preset("gpt2-rope", T=512).block_size == 512


def test_unknown_names_are_refused_with_near_ones():
    """Settings, options and presets; all unknown settings at once."""
    for mistake, words in (
        (lambda: preset("gpt2-rop"), "no preset 'gpt2-rop'; hint: did you mean gpt2-rope"),
        (lambda: preset("gpt2-rope", max_step=3), "no setting max_step: did you mean max_steps"),
        (lambda: preset("gpt2-rope", zzzz=3), "no setting zzzz: one of n_layer, n_head, "),
        (lambda: preset("gpt2-rope", preset="gpt2-swiglu"), "no setting preset"),
        (lambda: from_command_line(["gpt2-rop"]), "gpt2-rope"),
        (lambda: from_command_line(["--max_step", "3"]), "no option --max_step: .* max_steps"),
    ):
        with pytest.raises(UserError, match=words):
            mistake()
    with pytest.raises(UserError, match="no setting max_l: .*max_lr.*; no setting sed: .*seed"):
        preset("gpt2-rope", max_l=3, sed=1)


def test_epochs_and_steps_are_not_both_given():
    for mistake in (
        lambda: preset("gpt2-rope", epochs=2.0, max_steps=7),
        lambda: from_command_line(["gpt2-rope", "--epochs", "2", "--max_steps", "7"]),
    ):
        with pytest.raises(UserError, match="epochs 2 and max_steps 7 both .*hint: give one"):
            mistake()


def test_paths_of_a_preset_may_begin_at_home(monkeypatch):
    """On the command line and from Python: no shell expands what stands behind =."""
    monkeypatch.setenv("HOME", "/h")
    for name in ("data_root", "log_dir", "ckpt_dir", "init_from", "resume"):
        cfg, _ = from_command_line(["gpt2-rope", f"--{name}=~/x"])
        assert getattr(cfg, name) == "/h/x"
        assert preset("gpt2-rope", **{name: "~/x"}) == cfg
    assert preset("gpt2-rope", log_dir="~", sample_prompt="~/x").sample_prompt == "~/x"


def test_a_preset_stands_first():
    with pytest.raises(UserError, match="'gpt2-rope' belongs to no option: a preset is the first"):
        from_command_line(["--B", "4", "gpt2-rope"])


def checked(tmp_path, *words) -> TrainConfig:
    """Return the settings that preflight.check() makes of a command line, on 4,000 tokens."""
    data = write_shards(tmp_path / "data", {"train": [4001], "val": [1000]})
    size = "--T 20 --B 1 --total_batch 20 --val_tokens 20 --device cpu"  # 200 steps per epoch
    options = ["shakespeare", "--data_root", str(data), *size.split(), *words]
    cfg, _ = from_command_line(options)
    return check(cfg, World(0, 1, torch.device("cpu")))[0]


def test_the_rules_hold_for_the_length_that_epochs_give(tmp_path):
    """A given warm-up is kept, and refused as with --max_steps when it is too long."""
    cfg = checked(tmp_path, "--epochs", "1")
    assert (cfg.max_steps, cfg.warmup_steps) == (200, 20)  # the preset has 500 and 50
    assert checked(tmp_path, "--epochs", "1", "--warmup_steps", "50").warmup_steps == 50
    errors = []
    for length in (["--epochs", "1"], ["--max_steps", "200"]):
        with pytest.raises(UserError, match="warmup_steps 200 must be below max_steps 200") as e:
            checked(tmp_path, *length, "--warmup_steps", "200")
        errors.append(str(e.value))
    assert errors[0] == errors[1]
    for epochs in ("inf", "nan", "0"):
        with pytest.raises(UserError, match="epochs is .*, must be a number above 0; hint: "):
            checked(tmp_path, "--epochs", epochs)


def test_directories_of_a_run():
    cfg = preset("gpt2-rope")
    assert cfg.run_dir == Path("log/gpt2-rope")
    assert cfg.checkpoint_dir == Path("log/gpt2-rope/ckpt")
    cfg = preset("gpt2-rope", log_dir="/data/log", run_name="a", ckpt_dir="/data/ckpt")
    assert cfg.run_dir == Path("/data/log/a")
    assert cfg.checkpoint_dir == Path("/data/ckpt")


def test_lists_of_settings_name_settings():
    assert set(POSITIVE) | set(NOT_NEGATIVE) | FREE_ON_RESUME <= FIELDS
    assert not set(POSITIVE) & set(NOT_NEGATIVE)


def test_what_may_change_when_a_run_is_resumed():
    """All that decides the result is listed with both values, the rest is not.

    Steps computed from the same epochs may differ: the data may have grown.
    """
    cfg = preset("gpt2-rope")
    stored = as_stored(cfg)
    assert differences(cfg, stored) == ""
    assert differences(preset("gpt2-rope", B=8, device="cpu", keep_last=9), stored) == ""
    changed = differences(preset("gpt2-rope", max_lr=1e-3, seed=7), stored)
    assert changed == "max_lr 0.0015 -> 0.001, min_lr 0.00015 -> 0.0001, seed 42 -> 7"
    assert "preset gpt2-rope -> gpt2-swiglu" in differences(preset("gpt2-swiglu"), stored)
    del stored["arch"]  # an older version did not know it
    assert differences(cfg, stored) == ""

    by_epochs = preset("gpt2-rope-t2048")
    grown = dataclasses.replace(by_epochs, max_steps=5, warmup_steps=1)
    assert differences(grown, as_stored(by_epochs)) == ""
    assert "epochs 4 -> 3" in differences(preset("gpt2-rope-t2048", epochs=3), as_stored(by_epochs))
