"""The composition that people write with torch: norm, then sum, then activation."""

from __future__ import annotations

from torch import Tensor, nn

from .operator import Case

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
}


class TorchBlock(nn.Module):
    """One after the other, as in torchvision's residual blocks; nothing is in place."""

    def __init__(self, norm: nn.Module, act: nn.Module | None) -> None:
        super().__init__()
        self.norm = norm
        self.act = act

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(norm(input) + residual)."""
        output: Tensor = self.norm(input)
        if residual is not None:
            output = output + residual
        if self.act is not None:
            output = self.act(output)
        return output


def compose(norm: nn.Module, case: Case) -> nn.Module:
    """The norm with the residual and the activation of the case, or as it is."""
    if case.act is None and not case.has_residual:
        return norm
    return TorchBlock(norm, ACTIVATIONS[case.act]() if case.act else None)


def parts(module: nn.Module) -> tuple[nn.Module, str | None]:
    """The layer with the parameters, of ours or of torch's, and its activation's name."""
    act = getattr(module, "act", None)
    if isinstance(act, nn.Module):
        act = next(name for name, kind in ACTIVATIONS.items() if isinstance(act, kind))
    return (module.norm if isinstance(module, TorchBlock) else module), act
