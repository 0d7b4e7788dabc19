"""What is checked of every model of the zoo, and what is measured on the way."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from architectures import Architecture, Inputs
from products import Product, watch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import ss1_compile
from ss1_compile import Report, SS1Linear

TOLERANCE = 1e-5
C = 4
QUIET = {"warn_error": 2.0, "allow_empty": True}
GENERATION = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@dataclass
class Door:
    """One way in.

    Attributes:
        rewritten: FLOPs of the products that became SS1, of one forward pass.
        reasons: reason → FLOPs of the products that stayed dense for it.
        error: the relative difference from the dense model at c = 1.
        skipped: why the door does not apply to this model.
    """

    rewritten: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    error: float | None = None
    skipped: str | None = None


@dataclass
class Result:
    """What :func:`examine` found.

    Attributes:
        flops: of the products of activations with parameters, of one dense forward pass.
        convolution_flops: of convolutions of a size above 1, which are no linear layers.
        weights: how many weights the products have.
        doors: by name: ``compress``, ``backend``, ``export``.
        parameters: of the dense model.
        parameters_after: of the model after ``compress`` at c = 4.
        generates: whether ``generate()`` gave the same tokens at c = 1 and ran at c = 4; ``None``
            if the model does not generate.
        failures: everything that is not as it should be.
        seconds: what the examination took.
    """

    name: str
    kind: str
    flops: int = 0
    convolution_flops: int = 0
    weights: int = 0
    doors: dict[str, Door] = field(default_factory=dict)
    parameters: int = 0
    parameters_after: int = 0
    generates: bool | None = None
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(architecture: Architecture) -> Result:
    """Send one architecture through every door."""
    started = time.perf_counter()
    torch._dynamo.reset()
    result = Result(architecture.name, architecture.kind)
    examination = _Examination(architecture, result)
    for check in (
        examination.compress,
        examination.backend,
        examination.export,
        examination.generate,
    ):
        try:
            check()
        except Exception as error:  # one broken door must not hide the others
            text = str(error).strip().splitlines() or [""]
            result.failures.append(f"{check.__name__}: {type(error).__name__}: {text[0][:300]}")
        finally:
            torch._dynamo.reset()
    result.seconds = round(time.perf_counter() - started, 1)
    return result


class _Examination:
    def __init__(self, architecture: Architecture, result: Result) -> None:
        self.architecture, self.result = architecture, result
        self.model, self.inputs = make(architecture)
        self.expected = run(self.model, self.inputs)
        self.products, result.convolution_flops = watch(self.model, self.inputs)
        result.flops = sum(product.flops for product in self.products)
        result.weights = len(self.products)
        result.parameters = sum(p.numel() for p in self.model.parameters())
        self.at_four: list[Tensor] = []  # the outputs of the compressed model
        self.chosen: set[str] = set()  # the layers it compressed

    # --- doors --------------------------------------------------------------------------------

    def compress(self) -> None:
        model = copy.deepcopy(self.model)
        ss1_compile.compress(model, reduction=1, progress=False, **QUIET)
        self._exact("compress", run(model, self.inputs))
        model = copy.deepcopy(self.model)
        report = ss1_compile.compress(model, reduction=C, progress=False, **QUIET)
        self._account("compress", report)
        self.at_four = run(model, self.inputs)
        self._finite("compress", self.at_four)
        self.chosen = {row.name for row in report.compressed}
        self.result.parameters_after = sum(p.numel() for p in model.parameters())
        for name, module in model.named_modules():
            if isinstance(module, SS1Linear):
                group = C * module.block_k  # K is padded to a multiple of it
                promised = module.out_features * -(-module.in_features // group) * module.block_k
                dense = module.in_features * module.out_features
                if not module.z.numel() == promised < dense:
                    self._fail("compress", f"{name} has {module.z.numel()} parameters of {dense}")

    def backend(self) -> None:
        frames = torch._dynamo.utils.counters["frames"]

        def compiled(report: Report, **options: Any) -> list[Tensor]:
            torch._dynamo.reset()
            frames.clear()
            options = {**QUIET, "inner_backend": "eager", "report": report, **options}
            return run(torch.compile(self.model, backend="ss1", options=options), self.inputs)

        report = Report()
        outputs = compiled(report, reduction=1)
        if not len(report) and frames["ok"] < frames["total"]:
            reason = "Dynamo runs the forward eagerly (a graph break); the backend is not called"
            self.result.doors["backend"] = Door(skipped=reason)
            return
        self._exact("backend", outputs)
        report = Report()
        outputs = compiled(report, reduction=C)
        self._finite("backend", outputs)
        self._account("backend", report)
        common = self._common(report)
        if {row.name for row in report.compressed} != common:  # it handles more
            outputs = compiled(Report(), reduction=C, include=tuple(map(_literally, common)))
        self._agree("backend", outputs, common)

    def export(self) -> None:
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = torch.export.export(self.model, (), self.inputs, strict=False)
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            reason = f"torch.export fails: {type(error).__name__}: {text[0][:160]}"
            self.result.doors["export"] = Door(skipped=reason)
            return
        small, _ = ss1_compile.compress_exported(program, reduction=1, **QUIET)
        self._exact("export", run(small.module(), self.inputs))
        small, report = ss1_compile.compress_exported(program, reduction=C, **QUIET)
        self._account("export", report)
        outputs = run(small.module(), self.inputs)
        self._finite("export", outputs)
        common = self._common(report)
        if {row.name for row in report.compressed} != common:
            only = tuple(map(_literally, common))
            small, _ = ss1_compile.compress_exported(program, reduction=C, include=only, **QUIET)
            outputs = run(small.module(), self.inputs)
        self._agree("export", outputs, common)

    def generate(self) -> None:
        if not self.architecture.generates:
            return
        names = ("input_ids", "input_features")
        inputs = {name: self.inputs[name] for name in names if name in self.inputs}
        expected = self.model.generate(**inputs, **GENERATION)  # type: ignore[operator]
        model: Any = copy.deepcopy(self.model)
        ss1_compile.compress(model, reduction=1, progress=False, **QUIET)
        self.result.generates = torch.equal(model.generate(**inputs, **GENERATION), expected)
        model = copy.deepcopy(self.model)
        ss1_compile.compress(model, reduction=C, progress=False, **QUIET)
        if model.generate(**inputs, **GENERATION).shape != expected.shape:
            self.result.generates = False
        if not self.result.generates:
            self._fail("generate", "the tokens at c = 1 differ, or their number at c = 4")

    # --- what must hold -----------------------------------------------------------------------

    def _door(self, name: str) -> Door:
        return self.result.doors.setdefault(name, Door())

    def _fail(self, door: str, text: str) -> None:
        self.result.failures.append(f"{door}: {text}")

    def _exact(self, door: str, outputs: list[Tensor]) -> None:
        error = difference(outputs, self.expected)
        self._door(door).error = error
        if not error < TOLERANCE:
            self._fail(door, f"differs by {error:.1e} at c = 1")

    def _finite(self, door: str, outputs: list[Tensor]) -> None:
        if not all(bool(torch.isfinite(x).all()) for x in outputs):
            self._fail(door, f"not finite at c = {C}")

    def _common(self, report: Report) -> set[str]:
        return self.chosen & {row.name for row in report.compressed}

    def _agree(self, door: str, outputs: list[Tensor], layers: set[str]) -> None:
        """The door's outputs are those of ``compress`` with the same layers."""
        expected = self.at_four
        if layers != self.chosen:
            model = copy.deepcopy(self.model)
            only = tuple(map(_literally, layers))
            ss1_compile.compress(model, reduction=C, progress=False, include=only, **QUIET)
            expected = run(model, self.inputs)
        error = difference(outputs, expected)
        if not error < TOLERANCE:
            self._fail(door, f"differs by {error:.1e} from compress at c = {C}")

    def _account(self, door: str, report: Report) -> None:
        """Every product has a row, and only SS1 rows count as rewritten."""
        record = self._door(door)
        rows = {row.name: row for row in report}
        for product in self.products:
            found = [rows[name] for name in sorted(product.row_names()) if name in rows]
            if not found:
                self._fail(door, f"no row for {_describe(product)}")
            elif all(row.compressed for row in found):
                record.rewritten += product.flops
            else:
                reason = next(str(row.reason) for row in found if not row.compressed)
                record.reasons[reason] = record.reasons.get(reason, 0) + product.flops


def make(architecture: Architecture) -> tuple[nn.Module, Inputs]:
    """The model with every parameter moved off its initial value: a bias of zero hides mistakes."""
    model, inputs = architecture.make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model, inputs


def run(model: Any, inputs: Inputs) -> list[Tensor]:
    """The floating-point outputs of one forward pass, without caches."""
    torch.manual_seed(0)  # ViLT draws the patches that it looks at
    with torch.no_grad():
        output = model(**inputs)
    if isinstance(output, dict):
        output = [v for v in output.values() if isinstance(v, Tensor)]
    return [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def difference(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference (Frobenius) of any output."""
    assert len(outputs) == len(expected) > 0
    pairs: Iterator[tuple[Tensor, Tensor]] = zip(outputs, expected, strict=True)
    return max(((a - b).norm() / b.norm().clamp_min(1e-12)).item() for a, b in pairs)


def _literally(name: str) -> str:
    return name.replace("[", "[[]")


def _describe(product: Product) -> str:
    return f"{product.names[0]} ({', '.join(sorted(product.operators))}, {product.flops} FLOPs)"
