"""python -m pytest tests/test_hf.py

Import of Hugging Face GPT-2: the same logits, and one line with a hint for whatever cannot be imported. No network: the
models are tiny random ones, and the hub is a stand-in.
"""

import json
import shutil

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hf
from config import UserError
from model import GPTConfig

SHAPE = dict(vocab_size=97, n_positions=16, n_layer=2, n_head=4, n_embd=48, bos_token_id=0, eos_token_id=0)
IDS = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))


def write_source(folder, shard_size="50GB", dtype=torch.float32, **changes) -> transformers.GPT2LMHeadModel:
    """A random GPT2LMHeadModel, saved by its own save_pretrained; no weight at its initial value."""
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


# --------------------------------------------------------------------------------------------------------------------
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
    assert ours.config == GPTConfig(block_size=16, vocab_size=97, n_layer=2, n_head=4, n_embd=48)  # 97 rows: unpadded
    assert ours.num_params() == source[1].num_parameters()
    assert all(p.dtype == torch.float32 and p.is_contiguous() and p.requires_grad for p in ours.parameters())


def test_the_import_is_a_model_to_train(source, tmp_path):
    """Nothing is drawn from the random generator, and the memory is its own: a map of the file would change with it."""
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
    """As OpenAI's files on the hub: no "transformer." before the names, causal masks stored; a head may be, too."""
    def edit(weights):
        weights = {k.removeprefix("transformer."): w for k, w in weights.items()}
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
        masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
        return weights | masks | {"lm_head.weight": weights["wte.weight"]}

    edit_weights(copied, edit)
    config = json.loads((copied / "config.json").read_text())
    keep = ("model_type", "vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    (copied / "config.json").write_text(json.dumps({k: config[k] for k in keep}))  # all else is GPT-2's default
    assert_same(copied, source[1])


def test_several_files_and_half_precision(tmp_path):
    theirs = write_source(tmp_path, shard_size="40KB", dtype=torch.bfloat16)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same(tmp_path, theirs)


def test_settings_that_do_not_change_the_result(tmp_path):
    theirs = write_source(tmp_path, activation_function="gelu_pytorch_tanh", n_inner=192, resid_pdrop=0.0,
                          reorder_and_upcast_attn=True)
    assert_same(tmp_path, theirs)


def test_names_come_from_the_hub_at_a_fixed_commit(source, monkeypatch):
    asked = []

    def download(repo_id, filename, revision):
        asked.append((repo_id, filename, revision))
        return str(source[0] / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for name in ("gpt2", "openai-community/gpt2-xl"):
        assert hf.from_pretrained(name).config.n_layer == 2
    assert asked == [(f"openai-community/{name}", file, hf.REVISIONS[name]) for name in ("gpt2", "gpt2-xl")
                     for file in ("config.json", "model.safetensors")]
    assert all(len(revision) == 40 for revision in hf.REVISIONS.values())


# --------------------------------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize("changes, named", [
    (dict(activation_function="gelu"), "activation_function 'gelu', expected 'gelu_new'"),
    (dict(n_inner=100), "n_inner 100, expected None or 192"),
    (dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon 1e-06, expected 1e-05"),
    (dict(scale_attn_weights=False), "scale_attn_weights False, expected True"),
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx True, expected False"),
    (dict(add_cross_attention=True), "add_cross_attention True, expected False"),
    (dict(tie_word_embeddings=False), "tie_word_embeddings False, expected True"),
    (dict(model_type="llama"), "model_type 'llama', expected 'gpt2'"),
    (dict(n_head=5), "n_embd 48, expected a multiple of n_head 5"),
    (dict(n_head=0), "ZeroDivisionError"),
    (dict(n_layer="many"), "ValueError"),
    (dict(n_embd=None), "TypeError"),
])
def test_config_that_model_py_cannot_represent(copied, changes, named):
    edit_config(copied, **changes)
    assert named in refusal(copied)


def test_all_that_is_wrong_is_told_at_once(copied):
    edit_config(copied, activation_function="relu", layer_norm_epsilon=1e-6)
    assert "'relu'" in (message := refusal(copied)) and "1e-06" in message


def test_weights_that_do_not_fit_the_config(copied):
    edit_config(copied, n_embd=96)
    assert "h.0.attn.c_attn.bias (144,), expected (288,)" in (message := refusal(copied)) and "(28 such)" in message
    edit_config(copied, n_embd=48, n_layer=3)
    assert "h.2.attn.c_attn.bias missing, expected (144,)" in refusal(copied)
    edit_config(copied, n_layer=1)
    assert "h.1.attn.c_attn.bias (144,), expected no such weight" in refusal(copied)


def test_weights_left_out_or_with_another_head(copied):
    edit_weights(copied, lambda w: w | {"lm_head.weight": w["transformer.wte.weight"] + 1})
    assert "lm_head.weight" in refusal(copied)
    edit_weights(copied, lambda w: {k: v for k, v in w.items() if "ln_f.bias" not in k and "lm_head" not in k})
    assert "ln_f.bias missing, expected (48,)" in refusal(copied)


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_truncated_weights(copied, size):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert str(path) in refusal(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}"])
def test_damaged_config(copied, text):
    (copied / "config.json").write_text(text)
    assert "config.json" in refusal(copied)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "no.safetensors"}}'])
def test_damaged_index(copied, text):
    (copied / "model.safetensors.index.json").write_text(text)
    assert str(copied) in refusal(copied)


def test_missing_files_and_names(tmp_path, copied):
    assert "config.json" in refusal(tmp_path)  # a folder of something else
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")  # pickled weights are never opened
    assert "model.safetensors" in refusal(copied)
    assert "did you mean gpt2-medium" in refusal("gpt2-meduim")
    assert "neither a folder nor" in refusal(tmp_path / "nowhere")


def test_no_network(monkeypatch):
    def download(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("An error happened.\nPlease check your connection.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    message = refusal("gpt2-large")
    assert "cannot fetch gpt2-large" in message and "--local-dir gpt2-large" in message
