"""FineWeb-Edu on Modal, without an account: the real app object; its functions' bodies run here.

    python -m pytest tests/test_fineweb_modal.py

The cloud itself (containers, volume, schedules) is not part of these tests.
"""

import importlib.util
import types
from pathlib import Path

import pytest
from conftest import ROOT, run
from test_prepare import INPUTS, SMALL, fineweb, listing, read_manifest, source  # noqa: F401

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
    """The settings that a function's loader will send; those beyond `_spec_` are only here."""
    load = inner(function)._load
    return dict(zip(load.__code__.co_freevars, (cell.cell_contents for cell in load.__closure__)))


def test_the_app_is_what_its_docstring_says(script):
    assert isinstance(script.app, modal.App) and script.app.name == "fineweb-edu"
    assert isinstance(script.image, modal.Image) and isinstance(script.volume, modal.Volume)
    assert set(script.app._local_state.functions) == {"tokenize", "coordinate"}
    assert set(script.app._local_state.local_entrypoints) == {"main"}
    for function in (script.tokenize, script.coordinate):
        spec, retries = function._spec_, sent(function)["retry_policy"]
        assert spec.image is inner(script.image) and not spec.gpus
        assert spec.volumes == {"/data": inner(script.volume)}
        assert retries.retries == 8 and retries.initial_delay_ms == 10_000
    assert (script.tokenize._spec_.cpu, script.tokenize._spec_.memory) == (8.0, 4096)
    assert sent(script.tokenize)["timeout"] == 2 * 3600
    assert sent(script.coordinate)["timeout"] == 6 * 3600


def test_the_image_has_what_prepare_imports_in_the_versions_of_requirements(script, monkeypatch):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import prepare; print(*sys.modules)"
    loaded = set(run("-c", code, cwd="/").stdout.split())
    own = {path.stem for path in ROOT.glob("*.py")} | {"runtime"}
    assert own & loaded == set(script.MODULES)
    assert not {"torch", "safetensors"} & loaded
    names = [pin.split("==")[0] for pin in script.pins()]
    lines = [line.split("#")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert all("==" in pin for pin in script.pins())
    assert set(script.pins()) <= {line.strip() for line in lines}
    assert {"numpy", "tiktoken", "tqdm", "tyro"} <= loaded & set(names)
    assert {"pyarrow", "huggingface_hub"} <= set(names)
    monkeypatch.setattr(modal, "is_local", lambda: False)
    monkeypatch.setattr(script, "ROOT", Path("/nowhere"))
    assert script.pins() == []  # in a container


@pytest.fixture
def cloud(script, monkeypatch):
    """The script with a volume that records, and containers that run here, the last file first."""
    script.events, script.faults = [], set()

    def commit():
        script.events.append("commit")

    def reload():
        script.events.append("reload")

    def starmap(calls, order_outputs, return_exceptions):
        assert return_exceptions and not order_outputs
        for call in reversed(calls):
            script.events.append(call[1])
            try:
                if call[1] in script.faults:
                    raise ConnectionError("container lost")
                yield tokenize.local(*call)
            except Exception as e:
                yield e

    tokenize = script.tokenize
    monkeypatch.setattr(script, "volume", types.SimpleNamespace(commit=commit, reload=reload))
    monkeypatch.setattr(script, "tokenize", types.SimpleNamespace(starmap=starmap))
    return script


def files_tokenized(cloud) -> list[int]:
    return [event for event in cloud.events if isinstance(event, int)]


def test_the_bodies_make_the_shards_of_prepare(cloud, source, tmp_path, capsys):  # noqa: F811
    """A container commits its shards, then the coordinator the manifest."""
    expected = fineweb(tmp_path / "whole", source)
    cloud.coordinate.local(str(tmp_path / "out"), SMALL, source)
    assert listing(tmp_path / "out") == expected
    events = ["reload", "commit"]
    for i in reversed(range(len(INPUTS))):
        events += [i, "commit", "commit"]
    assert cloud.events == events
    assert f"{list(INPUTS)[0]}: " in capsys.readouterr().out


def test_a_coordinator_run_again_does_only_what_is_missing(cloud, source, tmp_path):  # noqa: F811
    expected, out = fineweb(tmp_path / "whole", source), tmp_path / "out"
    cloud.faults = {1}
    message = "1 of 4 files failed, the first with ConnectionError: container lost; hint: run"
    with pytest.raises(RuntimeError, match=message):
        cloud.coordinate.local(str(out), SMALL, source)
    shards = {name for name in expected if name.endswith(".npy") and "_001" not in name}
    assert {name: listing(out)[name] for name in shards} == {n: expected[n] for n in shards}
    assert {shard["file"] for shard in read_manifest(out)["shards"]} == shards
    assert read_manifest(out)["complete"] is False
    cloud.faults, cloud.events = set(), []
    cloud.coordinate.local(str(out), SMALL, source)
    assert files_tokenized(cloud) == [1] and listing(out) == expected
    cloud.events = []
    cloud.coordinate.local(str(out), SMALL, source)
    assert files_tokenized(cloud) == [] and listing(out) == expected


def test_the_command_hands_its_settings_on(cloud, monkeypatch, capsys):
    calls = []

    def remote(*arguments):
        calls.append(arguments)

    monkeypatch.setattr(cloud, "coordinate", types.SimpleNamespace(remote=remote))
    main = cloud.main.info.raw_f
    main(sample="100BT")
    main(dataset="somebody/texts", text_field="body")
    assert calls == [
        ("/data/fineweb-edu-100BT", prepare.Dataset(sample="100BT")),
        ("/data/somebody-texts", prepare.Dataset(dataset="somebody/texts", text_field="body")),
    ]
    assert "modal volume get fineweb-edu fineweb-edu-100BT data" in capsys.readouterr().out
