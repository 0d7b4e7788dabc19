"""PyTorch's conversion takes seconds and depends on the program and the opset alone."""

import onnx
import onnx_ir as ir
import pytest

from ss1_compile.onnx import export


@pytest.fixture(autouse=True, scope="module")
def converted_once():
    kept, real = {}, export._convert

    def convert(program, opset, dynamic_shapes):
        key = (id(program), opset)
        if key not in kept:
            model = real(program, opset, dynamic_shapes)
            kept[key] = program, ir.to_proto(model).SerializeToString()
        return ir.from_proto(onnx.ModelProto.FromString(kept[key][1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_convert", convert)
        yield
