"""Linear layers in the bodies of higher-order operators are reported, whatever the operator."""

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._higher_order_ops.associative_scan import associative_scan  # noqa: F401 - registers it

from ss1_compile import Report
from ss1_compile.nested import nested_linears

D = 64


class Branches(nn.Module):
    """A branch in a branch."""

    def __init__(self):
        super().__init__()
        self.first, self.yes, self.no = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x):
        def positive(h):
            return torch.cond(h.mean() > 1, self.yes, torch.sin, (h,))

        h = self.first(x)
        return torch.cond(h.sum() > 0, positive, lambda h: self.no(h), (h,))


def reported(model, x):
    torch._dynamo.reset()
    report = Report()
    options = {"reduction": 1, "report": report, "inner_backend": "eager"}
    with torch.no_grad():
        y = torch.compile(model, backend="ss1", options=options)(x)
        torch.testing.assert_close(y, model(x))
    torch._dynamo.reset()
    assert {row.name for row in report.compressed} == {"first"}
    return {row.name: row.reason for row in report.left}


def test_branches():
    reasons = reported(Branches(), torch.randn(5, D))
    assert reasons.keys() == {"yes", "no"}
    assert all("inside cond" in reason for reason in reasons.values())


def test_bodies_with_more_inputs_than_operands():
    """associative_scan hands each scanned tensor to its body twice, what the body captures once."""
    body = fx.Graph()
    inputs = [body.placeholder(name) for name in ("a", "b", "c", "d", "w")]
    made = body.call_function(F.linear, (inputs[0], inputs[4]))
    body.output((made, inputs[1]))
    root = nn.Module()
    root.combine = fx.GraphModule(nn.Module(), body)
    graph = fx.Graph()
    x, y, weight = (graph.placeholder(name) for name in ("x", "y", "weight"))
    operands = (graph.get_attr("combine"), [x, y], (weight,))
    scan = graph.call_function(torch.ops.higher_order.associative_scan, operands)
    graph.output(scan)
    for node in (*inputs, made, x, y, weight):
        node.meta["example_value"] = torch.randn(D, D)
    ((entry, name),) = nested_linears(root, scan, {weight: "inside"})
    assert name == "inside"
    assert entry.node is made
    assert entry.reason.startswith("inside associative_scan")
