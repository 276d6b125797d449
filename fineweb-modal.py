"""FineWeb-Edu into shards on Modal: prepare.py's steps, one container for each parquet file.

    modal run --detach fineweb-modal.py --sample 10BT     14 files side by side; again: goes on where it was
    modal volume get fineweb-edu 10BT data/fineweb-edu-10BT

The coordinator runs on Modal, too, and outlives the containers it starts: with --detach this machine may go away. Each
file's tokens are committed to the volume when they are whole, each shard likewise, and what is there is not made again.
Needs an account (`modal setup`); tested without one, by running the functions' bodies here, so never in the cloud itself.
"""

from pathlib import Path

import modal

import prepare

DATA = "/data"  # where the volume is mounted
CODE = "/root"  # where Modal puts local modules, in each container
NEEDED = (
    "torch",
    "numpy",
    "tiktoken",
    "tqdm",
    "tyro",
    "safetensors",
    "datasets",
)  # by prepare.py and what it imports
MODULES = ("checkpoint", "config", "distributed", "model", "prepare", "shards", "tokenizer")
ROOT = Path(__file__).parent


def pins() -> list[str]:
    """The versions in requirements.txt of what is needed; none in a container, where that file is not and pip has run."""
    lines = (ROOT / "requirements.txt").read_text().splitlines() if modal.is_local() else []
    return [pin for line in lines if (pin := line.split("#")[0].strip()).split("==")[0] in NEEDED]


app = modal.App("fineweb-edu")
volume = modal.Volume.from_name("fineweb-edu", create_if_missing=True)
# the merge table beside the modules, as in the repository: tokenizer.py looks for data/ beside itself
image = (
    modal.Image.debian_slim(python_version="3.12")
    .pip_install(*pins())
    .add_local_file(ROOT / "data" / "vocab.bpe", f"{CODE}/data/vocab.bpe")
    .add_local_python_source(*MODULES)
)
retries = modal.Retries(max_retries=8, initial_delay=10.0, backoff_coefficient=2.0, max_delay=60.0)


# A file has 720M tokens: 3 min to tokenise at 0.5M tokens a second and core, and 2 GB to download. Two hours are for slow days.
@app.function(
    image=image, volumes={DATA: volume}, cpu=8.0, memory=4096, timeout=2 * 3600, retries=retries
)
def tokenise(plan: dict, i: int, folder: str, source: str = "") -> dict:
    """Input file i of a plan into a part on the volume; returns its entry of the manifest."""
    plan = prepare.Plan(**plan)
    path = prepare.fetch(plan, i, "/tmp", source)
    entry = prepare.make_part(plan, i, path, folder)
    volume.commit()
    return entry


# 24 h, the longest that Modal allows: it waits for all files, then copies 20 GB from parts to shards.
@app.function(image=image, volumes={DATA: volume}, memory=2048, timeout=24 * 3600, retries=retries)
def coordinate(folder: str, settings: dict):
    """Have all files tokenised that are not yet, and lay the shards out. The same again goes on after what is there."""
    volume.reload()
    plan = prepare.make_plan(folder, **settings)
    needed = [i for i, entry in enumerate(prepare.survey(plan, folder)[1]) if entry is None]
    volume.commit()  # the plan
    jobs = [(plan._asdict(), i, folder, settings.get("source", "")) for i in needed]
    failed = []
    for done in tokenise.starmap(
        jobs, order_outputs=False, return_exceptions=True, wrap_returned_exceptions=False
    ):
        if isinstance(done, Exception):  # the other files go on
            failed.append(prepare.one_line(done))
        print(
            failed[-1]
            if isinstance(done, Exception)
            else f"{done['name']}: {done['tokens']:,} tokens",
            flush=True,
        )
    volume.reload()
    shards = prepare.lay_out(plan, folder, after=volume.commit)
    volume.commit()
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(needed)} files failed, the first with {failed[0]}; hint: run this again, "
            "it goes on with them"
        )
    print(prepare.summary(shards), flush=True)


@app.local_entrypoint()
def main(
    sample: str = "10BT",
    dataset: str = prepare.FINEWEB_EDU,
    config: str = "",
    text_field: str = "text",
    revision: str = "",
):
    """The settings of `prepare.py fineweb-edu`, in the same meaning; the folder on the volume is named after the subset."""
    folder = (config or (sample if dataset == prepare.FINEWEB_EDU else dataset)).replace("/", "-")
    settings = dict(
        sample=sample, dataset=dataset, config=config, text_field=text_field, revision=revision
    )
    coordinate.remote(f"{DATA}/{folder}", settings)
    print(f"modal volume get fineweb-edu {folder} data/{folder}")
