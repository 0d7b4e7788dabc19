import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import ss1_compile.kernels  # noqa: F401 - registers torch.ops.ss1
from ss1_compile.kernels import fused_portable, layout, reference

OPS = torch.ops.ss1
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
EPS = 1e-3
ACTIVATIONS = {
    "none": lambda v: v,
    "relu": lambda v: v.clamp(min=0),
    "gelu": lambda v: v * 0.5 * (1 + torch.special.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: (
        v * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    ),
    "silu": lambda v: v / (1 + torch.exp(-v)),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}

both_kinds = pytest.mark.parametrize("kind", ["rotation", "learned"])


def make_sketch(kind, features, hashes, reduction=3, dtype=torch.float64, block_k=16):
    """A rotation code, or learned blocks of the same sizes; ``features`` may be ragged."""
    size = reduction * block_k
    groups = -(-features // size)
    if kind == "learned":
        # of orthonormal columns' size: float16 overflows where sketches follow one another
        return torch.randn(hashes, groups, size, block_k, dtype=dtype) / size**0.5
    rotations = torch.randint(0, block_k // 8, (hashes, groups, reduction)) * 8
    return layout.pack(rotations, torch.randn(rotations.shape))


def reduced_of(sketch, block_k=16):
    return sketch.shape[1] * block_k


def sketch_reference(x, sketch, reduced):
    """``X̃`` in float64 through the definition: row ``n`` of an identity z picks slot n."""
    x = x.cpu().double()
    each = torch.eye(reduced, dtype=torch.float64)
    return torch.stack(
        [reference.linear(x, sketch[j : j + 1], each.repeat(1, 1)) for j in range(sketch.shape[0])]
    )


def norm_reference(s, weight, bias, rms):
    s = s.cpu().double()
    if not rms:
        s = s - s.mean(-1, keepdim=True)
    n = s / torch.sqrt((s * s).mean(-1, keepdim=True) + EPS)
    n = n if weight is None else n * weight.cpu().double()
    return n if bias is None else n + bias.cpu().double()


def matmul_reference(sketched, z, bias, residual, activation):
    columns = []
    for part, start in zip(z, bias, strict=True):
        width = -(-part.shape[0] // sketched.shape[0])
        rows = part.cpu().double().split(width)
        y = torch.cat([sketched[j].cpu().double() @ r.T for j, r in enumerate(rows)], 1)
        columns.append(y if start is None else y + start.cpu().double())
    y = ACTIVATIONS[activation](torch.cat(columns, 1))
    return y if residual is None else y + residual.cpu().double()


def assert_near(actual, expected):
    """Relative error in the Frobenius norm; NaN never passes."""
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    error = (actual.cpu().double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= TOLERANCE[actual.dtype], f"relative error {error:.1e}"


def optional(wanted, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype) if wanted else None


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 6),
    st.integers(1, 70),
    st.integers(1, 3),
    st.sampled_from(["rotation", "learned"]),
    st.tuples(*[st.booleans()] * 5),
)
def test_norm_sketch_is_the_sketch_of_the_norm(rows, features, hashes, kind, options):
    has_residual, has_weight, has_bias, rms, keep_norm = options
    sketch = make_sketch(kind, features, hashes)
    reduced = reduced_of(sketch)
    x = torch.randn(rows, features, dtype=torch.float64) + 1
    residual = optional(has_residual, rows, features)
    weight, bias = optional(has_weight, features), optional(has_bias, features)
    sketched, summed, normed = OPS.norm_sketch(
        x, residual, weight, bias, sketch, reduced, EPS, rms, keep_norm
    )
    s = x if residual is None else x + residual
    expected = norm_reference(s, weight, bias, rms)
    assert_near(sketched, sketch_reference(expected, sketch, reduced))
    assert torch.equal(summed, s) if has_residual else summed.shape == (0,)
    if keep_norm:
        assert_near(normed, expected)
    else:
        assert normed.shape == (0,)


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 6),
    st.integers(1, 70),
    st.integers(1, 3),
    st.sampled_from(["rotation", "learned"]),
    st.sampled_from([*ACTIVATIONS]),
    st.booleans(),
)
def test_activation_sketch_is_the_sketch_of_the_activation(
    rows, features, hashes, kind, activation, gated
):
    sketch = make_sketch(kind, features, hashes)
    reduced = reduced_of(sketch)
    both = torch.randn(rows, 2 * features, dtype=torch.float64)
    gate, x = both.split(features, dim=1)  # slices of one GEMM's output
    value = ACTIVATIONS[activation](gate) * x if gated else ACTIVATIONS[activation](x)
    sketched = OPS.activation_sketch(x, gate if gated else None, sketch, reduced, activation)
    assert_near(sketched, sketch_reference(value, sketch, reduced))


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 6),
    st.integers(1, 40),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(3, 20), st.booleans()), min_size=1, max_size=3),
    st.sampled_from([*ACTIVATIONS]),
    st.booleans(),
)
def test_matmul_is_the_product_with_its_epilogue(
    rows, reduced, hashes, linears, activation, has_residual
):
    # with J = 3, N = 4 has blocks of 2, of which the third would be empty
    linears = [(n + (n == 4), has_bias) for n, has_bias in linears]
    sketched = torch.randn(hashes, rows, reduced, dtype=torch.float64)
    z = [torch.randn(n, reduced, dtype=torch.float64) for n, _ in linears]
    bias = [optional(has_bias, n) for n, has_bias in linears]
    residual = optional(has_residual, rows, sum(n for n, _ in linears))
    y = OPS.matmul(sketched, z, bias, residual, activation)
    assert_near(y, matmul_reference(sketched, z, bias, residual, activation))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 6),
    st.tuples(st.integers(1, 40), st.integers(1, 3)),
    st.integers(3, 70).filter(lambda n: n != 4),  # J = 3 would leave a block of N = 4 empty
    st.integers(1, 3),
    st.sampled_from(["rotation", "learned"]),
    st.sampled_from([*ACTIVATIONS]),
    st.tuples(*[st.booleans()] * 3),
)
def test_matmul_sketch_is_the_sketch_of_the_product(
    rows, first, features, hashes, kind, activation, options
):
    reduced, first_hashes = first
    has_bias, gated, gate_has_bias = options
    sketch = make_sketch(kind, features, hashes)  # groups of 48: the last one is mostly ragged
    sketched = torch.randn(first_hashes, rows, reduced, dtype=torch.float64)
    z = torch.randn(features, reduced, dtype=torch.float64)
    bias = optional(has_bias, features)
    z_gate = optional(gated, features, reduced)
    gate_bias = optional(gated and gate_has_bias, features)
    operands = (sketched, z, bias, z_gate, gate_bias)
    further = OPS.matmul_sketch(*operands, activation, sketch, reduced_of(sketch))
    if gated:
        gate = matmul_reference(sketched, [z_gate], [gate_bias], None, activation)
        value = gate * matmul_reference(sketched, [z], [bias], None, "none")
    else:
        value = matmul_reference(sketched, [z], [bias], None, activation)
    assert_near(further, sketch_reference(value, sketch, reduced_of(sketch)))


@both_kinds
def test_the_three_in_a_row_are_a_block_of_dense_layers(kind):
    """``x + W2·gelu(W1·LN(x) + b1) + b2`` through the materialised weights."""
    x = torch.randn(5, 45, dtype=torch.float64)
    weight, bias = torch.randn(45, dtype=torch.float64), torch.randn(45, dtype=torch.float64)
    sketch1, sketch2 = make_sketch(kind, 45, 2), make_sketch(kind, 66, 2)
    z1 = torch.randn(66, reduced_of(sketch1), dtype=torch.float64)
    z2 = torch.randn(45, reduced_of(sketch2), dtype=torch.float64)
    b1, b2 = torch.randn(66, dtype=torch.float64), torch.randn(45, dtype=torch.float64)
    sketched, _, _ = OPS.norm_sketch(x, None, weight, bias, sketch1, z1.shape[1], EPS, False, False)
    h = OPS.matmul(sketched, [z1], [b1], None, "none")
    y = OPS.matmul(
        OPS.activation_sketch(h, None, sketch2, z2.shape[1], "gelu"), [z2], [b2], x, "none"
    )
    dense = reference.linear(norm_reference(x, weight, bias, False), sketch1, z1, b1)
    expected = x + reference.linear(ACTIVATIONS["gelu"](dense), sketch2, z2, b2)
    assert_near(y, expected)
    further = OPS.matmul_sketch(sketched, z1, b1, None, None, "gelu", sketch2, z2.shape[1])
    assert_near(OPS.matmul(further, [z2], [b2], x, "none"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@both_kinds
def test_every_dtype(kind, dtype):
    sketch = make_sketch(kind, 100, 2, dtype=dtype)
    reduced = reduced_of(sketch)
    x, residual = torch.randn(7, 100, dtype=dtype), torch.randn(7, 100, dtype=dtype)
    weight, bias = torch.randn(100, dtype=dtype), torch.randn(100, dtype=dtype)
    sketched, summed, normed = OPS.norm_sketch(
        x, residual, weight, bias, sketch, reduced, EPS, False, True
    )
    assert torch.equal(summed, x + residual)
    expected = norm_reference(summed, weight, bias, False)
    assert_near(normed, expected)
    assert_near(sketched, sketch_reference(expected, sketch, reduced))
    sketched = OPS.activation_sketch(x, residual, sketch, reduced, "silu")
    value = ACTIVATIONS["silu"](residual.double()) * x.double()
    assert_near(sketched, sketch_reference(value, sketch, reduced))
    z = [torch.randn(10, reduced, dtype=dtype), torch.randn(5, reduced, dtype=dtype)]
    y = OPS.matmul(sketched, z, [None, bias[:5]], x[:, :15], "gelu")
    assert_near(y, matmul_reference(sketched, z, [None, bias[:5]], x[:, :15], "gelu"))
    wide = torch.randn(100, reduced, dtype=dtype)
    further = OPS.matmul_sketch(sketched, wide, bias, wide + 1, None, "gelu_tanh", sketch, reduced)
    value = matmul_reference(sketched, [wide + 1], [None], None, "gelu_tanh")
    value *= matmul_reference(sketched, [wide], [bias], None, "none")
    assert_near(further, sketch_reference(value, sketch, reduced))


@both_kinds
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(kind, full):
    sketch = make_sketch(kind, 45, 2, dtype=torch.float32)
    reduced = reduced_of(sketch)
    x = torch.randn(5, 90)[:, 45:]
    other = torch.randn(5, 45) if full else None
    vector = torch.randn(45) if full else None
    args = (x, other, vector, vector, sketch, reduced, EPS, full, full)
    checks = (*OPCHECKS, "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS.norm_sketch.default, args, test_utils=checks)
    args = (x, other, sketch, reduced, "gelu_tanh")
    torch.library.opcheck(OPS.activation_sketch.default, args, test_utils=checks)
    sketched, z = torch.randn(2, 5, reduced), torch.randn(7, reduced)
    y = torch.randn(5, 14) if full else None
    args = (sketched, [z, z + 1], [torch.randn(7), None], y, "relu")
    torch.library.opcheck(OPS.matmul.default, args, test_utils=checks)
    z = torch.randn(45, reduced)
    args = (sketched, z, vector, z + 1 if full else None, vector, "silu", sketch, reduced)
    torch.library.opcheck(OPS.matmul_sketch.default, args, test_utils=checks)


def test_compiled_with_dynamic_rows_is_one_graph():
    sketch = make_sketch("rotation", 45, 2)
    reduced = reduced_of(sketch)
    z = torch.randn(45, reduced)
    graphs = []

    def backend(gm, _):
        graphs.append(gm)
        return gm.forward

    def block(x):
        sketched, summed, _ = OPS.norm_sketch(x, x, None, None, sketch, reduced, EPS, True, False)
        h = OPS.matmul(sketched, [z], [None], None, "none")
        return OPS.matmul(
            OPS.activation_sketch(h, h, sketch, reduced, "silu")
            + OPS.matmul_sketch(sketched, z, None, z, None, "relu", sketch, reduced),
            *([z], [None], summed, "none"),
        )

    compiled = torch.compile(block, backend=backend, dynamic=True)
    for rows in (5, 7, 11):  # unlike c, which would be taken for the same symbol
        x = torch.randn(rows, 45)
        assert torch.equal(compiled(x), block(x))
    assert len(graphs) == 1


def norm_arguments(**changes):
    sketch = make_sketch("rotation", 45, 2)
    arguments = {
        "x": torch.randn(5, 45),
        "residual": torch.randn(5, 45),
        "weight": torch.randn(45),
        "bias": torch.randn(45),
        "sketch": sketch,
        "reduced_features": reduced_of(sketch),
        "eps": EPS,
        "rms": False,
        "keep_norm": False,
    }
    return {**arguments, **changes}


def activation_arguments(**changes):
    sketch = make_sketch("rotation", 45, 2)
    arguments = {
        "x": torch.randn(5, 45),
        "gate": torch.randn(5, 45),
        "sketch": sketch,
        "reduced_features": reduced_of(sketch),
        "activation": "silu",
    }
    return {**arguments, **changes}


def matmul_arguments(**changes):
    arguments = {
        "sketched": torch.randn(2, 5, 16),
        "z": [torch.randn(7, 16)],
        "bias": [torch.randn(7)],
        "residual": torch.randn(5, 7),
        "activation": "gelu",
    }
    return {**arguments, **changes}


def matmul_sketch_arguments(**changes):
    sketch = make_sketch("rotation", 45, 2)
    arguments = {
        "sketched": torch.randn(2, 5, 24),
        "z": torch.randn(45, 24),
        "bias": torch.randn(45),
        "z_gate": torch.randn(45, 24),
        "gate_bias": None,
        "activation": "gelu",
        "sketch": sketch,
        "reduced_features": reduced_of(sketch),
    }
    return {**arguments, **changes}


wrong = {
    "x must be a floating [M, K], got torch.float32 (1, 5, 45)": (
        OPS.norm_sketch,
        norm_arguments(x=torch.randn(1, 5, 45)),
    ),
    "ss1::norm_sketch: a sketch of 1 groups": (
        OPS.norm_sketch,
        norm_arguments(x=torch.randn(5, 99)),
    ),
    "x is torch.float32 but the learned sketch is torch.float16": (
        OPS.norm_sketch,
        norm_arguments(sketch=torch.randn(1, 1, 48, 16).half()),
    ),
    "residual must be torch.float32 [M, 45], got torch.float32 (5, 44)": (
        OPS.norm_sketch,
        norm_arguments(residual=torch.randn(5, 44)),
    ),
    "residual has 1 rows, the input 5": (
        OPS.norm_sketch,
        norm_arguments(residual=torch.randn(1, 45)),
    ),
    "weight must be torch.float32 [45], got torch.float64 (45,)": (
        OPS.norm_sketch,
        norm_arguments(weight=torch.randn(45).double()),
    ),
    "bias must be torch.float32 [45], got torch.float32 (1,)": (
        OPS.norm_sketch,
        norm_arguments(bias=torch.randn(1)),
    ),
    "gate must be torch.float32 [M, 45]": (
        OPS.activation_sketch,
        activation_arguments(gate=torch.randn(5, 45).half()),
    ),
    "no activation 'tanh'; choose from none, relu, gelu, gelu_tanh, silu": (
        OPS.activation_sketch,
        activation_arguments(activation="tanh"),
    ),
    "sketched must be a floating [J, M, K_c]": (
        OPS.matmul,
        matmul_arguments(sketched=torch.randn(5, 16)),
    ),
    "got 1 z and 2 biases": (OPS.matmul, matmul_arguments(bias=[None, None])),
    "at least one z": (OPS.matmul, matmul_arguments(z=[], bias=[])),
    "z[0] must be torch.float32 [N, 16], got torch.float32 (7, 15)": (
        OPS.matmul,
        matmul_arguments(z=[torch.randn(7, 15)]),
    ),
    "2 column blocks leave some empty at N = 1 of z[0]": (
        OPS.matmul,
        matmul_arguments(z=[torch.randn(1, 16)], bias=[None], residual=None),
    ),
    "bias[0] must be torch.float32 [7]": (OPS.matmul, matmul_arguments(bias=[torch.randn(8)])),
    "residual must be torch.float32 [M, 7]": (
        OPS.matmul,
        matmul_arguments(residual=torch.randn(5, 1)),
    ),
    "ss1::matmul: no activation": (OPS.matmul, matmul_arguments(activation="selu")),
    "ss1::matmul_sketch: sketched must be a floating [J, M, K_c]": (
        OPS.matmul_sketch,
        matmul_sketch_arguments(sketched=torch.randn(5, 24)),
    ),
    "ss1::matmul_sketch: z must be torch.float32 [N, 24], got torch.float32 (45, 23)": (
        OPS.matmul_sketch,
        matmul_sketch_arguments(z=torch.randn(45, 23)),
    ),
    "ss1::matmul_sketch: z must be torch.float32 [N, 24], got torch.float64": (
        OPS.matmul_sketch,
        matmul_sketch_arguments(z=torch.randn(45, 24).double()),
    ),
    "2 column blocks leave some empty at N = 1 of z": (
        OPS.matmul_sketch,
        matmul_sketch_arguments(z=torch.randn(1, 24), bias=None),
    ),
    "bias must be torch.float32 [45], got torch.float32 (44,)": (
        OPS.matmul_sketch,
        matmul_sketch_arguments(bias=torch.randn(44)),
    ),
    "z_gate must be torch.float32 [N, 24], got torch.float16 (45, 24)": (
        OPS.matmul_sketch,
        matmul_sketch_arguments(z_gate=torch.randn(45, 24).half()),
    ),
    "z_gate must be [45, 24] as z, got [44, 24]": (
        OPS.matmul_sketch,
        matmul_sketch_arguments(z_gate=torch.randn(44, 24)),
    ),
    "gate_bias must be torch.float32 [45], got torch.float32 (1,)": (
        OPS.matmul_sketch,
        matmul_sketch_arguments(gate_bias=torch.randn(1)),
    ),
    "gate_bias is given, but no z_gate": (
        OPS.matmul_sketch,
        matmul_sketch_arguments(z_gate=None, gate_bias=torch.randn(45)),
    ),
    "ss1::matmul_sketch: no activation 'elu'": (
        OPS.matmul_sketch,
        matmul_sketch_arguments(activation="elu"),
    ),
    "1 groups of 48 features takes 1 to 48 input features, the product has 49": (
        OPS.matmul_sketch,
        matmul_sketch_arguments(z=torch.randn(49, 24), bias=None, z_gate=None),
    ),
    "17 reduced features do not fit a sketch of shape (1, 1, 48, 16)": (
        OPS.matmul_sketch,
        matmul_sketch_arguments(sketch=torch.randn(1, 1, 48, 16), reduced_features=17),
    ),
    "sketched is torch.float32 but the learned sketch is torch.float16": (
        OPS.matmul_sketch,
        matmul_sketch_arguments(sketch=torch.randn(1, 1, 48, 16).half()),
    ),
}


@pytest.mark.parametrize("message", wrong)
def test_wrong_operands_are_named(message):
    op, arguments = wrong[message]
    with pytest.raises(RuntimeError) as error:
        op(**arguments)
    assert message in str(error.value)
    assert op.__name__ in str(error.value)


@pytest.mark.parametrize(
    ("op", "arguments", "name"),
    [
        (OPS.norm_sketch, norm_arguments(), "weight"),
        (OPS.activation_sketch, activation_arguments(), "gate"),
        (OPS.matmul, matmul_arguments(), "z"),
        (OPS.matmul_sketch, matmul_sketch_arguments(), "z_gate"),
    ],
)
def test_a_wanted_gradient_is_refused_and_not_lost(op, arguments, name):
    operand = arguments[name]
    tensor = (operand[0] if isinstance(operand, list) else operand).clone().requires_grad_()
    arguments = {**arguments, name: [tensor] if isinstance(operand, list) else tensor}
    with pytest.raises(RuntimeError, match=r"has no gradient: run under torch.no_grad"):
        op(**arguments)
    with torch.no_grad():
        results = op(**arguments)
    with torch.inference_mode():
        again = op(**arguments)
    first = results[0] if isinstance(results, tuple) else results
    second = again[0] if isinstance(again, tuple) else again
    assert not first.requires_grad
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", [*ACTIVATIONS])
def test_activations_are_what_their_names_say(name):
    assert {*fused_portable.ACTIVATIONS} == {*ACTIVATIONS}
    x = torch.randn(1000, dtype=torch.float64) * 3
    actual = fused_portable.activate(x, None, name)
    torch.testing.assert_close(actual, ACTIVATIONS[name](x))
    if name == "gelu":
        assert not torch.equal(actual, F.gelu(x, approximate="tanh"))
