"""The limits of control groups: what a container, Slurm or systemd lets this process use."""

import os
import re
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def read_text(path: str | Path) -> str:
    """Return the text of a file, "" when there is none to be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def control_groups(controller: str, root: Path = ROOT, listing: str = "") -> list[Path]:
    """Return the folders of this process's control groups: its own, and every one above it.

    Version 2 has one tree, version 1 one for each controller. A container may list its groups by a
    path that exists outside it only: the root of the tree, which it sees, is always among them.
    `listing` is the text of /proc/self/cgroup.
    """
    folders = []
    for line in (listing or read_text("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            trees = [root, root / "unified"]  # unified: beside version 1
        elif controller in controllers.split(","):
            trees = [root / controllers, root / controller]
        else:
            continue
        own = Path(os.path.normpath("/" + path.lstrip("/")))
        groups = [group.relative_to("/") for group in (own, *own.parents)]
        folders += [tree / group for tree in trees for group in groups]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def read_number(folder: Path, *names: str) -> int | None:
    """Return the number in the first of these files that there is; None for "max", and without."""
    for name in names:
        text = read_text(folder / name).strip()
        if text:
            return int(text) if text.isdigit() else None
    return None


def memory_left(folders: list[Path]) -> int | None:
    """Return the bytes that the memory groups in `folders` leave; None without a limit."""
    left = []
    for folder in folders:
        limit = read_number(folder, "memory.max", "memory.limit_in_bytes")
        used = read_number(folder, "memory.current", "memory.usage_in_bytes")
        if limit is not None and used is not None:
            left.append(limit - used + cached_files(folder))
    return min(left, default=None)


def cached_files(folder: Path) -> int:
    """Return the bytes of a memory group that are copies of files, freed when room is needed."""
    numbers = dict(re.findall(r"^(\w+) (\d+)$", read_text(folder / "memory.stat"), re.M))
    return int(numbers.get("total_inactive_file") or numbers.get("inactive_file") or 0)


def cpu_quota(folders: list[Path]) -> float | None:
    """Return how many CPUs the groups in `folders` grant at a time; None without a limit."""
    quotas = []
    for folder in folders:
        quota, _, period = read_text(folder / "cpu.max").strip().partition(" ")
        if not quota:
            quota = read_text(folder / "cpu.cfs_quota_us").strip()
            period = read_text(folder / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)
