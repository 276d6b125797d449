"""How a model computes on its device: number type, compiler, kernels."""

import torch

from kernels.attention import install_cpu_attention
from runtime.device import Compute, choose_compute, use_deterministic_kernels


def start_computing(cfg, model: torch.nn.Module, device: torch.device) -> Compute:
    """Choose number type and compiler for a model, before it is compiled."""
    if cfg.use_compile:
        torch.compiler.reset()  # forget models of earlier runs in this process: there is a limit
    compute = choose_compute(device, cfg.dtype, cfg.use_compile)
    # on a GPU TF32 for the few float32 matmuls beside bfloat16's; none when float32 is asked for
    exact = compute.dtype == torch.float32
    torch.set_float32_matmul_precision("highest" if exact else "high")
    if compute.compiled and device.type == "cpu":
        # costs no time on a CPU; without it two threads sum the embedding's gradient in any order
        use_deterministic_kernels(device)
        install_cpu_attention(model, compute.dtype)
    return compute
