"""The code in notes is the repository's or runs; no term stands before its explanation."""

import contextlib
import io
import re
import textwrap

import nbformat
import pytest
from conftest import ROOT

LECTURE = (ROOT / "notes" / "lecture_notes.md").read_text()
BLOCK = re.compile(r"^```python(?: (\S+))?\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.S | re.M)
FIGURE = re.compile(r"(?<![\w.,])(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.\d+)(?:e[-+]?\d+)?(?!\d)")
WITH_CODE = [p.name for p in sorted(ROOT.glob("notes/*.md")) if BLOCK.search(p.read_text())]


def is_excerpt(quote: str, source: str) -> bool:
    """Whether a quote is a run of whole lines of a source, apart from their common indent."""
    wanted, lines = textwrap.dedent(quote).splitlines(), source.splitlines()
    n = len(wanted)
    return any(
        textwrap.dedent("\n".join(lines[i : i + n])).splitlines() == wanted
        for i in range(len(lines) - n + 1)
    )


@pytest.mark.parametrize("name", WITH_CODE)
def test_code_is_quoted_from_its_file_or_runs(name):
    """A block with a file's name is in that file; others run in turn, and print what follows."""
    text, namespace = (ROOT / "notes" / name).read_text(), {}
    for file, code, printed in BLOCK.findall(text):
        if file:
            source = (ROOT / file).read_text()
            assert is_excerpt(code, source), f"{name} quotes what is not in {file}:\n{code}"
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, namespace)
        assert out.getvalue() == printed, f"{name}:\n{code}"
    assert text.count("```python") == len(BLOCK.findall(text))


def test_an_excerpt_is_whole_lines_in_their_order():
    assert is_excerpt("  b\n  c\n", "a\n    b\n    c\n")
    assert not is_excerpt("b\nd\n", "a\nb\nc\nd\n") and not is_excerpt("b", "a b\n")


def test_diagrams_keep_to_plain_mermaid():
    """Only what every version draws: boxes, choices, arrows, a frame; texts in quotes."""
    box = r"\w+(?:\[\"[^\"]+\"\]|\{\"[^\"]+\"\})?"
    line = re.compile(rf'flowchart TD|subgraph {box}|end|{box}(?: -- "[^"]+")? --> {box}')
    diagrams = re.findall(r"```mermaid\n(.*?)```", LECTURE, re.S)
    assert len(diagrams) == 2
    for text in "".join(diagrams).splitlines():
        assert line.fullmatch(text.strip()), text


def test_formulas_stand_where_markdown_leaves_backslashes_alone():
    """Between dollar signs GitHub has dropped the backslash of `\\,` and of a line's end."""
    for path in ROOT.glob("notes/*.md"):
        assert "$$" not in path.read_text(), path.name


def without_code(markdown: str) -> str:
    """Prose: no code, formulas, headings, addresses, nor the list of contents."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$|`[^`]*`", " ", markdown, flags=re.S)
    text = re.sub(r"^#.*$", "", text, flags=re.M)
    text = re.sub(r"^Contents:.*?\n\n", "\n", text, flags=re.S | re.M)
    return re.sub(r"\]\([^)]*\)|https?://\S+", "]", text)


def terms(prose: str) -> list[str]:
    return [" ".join(term.split()) for term in re.findall(r"\*\*([^*]+)\*\*", prose)]


def first_uses(prose: str) -> dict[str, tuple[int, int]]:
    """Of each term in bold: where its word, singular or plural, is first used; where explained."""
    places = {}
    for match in re.finditer(r"\*\*([^*]+)\*\*", prose):
        term = " ".join(match[1].split())
        stem = r"\s+".join(map(re.escape, re.sub(r"(?<=ch)es$|(?<!s)s$", "", term).split(" ")))
        use = re.search(rf"(?<![\w-]){stem}(?:s|es|'s)?(?![\w-])", prose, re.IGNORECASE)
        places[term] = (use.start(), match.start(1))
    return places


def test_no_term_stands_before_its_explanation():
    """A term is bold where it is explained, once, and the word occurs nowhere before."""
    prose = without_code(LECTURE)
    early = {
        term: prose[use - 60 : use + 40]
        for term, (use, explained) in first_uses(prose).items()
        if use < explained
    }
    assert not early
    listed = [term.lower() for term in terms(prose)]
    assert len(listed) == len(set(listed)) > 60


def test_the_glossary_explains_what_the_text_does():
    """Its words are terms of the text, and the ones that a newcomer asked for are among them."""
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", LECTURE.split("## Glossary")[1], re.M)[2:]
    words = {re.sub(r"s$", "", word.lower()) for row in rows for word in row.split(", ")}
    explained = {re.sub(r"(?<=ch)es$|s$", "", t.lower()) for t in terms(without_code(LECTURE))}
    assert words <= explained, words - explained
    asked = "nat perplexity window shard preset mfu ddp rank micro-step epoch logit"
    assert set(asked.split()) <= words


# Figures of the notes that no record of the repository has: where they are from.
ELSEWHERE = {
    "the GPT-2 paper (Radford et al. 2019): merges": "50,000",
    "the GPT-3 paper (Brown et al. 2020), appendix B: tokens in its first batches": "32,000",
    "modded-nanogpt's records, billions of tokens to a loss of 3.28": "10.26 3.25 2.67 2.40 3.28",
    "arithmetic: 4 x 768; a guess among four; 0.3037 - 0.2945; 1 / ln 2": "3,072 0.25 0.0092 1.44",
    "config.py: val_tokens": "5,242,880",
    "model.py: GPT.forward, GB of logits": "6.6",
    "float32 at some 100,000 positions": "100,000",
}


def test_figures_have_a_record_or_a_named_source():
    """Those with a decimal point or a thousands comma: in a notebook's output or another note."""
    sources = [(ROOT / "README.md").read_text()]
    sources += [(ROOT / "notes" / f).read_text() for f in ("LOG.md", "experiments.md")]
    sources += [(ROOT / "notes" / "hellaswag.md").read_text(), " ".join(ELSEWHERE.values())]
    for path in sorted(ROOT.glob("play-nbs/*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            sources += [o.get("text", "") for o in cell.get("outputs", ())]
    known = set(FIGURE.findall("\n".join(sources)))
    for name in ("lecture_notes.md", "RoPE.md"):
        text = re.sub(
            r"```.*?```|https?://\S+|arXiv\s+[\d.]+",
            " ",
            (ROOT / "notes" / name).read_text(),
            flags=re.S,
        )
        figures = set(FIGURE.findall(text))
        assert len(figures) > 20 and not figures - known, f"{name}: {sorted(figures - known)}"


def test_first_uses_finds_a_word_that_comes_too_early():
    assert first_uses("A rank. The **ranks** are numbers.")["ranks"] == (2, 14)
    use, explained = first_uses("frank; a **rank** is a number, ranks")["rank"]
    assert use == explained
