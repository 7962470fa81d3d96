"""`recalibrate`: the running statistics become those of a whole data set."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from ._batches import Batches, Forward
from ._progress import Told
from ._report import Report
from ._statistics.batch_norms import batch_norms
from ._statistics.calibrate import Options, calibrate
from ._walk import Selection

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_VERB = "recalibrate"


@overload
def recalibrate(
    model: torch.nn.Module,
    data: Iterable[Any],
    *,
    layerwise: bool = False,
    forward: Forward | None = None,
    steps: int | None = None,
    group: ProcessGroup | None = None,
    progress: bool | Told | None = None,
    resume: str | os.PathLike[str] | None = None,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[False] = False,
) -> torch.nn.Module: ...
@overload
def recalibrate(
    model: torch.nn.Module,
    data: Iterable[Any],
    *,
    layerwise: bool = False,
    forward: Forward | None = None,
    steps: int | None = None,
    group: ProcessGroup | None = None,
    progress: bool | Told | None = None,
    resume: str | os.PathLike[str] | None = None,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[True],
) -> tuple[torch.nn.Module, Report]: ...
def recalibrate(
    model: torch.nn.Module,
    data: Iterable[Any],
    *,
    layerwise: bool = False,
    forward: Forward | None = None,
    steps: int | None = None,
    group: ProcessGroup | None = None,
    progress: bool | Told | None = None,
    resume: str | os.PathLike[str] | None = None,
    only: Selection = None,
    skip: Selection = None,
    return_report: bool = False,
) -> torch.nn.Module | tuple[torch.nn.Module, Report]:
    """Make the running statistics of `model` those of all of `data`, in place.

        n = Σ n_k    mean = Σ n_k mean_k / n    var = Σ n_k (var_k + (mean_k - mean)²) / n

    over batches k, in float64 from what a layer gets, whatever its dtype (Chan, Golub & LeVeque
    1983). `running_mean` takes mean, `running_var` what it takes in training: n/(n-1)·var with n of
    all the data, or var for layers with `unbiased=False`. For any batch sizes and order that is
    what one forward in training leaves with `momentum=None` where all data is one batch; averages
    of batches, such as `torch.optim.swa_utils.update_bn` takes, miss what lies between batches.
    `num_batches_tracked` becomes the number of batches.

    By default it is one pass, in which every batch norm normalizes with its batch's own statistics
    (precise BN, Wu & Johnson 2021, arXiv:2105.07576). The inputs of layers behind another batch
    norm so depend on how the data was split. `layerwise=True` makes one layer after the other, in
    the order of execution, each behind layers in evaluation that have their new statistics: for
    every depth the statistics of what the layer will get in evaluation, whatever the split. (One
    batch in training is not quite that: it normalizes with var, and evaluation with n/(n-1)·var.)
    It takes a pass for each layer, which ends at that layer. A layer that is called several times
    in a forward is of all its calls; where it so depends on itself it is measured again until it
    stays, and the report says if it does not.

    Everything else is in evaluation meanwhile, so dropout is off; all training flags are put back.
    An exception, Ctrl-C included, leaves the model as it was. A channel that is not finite keeps
    its statistics, and the report counts it. Masks and lengths that the model gives to our layers
    count. Under an initialized process group the data of all processes is one population, of
    synchronized layers and others, and they may have different numbers of batches or none.

    Args:
        model: any module with batch norms, ours or torch's or of subclasses that call torch's
            function, compiled or in DataParallel or DistributedDataParallel, too.
        data: batches: tensors; tuples or lists whose first element is the input; mappings, of which
            the model gets those entries that its forward takes by name. They are moved to the
            model's device. A generator serves for one pass.
        layerwise: measure layer by layer.
        forward: `forward(model, batch)` calls the model for another kind of batch.
        steps: batches to use at most, in this process.
        group: the processes that share the data; None is all of them. Each has to call.
        progress: None shows a bar where rich is installed and stderr is a terminal; True or False;
            or a function of the number of batches done and of all, None where that is not known.
        resume: a file for partial sums, written every few seconds and on exceptions: the same call
            with the same data in the same order goes on behind the batches that are counted, and
            removes the file at its end. One file a process, with `.rank0` added and so on.
        only: names, patterns or a function of (path, module) that say which layers.
        skip: the same for layers to leave. Layers that are left use their running statistics.
        return_report: return `(model, report)`; the report has a line a layer.

    Returns:
        `model`.

    Raises:
        ValueError: if there is no batch norm with running statistics, no batch, a single value per
            channel in all, a lazy layer that has met no input, data that cannot be repeated, or a
            file of another model.
        TypeError: for arguments of other kinds.

    >>> layer = torch.nn.BatchNorm1d(1)
    >>> data = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0], [8.0]])]
    >>> _ = recalibrate(layer, data)
    >>> layer.running_mean, layer.running_var  # of 1, 2, 3, 4, 8
    (tensor([3.6000]), tensor([7.3000]))
    """
    found = batch_norms(model, only, skip, _VERB)
    repeat = "layerwise=True takes a pass for every layer" if layerwise else None
    batches = Batches(model, data, forward, steps, repeat, _VERB)
    options = Options(layerwise, group=group, progress=progress, resume=resume)
    changes = calibrate(model, found.layers, batches, options, _VERB)
    report = Report(_VERB, (*changes, *found.left))
    return (model, report) if return_report else model
