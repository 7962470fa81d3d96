"""torchvision's operators by name, so that its Python part can be imported beside a CPU torch.

PyPI's torchvision is built for torch with CUDA. Its compiled operators do not load beside another
torch, and its own registration of their shapes then fails at import. The tests need its
architectures alone, none of which calls them.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch

#: Kept: with the library its operators would go.
_libraries: list[torch.library.Library] = []


def declare() -> None:
    """Declare the operators that torchvision describes, where it cannot load them itself."""
    spec = importlib.util.find_spec("torchvision")
    if _libraries or spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent
    try:
        torch.ops.load_library(folder / "_C.so")
    except OSError:
        pass
    else:
        return
    text = (folder / "_meta_registrations.py").read_text("utf-8")
    described = r'@register_meta\("(\w+)"|"torchvision::(\w+)"'
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in sorted({a or b for a, b in re.findall(described, text)}):
        library.define(f"{name}() -> ()")
    _libraries.append(library)
