"""The form of a network that ``SetupTrainer`` can train.

Rewrites the results of ``main``. Runs on high-level operators whose weights are parameters
(`LiftConstants`), before ``Gradient``. Numerics: exact; a softmax at the end is left out.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from hone.errors import ModelError
from hone.passes.graph.dataflow import Dataflow, Rebuilder, layer_of, shape_of, variables

from . import gradients
from .lift_constants import Trainable

_NHWC = (0, 2, 3, 1)
_CONV2D = tvm.ir.Op.get("relax.nn.conv2d")
_SOFTMAX = tvm.ir.Op.get("relax.nn.softmax")


@tvm.transform.module_pass(opt_level=0)
class ToNCHW:
    """Return convolutions in NHWC to NCHW, in which Relax knows their gradients.

    Variables keep their names. A module without convolutions in NHWC stays the very same.
    """

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module in NCHW."""
        calls = [binding.value for binding in Dataflow(module["main"]).bindings]
        if not any(
            isinstance(call, relax.Call)
            and call.op.same_as(_CONV2D)
            and str(call.attrs.data_layout) == "NHWC"
            for call in calls
        ):
            return module
        transform = relax.transform
        return tvm.transform.Sequential(
            [
                transform.ConvertLayout({"relax.nn.conv2d": ["NCHW", "OIHW"]}),
                transform.Normalize(),
                transform.FoldConstant(),
            ]
        )(module)


def in_own_layout(graph: Dataflow, constant: Trainable, value: np.ndarray) -> np.ndarray:
    """Return a value from the NCHW training view in the layout of a module's constant.

    ``[K, C, R, S] → [K, R, S, C]`` for a convolution in NHWC and what is added to its result.

    Parameters
    ----------
    graph : Dataflow
        ``main`` of the module.
    constant : Trainable
        Of the module.
    value : numpy.ndarray
        From the view.
    """
    calls = [graph.call(constant.var)]
    if calls[0] is not None and not calls[0].op.same_as(_CONV2D):
        calls = [graph.call(argument, _CONV2D) for argument in calls[0].args]
    last = any(call is not None and str(call.attrs.data_layout) == "NHWC" for call in calls)
    if last and value.ndim == len(_NHWC):
        value = value.transpose(_NHWC)
    return np.ascontiguousarray(value).reshape(constant.value.shape)


def backbone(main: relax.Function) -> relax.Function:
    """Return the network with each output a variable of its own, logits instead of softmax.

    Parameters
    ----------
    main : relax.Function
        One dataflow block.

    Returns
    -------
    relax.Function
        Named ``backbone``; returns one tensor or a tuple written out.
    """
    graph = Dataflow(main)
    outputs = []
    for output in graph.outputs:
        call = graph.call(output, _SOFTMAX)
        last = call is not None and int(call.attrs.axis) in (-1, len(shape_of(call)) - 1)
        outputs.append(call.args[0] if call is not None and last else output)
    builder = Rebuilder(main)
    for binding in graph.bindings:
        builder.copy(binding)
    results = [
        builder.emit(builder.use(output), f"output_{index}", output=True)
        for index, output in enumerate(outputs)
    ]
    function = builder.finish(results[0] if len(results) == 1 else relax.Tuple(results))
    return function.with_attr("global_symbol", "backbone")


def require_gradients(main: relax.Function, inputs: int) -> None:
    """Check that every layer behind a trained weight has a gradient.

    Parameters
    ----------
    main : relax.Function
        With the trained weights as parameters.
    inputs : int
        How many of its first parameters are inputs.

    Raises
    ------
    ModelError
        Lists every layer that has none.
    """
    gradients.register()
    reached = set(list(main.params)[inputs:])
    problems = []
    for binding in Dataflow(main).bindings:
        value = binding.value
        if not reached.intersection(variables(value)):
            continue
        reached.add(binding.var)
        missing = _missing_gradient(value) if isinstance(value, relax.Call) else None
        if missing is not None:
            problems.append(f"{layer_of(binding.var)}: {missing} has no gradient")
    if problems:
        raise ModelError(
            "the model cannot be trained",
            problems=problems,
            hint="leave recovery out of the recipe",
        )


def _missing_gradient(call: relax.Call) -> str | None:
    """Return the name of an operator without a gradient, or None."""
    if not isinstance(call.op, tvm.ir.Op) or not gradients.has_gradient(call.op):
        return str(getattr(call.op, "name", call.op))
    if call.op.same_as(_CONV2D):
        layouts = (str(call.attrs.data_layout), str(call.attrs.kernel_layout))
        if layouts != ("NCHW", "OIHW"):
            return f"relax.nn.conv2d in {'/'.join(layouts)}"
        # Relax's gradient takes every convolution for one that is not dilated.
        if any(int(step) != 1 for step in call.attrs.dilation):
            return "a dilated convolution"
    return None
