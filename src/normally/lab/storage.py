"""Finished runs on disk: one JSON file each, replaced in one step."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write so that a kill at any moment leaves the old file or the new one, never half.

    A number that is not finite becomes null: JSON has no name for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(_finite(content), file, ensure_ascii=False, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any | None:
    """The content, or None where there is no readable file."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


class Store:
    """The runs of one experiment on one data set with one budget.

    A run counts only under the fingerprint of the protocol that made it: after a change of the
    experiment's code or budget the old ones are measured again.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint

    def path(self, variant: str, seed: int) -> Path:
        """Where that run is kept."""
        return self.folder / "runs" / f"{variant}-seed{seed}.json"

    def load(self, variant: str, seed: int) -> dict[str, Any] | None:
        """The run's record, or None if it has to be measured."""
        content = read_json(self.path(variant, seed))
        if not isinstance(content, dict) or content.get("fingerprint") != self.fingerprint:
            return None
        record: dict[str, Any] = content["record"]
        return record

    def machines(self) -> list[str]:
        """The machines, settings and versions that the runs were measured with."""
        return sorted({content["machine"] for content in self._all()})

    def seconds(self) -> list[float]:
        """How long each of the runs took."""
        return [content["seconds"] for content in self._all()]

    def save(
        self, variant: str, seed: int, record: dict[str, Any], seconds: float, machine: str
    ) -> None:
        """Keep a finished run, with how long it took and on what."""
        write_json(
            self.path(variant, seed),
            {
                "fingerprint": self.fingerprint,
                "variant": variant,
                "seed": seed,
                "seconds": round(seconds, 3),
                "machine": machine,
                "record": record,
            },
        )

    def _all(self) -> list[dict[str, Any]]:
        contents = [read_json(path) for path in sorted(self.folder.glob("runs/*.json"))]
        return [c for c in contents if c and c.get("fingerprint") == self.fingerprint]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
