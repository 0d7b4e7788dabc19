"""Attention operators become linear layers and what is between them, and compute the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ss1_compile import Report


def through_the_backend(model, args, expected_names, **kwargs):
    """At c = 1 the outputs are the model's, and the named weights were rewritten."""
    torch._dynamo.reset()
    report = Report()
    options = {"reduction": 1, "inner_backend": "eager", "report": report}
    with torch.no_grad():
        expected = model(*args, **kwargs)
        actual = torch.compile(model, backend="ss1", options=options)(*args, **kwargs)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)
    assert {row.name for row in report.compressed} == expected_names
    assert not report.left


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_multi_head_attention_forward(need_weights, masked, wide):
    torch.manual_seed(0)
    widths = {"kdim": 48, "vdim": 40} if wide else {}
    model = nn.MultiheadAttention(64, 4, add_bias_kv=True, add_zero_attn=True, **widths)
    model = model.double().eval()
    x = torch.randn(6, 3, 64, dtype=torch.double)
    key = torch.randn(5, 3, model.kdim, dtype=torch.double)
    value = torch.randn(5, 3, model.vdim, dtype=torch.double)
    kwargs = {"need_weights": need_weights}
    if masked:
        kwargs["attn_mask"] = torch.randn(6, 5, dtype=torch.double)
    packed = {"q_proj_weight", "k_proj_weight", "v_proj_weight"} if wide else {"in_proj_weight"}
    through_the_backend(model, (x, key, value), {*packed, "out_proj"}, **kwargs)


@pytest.mark.parametrize("need_weights", [False, True])
def test_native_attention(need_weights):
    torch.manual_seed(1)
    weights = nn.MultiheadAttention(64, 4).double().eval().requires_grad_(False)

    class Native(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = weights

        def forward(self, x):
            qkv = self.inner.in_proj_weight, self.inner.in_proj_bias
            proj = self.inner.out_proj.weight, self.inner.out_proj.bias
            given = (x, x, x, 64, 4, *qkv, *proj, None, need_weights)
            out, attention = torch._native_multi_head_attention(*given)
            return (out, attention) if need_weights else out

    x = torch.randn(2, 7, 64, dtype=torch.double)
    through_the_backend(Native(), (x,), {"inner.in_proj_weight", "inner.out_proj"})


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_encoder_layer(norm_first, activation):
    torch.manual_seed(2)
    model = nn.TransformerEncoderLayer(
        64, 4, 96, batch_first=True, norm_first=norm_first, activation=activation
    )
    x = torch.randn(2, 7, 64, dtype=torch.double)
    names = {"self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"}
    through_the_backend(model.double().eval(), (x,), names)


@pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key(
        "aten::_transformer_encoder_layer_fwd", "Meta"
    ),
    reason="Dynamo breaks the graph at this layer, which has no symbolic shapes before torch 2.13",
)
def test_symbolic_arguments():
    """With dynamic=True even the number of heads and the norms' epsilon are symbolic."""
    torch.manual_seed(3)
    model = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).double().eval()
    report = Report()
    options = {"reduction": 1, "inner_backend": "eager", "report": report}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="ss1", dynamic=True, options=options)
    for rows, length in ((2, 7), (3, 5)):
        x = torch.randn(rows, length, 64, dtype=torch.double)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), atol=1e-10, rtol=1e-10)
    assert len(report.compressed) == 4
    assert not report.left


def test_masks_of_the_fused_layer_are_reported():
    """What the kernel does with rows that are all masked is its own affair."""
    torch.manual_seed(4)
    model = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).eval()
    model = nn.ModuleDict({"layer": model, "out": nn.Linear(64, 64)})

    def forward(x, padding):
        return model["out"](model["layer"](x, src_key_padding_mask=padding))

    report = Report()
    options = {"reduction": 1, "inner_backend": "eager", "report": report}
    x, padding = torch.randn(2, 5, 64), torch.arange(5) >= torch.tensor([[5], [3]])
    with torch.no_grad():
        expected = forward(x, padding)
        actual = torch.compile(forward, backend="ss1", options=options)(x, padding)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    fused = [row for row in report.left if "transformer_encoder_layer" in row.op]
    spelt_out = [row for row in report.compressed if "in_proj" in row.name]
    assert len(fused) == 4 or spelt_out
    assert len(report) >= 5


def test_layers_that_are_not_wanted_keep_the_operator():
    model = nn.MultiheadAttention(64, 4).eval()
    report = Report()
    options = {
        "reduction": 2,
        "inner_backend": "eager",
        "report": report,
        "exclude": ("*",),
        "allow_empty": True,
    }
    x = torch.randn(5, 2, 64)
    with torch.no_grad():
        expected = model(x, x, x)
        actual = torch.compile(model, backend="ss1", options=options)(x, x, x)
    torch.testing.assert_close(actual, expected)
    assert {row.op for row in report} == {F.multi_head_attention_forward.__name__}
    assert all("excluded" in row.reason for row in report)
