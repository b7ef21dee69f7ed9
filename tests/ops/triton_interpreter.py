"""Runs the Triton kernels of a test on the GPU, or where there is none by Triton's interpreter on CPU tensors.

tests/conftest.py asks for the interpreter (TRITON_INTERPRET=1).
The interpreter cuts float32 to bfloat16 off instead of rounding it, and multiplies the bits of bfloat16 as if they were
integers (triton 3.6.0); here it rounds as the hardware does, and a product is one of values.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: make check-gpu-build, or pip install 'herdkern[triton]'")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def triton_runs(monkeypatch):
    """Triton kernels run in this test on tensors of DEVICE."""
    torch.set_default_device(DEVICE)
    if DEVICE == "cpu":
        from triton import language
        from triton.runtime import interpreter

        convert = interpreter._convert_float

        def rounding(data, source, target, mode):
            if (source, target) != (language.float32, language.bfloat16):
                return convert(data, source, target, mode)
            rounded = torch.from_numpy(np.array(data, dtype=np.float32)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)

        monkeypatch.setattr(interpreter, "_convert_float", rounding)
        multiply = interpreter.InterpreterBuilder.create_dot

        def widened(x):
            if x.dtype.scalar != language.bfloat16:
                return x
            return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), language.float32)

        def product(self, a, b, *rest):
            return multiply(self, widened(a), widened(b), *rest)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", product)
    yield
    torch.set_default_device("cpu")
