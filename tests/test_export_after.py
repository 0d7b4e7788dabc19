"""What comes after ``compress_exported``: training, files, AOTInductor."""

import subprocess
import sys

import pytest
import torch
from export_support import D, Mlp, Tied, assert_same, exported, mlp_program, ss1


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- what comes after -----------------------------------------------------------------------------


def test_trains():
    model, x = Mlp(), torch.randn(5, D)
    model.down.weight.requires_grad_(False)
    new, _ = ss1(mlp_program(model), reduction=4)
    module = new.module()
    module(x).sum().backward()
    gradients = {name: p.grad is not None for name, p in module.named_parameters()}
    assert gradients == {"up.z": True, "up.bias": True, "down.z": False, "down.bias": True}


def test_compiles_and_decomposes():
    model, x = Mlp().eval(), torch.randn(5, D)
    new, _ = ss1(mlp_program(model))
    expected = new.module()(x)
    core = new.run_decompositions()
    assert "ss1.linear" in str(core.graph)
    assert_same(core.module()(x), expected)
    with torch.no_grad():
        compiled = torch.compile(new.module(), fullgraph=True)
        assert_same(compiled(x), expected.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_keeps_the_dtype(dtype):
    model, x = Mlp().to(dtype), torch.randn(5, D, dtype=dtype)
    new, _ = ss1(exported(model, x), reduction=1)
    assert new.state_dict["up.z"].dtype == dtype
    assert_same(new.module()(x), model(x), 1e-2 if dtype == torch.bfloat16 else 1e-12)


def in_fresh_process(body, *paths, imports="import ss1_compile"):
    code = f"import sys, torch\n{imports}\n{body}"
    command = [sys.executable, "-c", code, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_saves_and_loads_in_a_fresh_process(tmp_path):
    model, x = Mlp().eval(), torch.randn(5, D)
    new, _ = ss1(mlp_program(model))
    torch.export.save(new, tmp_path / "program.pt2")
    torch.save({"x": x, "y": new.module()(x).detach()}, tmp_path / "expected.pt")
    size = (tmp_path / "program.pt2").stat().st_size
    torch.export.save(mlp_program(model), tmp_path / "dense.pt2")
    assert size < (tmp_path / "dense.pt2").stat().st_size - 40_000
    in_fresh_process(
        """
ep = torch.export.load(sys.argv[1])
ep.validate()
expected = torch.load(sys.argv[2])
torch.testing.assert_close(ep.module()(expected["x"]).detach(), expected["y"])
assert sorted(n for n in ep.state_dict if n.endswith("z")) == ["down.z", "up.z"]
again, report = ss1_compile.compress_exported(ep, reduction=1, allow_empty=True)
assert not report.compressed
""",
        tmp_path / "program.pt2",
        tmp_path / "expected.pt",
    )


def test_a_loaded_program_can_be_compressed(tmp_path):
    model, x = Tied(embedding=False).eval(), torch.randn(5, D)
    torch.export.save(exported(model, x), tmp_path / "dense.pt2")
    new, report = ss1(torch.export.load(tmp_path / "dense.pt2"), reduction=1)
    assert [row.name for row in report.compressed] == ["first", "second"]
    assert not [name for name in new.state_dict if name.endswith("weight")]
    assert_same(new.module()(x), model(x))


@pytest.mark.slow
def test_aot_inductor_package_runs_in_a_fresh_process(tmp_path):
    """The operator on the CPU is Python: the package calls it through the dispatcher."""
    model, x = Mlp().eval(), torch.randn(5, D)
    new, _ = ss1(mlp_program(model))
    torch.save({"x": x, "y": new.module()(x).detach()}, tmp_path / "expected.pt")
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            new, package_path=str(tmp_path / "package.pt2")
        )
    in_fresh_process(
        """
run = torch._inductor.aoti_load_package(sys.argv[1])
expected = torch.load(sys.argv[2])
torch.testing.assert_close(run(expected["x"]), expected["y"])
assert run(torch.randn(40, 64)).shape == (40, 64)
""",
        path,
        tmp_path / "expected.pt",
    )
    in_fresh_process(
        """
try:
    torch._inductor.aoti_load_package(sys.argv[1])(torch.randn(4, 64))
except RuntimeError as error:
    assert "Could not find schema for ss1::linear" in str(error), error
else:
    raise SystemExit("ran without the operator")
""",
        path,
        imports="",
    )
