"""Files that are complete or absent: atomic writing, fsync, SHA-256."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `path` once its content is on the disk.

    For a file or a directory of files. After a crash `path` is the old one or the new one. When the
    block raises, the temporary one is deleted and `path` stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    remove(temporary)  # left over by a process that was killed
    try:
        yield temporary
        if temporary.is_dir():
            for file in temporary.iterdir():
                fsync(file)
        fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    fsync(path.parent)


def remove(path: Path):
    """Delete a file or a directory, as far as it can be deleted; nothing when it does not exist."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def fsync(path: Path):
    """Wait until a file or a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict):
    """Write a JSON file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
