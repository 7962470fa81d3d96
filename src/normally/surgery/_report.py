"""What a verb did to a model, a line a module."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """What became of one module."""

    #: Its path in the model; "" is the model itself.
    path: str
    #: The name of the class that it had.
    kind: str
    #: Whether it was changed; else it is as it was, and `note` says why.
    done: bool
    #: What it became, or why it did not.
    note: str
    #: How far the changed model is from the one before at this place, relative to the largest
    #: value; None where nothing was compared.
    deviation: float | None = None

    def __str__(self) -> str:
        """One line."""
        sign = "→" if self.done else "left:"
        measured = "" if self.deviation is None else f" (deviation {self.deviation:.1e})"
        return f"{self.path or 'the model itself'}  {self.kind} {sign} {self.note}{measured}"


@dataclass(frozen=True)
class Report:
    """What a verb did, module by module; `print` it.

    >>> print(Report("convert", (Change("bn", "BatchNorm2d", True, "normally.nn.BatchNorm2d"),)))
    convert: 1 changed, 0 left as they were
      bn  BatchNorm2d → normally.nn.BatchNorm2d
    """

    verb: str
    changes: tuple[Change, ...]
    #: The model's outputs before and after, where they were compared: the largest difference
    #: relative to the largest output.
    output_deviation: float | None = None

    @property
    def changed(self) -> tuple[Change, ...]:
        """The modules that were changed."""
        return tuple(change for change in self.changes if change.done)

    @property
    def left(self) -> tuple[Change, ...]:
        """The modules that were looked at and left as they were."""
        return tuple(change for change in self.changes if not change.done)

    @property
    def largest_deviation(self) -> float | None:
        """Of all that was compared; None where nothing was."""
        found = [c.deviation for c in self.changes if c.deviation is not None]
        if self.output_deviation is not None:
            found.append(self.output_deviation)
        return max(found, default=None)

    def __str__(self) -> str:
        """A line for the whole, then one a module: what was left comes last."""
        head = f"{self.verb}: {len(self.changed)} changed, {len(self.left)} left as they were"
        if self.largest_deviation is not None:
            head += f", largest deviation {self.largest_deviation:.1e}"
        return "\n  ".join([head, *map(str, self.changed), *map(str, self.left)])
