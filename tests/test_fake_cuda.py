"""python -m pytest tests/test_fake_cuda.py

What a GPU would refuse, or have no room for, on CUDA tensors without content (fake_gpu/).
"""

import json

import pytest
from conftest import ROOT

import config

HELLASWAG_ITEMS = ROOT / "tests" / "hellaswag_items.jsonl"


def kind(preset: str) -> tuple:
    """Return what a preset's model and its training step depend on, sizes apart."""
    cfg = config.preset(preset)
    return cfg.use_rope, cfg.use_swiglu, cfg.arch, cfg.optimizer, cfg.grad_norm_clip


def test_no_tensor_is_on_the_wrong_device_or_of_the_wrong_type(fake_gpu):
    """Training steps, evaluation, HellaSwag and decoding of every kind of preset.

    A training step with and without recomputation, by AdamW and Muon, with clipping and a step that
    may be skipped; decoding under autocast and with bfloat16 weights. Optimizer states and caches
    are on the GPU. The controls fail, so the rest could.
    """
    errors = dict(json.loads(line) for line in fake_gpu("cases.py", HELLASWAG_ITEMS))
    assert "at least two devices" in errors.pop("control: two devices")
    assert "mm of [torch.bfloat16, torch.float32]" in errors.pop("control: two types")
    trained = {kind(name.split()[0]) for name in errors if "train" in name}
    assert trained == {kind(preset) for preset in config.PRESETS}
    assert errors == dict.fromkeys(errors)


# GB as simulated with torch 2.13; the bound is 5% above
PEAKS = {
    ("gpt2-baseline", False): 63.4,
    ("gpt2-baseline", True): 43.9,
    ("gpt2-rope", False): 65.8,
    ("gpt2-swiglu", False): 71.4,
    ("gpt2-modern", False): 93.8,
}


@pytest.mark.slow
@pytest.mark.parametrize("preset, recompute", PEAKS)
def test_peak_memory_of_a_step_of_64_sequences(fake_gpu, preset, recompute):
    """124M, B = 64, T = 1024, uncompiled: 5% above what it was at most. Compiled it is less.

    Where it is 10% below, the figure should be lowered.
    """
    peak = int(fake_gpu("peak_memory.py", preset, 64, recompute)[-1]) / 1e9
    assert 0.9 * PEAKS[preset, recompute] < peak < 1.05 * PEAKS[preset, recompute]
