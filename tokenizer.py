"""GPT-2's byte-pair encoding, built from the merge table in data/vocab.bpe: no network, ever.

    python -c "import tokenizer; print(tokenizer.gpt2().encode('Hello, world'))"
"""

import functools
import hashlib
from pathlib import Path

import numpy as np
import tiktoken

from config import UserError

EOT = 50256  # <|endoftext|>: stands before each document, and is the only special token
N_VOCAB = 50257  # ids that exist; the model's vocab_size is padded beyond it

VOCAB_BPE = Path(__file__).parent / "data" / "vocab.bpe"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

# How text is cut before merging (tiktoken's own pattern for GPT-2: possessive quantifiers, same pieces, faster).
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def byte_alphabet() -> dict[str, int]:
    """The printable character that vocab.bpe writes for each byte, in the order of their token ids 0..255.

    Bytes that print stand for themselves and come first; the other 68 are shifted to U+0100 and up.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def merge_ranks(path: Path = VOCAB_BPE) -> dict[bytes, int]:
    """Token bytes to id for the 50,256 ordinary tokens: 256 bytes, then one token per line of the merge table.

    Raises UserError when the file is not the published table (SHA-256).
    """
    raw = path.read_bytes()
    if (found := hashlib.sha256(raw).hexdigest()) != VOCAB_BPE_SHA256:
        raise UserError(f"{path} has SHA-256 {found[:12]}..., expected {VOCAB_BPE_SHA256[:12]}...; "
                        "hint: git checkout data/vocab.bpe")
    alphabet = byte_alphabet()
    ranks = {bytes([b]): i for i, b in enumerate(alphabet.values())}
    for line in raw.decode("utf-8").splitlines()[1:]:  # the first line is a version comment
        ranks[bytes(alphabet[c] for c in line.replace(" ", ""))] = len(ranks)
    return ranks


@functools.cache
def gpt2() -> tiktoken.Encoding:
    """The tiktoken Encoding of GPT-2: ids equal those of tiktoken.get_encoding("gpt2")."""
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=merge_ranks(),
                             special_tokens={"<|endoftext|>": EOT}, explicit_n_vocab=N_VOCAB)


def token_bytes() -> np.ndarray:
    """UTF-8 bytes of each token id, (50257,) int64; <|endoftext|> counts 0. For losses in bits per byte."""
    return np.array([len(gpt2().decode_single_token_bytes(i)) for i in range(EOT)] + [0])
