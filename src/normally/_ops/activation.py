"""The fused activations as the operators know them: a code and one parameter."""

from __future__ import annotations

from typing import Any

from ..reference import ACTIVATIONS, DEFAULT_ACT_PARAM

#: None is 0; the others count from 1 in the order of `reference.ACTIVATIONS`, as csrc/activation.h.
NAMES: tuple[str | None, ...] = (None, *ACTIVATIONS)
_CODES = {name: code for code, name in enumerate(NAMES)}

#: Those whose derivative is a constant on each side of a threshold: with a residual, one saved bit
#: an element replaces the residual.
PIECEWISE_CONSTANT = frozenset(_CODES[name] for name in ("relu", "relu6", "leaky_relu"))


def encode(act: str | None, act_param: float | None, caller: str) -> tuple[int, float]:
    """The operator arguments for an activation; ValueError naming `caller` if there is none."""
    if act not in _CODES:
        names = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"{caller}: act must be None or one of {names}. Got act={act!r}.")
    if act_param is None:
        return _CODES[act], DEFAULT_ACT_PARAM.get(act, 0.0) if act else 0.0
    if act not in DEFAULT_ACT_PARAM:
        takers = " and ".join(repr(name) for name in DEFAULT_ACT_PARAM)
        raise ValueError(
            f"{caller}: act_param must be None unless act is {takers}. "
            f"Got act={act!r}, act_param={act_param}."
        )
    return _CODES[act], float(act_param)


def decode(code: int, act_param: float) -> dict[str, Any]:
    """The keyword arguments of `normally.reference` for an operator's code and parameter."""
    name = NAMES[code]
    return {"act": name, "act_param": act_param if name in DEFAULT_ACT_PARAM else None}
