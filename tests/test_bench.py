"""python -m pytest tests/test_bench.py

The parts of bench/ as a user calls them, at a size where the figures mean nothing: exit status,
table, and the line of JSON.
"""

import json
import statistics
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, run

import shards
from bench.__main__ import PARTS
from bench.common import REPO, Side, alternate
from bench.hellaswag import other_choices
from bench.loader import BASELINE, BaselineLoader, open_windows, sparse_shards
from bench.step import BASELINES, StepPart, peak_memory
from bench.suite import SuitePart, describe_machine, run_tests, run_variants
from bench.transformers_gpt2 import transformers_gpt2
from config import preset
from runtime.command_line import UserError, parse
from runtime.world import World
from shard_files import open_shards

HELLASWAG_ITEMS = ROOT / "tests" / "hellaswag_items.jsonl"
CPU = "--size tiny --device cpu".split()
STEP = [*CPU, *"--vocab_size 256 --dtype float32 --use_compile False --steps 3".split()]
LOADER = "loader --B 4 --T 64 --windows 1000 --tokens 50000 --batches 5 --rounds 3".split()


def measure(*args) -> tuple[list[str], dict]:
    """Run a part; return the lines of its table and its result."""
    done = run("-m", "bench", *args)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.strip().splitlines()
    return lines, json.loads(last)


def measure_here(*args) -> dict:
    """Return the result of a part, run in this process: transformers takes seconds to import."""
    part, *options = map(str, args)
    return parse(PARTS[part], args=options).measure()


# --------------------------------------------------------------------------------------------------
# what all parts share


def test_sides_alternate():
    """A B A B, after the warm-up of each side; the last result of each is kept."""
    calls = []

    def second():
        calls.append("b")
        return 7

    sides = {"a": Side(lambda: calls.append("a")), "b": Side(second)}
    alternate(sides, warmup=2, rounds=3)
    assert "".join(calls) == "aabb" + "ab" * 3
    assert [side.result for side in sides.values()] == [None, 7]
    assert [len(side.ms) for side in sides.values()] == [3, 3]


@pytest.mark.parametrize("calls_that_fit", [0, 2, 4])
def test_a_side_that_does_not_fit_is_a_row(capsys, calls_that_fit):
    """Out of memory at any call ends that side only, without a figure, and frees its model."""
    calls = []

    def baseline():
        if len(calls) == calls_that_fit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        calls.append(1)
        return 5.0

    def repo():
        time.sleep(0.001)
        return 5.0

    part = StepPart(device="cpu", size="tiny", dtype="float32", B=2, T=32)
    sides = {REPO: Side(repo, 64), "transformers": Side(baseline, 64)}
    alternate(sides, warmup=2, rounds=3)
    result = part.result(sides, {REPO: 10**9, "transformers": None})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["transformers", "does", "not", "fit"] in rows
    assert len(result["ms"][REPO]) == 3 and result["ms"]["transformers"] == []
    assert result["ratio"] is None and result["memory_ratio"] is None
    assert sides["transformers"].run is None
    json.dumps(result, allow_nan=False)


def test_other_errors_of_a_side_are_not_hidden():
    def broken():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        alternate({"a": Side(broken)}, 1, 1)


# --------------------------------------------------------------------------------------------------
# step, sweep, profile


def test_step_prints_a_table_and_one_line_of_json():
    lines, result = measure(
        "step", *STEP, "--B", "2", "--T", "32", "--memory", "False", "--preset", "gpt2-rope"
    )
    assert result["part"] == "step"
    rates, ms = result["tok_s"], result["ms"]
    assert result["ratio"] == pytest.approx(rates[REPO] / rates["transformers"])
    for name in (REPO, "transformers"):
        assert len(ms[name]) == 3
        assert rates[name] == pytest.approx(1e3 * 2 * 32 / statistics.median(ms[name]))
        assert any(line.startswith(name) for line in lines)
    settings = dict(B=2, T=32, preset="gpt2-rope", use_compile=False, dtype="float32")
    assert result.items() >= settings.items()
    assert {"torch", "transformers", "threads", "device"} <= result.keys()
    assert "memory_ratio" not in result


def test_step_with_a_named_attention():
    """A CPU has flash attention alone; --attention reaches the step."""
    options = [*STEP, "--B", "2", "--T", "32", "--memory", "False", "--against", "gpt2-rope"]
    result = measure_here("step", *options, "--attention", "flash")
    assert result["attention"] == "flash" and result["ratio"] > 0
    with pytest.raises(RuntimeError, match="[Nn]o available kernel|No viable backend"):
        measure_here("step", *options, "--attention", "cudnn")


def test_the_baseline_is_transformers_at_its_best():
    """No dropout, SDPA, no cache, a tied head."""
    baseline = transformers_gpt2(32, dict(n_layer=2, n_head=2, n_embd=64, vocab_size=256))
    c = baseline.config
    assert c._attn_implementation == "sdpa" and c.use_cache is False and baseline.training
    assert c.resid_pdrop == c.embd_pdrop == c.attn_pdrop == 0.0
    assert baseline.get_input_embeddings().weight is baseline.get_output_embeddings().weight


def test_a_mistake_is_one_line():
    done = run("-m", "bench", *LOADER, "--tokens", "100")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: 100 tokens ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args, message",
    [
        (["step", *STEP, "--B", "0", "--steps", "0"], "B is 0, .*; steps is 0, .* hint: --B 1"),
        (["step", *STEP, "--against", "gpt2-modrn"], "did you mean gpt2-modern"),
        (["sweep", *STEP, "--Bs", "2", "0"], "Bs is .2, 0."),
        (["generate", *CPU, "--batches", "0"], "batches is .0,."),
        (["hellaswag", *CPU, "--data", "none.jsonl"], "no such file: none.jsonl"),
        (["suite", "--device", "cuda:99"], "hint: "),
    ],
)
def test_mistakes(args, message):
    with pytest.raises(UserError, match=message):
        measure_here(*args)


@pytest.mark.slow
def test_step_against_several():
    """The ratio is to the first of --against; each has its own in `ratios`."""
    against = ("gpt2-baseline", "transformers-compiled")
    _, result = measure(
        *("step", *STEP, "--B", "2", "--T", "32", "--memory", "False"),
        *("--preset", "gpt2-modern", "--against", *against),
    )
    assert tuple(result["ratios"]) == against
    assert result["ratio"] == result["ratios"]["gpt2-baseline"]
    for name in against:
        expected = result["tok_s"][REPO] / result["tok_s"][name]
        assert result["ratios"][name] == pytest.approx(expected)


@pytest.mark.slow
def test_step_measures_memory():
    """Peak memory grows with the logits, which are the largest activation here."""
    _, result = measure("step", *STEP, "--B", "2", "--T", "32")
    peak = result["peak"]
    assert result["memory_ratio"] == pytest.approx(peak[REPO] / peak["transformers"])
    assert 1e8 < peak[REPO] < 4e9
    big = StepPart(size="tiny", B=64, T=256, vocab_size=4096, device="cpu", use_compile=False)
    assert peak_memory(big, REPO) - peak[REPO] > 2 * 64 * 256 * 4096 * 4  # and their gradient


def test_sweep_has_a_figure_for_each_shape():
    result = measure_here("sweep", *STEP, "--Bs", "1", "2", "--Ts", "16", "32")
    assert set(result["tok_s"]) == set(result["flop_s"]) == {"1x16", "1x32", "2x16", "2x32"}
    assert 0 < result["ratio"] <= 1


def test_profile_adds_up():
    """Kinds and gaps make the step's time; matrix products are found under their name."""
    _, result = measure("profile", *STEP, "--B", "2", "--T", "64")
    for kind in ("matmul", "attention", "optimizer, clip"):
        assert result["kind_ms"][kind] > 0
    floor = sum(result["floor_ms"].values())
    assert result["ratio"] == pytest.approx(floor / statistics.median(result["ms"]))


# --------------------------------------------------------------------------------------------------
# loader


def test_loader_prints_a_table_and_one_line_of_json():
    lines, result = measure(*LOADER)
    sizes, rates = result["index_bytes"], result["tok_s"]
    assert result["memory_ratio"] == pytest.approx(sizes[BASELINE] / sizes[REPO])
    assert result["ratio"] == pytest.approx(rates[REPO] / rates[BASELINE])
    median = statistics.median(result["ms"][REPO])
    assert rates[REPO] == pytest.approx(1e3 * 5 * 4 * 64 / median)
    assert len(result["ms"][REPO]) == len(result["ms"][BASELINE]) == 3
    assert any("index of 1,000 windows" in line for line in lines)


def test_both_loaders_yield_the_same_windows_in_another_order(tmp_path):
    """Like for like: x, y int64, contiguous, every window of an epoch."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(2):
        tokens = np.arange(i * 2000, i * 2000 + 1601, dtype=np.uint16)
        np.save(folder / f"a_train_{i}.npy", tokens)
    baseline = BaselineLoader(str(folder), 4, 16)
    world = World(0, 1, torch.device("cpu"))
    loader = shards.Loader(open_windows(str(folder), 16), 64, 4, world)
    windows = {}
    for name, get_batch in (("baseline", baseline.get_batch), ("repo", loader.take)):
        windows[name] = []
        for _ in range(50):
            x, y, *_ = get_batch()
            assert x.dtype == y.dtype == torch.int64
            assert x.is_contiguous() and y.is_contiguous()
            windows[name] += [(*a, b) for a, b in zip(x.tolist(), y[:, -1].tolist())]
    loader.close()
    assert windows["baseline"] != windows["repo"]
    assert set(windows["baseline"]) <= set(windows["repo"])
    assert len(set(windows["repo"])) == 200


def test_sparse_shards_are_shards(tmp_path):
    sparse_shards(str(tmp_path / "s"), [10_000_000, 500])
    shard_list = open_shards(str(tmp_path / "s"), "train", 64)
    assert [shard.tokens for shard in shard_list] == [10_000_000, 500]
    assert not np.load(tmp_path / "s" / "sparse_train_000000.npy", mmap_mode="r")[::10_000].any()


# --------------------------------------------------------------------------------------------------
# hellaswag, generate


def test_hellaswag_counts_other_choices():
    """In float32 both sides score alike; in bfloat16 each is also compared with float32."""
    results = {}
    for dtype in ("float32", "bfloat16"):
        options = ("--items", "4", "--rounds", "2", "--dtype", dtype, "--data", HELLASWAG_ITEMS)
        results[dtype] = measure_here("hellaswag", *CPU, *options)
        assert results[dtype]["ratio"] > 0 and len(results[dtype]["ms"][REPO]) == 2
    assert results["float32"]["other_choices"] == 0
    assert results["float32"]["largest_difference"] < 1e-3
    assert "other_than_float32" not in results["float32"]
    assert {"other_than_float32", "baseline_other_than_float32"} <= results["bfloat16"].keys()


def test_a_draw_is_no_other_choice():
    a = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 1.0000001, 2, 3]])
    b = np.array([[1, 2, 3, 4], [2, 1, 3, 4], [1.0000001, 1, 2, 3]])
    assert other_choices(a, b, np.ones((3, 4))) == 1


def test_generate_compares_the_fastest_types(capsys):
    """Both sides continue alike in float32; ratios are of each program's fastest type."""
    options = "--batches 1 3 --new_tokens 6 --rounds 1 --dtypes float32 bfloat16".split()
    result = measure_here("generate", *CPU, *options)
    rates = result["tok_s"]
    assert result["same_tokens"] == {"batch 1": 1, "batch 3": 1}

    def fastest(program, B):
        return max(rates[f"{program} {dtype}, batch {B}"] for dtype in ("float32", "bfloat16"))

    for B in (1, 3):
        expected = fastest(REPO, B) / fastest("transformers", B)
        assert result[f"batch{B}_ratio"] == pytest.approx(expected)
    int8 = f"{REPO} int8, batch 1"
    assert result["int8_ratio"] == pytest.approx(rates[int8] / fastest("transformers", 1))
    assert rates[int8] == pytest.approx(1e3 * 6 / result["ms"][int8][0])
    floors = [result["floor_tok_s"][f"{REPO} {t}, batch 1"] for t in ("float32", "bfloat16")]
    assert floors[1] == pytest.approx(2 * floors[0])
    assert result["deviation"]["int8"]["largest"] > 0
    assert result["deviation"]["int8"]["same_token"] > 0.9
    assert "weights read once per token" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# suite


def test_the_command_lines_of_the_suite_are_understood():
    """Each is one that `python -m bench` takes, on the device that was asked for."""
    for part, *options in SuitePart(device="cpu").variants():
        settings = parse(PARTS[part], args=options)
        assert settings.device == "cpu"
        if part == "step":
            for name in {settings.preset, *settings.against} - set(BASELINES):
                preset(name)


def test_the_suite_continues_after_a_failure(tmp_path, capsys):
    """Each result is a line of the file; a failure is one, too, and the next part follows."""
    path = tmp_path / "out" / "bench.jsonl"
    variants = [["loader", "--tokens", "100"], LOADER]
    results, failed, not_run = run_variants(variants, path, time.monotonic() + 600)
    assert failed == ["loader --tokens 100"] and not_run == []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"part": "loader", "command": variants[0], "failed": 2}, *results]
    assert results[0]["part"] == "loader"
    assert capsys.readouterr().out.splitlines()[-1] == "failed | loader --tokens 100"


def test_the_suite_ends_in_time(tmp_path, capsys):
    """What is left when the time is up is named, and not run."""
    results = run_variants([LOADER], tmp_path / "bench.jsonl", time.monotonic() - 1)
    assert results == ([], [], [" ".join(LOADER)])
    assert capsys.readouterr().out == f"not run | {' '.join(LOADER)}\n"


def test_the_suite_begins_with_the_machine():
    """Versions, hardware, and the kernels that attention runs."""
    machine = describe_machine("cpu")
    assert machine["torch"] == torch.__version__
    assert any("attention" in name for name in machine["attention"])
    json.dumps(machine)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes on a machine with a GPU")
def test_the_suite_counts_its_tests():
    """Without a GPU all of them are skipped, none has failed."""
    result = run_tests()
    assert result["failed"] == [] and result["skipped"] > 20 and "passed" not in result
