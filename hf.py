"""Between Hugging Face `transformers` and this project, both ways.

    python hf.py import gpt2 log/gpt2             OpenAI's weights, or a folder's, as a run that all scripts here open
    python hf.py export log/gpt2-rope my-gpt2     a run or checkpoint as a folder that AutoModelForCausalLM opens

The files are read and written as such: no `transformers` needed, no random model built first. Exported are
    learned positions  as GPT2LMHeadModel
    RoPE               as Starcoder2ForCausalLM: GPT-2 with RoPE down to biases, tanh-GELU and tied head. (GPTNeoX with
                       use_parallel_residual=False is as exact, but llama.cpp opens it with an untied head only)
    modern             as NanoChatForCausalLM, which turns queries and keys the other way round: their halves change places
    SwiGLU             not at all: no class of transformers 5 has it together with LayerNorm and biases
"""

import dataclasses
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import TrainConfig
from model import GPT, GPTConfig
from runtime import checkpoint
from runtime.checkpoint import Checkpoint
from runtime.command_line import UserError, near, one_line, parse_command, run_script
from runtime.files import fsync
from runtime.runlog import read_metrics
from tokenizer import EOT, N_VOCAB, hugging_face_files

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

# Stored as (in, out) by transformers, which keeps OpenAI's Conv1D; nn.Linear has (out, in).
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

# Our names and theirs, in the order of their replacement, once c_attn is split into q_proj, k_proj and v_proj.
STARCODER2 = {
    "h.": "layers.",
    "wte": "embed_tokens",
    "ln_f": "norm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "attn.o_proj",
    "attn.": "self_attn.",
}
NANOCHAT = {
    "h.": "layers.",
    "wte": "embed_tokens",
    "attn.c_proj": "attn.o_proj",
    "attn.": "self_attn.",
    "c_fc": "fc1",
    "mlp.c_proj": "mlp.fc2",
}


# --------------------------------------------------------------------------------------------------
# models from anywhere


def load(where: str) -> GPT:
    """Return a model, float32 on the CPU, from a run directory, a checkpoint, or Hugging Face.

    The latter by a GPT-2's name or as a folder. Raises UserError.
    """
    path = Path(where)
    is_folder = (path / "config.json").exists() and not (path / "metrics.jsonl").exists()
    is_folder = is_folder and not (path / "ckpt").exists()
    if path.exists() and not is_folder:
        return load_checkpoint(checkpoint.find(where))
    return from_pretrained(where)


def load_checkpoint(found: Checkpoint) -> GPT:
    """Return the model of a checkpoint, on the CPU, rebuilt from the config stored with it."""
    model = empty_model(found)
    checkpoint.load_weights(found, model)
    return model


def empty_model(found: Checkpoint) -> GPT:
    """Return a model of a checkpoint's shape. Raises UserError when it is another kind of model."""
    try:
        return GPT(GPTConfig(**found.state["gpt_config"]))
    except (KeyError, TypeError) as e:
        raise UserError(
            f"{found.path} is not of this model ({one_line(e)}); "
            "hint: use the version that wrote it"
        ) from e


def newest_run(log_dir: str = "log") -> str:
    """Return the run directory with the newest checkpoint. Raises UserError when there is none."""
    states = list(Path(log_dir).glob("*/ckpt/step_*/state.json"))
    if not states:
        raise UserError(
            f"no run with a checkpoint in {log_dir}/; "
            "hint: python train_gpt2.py first, or --model PATH"
        )
    newest = max(states, key=lambda path: path.stat().st_mtime)
    return str(newest.parents[2])


def from_pretrained(name_or_folder: str) -> GPT:
    """A GPT with the weights of a Hugging Face GPT-2, float32 on the CPU.

    name_or_folder: gpt2, gpt2-medium, gpt2-large or gpt2-xl (fetched once, then read from the hub's cache), or a folder
    with the config.json and safetensors of a GPT2LMHeadModel. vocab_size is the source's own (50,257): rows of zeros
    up to 50,304 would get logit 0, and so change every probability.
    Raises UserError for what cannot be found, read whole, or represented exactly by model.py.
    """
    name = name_or_folder.removeprefix("openai-community/")
    if not Path(name_or_folder).is_dir() and name not in REVISIONS:
        raise UserError(
            f"{name_or_folder!r} is neither a folder nor a name of OpenAI's; hint: {near(name, REVISIONS)}"
        )
    folder = Path(name_or_folder) if Path(name_or_folder).is_dir() else fetch(name)
    config, weights = read_config(folder), read_weights(folder)
    with torch.device("meta"):  # shapes only: no random weights drawn just to be thrown away
        model = GPT(config)
    expected = {key: tuple(p.shape) for key, p in model.state_dict().items()}
    found = {key: tuple(w.shape) for key, w in weights.items()}
    wrong = [
        f"{key} {found.get(key, 'missing')}, expected {expected.get(key, 'no such weight')}"
        for key in sorted(expected.keys() | found.keys())
        if expected.get(key) != found.get(key)
    ]
    if wrong:
        raise UserError(
            f"weights in {folder} do not fit its config.json: {'; '.join(wrong[:3])} ({len(wrong)} such); "
            "hint: take both files from one GPT2LMHeadModel.save_pretrained"
        )
    model.load_state_dict(weights, assign=True)
    return model


def fetch(name: str) -> Path:
    """The folder of one of OpenAI's models in the hub's cache, filled from the network at the first use."""
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # without a network, each of its six attempts would warn
    try:
        for file in ("config.json", "model.safetensors"):
            path = huggingface_hub.hf_hub_download(
                f"openai-community/{name}", file, revision=REVISIONS[name]
            )
    except (
        Exception
    ) as e:  # the hub's, the disk's, or those of an HTTP library that differs between versions
        raise UserError(
            f"cannot fetch {name} ({one_line(e)}); hint: where there is a network, "
            f"hf download openai-community/{name} config.json model.safetensors --local-dir {name}; "
            "then bring that folder here and give its path"
        )
    return Path(path).parent


def read_config(folder: Path) -> GPTConfig:
    """config.json as a GPTConfig. Raises UserError listing all that model.py does not compute, with both values."""
    try:
        c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if c["model_type"] != "gpt2":
            raise ValueError(f"model_type {c['model_type']!r}, expected 'gpt2'")
        config = GPTConfig(
            block_size=int(c["n_positions"]),
            vocab_size=int(c["vocab_size"]),
            n_layer=int(c["n_layer"]),
            n_head=int(c["n_head"]),
            n_embd=int(c["n_embd"]),
        )
        wrong = [
            f"{key} {c[key]!r}, expected {' or '.join(map(repr, ok))}"
            for key, ok in (REPRESENTABLE | {"n_inner": (None, 4 * config.n_embd)}).items()
            if c.get(key, ok[0]) not in ok
        ]
        if config.n_embd % config.n_head:
            wrong.append(f"n_embd {config.n_embd}, expected a multiple of n_head {config.n_head}")
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{folder / 'config.json'} is not that of a GPT-2 ({one_line(e)}); "
            f"hint: {', '.join(REVISIONS)} or a folder that GPT2LMHeadModel.save_pretrained wrote"
        )
    if wrong:
        raise UserError(
            f"{folder}: model.py does not compute this GPT-2: {'; '.join(wrong)}; "
            f"hint: it does {', '.join(REVISIONS)}"
        )
    return config


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights under model.py's names, float32, in memory of their own. Large models come in several files."""
    path, raw = folder / "model.safetensors.index.json", {}
    try:
        parts = (
            json.loads(path.read_text())["weight_map"].values()
            if path.exists()
            else ["model.safetensors"]
        )
        for path in sorted({folder / Path(part).name for part in parts}):
            raw |= {key.removeprefix("transformer."): w for key, w in load_file(path).items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path} cannot be read ({one_line(e)}); hint: copy it again, or write it anew: "
            "GPT2LMHeadModel.from_pretrained(OLD).save_pretrained(NEW)"
        )
    if (head := raw.pop("lm_head.weight", None)) is not None and not torch.equal(
        head, raw.get("wte.weight", head)
    ):
        raise UserError(
            f"the lm_head.weight in {folder} differs from its wte.weight, expected one matrix for both; "
            f"hint: {', '.join(REVISIONS)} have a tied head"
        )
    weights = {}
    for key, w in raw.items():
        if key.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, which older files store
        if key.endswith(TRANSPOSED):
            w = w.t()
        # a copy, because load_file maps the file: if that shrinks later, reading the map is a crash without a message
        weights[key] = torch.empty(w.shape).copy_(w)
    return weights


# --------------------------------------------------------------------------------------------------------------------
# export


def layout(model: GPT) -> tuple[dict, dict[str, torch.Tensor]]:
    """config.json and the weights as transformers has them, without padded vocabulary. Raises UserError for SwiGLU."""
    c, weights = model.config, model.state_dict()
    if c.use_swiglu:
        raise UserError(
            "no class of transformers computes this model: SwiGLU with LayerNorm and biases; "
            "hint: generate.py and hellaswag.py open its checkpoint, gpt2-rope is the nearest that exports"
        )
    rows = min(c.vocab_size, N_VOCAB)
    weights |= {
        key: weights[key][:rows] for key in ("wte.weight", "lm_head.weight") if key in weights
    }
    end = EOT if rows == N_VOCAB else None
    common = dict(
        vocab_size=rows,
        tie_word_embeddings=not c.modern,
        bos_token_id=end,
        eos_token_id=end,
        dtype="float32",
    )
    if c.modern:
        config = dict(
            model_type="nanochat",
            architectures=["NanoChatForCausalLM"],
            hidden_size=c.n_embd,
            intermediate_size=4 * c.n_embd,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_head,
            max_position_embeddings=c.block_size,
            rope_theta=10000.0,
            hidden_act="relu2",
            rms_norm_eps=1e-6,
            final_logit_softcapping=15.0,
            attention_bias=False,
            pad_token_id=None,
        )
        return config | common, nanochat(weights, c.n_head)
    if c.use_rope:
        # rope_theta: the base of model.rope_tables; transformers 5 makes its rope_parameters of it, 4 reads it as it is
        config = dict(
            model_type="starcoder2",
            architectures=["Starcoder2ForCausalLM"],
            hidden_size=c.n_embd,
            intermediate_size=4 * c.n_embd,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_head,
            max_position_embeddings=c.block_size,
            rope_theta=10000.0,
            hidden_act="gelu_pytorch_tanh",
            norm_epsilon=1e-5,
            use_bias=True,
            sliding_window=None,
        )
        return config | common, starcoder2(weights)
    config = dict(
        model_type="gpt2",
        architectures=["GPT2LMHeadModel"],
        n_positions=c.block_size,
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        activation_function="gelu_pytorch_tanh",
        layer_norm_epsilon=1e-5,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # 0.1 unless given, which would change fine-tuning
    return config | common, {
        f"transformer.{k}": w.t() if k.endswith(TRANSPOSED) else w for k, w in weights.items()
    }


def starcoder2(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a RoPE model under the names of Starcoder2ForCausalLM."""
    return {f"model.{key}": w for key, w in renamed(weights, STARCODER2).items()}


def nanochat(weights: dict[str, torch.Tensor], n_head: int) -> dict[str, torch.Tensor]:
    """Weights of a modern model for NanoChatForCausalLM, which turns (x1, x2) by minus our angle: as good as (x2, x1) by ours."""
    head, weights = weights.pop("lm_head.weight"), renamed(weights, NANOCHAT)
    for key in [key for key in weights if "q_proj" in key or "k_proj" in key]:
        weights[key] = (
            weights[key]
            .view(n_head, 2, -1, weights[key].shape[1])
            .flip(1)
            .reshape(weights[key].shape)
        )
    return {f"model.{key}": w for key, w in weights.items()} | {"lm_head.weight": head}


def renamed(weights: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Weights under other names, one replaced after the other, and c_attn as three matrices."""
    for key in [key for key in weights if "c_attn" in key]:
        weights |= {
            key.replace("c_attn", f"{part}_proj"): w
            for part, w in zip("qkv", weights.pop(key).chunk(3))
        }
    for ours, theirs in names.items():
        weights = {key.replace(ours, theirs): w for key, w in weights.items()}
    return weights


def model_card(path: Path, state: dict, c: GPTConfig, architecture: str, parameters: int) -> str:
    """README.md of an export: how to load it, what it is, and what its run found. path, state: the checkpoint."""
    rows = {
        "model": f"{parameters:,} parameters, {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, "
        f"{'rotary' if c.rotary else 'learned'} positions, context of {c.block_size} tokens"
    }
    rows |= (
        run_rows(path, state)
        if "config" in state
        else {"weights": f"from {Path(state.get('source', '?')).name}"}
    )
    rows["written by"] = ", ".join(
        f"{name} {version}" for name, version in state["versions"].items()
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {state["config"]["run_name"] if "config" in state else "GPT-2"}

A GPT-2 trained in plain PyTorch, exported for `{architecture}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained("FOLDER") for kind in (AutoModelForCausalLM, AutoTokenizer))
```

| | |
|---|---|
""" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def run_rows(path: Path, state: dict) -> dict[str, str]:
    """What a checkpoint, and the last evaluation up to its step in its run's metrics.jsonl, where that is there, say of
    the training. Raises UserError when metrics.jsonl cannot be read.
    """
    cfg, step, found = dataclasses.asdict(TrainConfig()) | state["config"], state["step"], {}
    elsewhere = cfg["ckpt_dir"] and Path(cfg["ckpt_dir"]).resolve() == path.resolve().parent
    run_dir = Path(cfg["log_dir"], cfg["run_name"]) if elsewhere else path.resolve().parents[1]
    try:
        for record in read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []:
            if "val/loss" in record and record["step"] <= step:
                found = record
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{run_dir}/metrics.jsonl cannot be read ({one_line(e)}); hint: without it, no figures are given"
        )
    data, cfg["init_from"] = Path(cfg["data_root"]).name, Path(cfg["init_from"]).name
    keys = (
        "preset",
        "init_from",
        "optimizer",
        "schedule",
        "max_lr",
        "min_lr",
        "warmup_steps",
        "weight_decay",
        "betas",
        "grad_norm_clip",
        "T",
        "total_batch",
        "data_order",
        "data_seed",
        "seed",
    )
    rows = {
        "trained": f"{step:,} of {cfg['max_steps']:,} steps, {step * cfg['total_batch']:,} tokens of {data}",
        "settings": ", ".join(
            f"{k} {f'{v:g}' if isinstance(v := cfg[k], float) else v}" for k in keys if cfg[k] != ""
        ),
    }
    if found:
        rows["validation loss"] = (
            f"{found['val/loss']:.4f} nats per token, at step {found['step']:,}"
        )
    if found.get("val/hella_norm") is not None:
        rows["HellaSwag"] = (
            f"acc_norm {found['val/hella_norm']:.4f} ± {found['val/hella_se']:.4f}, by mean loss per token, "
            f"at step {found['step']:,}, {cfg['hellaswag_limit']:,} items"
        )
    return rows


# --------------------------------------------------------------------------------------------------------------------
# command line


@contextmanager
def new_folder(out: str):
    """A folder to write into: named `out` when the block ends well, gone when it does not. Raises UserError when
    something is there already, or cannot be written.
    """
    final = Path(out).resolve()  # "." has a name, too
    temporary = final.parent / f".{final.name}.tmp"
    try:
        if final.exists() and (not final.is_dir() or any(final.iterdir())):
            raise UserError(
                f"{out} is there already, expected a new or an empty directory; hint: another OUT"
            )
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir(parents=True)
        yield temporary
        for file in [*temporary.iterdir(), temporary]:
            fsync(file)
        if final.exists():
            final.rmdir()  # Windows renames onto nothing else
        os.replace(temporary, final)
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot write {out} ({one_line(e)}); hint: make room, or another OUT")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def import_(name: tyro.conf.Positional[str], out: tyro.conf.Positional[str]):
    """Hugging Face GPT-2 weights as a run of this project: for generate.py, hellaswag.py and --init_from.

    Args:
        name: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with a GPT-2's config.json and safetensors
        out: run directory to make, such as log/gpt2
    """
    with new_folder(out) as folder:
        model = from_pretrained(name)
        state = dict(gpt_config=dataclasses.asdict(model.config), source=name)
        checkpoint.write(folder / "ckpt", 0, {"model.safetensors": model.state_dict()}, state)
    print(f"imported | {name} -> {out} | {model.num_params():,} parameters")


def export(run: tyro.conf.Positional[str], out: tyro.conf.Positional[str]):
    """A checkpoint as a folder for AutoModelForCausalLM and AutoTokenizer: safetensors, config, tokenizer, model card.

    Args:
        run: run directory (its newest checkpoint), or a checkpoint
        out: folder to make
    """
    with new_folder(out) as folder:
        path, state = found = checkpoint.find(run)
        model = load_checkpoint(found)
        config, weights = layout(model)
        architecture, parameters = (
            config["architectures"][0],
            sum(w.numel() for w in weights.values()),
        )
        card = model_card(path, state, model.config, architecture, parameters)
        files = {"config.json": json.dumps(config, indent=1), "README.md": card}
        if has_tokenizer := config["eos_token_id"] == EOT:
            files |= hugging_face_files(model.config.block_size)
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
        save_file(
            {k: w.contiguous() for k, w in weights.items()},
            to := folder / "model.safetensors",
            {"format": "pt"},
        )
        shutil.copymode(
            folder / "config.json", to
        )  # safetensors writes files that the owner alone may read
    print(
        f"exported | {path} -> {out} | {architecture}, {config['vocab_size']:,} rows of vocabulary"
        + ("" if has_tokenizer else f", fewer than GPT-2's {N_VOCAB:,}: no tokenizer with it")
    )


if __name__ == "__main__":
    run_script(lambda: parse_command({"import": import_, "export": export}, __doc__))
