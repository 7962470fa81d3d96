"""Experiments on what is claimed about normalization: one claim a file, a verdict from data.

`experiments/` holds the claims; each module there is found by itself. The engine runs an
experiment's grid of variants and seeds, keeps every finished run on disk, and makes the page.
"""

from .engine import conclude, recorded, run
from .experiment import Experiment, Results, Run
from .registry import experiments, find
from .verdict import Criterion, Effect, Verdict, decide, paired_effect

__all__ = [
    "Criterion",
    "Effect",
    "Experiment",
    "Results",
    "Run",
    "Verdict",
    "conclude",
    "decide",
    "experiments",
    "find",
    "paired_effect",
    "recorded",
    "run",
]
