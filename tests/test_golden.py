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
        6.243838 6.249669 6.228640 6.274059 6.265439 6.259525 6.256571 6.255401 6.255384 6.283985
        0.484020 0.431734 0.295436 0.289803 0.291487 0.273704 0.288556 0.303281 0.287954 0.293500
        6.241136 6.255795
    """,
    "gpt2-rope": """
        6.255663 6.235247 6.246443 6.267574 6.250474 6.252441 6.262475 6.253920 6.270726 6.269170
        0.599855 0.521709 0.332754 0.285812 0.299902 0.294166 0.280338 0.284757 0.296484 0.279398
        6.243826 6.272334
    """,
    "gpt2-swiglu": """
        6.251292 6.241093 6.255202 6.248075 6.252886 6.246310 6.256773 6.255587 6.269219 6.274918
        0.614525 0.536846 0.324435 0.277180 0.270348 0.293666 0.276314 0.256988 0.278059 0.276850
        6.249364 6.273954
    """,
    "gpt2-modern": """
        6.238325 6.238820 6.238712 6.241369 6.240596 6.242930 6.239969 6.240655 6.239451 6.241083
        0.248495 0.250544 0.250267 0.246663 0.250042 0.251615 0.249541 0.248153 0.247730 0.252064
        6.238325 6.239900
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
    steps = "--max_steps 10 --warmup_steps 2 --max_lr 1e-2"
    status, _ = train_here(name, *TINY, steps, *places)
    assert status == 0
    records = read_metrics(tmp_path / "r")
    updates = [r for r in records if "train/loss" in r]
    assert [r["train/loss"] for r in updates] == pytest.approx(losses, rel=1e-6)
    assert [r["train/norm"] for r in updates] == pytest.approx(norms, rel=1e-4)
    evaluations = [r["val/loss"] for r in records if "val/loss" in r]
    assert evaluations == pytest.approx(val_losses, rel=1e-6)
