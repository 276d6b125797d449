"""A training step of this repository at several shapes: cost should grow as the operations do."""

from dataclasses import dataclass

import torch

from bench.common import REPO, Side, alternate, report
from bench.step import StepSettings, training_step


@dataclass(frozen=True)
class SweepPart(StepSettings):
    """Time this repository's training step at several shapes."""

    Bs: tuple[int, ...] = (1, 2, 4, 8)  # sequences in the batch
    Ts: tuple[int, ...] = (256, 512, 1024, 2048)  # tokens in a sequence

    def measure(self) -> dict:
        """Return tokens and operations per second of each shape.

        ratio: the fewest operations per second over the most.
        """
        self.check("Bs", "Ts")
        sides, flop_s = {}, {}
        for T in self.Ts:
            for B in self.Bs:
                shape = f"{B}x{T}"
                run, model = training_step(self, REPO, B, T)
                flops_per_token = model.flops_per_token(T)
                sides[shape] = Side(run, B * T)
                alternate({shape: sides[shape]}, self.warmup, self.steps)
                if sides[shape].fits:
                    flop_s[shape] = sides[shape].rate * flops_per_token
                sides[shape].run = None
                del run, model
                torch.compiler.reset()
        gflops = {shape: f"{rate / 1e9:,.0f}" for shape, rate in flop_s.items()}
        speeds = report("B x T", "tok/s", sides, {"GFLOP/s": gflops})
        ratio = min(flop_s.values()) / max(flop_s.values()) if flop_s else None
        return {"ratio": ratio, "flop_s": flop_s} | speeds | self.used()
