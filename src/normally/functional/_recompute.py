"""`memory_efficient`: an output is computed again in the backward, and not kept for it.

What follows a norm, a convolution above all, saves the norm's output for its own backward. The norm
keeps its input anyway, and its output is one pass over that. So a memory-efficient norm looks back:
in the graph behind its input and residual it finds the saved tensors that are outputs of such norms
before it, and puts a recipe in place of each, by the hooks that autograd has for a saved tensor.

All tensors are plain tensors, and what autograd knows of a saved one (its place in the graph, for a
backward through the backward) stays with autograd. A saved tensor is replaced only where the recipe
certainly gives its bits: by its `grad_fn` it is the norm's own output, and by its version it has
not been written to since. Every other stays.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._recipe import Kept, NormRecipe, Operand, Recipe, ReluRecipe, version_of

#: The most passes over memory that one output may take. Residual blocks feed each other, and a
#: chain of n outputs would take n²/2 of them: beyond this a residual is kept after all.
MAX_COST = 6

# In the metadata of an autograd node: a weak reference to the recipe of what it gave, which the
# replaced tensors hold, so that a backward frees it; and that `replace_saved` has been there.
_RECIPE, _SEEN = "normally.recipe", "normally.recipes_placed"


def is_possible() -> bool:
    """Whether nobody else says how tensors are saved, as checkpoints and offloading do."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def replace_saved(*tensors: Tensor | None) -> None:
    """Replace what is saved behind these tensors, as far back as the next memory-efficient norms.

    No node is looked at twice, so that all calls together walk the graph once.
    """
    nodes: list[Any] = [t.grad_fn for t in tensors if t is not None]
    while nodes:
        node = nodes.pop()
        if node is None or _SEEN in node.metadata:
            continue
        node.metadata[_SEEN] = True
        for saved, tensor in _saved_by(node):
            recipe = _recipe_of(tensor)
            if recipe is not None:
                saved.register_hooks(lambda _, recipe=recipe: recipe, Recipe.compute)
        nodes.extend(before for before, _ in node.next_functions)


def stats_of(output: Tensor) -> Tensor:
    """What the node of a norm's output has saved as its statistics."""
    node: Any = output.grad_fn
    stats: Tensor = node._raw_saved_tensors[-1].data
    return stats


def attach(output: Tensor, operands: tuple[Tensor | None, ...], settings: tuple[Any, ...]) -> None:
    """Give the node of a norm's output its recipe.

    Args:
        output: just made, by a node that saves what `_ops.batch_norm_autograd.remember` does.
        operands: input, weight, bias, residual and mask, as the operator took them.
        settings: what the operator takes after them, for the same bits.
    """
    input, weight, bias, residual, mask = operands
    assert input is not None
    node: Any = output.grad_fn
    saved = node._raw_saved_tensors
    if saved[0].data is None:
        return  # constants alone: to keep the input for a recipe would save nothing
    added = None if residual is None else _operand(residual)
    recipe = NormRecipe(output, _operand(input), weight, bias, added, mask, settings)
    # The norm's own saved input holds the recipe until the norm's backward has run.
    saved[0].register_hooks(lambda _: recipe, lambda recipe: recipe.input.compute())
    if isinstance(added, Recipe) and saved[3].data is not None:
        saved[3].register_hooks(lambda _: added, Recipe.compute)
    node.metadata[_RECIPE] = weakref.ref(recipe)
    node.metadata[_SEEN] = True


def _operand(tensor: Tensor) -> Operand:
    recipe = _recipe_of(tensor)
    if recipe is None:
        return Kept(tensor)
    if recipe.cost >= MAX_COST:
        recipe.hold(tensor)
    return recipe


def _recipe_of(tensor: Tensor) -> Recipe | None:
    """The recipe of a tensor as it is now."""
    recipe = _recipe_at(tensor.grad_fn)
    if recipe is None or version_of(tensor) != recipe.version:
        return None
    return recipe if tensor.data_ptr() == recipe.address else None


def _recipe_at(node: Any) -> Recipe | None:
    """The recipe of what a node gave."""
    if node is None:
        return None
    reference = node.metadata.get(_RECIPE)
    recipe: Recipe | None = None if reference is None else reference()
    if recipe is None and node.name() == "ReluBackward0":
        norm = _recipe_at(node.next_functions[0][0])
        if isinstance(norm, NormRecipe):
            recipe = ReluRecipe(norm)
            node.metadata[_RECIPE] = weakref.ref(recipe)
    return recipe


def _saved_by(node: Any) -> Iterator[tuple[Any, Tensor]]:
    """What a node saves: autograd's handle, and the tensor."""
    for name in _names(node.__class__):
        try:
            saved = getattr(node, name)
        except RuntimeError:  # freed by a backward
            continue
        several = isinstance(saved, (tuple, list))
        for one in saved if several else (saved,):
            if one.unpack_hook is not None:  # somebody else's, or ours from before
                continue
            try:
                # The attribute knows the node, which what the node itself gave needs.
                tensor = one.unpack() if several else getattr(node, name.removeprefix("_raw"))
            except RuntimeError:  # freed, or written to since: the backward will say so
                continue
            if tensor is not None:
                yield one, tensor


@functools.cache
def _names(cls: type) -> tuple[str, ...]:
    return tuple(name for name in dir(cls) if name.startswith("_raw_saved_"))
