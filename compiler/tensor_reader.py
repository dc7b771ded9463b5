"""A network compiled for this machine that shows its inner tensors, sample by sample.

Memory is that of the tensors of one sample, however many samples there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tvm
from tvm import relax

from hone.passes.apply import apply
from hone.passes.quantize.expose_tensors import ExposeTensors
from hone.targets.target import resolve

from . import pipeline
from .model import Model

Run = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


class TensorReader:
    """Runs a model and returns chosen tensors.

    Parameters
    ----------
    model : Model
        Float or in integers; its module as it is read, layout included.
    names : sequence of str
        Of parameters or bindings, each once.
    threads : int
        Threads of one run.

    Raises
    ------
    ModelError
        A name is no tensor of the module.
    """

    def __init__(self, model: Model, names: Sequence[str], *, threads: int) -> None:
        self._inputs = [spec.name for spec in model.signature.inputs]
        self._names = tuple(names)
        self._run = compile_for_host(
            apply(model.module, ExposeTensors(tensors=self._names)), threads=threads
        )

    def read(self, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the tensors of one sample by name."""
        results = self._run([sample[name] for name in self._inputs])
        return dict(zip(self._names, results, strict=True))


def compile_for_host(module: tvm.IRModule, *, threads: int) -> Run:
    """Compile a module that returns a tuple, and return what runs it on this machine.

    Parameters
    ----------
    module : IRModule
        High-level operators, constant weights.
    threads : int
        Threads of one run.
    """
    target = resolve("host")
    lowered = pipeline.lower(module, target, threads=threads)
    scheduled = pipeline.schedule(lowered, target, threads=threads)
    executable = pipeline.build_executable(scheduled.module, target, threads=threads)
    main = relax.VirtualMachine(executable, tvm.cpu())["main"]

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        # Copied into TVM's own memory: generated code assumes its alignment.
        return [out.numpy() for out in main(*[tvm.runtime.tensor(x) for x in inputs])]

    return run
