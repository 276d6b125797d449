"""Notebooks run and hold what they print; notes point at things that exist.

python -m pytest tests/test_notebooks.py [-m slow]

`jupyter execute --inplace NOTEBOOK` runs a notebook anew and stores its outputs. A cell tagged
"exact" prints the same everywhere: its text must equal the new run's. Other text (times, losses
after training) may differ in its numbers, not in its words, unless the cell is tagged "sampled":
it prints what a model trained on the spot writes. Pictures that a notebook saves in images/ must
look like those of the new run.
"""

import ast
import math
import re
import resource
import shutil
import subprocess

import nbclient
import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT

import config
import generate
import model
import optim
from compare import COLOURS

LISTED = subprocess.run(
    ["git", "ls-files", "-co", "--exclude-standard", "*.ipynb"],
    cwd=ROOT,
    capture_output=True,
    text=True,
)
NOTEBOOKS = LISTED.stdout.split() or sorted(
    p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.ipynb"), *ROOT.glob("play-nbs/*.ipynb")]
)
NOTES = sorted(
    p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("notes/*.md"), ROOT / "README.md"]
)
TEXTS = NOTEBOOKS + NOTES
# of the code in the notebooks for beginners
MAX_COLUMNS = {"play-nbs/from_scratch.ipynb": 120, "play-nbs/exercises.ipynb": 120}


def read(name: str):
    return nbformat.read(ROOT / name, as_version=4)


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def pictures(cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def prose(name: str) -> str:
    """The markdown of a file, without its code blocks."""
    text = (
        "\n\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
        if name.endswith("ipynb")
        else (ROOT / name).read_text()
    )
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


# --------------------------------------------------------------------------------------------------
# notebooks


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_holds_one_clean_run(name):
    """Cells in order, no error, nothing on stderr, no path of the machine, at most 1 MB."""
    assert (ROOT / name).stat().st_size <= 1_000_000
    notebook = read(name)
    nbformat.validate(notebook)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    for cell in cells:
        assert not any(
            output.output_type == "error" or output.get("name") == "stderr"
            for output in cell.outputs
        ), cell.source
        if "exact" in cell.metadata.get("tags", ()):
            assert printed(cell), cell.source
        # a path: a slash at the beginning of a word, with a second one (" / n" divides, "/a/b" does
        # not)
        assert not re.search(
            r"(?<![\w.)}\]/>:~])/\w[\w.-]*/\w", cell.source + "\n" + printed(cell)
        ), cell.source
    assert not re.search(r"/(home|tmp|root|Users|work)/", str(notebook)), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in NOTEBOOKS if n != "load-hf-gpt2.ipynb"]
)  # test_hf.py runs that one
def test_a_notebook_runs_and_its_outputs_are_those_of_the_run(name, clone, monkeypatch):
    """From a fresh kernel, in a copy that holds the tracked files alone, without a network."""
    if not (clone / "log" / "reference").exists():  # the copy of a tree without git
        shutil.copytree(ROOT / "log" / "reference", clone / "log" / "reference")
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there
    stored, fresh = read(name), read(name)
    for cell in code(fresh):
        cell.outputs, cell.execution_count = [], None
    where = (clone / name).parent
    where.mkdir(exist_ok=True)
    used = processor_seconds()
    nbclient.NotebookClient(
        fresh, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(where)}}
    ).execute()
    assert processor_seconds() - used < 400  # of a core: other programs do not count
    for before, after in zip(code(stored), code(fresh)):
        if "exact" in before.metadata.get("tags", ()):
            assert printed(before) == printed(after)
        if "sampled" not in before.metadata.get("tags", ()):
            assert words(printed(before)) == words(printed(after))
        assert pictures(before) == pictures(after)
    saved = re.findall(r'"([\w-]+\.png)"', "\n".join(cell.source for cell in code(stored)))
    for picture in saved:
        assert like(ROOT / "images" / picture, clone / "images" / picture), (
            f"images/{picture} is not what {name} draws"
        )


def processor_seconds() -> float:
    """Seconds of a core that finished child processes have used."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def words(text: str) -> list[str]:
    """A text without its numbers."""
    return re.sub(r"[-+−]?\d[\d,.]*(e[-+]?\d+)?|\s+", " ", text).split()


def like(a, b) -> bool:
    """The same size within 3% and, where it is the same, nearly the same pixels.

    Fonts and training differ between machines.
    """
    import matplotlib.image

    a, b = (matplotlib.image.imread(path)[..., :3] for path in (a, b))
    if a.shape != b.shape:
        return np.allclose(a.shape, b.shape, rtol=0.03)
    return np.abs(a - b).mean() < 0.05


def test_each_preset_has_one_colour_everywhere():
    """Told apart with any colour vision (Okabe and Ito 2008); no notebook has others."""
    okabe_ito = {
        "#000000",
        "#E69F00",
        "#56B4E9",
        "#009E73",
        "#F0E442",
        "#0072B2",
        "#D55E00",
        "#CC79A7",
        "#999999",
    }
    assert set(COLOURS.values()) <= okabe_ito and len(set(COLOURS.values())) == len(COLOURS)
    for name in NOTEBOOKS:
        written = {
            color.upper()
            for cell in code(read(name))
            for color in re.findall("#[0-9A-Fa-f]{6}", cell.source)
        }
        assert not written & okabe_ito, name


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_use_the_words_of_the_field(name):
    """Runs resume or continue, they do not "go on"; no line of code is a paragraph."""
    text = "\n".join(cell.source for cell in read(name).cells)
    assert not re.search(r"\b(go|goes|went) on\b", text), name
    for cell in code(read(name)):
        for line in cell.source.splitlines():
            assert len(line) <= MAX_COLUMNS.get(name, 170), line


# --------------------------------------------------------------------------------------------------
# from_scratch.ipynb and exercises.ipynb

FROM_SCRATCH = "play-nbs/from_scratch.ipynb"


@pytest.fixture(scope="module")
def typed() -> dict:
    """What from_scratch.ipynb imports and defines, without running the rest of its cells."""
    namespace = {}
    kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    for cell in code(read(FROM_SCRATCH)):
        body = [node for node in ast.parse(cell.source).body if isinstance(node, kinds)]
        exec(compile(ast.Module(body, []), FROM_SCRATCH, "exec"), namespace)
    return namespace


SHAPES = [
    dict(block_size=16, vocab_size=100, n_layer=1, n_head=1, n_embd=8),
    dict(block_size=24, vocab_size=300, n_layer=3, n_head=4, n_embd=48),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_model_typed_from_scratch_is_that_of_model_py(typed, shape, seed):
    """Weights that a seed draws are bit-identical; logits, loss and gradients within 1e-5."""
    torch.manual_seed(seed)
    own = typed["GPT"](typed["Config"](**shape))
    torch.manual_seed(seed)
    reference = model.GPT(model.GPTConfig(**shape))
    assert own.state_dict().keys() == reference.state_dict().keys()
    for name, weight in reference.state_dict().items():
        assert torch.equal(own.state_dict()[name], weight), name
    with torch.no_grad():
        for parameter, other in zip(own.parameters(), reference.parameters()):
            other += 0.2 * torch.randn_like(other)  # a trained model's sizes
            parameter.copy_(other)
    idx = torch.randint(shape["vocab_size"], (3, shape["block_size"] - 4))
    targets = torch.randint(shape["vocab_size"], idx.shape)
    torch.testing.assert_close(own(idx), reference(idx), rtol=1e-5, atol=1e-5)
    loss, other = own(idx, targets), reference(idx, targets)
    loss.backward()
    other.backward()
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-5)
    for name, parameter in reference.named_parameters():
        gradient = own.get_parameter(name).grad
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-5)


def test_attention_in_a_loop_is_attention_in_matrices(typed):
    q, k, v = torch.randn(3, 10, 4)
    torch.testing.assert_close(typed["attend_in_a_loop"](q, k, v), typed["attend"](q, k, v))


def test_training_typed_from_scratch_is_that_of_optim_py(typed):
    """Schedule, accumulated and clipped gradients, and AdamW, over several steps."""
    cfg = config.preset("gpt2-baseline", max_steps=40, warmup_steps=7)
    torch.manual_seed(0)
    own = typed["GPT"](typed["Config"](**SHAPES[1]))
    reference = model.GPT(model.GPTConfig(**SHAPES[1]))
    reference.load_state_dict(own.state_dict())
    optimizer = typed["AdamW"](own.parameters(), lr=0.0)
    other = optim.adamw(reference, 0.0, (0.9, 0.95), 0.1)
    gradients = optim.Gradients(reference, None, micro_steps=3, in_order=False)
    for step in range(0, 40, 5):
        optimizer.lr = typed["learning_rate"](
            step, cfg.max_lr, cfg.min_lr, cfg.warmup_steps, cfg.max_steps
        )
        assert optimizer.lr == optim.learning_rate(cfg, step)
        optim.set_rates(other, optimizer.lr, step, cfg.max_steps)
        batches = torch.randint(300, (3, 2, 4, 24))
        loss, norm = typed["accumulate"](own, list(batches), clip=0.5)
        other.zero_grad()
        for x, y in batches:
            gradients.add(reference(x, y))
        expected = gradients.finish(clip=0.5)
        assert math.isclose(loss, expected[0], rel_tol=1e-5)
        assert math.isclose(norm, expected[1], rel_tol=1e-4)
        optimizer.step()
        other.step()
        for p, q in zip(own.parameters(), reference.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.5}]
)
def test_sampling_typed_from_scratch_is_that_of_generate_py(typed, settings):
    logits = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    u = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = [typed["draw"](row, number, **settings) for row, number in zip(logits, u)]
    sampling = generate.Sampling(**{"top_k": 0} | settings)
    assert drawn == generate.draw(logits, u, sampling).tolist()


def test_from_scratch_is_as_short_as_it_says(typed):
    """Non-blank lines of all that trains and samples; checks and the loop form do not count."""
    checks = {"same", "worst", "overfit", "attend_in_a_loop"}
    count = 0
    for cell in code(read(FROM_SCRATCH)):
        for node in ast.parse(cell.source).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name not in checks:
                lines = cell.source.splitlines()[node.lineno - 1 : node.end_lineno]
                count += sum(1 for line in lines if line.strip())
    said = int(re.search(r"about (\d+) lines", prose(FROM_SCRATCH))[1])
    assert abs(count - said) <= 15, count


def test_every_exercise_has_an_answer():
    notes = (ROOT / "notes" / "lecture_notes.md").read_text()
    section = notes.split("\n## Exercises\n")[1].split("\n## ")[0]
    asked = re.findall(r"^(\d+)\. ", section, re.MULTILINE)
    answered = re.findall(r"^## (\d+)\. ", prose("play-nbs/exercises.ipynb"), re.MULTILINE)
    assert len(asked) >= 6
    assert set(asked) <= set(answered)


# --------------------------------------------------------------------------------------------------
# notes


def anchors(path) -> set[str]:
    """The anchors that GitHub makes of a file's headings."""
    return {
        re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-")
        for h in re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        found = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert found.exists(), f"{name}: {target}"
        assert not anchor or found.suffix != ".md" or anchor in anchors(found), f"{name}: {target}"


def names_in(file: str) -> set[str]:
    """What a module defines: functions, classes, their members and fields, constants."""
    names = set()

    def collect(body, prefix=""):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(prefix + node.name)
                collect(
                    node.body
                    if isinstance(node, ast.ClassDef)
                    else [n for n in node.body if isinstance(n, ast.FunctionDef)],
                    f"{prefix}{node.name}.",
                )
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    names.update(prefix + n.id for n in ast.walk(target) if isinstance(n, ast.Name))

    collect(ast.parse((ROOT / file).read_text()).body)
    return names


@pytest.mark.parametrize("name", TEXTS)
def test_code_that_is_pointed_at_exists(name):
    """`file.py: name` and `file.py: Class.method`, several separated by commas.

    Also [`file.py`](...): `name`, `name` and `name`.
    """
    text = prose(name)
    pointers = re.findall(r"`(\w+\.py): ([\w., ]+)`", text)
    linked = r"\[`(\w+\.py)`\]\([^)]*\): ((?:`[\w.]+`(?:, | and )?)+)"
    for file, listed in re.findall(linked, text):
        pointers.append((file, ", ".join(re.findall(r"`([\w.]+)`", listed))))
    for file, listed in pointers:
        assert (ROOT / file).exists(), f"{name}: {file}"
        for wanted in listed.split(", "):
            assert wanted in names_in(file), f"{name}: {file} has no {wanted}"


def test_figures_said_to_be_from_the_log_are_in_it():
    """Each row of the table of effects names its source; where it is ours, it has the figures."""
    text, checked = (ROOT / "notes" / "lecture_notes.md").read_text(), 0
    for effect, source in re.findall(r"^\| [^|]+ \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE):
        if target := re.search(r"\]\(([^)#]+)[^)]*\)", source):
            found = ((ROOT / "notes") / target[1]).read_text()
            for figure in re.findall(r"\d[\d,.]*\d|\d", effect):
                assert figure in found, f"{figure} ({effect}) is not in {target[1]}"
                checked += 1
    assert checked > 10
