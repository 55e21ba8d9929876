"""A device that is not there: tensors carry the label "pretend" over the CPU's memory, and raise where CUDA would.

Labels that meet must be one: a tensor of this machine's memory and a labelled one raise what CUDA raises, except that a
number (a tensor without axes) may come from the CPU, and a labelled tensor may be indexed by the CPU's. NumPy does not
see labelled tensors, and random draws take no generator of the CPU. Arithmetic is the CPU's own, bit for bit.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

Net = TypeVar("Net", bound=nn.Module)
NAME = "pretend"
MEANT_TO_MOVE = {"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_set_up: list[Any] = []


class Labelled(torch.Tensor):
    """A tensor in the CPU's memory that says it is elsewhere."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Labelled:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=device, requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    def __init__(self, inner: Tensor, device: torch.device) -> None:
        del inner, device

    def data_ptr(self) -> int:
        """Where the numbers are, so that tensors that share them are known."""
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def __repr__(self, **_: Any) -> str:
        return f"Labelled({self.inner!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = dict(kwargs or {})
        device = _checked(func, args, kwargs)
        asked = kwargs.get("device")
        if asked is not None:
            device = torch.device(asked)
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        out = func(*tree_map(_bare, args), **tree_map(_bare, kwargs))
        if device.type == "cpu":
            return out
        dense = tree_map(lambda value: Labelled(value, device) if isinstance(value, Tensor) else value, out)
        return return_and_correct_aliasing(func, args, kwargs, dense)


def _bare(value: Any) -> Any:
    return value.inner if isinstance(value, Labelled) else value


def _checked(func: Any, args: Any, kwargs: Any) -> torch.device:
    """The one device of the labelled arguments. Raises RuntimeError where CUDA would."""
    name = func._schema.name.split("::")[1]
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    devices = {value.device for value in given if isinstance(value, Labelled)}
    first = next(value.device for value in given if isinstance(value, Labelled))
    if name in MEANT_TO_MOVE:
        return args[0].device if name == "copy_" else first
    judged = given
    if name in INDEXED and isinstance(args[0], Labelled):
        judged = [args[0], *(args[2:3] if "put" in name else ())]
        indices = [value for value in args[1] if isinstance(value, Labelled)]
        devices = {value.device for value in [*judged, *indices] if isinstance(value, Labelled)}
    foreign = [value for value in judged if not isinstance(value, Labelled) and value.dim() > 0]
    if foreign or len(devices) > 1:
        names = sorted({str(value.device) for value in foreign} | set(map(str, devices)))
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {' and '.join(names)}! "
            f"({name}; pretend device)"
        )
    generator = kwargs.get("generator")
    if generator is None:
        generator = next((value for value in args if isinstance(value, torch.Generator)), None)
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"Expected a 'pretend' device type for generator but found 'cpu' ({name})")
    # Written into a tensor of the CPU: judged above; a copy alone may cross.
    return first


def _empty(size: Any, **options: Any) -> Tensor:
    return Labelled(torch.empty(size, dtype=options.get("dtype")), _where(options))


def _empty_strided(size: Any, stride: Any, **options: Any) -> Tensor:
    return Labelled(torch.empty_strided(size, stride, dtype=options.get("dtype")), _where(options))


def _made_by(name: str) -> Any:
    packet, _, overload = name.partition(".")
    plain = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def made(*args: Any, **options: Any) -> Tensor:
        generator = options.get("generator")
        if generator is not None and generator.device.type == "cpu":
            raise RuntimeError(f"Expected a 'pretend' device type for generator but found 'cpu' ({name})")
        return Labelled(
            plain(*args, **{**options, "device": torch.device("cpu"), "pin_memory": False}), _where(options)
        )

    return made


def _copied(source: Tensor, into: Tensor, non_blocking: bool = False) -> Tensor:
    del non_blocking
    _bare(into).copy_(_bare(source))
    return into


def _where(options: dict[str, Any]) -> torch.device:
    device = options.get("device") or torch.device(NAME)
    return device if device.index is not None else torch.device(NAME, 0)


def device(index: int = 0) -> torch.device:
    """The pretend device, set up at the first call."""
    if not _set_up:
        _setup_privateuseone_for_python_backend(NAME)
        library = torch.library.Library("aten", "IMPL")
        library.impl("empty.memory_format", _empty, "PrivateUse1")
        library.impl("empty_strided", _empty_strided, "PrivateUse1")
        # Their own kernels would make something empty and resize it, which a label does not follow.
        for name in ("arange", "arange.start", "arange.start_step", "randperm", "randperm.generator", "linspace"):
            library.impl(name, _made_by(name), "PrivateUse1")
        library.impl("_copy_from", _copied, "PrivateUse1")
        _set_up.append(library)
    return torch.device(NAME, index)


def onto(module: Net, index: int = 0) -> Net:
    """The module with its parameters and buffers moved in place; what was shared is shared still."""
    where, moved = device(index), {}

    def there(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            new = tensor.detach().to(where)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            # The old one is kept, so that no other is made with its id.
            moved[id(tensor)] = (new, tensor)
        return moved[id(tensor)][0]

    for part in module.modules():
        for kind in (part._parameters, part._buffers):
            for name, tensor in kind.items():
                if tensor is not None and not isinstance(tensor, Labelled):
                    kind[name] = there(tensor)
    return module
