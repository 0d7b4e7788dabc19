import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton kernels need Triton")
SCRIPT = Path(__file__).with_name("compile_kernels.py")
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_kernels_compile_without_a_gpu(capability):
    """With whole vectors, on tensor cores, within shared memory."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability), str(SHARED_BYTES[capability])],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(kernels) >= 18
    for kernel in kernels:
        assert not kernel["spilled"], kernel
        together = max(1, (kernel["programs"] or 0) // 132)
        # each takes 1 KiB more than it asks for
        assert together * (kernel["shared"] + 1024) <= SHARED_BYTES[capability] + 1024, kernel
        name = kernel["kernel"]
        products = ("_gemm_kernel", "_gemm_sketch_kernel")
        if name in ("_permute_kernel", "_block_kernel", "_stream_kernel", *products):
            assert kernel["tensor_cores"], kernel
            assert kernel["copies_16_bytes"], kernel
        if name in ("_permute_kernel", "_block_kernel", "_gather_kernel", "_stream_kernel"):
            # 8 bytes are whole vectors where loads are asynchronous and stores are of 8-bit values
            whole = {".v4.b32", ".v2.b32"} if kernel["copies_16_bytes"] else {".v4.b32"}
            assert whole & set(kernel["widths"]), kernel
            # loaded one by one: only the bias of the quantised stream, a value for a row of z
            assert ".b16" not in kernel["widths"] or kernel["module"] == "triton_quantized_decode"
