"""What was measured, and its JSON form (`benchmarks/README.md` explains every field)."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .measure import Spread

if TYPE_CHECKING:
    from typing_extensions import Self

SCHEMA = "normally.bench/1"
OURS, TORCH, COMPILED = "normally", "torch", "torch.compile"


@dataclass(frozen=True)
class Timing:
    """One contender in one case."""

    seconds: Spread
    error: dict[str, float | None] | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Record:
    """One case: what it was, what it costs at least, and what each contender took."""

    operator: str
    label: str
    size: tuple[int, ...]
    layout: str
    dtype: str
    act: str | None
    residual: bool
    fused: bool
    mode: str
    threads: int
    tensor_bytes: int
    floor_bytes: int
    rounds: int
    timings: dict[str, Timing]
    speedup: dict[str, Spread]  # of ours, over each of the others
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """The shape's number, 1 to 12."""
        return int(self.label.rstrip("abcdefgh"))

    @property
    def title(self) -> str:
        """The case in words, apart from its threads."""
        size = "×".join(map(str, self.size))
        case = f"{self.label} {size} {self.layout} {self.dtype} {self.mode}{self.fusion}"
        return f"{self.operator} {case}"

    @property
    def fusion(self) -> str:
        """What is fused into the norm, as in "+add+relu"; empty for nothing."""
        return ("+add" if self.residual else "") + (f"+{self.act}" if self.act else "")

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> Self:
        """From its JSON, where what is derived is left out."""
        derived = ("floor_seconds", "over_floor")
        known = {name: value for name, value in entry.items() if name not in derived}
        known["size"] = tuple(known["size"])
        known["timings"] = {
            name: Timing(**{**timing, "seconds": Spread(**timing["seconds"])})
            for name, timing in known["timings"].items()
        }
        known["speedup"] = spreads(known["speedup"])
        return cls(**known)


def spreads(entries: dict[str, Any]) -> dict[str, Spread]:
    """By contender, from JSON."""
    return {name: Spread(**spread) for name, spread in entries.items()}


@dataclass(frozen=True)
class CopySpeed:
    """The yardstick for one dtype and number of threads: bytes read and written a second."""

    dtype: str
    threads: int
    bytes_per_second: Spread


@dataclass
class Results:
    """A run."""

    schema: ClassVar[str] = SCHEMA
    record_type: ClassVar[type[Record]] = Record

    machine: dict[str, Any]
    options: dict[str, Any]
    created: str
    complete: bool = False
    copy: list[CopySpeed] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)  # contender to version and threads

    @property
    def compared(self) -> list[str]:
        """The contenders beside ours that any case has, torch first."""
        return list(dict.fromkeys(name for record in self.records for name in record.speedup))

    def floor_seconds(self, record: Record) -> float:
        """The time that the record's floor takes at the run's cold-copy speed."""
        for speed in self.copy:
            if (speed.dtype, speed.threads) == (record.dtype, record.threads):
                return record.floor_bytes / speed.bytes_per_second.median
        raise KeyError(f"no copy speed for {record.dtype}, {record.threads} threads")

    def over_floor(self, record: Record, contender: str) -> float:
        """How many times the floor a contender took."""
        return record.timings[contender].seconds.median / self.floor_seconds(record)

    def to_json(self) -> str:
        """One object a record; derived numbers are written too, for readers without our code."""
        data: dict[str, Any] = {"schema": self.schema, **asdict(self)}
        for record, entry in zip(self.records, data["records"], strict=True):
            entry["floor_seconds"] = self.floor_seconds(record)
            entry["over_floor"] = {name: self.over_floor(record, name) for name in record.timings}
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`."""
        data = json.loads(text)
        schema = data.pop("schema", None)
        if schema != cls.schema:
            raise ValueError(f"bench: schema must be {cls.schema!r}. Got schema={schema!r}.")
        data["copy"] = [
            CopySpeed(**{**entry, "bytes_per_second": Spread(**entry["bytes_per_second"])})
            for entry in data["copy"]
        ]
        data["records"] = [cls.record_type.from_entry(entry) for entry in data["records"]]
        return cls(**data)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """The JSON file, replaced in one step; folders are made."""
        path = Path(path).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(self.to_json(), encoding="utf-8")
        os.replace(partial, path)
        return path
