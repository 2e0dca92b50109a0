"""Checks of tensors at the library's doors: what was found, what was expected, by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def expect(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Raise unless the tensor has the shape (``None`` is any size), a dtype of these, the device.

    Reads nothing but metadata, so it costs no synchronisation.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: found {type(tensor).__name__}, expected a torch.Tensor")
    fits = len(shape) == tensor.dim() and all(
        wanted is None or wanted == found for wanted, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected ({wanted})")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: found {tensor.dtype}, expected {wanted}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: found on {tensor.device}, expected on {device}")


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
