"""`adapt`: a trained model on data of another kind, without labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, overload

import torch

from ._batches import Batches, Forward
from ._entropy import minimize_entropy
from ._report import Change, Report
from ._restore import Restore
from ._statistics.batch_norms import BatchNorms, batch_norms
from ._statistics.calibrate import Options, calibrate
from ._statistics.everybody import Everybody
from ._walk import Selection

_VERB = "adapt"
_METHODS = ("adabn", "tent", "mix")


@overload
def adapt(
    model: torch.nn.Module,
    data: Iterable[Any],
    *,
    method: str = "adabn",
    prior: float = 0.5,
    lr: float = 1e-3,
    steps: int = 1,
    forward: Forward | None = None,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[False] = False,
) -> torch.nn.Module: ...
@overload
def adapt(
    model: torch.nn.Module,
    data: Iterable[Any],
    *,
    method: str = "adabn",
    prior: float = 0.5,
    lr: float = 1e-3,
    steps: int = 1,
    forward: Forward | None = None,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[True],
) -> tuple[torch.nn.Module, Report]: ...
def adapt(
    model: torch.nn.Module,
    data: Iterable[Any],
    *,
    method: str = "adabn",
    prior: float = 0.5,
    lr: float = 1e-3,
    steps: int = 1,
    forward: Forward | None = None,
    only: Selection = None,
    skip: Selection = None,
    return_report: bool = False,
) -> torch.nn.Module | tuple[torch.nn.Module, Report]:
    """Fit the batch norms of `model` to unlabelled `data` from elsewhere, in place.

    - "adabn" (Li et al. 2016, arXiv:1603.04779): the running statistics become those of `data`, by
      `recalibrate`.
    - "mix" (Schneider et al. 2020, arXiv:2006.16971): they become

          running = prior · source + (1 - prior) · target

      for mean and variance. The paper's prior is N/(N + n): n samples of the target beside as many
      of the source as N would be worth; 0 is "adabn", 1 changes nothing. Where n is small, the
      target's statistics are noise, and a larger prior is better.
    - "tent" (Wang et al. 2021, arXiv:2006.10726): γ and β go down the entropy of the predictions,
      by Adam, with each batch's own statistics; then the running statistics become those of `data`
      behind the new γ and β. The paper predicts each batch in the forward that learns from it;
      here the model that is left serves batches of any size, in evaluation.

    All but the batch norms is in evaluation meanwhile. The model gets an attribute `restore`:
    `model.restore()` puts all parameters, buffers, `requires_grad` and training flags back to what
    they were, bit for bit, and removes itself. It is no part of the state dict; copies of the model
    and pickled ones have their own. An exception leaves the model as it was.

    Args:
        model: a classifier with batch norms (for "tent": of outputs `(N, classes, *)`, logits, or
            with an entry or attribute `logits`).
        data: batches, as `recalibrate` takes them; labels are not looked at. For "tent" they are
            gone through twice.
        method: "adabn", "mix" or "tent".
        prior: the part of the source, 0 to 1, for "mix".
        lr: of Adam, for "tent".
        steps: gradient steps a batch, for "tent".
        forward: `forward(model, batch)` calls the model for another kind of batch.
        only: names, patterns or a function of (path, module) that say which layers.
        skip: the same for layers to leave.
        return_report: return `(model, report)`; the report has a line a layer.

    Returns:
        `model`.

    Raises:
        ValueError: if the model has an attribute `restore` already, and as `recalibrate`.
        TypeError: if the model's outputs are no logits, for "tent"; and for arguments of other
            kinds.

    >>> layer = torch.nn.BatchNorm1d(1).eval()
    >>> _ = adapt(layer, [torch.tensor([[9.0], [11.0]])], method="mix", prior=0.9)
    >>> layer.running_mean
    tensor([1.])
    >>> layer.restore().running_mean
    tensor([0.])
    """
    _check(model, method, prior, lr, steps)
    found = batch_norms(model, only, skip, _VERB)
    repeat = "method='tent' learns in one pass and takes the statistics in another"
    repeat_of = repeat if method == "tent" else None
    batches = Batches(model, data, forward, None, repeat_of, _VERB)
    if method == "tent" and Everybody(None, found.layers, _VERB).size > 1:
        raise NotImplementedError(
            "adapt: method='tent' is of one process: every other would learn other γ and β. Adapt "
            "in one of them before the group is initialized, or use 'adabn' or 'mix'."
        )
    restore = Restore(model)
    try:
        if method == "tent":
            changes = _tent(model, found, batches, lr, steps)
        else:
            options = Options(prior=prior if method == "mix" else 0.0)
            changes = calibrate(model, found.layers, batches, options, _VERB)
    except BaseException:
        restore.put_back()
        raise
    model.restore = restore  # type: ignore[assignment]
    report = Report(_VERB, (*changes, *found.left))
    return (model, report) if return_report else model


def _tent(
    model: torch.nn.Module, found: BatchNorms, batches: Batches, lr: float, steps: int
) -> list[Change]:
    descent = minimize_entropy(model, found.layers, batches, lr, steps, _VERB)
    note = (
        f"γ and β by {descent.steps} steps, the entropy from {descent.first:.3g} to "
        f"{descent.last:.3g} nats"
    )
    changes = calibrate(model, found.layers, batches, Options(), _VERB)
    return [replace(change, note=f"{note}; {change.note}") for change in changes]


def _check(model: torch.nn.Module, method: str, prior: float, lr: float, steps: int) -> None:
    if method not in _METHODS:
        names = ", ".join(map(repr, _METHODS))
        raise ValueError(f"adapt: method must be one of {names}. Got method={method!r}.")
    if not 0 <= prior <= 1:
        raise ValueError(f"adapt: prior must be 0 to 1, the part of the source. Got prior={prior}.")
    if not lr > 0:
        raise ValueError(f"adapt: lr must be above 0. Got lr={lr}.")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"adapt: steps must be an integer, 1 or more. Got steps={steps!r}.")
    own = getattr(model, "restore", None)
    if own is not None:
        is_adapted = isinstance(own, Restore)
        raise ValueError(
            "adapt: model must have no attribute `restore`, which would be replaced. Got "
            + ("a model that is adapted already; call model.restore() first." if is_adapted else
               f"{type(model).__name__} with one of its own, of type {type(own).__name__}; "
               "adapt a part of the model, or wrap it in torch.nn.Sequential.")
        )  # fmt: skip
