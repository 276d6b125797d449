"""Compile a C++ file of this folder for the processor that it runs on."""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

from runtime.command_line import one_line

FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


class KernelError(Exception):
    """A kernel cannot be compiled or loaded here."""


@functools.cache
def load_library(source: str) -> ctypes.CDLL:
    """Return the functions of a source file, compiled at the first call (two seconds).

    OpenMP's threads are torch's: its library is loaded already. Raises KernelError.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/kernels.so"
        command = ["g++", *FLAGS, Path(__file__).with_name(source), "-o", library]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            return ctypes.CDLL(library)
        except (OSError, subprocess.CalledProcessError) as e:
            raise KernelError(one_line(e)) from e
