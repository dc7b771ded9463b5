"""The C source around the kernels of a package: `packaging/host.c` and what belongs to one model.

For every kernel a function that TVM's virtual machine can call. For a model that has a plan
`hone_run`, which calls all kernels in order without the virtual machine:

``hone_run(table)`` takes the address of an array of pointers: the workspace, the inputs, the
outputs, the constants in the order of the Relax function `CONSTANTS`. Each begins at a multiple of
64 bytes. ``hone_workspace_bytes()`` says how large the workspace is. Two runs at once need two
tables with two workspaces. ``hone_signature()`` is the address of a text, the JSON of
``{"inputs": [[dtype, [extent, ...]], ...], "outputs": [...]}``: what runs here must be what a
package's manifest says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files

from hone.passes.lower.export_kernels import PREFIX

from .plan import Place, Plan, Region

CONSTANTS = "hone_constants"
"""Relax function that returns the constants of the plan as a tuple."""


def host_source(kernels: Mapping[str, int], plan: Plan | None) -> str:
    """Return the C source of one package.

    Parameters
    ----------
    kernels : mapping of str to int
        Number of parameters of each raw kernel.
    plan : Plan or None
        What a run is, if it can be planned.
    """
    text = files("hone.packaging").joinpath("host.c").read_text(encoding="utf-8")
    parts = [text, *(_kernel(name, count) for name, count in sorted(kernels.items()))]
    if plan is not None:
        parts.append(_run(plan))
    return "\n".join(parts)


def _kernel(name: str, count: int) -> str:
    parameters = ", ".join(["void*"] * count) or "void"
    arguments = ", ".join(f"Data(&arguments[{index}])" for index in range(count))
    return f"""\
KERNEL int {PREFIX}{name}({parameters});
PACKED({name}) {{
  Mode mode = Enter();
  int status = {PREFIX}{name}({arguments});
  Leave(mode);
  return status;
}}
"""


def _run(plan: Plan) -> str:
    first = {Region.WORKSPACE: 0, Region.INPUT: 1, Region.OUTPUT: 1 + len(plan.inputs)}
    first[Region.CONSTANT] = first[Region.OUTPUT] + len(plan.outputs)

    def at(place: Place) -> str:
        pointer = f"table[{first[place.region] + place.index}]"
        return f"{pointer} + {place.offset_bytes}" if place.offset_bytes else pointer

    lines = [
        f"  if (status == 0) status = {PREFIX}{call.kernel}({', '.join(map(at, call.places))});"
        for call in plan.calls
    ]
    for copy in plan.copies:
        target = at(Place(region=Region.OUTPUT, index=copy.output))
        lines.append(f"  memcpy({target}, {at(copy.source)}, {copy.size_bytes});")
    body = "\n".join(lines)
    signature = json.dumps(
        {
            "inputs": [[shape.dtype, shape.extents] for shape in plan.inputs],
            "outputs": [[shape.dtype, shape.extents] for shape in plan.outputs],
        }
    )
    return f"""\
PACKED(hone_run) {{
  char* const* table = arguments[0].pointer;
  int status = 0;
  Mode mode = Enter();
{body}
  Leave(mode);
  return status;
}}

PACKED(hone_workspace_bytes) {{
  return Integer(result, {plan.workspace_bytes});
}}

PACKED(hone_signature) {{
  static const char text[] = {_literal(signature)};
  return Integer(result, (int64_t)(intptr_t)text);
}}
"""


def _literal(text: str) -> str:
    """Return a string of C; JSON escapes what C would not take."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
