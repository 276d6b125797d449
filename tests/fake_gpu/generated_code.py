"""Print what torch.compile generates for an H100 from a training step, as JSON.

    python generated_code.py B N_LAYER uncut|ddp PRESET...

A line for each preset, with a list of graphs: whether it is a backward one, its kernels in the
order of their calls, those that compute a cosine, a sine or a power, and the buffers (elements,
type). ddp: cut into buckets as inside DistributedDataParallel. Nothing is compiled to machine code
or run. Needs triton (no GPU).
"""

import fake_cuda  # before torch  # isort: skip

import dataclasses
import functools
import json
import math
import os
import re
import sys
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo.device_interface as device_interface
import torch._functorch.config
import torch._inductor.config
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.fx_passes.post_grad as post_grad
from fake_cuda import answer
from peak_memory import flash_attention
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch.nn.parallel import DistributedDataParallel

import config
from model import GPT, GPTConfig

H100 = SimpleNamespace(
    major=9,
    minor=0,
    name="NVIDIA H100 80GB HBM3",
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="",
    L2_cache_size=50 << 20,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
)


class Generated(Exception):
    """Ends a compilation once the code is there."""


def device_properties(device: torch.device) -> DeviceProperties:
    return DeviceProperties(
        type=device.type,
        index=device.index or 0,
        multi_processor_count=132,
        cc=90,
        major=9,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
    )


def without_cuda(function):
    """Return a function that sees no GPU: it would run something there, to trace patterns."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with mock.patch.object(torch.cuda, "is_available", answer(False)):
            return function(*args, **kwargs)

    return wrapped


def device_patches() -> list:
    """Return patches that tell the compiler that it has an H100."""
    answers = {
        "is_available": True,
        "current_device": 0,
        "get_compute_capability": 90,
        "get_device_properties": H100,
        "device_count": 1,
        "set_device": None,
        "synchronize": None,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "get_raw_stream": 0,
        "is_bf16_supported": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }
    of_worker = {"get_device_properties": H100, "current_device": 0, "set_device": None}
    of_torch = {
        "get_device_properties": H100,
        "_lazy_init": None,
        "is_initialized": True,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    interface = device_interface.CudaInterface
    patch = mock.patch.object
    patches = [patch(interface, n, staticmethod(answer(value))) for n, value in answers.items()]
    for name, value in of_worker.items():
        patches.append(patch(interface.Worker, name, staticmethod(answer(value))))
    patches += [patch(torch.cuda, name, answer(value)) for name, value in of_torch.items()]
    create = staticmethod(functools.cache(device_properties))
    return [*patches, patch(DeviceProperties, "create", create)]


def compiler_patches() -> list:
    """Return patches that keep the compiler from caching, and from running what it makes."""
    patch = mock.patch.object
    patches = [
        torch._inductor.config.patch(
            force_disable_caches=True,
            compile_threads=1,
            shape_padding=False,  # measures on the GPU
            joint_graph_constant_folding=False,  # computes there
        ),
        torch._functorch.config.patch(
            enable_autograd_cache=False, force_non_lazy_backward_lowering=True
        ),
    ]
    for module in (joint_graph, post_grad):
        patches.append(patch(module, "lazy_init", without_cuda(module.lazy_init)))
    for module in list(sys.modules.values()):
        if getattr(module, "triton_hash_with_backend", None):
            patches.append(patch(module, "triton_hash_with_backend", answer("none")))
    return patches


@contextmanager
def fake_compiler(sources: list[tuple[bool, str]]):
    """In the block torch.compile generates code for an H100, appends it to `sources`, and ends."""

    def keep_source(graph: GraphLowering):
        wrapper, _ = graph.codegen()
        sources.append((graph.is_backward, wrapper.value))
        return SimpleNamespace(call=end)

    def end(*args, **kwargs):
        raise Generated

    keep = mock.patch.object(GraphLowering, "compile_to_module", keep_source)
    with ExitStack() as stack:
        for patch in [*device_patches(), *compiler_patches(), keep]:
            stack.enter_context(patch)
        yield


def generate(preset: str, B: int, n_layer: int, cut_by_ddp: bool) -> list[tuple[bool, str]]:
    """Return the code of each graph of a training step, and whether it is a backward one."""
    cfg = config.preset(preset, n_layer=n_layer)
    shape = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(GPTConfig)}
    sources = []
    with fake_cuda.fake_cuda(checks=False), fake_compiler(sources):
        with torch.device("cuda"):
            model = GPT(GPTConfig(**shape))
            x = torch.zeros(B, cfg.T, dtype=torch.int64)
            y = x.clone()  # two views of one tensor would be another graph
        for block in model.h:
            block.attn.attend = flash_attention
        if cut_by_ddp:  # the compiler looks for what DDP.forward sets
            DistributedDataParallel._active_ddp_module = SimpleNamespace(bucket_bytes_cap=25 << 20)
        torch.compiler.reset()
        torch.set_float32_matmul_precision("high")
        train_model = torch.compile(model, fullgraph=True, dynamic=False)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                train_model(x, y)
        except Generated:
            pass
    return sources


def describe(backward: bool, source: str) -> dict:
    """Return what a graph's code calls and allocates."""
    kernels = dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", source, re.S))
    calls = re.findall(
        r"\b(triton_\w+|extern_kernels\.\w+|torch\.ops\.[\w.]+)(?:\.run)?\(",
        source[source.index("def call") :],
    )
    trigonometry = r"\b(libdevice|tl_math)\.(cos|sin|pow)\("
    buffers = []
    for shape, dtype in re.findall(
        r"empty_strided_cuda\(\(([\d, ]+)\), \([\d, ]+\), torch\.(\w+)\)", source
    ):
        buffers.append((math.prod(int(n) for n in shape.split(",") if n.strip()), dtype))
    return {
        "backward": backward,
        "calls": calls,
        "trigonometry": [name for name in calls if re.search(trigonometry, kernels.get(name, ""))],
        "buffers": buffers,
    }


def main():
    B, n_layer, cut, *presets = sys.argv[1:]
    for preset in presets:
        sources = generate(preset, int(B), int(n_layer), cut == "ddp")
        print(json.dumps([describe(*source) for source in sources]), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
