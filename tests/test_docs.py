"""What the README, the pages of docs/ and the examples say is what happens."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch

from normally import functional

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")],
    key=lambda page: page.relative_to(ROOT).as_posix(),
)
SPECIFICATIONS = sorted((ROOT / "docs" / "layers").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
_FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")

# torch scripts its own decompositions when they are first used.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.script(_method)?` is deprecated:DeprecationWarning"
)


def blocks(text: str, *languages: str) -> list[tuple[int, str]]:
    """(line, content) of the fenced blocks in these languages."""
    return [
        (text.count("\n", 0, match.start(3)), match[3])
        for match in _FENCE.finditer(text)
        if match[2] in languages
    ]


def test_blocks_are_found() -> None:
    text = "a\n```pycon\n>>> 1\n1\n```\nb\n```sh\nmake\n```\n"
    assert blocks(text, "pycon") == [(2, ">>> 1\n1\n")]
    assert blocks(text, "sh", "text") == [(7, "make\n")]
    with_code = {p.name for p in PAGES if blocks(p.read_text("utf-8"), "pycon")}
    assert with_code >= {"README.md", "masks.md", *(page.name for page in SPECIFICATIONS)}


#: What a layer's page has, in this order.
SECTIONS = [
    "Forward", "Training and evaluation", "Backward", "Masks", "Data types", "Memory layouts",
    "Numerical decisions", "Errors", "Implementation limits", "Performance tips", "Examples",
]  # fmt: skip


def test_every_norm_has_its_specification() -> None:
    """A function's page has its name; `add_…` is on the page of its norm. One is a layer's."""
    norms = {name.removeprefix("add_") for name in functional.__all__} | {"sync_batch_norm"}
    assert {page.stem for page in SPECIFICATIONS} == norms
    for listing in ("README.md", "docs/index.md"):
        text = (ROOT / listing).read_text("utf-8")
        assert all(f"layers/{page.name})" in text for page in SPECIFICATIONS), listing


@pytest.mark.parametrize("page", SPECIFICATIONS, ids=lambda page: page.name)
def test_a_specification_has_every_section(page: Path) -> None:
    headings = re.findall(r"^## (.+)$", _FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    assert [heading for heading in headings if heading in SECTIONS] == SECTIONS
    functions = [name for name in functional.__all__ if name.removeprefix("add_") == page.stem]
    text = page.read_text("utf-8")
    for function in functions:
        assert f"normally.functional.{function}`" in text
        for option in inspect.signature(getattr(functional, function)).parameters:
            assert re.search(rf"`{option}\b", text), f"{function}({option}) is not explained"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_code(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A page's examples run from top to bottom in one namespace and print what is shown."""
    namespace: dict[str, object] = {"__name__": page.stem}
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)
    text = page.read_text("utf-8")
    torch.manual_seed(0)
    for line, code in blocks(text, "python", "pycon"):
        if ">>>" not in code:
            exec(compile(code, f"{page}:{line}", "exec"), namespace)
            continue
        test = parser.get_doctest(code, namespace, page.name, str(page), line)
        runner.run(test, clear_globs=False)
        namespace.update(test.globs)  # the runner works on a copy
    if runner.failures:
        pytest.fail(capsys.readouterr().out)


def commands() -> list[tuple[str, str]]:
    """(page, line) of every shell line of ours in a fenced block."""
    found = []
    for name, page in zip(NAMES, PAGES, strict=True):
        for _, content in blocks(page.read_text("utf-8"), "sh"):
            for line in content.splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] in ("make", "normally", "python"):
                    found.append((name, shlex.join(words)))
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_exist(page: str, command: str) -> None:
    """Names and options of a shell line are known; nothing is run."""
    program, *words = shlex.split(command)
    if program == "make":
        target = next(word for word in words if "=" not in word)
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    elif program == "python":
        assert (ROOT / words[0]).is_file(), f"{page}: {command}"
    else:
        _parse(words)


def _parse(words: list[str]) -> None:
    import typer

    from normally import cli
    from normally.lab import registry

    group = typer.main.get_command(cli.create_app())
    path = []
    while hasattr(group, "commands"):
        path.append(words[0])
        assert words[0] in group.commands, f"normally has no command {' '.join(path)}"
        group, words = group.commands[words[0]], words[1:]
    given = group.make_context(path[-1], list(words)).params
    if path == ["lab", "run"]:
        for name in given["names"] or ():
            assert name in registry.experiments()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_lead_somewhere(page: Path) -> None:
    """mkdocs checks docs/ alone; the README's and CONTRIBUTING's links are checked here."""
    text = _FENCE.sub("", page.read_text("utf-8"))
    for target in _LINK.findall(text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else page.parent / path
        assert file.is_file(), f"{page.name}: {target}"
        if anchor:
            assert anchor in _anchors(file.read_text("utf-8")), f"{page.name}: {target}"


def _anchors(markdown: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", markdown), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"\s+", "-", heading) for heading in plain}


def load(example: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(example.stem, example)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_test() -> None:
    assert [example.stem for example in EXAMPLES] == [
        "adaptation",  # in tests/surgery/test_adapt.py
        "diffusion_block",
        "distributed",  # in tests/distributed/test_example.py
        "drop_in",
        "padded_sequences",
        "residual_block",
        "transformer_block",
    ]


def test_drop_in(capsys: pytest.CaptureFixture[str]) -> None:
    example = load(ROOT / "examples" / "drop_in.py")
    example.main(["--epochs", "1"])
    output = capsys.readouterr().out
    assert "largest difference of the losses" in output
    assert "training step, torch / normally" in output
    # 15 steps from roundings of 1e-16; the m-1 variance instead of m would show above 1e-5.
    difference, ratio = example.run(1, torch.float64)
    assert difference <= 1e-11
    assert ratio > 0


def test_residual_block(capsys: pytest.CaptureFixture[str]) -> None:
    example = load(ROOT / "examples" / "residual_block.py")
    example.main()
    assert "running statistics" in capsys.readouterr().out
    differences = example.compare()
    assert list(differences) == [
        "output",
        "gradient of the input",
        "gradients of the parameters",
        "running statistics",
    ]
    # float64: sums of 1568 terms of size 1, so 1e-13 each, through two layers.
    assert max(differences.values()) <= 1e-11


def test_transformer_block(capsys: pytest.CaptureFixture[str]) -> None:
    example = load(ROOT / "examples" / "transformer_block.py")
    example.main()
    assert "RMSNorm" in capsys.readouterr().out
    for pair in example.PAIRS.values():
        differences = example.compare(*pair)
        assert list(differences) == ["output", "gradients"]
        # float64: values of size 1 to 10 through nine layers, sums of at most 128 terms.
        assert max(differences.values()) <= 1e-12


def test_diffusion_block(capsys: pytest.CaptureFixture[str]) -> None:
    example = load(ROOT / "examples" / "diffusion_block.py")
    example.main()
    assert "gradients of the parameters" in capsys.readouterr().out
    differences = example.compare()
    assert list(differences) == [
        "output",
        "gradient of the input",
        "gradients of the parameters",
    ]
    # float64: sums of 576 terms of size 1 in the convolutions, through two of them.
    assert max(differences.values()) <= 1e-11


def test_padded_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    example = load(ROOT / "examples" / "padded_sequences.py")
    example.main()
    assert "lengths=" in capsys.readouterr().out
    # float64: roundings of 1e-16 through 20 steps.
    assert example.difference(example.MaskedNetwork) <= 1e-12
    assert example.difference(example.TorchNetwork) >= 1e-3
