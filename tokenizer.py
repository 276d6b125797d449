"""GPT-2's byte-pair encoding, built from the merge table in data/vocab.bpe: no network, ever.

python -c "import tokenizer; print(tokenizer.gpt2().encode('Hello, world'))"
"""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import tiktoken

from runtime.command_line import UserError

EOT = 50256  # <|endoftext|>: stands before each document, and is the only special token
N_VOCAB = 50257  # ids that exist; the model's vocab_size is padded beyond it

VOCAB_BPE = Path(__file__).parent / "data" / "vocab.bpe"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

# How text is cut before merging (tiktoken's own pattern for GPT-2: possessive quantifiers, same pieces, faster).
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# The same without looking ahead, which lets the regex engine run as an automaton: see encode_documents.
PLAIN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"""
DOCUMENT, CUT = "\x01", "\x02"  # control characters that stand for <|endoftext|> and for a cut
CUT_ID = N_VOCAB  # never in a result


def byte_alphabet() -> dict[str, int]:
    """The printable character that vocab.bpe writes for each byte, in the order of their token ids 0..255.

    Bytes that print stand for themselves and come first; the other 68 are shifted to U+0100 and up.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def merge_ranks(path: Path = VOCAB_BPE) -> dict[bytes, int]:
    """Token bytes to id for the 50,256 ordinary tokens: 256 bytes, then one token per line of the merge table.

    Raises UserError when the file is not the published table (SHA-256).
    """
    raw = path.read_bytes()
    if (found := hashlib.sha256(raw).hexdigest()) != VOCAB_BPE_SHA256:
        raise UserError(
            f"{path} has SHA-256 {found[:12]}..., expected {VOCAB_BPE_SHA256[:12]}...; "
            "hint: git checkout data/vocab.bpe"
        )
    alphabet = byte_alphabet()
    ranks = {bytes([b]): i for i, b in enumerate(alphabet.values())}
    for line in raw.decode("utf-8").splitlines()[1:]:  # the first line is a version comment
        ranks[bytes(alphabet[c] for c in line.replace(" ", ""))] = len(ranks)
    return ranks


@functools.cache
def gpt2() -> tiktoken.Encoding:
    """The tiktoken Encoding of GPT-2: ids equal those of tiktoken.get_encoding("gpt2")."""
    return tiktoken.Encoding(
        "gpt2",
        pat_str=PATTERN,
        mergeable_ranks=merge_ranks(),
        special_tokens={"<|endoftext|>": EOT},
        explicit_n_vocab=N_VOCAB,
    )


@functools.cache
def plain() -> tiktoken.Encoding:
    """As gpt2(), cut by PLAIN, with the special tokens of encode_documents."""
    return tiktoken.Encoding(
        "gpt2-plain",
        pat_str=PLAIN,
        mergeable_ranks=merge_ranks(),
        special_tokens={DOCUMENT: EOT, CUT: CUT_ID},
    )


@functools.cache
def blanks() -> np.ndarray:
    """Which UTF-16 code units are white space (the property White_Space of Unicode), (65536,) bool."""
    table = np.zeros(1 << 16, bool)
    table[
        [
            *range(9, 14),
            32,
            0x85,
            0xA0,
            0x1680,
            *range(0x2000, 0x200B),
            0x2028,
            0x2029,
            0x202F,
            0x205F,
            0x3000,
        ]
    ] = True
    return table


def encode_documents(text: str) -> np.ndarray:
    """Tokens of the documents in one string, DOCUMENT before each; uint16, equal to 50256 and encode_ordinary for each.

    1.2 times as fast as encode_to_numpy on a core (notes/LOG.md). All that PATTERN's look-ahead does is to leave the last blank
    of a run to the word behind it: so the text is cut there, and PLAIN does the rest. No document may hold DOCUMENT or
    CUT. Threads run side by side: tiktoken lets go of the interpreter.
    """
    units = np.frombuffer(text.encode("utf-16-le"), np.uint16)
    blank = blanks()[units]
    word = ~blank & (units != ord(DOCUMENT))
    cuts = np.flatnonzero(blank[:-2] & blank[1:-1] & word[2:]) + 1
    if len(cuts):
        text = np.insert(units, cuts, ord(CUT)).tobytes().decode("utf-16-le")
    ids = plain().encode_to_numpy(text, allowed_special="all", disallowed_special=())
    return (ids[ids != CUT_ID] if len(cuts) else ids).astype(np.uint16)


def token_bytes() -> np.ndarray:
    """UTF-8 bytes of each token id, (50257,) int64; <|endoftext|> counts 0. For losses in bits per byte."""
    return np.array([len(gpt2().decode_single_token_bytes(i)) for i in range(EOT)] + [0])


def hugging_face_files(block_size: int) -> dict[str, str]:
    """The encoding as transformers has it, text by name of file: vocab.json and merges.txt as OpenAI has them,
    tokenizer.json (all in one, for the libraries in Rust and JavaScript), tokenizer_config.json, generation_config.json.
    """
    character = {byte: c for c, byte in byte_alphabet().items()}
    vocab = {"".join(character[b] for b in token): i for token, i in merge_ranks().items()} | {
        "<|endoftext|>": EOT
    }
    merges = VOCAB_BPE.read_text(encoding="utf-8")
    as_bytes = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    special = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
    whole = dict(
        version="1.0",
        pre_tokenizer=as_bytes,
        decoder=as_bytes,
        added_tokens=[dict(id=EOT, content="<|endoftext|>", special=True, **special)],
        model=dict(type="BPE", vocab=vocab, merges=merges.splitlines()[1:]),
    )
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    config = dict(
        tokenizer_class="GPT2Tokenizer",
        model_max_length=block_size,
        add_prefix_space=False,
        clean_up_tokenization_spaces=False,
        **ends,
    )
    # how transformers samples unless told otherwise: as generate.py does
    sampling = dict(
        bos_token_id=EOT,
        eos_token_id=EOT,
        pad_token_id=EOT,
        do_sample=True,
        temperature=1.0,
        top_k=50,
    )
    return {
        "vocab.json": json.dumps(vocab),
        "merges.txt": merges,
        "tokenizer.json": json.dumps(whole),
        "tokenizer_config.json": json.dumps(config, indent=1),
        "generation_config.json": json.dumps(sampling, indent=1),
    }
