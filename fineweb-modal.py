"""FineWeb-Edu into shards on Modal: the steps of prepare.py, one container per parquet file.

    modal run --detach fineweb-modal.py --sample 10BT     14 files in parallel; again: resumes
    modal volume get fineweb-edu fineweb-edu-10BT data

The coordinator runs on Modal, too: with --detach this machine may go away. Each container writes
the shards of its file to the volume and commits them; the coordinator lists them in manifest.json,
and a file that is listed is not done again. Needs an account (`modal setup`). Tested without one,
by running the functions' bodies locally, so never in the cloud itself.
"""

from pathlib import Path

import modal

import prepare
from runtime.command_line import one_line, say

DATA = "/data"  # where the volume is mounted
CODE = "/root"  # where Modal puts local modules, in each container
# by prepare.py and what it imports
NEEDED = ("numpy", "tiktoken", "tqdm", "tyro", "pyarrow", "huggingface_hub")
MODULES = ("documents", "prepare", "runtime", "shard_files", "tokenizer")
CORES = 8
ROOT = Path(__file__).parent


def pins() -> list[str]:
    """Return the versions in requirements.txt of what is needed; none in a container."""
    lines = (ROOT / "requirements.txt").read_text().splitlines() if modal.is_local() else []
    pins = [line.split("#")[0].strip() for line in lines]
    return [pin for pin in pins if pin.split("==")[0] in NEEDED]


app = modal.App("fineweb-edu")
volume = modal.Volume.from_name("fineweb-edu", create_if_missing=True)
# the merge table beside the modules, as in the repository: tokenizer.py looks for data/ there
image = (
    modal.Image.debian_slim(python_version="3.12")
    .pip_install(*pins())
    .add_local_file(ROOT / "data" / "vocab.bpe", f"{CODE}/data/vocab.bpe")
    .add_local_python_source(*MODULES)
)
retries = modal.Retries(max_retries=8, initial_delay=10.0, backoff_coefficient=2.0, max_delay=60.0)
settings = {"image": image, "volumes": {DATA: volume}, "retries": retries}


# A file has 2 GB and 720M tokens: some minutes. Two hours are for slow days.
@app.function(**settings, cpu=float(CORES), memory=4096, timeout=2 * 3600)
def tokenize(job: prepare.Job, i: int, source: str = "") -> tuple[int, dict, list[dict]]:
    """Write the shards of input file i to the volume; return the arguments of job.add()."""
    path = prepare.fetch(job, i, "/tmp", source)
    entries = prepare.tokenize_input(job, i, path, CORES)
    volume.commit()
    return entries


@app.function(**settings, memory=1024, timeout=6 * 3600)  # waits for the slowest file
def coordinate(folder: str, data: prepare.Dataset, source: str = ""):
    """Have all files tokenized that are not listed in manifest.json yet, and list them."""
    volume.reload()
    job = prepare.begin(folder, data, source)
    volume.commit()
    calls = [(job, i, source) for i in job.todo()]
    failed = []
    for result in tokenize.starmap(calls, order_outputs=False, return_exceptions=True):
        if isinstance(result, Exception):  # the other files continue
            failed.append(one_line(result))
            say(failed[-1])
            continue
        job.add(*result)
        volume.commit()
        say(f"{result[1]['name']}: {result[1]['tokens']:,} tokens")
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(calls)} files failed, the first with {failed[0]}; "
            "hint: run this again, it resumes with them"
        )
    say(prepare.summary(job.records()))


@app.local_entrypoint()
def main(
    sample: str = "10BT",
    dataset: str = "",
    config: str = "",
    text_field: str = "text",
    revision: str = "",
):
    """Run with settings of `prepare.py fineweb-edu`; the folder is named after the subset."""
    folder = f"fineweb-edu-{sample}" if dataset in ("", prepare.FINEWEB_EDU) else dataset
    folder = (config or folder).replace("/", "-")
    data = prepare.Dataset(sample, dataset, config, text_field, revision)
    coordinate.remote(f"{DATA}/{folder}", data)
    say(f"modal volume get fineweb-edu {folder} data")  # makes data/{folder}
