"""Makes a network return chosen tensors instead of its own result.

Rewrites ``main`` of one dataflow block; what the tensors do not need disappears. Runs before
lowering, on a float or an integer module. Numerics: exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import relax

from hone.passes.graph.dataflow import Dataflow, Rebuilder


@tvm.transform.module_pass(opt_level=0)
class ExposeTensors:
    """Return each named tensor as it is, as one flat tuple in the order of the names.

    Parameters
    ----------
    tensors : sequence of str
        Names of bindings or parameters of ``main``, each once.
    """

    def __init__(self, *, tensors: Sequence[str]) -> None:
        self._tensors = tuple(tensors)

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the exposing module.

        Raises
        ------
        ModelError
            A name is no tensor of the function.
        """
        function = module["main"]
        graph = Dataflow(function)
        exposed = graph.tensors(self._tensors)
        chosen = set(exposed)
        rebuilder = Rebuilder(function)
        for binding in graph.bindings:
            if binding.var in chosen:
                value = rebuilder.use(binding.value)
                var = rebuilder.emit(value, str(binding.var.name), output=True)
                rebuilder.replace(binding.var, var)
            else:
                rebuilder.copy(binding)
        body = relax.Tuple([rebuilder.use(var) for var in exposed])
        return tvm.IRModule({"main": rebuilder.finish(body)}, attrs=module.attrs)
