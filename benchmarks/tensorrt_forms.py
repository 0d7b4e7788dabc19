"""Layers and engine size of the ways to write a rotation sketch in a TensorRT network; no GPU.

    python benchmarks/tensorrt_forms.py           # measure; writes results/tensorrt_forms.json
    python benchmarks/tensorrt_forms.py --render  # write docs/tensorrt.md's table from it
    python benchmarks/tensorrt_forms.py --check   # exit code 1 if that table is out of date

A row is a chain of ``layers`` layers of one structure, each with bias and ReLU, float16, dynamic
batch and length. Needs the extra tensorrt-rtx. Sizes depend on the version of TensorRT alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ss1_compile import SS1Structure
from ss1_compile.kernels import layout

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "tensorrt_forms.json"
PAGE = ROOT / "docs" / "tensorrt.md"
BEGIN = "<!-- forms:begin (written by benchmarks/tensorrt_forms.py; do not edit) -->"
END = "<!-- forms:end -->"
CASES = (  # K, N, c, layers
    (768, 768, 4, 1),
    (768, 768, 4, 3),
    (768, 3072, 4, 1),
)


class Network:
    """A TensorRT network with a chain of layers of one form."""

    def __init__(self, structure: SS1Structure, layers: int, form: str) -> None:
        import tensorrt_rtx as trt

        self.trt, self.structure, self.form = trt, structure, form
        self.builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
        self.net = self.builder.create_network(0)
        self.kept: list[np.ndarray] = []  # TensorRT reads them when it builds
        self.shared: dict[str, Any] = {}
        self.random = np.random.default_rng(0)
        s = structure
        self.x = self.net.add_input("x", trt.float16, (-1, -1, s.in_features))
        y = self.x
        for _ in range(layers):
            y = self.layer(y)
        self.net.mark_output(y)

    def build(self) -> int:
        """Bytes of the serialised engine."""
        config, profile = (
            self.builder.create_builder_config(),
            self.builder.create_optimization_profile(),
        )
        k = self.structure.in_features
        profile.set_shape("x", (1, 1, k), (4, 128, k), (32, 512, k))
        config.add_optimization_profile(profile)
        return int(self.builder.build_serialized_network(self.net, config).nbytes)

    def layer(self, x: Any) -> Any:
        """One linear layer with bias and ReLU."""
        trt, s = self.trt, self.structure
        if self.form == "dense":
            w = self.constant(self.normal(1, s.out_features, s.in_features))
            none, transpose = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE
            y = self.net.add_matrix_multiply(x, none, w, transpose).get_output(0)
        else:
            sketched = getattr(self, self.form.removesuffix("_int8"))(x)
            y = self.product(sketched)
        bias = self.constant(self.normal(1, 1, s.out_features))
        y = self.add(y, bias)
        return self.net.add_activation(y, trt.ActivationType.RELU).get_output(0)

    def product(self, sketched: Any) -> Any:
        """``y[..., block j] = X̃[..., j] @ z_jᵀ``; z is float16, or int8 with a scale per row."""
        s = self.structure
        shape = (s.num_hashes, s.block_n, s.reduced_features)
        if self.form.endswith("_int8"):
            q = self.random.integers(-127, 128, (s.out_features, s.reduced_features))
            scale = self.constant(self.random.random(s.out_features).astype(np.float32))
            layer = self.net.add_dequantize(
                self.constant(q.astype(np.int8)), scale, self.trt.float16
            )
            layer.axis = 0
            z = self.reshape(layer.get_output(0), shape)
        else:
            z = self.constant(self.normal(*shape))
        y = self.net.add_einsum([sketched, z], "abjk,jnk->abjn").get_output(0)
        return self.reshape(y, (0, 0, -1))

    # --- the forms: x [a, b, K] → X̃ [a, b, J, K_c] ----------------------------------------------

    def gather(self, x: Any) -> Any:
        """``Σ_l signs · x[columns]``, summed in float32: what ss1_compile.tensorrt builds."""
        trt = self.trt
        if "gather" not in self.shared:
            columns, signs = layout.source_columns(
                self.structure.code, self.structure.reduced_features
            )
            self.shared["gather"] = (
                self.constant(columns.to(torch.int32).numpy()),
                self.constant(signs[None, None].float().numpy()),
            )
        columns, signs = self.shared["gather"]
        parts = self.net.add_gather(x, columns, 2).get_output(0)
        parts = self.net.add_cast(parts, trt.float32).get_output(0)
        parts = self.net.add_elementwise(parts, signs, trt.ElementWiseOperation.PROD).get_output(0)
        summed = self.net.add_reduce(parts, trt.ReduceOperation.SUM, 1 << 3, False).get_output(0)
        return self.net.add_cast(summed, trt.float16).get_output(0)

    def matrix(self, x: Any) -> Any:
        """A product with the block-diagonal 0/±1 matrix ``[J, G, c·B_K, B_K]``."""
        s = self.structure
        j, g, c = s.code.shape
        if "matrix" not in self.shared:
            slots, signs = layout.target_slots(s.code, s.reduced_features, s.padded_features)
            values = torch.zeros(j, s.padded_features, s.block_k)
            values.scatter_(2, (slots % s.block_k).unsqueeze(2), signs.float().unsqueeze(2))
            shape = (j, g, c * s.block_k, s.block_k)
            self.shared["matrix"] = self.constant(values.reshape(shape).half().numpy())
        grouped = self.reshape(x, (0, 0, g, c * s.block_k))
        y = self.net.add_einsum([grouped, self.shared["matrix"]], "abgk,jgku->abjgu")
        return self.reshape(y.get_output(0), (0, 0, j, g * s.block_k))

    def slices(self, x: Any) -> Any:
        """Two slices and a concatenation per rotated chunk, then additions."""
        s = self.structure
        shape = self.net.add_shape(x).get_output(0)
        lead = self.net.add_gather(shape, self.constant(np.array([0, 1], np.int32)), 0)
        lengths: dict[int, Any] = {}

        def cut(start: int, length: int) -> Any:
            if length not in lengths:
                last = self.constant(np.array([length], np.int64))
                lengths[length] = self.join([lead.get_output(0), last], 0)
            layer = self.net.add_slice(x, (0, 0, start), (1, 1, 1), (1, 1, 1))
            layer.set_input(2, lengths[length])
            return layer.get_output(0)

        def chunk(start: int, rotation: int, sign: int) -> Any:
            y = cut(start, s.block_k)
            if rotation:
                end = start + s.block_k
                pieces = [cut(end - rotation, rotation), cut(start, s.block_k - rotation)]
                y = self.join(pieces, 2)
            negative = self.trt.UnaryOperation.NEG
            return y if sign > 0 else self.net.add_unary(y, negative).get_output(0)

        blocks = []
        for rotations, signs in zip(s.rotations.tolist(), s.signs.tolist(), strict=True):
            groups = []
            for g, (hs, ss) in enumerate(zip(rotations, signs, strict=True)):
                first = g * s.reduction * s.block_k
                total = None
                for part, (h, sign) in enumerate(zip(hs, ss, strict=True)):
                    y = chunk(first + part * s.block_k, h, sign)
                    total = y if total is None else self.add(total, y)
                groups.append(total)
            axis = self.constant(np.array([2], np.int64))
            blocks.append(self.net.add_unsqueeze(self.join(groups, 2), axis).get_output(0))
        return self.join(blocks, 2)

    # --- helpers --------------------------------------------------------------------------------

    def constant(self, value: np.ndarray) -> Any:
        """A constant layer; TensorRT reads ``value`` when it builds."""
        value = np.ascontiguousarray(value)
        self.kept.append(value)
        return self.net.add_constant(value.shape, self.trt.Weights(value)).get_output(0)

    def normal(self, *shape: int) -> np.ndarray:
        """Random float16 weights."""
        return self.random.standard_normal(shape).astype(np.float16)

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        """``x`` in another shape; a 0 copies the dimension at its place."""
        layer = self.net.add_shuffle(x)
        layer.reshape_dims = shape
        return layer.get_output(0)

    def join(self, tensors: list[Any], axis: int) -> Any:
        """The tensors, concatenated."""
        layer = self.net.add_concatenation(tensors)
        layer.axis = axis
        return layer.get_output(0)

    def add(self, a: Any, b: Any) -> Any:
        """``a + b``."""
        return self.net.add_elementwise(a, b, self.trt.ElementWiseOperation.SUM).get_output(0)


def measure() -> dict[str, Any]:
    import tensorrt_rtx

    rows = []
    for k, n, c, layers in CASES:
        structure = SS1Structure.create(k, n, c)
        for form in ("dense", "gather", "gather_int8", "matrix", "slices"):
            network = Network(structure, layers, form)
            size = network.build()
            row = {"k": k, "n": n, "c": c, "layers": layers, "form": form}
            row |= {"network_layers": network.net.num_layers, "engine_bytes": size}
            rows.append(row)
            print(rows[-1], flush=True)
    return {"tensorrt_rtx": tensorrt_rtx.__version__, "rows": rows}


def table(result: dict[str, Any]) -> str:
    names = {
        "dense": "dense",
        "gather": "**gather · signs, sum**",
        "gather_int8": "the same, z int8",
        "matrix": "0/±1 matrix product",
        "slices": "slice, concatenate, add",
    }
    lines = [
        "| layers | form | network layers | engine, KiB | of dense |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        case = {key: row[key] for key in ("k", "n", "c", "layers")} | {"form": "dense"}
        (dense,) = (r for r in result["rows"] if case.items() <= r.items())
        lines.append(
            f"| {row['layers']} × {row['k']} → {row['n']}, c = {row['c']} | {names[row['form']]} "
            f"| {row['network_layers']} | {row['engine_bytes'] / 1024:.0f} "
            f"| {row['engine_bytes'] / dense['engine_bytes']:.2f} |"
        )
    version = result["tensorrt_rtx"]
    return "\n".join(lines) + f"\n\nTensorRT-RTX {version}, float16, bias and ReLU, dynamic batch."


def rendered(page: str) -> str:
    before, rest = page.split(BEGIN)
    text = table(json.loads(RESULT.read_text()))
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.check:
        page = PAGE.read_text()
        raise SystemExit(0 if rendered(page) == page else f"{PAGE.name} is out of date")
    if not options.render:
        RESULT.write_text(json.dumps(measure(), indent=1) + "\n")
    PAGE.write_text(rendered(PAGE.read_text()))


if __name__ == "__main__":
    main()
