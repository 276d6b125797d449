"""Load weights from anywhere; import GPT-2 from Hugging Face, and export to it.

    python hf.py import gpt2 log/gpt2            OpenAI's weights, or a folder's, as a run directory
    python hf.py export log/gpt2-rope my-gpt2    a run or a checkpoint for AutoModelForCausalLM

Learned positions become a GPT2LMHeadModel, RoPE a Starcoder2ForCausalLM, modern a
NanoChatForCausalLM; SwiGLU is not exported (notes/huggingface.md). `transformers` is not needed.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file

from config import TrainConfig
from model import GPT, GPTConfig
from runtime import checkpoint
from runtime.checkpoint import Checkpoint, Header
from runtime.command_line import (
    PathText,
    UserError,
    one_line,
    parse_command,
    printable,
    run_script,
    say,
    suggest,
)
from runtime.files import atomic, read_json, remedy
from runtime.runlog import read_metrics
from tokenizer import (
    EOT,
    N_VOCAB,
    added_tokens,
    hugging_face_files,
    tokenizer_difference,
)

# OpenAI's four sizes, each at a fixed commit: a name always means the same weights.
REVISIONS = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}

# What model.py computes, by the names of GPT2Config; the first value is the default. (Dropout and
# reorder_and_upcast_attn do not change what the weights compute.)
REPRESENTABLE = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh form
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "quantization_config": (None,),
}

# Stored as (in, out) by transformers, which keeps OpenAI's Conv1D; nn.Linear has (out, in).
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

# The fields of GPTConfig that layout() below takes into account.
EXPORTED_FIELDS = set(
    "block_size vocab_size n_layer n_head n_embd use_rope use_swiglu arch".split()
)

# Our names and theirs, replaced in this order once c_attn is split into q_proj, k_proj and v_proj.
RENAMED = {
    "h.": "layers.",
    "wte": "embed_tokens",
    "attn.c_proj": "attn.o_proj",
    "attn.": "self_attn.",
}
NANOCHAT = RENAMED | {"c_fc": "fc1", "mlp.c_proj": "mlp.fc2"}
STARCODER2 = RENAMED | {
    "ln_f": "norm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
}


# --------------------------------------------------------------------------------------------------
# where weights come from


def load(where: str) -> GPT:
    """Load a model from a run directory, a checkpoint, or a Hugging Face GPT-2 (name or folder).

    float32, on the CPU. Raises UserError that says what is missing at `where`.
    """
    if has_checkpoint(where):
        return checkpoint.find_and(where, load_checkpoint)
    return from_pretrained(where)


def load_for_text(where: str) -> GPT:
    """Load a model that is to read or write text. Raises UserError when its ids are not GPT-2's."""
    model = load(where)
    if model.config.vocab_size < N_VOCAB:
        raise UserError(
            f"{where} knows {model.config.vocab_size} tokens, GPT-2's tokenizer has {N_VOCAB}; "
            "hint: a model trained with --vocab_size 50304"
        )
    return model


def read_shape(where: str) -> GPTConfig:
    """Return the shape of the model that load() would return, without its weights."""
    if has_checkpoint(where):
        return checkpoint.find_and(where, stored_shape)
    return read_config(find_folder(where))


def has_checkpoint(where: str) -> bool:
    """Return whether a path is a run, a checkpoint or a directory of checkpoints."""
    path = Path(where)
    is_checkpoint = os.path.exists(path / "state.json")
    return is_checkpoint or bool(checkpoint.steps(path / "ckpt") or checkpoint.steps(path))


def load_checkpoint(saved: Checkpoint) -> GPT:
    """Return the model of a checkpoint, on the CPU, rebuilt from the config stored with it."""
    check_shape(saved)
    model = empty_model(saved)
    checkpoint.load_weights(saved, model)
    return model


def empty_model(saved: Checkpoint) -> GPT:
    """Return a model of a checkpoint's shape. Raises UserError when it is another kind of model."""
    return GPT(stored_shape(saved))


def stored_shape(saved: Checkpoint) -> GPTConfig:
    """Return the shape of a checkpoint's model. Raises UserError when there is no such model."""
    try:
        config = GPTConfig(**saved.state["gpt_config"])
        check_config(config)
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{saved.path} is not of this model ({one_line(e)}); "
            "hint: use the version that wrote it"
        ) from e
    return config


# Larger than any model that exists, small enough for shapes to be computed.
LARGEST = dict.fromkeys(("n_layer", "n_head", "vocab_size", "block_size"), 2**31) | {
    "n_embd": 2**24
}


def check_config(config: GPTConfig):
    """Raise ValueError for a shape that no model can have."""
    for name, largest in LARGEST.items():
        value = getattr(config, name)
        if type(value) is not int or not 0 < value < largest:
            raise ValueError(
                f"{name} {value!r}, expected a whole number above 0, below {largest:,}"
            )
    for name in ("use_rope", "use_swiglu"):
        if type(getattr(config, name)) is not bool:
            raise ValueError(f"{name} {getattr(config, name)!r}, expected true or false")
    if config.arch not in ("gpt2", "modern"):
        raise ValueError(f"arch {config.arch!r}, expected gpt2 or modern")
    if config.n_embd % (config.n_head * (2 if config.rotary else 1)):
        raise ValueError(
            f"n_embd {config.n_embd}, expected a multiple of n_head {config.n_head}"
            f"{', heads of even width' if config.rotary else ''}"
        )


def check_shape(saved: Checkpoint):
    """Compare a checkpoint's shape with its weights' header, before anything large is built.

    Raises UserError where they differ: its config may ask for any amount of memory.
    """
    hint = "hint: use the version that wrote it, or an older checkpoint"
    header = checkpoint.weights_header(saved)
    shape_only(stored_shape(saved), header, str(saved.path), hint)


def newest_run(log_dir: str = "log") -> str:
    """Return the run directory with the newest checkpoint. Raises UserError when there is none.

    Runs are log/NAME and log/STUDY/NAME; log/reference holds records of others.
    """
    states = []
    for _ in range(2):  # one may be deleted, and a newer one written, while this looks
        for folder in Path(log_dir).glob("*"):
            if folder.name != "reference":
                states += folder.glob("ckpt/step_*/state.json")
                states += folder.glob("*/ckpt/step_*/state.json")
        if states:
            break
    if not states:
        raise UserError(
            f"no run with a checkpoint in {log_dir}/; "
            "hint: python train_gpt2.py first, or --model PATH"
        )
    return str(max(states, key=time_written).parents[2])


def time_written(path: Path) -> float:
    """Return when a file was written; 0 for one that has just been deleted."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def from_pretrained(name_or_folder: str) -> GPT:
    """Return a GPT with the weights of a Hugging Face GPT-2, float32 on the CPU.

    name_or_folder: a name in REVISIONS (downloaded once, then read from the hub's cache), or a
    folder with the config.json and safetensors of a GPT2LMHeadModel. vocab_size is the source's own
    (50,257): padding to 50,304 would add rows whose logit is 0, and so change every probability.
    Raises UserError for what cannot be found, read, or represented exactly by model.py, and for a
    tokenizer beside the weights that is not GPT-2's.
    """
    folder = find_folder(name_or_folder)
    config = read_config(folder)
    check_vocabulary(folder, config)
    weights = read_weights(folder)
    head = weights.pop("lm_head.weight", None)
    headers = {k: Header(tuple(w.shape), FLOATS.get(w.dtype, w.dtype)) for k, w in weights.items()}
    hint = "hint: take both files from one GPT2LMHeadModel.save_pretrained"
    model = shape_only(config, headers, f"{folder}: config.json", hint)
    wte = weights["wte.weight"]
    if head is not None and not (head.dtype == wte.dtype and torch.equal(head, wte)):
        raise UserError(
            f"the lm_head.weight in {folder} differs from its wte.weight, expected one matrix for "
            f"both; hint: {', '.join(REVISIONS)} have a tied head"
        )
    # copies: load_file memory-maps, and reading a file that shrank is a crash
    weights = {key: torch.empty(w.shape).copy_(w) for key, w in weights.items()}
    bad = [key for key, w in weights.items() if not torch.isfinite(w).all()]
    if bad:
        raise UserError(
            f"{folder} has NaN or infinite weights ({bad[0]}, {len(bad)} of {len(weights)}); "
            "hint: another copy"
        )
    model.load_state_dict(weights, assign=True)
    return model


def find_folder(name_or_folder: str) -> Path:
    """Return the folder with config.json and weights. Raises UserError when there is none."""
    folder = Path(name_or_folder)
    try:
        if not folder.exists():
            return fetch_from_hub(name_or_folder.removeprefix("openai-community/"))
        if not any((folder / f"model.safetensors{end}").exists() for end in ("", ".index.json")):
            raise UserError(missing_weights(folder))
    except OSError as e:
        raise checkpoint.unreadable(folder, e) from e
    return folder


def check_vocabulary(folder: Path, config: GPTConfig):
    """Raise UserError when a folder's tokenizer is not GPT-2's; report tokens beyond GPT-2's.

    Without a tokenizer in the folder, ids are taken for GPT-2's.
    """
    difference = tokenizer_difference(folder)
    if difference:
        raise UserError(
            f"the tokenizer in {folder} is not GPT-2's ({difference}): its ids mean other text; "
            f'hint: AutoModelForCausalLM and AutoTokenizer.from_pretrained("{folder}") open it'
        )
    beyond = config.vocab_size - N_VOCAB
    if beyond > 0:
        names = ", ".join(repr(token[:40]) for token in list(added_tokens(folder))[:5])
        say(
            f"vocabulary | {folder} has {beyond} rows beyond GPT-2's {N_VOCAB:,} tokens"
            f"{f', added were {names}' if names else ''}: text never becomes these ids here, and "
            "exports leave them out"
        )


def missing_weights(path: Path) -> str:
    """Return the error message for a path that holds no weights: what is there, and a hint."""
    if path.is_file():
        return f"no checkpoint in {path}, a file; hint: give the directory that it is in"
    files = sorted(file.name for file in path.iterdir())
    pickled = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    if "metrics.jsonl" in files:
        return (
            f"no checkpoint in {path}, a run that has saved none there; "
            "hint: its --ckpt_dir if it has one, or wait for the first save"
        )
    if pickled:
        return (
            f"{path} holds {pickled[0]} but no model.safetensors, and pickled weights are never "
            f'opened; hint: GPT2LMHeadModel.from_pretrained("{path}").save_pretrained("NEW")'
        )
    if "config.json" in files:
        return (
            f"{path} holds config.json but no model.safetensors; "
            "hint: copy both from what one GPT2LMHeadModel.save_pretrained wrote"
        )
    return (
        f"no checkpoint in {path}, and no config.json with model.safetensors; "
        "hint: a run (log/NAME), a step_NNNNNN directory in it, or what save_pretrained wrote"
    )


def fetch_from_hub(name: str) -> Path:
    """Return the folder of one of OpenAI's models in the hub's cache, downloaded if need be."""
    import huggingface_hub

    if name not in REVISIONS:
        raise UserError(
            f"{name!r} is neither a folder nor a name of OpenAI's; hint: {suggest(name, REVISIONS)}"
        )
    # without a network, each of its six attempts would print a warning
    huggingface_hub.logging.set_verbosity_error()
    repository = f"openai-community/{name}"
    files = ("config.json", "model.safetensors")
    commit = dict(revision=REVISIONS[name])
    try:
        # the name that these models had before, under which others may have cached them
        cached = [huggingface_hub.try_to_load_from_cache(name, file, **commit) for file in files]
        if all(isinstance(path, str) for path in cached):
            return Path(cached[0]).parent
        for file in files:
            path = huggingface_hub.hf_hub_download(repository, file, **commit)
    except Exception as e:  # the hub's, the disk's, or an HTTP library's that differs by version
        raise UserError(
            f"cannot fetch {name} ({one_line(e)}); hint: where there is a network, "
            f"hf download {repository} config.json model.safetensors --local-dir {name}; "
            "then bring that folder here and give its path"
        ) from e
    return Path(path).parent


def read_config(folder: Path) -> GPTConfig:
    """Return config.json as a GPTConfig.

    Raises UserError listing everything that model.py does not compute, with both values.
    """
    try:
        c = read_json(folder / "config.json")
        if c["model_type"] != "gpt2":
            raise ValueError(f"model_type {c['model_type']!r}, expected 'gpt2'")
        same_names = ("vocab_size", "n_layer", "n_head", "n_embd")
        config = GPTConfig(block_size=c["n_positions"], **{name: c[name] for name in same_names})
        check_config(config)
        wrong = [
            f"{key} {c[key]!r}, expected {' or '.join(map(repr, accepted))}"
            for key, accepted in (REPRESENTABLE | {"n_inner": (None, 4 * config.n_embd)}).items()
            if c.get(key, accepted[0]) not in accepted
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{folder / 'config.json'} is not that of a GPT-2 ({one_line(e)}); "
            f"hint: {', '.join(REVISIONS)} or a folder that GPT2LMHeadModel.save_pretrained wrote"
        ) from e
    if wrong:
        raise UserError(
            f"{folder}: model.py does not compute this GPT-2: {'; '.join(wrong)}; "
            f"hint: it does {', '.join(REVISIONS)}"
        )
    return config


# --------------------------------------------------------------------------------------------------
# safetensors: shapes first, so that nothing is built that the files do not hold


# types of weights that load into a model
FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def weight_files(folder: Path) -> list[Path]:
    """Return a folder's safetensors: large models come in several. Raises UserError."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    try:
        if index.exists():
            names = set(read_json(index)["weight_map"].values())
            outside = [name for name in names if not isinstance(name, str) or "/" in name]
            if outside:
                raise ValueError(f"it names {outside[0]!r}, which is not a file beside it")
            missing = names.difference(os.listdir(folder))  # there may be millions
            if missing:
                raise ValueError(f"{len(missing)} of its files are missing, such as {min(missing)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{index} cannot be read ({one_line(e)}); hint: copy it and its files again"
        ) from e
    return sorted(folder / name for name in names)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return a folder's weights under model.py's names, memory-mapped, Conv1D transposed."""
    weights = {}
    for path in weight_files(folder):
        try:
            if not path.is_file():  # a pipe would never end
                raise FileNotFoundError("not a regular file")
            stored = load_file(path)
        except (SafetensorError, OSError, RuntimeError) as e:
            raise UserError(
                f"{path} cannot be read ({one_line(e)}); hint: copy it again, or save it again: "
                "GPT2LMHeadModel.from_pretrained(OLD).save_pretrained(NEW)"
            ) from e
        for key, w in stored.items():
            key = key.removeprefix("transformer.")
            # older files store the causal mask
            if not key.endswith((".attn.bias", ".attn.masked_bias")):
                weights[key] = w.t() if key.endswith(TRANSPOSED) and w.dim() == 2 else w
    return weights


def shape_only(config: GPTConfig, headers: dict[str, Header], source: str, hint: str) -> GPT:
    """Return a model without memory for weights, when it is one that the headers describe.

    Raises UserError for weights that are missing, too many, of another shape, or not floats.
    """
    layers = {key.split(".")[1] for key in headers if key.startswith("h.")}
    if len(layers) != config.n_layer:
        raise UserError(
            f"{source} says n_layer {config.n_layer}, the weights have {len(layers)} layers; {hint}"
        )
    with torch.device("meta"):  # no random weights are drawn
        model = GPT(config)
    expected = {key: tuple(p.shape) for key, p in model.state_dict().items()}
    wrong = []
    for key in sorted(expected.keys() | headers.keys()):
        shape = headers[key].shape if key in headers else "missing"
        if shape != expected.get(key):
            wrong.append(f"{key} {shape}, expected {expected.get(key, 'no such weight')}")
        elif headers[key].dtype not in FLOATS.values():
            wrong.append(f"{key} {headers[key].dtype}, expected {' or '.join(FLOATS.values())}")
    if wrong:
        raise UserError(
            f"{source} does not fit the weights: {'; '.join(wrong[:3])} ({len(wrong)} such); {hint}"
        )
    return model


# --------------------------------------------------------------------------------------------------
# export: one function per architecture


def layout(model: GPT) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return config.json and weights as transformers has them, without the padded vocabulary.

    Raises UserError for a model that no class of transformers computes.
    """
    c = model.config
    refuse_what_is_not_exported(c)
    weights = model.state_dict()
    rows = min(c.vocab_size, N_VOCAB)
    for key in {"wte.weight", "lm_head.weight"} & weights.keys():
        weights[key] = weights[key][:rows]
    if c.modern:
        config, weights = as_nanochat(c, weights)
    elif c.use_rope:
        config, weights = as_starcoder2(c, weights)
    else:
        config, weights = as_gpt2(c, weights)
    end = EOT if rows == N_VOCAB else None
    ends = dict(bos_token_id=end, eos_token_id=end)
    config |= dict(vocab_size=rows, tie_word_embeddings=not c.modern, **ends, dtype="float32")
    return config, weights


def refuse_what_is_not_exported(c: GPTConfig):
    """Raise UserError for SwiGLU, and for every field or value that layout() does not know."""
    if c.use_swiglu:
        raise UserError(
            "no class of transformers computes this model: SwiGLU with LayerNorm and biases; "
            "hint: generate.py and hellaswag.py open its checkpoint, gpt2-rope is the nearest "
            "that exports"
        )
    unknown = [f.name for f in dataclasses.fields(c) if f.name not in EXPORTED_FIELDS]
    if c.arch not in ("gpt2", "modern"):
        unknown.append("arch")
    if unknown:
        values = ", ".join(f"{name} {getattr(c, name)!r}" for name in unknown)
        raise UserError(f"hf.py does not export models with {values}; hint: add it to hf.layout")


def as_gpt2(c: GPTConfig, weights: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    config = dict(
        model_type="gpt2",
        architectures=["GPT2LMHeadModel"],
        n_positions=c.block_size,
        n_ctx=c.block_size,  # its older name, which llama.cpp's converter reads
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        activation_function="gelu_pytorch_tanh",
        layer_norm_epsilon=1e-5,
        # 0.1 unless given, which would change fine-tuning
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    renamed = {}
    for key, w in weights.items():
        renamed[f"transformer.{key}"] = w.t() if key.endswith(TRANSPOSED) else w
    return config, renamed


def as_starcoder2(c: GPTConfig, weights: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    config = rotary_config("starcoder2", "Starcoder2ForCausalLM", c) | dict(
        hidden_act="gelu_pytorch_tanh",
        norm_epsilon=1e-5,
        use_bias=True,
        sliding_window=None,
    )
    return config, rename(weights, STARCODER2)


def as_nanochat(c: GPTConfig, weights: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    config = rotary_config("nanochat", "NanoChatForCausalLM", c) | dict(
        hidden_act="relu2",
        rms_norm_eps=1e-6,
        final_logit_softcapping=15.0,
        attention_bias=False,
        pad_token_id=None,
    )
    head = weights.pop("lm_head.weight")
    renamed = rename(weights, NANOCHAT)
    for key, w in renamed.items():
        if "q_proj" in key or "k_proj" in key:
            # NanoChat rotates by minus our angle; swapping the halves of each head undoes that
            halves = w.view(c.n_head, 2, -1, w.shape[1])
            renamed[key] = halves.flip(1).reshape(w.shape)
    return config, renamed | {"lm_head.weight": head}


def rotary_config(model_type: str, architecture: str, c: GPTConfig) -> dict:
    """Return the part of config.json that the two rotary architectures share."""
    return dict(
        model_type=model_type,
        architectures=[architecture],
        hidden_size=c.n_embd,
        intermediate_size=4 * c.n_embd,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_head,
        max_position_embeddings=c.block_size,
        rope_theta=10000.0,  # the base of model.rope_tables
    )


def rename(weights: dict, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Return weights under other names, one replaced after the other, c_attn as three matrices."""
    renamed = {}
    for key, w in weights.items():
        parts = {key: w}
        if "c_attn" in key:
            parts = {key.replace("c_attn", f"{x}_proj"): part for x, part in zip("qkv", w.chunk(3))}
        for name, part in parts.items():
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            renamed[f"model.{name}"] = part
    return renamed


# --------------------------------------------------------------------------------------------------
# export: the model card

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {title}

A GPT-2 trained in plain PyTorch, exported for `{architecture}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

| | |
|---|---|
{rows}
"""
CARD_SETTINGS = (
    "preset init_from optimizer schedule max_lr min_lr warmup_steps weight_decay betas "
    "grad_norm_clip T total_batch data_order data_seed seed"
).split()


def model_card(saved: Checkpoint, c: GPTConfig, architecture: str, parameters: int) -> str:
    """Return the README.md of an export: how to load it, what it is, how it was trained."""
    positions = "rotary" if c.rotary else "learned"
    rows = {
        "model": f"{parameters:,} parameters, {c.n_layer} layers, {c.n_head} heads, "
        f"{c.n_embd} wide, {positions} positions, context of {c.block_size} tokens"
    }
    title = "GPT-2"
    try:
        if "config" in saved.state:
            cfg = dataclasses.asdict(TrainConfig()) | saved.state["config"]
            title = cfg["run_name"]
            rows |= training_rows(saved, cfg)
        else:  # hf.py import
            rows["weights"] = f"from {Path(saved.state.get('source', '?')).name}"
        rows["written by"] = ", ".join(f"{k} {v}" for k, v in saved.state["versions"].items())
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(
            f"{saved.path / 'state.json'} does not say how the model was trained ({one_line(e)}); "
            "hint: use the version that wrote it"
        ) from e
    table = "\n".join(f"| {name} | {as_text(value)} |" for name, value in rows.items())
    return CARD.format(title=as_text(title), architecture=architecture, rows=table)


def as_text(value) -> str:
    """Return what others have written as one line of Markdown, without control characters."""
    line = printable(" ".join(str(value).split()))
    return line.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def training_rows(saved: Checkpoint, cfg: dict) -> dict[str, str]:
    """Return what the card says of training; folders by name alone, as paths are private."""
    step, data = saved.step, Path(cfg["data_root"]).name
    tokens = step * cfg["total_batch"]
    rows = {"trained": f"{step:,} of {cfg['max_steps']:,} steps, {tokens:,} tokens of {data}"}
    shown = {key: cfg[key] for key in CARD_SETTINGS} | {"init_from": Path(cfg["init_from"]).name}
    rows["settings"] = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in shown.items()
        if value != ""
    )
    last = last_evaluation(saved, cfg)
    if last:
        at_step = f"at step {last['step']:,}"
        rows["validation loss"] = f"{last['val/loss']:.4f} nats per token, {at_step}"
    if last.get("val/hella_norm") is not None:
        rows["HellaSwag"] = (
            f"acc_norm {last['val/hella_norm']:.4f} ± {last['val/hella_se']:.4f}, by mean loss per "
            f"token, {at_step}, {cfg['hellaswag_limit']:,} items"
        )
    return rows


def last_evaluation(saved: Checkpoint, cfg: dict) -> dict:
    """Return the run's last evaluation up to a checkpoint's step; {} without a metrics.jsonl."""
    ckpt_dir = saved.path.resolve().parent
    run_dir = ckpt_dir.parent
    if cfg["ckpt_dir"] and Path(cfg["ckpt_dir"]).resolve() == ckpt_dir:
        run_dir = Path(cfg["log_dir"], cfg["run_name"])
    if not (run_dir / "metrics.jsonl").exists():
        return {}
    last = {}
    try:
        for record in read_metrics(run_dir):
            if record.get("val/loss") is not None and record["step"] <= saved.step:
                last = record
    except OSError as e:
        raise checkpoint.unreadable(run_dir / "metrics.jsonl", e) from e
    return last


# --------------------------------------------------------------------------------------------------
# command line


@contextmanager
def new_folder(out: str) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `out` when the block ends without an error.

    Raises UserError when `out` exists and is not empty, or cannot be written.
    """
    path = Path(out).resolve()  # "." has a name, too
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(
                f"{out} is there already, expected a new or an empty directory; hint: another OUT"
            )
        with atomic(path) as temporary:
            temporary.mkdir(parents=True)
            yield temporary
    except (OSError, SafetensorError) as e:
        raise UserError(
            f"cannot write {out} ({one_line(e)}); hint: {remedy(e, path.parent)}, or another OUT"
        ) from e


def import_(name: tyro.conf.Positional[PathText], out: tyro.conf.Positional[PathText]):
    """Import Hugging Face GPT-2 weights as a run, for generate.py, hellaswag.py and --init_from.

    Args:
        name: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with config.json and safetensors
        out: run directory to make, such as log/gpt2
    """
    with new_folder(out) as folder:
        model = from_pretrained(name)
        state = {"gpt_config": dataclasses.asdict(model.config), "source": name}
        checkpoint.write(folder / "ckpt", 0, {"model.safetensors": model.state_dict()}, state)
    say(f"imported | {name} -> {out} | {model.num_params():,} parameters")


def export(run: tyro.conf.Positional[PathText], out: tyro.conf.Positional[PathText]):
    """Export a checkpoint for AutoModelForCausalLM and AutoTokenizer, with a model card.

    Args:
        run: run directory (its newest checkpoint), or a checkpoint
        out: folder to make
    """
    with new_folder(out) as folder:
        saved, model = checkpoint.find_and(run, lambda saved: (saved, load_checkpoint(saved)))
        config, weights = layout(model)
        architecture = config["architectures"][0]
        parameters = sum(w.numel() for w in weights.values())
        files = {
            "config.json": json.dumps(config, indent=1),
            "README.md": model_card(saved, model.config, architecture, parameters),
        }
        note = ""
        if config["eos_token_id"] == EOT:
            files |= hugging_face_files(model.config.block_size)
        else:
            note = f", fewer than GPT-2's {N_VOCAB:,}: no tokenizer with it"
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
        checkpoint.save_tensors(weights, folder / "model.safetensors", {"format": "pt"})
    rows = f"{config['vocab_size']:,} rows of vocabulary"
    beyond = model.config.vocab_size - config["vocab_size"]
    if beyond:
        rows += f" ({beyond} beyond GPT-2's left out)"
    say(f"exported | {saved.path} -> {out} | {architecture}, {rows}{note}")


if __name__ == "__main__":
    run_script(lambda: parse_command({"import": import_, "export": export}, __doc__))
