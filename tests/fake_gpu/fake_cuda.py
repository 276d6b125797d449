"""CUDA tensors without a GPU: they have shape, type and device, but no content.

An operation on them that would fail on a GPU fails here: tensors of two devices, types that do not
go together under CUDA's autocast, shapes. Streams, pinned memory, NCCL, synchronisation and numbers
do not exist. Import this before torch, in a process of its own, and end that with os._exit():
torch's own end would look for the device. Needs the library that guard.py builds.
"""

import ctypes
import os
from contextlib import ExitStack, contextmanager
from unittest import mock

from guard import torch_folder


def load_guard(path: str) -> ctypes.CDLL:
    """Load the library before torch, behind those that it is linked to."""
    for name in ("libtorch_global_deps.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(path)


library = load_guard(os.environ["FAKE_CUDA_GUARD"])
import torch  # noqa: E402
import torch.cuda.amp.common  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

library.install_guard()
torch.set_num_threads(1)


def tensor_on(data, *args, device=None, make=torch.tensor, **kwargs) -> torch.Tensor:
    """Do what torch.tensor() does, by way of the CPU: it cannot fill a fake tensor."""
    made = make(data, *args, **kwargs)
    return made if device is None else made.to(device)


class ListIndices(TorchFunctionMode):
    """Makes tensors of lists in an index, which torch itself cannot do for fake ones."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            x, index, *value = args
            index = index if isinstance(index, tuple) else (index,)
            made = [tensor_on(i, device=x.device) if isinstance(i, list) else i for i in index]
            args = (x, tuple(made), *value)
        return function(*args, **(kwargs or {}))


class SameTypes(TorchDispatchMode):
    """Raises RuntimeError where a GPU would: matrices of two types, which fake tensors let pass."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        attends = "attention" in name and "backward" not in name  # which gets float32 sums, too
        if attends or name.endswith("mm"):
            dtypes = [
                t.dtype for t in args if isinstance(t, torch.Tensor) and t.dtype.is_floating_point
            ]
            if len(set(dtypes)) > 1:
                raise RuntimeError(f"{name} of {dtypes}")
        return function(*args, **(kwargs or {}))


def answer(value):
    """Return a function that returns a value, whatever it is asked."""
    return lambda *args, **kwargs: value


@contextmanager
def fake_cuda(checks: bool = True):
    """In the block torch has one H100, "cuda:0", and every tensor is fake.

    checks: with what a GPU refuses and fake tensors let pass. torch.compile goes without.
    """
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "get_device_capability": (9, 0),
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "mem_get_info": (80 << 30, 80 << 30),
        "is_bf16_supported": True,
    }
    with ExitStack() as stack:
        for name, value in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer(value)))
        unavailable = (torch.cuda.amp.common, "amp_definitely_not_available")
        stack.enter_context(mock.patch.object(*unavailable, answer(False)))
        stack.enter_context(mock.patch.object(torch, "tensor", tensor_on))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=checks))
        if checks:
            stack.enter_context(SameTypes())
            stack.enter_context(ListIndices())
        yield
