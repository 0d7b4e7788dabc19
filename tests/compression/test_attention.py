"""``SS1MultiheadAttention`` does what ``nn.MultiheadAttention`` does, whatever it is asked."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ss1_compile
from ss1_compile import SS1Linear
from ss1_compile.compression.attention import SS1MultiheadAttention
from ss1_compile.errors import CalibrationError, CheckpointError, StructureError

QUIET = {"progress": False, "warn_error": 2.0}


def attention(**options):
    made = nn.MultiheadAttention(64, 4, **options).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


class Holder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = attention(**options)

    def forward(self, *args, **kwargs):
        return self.attention(*args, **kwargs)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    batch_first=st.booleans(),
    batched=st.booleans(),
    bias=st.booleans(),
    wide=st.booleans(),
    add_bias_kv=st.booleans(),
    add_zero_attn=st.booleans(),
    need_weights=st.booleans(),
    average=st.booleans(),
    padding=st.sampled_from([None, "bool", "float"]),
    mask=st.sampled_from([None, "bool", "float", "heads", "causal"]),
)
def test_equals_the_original(
    seed,
    batch_first,
    batched,
    bias,
    wide,
    add_bias_kv,
    add_zero_attn,
    need_weights,
    average,
    padding,
    mask,
):
    torch.manual_seed(seed)
    widths = {"kdim": 48, "vdim": 40} if wide else {}
    made = attention(
        bias=bias,
        batch_first=batch_first,
        add_bias_kv=add_bias_kv,
        add_zero_attn=add_zero_attn,
        **widths,
    )
    batch, length, source = (3 if batched else 1), 6, 6 if mask == "causal" else 5

    def tokens(count, width):
        x = torch.randn(batch, count, width, dtype=torch.double)
        if not batched:
            return x[0]
        return x if batch_first else x.transpose(0, 1).contiguous()

    query = tokens(length, 64)
    key, value = tokens(source, made.kdim), tokens(source, made.vdim)
    options = {"need_weights": need_weights, "average_attn_weights": average}
    if padding is not None:
        ignored = torch.zeros(batch, source, dtype=torch.bool)
        ignored[:, -1] = True
        ignored = ignored if batched else ignored[0]
        options["key_padding_mask"] = (
            ignored if padding == "bool" else torch.randn(ignored.shape, dtype=torch.double)
        )
    if mask == "causal":
        options["attn_mask"] = torch.ones(length, source, dtype=torch.bool).triu(1)
        # with more keys than the mask has columns the hint means something else, in both
        options["is_causal"] = not (add_bias_kv or add_zero_attn)
    elif mask == "bool":
        options["attn_mask"] = torch.rand(length, source) > 0.7
        options["attn_mask"][:, 0] = False
    elif mask is not None:
        shape = (length, source) if mask == "float" else (batch * 4, length, source)
        options["attn_mask"] = torch.randn(shape, dtype=torch.double)
    if padding == "float" and "attn_mask" in options and options["attn_mask"].dtype == torch.bool:
        options["key_padding_mask"] = options["key_padding_mask"] > 1.0
        options["key_padding_mask"][..., 0] = False
    expected, weights = made(query, key, value, **options)
    out, found = SS1MultiheadAttention(made)(query, key, value, **options)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
    assert (found is None) == (weights is None)
    if weights is not None:
        torch.testing.assert_close(found, weights, atol=1e-10, rtol=1e-10)


def test_compress_is_exact_at_one_and_smaller_at_four():
    torch.manual_seed(0)
    model, x = Holder(batch_first=True), torch.randn(2, 7, 64, dtype=torch.double)
    expected = model(x, x, x)[0]
    exact = copy.deepcopy(model)
    report = ss1_compile.compress(exact, reduction=1, **QUIET)
    names = ["q_proj", "k_proj", "v_proj", "out_proj"]
    assert [row.name for row in report.compressed] == [f"attention.{name}" for name in names]
    torch.testing.assert_close(exact(x, x, x)[0], expected, atol=1e-10, rtol=1e-10)
    ss1_compile.compress(model, reduction=4, **QUIET)
    assert {f"attention.{name}.{part}" for name in names for part in ("z", "bias", "sketch")} == {
        *model.state_dict()
    }
    dense = copy.deepcopy(model)
    for name in names:
        layer = getattr(dense.attention, name)
        assert isinstance(layer, SS1Linear)
        setattr(dense.attention, name, layer.to_linear())
    torch.testing.assert_close(model(x, x, x)[0], dense(x, x, x)[0], atol=1e-10, rtol=1e-10)
    stored = sum(p.numel() for p in model.parameters())
    assert stored == 4 * 64 * 64 // 4 + 4 * 64


@pytest.mark.parametrize("sequential", [False, True])
def test_calibrates(sequential):
    torch.manual_seed(1)
    basis = torch.randn(8, 64, dtype=torch.double)  # inputs of rank 8: the average is far off

    def batch():
        x = torch.randn(4, 16, 8, dtype=torch.double) @ basis
        return (x, torch.randn(4, 16, 8, dtype=torch.double) @ basis, x)

    data, held_out = [batch() for _ in range(8)], batch()
    base = Holder(batch_first=True)
    expected = base(*held_out)[0]

    def error(**options):
        model = copy.deepcopy(base)
        ss1_compile.compress(model, reduction=2, **QUIET, **options)
        return ((model(*held_out)[0] - expected).norm() / expected.norm()).item()

    assert error(calibration=data, sequential=sequential) < 0.8 * error()


def test_statistics_of_the_packed_weight_reach_its_parts():
    torch.manual_seed(2)
    model = Holder(batch_first=True)
    x = torch.randn(2, 40, 64, dtype=torch.double)
    statistics = ss1_compile.calibrate(model, [(x, x, x)], progress=False)
    assert set(statistics) == {"attention.in_proj_weight", "attention.out_proj.weight"}
    report = ss1_compile.compress(
        model, reduction=2, calibration=statistics, projection="calibrated", **QUIET
    )
    assert {row.projection for row in report} == {"calibrated"}
    assert {row.error_of for row in report} == {"output"}


def test_leaves_the_model_as_it_was_where_nothing_is_compressed():
    model = nn.ModuleDict({"a": Holder(), "out": nn.Linear(64, 64).double()})
    before = model["a"].attention
    report = ss1_compile.compress(model, reduction=2, exclude=("a.*",), **QUIET)
    assert model["a"].attention is before
    assert len(report) == 5
    assert len(report.compressed) == 1
    ss1_compile.compress(model, reduction=2, dry_run=True, **QUIET)
    assert model["a"].attention is before
    with pytest.raises(CalibrationError):
        ss1_compile.compress(model, reduction=2, projection="calibrated", **QUIET)
    assert model["a"].attention is before


def test_parts_left_dense_own_their_memory():
    model = Holder()
    expected = model.attention.in_proj_weight[:64].clone()
    ss1_compile.compress(model, reduction=2, exclude=("*.q_proj",), **QUIET)
    weight = model.attention.q_proj.weight
    assert torch.equal(weight, expected)
    assert weight.untyped_storage().nbytes() == 64 * 64 * 8


def test_trains():
    torch.manual_seed(3)
    model = Holder(batch_first=True, dropout=0.5).train()
    model.attention.in_proj_weight.requires_grad_(False)
    ss1_compile.compress(model, reduction=4, **QUIET)
    attention = model.attention
    assert [p.requires_grad for p in (attention.q_proj.z, attention.out_proj.z)] == [False, True]
    x = torch.randn(2, 5, 64, dtype=torch.double)
    first, second = model(x, x, x)[0], model(x, x, x)[0]
    assert not torch.equal(first, second)  # dropout
    first.sum().backward()
    assert attention.out_proj.z.grad is not None


def test_reports_what_it_cannot_replace():
    class Subclass(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"subclass": Subclass(64, 4), "out": nn.Linear(64, 64)})
    report = ss1_compile.compress(model, reduction=2, **QUIET)
    reasons = {row.name: row.reason for row in report if not row.compressed}
    assert set(reasons) == {"subclass.in_proj_weight", "subclass.out_proj"}
    assert all("fused operator" in reason for reason in reasons.values())


def test_refuses_what_the_original_refuses():
    made = SS1MultiheadAttention(attention(batch_first=True))
    x = torch.randn(2, 5, 64, dtype=torch.double)
    with pytest.raises(StructureError, match="is_causal"):
        made(x, x, x, is_causal=True)
    with pytest.raises(StructureError, match="equal batch and length"):
        made(x, x, x[:, :3])


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_layers_use_it(norm_first):
    torch.manual_seed(4)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 9, 64)
    padding = torch.arange(9) >= torch.tensor([[9], [6]])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        ss1_compile.compress(model, reduction=1, **QUIET)
        out = model(x, src_key_padding_mask=padding)
    assert sum(isinstance(m, SS1Linear) for m in model.modules()) == 12
    torch.testing.assert_close(out[~padding], expected[~padding], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_saves_and_loads(tmp_path, device):
    torch.manual_seed(5)

    def make():
        model = nn.ModuleDict(
            {"a": nn.MultiheadAttention(64, 4), "b": nn.MultiheadAttention(64, 4)}
        )
        return model.eval()

    model, x = make(), torch.randn(5, 2, 64)
    ss1_compile.compress(model, reduction=2, exclude=("b.*", "a.v_proj"), **QUIET)
    ss1_compile.save(model, tmp_path)
    with torch.device(device):
        skeleton = make()
    loaded = ss1_compile.load(skeleton, tmp_path)
    assert isinstance(loaded["a"], SS1MultiheadAttention)
    assert isinstance(loaded["b"], nn.MultiheadAttention)
    assert isinstance(loaded["a"].v_proj, nn.Linear)
    with torch.no_grad():
        for name in ("a", "b"):
            assert torch.equal(loaded[name](x, x, x)[0], model[name](x, x, x)[0])
    other = nn.ModuleDict({"a": nn.MultiheadAttention(32, 4), "b": nn.MultiheadAttention(64, 4)})
    before = other["a"]
    with pytest.raises(CheckpointError):
        ss1_compile.load(other, tmp_path)
    assert other["a"] is before
