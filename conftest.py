"""Doctests are looked for in every module; the GPU's kernels cannot be imported without Triton."""

import importlib.util

collect_ignore_glob = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob.append("src/normally/_triton/*.py")
