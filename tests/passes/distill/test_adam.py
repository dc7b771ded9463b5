from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from hone.passes.distill.adam import Adam

RNG = np.random.default_rng(0)


def test_adam_equals_numpy_when_the_learning_rate_changes() -> None:
    shapes = [(2, 3), (4,)]
    params = [
        relax.Var(f"p{i}", relax.TensorType(shape, "float32")) for i, shape in enumerate(shapes)
    ]
    optimizer = Adam(betas=(0.8, 0.9), epsilon=1e-3, weight_decay=0.1).init(params)
    module = tvm.IRModule({"Adam": optimizer.get_function()})
    machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())

    def tensors(arrays: list[np.ndarray]) -> list[tvm.runtime.Tensor]:
        return [tvm.runtime.tensor(array.astype("float32")) for array in arrays]

    values = [RNG.standard_normal(shape) for shape in shapes]
    got, states = tensors(values), list(optimizer.state)
    first = [np.zeros(shape) for shape in shapes]
    second = [np.zeros(shape) for shape in shapes]
    for step, rate in enumerate((0.1, 0.05, 0.2), start=1):
        slopes = [RNG.standard_normal(shape) for shape in shapes]
        for i, slope in enumerate(slopes):
            first[i] = 0.8 * first[i] + 0.2 * slope
            second[i] = 0.9 * second[i] + 0.1 * slope**2
            m, v = first[i] / (1 - 0.8**step), second[i] / (1 - 0.9**step)
            values[i] = values[i] - rate * (m / (np.sqrt(v) + 1e-3) + 0.1 * values[i])
        states[0] = tvm.runtime.tensor(np.array(rate, "float32"))
        new, states = machine["Adam"](got, tensors(slopes), states)
        got, states = list(new), list(states)
    for value, tensor in zip(values, got, strict=True):
        # A few float32 roundings of numbers of size 1.
        np.testing.assert_allclose(tensor.numpy(), value, rtol=1e-5, atol=1e-6)
