"""python -m pytest tests/test_golden.py : ten steps of training have the losses that they had.

Recorded with the version before the script was split into modules (289b470), through the whole
command: shards, order, model, gradients, optimizer, schedule, evaluation. A change that is not
meant to change what is learned must not change them. (test_model.py has more, of the model alone.)
"""

import pytest
from conftest import TINY, options, write_shards

from runtime.runlog import read_metrics

# preset: losses of ten steps; their gradient norms; validation loss before and after
GOLDEN = {
    "gpt2-baseline": """
        6.243838 6.249671 6.228493 6.273742 6.265206 6.258825 6.255075 6.254880 6.254116 6.281212
        0.484020 0.431737 0.294977 0.287449 0.290121 0.272103 0.286904 0.305579 0.288175 0.286457
        6.241136 6.258478
    """,
    "gpt2-rope": """
        6.255663 6.235246 6.246443 6.266459 6.250093 6.249531 6.262593 6.250059 6.266068 6.264275
        0.599855 0.521720 0.332223 0.284901 0.293741 0.294472 0.276650 0.273942 0.287448 0.274742
        6.243826 6.270367
    """,
    "gpt2-swiglu": """
        6.251292 6.241101 6.255331 6.246931 6.254915 6.245278 6.257859 6.253531 6.268961 6.272355
        0.614525 0.536821 0.324373 0.275100 0.269333 0.289742 0.274222 0.255688 0.277668 0.274790
        6.249364 6.274173
    """,
    "gpt2-modern": """
        6.238325 6.238820 6.238712 6.241346 6.240569 6.242942 6.239991 6.240724 6.239460 6.241088
        0.248495 0.250544 0.250267 0.246686 0.250043 0.251581 0.249526 0.248170 0.247739 0.252074
        6.238325 6.239901
    """,
}


@pytest.mark.parametrize("name", GOLDEN)
def test_ten_steps_equal_golden_losses(name, tmp_path, train_here):
    """Losses to 1e-6 of their value, norms to 1e-4.

    With SSE, AVX2 or AVX512 kernels losses differ by 2e-7, norms by 1e-5.
    """
    losses, norms, val_losses = (
        [float(number) for number in line.split()] for line in GOLDEN[name].strip().splitlines()
    )
    data = write_shards(tmp_path / "data", {"train": [6000, 4000], "val": [2000]}, ids=512)
    places = options("--data_root", data, "--log_dir", tmp_path, "--run_name r")
    steps = "--max_steps 10 --warmup_steps 2 --max_lr 1e-2 --grad_norm_clip 0.25"
    status, _ = train_here(name, *TINY, steps, *places)
    assert status == 0
    records = read_metrics(tmp_path / "r")
    updates = [r for r in records if "train/loss" in r]
    assert [r["train/loss"] for r in updates] == pytest.approx(losses, rel=1e-6)
    assert [r["train/norm"] for r in updates] == pytest.approx(norms, rel=1e-4)
    evaluations = [r["val/loss"] for r in records if "val/loss" in r]
    assert evaluations == pytest.approx(val_losses, rel=1e-6)
