"""The laws of evaluate.py that need no training run; the rest is in test_train.py.

python -m pytest tests/test_evaluate.py
"""

import collections

import numpy as np
import pytest
from conftest import write_shards
from test_shards import open_windows

from evaluate import bigram_loss


def test_bigram_loss_is_that_of_the_formula(tmp_path):
    """MacKay and Peto's p(b | a), the best of seven k; None for a split that is too large."""
    folder = write_shards(tmp_path, {"train": [3000], "val": [500]}, ids=20)
    train, val = (open_windows(folder, 10, split=split) for split in ("train", "val"))
    tokens = np.load(folder / "data_train_000000.npy").astype(int)
    held_out = np.load(folder / "data_val_000000.npy").astype(int)
    pairs = collections.Counter(zip(tokens[:-1], tokens[1:]))
    singles = collections.Counter(tokens)
    n = val.per_epoch() * 10
    losses = []
    for k in (10, 20, 50, 100, 200, 500, 1000):
        nats = []
        for a, b in zip(held_out[:n], held_out[1 : n + 1]):
            p_b = (singles[b] + 1) / (3000 + 50257)
            nats.append(-np.log((pairs[a, b] + k * p_b) / (singles[a] + k)))
        losses.append(np.mean(nats))
    assert bigram_loss(train, val, 10**6) == pytest.approx(min(losses), abs=1e-9)
    assert bigram_loss(train, val, 10**6, largest=100) is None
