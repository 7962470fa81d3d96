"""What was measured on a GPU, and its JSON form: that of the CPU with what only a GPU has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ..measure import Spread
from ..results import Record, Results, spreads

if TYPE_CHECKING:
    from typing_extensions import Self

SCHEMA = "normally.bench.gpu/1"


@dataclass(frozen=True)
class GpuRecord(Record):
    """One case: `timings` are graph replays with a cold cache, `threads` is 0."""

    least_bytes: int = 0  # the floor if what fits the L2 stayed there between two sweeps
    copy_seconds: Spread | None = None  # of the case's own tensor, in the same rounds
    eager: dict[str, Spread] = field(default_factory=dict)  # seconds a step, many in flight
    host: dict[str, Spread] = field(default_factory=dict)  # of these, the host's own

    @property
    def key(self) -> tuple[str, str, str, str]:
        """The case, apart from its mode."""
        return (self.operator, self.label, self.layout, self.dtype)

    def eager_speedup(self, other: str, ours: str = "normally") -> float | None:
        """How many times faster our eager steps are, if both were measured."""
        if other not in self.eager or ours not in self.eager:
            return None
        return self.eager[other].median / self.eager[ours].median

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> Self:
        """From its JSON."""
        known = dict(entry)
        if known["copy_seconds"] is not None:
            known["copy_seconds"] = Spread(**known["copy_seconds"])
        for name in ("eager", "host"):
            known[name] = spreads(known[name])
        return super().from_entry(known)


@dataclass(frozen=True)
class Network:
    """A training step of a whole network, with its norms and with ours."""

    title: str
    source: str  # the library that the network is of, and its version
    batch: int
    seconds: dict[str, Spread]
    speedup: dict[str, Spread]  # of each variant, over torch's
    loss: dict[str, float]  # of the first step, from the same weights
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> Network:
        """From its JSON."""
        known = dict(entry)
        for name in ("seconds", "speedup"):
            known[name] = spreads(known[name])
        return cls(**known)


@dataclass
class GpuResults(Results):
    """A run on a GPU."""

    schema: ClassVar[str] = SCHEMA
    record_type: ClassVar[type[Record]] = GpuRecord

    # Narrower than the base's.
    records: list[GpuRecord] = field(default_factory=list)  # type: ignore[assignment]
    networks: list[Network] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)  # and why, in words
    stopped: str = ""  # what ended the run before its end

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`."""
        results = super().from_json(text)
        # The base passed these on as they are in the JSON.
        entries: list[Any] = results.networks
        results.networks = [Network.from_entry(entry) for entry in entries]
        return results

    def find(self, key: tuple[str, str, str, str], mode: str) -> GpuRecord | None:
        """The record of a case and mode."""
        for record in self.records:
            if record.key == key and record.mode == mode:
                return record
        return None
