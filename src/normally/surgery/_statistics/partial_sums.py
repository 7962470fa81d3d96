"""What was measured so far, in a file from which an interrupted measurement goes on."""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import tempfile
import time
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .findings import Findings

#: How old the file may get while there is more to say, in seconds.
_INTERVAL = 5.0

_FORMAT = "normally: partial sums, 1"


class PartialSums:
    """The passes of a measurement, one after the other; a context around all of them.

    Whoever measures asks for the same passes in the same order each time, so those that are in the
    file are not run again, and the one that was interrupted goes on behind its last whole batch.

    Args:
        path: the file; None keeps everything in memory alone.
        identity: of the model, by `identity`.
        settings: what the numbers also depend on, by name.
        layers: whose statistics they are.
        caller: whom the errors name.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        identity: str,
        settings: Mapping[str, Any],
        layers: Mapping[str, torch.nn.Module],
        caller: str,
    ) -> None:
        self._path = None if path is None else Path(path)
        self._caller = caller
        self._head: dict[str, Any] = {
            "format": _FORMAT, "model": identity, "settings": dict(settings),
        }  # fmt: skip
        self._passes: list[Findings] = []
        self._next = 0
        self._written = time.monotonic()
        if self._path is not None:
            self._read(self._path, layers)

    @property
    def batches(self) -> int:
        """In all passes so far."""
        return sum(each.batches for each in self._passes)

    def begin(self) -> Findings:
        """The next pass, as far as it was run before."""
        if self._next == len(self._passes):
            self._passes.append(Findings())
        self._next += 1
        return self._passes[self._next - 1]

    def put(self, found: Findings) -> None:
        """The pass that `begin` gave, with more in it."""
        self._passes[self._next - 1] = found
        if found.is_complete or time.monotonic() - self._written >= _INTERVAL:
            self._write()

    def __enter__(self) -> PartialSums:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._write()
        elif self._path is not None:
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        """In one step: whoever reads finds the old file or the new one."""
        if self._path is None or self.batches == 0:
            return
        content = {**self._head, "passes": [_plain(each) for each in self._passes]}
        folder, name = self._path.parent, self._path.name
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        self._written = time.monotonic()

    def _read(self, path: Path, layers: Mapping[str, torch.nn.Module]) -> None:
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"{self._caller}: resume must be a file in a folder that exists. Got {path}."
            )
        if not path.exists():
            return
        content = None
        if zipfile.is_zipfile(path):  # as torch.save writes
            with suppress(RuntimeError, pickle.UnpicklingError):
                content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise self._refusal(path, "which is no such file")
        if content["model"] != self._head["model"]:
            raise self._refusal(path, "which is of another model, or of other weights")
        for name, value in self._head["settings"].items():
            other = content["settings"].get(name)
            if other != value:
                reason = f"which was made with {name}={_short(other)}, not {name}={_short(value)}"
                raise self._refusal(path, reason)
        for each in content["passes"]:
            each["stats"] = {
                name: stats.to(layers[name].running_mean.device)
                for name, stats in each["stats"].items()
            }
            each["orders"] = frozenset(map(tuple, each["orders"]))
            each["hidden"] = frozenset(each["hidden"])
            self._passes.append(Findings(**each))

    def _refusal(self, path: Path, reason: str) -> ValueError:
        return ValueError(
            f"{self._caller}: resume must be a new file, or one that the same call has left behind "
            f"when it was interrupted. Got {path}, {reason}. Delete it to start again."
        )


def _plain(found: Findings) -> dict[str, Any]:
    """In types that `torch.load(weights_only=True)` takes."""
    return {**vars(found), "orders": list(map(list, found.orders)), "hidden": list(found.hidden)}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def identity(model: torch.nn.Module) -> str:
    """A fingerprint of all parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        here = tensor.detach().cpu().contiguous()
        size = here.numel() * here.element_size()
        if size:  # without a copy, and without numpy, which torch does not need either
            digest.update((ctypes.c_char * size).from_address(here.data_ptr()))
    return digest.hexdigest()
