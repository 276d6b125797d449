"""GPT-2's byte-pair encoding, built from the merge table in data/vocab.bpe: no network, ever.

python -c "import tokenizer; print(tokenizer.gpt2().encode('Hello, world'))"
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiktoken

from runtime.command_line import UserError, one_line
from runtime.files import read_json, read_text

EOT = 50256  # <|endoftext|>: stands before each document, and is the only special token
N_VOCAB = 50257  # ids that exist; the model's vocab_size is padded beyond it

VOCAB_BPE = Path(__file__).parent / "data" / "vocab.bpe"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# How text is split before merging: tiktoken's own pattern for GPT-2 (possessive, hence faster).
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# The last blank before a non-blank. Python's \s also matches \x1c-\x1f, tiktoken's does not.
BOUNDARY = re.compile(r"[^\S\x1c-\x1f](?=[\S\x1c-\x1f])")


def byte_alphabet() -> dict[str, int]:
    """Map the printable character that vocab.bpe writes for each byte to the byte.

    They are in the order of their token ids 0..255: bytes that print stand for themselves and come
    first; the other 68 are shifted to U+0100 and up.
    """
    ranges = [("!", "~"), ("¡", "¬"), ("®", "ÿ")]
    printable = [byte for first, last in ranges for byte in range(ord(first), ord(last) + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def merge_ranks(path: Path = VOCAB_BPE) -> dict[bytes, int]:
    """Map the bytes of the 50,256 ordinary tokens to their ids.

    First the 256 bytes, then one token per line of the merge table. Raises UserError when the file
    is not the published table (SHA-256).
    """
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != VOCAB_BPE_SHA256:
        raise UserError(
            f"{path} has SHA-256 {digest[:12]}..., expected {VOCAB_BPE_SHA256[:12]}...; "
            "hint: git checkout data/vocab.bpe"
        )
    alphabet = byte_alphabet()
    ranks = {bytes([byte]): i for i, byte in enumerate(alphabet.values())}
    for line in raw.decode("utf-8").splitlines()[1:]:  # the first line is a version comment
        ranks[bytes(alphabet[c] for c in line.replace(" ", ""))] = len(ranks)
    return ranks


@functools.cache
def gpt2() -> tiktoken.Encoding:
    """Return GPT-2's Encoding: ids equal those of tiktoken.get_encoding("gpt2")."""
    return tiktoken.Encoding(
        "gpt2",
        pat_str=PATTERN,
        mergeable_ranks=merge_ranks(),
        special_tokens={"<|endoftext|>": EOT},
        explicit_n_vocab=N_VOCAB,
    )


def pieces(text: str, size: int = 1 << 16) -> Iterator[str]:
    """Cut a text into pieces of `size` characters or more whose tokens are those of the whole.

    Cut only before a single blank followed by a non-blank: PATTERN never joins such a blank to what
    precedes it. A cut also saves tiktoken from runs of 1,000,000 blanks, where its regex overflows.
    """
    start = 0
    while boundary := BOUNDARY.search(text, start + size):
        yield text[start : boundary.start()]
        start = boundary.start()
    yield text[start:]


def encode(text: str, starts_document: bool = True) -> np.ndarray:
    """Return the ids of a text, uint16, after EOT if it starts a document. Releases the GIL.

    "<|endoftext|>" in the text is ordinary text.
    """
    ids = gpt2().encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
    if starts_document:
        ids = np.insert(ids, 0, EOT)
    return ids


def token_bytes() -> np.ndarray:
    """Count the UTF-8 bytes of each token id, (50257,) int64; <|endoftext|> counts 0.

    For losses in bits per byte.
    """
    return np.array([len(gpt2().decode_single_token_bytes(i)) for i in range(EOT)] + [0])


# --------------------------------------------------------------------------------------------------
# as transformers has it


@functools.cache
def hugging_face_vocab() -> dict[str, int]:
    """Map tokens, as transformers writes them, to their ids: the content of vocab.json."""
    character = {byte: c for c, byte in byte_alphabet().items()}
    vocab = {"".join(character[b] for b in token): i for token, i in merge_ranks().items()}
    return vocab | {"<|endoftext|>": EOT}


def merge_lines() -> list[str]:
    """Return the merges, "a b", in their order; the first line of vocab.bpe is a comment."""
    return VOCAB_BPE.read_text(encoding="utf-8").splitlines()[1:]


# Files of other kinds of tokenizers.
FOREIGN_FILES = ("vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def tokenizer_difference(folder: Path) -> str:
    """Tell how the tokenizer in a Hugging Face folder differs from GPT-2's; "" when it does not.

    Tokens added after GPT-2's do not count as a difference, nor does a missing tokenizer.
    """
    for name in FOREIGN_FILES:
        if (folder / name).exists():
            return f"it is in {name}"
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        path = folder / name
        if not path.exists():
            continue
        vocab, merges = hugging_face_vocab(), merge_lines()
        try:
            if name == "vocab.json":
                vocab = read_json(path)
            elif name == "merges.txt":
                merges = [line for line in read_text(path).split("\n") if line.strip()]
                if merges[0].startswith("#version"):
                    merges = merges[1:]
            else:
                content = read_json(path)
                added = {token["content"]: token["id"] for token in content["added_tokens"]}
                vocab = content["model"]["vocab"] | added
                merges = content["model"]["merges"]
                if content.get("normalizer"):
                    return f"{name}: it has a normalizer"
            difference = first_difference(vocab, merges)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
            difference = one_line(e)
        if difference:
            return f"{name}: {difference}"
    return ""


def first_difference(vocab: dict[str, int], merges: list) -> str:
    """Tell where a vocabulary, below id 50,257, or merges differ from GPT-2's; "" for nowhere."""
    ours = hugging_face_vocab()
    for token in ours | vocab:
        theirs = vocab.get(token, "none")
        expected = ours.get(token, "none")
        if theirs != expected and (token in ours or theirs < N_VOCAB):
            return f"{token!r} is id {theirs}, in GPT-2's {expected}"
    for n, (a, b) in enumerate(itertools.zip_longest(merges, merge_lines(), fillvalue=""), 1):
        if isinstance(a, list):
            a = " ".join(a)
        if a.strip() != b:
            return f"merge {n} is {a!r}, in GPT-2's {b!r}"
    return ""


def added_tokens(folder: Path) -> dict[str, int]:
    """Return the tokens that a Hugging Face folder adds behind GPT-2's, by id; {} for none."""
    added = {}
    for name in ("added_tokens.json", "tokenizer.json", "tokenizer_config.json"):
        try:
            content = read_json(folder / name)
            if name == "added_tokens.json":
                added |= content
            elif name == "tokenizer.json":
                added |= {token["content"]: token["id"] for token in content["added_tokens"]}
            else:
                decoder = content.get("added_tokens_decoder", {})
                added |= {token["content"]: int(i) for i, token in decoder.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # names for a message, no more
    beyond = [
        (i, token)
        for token, i in added.items()
        if isinstance(token, str) and isinstance(i, int) and i >= N_VOCAB
    ]
    return {token: i for i, token in sorted(beyond)}


def hugging_face_files(block_size: int) -> dict[str, str]:
    """Return the encoding as transformers has it: the text of each file by its name.

    vocab.json and merges.txt as OpenAI has them; tokenizer.json, all in one, for the libraries in
    Rust and JavaScript; tokenizer_config.json; generation_config.json.
    """
    vocab = hugging_face_vocab()
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    special = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
    everything = dict(
        version="1.0",
        pre_tokenizer=byte_level,
        decoder=byte_level,
        added_tokens=[dict(id=EOT, content="<|endoftext|>", special=True, **special)],
        model=dict(type="BPE", vocab=vocab, merges=merge_lines()),
    )
    config = dict(
        tokenizer_class="GPT2Tokenizer",
        model_max_length=block_size,
        add_prefix_space=False,
        clean_up_tokenization_spaces=False,
        padding_side="left",  # as generate() needs it in batches
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    )
    # how transformers samples by default: as generate.py does
    sampling = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), EOT)
    sampling |= dict(do_sample=True, temperature=1.0, top_k=50)
    return {
        "vocab.json": json.dumps(vocab),
        "merges.txt": VOCAB_BPE.read_text(encoding="utf-8"),
        "tokenizer.json": json.dumps(everything),
        "tokenizer_config.json": json.dumps(config, indent=1),
        "generation_config.json": json.dumps(sampling, indent=1),
    }
