"""The same shapes on a GPU: graph replays with a cold cache, and eager calls end to end.

`python -m normally.bench.gpu` measures; `scripts/gpu.py` runs the tests before it. Operators,
exact results and floors are those of the benchmark of the CPU.
"""
