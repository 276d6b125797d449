"""python -m pytest tests/test_hf.py

Import from and export to Hugging Face: the same logits, weights and token ids on both sides, and
one line with a hint for whatever cannot be represented. No network: the models are tiny random
ones, and the hub is a stand-in.
"""

import dataclasses
import gzip
import json
import os
import shutil
import time

import huggingface_hub
import nbclient
import nbformat
import pytest
import torch
import transformers
from conftest import ROOT, TINY, run, write_shards
from safetensors.torch import load_file, save_file

import generate
import hf
import optim
import records
import tokenizer
import train_gpt2
from config import from_command_line
from model import GPT, GPTConfig
from runtime import checkpoint, files
from runtime.command_line import UserError
from runtime.runlog import read_metrics
from runtime.world import World

SHAPE = dict(
    vocab_size=97, n_positions=16, n_layer=2, n_head=4, n_embd=48, bos_token_id=0, eos_token_id=0
)
IDS = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))


def write_source(
    folder, shard_size="50GB", dtype=torch.float32, **changes
) -> transformers.GPT2LMHeadModel:
    """A random GPT2LMHeadModel, saved by its save_pretrained; no weight at its initial value."""
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += (0.15 if p.dim() == 2 else 0.3) * torch.randn_like(p)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return model.float()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return folder, write_source(folder)


@pytest.fixture
def copied(source, tmp_path):
    """A folder to spoil."""
    return shutil.copytree(source[0], tmp_path / "copied")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    weights = {k: w.clone().contiguous() for k, w in edit(weights).items()}
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder) -> str:
    with pytest.raises(UserError) as e:
        hf.from_pretrained(str(folder))
    message = str(e.value)
    assert "\n" not in message and message.count("hint: ") == 1, message
    return message


# --------------------------------------------------------------------------------------------------
# import


@torch.no_grad()
def assert_same(folder, theirs):
    ours = hf.from_pretrained(str(folder))
    reference = theirs(IDS).logits
    assert reference.std() > 0.5
    torch.testing.assert_close(ours(IDS), reference, atol=1e-4, rtol=0)
    return ours


def test_logits_equal_the_source(source):
    ours = assert_same(*source)
    assert ours.config == GPTConfig(
        block_size=16, vocab_size=97, n_layer=2, n_head=4, n_embd=48
    )  # 97 rows: unpadded
    assert ours.num_params() == source[1].num_parameters()
    assert all(
        p.dtype == torch.float32 and p.is_contiguous() and p.requires_grad
        for p in ours.parameters()
    )


def test_the_import_is_a_model_to_train(source, tmp_path):
    """Nothing is drawn from the random generator, and the memory is its own.

    Memory-mapped weights would change with the file.
    """
    path = shutil.copytree(source[0], tmp_path / "source") / "model.safetensors"
    state = torch.random.get_rng_state()
    ours = hf.from_pretrained(str(path.parent))
    assert torch.equal(torch.random.get_rng_state(), state)
    with open(path, "r+b") as f:
        f.write(bytes(path.stat().st_size))
    torch.testing.assert_close(ours(IDS), source[1](IDS).logits, atol=1e-4, rtol=0)
    before = ours(IDS[:, :-1], IDS[:, 1:])
    before.backward()
    torch.optim.SGD(ours.parameters(), lr=0.01).step()
    assert ours(IDS[:, :-1], IDS[:, 1:]) < before


def test_older_names_masks_and_a_stored_head(copied, source):
    """As OpenAI's files on the hub: no "transformer." before the names, causal masks stored.

    A head may be stored, too.
    """

    def edit(weights):
        weights = {k.removeprefix("transformer."): w for k, w in weights.items()}
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
        masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
        return weights | masks | {"lm_head.weight": weights["wte.weight"]}

    edit_weights(copied, edit)
    config = json.loads((copied / "config.json").read_text())
    keep = ("model_type", "vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    (copied / "config.json").write_text(
        json.dumps({k: config[k] for k in keep})
    )  # all else is GPT-2's default
    assert_same(copied, source[1])


def test_several_files_and_half_precision(tmp_path):
    theirs = write_source(tmp_path, shard_size="40KB", dtype=torch.bfloat16)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same(tmp_path, theirs)


def test_settings_that_do_not_change_the_result(tmp_path):
    theirs = write_source(
        tmp_path,
        activation_function="gelu_pytorch_tanh",
        n_inner=192,
        resid_pdrop=0.0,
        reorder_and_upcast_attn=True,
    )
    assert_same(tmp_path, theirs)


def test_names_come_from_the_hub_at_a_fixed_commit(source, monkeypatch):
    asked = []

    def download(repo_id, filename, revision):
        asked.append((repo_id, filename, revision))
        return str(source[0] / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for name in ("gpt2", "openai-community/gpt2-xl"):
        assert hf.from_pretrained(name).config.n_layer == 2
    assert asked == [
        (f"openai-community/{name}", file, hf.REVISIONS[name])
        for name in ("gpt2", "gpt2-xl")
        for file in ("config.json", "model.safetensors")
    ]
    assert all(len(revision) == 40 for revision in hf.REVISIONS.values())


def test_a_name_is_found_where_others_cached_it(source, tmp_path):
    """Under the name that these models had before, without a network."""
    snapshot = tmp_path / "hub" / "models--gpt2" / "snapshots" / hf.REVISIONS["gpt2"]
    shutil.copytree(source[0], snapshot)
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = run("hf.py", "import", "gpt2", tmp_path / "out", env=env)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------------
# tokenizers beside the weights


@pytest.fixture
def with_tokenizer(tmp_path):
    """A folder of GPT-2's vocabulary with the files that hf.py export writes."""
    write_source(tmp_path / "gpt2", vocab_size=50257, n_layer=1, n_embd=16)
    for name, text in tokenizer.hugging_face_files(16).items():
        (tmp_path / "gpt2" / name).write_text(text, encoding="utf-8")
    return tmp_path / "gpt2"


def edit_json(path, edit):
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content))


def swap(vocab: dict):
    vocab["the"], vocab["a"] = vocab["a"], vocab["the"]


FOREIGN = {
    "vocab.json": lambda path: edit_json(path, swap),
    "merges.txt": lambda path: path.write_text(path.read_text("utf-8") + "a b\n"),
    "tokenizer.json": lambda path: edit_json(path, lambda c: swap(c["model"]["vocab"])),
    "spiece.model": lambda path: path.write_bytes(b"x"),
    "vocab.txt": lambda path: path.write_text("the\n"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_ids_of_another_tokenizer_are_not_taken_for_gpt2s(with_tokenizer, tmp_path, name):
    """Whatever file shows it: every way to the weights refuses them, and nothing is written."""
    assert hf.load(str(with_tokenizer)).config.vocab_size == 50257
    for other in ("vocab.json", "merges.txt", "tokenizer.json"):
        if other != name:
            (with_tokenizer / other).unlink()
    FOREIGN[name](with_tokenizer / name)
    message = refusal(with_tokenizer)
    assert "is not GPT-2's" in message and name in message and "None" not in message
    with pytest.raises(UserError, match="is not GPT-2's"):
        hf.import_(str(with_tokenizer), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_transformers_saves_is_gpt2s_and_added_tokens_are_reported(
    with_tokenizer, tmp_path, capsys
):
    """As after tokenizer.add_tokens() and resize_token_embeddings(): named on import and export."""
    folder = tmp_path / "added"
    theirs = transformers.AutoTokenizer.from_pretrained(with_tokenizer)
    theirs.save_pretrained(folder)
    assert tokenizer.tokenizer_difference(folder) == ""
    theirs.add_tokens(["<|user|>", "<|bot|>"])
    theirs.save_pretrained(folder)
    assert tokenizer.added_tokens(folder) == {"<|user|>": 50257, "<|bot|>": 50258}
    write_source(folder, vocab_size=50259, n_layer=1, n_embd=16)
    hf.import_(str(folder), str(tmp_path / "run"))
    assert "2 rows beyond GPT-2's 50,257 tokens, added were '<|user|>', '<|bot|>'" in (
        capsys.readouterr().out
    )
    hf.export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert "50,257 rows of vocabulary (2 beyond GPT-2's left out)" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["a\nerror: x", "x" * 10**6, 5, None], ids=range(4))
def test_what_an_added_token_is_called_stays_in_its_line(with_tokenizer, capsys, content):
    """Its name is text of others, printed when a model is loaded; what is no text is left out."""
    edit_json(
        with_tokenizer / "tokenizer.json",
        lambda c: c["added_tokens"].append(dict(id=50257, content=content)),
    )
    decoder = {"50257": dict(content=content), "50258": dict(content="y")}
    (with_tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": decoder})
    )
    hf.check_vocabulary(with_tokenizer, GPTConfig(vocab_size=50259))
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and len(line) < 1000 and "'y'" in line


# --------------------------------------------------------------------------------------------------
# --init_from: the shape


@pytest.mark.parametrize("place", ["run", "folder"])
def test_the_source_brings_its_shape(tmp_path, place):
    """config.json, state.json and the model agree; given settings that differ are refused."""
    data = write_shards(tmp_path / "data", {"train": [4000], "val": [1000]}, ids=97)
    save(make_model(vocab_size=97, use_rope=True), tmp_path / "run")
    write_source(tmp_path / "folder")
    source = str(tmp_path / place)
    size = f"--T 16 --B 1 --total_batch 16 --val_tokens 16 --max_steps 1 --data_root {data}"
    words = f"{size} --device cpu --use_compile False --n_samples 0 --wandb off".split()
    words += ["--log_dir", str(tmp_path / "log"), "--init_from", source]
    shape = dataclasses.asdict(hf.load(source).config)
    result = train_gpt2.train(from_command_line(["shakespeare", *words])[0])
    assert dataclasses.asdict(result.model.config) == shape
    run_dir = tmp_path / "log" / "shakespeare"
    stored = json.loads((run_dir / "config.json").read_text())
    state = checkpoint.find(run_dir).state
    assert stored.items() >= shape.items() and state["config"].items() >= shape.items()
    assert state["gpt_config"] == shape
    evaluations = [record for record in result.records if "val/loss" in record]
    assert evaluations and all(r["val/bpb"] is None for r in evaluations)  # not GPT-2's ids
    for given in ("--n_layer 6", "--vocab_size 50304", "--block_size 99", "--arch modern"):
        with pytest.raises(UserError, match=f"{given[2:]}, {source} has .*; hint: leave"):
            train_gpt2.train(from_command_line(["shakespeare", *words, *given.split()])[0])
    same = f"--n_layer {shape['n_layer']} --vocab_size 97".split()
    shutil.rmtree(source)  # a run goes on without it
    cfg = from_command_line(["shakespeare", *words, *same])[0]
    assert train_gpt2.train(cfg).finished


def test_ids_beyond_the_sources_vocabulary_are_one_line(tmp_path):
    data = write_shards(tmp_path / "data", {"train": [4000], "val": [1000]})
    write_source(tmp_path / "folder")
    size = f"--T 16 --B 1 --total_batch 16 --val_tokens 16 --max_steps 1 --data_root {data}"
    words = f"{size} --device cpu --use_compile False --n_samples 0 --wandb off".split()
    words += ["--log_dir", str(tmp_path), "--init_from", str(tmp_path / "folder")]
    with pytest.raises(UserError, match="token id .*, beyond vocab_size 97; hint: "):
        train_gpt2.train(from_command_line(["shakespeare", *words])[0])


# --------------------------------------------------------------------------------------------------
# load(): one answer to where weights come from


def test_load_opens_runs_checkpoints_and_folders(tmp_path, source):
    """A run, a directory of checkpoints, a checkpoint, and a Hugging Face folder."""
    model = make_model(vocab_size=97)
    path = save(model, tmp_path / "run")
    for where in (tmp_path / "run", path.parent, path):
        loaded = hf.load(str(where))
        assert loaded.config == model.config
        assert torch.equal(loaded.wte.weight, model.wte.weight)
    torch.testing.assert_close(
        hf.load(str(source[0]))(IDS), source[1](IDS).logits, atol=1e-4, rtol=0
    )


def lone_config(folder):
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def pickled_weights(folder):
    lone_config(folder)
    (folder / "pytorch_model.bin").write_bytes(b"PK")


def run_without_checkpoint(folder):
    (folder / "config.json").write_text('{"preset": "gpt2-rope"}')
    (folder / "metrics.jsonl").write_text('{"step": 0, "val/loss": 10.9}\n')
    (folder / "ckpt").mkdir()


@pytest.mark.parametrize(
    "write, message, hint",
    [
        (lone_config, "holds config.json but no model.safetensors", "copy both"),
        (pickled_weights, "holds pytorch_model.bin but no model.safetensors", "save_pretrained"),
        (run_without_checkpoint, "a run that has saved none there", "--ckpt_dir"),
        (lambda folder: None, "no checkpoint in .*, and no config.json", "log/NAME"),
    ],
)
def test_load_says_what_is_missing(tmp_path, write, message, hint):
    write(tmp_path)
    with pytest.raises(UserError, match=f"{message}.*; hint: .*{hint}"):
        hf.load(str(tmp_path))


def test_load_refuses_files_and_unknown_names(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"PK")
    with pytest.raises(UserError, match="no checkpoint in .*a.pt, a file; hint: .*directory"):
        hf.load(str(tmp_path / "a.pt"))
    with pytest.raises(UserError, match="'gpt3' is neither a folder nor a name .*hint: .*gpt2"):
        hf.load("gpt3")


# --------------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(activation_function="gelu"), "activation_function 'gelu', expected 'gelu_new'"),
        (dict(n_inner=100), "n_inner 100, expected None or 192"),
        (dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon 1e-06, expected 1e-05"),
        (dict(scale_attn_weights=False), "scale_attn_weights False, expected True"),
        (
            dict(scale_attn_by_inverse_layer_idx=True),
            "scale_attn_by_inverse_layer_idx True, expected False",
        ),
        (dict(add_cross_attention=True), "add_cross_attention True, expected False"),
        (dict(tie_word_embeddings=False), "tie_word_embeddings False, expected True"),
        (dict(model_type="llama"), "model_type 'llama', expected 'gpt2'"),
        (dict(n_head=5), "n_embd 48, expected a multiple of n_head 5"),
        (dict(n_head=0), "n_head 0, expected a whole number above 0"),
        (dict(n_layer="many"), "n_layer 'many', expected a whole number above 0"),
        (dict(n_embd=None), "n_embd None, expected a whole number above 0"),
        (dict(n_embd=-16), "n_embd -16, expected a whole number above 0"),
        (dict(n_layer=True), "n_layer True, expected a whole number above 0"),
        (dict(n_positions=16.0), "block_size 16.0, expected a whole number above 0"),
        (dict(n_layer=10**7), "says n_layer 10000000, the weights have 2 layers"),
        (dict(vocab_size=10**9), "wte.weight (97, 48), expected (1000000000, 48)"),
        (dict(vocab_size=10**100), "expected a whole number above 0"),
    ],
)
def test_config_that_model_py_cannot_represent(copied, changes, named):
    edit_config(copied, **changes)
    assert named in refusal(copied)


def test_all_that_is_wrong_is_reported_at_once(copied):
    edit_config(copied, activation_function="relu", layer_norm_epsilon=1e-6)
    message = refusal(copied)
    assert "'relu'" in message and "1e-06" in message


def test_weights_that_do_not_fit_the_config(copied):
    edit_config(copied, n_embd=96)
    message = refusal(copied)
    assert "h.0.attn.c_attn.bias (144,), expected (288,)" in message and "(28 such)" in message
    edit_config(copied, n_embd=48, n_layer=3)
    assert "says n_layer 3, the weights have 2 layers" in refusal(copied)
    edit_config(copied, n_layer=1)
    assert "says n_layer 1, the weights have 2 layers" in refusal(copied)


def test_weights_left_out_or_with_another_head(copied):
    edit_weights(copied, lambda w: w | {"lm_head.weight": w["transformer.wte.weight"] + 1})
    assert "lm_head.weight" in refusal(copied)
    edit_weights(
        copied,
        lambda w: {k: v for k, v in w.items() if "ln_f.bias" not in k and "lm_head" not in k},
    )
    assert "ln_f.bias missing, expected (48,)" in refusal(copied)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_without_a_value(copied, value):
    """Whatever would come of them: neither folders nor checkpoints are loaded."""

    def edit(weights):
        weights["transformer.h.1.ln_1.bias"][3] = value
        return weights

    edit_weights(copied, edit)
    assert "NaN or infinite weights (h.1.ln_1.bias, 1 of 28)" in refusal(copied)
    model = make_model(vocab_size=97, use_rope=True)
    with torch.no_grad():
        model.wte.weight[3, 3] = value
    path = save(model, copied / "run")
    with pytest.raises(UserError, match="wte.weight is NaN or infinite; hint: "):
        hf.load(str(path))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int8, torch.uint16, torch.complex64, torch.float8_e4m3fn]
)
def test_weights_of_other_types(copied, dtype):
    key = "transformer.ln_f.bias"
    edit_weights(copied, lambda w: w | {key: w[key].to(dtype)})
    assert "ln_f.bias" in refusal(copied) and "expected F64 or F32" in refusal(copied)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json", "merges.txt"])
def test_pipes_and_devices_are_no_files(copied, name):
    """A pipe that nobody writes would be read for ever, as would a device."""
    (copied / name).unlink(missing_ok=True)
    os.mkfifo(copied / name)
    assert name in refusal(copied) and "not a regular file" in refusal(copied)
    (copied / name).unlink()
    (copied / name).symlink_to("/dev/zero")
    assert "not a regular file" in refusal(copied)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(n_layer=10**6), "says n_layer 1000000, the weights have 2 layers"),
        (dict(vocab_size=10**9), r"wte.weight \(97, 48\), expected \(1000000000, 48\)"),
        (dict(block_size=10**10), "block_size 10000000000, expected a whole number"),
        (dict(n_head=0), "n_head 0, expected a whole number above 0"),
        (dict(n_head=5), "expected a multiple of n_head 5, heads of even width"),
        (dict(n_head=48), "expected a multiple of n_head 48, heads of even width"),
        (dict(n_embd=-16), "n_embd -16"),
        (dict(use_swiglu="yes"), "use_swiglu 'yes', expected true or false"),
        (dict(arch="evil"), "arch 'evil', expected gpt2 or modern"),
        (dict(softcap=30), "softcap"),
    ],
)
def test_checkpoints_whose_shape_is_not_that_of_their_weights(tmp_path, changes, words):
    """Refused before anything of that size is built: within the time of reading a header."""
    model = make_model(vocab_size=97, use_rope=True)
    state = {"gpt_config": dataclasses.asdict(model.config) | changes}
    tensors = {"model.safetensors": model.state_dict()}
    checkpoint.write(tmp_path / "ckpt", 3, tensors, state)
    started = time.process_time()
    with pytest.raises(UserError, match=f"{words}.*; hint: "):
        hf.load(str(tmp_path))
    assert time.process_time() - started < 5


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_truncated_weights(copied, size):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert str(path) in refusal(copied)


def test_weights_beyond_all_memory(copied):
    """A sparse file of 1 TB: where mapping it fails, that is one line."""
    header = json.dumps({"x": dict(dtype="F32", shape=[2**38], data_offsets=[0, 2**40])}).encode()
    path = copied / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 2**40)
    assert str(copied) in refusal(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "[" * 100_000, "\xff"])
def test_damaged_config(copied, text):
    (copied / "config.json").write_text(text)
    assert "config.json" in refusal(copied)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "no.safetensors"}}',
        '{"weight_map": {"a": "../copied/model.safetensors"}}',
        json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(10**5)}}),
    ],
    ids=range(6),
)
def test_damaged_index(copied, text):
    (copied / "model.safetensors.index.json").write_text(text)
    assert str(copied) in refusal(copied)


def test_an_index_of_many_names_is_compared_with_one_listing(copied, monkeypatch):
    """A look at each of the millions of files that an index may name would take minutes."""
    index = {"weight_map": {str(i): f"{i}.safetensors" for i in range(10**4)}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    looks = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **more: looks.append(args) or stat(*args, **more))
    assert "10000 of its files are missing, such as 0.safetensors" in refusal(copied)
    assert 0 < len(looks) < 100


def test_missing_files_and_names(tmp_path, copied):
    assert "config.json" in refusal(tmp_path)  # a folder of something else
    (copied / "model.safetensors").rename(
        copied / "pytorch_model.bin"
    )  # pickled weights are never opened
    assert "model.safetensors" in refusal(copied)
    assert "did you mean gpt2-medium" in refusal("gpt2-meduim")
    assert "neither a folder nor" in refusal(tmp_path / "nowhere")


def test_no_network(monkeypatch):
    def download(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError(
            "An error happened.\nPlease check your connection."
        )

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    message = refusal("gpt2-large")
    assert "cannot fetch gpt2-large" in message and "--local-dir gpt2-large" in message


# --------------------------------------------------------------------------------------------------
# export

KINDS = {
    "learned": ({}, transformers.GPT2LMHeadModel),
    "rope": (dict(use_rope=True), transformers.Starcoder2ForCausalLM),
    "modern": (dict(arch="modern"), transformers.NanoChatForCausalLM),
}


def make_model(**changes) -> GPT:
    """No weight at its initial value, and large enough that logits differ by nats."""
    torch.manual_seed(2)
    model = GPT(GPTConfig(**dict(block_size=24, n_layer=2, n_head=4, n_embd=48) | changes))
    with torch.no_grad():
        for p in model.parameters():
            p += (0.15 if p.dim() == 2 else 0.3) * torch.randn_like(p)
    return model


def save(model, folder, **state):
    optimizer = optim.adamw(model, 1e-3, (0.9, 0.95), 0.1)
    state = state | {"gpt_config": dataclasses.asdict(model.config)}
    return checkpoint.write(folder / "ckpt", 3, checkpoint.contents(model, optimizer), state)


def reload(folder):
    """As a user would: through the Auto classes, which must find every weight and no other."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """Our model, the folder of its export, and the class expected there."""
    folder = tmp_path_factory.mktemp(request.param)
    switches, kind = KINDS[request.param]
    model = make_model(**switches)
    save(model, folder / "run")
    hf.export(str(folder / "run"), str(folder / "out"))
    return model, folder / "out", kind


@torch.no_grad()
def test_the_reloaded_model_has_our_logits(exported):
    """Over the whole context, to 1e-4 where logits spread over nats; no padded vocabulary."""
    model, folder, kind = exported
    theirs = reload(folder)
    ids = torch.randint(50257, (2, 24), generator=torch.Generator().manual_seed(0))
    ours = model(ids)[..., :50257]
    assert type(theirs) is kind and theirs.dtype == torch.float32 and ours.std() > 1
    torch.testing.assert_close(theirs(ids).logits, ours, atol=1e-4, rtol=0)
    tied = theirs.lm_head.weight is theirs.get_input_embeddings().weight
    assert tied != model.config.modern
    matrices = 1 if tied else 2
    assert model.num_params() - theirs.num_parameters() == (50304 - 50257) * 48 * matrices


@torch.no_grad()
def test_greedy_continuations_are_the_same(exported):
    """Also with their KV cache, and a row that is shorter than its neighbour."""
    model, folder, _ = exported
    ids = torch.randint(50256, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    out = reload(folder).generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=8, eos_token_id=None
    )
    for row, start in zip(out, (2, 0)):
        for t in range(6, 14):
            assert row[t] == model(row[None, start:t])[0, -1, :50257].argmax()


def test_the_tokenizer_is_ours(exported):
    """Same ids and text, offline, special token included, from either of the two written forms."""
    texts = [
        "Hello world  two\n\n\tthree   ",
        "na\u00efve \u65e5\u672c\u8a9e \U0001f3f3\ufe0f\u200d\U0001f308 'll don't",
        "a<|endoftext|>b",
        "\x00\x01 x\u00a0y",
        " .",
        "",
        (ROOT / "model.py").read_text(),
    ]
    for name in ("tokenizer.json", None):
        theirs = transformers.AutoTokenizer.from_pretrained(exported[1])
        for text in texts:
            ids = theirs(text)["input_ids"]
            assert ids == tokenizer.gpt2().encode(text, allowed_special="all")
            assert theirs.decode(ids) == text
            assert generate.prompt_ids(text) == (ids or [50256])
        assert (theirs.bos_token_id, theirs.eos_token_id) == (50256, 50256)
        assert (theirs.pad_token_id, theirs.padding_side) == (50256, "left")
        assert (len(theirs), theirs.model_max_length) == (50257, 24)
        if name:
            (exported[1] / name).rename(exported[1].parent / name)
        else:
            (exported[1].parent / "tokenizer.json").rename(exported[1] / "tokenizer.json")


def test_what_other_programs_read(exported):
    """Their names for the shape: llama.cpp's converter reads n_ctx, GPT-2's older name."""
    config = transformers.AutoConfig.from_pretrained(exported[1]).to_dict()
    if config["model_type"] == "gpt2":
        assert config["n_ctx"] == config["n_positions"] == 24
    else:
        assert config["max_position_embeddings"] == 24
        assert config["num_key_value_heads"] == config["num_attention_heads"] == 4
        assert config["rope_parameters"]["rope_theta"] == 10000


def test_batches_are_as_single_prompts(exported):
    """pipeline(..., batch_size=2), greedy: rows are padded on the left, and padding is no text."""
    pipe = transformers.pipeline("text-generation", model=str(exported[1]))
    options = dict(max_new_tokens=5, do_sample=False)
    prompts = ["Hello", "A longer prompt than that"]
    assert pipe(prompts, batch_size=2, **options) == [pipe(p, **options) for p in prompts]


def test_sampling_settings_and_modes(exported):
    sampling = transformers.GenerationConfig.from_pretrained(exported[1])
    assert (sampling.eos_token_id, sampling.do_sample) == (50256, True)
    assert (sampling.temperature, sampling.top_k) == (1.0, 50)
    modes = {path.stat().st_mode for path in exported[1].iterdir()}
    assert len(modes) == 1  # who may read one file may read all


@pytest.mark.parametrize("vocab_size", [97, 50257])
def test_import_undoes_export(tmp_path, vocab_size):
    """Bit-identical, through files; a small vocabulary keeps its rows and has no tokenizer."""
    model = make_model(vocab_size=vocab_size)
    save(model, tmp_path / "run")
    hf.export(str(tmp_path / "run"), str(tmp_path / "out"))
    hf.import_(str(tmp_path / "out"), str(tmp_path / "back"))
    back = hf.load(str(tmp_path / "back"))
    assert back.config == model.config
    assert all(torch.equal(p, back.state_dict()[name]) for name, p in model.state_dict().items())
    assert (tmp_path / "out" / "vocab.json").exists() == (vocab_size == 50257)
    assert reload(tmp_path / "out").config.eos_token_id == (50256 if vocab_size == 50257 else None)


def test_export_undoes_import(source, tmp_path):
    """Weights of theirs that went through our checkpoint are the same bits again."""
    hf.import_(str(source[0]), str(tmp_path / "run"))
    hf.export(str(tmp_path / "run"), str(tmp_path / "out"))
    theirs = source[1].state_dict()
    assert all(
        torch.equal(p, theirs[name]) for name, p in reload(tmp_path / "out").state_dict().items()
    )


def test_from_a_run_to_a_folder_and_back_into_every_script(tmp_path, train_here, capsys):
    """Train, export, import; then load() and --init_from, and a refusal to resume it as a run."""
    data = write_shards(tmp_path / "toy", {"train": [6000], "val": [2000]})
    log = tmp_path / "log"
    args = [*map(str, (*TINY, "--data_root", data, "--log_dir", log, "--max_steps", "2"))]
    args[args.index("--vocab_size") + 1] = "50304"
    assert train_here("gpt2-baseline", *args, "--run_name a")[0] == 0
    done = run("hf.py", "export", log / "a", tmp_path / "out")
    assert done.returncode == 0 and "GPT2LMHeadModel, 50,257 rows" in done.stdout, done.stderr
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    evaluations = [r for r in read_metrics(log / "a") if "val/loss" in r]
    loss = evaluations[-1]["val/loss"]
    for words in (
        "# a\n",
        f"{loss:.4f} nats per token, at step 2",
        "2 of 2 steps, 1,024 tokens of toy",
        "preset gpt2-baseline, optimizer adamw, schedule cosine, max_lr 0.0006, min_lr 6e-05,",
    ):
        assert words in card, card
    assert str(tmp_path) not in card
    hf.import_(str(tmp_path / "out"), str(log / "b"))
    assert "1,634,720 parameters" in capsys.readouterr().out
    with pytest.raises(UserError) as e:
        hf.export(str(log / "b"), str(tmp_path / "out"))
    assert "\n" not in str(e.value)

    trained = hf.load(str(log / "a")).state_dict()
    cfg, _ = from_command_line(
        ["gpt2-baseline", *args, "--run_name", "b", "--init_from", str(log / "b")]
    )
    for model in (
        hf.load(str(log / "b")),
        hf.load(str(tmp_path / "out")),
        train_gpt2.build_model(cfg, None, World(0, 1, torch.device("cpu"))),
    ):
        assert model.config.vocab_size == 50257
        assert all(
            torch.equal(p, trained[name][: len(p)]) for name, p in model.state_dict().items()
        )
    for other in (cfg, dataclasses.replace(cfg, run_name="c", resume=str(log / "b"))):
        with pytest.raises(UserError, match="weights from .*hint: --init_from"):
            records.find_checkpoint(other)


def test_the_card_gives_the_evaluation_of_the_checkpoint(tmp_path):
    """The last one up to its step, wherever the checkpoints are; nothing of other runs."""
    model = make_model(vocab_size=97)
    record = {"val/loss": 4.0, "val/hella_norm": 0.25, "val/hella_se": 0.04}
    lines = [{"step": 2} | record, {"step": 3, "train/loss": 1.0}, {"step": 4, "val/loss": 1.0}]
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in lines) + '{"step": 5, "va'
    )
    config = dict(log_dir=str(tmp_path), run_name="r", data_root="data/toy", hellaswag_limit=100)
    cards = []
    for place, ckpt_dir in (("r", ""), ("far", str(tmp_path / "far" / "ckpt")), ("copied", "")):
        path = save(model, tmp_path / place, config=config | dict(ckpt_dir=ckpt_dir))
        out = tmp_path / f"out-{place}"
        hf.export(str(path), str(out))
        cards.append((out / "README.md").read_text(encoding="utf-8"))
    assert cards[0] == cards[1]
    assert "4.0000 nats per token, at step 2" in cards[0] and "0.2500 ± 0.0400" in cards[0]
    assert "3 of 19,073 steps" in cards[2] and "nats" not in cards[2]
    (tmp_path / "r" / "metrics.jsonl").write_text("{\n")
    hf.export(str(tmp_path / "r"), str(tmp_path / "again"))
    assert "nats" not in (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "r" / "metrics.jsonl").unlink()
    (tmp_path / "r" / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl cannot be read .*hint: move away"):
        hf.export(str(tmp_path / "r"), str(tmp_path / "unread"))


def test_the_card_is_one_of_ours_whatever_the_run_is_called(tmp_path):
    """Names of others stay in their cell: no line, no column, no tag and no escape of theirs."""
    name = "---\nlicense: x\n---\n# a|b <script> \x1b]0;x\x07\ud800"
    config = dict(log_dir=str(tmp_path), run_name=name, data_root=name, ckpt_dir="")
    save(make_model(vocab_size=97), tmp_path / "run", config=config)
    hf.export(str(tmp_path / "run"), str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    lines = card.splitlines()
    assert lines.count("---") == 2 and lines.index("---", 1) == 3
    assert sum(line.startswith("# ") for line in lines) == 1
    assert "<script>" not in card and "\x1b" not in card
    save(make_model(vocab_size=97), tmp_path / "odd", config=config | {"max_steps": "x"})
    with pytest.raises(UserError, match="does not say how the model was trained.*hint: "):
        hf.export(str(tmp_path / "odd"), str(tmp_path / "out2"))


def test_a_checkpoint_deleted_while_it_is_read_gives_way_to_the_next(tmp_path, monkeypatch):
    """As training prunes: the newest one that there is; what stays damaged is still refused."""
    models = [make_model(vocab_size=97) for _ in range(4)]
    paths = []
    for step, model in enumerate(models):
        with torch.no_grad():
            model.wte.weight[0] = step
        state = {"gpt_config": dataclasses.asdict(model.config)}
        tensors = {"model.safetensors": model.state_dict()}
        paths.append(checkpoint.write(tmp_path / "all", step, tensors, state))
    run_dir = tmp_path / "run" / "ckpt"
    run_dir.mkdir(parents=True)
    shutil.copytree(paths[0], run_dir / "step_000000")
    weights_header = checkpoint.weights_header

    def prune(saved):
        """Twice, the newest checkpoint is replaced by a newer one before its weights are read."""
        (old,) = checkpoint.steps(run_dir)
        step = checkpoint.step_of(old) + 1
        if step < 3:
            shutil.copytree(paths[step], run_dir / paths[step].name)
            shutil.rmtree(old)
        return weights_header(saved)

    monkeypatch.setattr(checkpoint, "weights_header", prune)
    assert hf.load(str(tmp_path / "run")).wte.weight[0, 0] == 2
    (run_dir / "step_000002" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="no valid checkpoint"):
        hf.load(str(tmp_path / "run"))


def test_what_export_and_import_refuse(tmp_path, source, monkeypatch):
    """One line with a hint, and nothing left behind."""
    save(make_model(vocab_size=97), tmp_path / "run")
    save(make_model(vocab_size=97, use_rope=True, use_swiglu=True), tmp_path / "swiglu")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    damaged = save(make_model(vocab_size=97), tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"0" * 100)
    before = sorted(tmp_path.rglob("*"))
    for command, args, words in (
        (hf.export, ("swiglu", "out"), "SwiGLU with LayerNorm and biases"),
        (hf.export, ("nowhere", "out"), "no checkpoint in"),
        (hf.export, ("run", "full"), "is there already"),
        (hf.export, ("run", "full/file"), "is there already"),
        (hf.import_, (str(source[0]), "full"), "is there already"),
        (hf.import_, ("nowhere", "out"), "neither a folder nor"),
        (hf.export, ("run", "full/file/out"), "cannot write"),
        (hf.export, (str(damaged), "out"), "is damaged"),
        (hf.export, ("run", "/"), "is there already"),
    ):
        with pytest.raises(UserError) as e:
            command(*(str(tmp_path / a) for a in args))
        message = str(e.value)
        assert words in message and "\n" not in message and message.count("hint: ") == 1, message
        assert sorted(tmp_path.rglob("*")) == before

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for module, name, command, args in (
        (checkpoint, "save_file", hf.export, ("run", "out")),
        (files.os, "replace", hf.export, ("run", "out")),
        (checkpoint, "save_file", hf.import_, (str(source[0]), "out")),
    ):
        with (
            monkeypatch.context() as m,
            pytest.raises(UserError, match="cannot write .*No space left.*hint: "),
        ):
            m.setattr(module, name, full_disk)
            command(*(str(tmp_path / a) for a in args))
        assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "out").mkdir()
    hf.export(str(tmp_path / "run"), str(tmp_path / "out"))  # into an empty directory


def test_a_field_that_the_exporter_does_not_know_is_refused():
    """Today's fields are all known; one added to GPTConfig later is not exported silently."""
    assert {f.name for f in dataclasses.fields(GPTConfig)} == hf.EXPORTED_FIELDS

    @dataclasses.dataclass(frozen=True)
    class LaterConfig(GPTConfig):
        softcap: float = 30.0

    for config, words in (
        (LaterConfig(vocab_size=97, n_layer=1, n_head=2, n_embd=16), "softcap 30.0"),
        (GPTConfig(vocab_size=97, n_layer=1, n_head=2, n_embd=16, arch="gpt5"), "arch 'gpt5'"),
    ):
        with pytest.raises(UserError, match=f"does not export models with {words}; hint: "):
            hf.layout(GPT(config))


# --------------------------------------------------------------------------------------------------
# lm-eval


TASK = """task: exported
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{activity_label}}}}: {{{{ctx}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: endings
metric_list:
  - metric: acc
  - metric: acc_norm
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {items}
"""


def lm_eval_choices(folder, task: str) -> list[tuple[int, int]]:
    """acc and acc_norm of each item by lm-eval, on what the Auto classes open from a folder."""
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

    model = reload(folder)
    encoder = transformers.AutoTokenizer.from_pretrained(folder)

    class Exported(TemplateLM):
        """lm-eval's own class for transformers needs accelerate, and only adds batching."""

        eot_token_id = encoder.eos_token_id
        loglikelihood_rolling = None
        generate_until = None

        def tok_encode(self, text, add_special_tokens=None, **_):
            return encoder(text)["input_ids"]

        @torch.no_grad()
        def _loglikelihood_tokens(self, requests, **_):
            results = []
            for _, context, ending in requests:
                log_p = model(torch.tensor([(context + ending)[:-1]])).logits[0].log_softmax(-1)
                chosen = log_p[-len(ending) :].gather(1, torch.tensor(ending)[:, None])
                results.append((chosen.sum().item(), False))
            return results

    (folder / "exported.yaml").write_text(task)
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=Exported(),
        tasks=["exported"],
        task_manager=tasks,
        log_samples=True,
        bootstrap_iters=0,
    )
    return sorted(results["samples"]["exported"], key=lambda s: s["doc_id"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset, kind", [("gpt2-baseline", "GPT2LMHeadModel"), ("gpt2-rope", "Starcoder2ForCausalLM")]
)
def test_lm_eval_on_an_export_chooses_as_hellaswag_py(tmp_path, shared, monkeypatch, preset, kind):
    """100 items of the shared set: a small model trained here, exported, scored by lm-eval.

    `hellaswag.py --protocol harness` on the checkpoint makes the same choices, and its losses are
    equal to 1e-4 of their size.
    """
    pytest.importorskip("lm_eval", reason="pip install lm-eval==0.4.13")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    text, items = tmp_path / "text.txt", tmp_path / "items.jsonl"
    text.write_text((shared / "tinyshakespeare.txt").read_text())
    with gzip.open(shared / "hellaswag_val.jsonl.gz", "rt", encoding="utf-8") as f:
        raw = f.readlines()
    items.write_text("".join(raw[:: len(raw) // 100][:100]), encoding="utf-8")
    assert run("prepare.py", "files", text, "--out", tmp_path / "data").returncode == 0

    settings = dict(zip(TINY[::2], TINY[1::2])) | {
        "--data_root": tmp_path / "data",
        "--log_dir": tmp_path / "log",
        "--run_name": "r",
        "--max_steps": 60,
        "--max_lr": 3e-3,
        "--vocab_size": 50304,
        "--n_embd": 64,
        "--T": 256,
        "--total_batch": 1024,
        "--log_interval": 60,
    }
    options = [x for option in settings.items() for x in option]
    done = run("train_gpt2.py", preset, *options)
    assert done.returncode == 0, done.stderr
    done = run("hf.py", "export", tmp_path / "log" / "r", tmp_path / "out")
    assert done.returncode == 0 and kind in done.stdout, done.stderr
    out = tmp_path / "ours.json"
    options = f"--protocol harness --out {out} --per_item True --dtype float32 --device cpu".split()
    done = run("hellaswag.py", "--model", tmp_path / "log" / "r", "--data", items, *options)
    assert done.returncode == 0, done.stderr
    ours = json.loads(out.read_text())
    samples = lm_eval_choices(tmp_path / "out", TASK.format(items=items))
    assert len(samples) == ours["items"] == 100 and ours["cut"] == 0
    for sample, item in zip(samples, ours["per_item"]):
        losses = [-float(r[0][0]) for r in sample["resps"]]
        # a sum over tens of tokens: the padded rows that the export is without held about 1e-4 of
        # the probability
        torch.testing.assert_close(
            torch.tensor(item["losses"]), torch.tensor(losses), atol=1e-3, rtol=1e-4
        )
        per_character = [
            loss / len(ending) for loss, ending in zip(losses, sample["doc"]["endings"])
        ]
        assert (item["acc_choice"], item["acc_norm_choice"]) == (
            losses.index(min(losses)),
            per_character.index(min(per_character)),
        )
        assert (sample["acc"], sample["acc_norm"]) == (
            item["acc_choice"] == item["label"],
            item["acc_norm_choice"] == item["label"],
        )
    assert len({item["acc_choice"] for item in ours["per_item"]}) == 4  # it is about something


# --------------------------------------------------------------------------------------------------
# load-hf-gpt2.ipynb (what it stores: test_notebooks.py)

NOTEBOOK = ROOT / "load-hf-gpt2.ipynb"


def printed(notebook) -> str:
    return "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )


@pytest.mark.slow
@pytest.mark.parametrize("hub", [False, True])
def test_the_notebook_runs(tmp_path, monkeypatch, hub):
    """Without the hub, and with a stand-in of GPT-2's vocabulary and context in its place."""
    write_source(tmp_path / "gpt2", vocab_size=50257, n_positions=1024)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells if hub else ():
        cell.source = cell.source.replace('GPT2 = "gpt2"', f'GPT2 = "{tmp_path / "gpt2"}"')
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    words = (
        "weights: " if hub else "a small model with random weights in the same layout",
        "equals nn.Linear with the transpose: True",
        "logits equal those of transformers: True",
        "with one square matrix not transposed: False",
        "greedy text equal: True",
        "True | step_000000",
        "- Hello, I'm",
        "| val loss" if hub else "skipped, no gpt2",
    )
    assert all(word in printed(notebook) for word in words), printed(notebook)
