"""Sample from a model.

    python generate.py                                             the newest run in log/
    python generate.py --model log/shakespeare --prompt "ROMEO:" --n 2 --max_new_tokens 300
    python generate.py --model gpt2 --prompt "Hello, I'm a language model," --temperature 0.8
"""

from pathlib import Path

import torch
import tyro

import checkpoint
from config import UserError, command_line
from distributed import pick_device
from model import GPT
from tokenizer import EOT, N_VOCAB, gpt2


@torch.no_grad()
def sample(model: GPT, idx: torch.Tensor, max_new_tokens: int, temperature: float, top_k: int,
           generator: torch.Generator, stopped=lambda: False) -> torch.Tensor:
    """Append max_new_tokens sampled ids to idx (B, T). temperature 0 takes the likeliest; top_k 0 takes all ids.

    Beyond the block size the model sees the newest block_size tokens. Ids that pad the vocabulary are never drawn.
    Ends early once stopped() is true.
    """
    for _ in range(max_new_tokens):
        if stopped():
            break
        hidden = model.trunk(idx[:, -model.config.block_size:])[:, -1]  # (B, C)
        logits = model.head(hidden)[:, :N_VOCAB].float()  # the head on the last position only: it is the dearest part
        if temperature == 0:
            next_id = logits.argmax(-1, keepdim=True)
        else:
            logits /= temperature
            if top_k:
                logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
            next_id = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        idx = torch.cat((idx, next_id), dim=1)
    return idx


def sample_texts(model: GPT, prompt: str, n: int, max_new_tokens: int, temperature: float = 1.0, top_k: int = 50,
                 seed: int = 42, stopped=lambda: False) -> list[str]:
    """n continuations of a prompt, prompt included, each cut at its first <|endoftext|>. A function of the arguments.

    An empty prompt means the beginning of a document.
    """
    device = next(model.parameters()).device
    ids = gpt2().encode_ordinary(prompt) or [EOT]
    idx = torch.tensor([ids] * n, device=device)
    out = sample(model, idx, max_new_tokens, temperature, top_k, torch.Generator(device).manual_seed(seed), stopped)
    texts = []
    for row in out.tolist():
        new = row[len(ids):]
        texts.append(prompt + gpt2().decode(new[: new.index(EOT)] if EOT in new else new))
    return texts


def newest_run(log_dir: str = "log") -> str:
    """The run directory with the newest checkpoint. Raises UserError when there is none."""
    found = [p for p in Path(log_dir).glob("*/ckpt/step_*/state.json")]
    if not found:
        raise UserError(f"no run with a checkpoint in {log_dir}/; hint: python train_gpt2.py first, or --model PATH")
    return str(max(found, key=lambda p: p.stat().st_mtime).parents[2])


def load(where: str) -> GPT:
    """A model from a run directory, a checkpoint, or a Hugging Face GPT-2 name or folder. Raises UserError."""
    path = Path(where)
    if path.exists() and not ((path / "config.json").exists() and any(path.glob("*.safetensors"))):
        return checkpoint.load_model(checkpoint.find(where))
    import hf
    return hf.from_pretrained(where)


def main(model: str = "", prompt: str = "\n", n: int = 1, max_new_tokens: int = 200, temperature: float = 1.0,
         top_k: int = 50, seed: int = 42, device: str = "auto"):
    """Sample from a trained model.

    Args:
        model: run directory, checkpoint, or Hugging Face GPT-2 name or folder; the newest run in log/ unless given
        prompt: text to go on from
        n: number of samples
        max_new_tokens: tokens in each
        temperature: below 1 sharper, above 1 flatter, 0 always the likeliest token
        top_k: draw among the k likeliest tokens; 0 = all
        seed: same seed, same text
        device: auto, cuda, mps or cpu
    """
    rules = (("n", n, n > 0, "above 0"), ("max_new_tokens", max_new_tokens, max_new_tokens > 0, "above 0"),
             ("temperature", temperature, temperature >= 0, "0 or more"),
             ("top_k", top_k, 0 <= top_k <= N_VOCAB, f"0 to {N_VOCAB}"))
    if wrong := [f"{name} is {value}, must be {rule}; hint: --{name}" for name, value, ok, rule in rules if not ok]:
        raise UserError("; ".join(wrong))
    where = model or newest_run()
    gpt = load(where).to(pick_device(device)).eval()
    print(f"model | {where} | {gpt.num_params():,} parameters", flush=True)
    for text in sample_texts(gpt, prompt, n, max_new_tokens, temperature, top_k, seed):
        print("-" * 80 + f"\n{text}")


if __name__ == "__main__":
    command_line(lambda: tyro.cli(main, use_underscores=True, config=(tyro.conf.FlagConversionOff,)))
