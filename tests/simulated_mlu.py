"""A simulated `mlu` device: host memory behind PyTorch's real dispatcher, without a compiler.

Real: the PrivateUse1 dispatch key under the name `mlu`, as torch_mlu itself has it, device guard, autograd, storages, views, autocast.
Simulated: the kernels. Every aten operator that arrives runs on the CPU on the same bytes, so its numbers are the CPU's: nothing here says
anything of an MLU's numerics or speed.

It is stricter than a stock CPU fallback: tensors of two devices in one operator are refused, and so is float64, which torch_mlu would
compute in 32 bits. Every operator that reached the device is recorded.

`install()` puts a `torch_mlu` into `sys.modules` too. The rename holds for the rest of the process: run it in one of its own.
"""

import collections
import ctypes
import functools
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

SETUP = "_setup_privateuseone_for_python_backend"  # the hook that this needs; PyTorch has it since 2025
CALLS: collections.Counter = collections.Counter()  # aten overloads that reached the device
REFUSED_DTYPES = (torch.float64, torch.complex128)
# Allocation, copies between devices and changes of shape: every backend has these.
HOUSEKEEPING = {
    *("empty", "empty_strided", "view", "as_strided", "_reshape_alias", "resize", "set", "_copy_from", "unfold"),
    "_local_scalar_dense",
}
DL_CPU, DL_EXTENSION = 1, 12  # DLDeviceType; PyTorch takes kDLExtDev for PrivateUse1
CPU_KEYS = DispatchKeySet(DispatchKey.CPU)
# Kernels that take index tensors of the CPU beside data of a device, on CUDA too.
CPU_INDEX_ALLOWED = {
    *("aten::index.Tensor", "aten::_index_put_impl_", "aten::index_put_", "aten::index_put"),
    *("aten::_unsafe_index.Tensor", "aten::index.Tensor_out"),
}
LOWER_PRECISION = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm")
FULL_PRECISION = ("native_layer_norm", "layer_norm", "softmax.int", "log_softmax.int", "norm.ScalarOpt_dim")
_libraries: list[torch.library.Library] = []  # they end with their Python objects

_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype, _get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class _DLTensorHead(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


def operators() -> set[str]:
    """Base names of the operators that ran on the device since `CALLS.clear()`, in-place ones under the plain name."""
    return {base_name(name) for name in CALLS} - HOUSEKEEPING


def base_name(overload: str) -> str:
    """`aten::add_.Tensor` is `add`."""
    name = overload.removeprefix("aten::").partition(".")[0]
    return name[0] + name[1:].rstrip("_")


def _alias(tensor: torch.Tensor, device_type: int) -> torch.Tensor:
    """The same bytes, seen as a tensor of the other device."""
    capsule = torch._C._to_dlpack(tensor)
    head = _DLTensorHead.from_address(_get_pointer(capsule, b"dltensor"))
    head.device_type, head.device_id = device_type, 0
    return torch._C._from_dlpack(capsule)


def _is_mlu(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type == "mlu"


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return _alias(tensor, DL_CPU) if _is_mlu(tensor) else tensor


def _on_mlu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if _is_mlu(tensor) else _alias(tensor, DL_EXTENSION)


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> torch.Tensor:
    CALLS["aten::empty.memory_format"] += 1
    return _on_mlu(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format, device="cpu"))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
    CALLS["aten::empty_strided"] += 1
    return _on_mlu(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    CALLS["aten::_copy_from"] += 1
    if source.device.type == "cpu" and source.dtype in REFUSED_DTYPES:
        raise TypeError(f"{source.dtype} was moved to mlu, where torch_mlu would compute in 32 bits")
    _on_cpu(target).copy_(_on_cpu(source))
    return target


def _resize(tensor: torch.Tensor, size: Any, *, memory_format: Any = None) -> torch.Tensor:
    CALLS["aten::resize_"] += 1
    if tuple(tensor.shape) != tuple(size):
        new = torch.empty(size, dtype=tensor.dtype, device="mlu")
        if kept := min(tensor.numel(), new.numel()):
            _on_cpu(new).view(-1)[:kept].copy_(_on_cpu(tensor).reshape(-1)[:kept])
        tensor.set_(new.untyped_storage(), 0, new.size(), new.stride())
    return tensor


def _metadata_only(op: Any) -> Callable:
    """A kernel for what touches sizes, strides and the storage handle alone: the CPU's does not look at the device."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        CALLS[op.name()] += 1
        return op.redispatch(CPU_KEYS, *args, **kwargs)

    return kernel


def _run_on_cpu(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any other operator: its CPU kernel on the same bytes, in-place and `out=` results in the caller's own tensors."""
    CALLS[op.name()] += 1
    flat, spec = pytree.tree_flatten((args, kwargs))
    if op.name() not in CPU_INDEX_ALLOWED:
        for x in flat:
            if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.dim() > 0:
                raise RuntimeError(f"expected all tensors to be on the same device, but {op.name()} got cpu and mlu:0")
    on_cpu = [_on_cpu(x) if _is_mlu(x) else torch.device("cpu") if isinstance(x, torch.device) else x for x in flat]
    cpu_args, cpu_kwargs = pytree.tree_unflatten(on_cpu, spec)
    arguments = op._schema.arguments
    outs = {argument.name for argument in arguments if argument.is_out}
    for name in outs:
        cpu_kwargs[name] = torch.empty(0, dtype=kwargs[name].dtype)
    result = op(*cpu_args, **cpu_kwargs)
    for name in outs:
        kwargs[name].resize_(cpu_kwargs[name].shape)
        _on_cpu(kwargs[name]).copy_(cpu_kwargs[name])
    written = {  # alias set -> the caller's tensor
        alias: args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for alias in argument.alias_info.before_set
    }

    def returned(declared: Any, value: Any) -> Any:
        if declared.alias_info is None:
            return pytree.tree_map_only(torch.Tensor, _on_mlu, value)
        if not declared.alias_info.is_write:
            raise NotImplementedError(f"the view {op.name()} has no simulated kernel")
        return written[next(iter(declared.alias_info.before_set))]

    declared = op._schema.returns
    if len(declared) <= 1:
        return returned(declared[0], result) if declared else None
    return tuple(returned(*pair) for pair in zip(declared, result, strict=True))


def _with_autocast(op: Any, dtype: torch.dtype | None) -> Callable:
    """An operator whose floating inputs are cast: to `dtype`, or to the type of the autocast."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        target = dtype or torch.get_autocast_dtype("mlu")

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(target) if _is_mlu(tensor) and tensor.is_floating_point() else tensor

        with torch._C._ExcludeDispatchKeyGuard(DispatchKeySet(DispatchKey.AutocastPrivateUse1)):
            args, kwargs = pytree.tree_map_only(torch.Tensor, cast, (args, kwargs))
            return op(*args, **kwargs)

    return kernel


class _Mlu(types.ModuleType):
    """The part of `torch.mlu` that portable code touches."""

    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    set_device = staticmethod(lambda device: None)
    synchronize = staticmethod(lambda device=None: None)
    max_memory_allocated = staticmethod(lambda device=None: 0)
    is_bf16_supported = staticmethod(lambda: True)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])
    manual_seed_all = staticmethod(lambda seed: None)


def install() -> None:
    """Register the device, once a process. Raises: RuntimeError: a real torch_mlu is installed."""
    if importlib.util.find_spec("torch_mlu") is not None:
        raise RuntimeError("a real torch_mlu is installed: test on it instead")

    class Hook(torch._C._acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return True

        def has_primary_context(self, dev_id: int) -> bool:
            return True

        def is_built(self) -> bool:
            return True

    class Guard(torch._C._acc.DeviceGuard):
        def type_(self) -> Any:
            return torch._C._autograd.DeviceType.PrivateUse1

    getattr(backend_registration, SETUP)("mlu", backend_module=_Mlu("torch.mlu"), hook=Hook(), device_guard=Guard())
    _register_kernels()
    module = types.ModuleType("torch_mlu")
    module.__spec__ = importlib.machinery.ModuleSpec("torch_mlu", None)
    sys.modules["torch_mlu"] = module


def _register_kernels() -> None:
    aten = torch.ops.aten
    kernels = torch.library.Library("aten", "IMPL", "PrivateUse1")
    kernels.impl("empty.memory_format", _empty)
    kernels.impl("empty_strided", _empty_strided)
    kernels.impl("_copy_from", _copy_from)
    kernels.impl("resize_", _resize)
    for op in (
        aten.view.default,
        aten.as_strided.default,
        aten._reshape_alias.default,
        aten.unfold.default,
        aten.set_.source_Tensor,
        aten.set_.source_Storage,
        aten.set_.source_Storage_storage_offset,
    ):
        kernels.impl(op.name().removeprefix("aten::"), _metadata_only(op))
    # torch_mlu has kernels of its own for these; unregistered, the dispatcher would prefer PyTorch's decompositions to the fallback.
    for op in (aten.native_layer_norm.default, aten.embedding.default, aten.silu_backward.default):
        kernels.impl(op.name().removeprefix("aten::"), functools.partial(_run_on_cpu, op))
    autocast = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for names, dtype in ((LOWER_PRECISION, None), (FULL_PRECISION, torch.float32)):
        for name in names:
            base, _, overload = name.partition(".")
            autocast.impl(name, _with_autocast(getattr(getattr(aten, base), overload or "default"), dtype))
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_run_on_cpu, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _libraries.extend([kernels, autocast, everything])
