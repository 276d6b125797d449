"""The library of guard.cpp, and the processes that load it. Imports no torch."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent


def torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").submodule_search_locations[0])


def missing() -> str:
    """Return what this machine lacks for a fake GPU, "" when it has all."""
    version = importlib.metadata.version("torch")
    if not version.startswith("2.13."):
        return f"the fake device is made for torch 2.13, this is {version}"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "needs Linux on x86_64 to pretend that there is a GPU"
    return "" if shutil.which("g++") else "no g++"


def build_guard(library: Path):
    """Compile guard.cpp beside torch's headers (some seconds)."""
    root = torch_folder()
    options = "-O0 -std=c++20 -shared -fPIC -D_GLIBCXX_USE_CXX11_ABI=1".split()
    includes = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    source = FOLDER / "guard.cpp"
    subprocess.run(["g++", *options, source, "-o", library, *includes], check=True)


def run_with_guard(library: Path, script: str, *args) -> list[str]:
    """Return the lines that a script of this folder prints, in a process without a real GPU."""
    environment = {
        "FAKE_CUDA_GUARD": str(library),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, FOLDER / script, *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()
