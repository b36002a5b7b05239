"""Modules whose output depends on one thing each, of every kind that torchcache knows, and how to change it.

``KINDS[name](value)`` is a module that multiplies by the value, and ``module.set_value(other)`` changes that as a user
would.
"""

from __future__ import annotations

import contextvars
import enum
import functools
import threading
import types
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional

KINDS: dict[str, type[Factor]] = {}


class Factor(nn.Module):
    """Multiplies by a value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.set_up()
        self.set_value(value)

    def __init_subclass__(cls) -> None:
        KINDS[cls.__name__] = cls

    def set_up(self) -> None:
        pass

    def set_value(self, value: float) -> None:
        raise NotImplementedError


class WeightInPlace(Factor):
    def set_up(self) -> None:
        self.weight = nn.Parameter(torch.ones(3, 3), requires_grad=False)

    def set_value(self, value: float) -> None:
        self.weight.fill_(value)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[0, 0]


class WeightThroughData(WeightInPlace):
    def set_value(self, value: float) -> None:
        self.weight.data.fill_(value)


class WeightReplaced(WeightInPlace):
    def set_value(self, value: float) -> None:
        self.weight = nn.Parameter(torch.full((3, 3), value), requires_grad=False)


class WeightWithOtherData(WeightInPlace):
    def set_value(self, value: float) -> None:
        self.weight.data = torch.full((3, 3), value)


class WeightLoaded(WeightInPlace):
    def set_value(self, value: float) -> None:
        self.load_state_dict({"weight": torch.full((3, 3), value)}, assign=True)


class WeightTrained(WeightInPlace):
    def set_value(self, value: float) -> None:
        self.weight.requires_grad_()
        self.weight.grad = self.weight.detach() - value
        torch.optim.SGD([self.weight], lr=1.0, fused=True).step()
        self.weight.requires_grad_(False)


class Buffer(Factor):
    def set_value(self, value: float) -> None:
        self.register_buffer("factor", torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.get_buffer("factor")


class Attribute(Factor):
    by: Any

    def set_value(self, value: float) -> None:
        self.by = value

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


class TensorAttribute(Attribute):
    def set_value(self, value: float) -> None:
        self.by = torch.tensor(value)


class DictItem(Factor):
    def set_up(self) -> None:
        self.scaling: dict[str, Any] = {"default": {"by": 1.0}}

    def set_value(self, value: float) -> None:
        self.scaling["default"]["by"] = value

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scaling["default"]["by"]


class ListItem(Factor):
    def set_up(self) -> None:
        self.values = [0.0, 1.0]

    def set_value(self, value: float) -> None:
        self.values[1] = value

    def forward(self, x: Tensor) -> Tensor:
        return x * self.values[1]


class TensorInList(ListItem):
    def set_up(self) -> None:
        self.values: list[Any] = [0.0, torch.ones(())]

    def set_value(self, value: float) -> None:
        self.values[1].fill_(value)


class Configured(Factor):
    def set_up(self) -> None:
        self.config = types.SimpleNamespace(scale=1.0)

    def set_value(self, value: float) -> None:
        self.config.scale = value

    def forward(self, x: Tensor) -> Tensor:
        return x * self.config.scale


class Settings:
    def __init__(self, by: float) -> None:
        self.by = by

    def to_dict(self) -> dict[str, str]:
        return {"name": "settings"}

    def apply(self, x: Tensor) -> Tensor:
        return x * self.by


class ObjectWithToDict(Factor):
    def set_value(self, value: float) -> None:
        self.settings = Settings(value)

    def forward(self, x: Tensor) -> Tensor:
        return self.settings.apply(x)


class BoundMethod(Attribute):
    def set_value(self, value: float) -> None:
        self.by = Settings(value).apply

    def forward(self, x: Tensor) -> Any:
        return self.by(x)


class Partial(BoundMethod):
    def set_value(self, value: float) -> None:
        self.by = functools.partial(torch.mul, other=value)


class Distribution(Attribute):
    def set_value(self, value: float) -> None:
        self.by = Normal(value, 1.0)

    def forward(self, x: Tensor) -> Any:
        return x * self.by.mean


class Dataset(Attribute):
    def set_value(self, value: float) -> None:
        self.by = torch.utils.data.TensorDataset(torch.tensor([value]))

    def forward(self, x: Tensor) -> Any:
        return x * self.by[0][0]


class Array(Attribute):
    def set_value(self, value: float) -> None:
        self.by = numpy.array([value], dtype=numpy.float32)

    def forward(self, x: Tensor) -> Any:
        return x * float(self.by[0])


class LayerAttribute(Factor):
    def set_up(self) -> None:
        self.layer = nn.LeakyReLU(1.0)

    def set_value(self, value: float) -> None:
        self.layer.negative_slope = value

    def forward(self, x: Tensor) -> Tensor:
        return -self.layer(-x)


class HookOfAnObject(Factor):
    def set_up(self) -> None:
        self.layer = nn.Identity()
        self.handle: Any = None

    def set_value(self, value: float) -> None:
        if self.handle is not None:
            self.handle.remove()
        settings = Settings(value)
        self.handle = self.layer.register_forward_hook(settings.hook)  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def hook(self: Settings, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return self.apply(output)


Settings.hook = hook  # type: ignore[attr-defined]


class HookWithClosure(HookOfAnObject):
    def set_value(self, value: float) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.handle = self.layer.register_forward_hook(lambda module, args, output: output * value)


class Closure(Factor):
    def set_up(self) -> None:
        by = 1.0

        def set_by(value: float) -> None:
            nonlocal by
            by = value

        self.set_by = set_by
        self.apply_by = lambda x: x * by

    def set_value(self, value: float) -> None:
        self.set_by(value)

    def forward(self, x: Tensor) -> Any:
        return self.apply_by(x)


GLOBAL = 1.0


class Global(Factor):
    def set_value(self, value: float) -> None:
        global GLOBAL
        GLOBAL = value

    def forward(self, x: Tensor) -> Tensor:
        return x * GLOBAL


def helper(x: Tensor) -> Tensor:
    return x


class Helper(Factor):
    def set_value(self, value: float) -> None:
        globals()["helper"] = lambda x: x * value

    def forward(self, x: Tensor) -> Tensor:
        return helper(x)


def with_default(x: Tensor, by: float = 1.0) -> Tensor:
    return x * by


class Default(Factor):
    def set_value(self, value: float) -> None:
        with_default.__defaults__ = (value,)

    def forward(self, x: Tensor) -> Tensor:
        return with_default(x)


class ClassAttribute(Factor):
    class_by = 1.0

    def set_value(self, value: float) -> None:
        ClassAttribute.class_by = value

    def forward(self, x: Tensor) -> Tensor:
        return x * self.class_by


class PatchedMethod(Factor):
    def set_value(self, value: float) -> None:
        PatchedMethod.method = lambda self, x: x * value  # type: ignore[method-assign]

    def method(self, x: Tensor) -> Any:
        return x

    def forward(self, x: Tensor) -> Any:
        return self.method(x)


softsign = functional.softsign


class PatchedLibrary(Factor):
    def set_value(self, value: float) -> None:
        setattr(functional, "softsign", lambda x: x * value)  # noqa: B010 - mypy knows its type

    def forward(self, x: Tensor) -> Any:
        return functional.softsign(x)


class PatchedUnderLayer(PatchedLibrary):
    def set_up(self) -> None:
        self.layer = nn.Softsign()

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


LOCAL = threading.local()
LOCAL.by = 1.0


class ThreadLocal(Factor):
    def set_value(self, value: float) -> None:
        LOCAL.by = value

    def forward(self, x: Tensor) -> Tensor:
        return x * float(LOCAL.by)


CONTEXT: contextvars.ContextVar[float] = contextvars.ContextVar("CONTEXT")


class Context(Factor):
    def set_value(self, value: float) -> None:
        CONTEXT.set(value)

    def forward(self, x: Tensor) -> Tensor:
        return x * CONTEXT.get()


class Level(enum.Enum):
    LOW = 2.0
    HIGH = 3.0
    TOP = 5.0


class EnumMember(Attribute):
    def set_value(self, value: float) -> None:
        self.by = Level(value)

    def forward(self, x: Tensor) -> Tensor:
        return x * float(self.by.value)


class Submodule(Factor):
    def set_value(self, value: float) -> None:
        self.part = Attribute(value)

    def forward(self, x: Tensor) -> Any:
        return self.part(x)


class Precision(Factor):
    """Depends on a setting of the process, which stands for the value."""

    SETTINGS = {2.0: "highest", 3.0: "high", 5.0: "medium"}  # noqa: RUF012 - the harness never changes it

    def set_value(self, value: float) -> None:
        torch.set_float32_matmul_precision(self.SETTINGS[value])

    def forward(self, x: Tensor) -> Tensor:
        names = {name: value for value, name in self.SETTINGS.items()}
        return x * names[torch.get_float32_matmul_precision()]


VALUES = (2.0, 3.0, 5.0)


def restore() -> None:
    """Undoes what the modules set for the whole process."""
    functional.softsign = softsign
    torch.set_float32_matmul_precision("highest")
