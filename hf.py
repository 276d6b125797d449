"""Hugging Face GPT-2 weights into this project's model.

    python -c "import hf; print(hf.from_pretrained('gpt2').num_params())"       124439808

Reads config.json and the safetensors themselves: no `transformers` needed, no random model built first.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from config import UserError, near, one_line
from model import GPT, GPTConfig

# The four sizes that OpenAI published, each at one fixed commit, so that a name always means the same numbers.
REVISIONS = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}

# What model.py computes, by the names of GPT2Config. A key that config.json leaves out has the first value given here.
# (Dropout and reorder_and_upcast_attn are missing on purpose: neither changes what the weights compute.)
REPRESENTABLE = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh form
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "quantization_config": (None,),
}


def from_pretrained(name_or_folder: str) -> GPT:
    """A GPT with the weights of a Hugging Face GPT-2, float32 on the CPU.

    name_or_folder: gpt2, gpt2-medium, gpt2-large or gpt2-xl (fetched once, then read from the hub's cache), or a folder
    with the config.json and safetensors of a GPT2LMHeadModel. vocab_size is the source's own (50,257): rows of zeros
    up to 50,304 would get logit 0, and so change every probability.
    Raises UserError for what cannot be found, read whole, or represented exactly by model.py.
    """
    name = name_or_folder.removeprefix("openai-community/")
    if not Path(name_or_folder).is_dir() and name not in REVISIONS:
        raise UserError(f"{name_or_folder!r} is neither a folder nor a name of OpenAI's; hint: {near(name, REVISIONS)}")
    folder = Path(name_or_folder) if Path(name_or_folder).is_dir() else fetch(name)
    config, weights = read_config(folder), read_weights(folder)
    with torch.device("meta"):  # shapes only: no random weights drawn just to be thrown away
        model = GPT(config)
    expected = {key: tuple(p.shape) for key, p in model.state_dict().items()}
    found = {key: tuple(w.shape) for key, w in weights.items()}
    wrong = [f"{key} {found.get(key, 'missing')}, expected {expected.get(key, 'no such weight')}"
             for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
    if wrong:
        raise UserError(f"weights in {folder} do not fit its config.json: {'; '.join(wrong[:3])} ({len(wrong)} such); "
                        "hint: take both files from one GPT2LMHeadModel.save_pretrained")
    model.load_state_dict(weights, assign=True)
    return model


def fetch(name: str) -> Path:
    """The folder of one of OpenAI's models in the hub's cache, filled from the network at the first use."""
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # without a network, each of its six attempts would warn
    try:
        for file in ("config.json", "model.safetensors"):
            path = huggingface_hub.hf_hub_download(f"openai-community/{name}", file, revision=REVISIONS[name])
    except Exception as e:  # the hub's, the disk's, or those of an HTTP library that differs between versions
        raise UserError(f"cannot fetch {name} ({one_line(e)}); hint: where there is a network, "
                        f"hf download openai-community/{name} config.json model.safetensors --local-dir {name}; "
                        "then bring that folder here and give its path")
    return Path(path).parent


def read_config(folder: Path) -> GPTConfig:
    """config.json as a GPTConfig. Raises UserError listing all that model.py does not compute, with both values."""
    try:
        c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if c["model_type"] != "gpt2":
            raise ValueError(f"model_type {c['model_type']!r}, expected 'gpt2'")
        config = GPTConfig(block_size=int(c["n_positions"]), vocab_size=int(c["vocab_size"]), n_layer=int(c["n_layer"]),
                           n_head=int(c["n_head"]), n_embd=int(c["n_embd"]))
        wrong = [f"{key} {c[key]!r}, expected {' or '.join(map(repr, ok))}" for key, ok in
                 (REPRESENTABLE | {"n_inner": (None, 4 * config.n_embd)}).items() if c.get(key, ok[0]) not in ok]
        if config.n_embd % config.n_head:
            wrong.append(f"n_embd {config.n_embd}, expected a multiple of n_head {config.n_head}")
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{folder / 'config.json'} is not that of a GPT-2 ({one_line(e)}); "
                        f"hint: {', '.join(REVISIONS)} or a folder that GPT2LMHeadModel.save_pretrained wrote")
    if wrong:
        raise UserError(f"{folder}: model.py does not compute this GPT-2: {'; '.join(wrong)}; "
                        f"hint: it does {', '.join(REVISIONS)}")
    return config


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights under model.py's names, float32, in memory of their own. Large models come in several files."""
    path, raw = folder / "model.safetensors.index.json", {}
    try:
        parts = json.loads(path.read_text())["weight_map"].values() if path.exists() else ["model.safetensors"]
        for path in sorted({folder / Path(part).name for part in parts}):
            raw |= {key.removeprefix("transformer."): w for key, w in load_file(path).items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} cannot be read ({one_line(e)}); hint: copy it again, or write it anew: "
                        "GPT2LMHeadModel.from_pretrained(OLD).save_pretrained(NEW)")
    if (head := raw.pop("lm_head.weight", None)) is not None and not torch.equal(head, raw.get("wte.weight", head)):
        raise UserError(f"the lm_head.weight in {folder} differs from its wte.weight, expected one matrix for both; "
                        f"hint: {', '.join(REVISIONS)} have a tied head")
    weights = {}
    for key, w in raw.items():
        if key.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, which older files store
        if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            w = w.t()  # transformers keeps OpenAI's Conv1D layout (in, out), nn.Linear has (out, in)
        # a copy, because load_file maps the file: if that shrinks later, reading the map is a crash without a message
        weights[key] = torch.empty(w.shape).copy_(w)
    return weights
