"""Measure this repository against the usual way of doing the same thing.

    python -m bench step                     a training step, GPT-2 (124M), against transformers
    python -m bench step --size tiny --B 2 --T 64 --steps 3 --use_compile False --memory False
    python -m bench step --preset gpt2-modern --against gpt2-baseline
    python -m bench sweep                    tokens per second by B and T
    python -m bench profile                  where a step's time goes, against a floor
    python -m bench loader                   random windows of 10B tokens, and their index
    python -m bench hellaswag                packed rows against one item at a time
    python -m bench generate                 decoding against transformers, one text and sixteen
    python -m bench suite                    all that a GPU is asked, in one call

The sides run in one process and alternate (A B A B), so that whatever else the machine does affects
both: ratios carry over to other machines, absolute figures do not. Each part prints a table, then
one line of JSON with `ratio`, above 1 when this repository is the faster side, null when a side
does not fit in memory. `python -m bench PART --help` lists the settings.
"""

import json
from importlib.metadata import version

import torch

from bench.generate import GeneratePart
from bench.hellaswag import HellaSwagPart
from bench.loader import LoaderPart
from bench.profile import ProfilePart
from bench.step import StepPart
from bench.suite import SuitePart
from bench.sweep import SweepPart
from runtime.command_line import parse_command, run_script

PARTS = {
    "step": StepPart,
    "sweep": SweepPart,
    "profile": ProfilePart,
    "loader": LoaderPart,
    "hellaswag": HellaSwagPart,
    "generate": GeneratePart,
    "suite": SuitePart,
}


def main():
    """Run the part that the command line names, and print its result as one line of JSON."""
    part = parse_command(PARTS, __doc__)
    name = next(name for name, kind in PARTS.items() if kind is type(part))
    versions = {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }
    result = part.measure()
    print(json.dumps({"part": name} | result | versions))


if __name__ == "__main__":
    run_script(main)
