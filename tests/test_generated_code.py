"""python -m pytest -m slow tests/test_generated_code.py

The kernels that torch.compile generates for an H100, read on any machine (fake_gpu/).
"""

import json
from collections import Counter

import pytest

import config

pytest.importorskip("triton", reason="pip install triton==3.7.1, with a CPU build of torch, too")
pytestmark = pytest.mark.slow

PRESETS = ("gpt2-baseline", "gpt2-rope", "gpt2-modern")
B = 64


def count_calls(graphs: list[dict], backward: bool, word: str) -> int:
    return sum(word in name for g in graphs if g["backward"] == backward for name in g["calls"])


@pytest.mark.parametrize("cut", ["uncut", "ddp"])
def test_kernels_of_two_layers(fake_gpu, cut):
    """A training step in bfloat16, forward and backward, whole or cut into DDP's buckets.

    No kernel computes a cosine, a sine or a power: RoPE's tables are made once, not in each layer.
    Positions and norms of q and k cost no copy that the baseline has not. The logits are stored
    once, never in float32, and their gradient takes their place.
    """
    lines = fake_gpu("generated_code.py", B, 2, cut, *PRESETS)
    graphs = {name: json.loads(line) for name, line in zip(PRESETS, lines, strict=True)}
    baseline = graphs["gpt2-baseline"]
    for name, of_preset in graphs.items():
        cfg = config.preset(name)
        # the control: all of the step is there, in the expected number of pieces
        pieces = Counter(graph["backward"] for graph in of_preset)
        assert pieces == ({False: 1, True: 1} if cut == "uncut" else {False: 4, True: 4}), name
        for backward in (False, True):
            attention = "_scaled_dot_product_flash_attention"
            assert count_calls(of_preset, backward, attention) == 2, name
            copies = count_calls(of_preset, backward, "clone")
            assert copies <= count_calls(baseline, backward, "clone"), (name, backward)
            if not backward:
                assert copies == 0, name
        assert [graph["trigonometry"] for graph in of_preset if graph["trigonometry"]] == [], name
        logits = B * cfg.T * cfg.vocab_size
        buffers = [buffer for graph in of_preset for buffer in graph["buffers"]]
        assert [dtype for n, dtype in buffers if n >= logits] == ["bfloat16"], name
