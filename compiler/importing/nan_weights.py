"""Finds weights that make every answer NaN, which would pass for equal to onnxruntime's."""

from __future__ import annotations

from collections.abc import Mapping, Set

import numpy as np

from .graph import Problem


def nan_weights(weights: Set[str], constants: Mapping[str, np.ndarray]) -> list[Problem]:
    """Return a problem for each weight that holds NaN, in the order of their names.

    Infinities are left alone: a table of masks holds them rightly.

    Parameters
    ----------
    weights : set of str
        Tensors that are read as weights; those that are no constants are passed over.
    constants : mapping of str to array
        What the file stores.
    """
    problems = []
    for name in sorted(weights & constants.keys()):
        values = constants[name]
        count = int(np.isnan(values).sum()) if values.dtype.kind == "f" else 0
        if count:
            problems.append(
                Problem(
                    node=name,
                    op="initializer",
                    message=f"{count} of {values.size} weights are NaN",
                    fix="export the model again from weights that are finite",
                )
            )
    return problems
