"""Files that are complete or absent: atomic writing, fsync, SHA-256."""

import glob
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
    block raises, the temporary one is deleted and `path` stays as it was. Several processes may
    write the same path: the last one to finish wins.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove_leftovers(path)
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


def remove_leftovers(path: Path):
    """Delete what processes that were killed while writing `path` have left."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = temporary.name.split(".")[-2]
        if pid.isdigit() and (int(pid) == os.getpid() or not is_running(int(pid))):
            remove(temporary)


def is_running(pid: int) -> bool:
    """Tell whether a process of this number exists on this machine."""
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


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
