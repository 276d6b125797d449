"""FineWeb-Edu on Modal, without an account: the app as the real package builds it, and its functions' bodies run here.

    python -m pytest tests/test_fineweb_modal.py

The cloud itself (containers, volume, schedules) is not part of these tests.
"""

import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import ROOT
from test_prepare import INPUTS, SHARD, fineweb, listing, source  # noqa: F401  the last one is a fixture

import prepare

modal = pytest.importorskip("modal")
pytestmark = pytest.mark.filterwarnings("ignore:.*executing locally.*")


@pytest.fixture
def script():
    """fineweb-modal.py as `modal run` imports it."""
    spec = importlib.util.spec_from_file_location("fineweb-modal", ROOT / "fineweb-modal.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inner(thing):
    """What the package wraps so that it can be called with and without await."""
    return next(value for name, value in vars(thing).items() if name.startswith("_sync_original"))


def sent(function: modal.Function) -> dict:
    """The settings that a function's loader will send; those beyond `_spec_` are kept nowhere else."""
    load = inner(function)._load
    return dict(zip(load.__code__.co_freevars, (cell.cell_contents for cell in load.__closure__)))


def test_the_app_is_what_its_docstring_says(script):
    assert isinstance(script.app, modal.App) and script.app.name == "fineweb-edu"
    assert isinstance(script.image, modal.Image) and isinstance(script.volume, modal.Volume)
    assert set(script.app._local_state.functions) == {"tokenise", "coordinate"}
    assert set(script.app._local_state.local_entrypoints) == {"main"}
    for function in (script.tokenise, script.coordinate):
        spec, settings = function._spec_, sent(function)
        assert (
            spec.image is inner(script.image)
            and spec.volumes == {"/data": inner(script.volume)}
            and not spec.gpus
        )
        assert (
            settings["retry_policy"].retries == 8
            and settings["retry_policy"].initial_delay_ms == 10_000
        )
    assert (script.tokenise._spec_.cpu, script.tokenise._spec_.memory) == (8.0, 4096)
    assert (
        sent(script.coordinate)["timeout"]
        == 24 * 3600
        > sent(script.tokenise)["timeout"]
        == 2 * 3600
    )


def test_the_image_has_what_prepare_imports_in_the_versions_of_requirements(script, monkeypatch):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import prepare; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True
    ).stdout.split()
    assert {p.stem for p in ROOT.glob("*.py")} & set(loaded) == set(script.MODULES)
    assert [pin.split("==")[0] for pin in script.pins()] == list(script.NEEDED) and all(
        "==" in p for p in script.pins()
    )
    assert set(script.pins()) <= {
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()
    }
    third = {
        name for name in script.NEEDED if name != "datasets"
    }  # which brings pyarrow and huggingface_hub
    assert third <= set(loaded)
    monkeypatch.setattr(modal, "is_local", lambda: False)
    monkeypatch.setattr(script, "ROOT", Path("/nowhere"))
    assert script.pins() == []  # in a container


@pytest.fixture
def cloud(script, monkeypatch):
    """The script with a volume that records, and containers that run here one after another, the last file first."""
    script.events, script.faults, script.folders = [], set(), []
    record = lambda name: lambda: script.events.append(name)
    monkeypatch.setattr(
        script, "volume", types.SimpleNamespace(commit=record("commit"), reload=record("reload"))
    )
    tokenise = script.tokenise

    def starmap(jobs, order_outputs, return_exceptions, wrap_returned_exceptions):
        assert return_exceptions and not order_outputs
        for job in reversed(jobs):
            script.events.append(job[1])
            try:
                if job[1] in script.faults:
                    raise ConnectionError("container lost")
                yield tokenise.local(*job)
            except Exception as e:
                yield e

    monkeypatch.setattr(script, "tokenise", types.SimpleNamespace(starmap=starmap))
    return script


def test_the_bodies_make_the_shards_of_prepare(cloud, source, tmp_path, capsys):  # noqa: F811
    expected = fineweb(tmp_path / "whole", source)
    cloud.coordinate.local(str(tmp_path / "out"), dict(source=source, shard_tokens=SHARD))
    assert listing(tmp_path / "out") == expected
    assert cloud.events[:10] == [
        "reload",
        "commit",
        3,
        "commit",
        2,
        "commit",
        1,
        "commit",
        0,
        "commit",
    ]  # one per file
    assert (
        cloud.events[10] == "reload"
        and cloud.events.count("commit") == 1 + len(INPUTS) + (len(expected) - 1) + 1
    )
    assert f"{list(INPUTS)[0]}: " in capsys.readouterr().out


def test_a_coordinator_run_again_does_only_what_is_missing(cloud, source, tmp_path):  # noqa: F811
    expected, out, settings = (
        fineweb(tmp_path / "whole", source),
        str(tmp_path / "out"),
        dict(source=source, shard_tokens=SHARD),
    )
    cloud.faults = {1}
    with pytest.raises(
        RuntimeError,
        match="1 of 4 files failed, the first with ConnectionError: container lost; hint: run",
    ):
        cloud.coordinate.local(out, settings)
    first = [name for name in listing(tmp_path / "out") if name.endswith(".npy")]
    assert (
        first and listing(tmp_path / "out")[first[0]] == expected[first[0]]
    )  # of the first file, whole already
    cloud.faults, cloud.events = set(), []
    cloud.coordinate.local(out, settings)
    assert [e for e in cloud.events if isinstance(e, int)] == [1] and listing(
        tmp_path / "out"
    ) == expected
    cloud.events = []
    cloud.coordinate.local(out, settings)
    assert [e for e in cloud.events if isinstance(e, int)] == [] and listing(
        tmp_path / "out"
    ) == expected


def test_the_command_hands_its_settings_on(cloud, monkeypatch, capsys):
    monkeypatch.setattr(
        cloud, "coordinate", types.SimpleNamespace(remote=lambda *a: cloud.folders.append(a))
    )
    main = cloud.main.info.raw_f
    main(sample="100BT")
    main(dataset="somebody/texts", text_field="body")
    assert [folder for folder, _ in cloud.folders] == ["/data/100BT", "/data/somebody-texts"]
    assert (
        cloud.folders[0][1].items()
        >= dict(sample="100BT", dataset=prepare.FINEWEB_EDU, text_field="text").items()
    )
    assert "modal volume get fineweb-edu 100BT data/100BT" in capsys.readouterr().out
