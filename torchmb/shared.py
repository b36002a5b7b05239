"""The mark of an argument that all models share."""

from __future__ import annotations

from typing import Any


class Shared:
    """An argument that all models share: the result of `shared`."""

    def __init__(self, value: Any) -> None:
        self.value = value


def shared(value: Any) -> Any:
    """Marks an argument of a BatchModule that is the same for all models.

    The argument is not copied M times; a linear layer computes one matrix product with it for all models.

    Args:
        value: A tensor with the shape for one model (B, …), or a nested value that contains such tensors.

    Example:
        >>> batch = torchmb.BatchModule(nn.Linear(4, 2), batch=3)
        >>> batch(torchmb.shared(torch.zeros(5, 4))).shape
        torch.Size([3, 5, 2])
    """
    return Shared(value)
