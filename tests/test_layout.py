"""The layout's laws: which module may import which, and how long and wide functions may be."""

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT

ROOM_FOLDERS = ("runtime", "kernels", "bench")
MAX_LINES, MAX_PARAMETERS = 60, 7
# Wider functions, each with the reason: none so far.
MORE_PARAMETERS: dict[str, str] = {}


def sources() -> dict[str, Path]:
    """The modules of the root and of its packages, by dotted name."""
    paths = list(ROOT.glob("*.py"))
    for folder in ROOM_FOLDERS:
        paths += (ROOT / folder).glob("*.py")
    names = [p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for p in paths]
    return dict(zip(names, paths))


SOURCES = sources()
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def imports(name: str, everywhere: bool = True) -> set[str]:
    """The modules that a module imports; without `everywhere` only when it is loaded itself."""
    nodes = ast.walk(TREES[name]) if everywhere else TREES[name].body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(name: str, everywhere: bool = True) -> set[str]:
    return (imports(name, everywhere) & SOURCES.keys()) - {name}


def reachable(name: str, everywhere: bool) -> set[str]:
    """All modules of this repository that importing one brings along."""
    seen, todo = set(), [name]
    while todo:
        for other in own_imports(todo.pop(), everywhere) - seen:
            seen.add(other)
            todo.append(other)
    return seen


@pytest.mark.parametrize("name", SOURCES)
def test_no_module_imports_itself_by_way_of_others(name):
    assert name not in reachable(name, everywhere=True)


def test_side_rooms_do_not_import_the_root():
    """runtime/ imports nothing of the root; kernels/ besides only runtime/."""
    for name in SOURCES:
        allowed = {"runtime": {"runtime"}, "kernels": {"kernels", "runtime"}}.get(
            name.split(".")[0]
        )
        if allowed:
            rooms = {other.split(".")[0] for other in own_imports(name)}
            assert rooms <= allowed, name


def test_the_model_depends_on_torch_alone():
    outside = {m.split(".")[0] for m in imports("model")} - set(sys.stdlib_module_names)
    assert outside == {"torch"}


def test_nothing_imports_the_training_script():
    assert [name for name in SOURCES if "train_gpt2" in imports(name)] == []


@pytest.mark.parametrize("name", ["prepare", "fineweb-modal"])
def test_preparing_data_needs_no_torch(name):
    """Not even in a function: a container that tokenizes has none."""
    for other in {name} | reachable(name, everywhere=True):
        assert not {m for m in imports(other) if m.split(".")[0] == "torch"}, other


def functions() -> dict[str, ast.FunctionDef]:
    """All functions and methods of the repository's code."""
    found = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found[f"{name}:{node.lineno} {node.name}"] = node
    return found


def test_functions_fit_a_screen():
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions().items()}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_functions_have_few_parameters():
    wide = {}
    for name, node in functions().items():
        arguments = [a.arg for a in node.args.args + node.args.kwonlyargs]
        count = len(arguments) - (arguments[:1] == ["self"])
        if count > MAX_PARAMETERS and node.name not in MORE_PARAMETERS:
            wide[name] = count
    assert wide == {}
