"""Fuse around the sketch: the fusion passes in their order.

====================  ============================================================================
``share_sketches``    linears that read the same input: one sketch, one product
``fuse_activations``  activations and gated activations in front of a sketch
``fuse_epilogues``    bias, activation and residual behind a product
``fuse_norms``        norms in front of a sketch, with the addition that is still in front of them
``join_products``     a product and the sketch that alone reads it: last, as it takes the activation
                      from whichever of the two has it
====================  ============================================================================

An addition goes to the product that makes one of its operands rather than to the norm behind it:
the product writes the sum in place of its own output, and the norm reads one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, fx

from ss1_compile.passes.epilogue import fuse_epilogues
from ss1_compile.passes.join import join_products
from ss1_compile.passes.matching import PassResult, linears
from ss1_compile.passes.producers import fuse_activations, fuse_norms
from ss1_compile.passes.share import share_sketches


def fuse(
    graph: fx.Graph,
    values: Mapping[fx.Node, Tensor] | None = None,
    trace: Callable[[str], AbstractContextManager[dict[str, int]]] | None = None,
) -> Sequence[PassResult]:
    """Run all fusion passes over ``graph``, in place, unless :func:`why_not`.

    Args:
        graph: torch or ATen operators with example values in ``node.meta``.
        values: see :func:`~ss1_compile.passes.share.share_sketches`.
        trace: traces each pass by its name, as a :class:`~ss1_compile.passes.trace.PassTrace` does.

    Returns:
        What each pass did; nothing where no pass was run.
    """
    if why_not(graph) is not None:
        return ()
    passes: tuple[Callable[[fx.Graph], PassResult], ...] = (
        partial(share_sketches, values=values),
        fuse_activations,
        fuse_epilogues,
        fuse_norms,
        join_products,
    )
    names = ("share_sketches", "fuse_activations", "fuse_epilogues", "fuse_norms", "join_products")
    results: list[PassResult] = []
    for name, run in zip(names, passes, strict=True):
        with trace(name) if trace else nullcontext({}) as did:
            results.append(run(graph))
            did.update(results[-1].counts())
    graph.lint()
    return tuple(results)


def why_not(graph: fx.Graph) -> str | None:
    """Why the graph cannot be fused, or ``None`` if it can.

    The fused operators have no gradient, and under autocast the operators between two casts run in
    types that only dispatch decides.
    """
    if not linears(graph):
        return "it holds no SS1 layer"
    if torch.is_grad_enabled():
        return "gradients are on"
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled and node.args != (False,):
            return "gradients are turned on inside"
        if node.target is torch.amp.autocast_mode._enter_autocast and (
            len(node.args) < 3 or node.args[2] is not False
        ):
            return "autocast is turned on inside"
    return None
