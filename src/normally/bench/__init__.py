"""Measure our normalizations against torch's on this machine: `normally bench`.

`run` is the entry point. How it measures is in `measure`, `yardstick`, `accuracy` and `memory`;
an operator's own part is one file such as `batch_norm`.
"""

from .main import OPERATORS, run

__all__ = ["OPERATORS", "run"]
