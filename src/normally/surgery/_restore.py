"""`model.restore()`: what a model was before it was adapted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._evaluation import flag


class Restore:
    """Puts a model back, bit for bit, to what it was when this was made.

    That is every parameter and buffer, what of it requires a gradient, and every training flag;
    parameters stay the same objects. In a copy of the model, and in one that was pickled, it is
    about that one.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._tensors = {name: t.detach().clone() for name, t in _tensors(model)}
        self._requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self._training = {path: flag(module) for path, module in model.named_modules()}

    def __call__(self) -> torch.nn.Module:
        """The model as it was, without this attribute.

        Raises:
            RuntimeError: if parts of the model have been taken away or replaced since.
        """
        self.put_back()
        del self._model.restore
        return self._model

    @torch.no_grad()
    def put_back(self) -> None:
        """The numbers and flags of the model as they were."""
        tensors, modules = dict(_tensors(self._model)), dict(self._model.named_modules())
        gone = [path for path in self._training if path not in modules]
        for name, saved in self._tensors.items():
            if name not in tensors or tensors[name].shape != saved.shape:
                gone.append(name)
        if gone:
            raise RuntimeError(
                "restore: the model must have the parts that it had when it was adapted. Got one "
                f"whose {', '.join(sorted(gone)[:8])} are gone or of another shape; undo what was "
                "done to it since first. Nothing was changed."
            )
        for name, saved in self._tensors.items():
            if tensors[name].dtype == saved.dtype:
                tensors[name].copy_(saved)
            else:  # the model was converted since
                tensors[name].data = saved.to(tensors[name].device)
        for name, parameter in self._model.named_parameters():
            if name in self._requires_grad:
                parameter.requires_grad_(self._requires_grad[name])
        for path, training in self._training.items():
            modules[path].training = training


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
