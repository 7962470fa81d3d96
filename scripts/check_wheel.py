"""Install the wheel of dist/ in a fresh environment, away from the checkout, and use it there.

Run by `make wheel`. An editable install hides what a wheel forgot to pack, so the check needs
its own environment and a working directory from which the sources cannot be imported.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FIRST_STEPS = """
import torch, normally
from normally import _native
assert _native.loaded, "the wheel's kernels were not loaded"
ours, theirs = normally.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
input = torch.randn(4, 3, 5, 7)
torch.testing.assert_close(ours(input), theirs(input))
print("imported from", normally.__path__[0])
"""


def instruction_sets() -> set[str]:
    """Return the libraries that CMakeLists.txt builds for this processor."""
    on_x86 = platform.machine().lower() in {"x86_64", "amd64"}
    return {"default", "avx2", "avx512"} if on_x86 else {"default"}


def check_contents(wheel: Path) -> None:
    """Exit with a message unless the wheel's tag and its libraries are the expected ones."""
    if not re.search(r"-py3-none-(?!any)[^-]+\.whl$", wheel.name):
        sys.exit(f"check_wheel: the tag must be py3-none-<platform>. Got {wheel.name}.")
    names = zipfile.ZipFile(wheel).namelist()
    packed = {found[1] for name in names if (found := re.search(r"/_C_(\w+)\.\w+$", name))}
    if packed != instruction_sets():
        sys.exit(f"check_wheel: needs {sorted(instruction_sets())}. Got {sorted(packed)}.")
    if "normally/py.typed" not in names:
        sys.exit("check_wheel: normally/py.typed is missing.")


def check_installed(wheel: Path, directory: Path) -> None:
    """Install the wheel with the lab's packages under `directory` and import it there."""
    environment = dict(os.environ, PYTHONWARNINGS="error::RuntimeWarning")
    venv.create(directory / "venv", with_pip=True)
    binaries = directory / "venv" / "bin"
    pip = [binaries / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    constraints = ["-c", ROOT / "constraints.txt"]
    for command in (
        [*pip, *constraints, "torch"],
        [*pip, *constraints, f"{wheel}[lab]"],
        [binaries / "python", "-c", FIRST_STEPS],
        [binaries / "normally", "env"],
    ):
        subprocess.run(command, cwd=directory, env=environment, check=True)


def main() -> None:
    """Check the only wheel in dist/."""
    wheels = list((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        sys.exit(f"check_wheel: dist/ must hold one wheel. Got {[w.name for w in wheels]}.")
    check_contents(wheels[0])
    with tempfile.TemporaryDirectory() as directory:
        check_installed(wheels[0], Path(directory))
    print(f"{wheels[0].relative_to(ROOT)}: {wheels[0].stat().st_size / 1024:.0f} KiB, works")


if __name__ == "__main__":
    main()
