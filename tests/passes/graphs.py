"""Hand-built graphs for the fusion passes, and their float64 reference."""

import operator

import torch
from torch import fx

from ss1_compile import SS1Structure
from ss1_compile.kernels import reference
from ss1_compile.passes.matching import values_of


def layer(k, n, reduction=2, seed=0, bias=True, dtype=torch.float64):
    """``(sketch, z, bias)`` of a random layer."""
    structure = SS1Structure.create(k, n, reduction, block_k=8, seed=seed)
    z = torch.randn(n, structure.reduced_features, dtype=dtype)
    return structure.code.clone(), z, torch.randn(n, dtype=dtype) if bias else None


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


class _Recording(fx.Interpreter):
    def run_node(self, n):
        n.meta["example_value"] = result = super().run_node(n)
        return result


def capture(function, *inputs):
    """The graph of ``function(linear, *inputs)`` with example values, and those of its inputs."""
    gm = fx.symbolic_trace(_of_fixed_arity(function, len(inputs)))
    for node in list(gm.graph.nodes):  # a missing bias is no tensor
        if node.op == "placeholder" and inputs[int(node.name.removeprefix("a"))] is None:
            node.replace_all_uses_with(None)
            gm.graph.erase_node(node)
    gm.recompile()
    tensors = [tensor for tensor in inputs if tensor is not None]
    _Recording(gm).run(*(tensor.clone() for tensor in tensors))
    return gm, tensors, values_of(gm.graph, tensors)


def _of_fixed_arity(function, count):
    """What ``fx`` traces names its inputs a0, a1, …"""
    names = ", ".join(f"a{i}" for i in range(count))
    scope = {"function": function, "linear": torch.ops.ss1.linear.default}
    return eval(f"lambda {names}: function(linear, {names})", scope)


def iadd(a, b):
    """``a += b``, which ``fx`` would trace as ``a = a + b``."""
    if isinstance(a, fx.Proxy):
        return a.tracer.create_proxy("call_function", operator.iadd, (a, b), {})
    return operator.iadd(a, b)


def targets(gm):
    """How often the graph calls each SS1 operator."""
    found = {}
    for node in gm.graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "ss1":
            name = target._schema.name.removeprefix("ss1::")
            found[name] = found.get(name, 0) + 1
    return found


def check(run, function, *inputs, expect, ops=None, tolerance=1e-9):
    """Run the pass on the captured function; compare with the reference, and what was done.

    Returns:
        The rewritten module and what ``run`` returned.
    """
    gm, tensors, values = capture(function, *inputs)
    before = gm.code
    result = run(gm.graph, values)
    gm.graph.lint()
    gm.recompile()
    results = result if isinstance(result, tuple) else (result,)
    counts = {what: n for r in results for what, n in r.counts().items()}
    assert counts == expect
    if ops is not None:
        assert targets(gm) == ops
    if not expect:
        assert gm.code == before
    expected = function(reference.linear, *(t if t is None else t.clone() for t in inputs))
    actual = gm(*(tensor.clone() for tensor in tensors))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    return gm, result
