"""`accumulate(exact=True)`: micro-batches that run in step and meet at every batch norm."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..._ops import running_stats
from .coroutine import Coroutine
from .together import apart, together


class _Call(NamedTuple):
    """One micro-batch's call of a batch norm."""

    layer: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad_mode: bool


class Lockstep:
    """What `accumulate(exact=True)` gives: a context whose object runs micro-batches in step.

    Each micro-batch's forward runs in a thread of its own, one at a time and in order, until it
    calls a batch norm. When all have, the layer is called once, with the batches side by side, and
    each goes on with its part of the output. That is the large batch's computation wherever samples
    meet, and the micro-batches' elsewhere; autograd sees ordinary operations.
    """

    def __init__(
        self, model: torch.nn.Module, layers: dict[str, torch.nn.Module], steps: int
    ) -> None:
        self._model = model
        self._layers = layers
        self._steps = steps
        self._active = False
        self._handles: list[RemovableHandle] = []
        self._here = threading.local()  # .coroutine: which micro-batch a thread runs
        # Kept from call to call: a thread brings torch's threads of its own.
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Lockstep:
        refuse_second(self._layers)
        self._active = True
        for layer in self._layers.values():
            self._handles.append(layer.register_forward_pre_hook(self._refuse_alone))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._active = False
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def __call__(
        self, micro_batches: Sequence[Any], function: Callable[..., Any] | None = None
    ) -> list[Any]:
        """The outputs of all micro-batches of a step, normalized together.

        Args:
            micro_batches: up to `steps` of them, each a tensor, a tuple of positional arguments or
                a mapping of keyword arguments; of any sizes.
            function: what is called with each; None is the model. A part of the model, to
                checkpoint it across the micro-batches.

        Returns:
            What the calls return, in order. Divide the sum of the losses by the number of samples
            of the step, and call `backward` once.

        Raises:
            ValueError: for no or too many micro-batches, and for inputs of a batch norm that do not
                go together.
            RuntimeError: where the micro-batches do not meet at the same layers, or under an
                activation checkpoint of one micro-batch alone.
        """
        self._check(micro_batches)
        call = self._model if function is None else function
        if not self._active:  # a checkpoint's second forward, in a backward after the context
            with ThreadPoolExecutor(len(micro_batches)) as pool:
                return self._run_all(call, micro_batches, pool)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._steps)
        return self._run_all(call, micro_batches, self._pool)

    def _run_all(
        self, call: Callable[..., Any], micro_batches: Sequence[Any], pool: ThreadPoolExecutor
    ) -> list[Any]:
        coroutines = [Coroutine(pool, partial(self._run, call, m)) for m in micro_batches]
        before = {layer: layer.__dict__.get("forward") for layer in self._layers.values()}
        originals = {layer: layer.forward for layer in before}
        try:
            for layer, forward in originals.items():
                layer.forward = partial(self._meet, layer, forward)
            answers: list[Any] = [None] * len(coroutines)
            while True:
                stops = [c.resume(a) for c, a in zip(coroutines, answers, strict=True)]
                if all(c.is_done for c in coroutines):
                    return stops
                self._check_met(coroutines, stops)
                answers = self._normalize(originals[stops[0].layer], stops)
        finally:
            for coroutine in coroutines:
                coroutine.stop()
            for layer, replaced in before.items():
                del layer.forward
                if replaced is not None:
                    layer.forward = replaced

    def _check(self, micro_batches: Sequence[Any]) -> None:
        if not self._active and not running_stats.is_recomputation():
            raise RuntimeError(
                "accumulate: the object of accumulate(exact=True) must be called inside of its "
                "context: with accumulate(model, steps, exact=True) as step: step(micro_batches)."
            )
        if hasattr(self._here, "coroutine"):
            raise RuntimeError("accumulate: a micro-batch cannot run micro-batches itself.")
        if not isinstance(micro_batches, list | tuple):
            raise TypeError(
                "accumulate: micro_batches must be a list, one element a micro-batch. "
                f"Got {type(micro_batches).__name__}; a tensor can be cut with .chunk(steps)."
            )
        if not 1 <= len(micro_batches) <= self._steps:
            raise ValueError(
                f"accumulate: micro_batches must be 1 to steps={self._steps} of them. "
                f"Got {len(micro_batches)}."
            )

    def _run(self, call: Callable[..., Any], micro_batch: Any, coroutine: Coroutine) -> Any:
        """A micro-batch, in its thread."""
        self._here.coroutine = coroutine
        try:
            if isinstance(micro_batch, Mapping):
                return call(**micro_batch)
            if isinstance(micro_batch, tuple | list):
                return call(*micro_batch)
            return call(micro_batch)
        finally:
            del self._here.coroutine

    def _refuse_alone(self, layer: torch.nn.Module, args: Any) -> None:
        """Before a layer's forward: nobody normalizes by itself in this context."""
        if self._active and layer.training and not hasattr(self._here, "coroutine"):
            raise RuntimeError(
                f"accumulate: {self._path(layer)} must be run by step(micro_batches) inside of "
                "accumulate(exact=True), where all micro-batches are normalized together. Got a "
                "call of the model itself; call model.eval() first to evaluate."
            )

    def _meet(
        self, layer: torch.nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """A layer's forward while micro-batches run."""
        if not _shares(layer):
            return forward(*args, **kwargs)
        coroutine = getattr(self._here, "coroutine", None)
        if coroutine is None:
            raise RuntimeError(
                f"accumulate: {self._path(layer)} was called in a thread that the model started, "
                "which exact=True does not know."
            )
        if _is_checkpointed():
            raise RuntimeError(
                f"accumulate: {self._path(layer)} is in an activation checkpoint of one "
                "micro-batch, which would be computed again without the others. Checkpoint all of "
                "them: checkpoint(lambda *h: step(h, block), *hidden, use_reentrant=False)."
            )
        return coroutine.wait(_Call(layer, args, kwargs, torch.is_grad_enabled()))

    def _check_met(self, coroutines: list[Coroutine], stops: list[Any]) -> None:
        first = stops[0]
        if any(c.is_done for c in coroutines) or any(
            s.layer is not first.layer or s.grad_mode != first.grad_mode for s in stops
        ):
            where = "; ".join(
                f"micro-batch {i} " + ("is done" if c.is_done else f"is at {self._path(s.layer)}")
                + ("" if c.is_done or s.grad_mode else " without gradients")
                for i, (c, s) in enumerate(zip(coroutines, stops, strict=True))
            )  # fmt: skip
            raise RuntimeError(
                "accumulate: with exact=True all micro-batches must call the same batch norms in "
                f"the same order. Got: {where}."
            )

    def _normalize(self, forward: Callable[..., Any], calls: list[_Call]) -> list[Tensor]:
        layer = calls[0].layer
        joined = together(layer, [(c.args, c.kwargs) for c in calls], self._path(layer))
        with torch.set_grad_enabled(calls[0].grad_mode):
            output = _inside(self._model, forward, joined.arguments)
            return apart(output, joined, self._path(layer))

    def _path(self, layer: torch.nn.Module) -> str:
        path = next((path for path, other in self._layers.items() if other is layer), "")
        return f"{path} ({type(layer).__name__})" if path else type(layer).__name__


def refuse_second(layers: Mapping[str, torch.nn.Module]) -> None:
    """Raise if a layer is in another context of `accumulate` already."""
    for path, layer in layers.items():
        owners = (getattr(hook, "__self__", None) for hook in layer._forward_pre_hooks.values())
        if any(getattr(type(owner), "__module__", "").startswith(__package__) for owner in owners):
            raise RuntimeError(
                "accumulate: a batch norm can be in one accumulation at a time. Got "
                f"{path or type(layer).__name__!r}, which an outer `with accumulate(...)` has."
            )


def _shares(layer: torch.nn.Module) -> bool:
    """Whether a call of a batch norm normalizes with the batch's own statistics."""
    return layer.training or layer._buffers.get("running_mean") is None


def _inside(self: torch.nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """`forward`, called where an error finds the layer's path: the stacks of the models wait."""
    return forward(**arguments)


def _is_checkpointed() -> bool:
    """Whether this thread's calls go through an activation checkpoint, of either kind."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
