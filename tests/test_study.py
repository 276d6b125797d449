"""python -m pytest tests/test_study.py : which runs a study makes, and that it goes on where it stopped. Nothing is trained."""

import json
from pathlib import Path

import pytest

import study
from config import UserError, from_command_line, problems
from study import SEEDS, Study


class Trainer:
    """In the place of subprocess.Popen: notes the settings, and finishes the run with a loss that has its best at 1e-3 or 0.05."""

    def __init__(self, monkeypatch, fails=()):
        self.runs, self.fails = [], list(fails)
        monkeypatch.setattr(study.subprocess, "Popen", self.start)
        monkeypatch.setattr(study.signal, "signal", lambda *_: None)

    def start(self, command):
        cfg, _ = from_command_line(command[2:])
        assert Path(command[1]).name == "train_gpt2.py" and problems(cfg, 1) == []
        self.runs.append(cfg)
        self.cfg, self.returncode = cfg, 75 if len(self.runs) in self.fails else 0
        return self

    def wait(self):
        if self.returncode == 0:
            loss = (
                abs(self.cfg.max_lr / (0.05 if self.cfg.arch == "modern" else 1e-3) - 1)
                + self.cfg.seed / 100
            )
            folder = Path(self.cfg.log_dir, self.cfg.run_name)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "finished.json").write_text(
                json.dumps({"step": self.cfg.max_steps, "val_loss": loss})
            )
        return self.returncode


@pytest.fixture
def compared(monkeypatch):
    """The directories that compare was called with."""
    import compare

    calls = []
    monkeypatch.setattr(
        compare, "main", lambda runs, **_: calls.append([Path(run).name for run in runs])
    )
    return calls


def test_the_runs_are_those_that_the_docstring_tells(monkeypatch, tmp_path, compared):
    trainer = Trainer(monkeypatch)
    study.main(Study("data", str(tmp_path)))
    runs = {cfg.run_name: cfg for cfg in trainer.runs}
    assert len(runs) == len(trainer.runs)  # each one once
    rates = lambda preset: sorted(
        {
            cfg.max_lr
            for cfg in trainer.runs
            if cfg.preset == preset and cfg.seed == SEEDS[0] and cfg.data_order == "global"
        }
    )
    assert rates("gpt2-rope") == [5e-4, 1e-3, 2e-3] and rates("gpt2-modern") == [
        0.0125,
        0.025,
        0.05,
        0.1,
    ]  # past the edge
    for name, lr in (("gpt2-baseline", 1e-3), ("gpt2-rope", 1e-3), ("gpt2-modern", 0.05)):
        assert {cfg.seed for cfg in trainer.runs if cfg.preset == name and cfg.max_lr == lr} == set(
            SEEDS
        )
    for cfg in trainer.runs:
        assert cfg.total_batch == 8192 and cfg.seed == cfg.data_seed
        assert cfg.max_steps * cfg.total_batch == (
            1_048_576 // 2 if cfg.arch == "modern" else 1_048_576
        )
        if cfg.arch == "modern":
            assert (cfg.embed_lr / cfg.max_lr, cfg.head_lr / cfg.max_lr) == pytest.approx(
                (0.7 / 0.025, 0.004 / 0.025)
            )
            assert (
                cfg.n_embd // cfg.n_head == 128
                and cfg.optimizer == "muon"
                and cfg.schedule == "constant_linear"
            )
        else:
            assert cfg.warmup_steps == 6
    assert sorted(
        (cfg.preset, cfg.data_order) for cfg in trainer.runs if cfg.data_order != "global"
    ) == [
        ("gpt2-baseline", "sequential"),
        ("gpt2-lr-inc", "documents"),
        ("gpt2-periodicity-fix", "documents"),
    ]
    assert sorted(compared[0]) == sorted(runs) and compared[0][0] == "gpt2-baseline-0.001-seed1"


def test_what_is_done_is_skipped_and_what_stopped_goes_on(monkeypatch, tmp_path, compared):
    """The fifth run is interrupted: the study ends, and the same command begins with that one."""
    trainer = Trainer(monkeypatch, fails=[5])
    with pytest.raises(UserError, match="gpt2-baseline-0.0005-seed1 ended with status 75; hint: "):
        study.main(Study("data", str(tmp_path), "sweep"))
    assert len(trainer.runs) == 5 and not compared
    study.main(Study("data", str(tmp_path), "sweep"))
    names = [cfg.run_name for cfg in trainer.runs]
    assert names[5] == names[4] and sorted(set(names)) == sorted(names[:4] + names[5:])
    study.main(Study("data", str(tmp_path), "sweep"))
    assert len(trainer.runs) == len(names) and compared[0] == compared[1]


def test_the_size_is_what_it_says():
    import torch

    from model import GPT, GPTConfig

    cfg = study.SHAPE
    for more in (dict(n_head=4), dict(n_head=2, arch="modern")):
        with torch.device("meta"):
            model = GPT(
                GPTConfig(block_size=cfg["T"], n_layer=cfg["n_layer"], n_embd=cfg["n_embd"], **more)
            )
        assert sum(p.numel() for p in model.h.parameters()) >= 10e6
