"""What the norms refuse, in torch's words where it has some that people search for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Size, Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ArgumentError(ValueError, RuntimeError):
    """A wrong argument where torch raises RuntimeError: code that catches either keeps working."""


def is_tracing() -> bool:
    """Whether torch.jit.trace is running: it would record every comparison of sizes and warn."""
    return torch._C._get_tracing_state() is not None


def check_input(input: Tensor, caller: str) -> None:
    """Refuse what is not floating point."""
    if input.dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(
            f"{caller}: input must be one of {names}. Got input.dtype={input.dtype}; convert it "
            "first, for example with input.float()."
        )


def check_eps(eps: float, caller: str) -> None:
    """Refuse NaN and what is below 0."""
    if not eps >= 0:
        raise ValueError(f"{caller} eps must be non-negative, but got {eps}")


def different_devices(name: str, tensor: Tensor, input: Tensor, caller: str) -> ArgumentError:
    """The error for a tensor that is not where the input is."""
    return ArgumentError(
        f"{caller}: Expected all tensors to be on the same device. Got input on {input.device}, "
        f"{name} on {tensor.device}; move the module or the input with .to(device)."
    )


def check_kind(name: str, tensor: Tensor, input: Tensor, caller: str) -> None:
    """Refuse a parameter on another device, or of a dtype that does not go with the input's."""
    if tensor.device != input.device:
        raise different_devices(name, tensor, input, caller)
    if tensor.dtype is input.dtype:
        return
    is_half = input.dtype is torch.bfloat16 or input.dtype is torch.float16
    if is_half and tensor.dtype is torch.float32:
        return
    allowed = f"{input.dtype} or torch.float32" if is_half else f"{input.dtype}"
    raise TypeError(
        f"{caller}: {name} must be {allowed} for an input of {input.dtype}. "
        f"Got {name}.dtype={tensor.dtype}; convert the module or the input with .to(dtype)."
    )


def check_of_channels(name: str, tensor: Tensor, input: Tensor, caller: str) -> None:
    """Refuse a parameter or a buffer that does not have one value a channel of `(N, C, *)`."""
    channels = input.shape[1]
    if tensor.dim() != 1 or tensor.shape[0] != channels:
        raise ArgumentError(
            f"{caller}: {name} should contain {channels} elements not {tensor.numel()}: one a "
            f"channel of the input. Got input of shape {tuple(input.shape)}, "
            f"{name} of shape {tuple(tensor.shape)}."
        )
    if name.startswith("running") and tensor.dtype in DTYPES and tensor.device == input.device:
        return  # buffers may be kept in any dtype
    check_kind(name, tensor, input, caller)


def check_of_rows(name: str, tensor: Tensor, input: Tensor, shape: Size, caller: str) -> None:
    """Refuse a parameter that is not of `normalized_shape`."""
    if tensor.shape != shape:
        raise ArgumentError(
            f"{caller}: Expected {name} to be of same shape as normalized_shape, but got {name} of "
            f"shape {list(tensor.shape)} and normalized_shape = {list(shape)}"
        )
    check_kind(name, tensor, input, caller)


def normalized_dims(
    input: Tensor, normalized_shape: int | Sequence[int], dim: int | None, caller: str
) -> tuple[int, Size]:
    """Where the dimensions that are normalized together start, and their sizes."""
    given = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    shape = input.shape
    dims = len(shape)
    if dim is None:
        start = dims - len(given)
        found = shape[start:] if start >= 0 else shape
    elif -dims <= dim < dims:
        start = dim % dims
        found = shape[start : start + 1]
    else:
        raise ValueError(
            f"{caller}: dim must be a dimension of the input, {-dims} to {dims - 1}. "
            f"Got dim={dim}, input of shape {tuple(shape)}."
        )
    if not given or (not is_tracing() and found != given):
        raise _other_shape(shape, given, dim, caller)
    return start, found


def _other_shape(size: Size, given: tuple[int, ...], dim: int | None, caller: str) -> ArgumentError:
    shape = list(given)
    if not shape:
        return ArgumentError(
            f"{caller}: Expected normalized_shape to be at least 1-dimensional, i.e., containing "
            f"at least one element, but got normalized_shape = {shape}"
        )
    if dim is not None:
        return ArgumentError(
            f"{caller}: Given normalized_shape={shape} and dim={dim}, expected input with that one "
            f"size there, but got input of size{list(size)}"
        )
    is_rms = caller.endswith("rms_norm")
    if is_rms and len(shape) > len(size):
        return ArgumentError(
            f"{caller}: Input tensor must have at least {len(shape)} dimensions, but got "
            f"{len(size)}; normalized_shape={shape} and input of size{list(size)}"
        )
    star = "*" if is_rms else "*, "  # torch writes [*5] here, [*, 5] there
    words = (
        f"{caller}: Given normalized_shape={shape}, expected input with shape "
        f"[{star}{str(shape)[1:]}, but got input of size{list(size)}"
    )
    if len(shape) == 1 and not is_rms and shape[0] in size[1:]:
        words += f"; for channels first, pass dim={size.index(shape[0], 1)}"
    return ArgumentError(words)


def prepare_residual(residual: Tensor, input: Tensor, caller: str) -> Tensor:
    """The residual in the input's shape, checked."""
    if residual.dtype not in DTYPES:
        raise TypeError(
            f"{caller}: residual must be floating point. Got residual.dtype={residual.dtype}."
        )
    if residual.device != input.device:
        raise different_devices("residual", residual, input, caller)
    if not is_tracing():  # a traced call broadcasts or fails there
        if residual.shape == input.shape:
            return residual
        sizes = zip(reversed(residual.shape), reversed(input.shape), strict=False)
        if residual.dim() > input.dim() or any(a != 1 and a != b for a, b in sizes):
            raise ValueError(
                f"{caller}: residual must be broadcastable to the input's shape. Got input of "
                f"shape {tuple(input.shape)}, residual of shape {tuple(residual.shape)}."
            )
    return residual.expand_as(input)


def prepare_sum(input: Tensor, residual: Tensor, caller: str) -> tuple[Tensor, Tensor]:
    """The terms of input + residual, checked, in one dtype and in the input's shape."""
    check_input(input, caller)
    residual = prepare_residual(residual, input, caller)
    if residual.dtype is not input.dtype:
        dtype = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(dtype), residual.to(dtype)
    return input, residual
