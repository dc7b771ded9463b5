"""A tiny compiled model for the tests of the package, the runtime and verify."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hone.package import Package
from hone.packaging.golden import Golden
from hone.packaging.manifest import ProvenanceEntry, TargetEntry
from hone.signature import Signature, TensorSpec
from hone.targets import features

if TYPE_CHECKING:
    from hone.assembling import Assembled
    from hone.model import Model


class Tiny:
    """``y = factor * data + s``, ``n+1``, an input and a weight handed through, thread ids.

    Its kernel is vectorized and faults on a misaligned input. A parallel loop notes which thread
    ran each of its iterations.
    """

    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    inputs = (
        TensorSpec(name="gpu_0/data:0", dtype="float32", shape=(4, 24)),
        TensorSpec(name="n.1", dtype="int64", shape=(3,)),
        TensorSpec(name="s", dtype="float32", shape=()),
    )
    outputs = (
        TensorSpec(name="y", dtype="float32", shape=(4, 24)),
        TensorSpec(name="n+1", dtype="int64", shape=(3,)),
        TensorSpec(name="same input", dtype="float32", shape=(4, 24)),
        TensorSpec(name="weight", dtype="float32", shape=(2, 3)),
    )
    thread = TensorSpec(name="thread", dtype="uint64", shape=(8,))

    def __init__(self) -> None:
        self._libraries: dict[tuple[float, bool], bytes] = {}

    def feeds(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Return seeded inputs."""
        generator = np.random.default_rng(seed)
        return {
            "gpu_0/data:0": generator.standard_normal((4, 24), dtype=np.float32),
            "n.1": generator.integers(-9, 9, 3),
            "s": np.array(generator.standard_normal(), np.float32),
        }

    def answers(
        self, feeds: Mapping[str, np.ndarray], factor: float = 2.0
    ) -> dict[str, np.ndarray]:
        """Return what the model answers, by numpy."""
        data = np.array(feeds["gpu_0/data:0"], np.float32)
        return {
            "y": np.float32(factor) * data + np.float32(feeds["s"]),
            "n+1": np.array(feeds["n.1"], np.int64) + 1,
            "same input": data,
            "weight": self.weight,
        }

    def target(self, **changes: object) -> TargetEntry:
        """Return this machine as a target of one thread."""
        arch = features.machine()
        facts = {"name": "host", "arch": arch, "triple": arch, "features": (), "threads": 1}
        return TargetEntry.model_validate(facts | changes)

    def pack(self, library: bytes, *, thread_ids: bool = False, **changes: object) -> Package:
        """Put a package with one golden sample around a library."""
        feeds = self.feeds()
        outputs = (*self.outputs, self.thread) if thread_ids else self.outputs
        sample = Golden(inputs=feeds, outputs=self.answers(feeds))
        facts: dict[str, object] = {
            "signature": Signature(inputs=self.inputs, outputs=outputs),
            "target": self.target(),
            "precision": "fp32",
            "weights_bytes": self.weight.nbytes,
            "kernels": {"scale": ("conv_1", "relu_1")},
            "provenance": ProvenanceEntry(source_sha256="5a" * 32, opset=17),
            "golden": () if thread_ids else (sample,),
            "tolerance": {"y": 1e-5, "same input": 0.0, "weight": 0.0},
            "recipe": {"prune": {"ratio": 0.5}},
        }
        return Package.create(library=library, **(facts | changes))

    def package(
        self, factor: float = 2.0, *, thread_ids: bool = False, **changes: object
    ) -> Package:
        """Compile, once per factor, and package."""
        key = factor, thread_ids
        if key not in self._libraries:
            self._libraries[key] = self._compile(factor, thread_ids=thread_ids)
        return self.pack(self._libraries[key], thread_ids=thread_ids, **changes)

    def _compile(self, factor: float, *, thread_ids: bool) -> bytes:
        import tvm
        from tvm import relax, te, tirx

        from hone import pipeline
        from hone.targets.target import resolve

        def scale(a, b):
            return te.compute((4, 24), lambda i, j: a[i, j] * tirx.const(factor, "float32") + b())

        def successor(a):
            return te.compute((3,), lambda i: a[i] + tirx.const(1, "int64"))

        def thread(_):
            # Slow, so that no thread is done before the others have begun.
            def identity(_index):
                pause = tirx.call_extern("uint64", "usleep", 1000)
                return pause + tirx.call_extern("uint64", "pthread_self")

            return te.compute(self.thread.shape, identity)

        params = [
            relax.Var(name, relax.TensorType(spec.shape, spec.dtype))
            for name, spec in zip("xns", self.inputs, strict=True)
        ]
        x, n, s = params
        block = relax.BlockBuilder()
        with block.function("main", params):
            with block.dataflow():
                results = [
                    block.emit_te(scale, x, s, primfunc_name_hint="scale"),
                    block.emit_te(successor, n, primfunc_name_hint="successor"),
                    x,
                    relax.const(self.weight),
                ]
                if thread_ids:
                    results.append(block.emit_te(thread, x, primfunc_name_hint="thread"))
                result = block.emit_output(relax.Tuple(results))
            block.emit_func_output(result)
        schedule = tvm.s_tir.Schedule(block.get())
        actions = {"scale": schedule.vectorize} | (
            {"thread": schedule.parallel} if thread_ids else {}
        )
        for kernel, action in actions.items():
            schedule.work_on(kernel)
            (sblock,) = schedule.get_child_blocks(schedule.get_sblock("root"))
            action(schedule.get_loops(sblock)[-1])
        return pipeline.link(schedule.mod, resolve("host"), threads=2)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """Return the tiny model."""
    return Tiny()


@pytest.fixture(scope="session")
def paper(tiny: Tiny) -> Package:
    """Return a small package whose library is no code."""
    return tiny.pack(b"\x7fELF paper")


@pytest.fixture(scope="session")
def dense() -> tuple[Model, Assembled]:
    """Return a model of two equal layers, ``relu(x w + b)`` twice, and what it compiles to."""
    from onnx import TensorProto, helper, numpy_helper

    from hone import driver, importer
    from hone.targets.target import resolve

    generator = np.random.default_rng(7)
    nodes, weights = [], []
    for name, given in (("first", "x"), ("second", "first_out")):
        for suffix, shape in (("w", (5, 5)), ("b", (5,))):
            values = generator.standard_normal(shape, dtype=np.float32)
            weights.append(numpy_helper.from_array(values, f"{name}_{suffix}"))
        inputs = [given, f"{name}_w", f"{name}_b"]
        nodes.append(helper.make_node("Gemm", inputs, [f"{name}_sum"], name=name))
        result = [f"{name}_out"]
        nodes.append(helper.make_node("Relu", [f"{name}_sum"], result, name=f"{name}_relu"))
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 5])],
        [helper.make_tensor_value_info("second_out", TensorProto.FLOAT, [3, 5])],
        weights,
    )
    model = importer.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    return model, driver.assemble(model, target=resolve("host"), threads=1)
