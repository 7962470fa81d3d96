"""Public data files: fetched once, checked, kept in the user's cache folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

if TYPE_CHECKING:
    import requests


@dataclass(frozen=True)
class Source:
    """Where files come from, and the MD5 sum that each must have."""

    mirrors: Sequence[str]
    md5: Mapping[str, str]
    megabytes: int


def folder(name: str) -> Path:
    """Where the files of a data set are kept; the environment variable NORMALLY_CACHE moves it."""
    import pooch

    return Path(os.environ.get("NORMALLY_CACHE") or pooch.os_cache("normally")) / name


def complete(name: str, source: Source) -> bool:
    """Whether all files are in the cache: what stands under its own name was checked."""
    return all((folder(name) / file).is_file() for file in source.md5)


def fetch(name: str, source: Source) -> Path:
    """Download what is missing, and continue what was stopped half-way.

    Returns:
        The folder with all files.

    Raises:
        ConnectionError: if no mirror gives a file whose sum is right.
    """
    import pooch

    place = folder(name)
    place.mkdir(parents=True, exist_ok=True)
    for file, md5 in source.md5.items():
        failures = []
        for mirror in source.mirrors:
            try:
                pooch.retrieve(
                    mirror + file,
                    f"md5:{md5}",
                    fname=file,
                    path=place,
                    downloader=_Resuming(place / f"{file}.part"),
                )
                break
            except (OSError, ValueError) as error:  # no answer; a wrong sum
                failures.append(f"{mirror}: {error}")
        else:
            raise ConnectionError(
                f"lab: {file} of {name} could not be downloaded ({'; '.join(failures)}). Put the "
                f"files in a folder and set NORMALLY_DATA to it, or use --data digits; what has "
                f"come so far is kept in {place}."
            )
    return place


class _Resuming:
    """A downloader for pooch that asks for the rest of what it has already."""

    def __init__(self, part: Path) -> None:
        self.part = part

    def __call__(self, url: str, output_file: str, _: object) -> None:
        """Bring `url` to `output_file`, by way of the part that survives an interruption."""
        import requests

        have = self.part.stat().st_size if self.part.exists() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
            if answer.status_code == requests.codes.requested_range_not_satisfiable:
                have = 0  # nothing is missing; whether it is right, the sum will say
            else:
                answer.raise_for_status()
                self._save(answer, have if answer.status_code == requests.codes.partial else 0)
        # pooch moves the file into place when its sum is right and removes it when it is not:
        # then the next attempt starts from nothing.
        os.replace(self.part, output_file)

    def _save(self, answer: requests.Response, have: int) -> None:
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
        with (
            Progress(
                *columns,
                TransferSpeedColumn(),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            ) as bars,
            self.part.open("ab" if have else "wb") as file,
        ):
            bar = bars.add_task(self.part.stem, total=total, completed=have)
            for chunk in answer.iter_content(1 << 16):
                file.write(chunk)
                bars.advance(bar, len(chunk))
        if total is not None and self.part.stat().st_size < total:
            raise ConnectionError(f"{answer.url} ended after {self.part.stat().st_size:,} bytes")
