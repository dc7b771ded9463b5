"""The C source around the kernels of a package: `packaging/host.c` and what belongs to one model.

For every kernel a function that TVM's virtual machine can call. For a model that has a plan
`hone_run`, which calls all kernels in order without the virtual machine:

``hone_run(table)`` takes the address of an array of pointers: the workspace, the inputs, the
outputs, the constants in the order of the Relax function `CONSTANTS`. Each begins at a multiple of
64 bytes. ``hone_workspace_bytes()`` says how large the workspace is. A batch in slices
(`slicing`) is a loop over them, in as many parts as threads take slices side by side; whichever
thread is free takes the next one. ``hone_slices()`` says how many there are, and ``hone_parts()``
how many at once: the virtual machine's ``main`` runs one slice. Two runs at once need two
tables with two workspaces. ``hone_signature()`` is the address of a text, the JSON of
``{"inputs": [[dtype, [extent, ...]], ...], "outputs": [...]}``: what runs here must be what a
package's manifest says.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from importlib.resources import files
from types import MappingProxyType

from hone.passes.lower.export_kernels import PREFIX

from .ahead import Ahead
from .plan import Copy, KernelCall, Place, Plan, Region, Shape

CONSTANTS = "hone_constants"
"""Relax function that returns the constants of the plan as a tuple."""

NOTHING = "nothing, 0"
"""Arguments of a kernel that shall request nothing: one line, again and again."""

MOST_ARGUMENTS = 48
"""Tensors of one kernel that `walker_source` can pass."""


def host_source(
    kernels: Mapping[str, int],
    plan: Plan | None,
    *,
    slices: int = 1,
    parts: int = 1,
    ahead: Mapping[int, Ahead] = MappingProxyType({}),
) -> str:
    """Return the C source of one package.

    Parameters
    ----------
    kernels : mapping of str to int
        Number of parameters of each raw kernel.
    plan : Plan or None
        What a run is, if it can be planned.
    slices, parts : int
        How often a run calls what the virtual machine knows as ``main``, and how many threads do
        so side by side; those of the plan, where there is one.
    ahead : mapping of int to Ahead
        What calls of the plan request, by their number; their kernels take an address and a step
        more (`hone.passes.lower.request_ahead`).
    """
    asking = set() if plan is None else {plan.calls[number].kernel for number in ahead}
    pieces = ["#define WATCH_DISTANCE 1" if asking else "", _host()]
    pieces += [_kernel(name, count, name in asking) for name, count in sorted(kernels.items())]
    if plan is not None:
        pieces.append(_run(plan, ahead, asking))
    pieces += [_number("hone_slices", slices), _number("hone_parts", parts)]
    return "\n".join(pieces)


def _number(name: str, value: int) -> str:
    return f"""\
PACKED({name}) {{
  return Integer(result, {value});
}}
"""


def _host() -> str:
    return files("hone.packaging").joinpath("host.c").read_text(encoding="utf-8")


def walker_source() -> str:
    """Return the C source that runs kernels given at run time, with a clock around each.

    ``hone_walk(steps, number, runs, ticks)`` makes ``runs`` runs of ``number`` calls. ``steps`` is
    an array of 64-bit numbers: for each call the address of the kernel, how many tensors it takes
    (`MOST_ARGUMENTS` at most), and their addresses. ``ticks`` gets ``number + 1`` nanoseconds of
    each run: when it began, and when each call ended. ``hone_launch()`` is the address of what a
    kernel's loops have to call to run on this library's threads.
    """
    cases = "\n".join(
        f"    case {count}: return ((int (*)({', '.join(['void*'] * count) or 'void'}))kernel)"
        f"({', '.join(f'a[{index}]' for index in range(count))});"
        for count in range(MOST_ARGUMENTS + 1)
    )
    return f"""\
{_host()}
static int Call(void* kernel, int64_t count, void* const* a) {{
  switch (count) {{
{cases}
    default: return -1;
  }}
}}

EXPORT int hone_walk(const int64_t* steps, int64_t number, int64_t runs, int64_t* ticks) {{
  int status = 0;
  Mode mode = Enter();
  for (int64_t run = 0; run < runs; ++run) {{
    const int64_t* step = steps;
    *ticks++ = Now();
    for (int64_t i = 0; i < number; ++i) {{
      status |= Call((void*)(intptr_t)step[0], step[1], (void* const*)(step + 2));
      step += 2 + step[1];
      *ticks++ = Now();
    }}
  }}
  Leave(mode);
  return status;
}}

EXPORT void* hone_launch(void) {{ return (void*)Launch; }}
"""


def _kernel(name: str, count: int, asks: bool) -> str:
    parameters = ", ".join(["void*"] * count) or "void"
    arguments = ", ".join(f"Data(&arguments[{index}])" for index in range(count))
    if asks:
        parameters, arguments = f"{parameters}, void*, int64_t", f"{arguments}, {NOTHING}"
    return f"""\
KERNEL int {PREFIX}{name}({parameters});
PACKED({name}) {{
  Mode mode = Enter();
  int status = {PREFIX}{name}({arguments});
  Leave(mode);
  return status;
}}
"""


def _run(plan: Plan, ahead: Mapping[int, Ahead], asking: Collection[str]) -> str:
    first = {Region.INPUT: 1, Region.OUTPUT: 1 + len(plan.inputs)}
    first[Region.CONSTANT] = first[Region.OUTPUT] + len(plan.outputs)
    shapes = {Region.INPUT: plan.inputs, Region.OUTPUT: plan.outputs}

    def at(place: Place) -> str:
        if place.region is Region.WORKSPACE:
            pointer = "workspace"
        else:
            pointer = f"table[{first[place.region] + place.index}]"
            if plan.slices > 1 and place.region in shapes:
                size_bytes = shapes[place.region][place.index].size_bytes
                pointer = f"{pointer} + slice * {size_bytes}"
        return f"{pointer} + {place.offset_bytes}" if place.offset_bytes else pointer

    def copied(copy: Copy) -> str:
        return f"  memcpy({at(copy.target)}, {at(copy.source)}, {copy.size_bytes});"

    def given(number: int, call: KernelCall) -> str:
        arguments = [at(place) for place in call.places]
        if number in ahead:
            asked = ahead[number]
            arguments += [at(asked.place), f"near * {asked.step_bytes}"]
        elif call.kernel in asking:
            arguments.append(NOTHING)
        return ", ".join(arguments)

    lines = [
        *map(copied, plan.loads),
        *(
            f"  if (status == 0) status = {PREFIX}{call.kernel}({given(number, call)});"
            for number, call in enumerate(plan.calls)
        ),
        *map(copied, plan.copies),
    ]
    if ahead:
        lines.insert(0, "  int64_t near = Near();")
    body = "\n".join(lines)
    signature = json.dumps(
        {
            "inputs": [_whole(shape, plan.slices) for shape in plan.inputs],
            "outputs": [_whole(shape, plan.slices) for shape in plan.outputs],
        }
    )
    return f"""\
enum {{ kSlices = {plan.slices}, kParts = {plan.parts} }};
static const int64_t kWorkspaceBytes = {plan.workspace_bytes};  // of one part

typedef struct {{
  char* const* table;
  int64_t next;  // the slice that nobody has taken yet
}} Batch;

static int Slice(char* const* table, char* workspace, int64_t slice) {{
  int status = 0;
  (void)workspace, (void)slice;
{body}
  return status;
}}

static int Slices(int part, Group* group, void* data) {{
  Batch* batch = data;
  char* workspace = batch->table[0] + part * kWorkspaceBytes;
  int status = 0;
  (void)group;
  while (part < kParts && status == 0) {{
    int64_t slice = __atomic_fetch_add(&batch->next, 1, __ATOMIC_RELAXED);
    if (slice >= kSlices) break;
    status = Slice(batch->table, workspace, slice);
  }}
  return status;
}}

PACKED(hone_run) {{
  Batch batch = {{.table = arguments[0].pointer}};
  Mode mode = Enter();
  int status = kParts > 1 ? Launch(Slices, &batch, 0) : Slices(0, NULL, &batch);
  Leave(mode);
  return status;
}}

PACKED(hone_workspace_bytes) {{
  return Integer(result, kWorkspaceBytes * kParts);
}}

PACKED(hone_signature) {{
  static const char text[] = {_literal(signature)};
  return Integer(result, (int64_t)(intptr_t)text);
}}
"""


def _whole(shape: Shape, slices: int) -> tuple[str, tuple[int, ...]]:
    """Return the type and extents of an input or output of all slices."""
    if slices == 1:
        return shape.dtype, shape.extents
    return shape.dtype, (slices * shape.extents[0], *shape.extents[1:])


def _literal(text: str) -> str:
    """Return a string of C; JSON escapes what C would not take."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
