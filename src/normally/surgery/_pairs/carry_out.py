"""Changes that are proved while the model runs on the example, and then done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch.utils import _pytree as pytree

from .._dataflow.calls import Pattern, evaluating
from .._dataflow.flow import Flow, Root
from .._dataflow.hooks import ours
from .._dataflow.trace import UntraceableError
from .._progress import told
from .._report import Change
from .proof import ProofError, prove


class Finding(Protocol):
    """A place in the data flow that a verb would change."""

    @property
    def root(self) -> Root:
        """The part of the model that it is in."""

    @property
    def path(self) -> str:
        """Of the norm, in the model."""

    @property
    def module(self) -> torch.nn.Module:
        """The norm."""

    @property
    def owner(self) -> str:
        """The innermost module in whose forward all of it is, by path in the model."""


F = TypeVar("F", bound=Finding)


class Group(NamedTuple, Generic[F]):
    """Findings that are proved and done together, and the module around them."""

    owner: Root
    findings: tuple[F, ...]

    def inside(self, path: str) -> str:
        """A path in the model as one from the owner."""
        return path.removeprefix(self.owner.path).lstrip(".")


class Verb(NamedTuple, Generic[F]):
    """What is done with findings."""

    name: str
    #: What does a group's change to its owner or to a copy; may raise UntraceableError.
    plan: Callable[[Group[F]], Callable[[torch.nn.Module], None]]
    #: What became of a norm, in words.
    note: Callable[[F], str]
    #: The modes in which the result must be the same.
    modes: tuple[bool, ...]
    #: Whether gradients and buffers must be the same as well.
    gradients: bool


def carry_out(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    findings: Sequence[F],
    flow: Flow,
    verb: Verb[F],
) -> list[Change]:
    """Prove each group on what its owner gets on the example; then do those that were proved.

    Returns:
        A line for each finding.
    """
    lines: dict[str, list[Change]] = {}
    changes: list[tuple[torch.nn.Module, Callable[[torch.nn.Module], None]]] = []

    def listen(group: Group[F]) -> Callable[..., None]:
        def prove_once(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            is_traced = any(isinstance(a, torch.fx.Proxy) for a in (*args, *kwargs.values()))
            if is_traced or group.owner.path in lines:
                return  # by the plan of a module around it, or called again
            with torch.enable_grad():
                lines[group.owner.path], change = _attempt(group, args, kwargs, verb)
            if change is not None:
                changes.append((module, change))
            tell(len(lines), len(groups))

        return prove_once

    groups = _groups(findings, flow)
    with ExitStack() as stack:
        tell = stack.enter_context(told(None, verb.name, True, unit="parts proved"))
        for group in groups:
            handle = group.owner.module.register_forward_pre_hook(
                ours(listen(group)), prepend=True, with_kwargs=True
            )
            stack.callback(handle.remove)
        stack.enter_context(evaluating(model))
        with torch.no_grad(), torch.random.fork_rng():
            model(*args, **kwargs)
    for module, change in changes:
        change(module)
    return [line for path in lines for line in lines[path]]


def _groups(findings: Sequence[F], flow: Flow) -> list[Group[F]]:
    """The findings by the modules in whose forwards they are."""
    owners = [_owner(finding, flow) for finding in findings]
    groups = []
    for owner in {owner.path: owner for owner in owners}.values():
        here = zip(findings, owners, strict=True)
        groups.append(Group(owner, tuple(f for f, o in here if o.path == owner.path)))
    return groups


def _owner(finding: Finding, flow: Flow) -> Root:
    """The innermost module around it whose calls have one pattern; the root's have."""
    root, path = finding.root, finding.owner
    while path != root.path:
        module = root.module.get_submodule(path.removeprefix(root.path).lstrip("."))
        pattern = flow.calls.patterns.get(module)
        if isinstance(pattern, Pattern):
            return Root(path, module, pattern, {})
        path = path.rpartition(".")[0]
    return root


def left(finding: Finding, reason: str) -> Change:
    """The line of a norm that stays as it is."""
    return Change(finding.path, type(finding.module).__name__, False, reason)


def _attempt(
    group: Group[F], args: Sequence[Any], kwargs: dict[str, Any], verb: Verb[F]
) -> tuple[list[Change], Callable[[torch.nn.Module], None] | None]:
    """Lines for the findings of a group, and the change that does those that were proved."""
    findings = group.findings
    try:
        change = verb.plan(group)
        deviation = prove(
            group.owner.module, change, args, kwargs, modes=verb.modes, gradients=verb.gradients
        )
    except (ProofError, UntraceableError) as error:
        if len(findings) == 1:
            return [left(findings[0], str(error))], None
        return _attempt_one_by_one(group, args, kwargs, verb, error)
    return [
        Change(f.path, type(f.module).__name__, True, verb.note(f), deviation) for f in findings
    ], change


def _attempt_one_by_one(
    group: Group[F],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    verb: Verb[F],
    error: Exception,
) -> tuple[list[Change], Callable[[torch.nn.Module], None] | None]:
    """Those that pass alone are then tried together."""
    lines, good = [], []
    for finding in group.findings:
        alone = group._replace(findings=(finding,))
        result, change = _attempt(alone, args, kwargs, verb)
        if change is None:
            lines += result
        else:
            good.append(finding)
    if len(good) == len(group.findings):
        return [left(f, f"together with the others {error}") for f in good], None
    if not good:
        return lines, None
    result, change = _attempt(group._replace(findings=tuple(good)), args, kwargs, verb)
    return lines + result, change


def output_deviation(
    model: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any], before: Any
) -> float:
    """How far the model's output in evaluation is from `before`, relative to the largest value."""
    with evaluating(model), torch.no_grad(), torch.random.fork_rng():
        after = model(*args, **kwargs)
    largest = 0.0
    for a, b in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True):
        if isinstance(a, torch.Tensor) and a.numel():
            apart = (a.double() - b.double()).abs().max().item()
            largest = max(largest, apart / max(a.double().abs().max().item(), 1e-300))
    return largest
