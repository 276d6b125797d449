"""python -m pytest tests/test_bench.py

bench.py as a user calls it, at a size where the figures mean nothing: exit status, table, and the line of JSON.
"""

import json
import statistics
import subprocess
import types

import numpy as np
import pytest
from conftest import ROOT, run

import bench
import shards

TINY = (
    "bench.py",
    "step",
    "--size",
    "tiny",
    "--B",
    "2",
    "--T",
    "32",
    "--vocab_size",
    "256",
    "--steps",
    "3",
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--use_compile",
    "False",
    "--memory",
    "False",
)


def test_step_prints_a_table_and_one_line_of_json():
    done = run(*TINY, "--preset", "gpt2-rope")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.strip().splitlines()
    result = json.loads(last)
    assert result["part"] == "step" and result["ratio"] > 0
    assert result["ratio"] == pytest.approx(result["tok_s"] / result["baseline_tok_s"])
    for tok_s, ms in (("tok_s", "ours_ms"), ("baseline_tok_s", "baseline_ms")):
        assert len(result[ms]) == 3
        assert result[tok_s] == pytest.approx(1e3 * 2 * 32 / statistics.median(result[ms]))
        assert any(
            f"{result[tok_s]:,.0f}" in line for line in table
        )  # absolute figures for people, too
    assert (
        result.items()
        >= dict(B=2, T=32, preset="gpt2-rope", use_compile=False, dtype="float32").items()
    )
    assert {"torch", "transformers", "threads", "device"} <= result.keys()


def test_sides_take_turns():
    calls = []
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b") or 7}
    ms, last = bench.take_turns(sides, warmup=2, rounds=3)
    assert "".join(calls) == "aabb" + "ab" * 3
    assert last == {"a": None, "b": 7} and [len(values) for values in ms.values()] == [3, 3]


def test_the_baseline_is_transformers_at_its_best():
    baseline = bench.transformers_gpt2(32, dict(n_layer=2, n_head=2, n_embd=64, vocab_size=256))
    c = baseline.config
    assert c._attn_implementation == "sdpa" and c.use_cache is False and baseline.training
    assert c.resid_pdrop == c.embd_pdrop == c.attn_pdrop == 0.0
    assert baseline.get_input_embeddings().weight is baseline.get_output_embeddings().weight  # tied


LOADER = (
    "bench.py",
    "loader",
    "--B",
    "4",
    "--T",
    "64",
    "--windows",
    "1000",
    "--tokens",
    "50000",
    "--batches",
    "5",
    "--rounds",
    "3",
)


def test_loader_prints_a_table_and_one_line_of_json():
    done = run(*LOADER)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.strip().splitlines()
    result = json.loads(last)
    assert result["part"] == "loader" and result["memory_ratio"] > 0 and result["index_bytes"] < 1e6
    assert result["ratio"] == pytest.approx(result["tok_s"] / result["baseline_tok_s"])
    assert result["tok_s"] == pytest.approx(1e3 * 5 * 4 * 64 / statistics.median(result["ours_ms"]))
    assert (
        len(result["ours_ms"]) == len(result["baseline_ms"]) == 3
        and len(result["ratio_quartiles"]) == 3
    )
    assert {
        "windows_tok_s",
        "thread_tok_s",
        "index_s",
        "baseline_index_s",
        "baseline_index_bytes",
    } <= result.keys()
    assert any("index of 1,000 windows" in line for line in table)
    done = run(*LOADER, "--tokens", "100")
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: 100 tokens ")
        and done.stderr.count("\n") == 1
    )


def test_both_loaders_yield_the_same_windows_in_another_order(tmp_path):
    """Like for like: x, y int64, contiguous, every window of an epoch."""
    (tmp_path / "s").mkdir()
    for i in range(2):
        np.save(
            tmp_path / "s" / f"a_train_{i}.npy",
            np.arange(i * 2000, i * 2000 + 1601, dtype=np.uint16),
        )
    usual = bench.UsualLoader(str(tmp_path / "s"), 4, 16)
    ours = shards.Loader(
        bench.open_windows(str(tmp_path / "s"), 16), 64, 4, 0, 1, bench.torch.device("cpu")
    )
    rows = {}
    for name, get in (("usual", usual.get_batch), ("ours", lambda: ours.next()[0][:2])):
        rows[name] = []
        for _ in range(50):
            x, y = get()
            assert (
                x.dtype == y.dtype == bench.torch.int64 and x.is_contiguous() and y.is_contiguous()
            )
            rows[name] += [(*a, b) for a, b in zip(x.tolist(), y[:, -1].tolist())]
    ours.close()
    assert (
        rows["usual"] != rows["ours"]
        and set(rows["usual"]) <= set(rows["ours"])
        and len(set(rows["ours"])) == 200
    )


def test_sparse_shards_are_shards(tmp_path):
    bench.sparse_shards(str(tmp_path / "s"), [10_000_000, 500])
    assert [s.tokens for s in shards.open_shards(str(tmp_path / "s"), "train", 64)] == [
        10_000_000,
        500,
    ]
    assert not np.load(tmp_path / "s" / "sparse_train_000000.npy", mmap_mode="r")[::10_000].any()


def test_mistakes_are_one_line():
    done = run(*TINY, "--B", "0")
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: B is 0")
        and "hint: --B" in done.stderr
    )
    assert len(done.stderr.strip().splitlines()) == 1


def test_save_prints_a_table_and_one_line_of_json(tmp_path):
    done = run(
        "bench.py",
        "save",
        "--size",
        "tiny",
        "--rounds",
        "2",
        "--device",
        "cpu",
        "--folder",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert (
        result["ratio"] == pytest.approx(result["synchronous_ms"] / result["save_ms"])
        and len(result["ours_ms"]) == 2
    )
    assert result["bytes"] > 3 * 4 * 50304 * 64 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_hellaswag_counts_other_choices(tmp_path):
    """Both sides score the same endings alike in float32; in bfloat16 the usual way is held against itself in float32."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        done = run(
            "bench.py",
            "hellaswag",
            "--size",
            "tiny",
            "--items",
            "8",
            "--rounds",
            "2",
            "--device",
            "cpu",
            "--dtype",
            dtype,
            "--data",
            ROOT / "tests" / "hellaswag_items.jsonl",
        )
        assert done.returncode == 0, done.stderr
        found[dtype] = json.loads(done.stdout.strip().splitlines()[-1])
        assert found[dtype]["ratio"] > 0 and len(found[dtype]["ours_ms"]) == 2
    assert found["float32"]["other_choices"] == 0 and found["float32"]["largest_difference"] < 1e-3
    assert (
        "other_than_float32" not in found["float32"]
        and {"other_than_float32", "baseline_other_than_float32"} <= found["bfloat16"].keys()
    )
    a, b = (
        np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 1.0000001, 2, 3]]),
        np.array([[1, 2, 3, 4], [2, 1, 3, 4], [1.0000001, 1, 2, 3]]),
    )
    assert bench.other_choices(a, b, np.ones((3, 4))) == 1  # the last is a draw


SMALL = (
    "--size",
    "tiny",
    "--vocab_size",
    "256",
    "--steps",
    "2",
    "--warmup",
    "1",
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--use_compile",
    "False",
)


def json_of(*args):
    done = run("bench.py", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_step_measures_memory_and_a_compiled_baseline():
    result = json_of("step", *SMALL, "--B", "2", "--T", "32")
    assert (
        result["memory_ratio"] == pytest.approx(result["peak"] / result["baseline_peak"])
        and 1e8 < result["peak"] < 4e9
    )
    bigger = bench.peak_memory(
        bench.Step(size="tiny", B=64, T=256, vocab_size=4096, device="cpu", use_compile=False),
        "ours",
    )
    assert bigger - result["peak"] > 2 * 64 * 256 * 4096 * 4  # logits and their gradient


def test_profile_adds_up():
    """Kinds and gaps make the step's time; matrix products are found under their name."""
    result = json_of("profile", *SMALL, "--B", "2", "--T", "64")
    assert (
        result["ms"]["matmul"] > 0
        and result["ms"]["attention"] > 0
        and result["ms"]["optimiser, clip"] > 0
    )
    assert result["ratio"] == pytest.approx(
        sum(result["floor_ms"].values()) / statistics.median(result["step_ms"])
    )


@pytest.mark.slow
def test_sweep_and_ddp():
    result = json_of("sweep", *SMALL, "--Bs", "1", "2", "--Ts", "16", "32")
    assert set(result["tok_s"]) == {"1x16", "1x32", "2x16", "2x32"} and 0 < result["ratio"] <= 1
    result = json_of("ddp", *SMALL, "--B", "1", "--T", "16")
    assert len(result["alone_ms"]) == len(result["ddp_ms"]) == 4  # two steps of two processes
    assert result["lost"] == pytest.approx(
        1 - statistics.median(result["alone_ms"]) / statistics.median(result["ddp_ms"])
    )


@pytest.mark.slow
def test_startup_is_faster_once_compiled():
    result = json_of("startup", "--rounds", "1", "--device", "cpu")
    assert result["first_s"][0] > result["cached_s"][0] > 0


@pytest.mark.slow
def test_muon_prints_a_table_and_one_line_of_json():
    """Both sides update the same matrices: after four updates they differ by rounding, in either type."""
    for dtype, most in (("float32", 1e-5), ("bfloat16", 0.03)):
        done = run("bench.py", "muon", "--size", "tiny", "--device", "cpu", "--dtype", dtype)
        assert done.returncode == 0, done.stderr
        *table, last = done.stdout.strip().splitlines()
        result = json.loads(last)
        assert result["part"] == "muon" and any("update of 12 matrices" in line for line in table)
        assert result["ratio"] == pytest.approx(
            statistics.median(result["baseline_ms"]) / statistics.median(result["ours_ms"])
        )
        assert 0 <= result["difference"] < most
    done = run("bench.py", "muon", "--size", "tiny", "--rounds", "0")
    assert done.returncode == 2 and "rounds is 0" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_step_of_modern_against_another_preset():
    done = run(*TINY, "--preset", "gpt2-modern", "--against", "gpt2-baseline")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.strip().splitlines()
    result = json.loads(last)
    assert result["against_ratio"] == pytest.approx(result["tok_s"] / result["against_tok_s"])
    assert (
        any(line.startswith("gpt2-baseline ") for line in table)
        and "gpt2-modern / gpt2-baseline" in table[-1]
    )
    done = run(*TINY, "--against", "gpt2-modrn")
    assert done.returncode == 2 and "did you mean gpt2-modern" in done.stderr


def test_suite_runs_each_variant_and_tells_of_failures(tmp_path, monkeypatch, capsys):
    """Every command line of it is one that bench.py takes; a line for each result; a failure does not end it."""
    settings, asked = {name: kind for name, (kind, _) in bench.PARTS.items()}, []

    def run_it(command, **more):
        if "pytest" in command:
            return subprocess.CompletedProcess(command, 0)
        args = bench.tyro.extras.subcommand_cli_from_dict(
            settings,
            args=command[2:],
            use_underscores=True,
            config=(bench.tyro.conf.FlagConversionOff,),
        )
        asked.append(args)
        return subprocess.CompletedProcess(
            command,
            int(getattr(args, "attention", "") == "cudnn"),
            json.dumps({"ratio": len(asked)}),
        )

    monkeypatch.setattr(bench, "subprocess", types.SimpleNamespace(run=run_it, PIPE=None))
    result = bench.suite(bench.Suite(device="cpu", out=str(tmp_path)))
    (file,) = tmp_path.glob("bench_cpu*.jsonl")
    assert [json.loads(line)["ratio"] for line in file.read_text().splitlines()] == [
        i for i, a in enumerate(asked, 1) if getattr(a, "attention", "") != "cudnn"
    ]
    assert (
        result["ratio"] == 1
        and len(result["failed"]) == 1
        and "cudnn" in capsys.readouterr().out.splitlines()[-1]
    )


@pytest.mark.slow
def test_prepare_prints_a_table_and_one_line_of_json(tmp_path):
    rows = [
        {"text": f"Document {i}, with <|endoftext|>.  Two blanks\n\nand naïve words." * (i % 7 + 1)}
        for i in range(200)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("bench.py", "prepare", "--data", tmp_path / "a.jsonl", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.strip().splitlines()
    result = json.loads(last)
    assert (
        result["ratio"] == pytest.approx(result["tok_s"] / result["baseline_tok_s"])
        and len(result["batch_ratios"]) == 2
    )
    assert result["batch_ratio"] == pytest.approx(result["tok_s"] / result["batch_tok_s"])
    assert 10**8 < result["peak_bytes"] < 10**9 and any("peak memory" in line for line in table)
    done = run("bench.py", "prepare", "--data", tmp_path / "none")
    assert (
        done.returncode == 2
        and "none" in done.stderr
        and "hint:" in done.stderr
        and done.stderr.count("\n") == 1
    )


@pytest.mark.slow
def test_generate_prints_a_table_and_one_line_of_json():
    """Both sides continue alike in float32; ratios are of each side's best; the floor is told; mistakes are one line."""
    tiny = (
        "bench.py",
        "generate",
        "--size",
        "tiny",
        "--batches",
        "1",
        "3",
        "--new_tokens",
        "6",
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--dtypes",
        "float32",
        "bfloat16",
    )
    done = run(*tiny)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.strip().splitlines()
    result = json.loads(last)
    assert result["part"] == "generate" and result["same_tokens"] == {"batch 1": 1, "batch 3": 1}
    best = lambda side, B: max(
        result["tok_s"][f"{side} {t}, batch {B}"] for t in ("float32", "bfloat16")
    )
    for B in (1, 3):
        assert result[f"batch{B}_ratio"] == pytest.approx(best("ours", B) / best("transformers", B))
    assert result["int8_ratio"] == pytest.approx(
        result["tok_s"]["ours int8, batch 1"] / best("transformers", 1)
    )
    assert result["tok_s"]["ours int8, batch 1"] == pytest.approx(
        1e3 * 6 / result["ms"]["ours int8, batch 1"][0]
    )
    bytes_of = {
        t: result["read_gb_s"] * 1e9 / result["floor_tok_s"][f"ours {t}, batch 1"]
        for t in ("float32", "bfloat16", "int8")
    }
    assert (
        bytes_of["bfloat16"] == pytest.approx(bytes_of["float32"] / 2, rel=0.1)
        and bytes_of["int8"] < 0.6 * bytes_of["bfloat16"]
    )
    assert (
        result["deviation"]["int8"]["largest"] > 0
        and result["deviation"]["int8"]["same_token"] > 0.9
    )
    assert any("share" in line for line in table) and any(
        "read once a token" in line for line in table
    )
    done = run(*tiny, "--batches", "0")
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: batches is (0,)")
        and done.stderr.count("\n") == 1
    )
