"""Adam whose learning rate is a state, so that it can change without compiling again.

Rewrites nothing: the optimizer's Relax function is added to a training module. Upstream's Adam
cannot be initialized (it asks numpy for a TVM dtype) and compiles its learning rate in.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.relax.training.optimizer import Optimizer

from hone.passes.graph.dataflow import shape_of


class Adam(Optimizer):  # type: ignore[misc]
    """Adam with decoupled weight decay, for float32 parameters.

    ``m = β₁ m + (1 − β₁) g``, ``v = β₂ v + (1 − β₂) g²``,
    ``p = p − lr (m̂ / (√v̂ + ε) + decay · p)`` with ``m̂ = m / (1 − β₁ᵗ)``, ``v̂ = v / (1 − β₂ᵗ)``
    (Kingma and Ba 2015; Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization").
    The first step moves every parameter by ``lr`` against the sign of its gradient.

    Parameters
    ----------
    betas : tuple of float
        Decay of the first and of the second moment.
    epsilon : float
        Added to the root of the second moment.
    weight_decay : float
        Fraction of each parameter taken off per step and unit of learning rate.

    Notes
    -----
    States, in this order: learning rate [], β₁ᵗ [], β₂ᵗ [], first moments, second moments.
    """

    def __init__(
        self,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__("Adam")
        self._betas = betas
        self._epsilon = epsilon
        self._weight_decay = weight_decay

    def init(self, params: relax.Var | list[relax.Var]) -> Adam:
        """Set the parameters and the initial states; the learning rate begins as 0."""
        self._set_params_and_dtype(params if isinstance(params, list) else list(params))
        moments = [np.zeros(shape_of(param), "float32") for param in self.param_list]
        states = [np.zeros((), "float32"), *[np.ones((), "float32")] * 2, *moments, *moments]
        self.state = [tvm.runtime.tensor(state) for state in states]
        return self

    def get_function(self) -> relax.Function:
        """Return the function (parameters, gradients, states) → (parameters, states)."""
        self._check_init()
        count = len(self.param_list)
        types = [param.ty for param in self.param_list]
        scalar = relax.TensorType((), "float32")
        params = relax.Var("params", relax.TupleType(types))
        gradients = relax.Var("gradients", relax.TupleType(types))
        states = relax.Var("optim_states", relax.TupleType([scalar] * 3 + types * 2))
        builder = relax.BlockBuilder()
        add, multiply, subtract = relax.op.add, relax.op.multiply, relax.op.subtract

        def constant(value: float) -> relax.Expr:
            return relax.const(value, "float32")

        with builder.function(self.name, [params, gradients, states]):
            with builder.dataflow():
                rate, *products = (builder.emit(relax.TupleGetItem(states, i)) for i in range(3))
                products = [
                    builder.emit(multiply(product, constant(beta)))
                    for product, beta in zip(products, self._betas, strict=True)
                ]
                corrections = [
                    builder.emit(subtract(constant(1.0), product)) for product in products
                ]
                updated: list[relax.Var] = []
                moments: list[list[relax.Var]] = [[], []]
                for index in range(count):
                    param = builder.emit(relax.TupleGetItem(params, index))
                    gradient = builder.emit(relax.TupleGetItem(gradients, index))
                    estimates = []
                    for order, beta in enumerate(self._betas):
                        place = 3 + order * count + index
                        old = builder.emit(relax.TupleGetItem(states, place))
                        sample = gradient if order == 0 else multiply(gradient, gradient)
                        new = builder.emit(
                            add(
                                multiply(constant(beta), old),
                                multiply(constant(1.0 - beta), sample),
                            )
                        )
                        moments[order].append(new)
                        estimates.append(builder.emit(relax.op.divide(new, corrections[order])))
                    root = builder.emit(add(relax.op.sqrt(estimates[1]), constant(self._epsilon)))
                    step = builder.emit(relax.op.divide(estimates[0], root))
                    if self._weight_decay:
                        step = builder.emit(
                            add(step, multiply(constant(self._weight_decay), param))
                        )
                    updated.append(builder.emit(subtract(param, multiply(rate, step))))
                new_params = builder.emit_output(relax.Tuple(updated))
                new_states = builder.emit_output(
                    relax.Tuple([rate, *products, *moments[0], *moments[1]])
                )
            builder.emit_func_output(relax.Tuple([new_params, new_states]))
        return builder.get()[self.name]
