"""The baseline of `step` and `generate`: GPT-2 as transformers has it, at its best."""

import torch

from model import GPT
from runtime.command_line import UserError


def transformers_gpt2(T: int, shape: dict) -> torch.nn.Module:
    """Build transformers' GPT-2, for training: no dropout, SDPA, no cache.

    Its default dropout of 0.1 makes it several times slower.
    """
    import transformers

    transformers.logging.set_verbosity_error()  # it warns about its own defaults
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(
        n_positions=T, attn_implementation="sdpa", use_cache=False, **dropout, **shape
    )
    return transformers.GPT2LMHeadModel(config).train()


def as_transformers(model: GPT) -> torch.nn.Module:
    """Build transformers' GPT-2 with the same weights, for decoding without an end of text.

    Raises UserError for what it does not compute.
    """
    c = model.config
    if c.rotary or c.use_swiglu:
        raise UserError(
            "transformers has no such model to compare with; "
            "hint: --model with learned positions and GELU"
        )
    shape = {name: getattr(c, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    baseline = transformers_gpt2(c.block_size, shape).eval()
    weights = {"lm_head.weight": model.wte.weight}
    for name, weight in model.state_dict().items():
        is_matrix = weight.dim() == 2 and name.startswith("h.")
        weights[f"transformer.{name}"] = weight.t() if is_matrix else weight
    baseline.load_state_dict(weights)
    baseline.generation_config.eos_token_id = None
    return baseline
