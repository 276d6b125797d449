"""Report what is in a directory of shards, and count what a run would read of it.

python audit.py data/my --preset gpt2-rope --world_size 4
"""

import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

from config import preset_defaults
from runtime.command_line import PathText, UserError, parse, run_script, say
from shard_files import Shard, open_shards, read_manifest, scan
from shards import Windows, micro_batch_positions
from tokenizer import EOT


@dataclass
class Audit:
    """Report what is in a directory of shards, and what a run would read of it.

    The exit status is 1 when anything is wrong.
    """

    root: tyro.conf.Positional[PathText]  # directory of shards
    preset: str = "gpt2-rope"  # the run; what is given below replaces its settings
    world_size: int = 1  # processes
    T: int | None = None  # tokens in a sequence
    B: int | None = None
    total_batch: int | None = None
    max_steps: int | None = None
    data_order: Literal["sequential", "documents", "global"] | None = None
    data_seed: int | None = None
    # read the files, too: documents, ids, hashes; False: only headers and order
    contents: bool = True

    def run(self):
        """Print the report and exit. Raises UserError for impossible settings."""
        defaults = preset_defaults(self.preset)
        epochs = defaults.epochs if self.max_steps is None else None
        for name in ("T", "B", "total_batch", "max_steps", "data_order", "data_seed"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(defaults, name))
        tokens = self.B * self.T * self.world_size
        smallest = min(self.T, self.B, self.world_size, self.total_batch, self.max_steps)
        if smallest < 1 or self.total_batch % tokens:
            raise UserError(
                f"total_batch {self.total_batch} is not a multiple of B x T x world_size, {self.B} "
                f"x {self.T} x {self.world_size}, or one of these or max_steps is below 1; "
                "hint: --B, or --total_batch"
            )
        wrong = []
        if not read_manifest(self.root).get("complete", True):
            wrong.append(
                f"{self.root} is not complete; the command that began it resumes it "
                "(sources in manifest.json)"
            )
        say(f"{'split':24}{'tokens':>16}{'windows':>14}{'documents':>14}")
        for split in ("val", "train"):
            shards = open_shards(self.root, split, self.T, wrong)
            wrong += self.report_split(split, shards)
        if shards:
            wrong += self.report_run(shards, epochs)
        for problem in wrong:
            say(f"wrong: {problem}")
        if not wrong:
            say("nothing wrong")
        sys.exit(bool(wrong))

    def report_split(self, split: str, shards: list[Shard]) -> list[str]:
        """Print a line on a split; return what is wrong with the content of its shards."""
        wrong, documents = [], "-"
        if self.contents:
            documents = 0
            for shard in tqdm(shards, f"reading {split}", delay=2, leave=False):
                content = scan(shard)
                documents += content.documents
                if shard.sha256 not in (None, content.sha256):
                    wrong.append(
                        f"{shard.path}: its SHA-256 {content.sha256[:16]}... is not that in "
                        f"manifest.json, {shard.sha256[:16]}..."
                    )
                if content.beyond:
                    wrong.append(
                        f"{shard.path}: {content.beyond:,} ids above {EOT}, the last of GPT-2's"
                    )
        tokens = sum(shard.tokens for shard in shards)
        windows = sum((shard.tokens - 1) // self.T for shard in shards)
        name = f"{split}, shards: {len(shards)}"
        say(f"{name:24}{tokens:16,}{windows:14,}{documents:>14}")
        return wrong

    def report_run(self, shards: list[Shard], epochs: float | None) -> list[str]:
        """Print which part of the data a run reads; return what is wrong with it.

        epochs: the length of the run, in place of max_steps.
        """
        windows = Windows(shards, self.T, self.data_order, self.data_seed)
        if epochs:  # as preflight.set_length()
            self.max_steps = max(1, windows.in_epochs(epochs) * self.T // self.total_batch)
        end = self.max_steps * (self.total_batch // self.T)  # windows that the run reads
        last = int(windows.locate(np.array([end - 1]))[0, 0])  # epoch
        epochs = last + (end - windows.epoch_start(last)) / windows.per_epoch(last)
        say(
            f"run: {self.max_steps:,} steps, {end:,} windows, {epochs:.3f} epochs, "
            f"{self.data_order} order, seed {self.data_seed}\n"
        )
        if epochs > 10:
            say(
                f"note: {epochs:,.0f} epochs are far more than data are worth repeating (about 4); "
                "hint: the settings of your run, --max_steps and --total_batch\n"
            )
        say(
            f"{'read by':24}{'windows':>16}{'tokens left out':>18}{'never':>12}{'once':>12}"
            f"{'more often':>12}"
        )
        wrong = []
        for epoch in sorted({*range(min(3, last)), last}):
            wrong += self.report_epoch(windows, epoch, end)
        return wrong

    def report_epoch(self, windows: Windows, epoch: int, end: int) -> list[str]:
        """Print how often the windows of an epoch are read by all processes, and by each."""
        n = windows.per_epoch(epoch)
        total, shares = np.zeros(n, np.uint16), []
        for rank in range(self.world_size):
            seen = times_seen(windows, epoch, end, self.B, rank, self.world_size)
            total += seen
            shares.append(np.bincount(seen.clip(max=2), minlength=3) / n)
        never, once, more = np.bincount(total.clip(max=2), minlength=3).tolist()
        rows = {f"all, epoch {epoch}": np.array([never, once, more]) / n}
        if self.world_size > 1:
            rows["  a process, least"] = np.min(shares, 0)
            rows["  a process, most"] = np.max(shares, 0)
        for name, parts in rows.items():
            columns = "".join(f"{part:12.4%}" for part in parts)
            say(f"{name:24}{n:16,}{windows.left_out(epoch).sum():18,}{columns}")
        if more or once != min(n, end - windows.epoch_start(epoch)):
            return [
                f"epoch {epoch}: {once:,} windows are read once, {more:,} more often, "
                f"{never:,} never"
            ]
        return []


def times_seen(
    windows: Windows, epoch: int, end: int, B: int, rank: int, world_size: int
) -> np.ndarray:
    """Count how often one process reads each window of an epoch, in a run of `end` windows.

    It walks the process's micro-batches.
    """
    first, end = windows.epoch_start(epoch), min(end, windows.epoch_start(epoch + 1))
    counts = windows.counts(epoch)
    seen = np.zeros(counts.sum(), np.uint16)
    windows_before = np.cumsum(counts) - counts  # of each shard
    per_round = B * world_size  # windows that all processes read in one micro-step
    rounds = 1 + 65536 // B  # looked at together
    for k in range(first // per_round, -(-end // per_round), rounds):
        positions = micro_batch_positions(range(k, k + rounds), B, rank, world_size).ravel()
        positions = positions[(first <= positions) & (positions < end)]
        if len(positions):
            _, shard, token = windows.locate(positions)
            window = windows_before[shard] + (token - windows.offset(epoch)) // windows.T
            np.add.at(seen, window, 1)
    return seen


if __name__ == "__main__":
    run_script(lambda: parse(Audit, description=__doc__).run())
