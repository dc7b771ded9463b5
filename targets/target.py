"""What hone knows about a machine that it compiles for, and how a name becomes that knowledge.

The tables are in ``x86.py``, ``arm.py`` and ``cuda.py``; ``host.py`` asks the machine itself.
Importing this module imports neither TVM nor anything heavy.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from hone.errors import ToolchainError, UsageError

if TYPE_CHECKING:
    import tvm

Arch = Literal["x86_64", "aarch64"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A machine that code is generated for.

    Parameters
    ----------
    name : str
        The name that :func:`resolve` knows it by.
    kind : {"cpu", "cuda"}
        What runs the kernels.
    arch : {"x86_64", "aarch64"}
        The instruction set of the processor (of the host processor when `kind` is ``"cuda"``).
    triple : str
        LLVM triple, such as ``"x86_64-linux-gnu"``.
    mcpu : str
        LLVM processor name: on x86 the psABI level, to which `features` are added explicitly; on
        ARM the core, whose pipeline model matters; ``"sm_90"`` and the like when `kind` is
        ``"cuda"``.
    features : tuple of str
        LLVM names of *all* instruction set extensions that the code may use, sorted; what
        :func:`hone.targets.features.missing` checks before a package is mapped.
    disabled : tuple of str
        LLVM names that `mcpu` implies and this machine lacks, passed as ``-name``.
    cores : int
        Physical cores that a process may use (for a family of parts: of the largest one).
    vector_bits : int
        Width in bits of the vectors that generated code uses.
    vector_registers : int
        Architectural vector registers of that width.
    l1d_bytes, l2_bytes : int
        First and second level data cache per core, in bytes.
    l3_bytes : int
        Last level cache that one core can reach, in bytes; 0 where there is none.
    tensor_instructions : tuple of str
        Dot product and matrix extensions among `features`, best first: ``"amx-int8"``,
        ``"amx-bf16"``, ``"avx512vnni"``, ``"avxvnni"``, ``"avx512bf16"``, ``"i8mm"``,
        ``"dotprod"``, ``"bf16"``.
    glibc : str or None
        Oldest C library that a cross-linked library must load on; None links against the
        system's own.
    sources : tuple of str
        Where each fact comes from.
    separate_adders : bool
        Whether vectors are added on units of their own, beside as many that multiply and add.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    arch: Arch
    triple: str
    mcpu: str
    features: tuple[str, ...]
    cores: int
    vector_bits: int
    vector_registers: int
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int
    tensor_instructions: tuple[str, ...]
    sources: tuple[str, ...]
    glibc: str | None = None
    disabled: tuple[str, ...] = ()
    separate_adders: bool = False

    def without(self, *features: str) -> Target:
        """Return this target with some of its dot product and matrix extensions left out.

        Parameters
        ----------
        *features : str
            Of `tensor_instructions`, or ``"amx-tile"``, which takes all of AMX with it.

        Returns
        -------
        Target
            Its name says what it lacks: ``"host,-amx-tile"``.

        Raises
        ------
        UsageError
            If the target does not have one of them, or its vectors depend on it.
        """
        # Only these: without others the vectors would no longer be those that the table says.
        removable = [f for f in self.features if f in self.tensor_instructions or f == "amx-tile"]
        left_out: set[str] = set()
        for feature in features:
            if feature not in removable:
                raise UsageError(
                    f"{feature!r} cannot be left out of target {self.name!r}.",
                    hint=f"these can: {', '.join(removable) or 'none'}.",
                )
            family = "amx-" if feature == "amx-tile" else feature
            left_out.update(f for f in self.features if f.startswith(family))
        return replace(
            self,
            name=",-".join([self.name, *features]),
            features=tuple(f for f in self.features if f not in left_out),
            tensor_instructions=tuple(f for f in self.tensor_instructions if f not in left_out),
            # A psABI level implies none of them; a core of ARM may.
            disabled=self.disabled
            if self.arch == "x86_64"
            else tuple(sorted({*self.disabled, *left_out})),
        )

    def llvm(self, threads: int) -> dict[str, Any]:
        """TVM target dictionary of this processor.

        Parameters
        ----------
        threads : int
            Threads that the kernels will run on; what tuning and parallel loops are sized for.

        Returns
        -------
        dict
            ``kind``, ``mtriple``, ``mcpu``, ``mattr`` (every feature by name) and ``num-cores``.

        Raises
        ------
        ToolchainError
            If the target is a GPU.
        UsageError
            If `threads` is not positive.
        """
        if self.kind != "cpu":
            raise ToolchainError(
                f"target {self.name!r} is a CUDA device, and this version of hone writes packages "
                "for processors only: CUDA packages come with a later release.",
                hint="compile for a processor, such as --target host; "
                "`hone target list` shows them all.",
            )
        if threads < 1:
            raise UsageError(f"threads must be at least 1, not {threads}.")
        attributes = [f"+{name}" for name in self.features]
        attributes += [f"-{name}" for name in self.disabled]
        if self.vector_bits >= 512:
            # x86-64-v4 carries this tuning flag, with which LLVM's own vectorizers stop at ymm.
            attributes.append("-prefer-256-bit")
        if self.arch == "x86_64":
            # LLVM's vectorizer believes gathers and scatters to be cheap: it vectorizes outer loops
            # with them, and transpositions took 2 to 9 times as long (docs/performance.md).
            attributes += ["+prefer-no-gather", "+prefer-no-scatter"]
            # Else LLVM takes `vpdpwssd` apart to a product and an addition where it sees a chain.
            attributes.append("+fast-dpwssd")
            # `prefetchw` takes a line from the other cores before it is stored to. AMD64 has always
            # had it; an Intel 64 processor without it skips it, as a reserved no-operation.
            attributes.append("+prfchw")
        return {
            "kind": "llvm",
            "mtriple": self.triple,
            "mcpu": self.mcpu,
            "mattr": attributes,
            "num-cores": threads,
        }

    def tvm_target(self, threads: int) -> tvm.target.Target:
        """TVM target object of :meth:`llvm`.

        Parameters
        ----------
        threads : int
            As for :meth:`llvm`.

        Returns
        -------
        tvm.target.Target
        """
        from tvm.target import Target as TVMTarget

        return TVMTarget(self.llvm(threads))


@cache
def _tables() -> Mapping[str, Target]:
    from . import arm, cuda, x86

    return {entry.name: entry for table in (x86, arm, cuda) for entry in table.TARGETS}


def names() -> tuple[str, ...]:
    """Names that :func:`resolve` knows.

    Returns
    -------
    tuple of str
        ``"host"`` first, then the tables in their order.
    """
    return ("host", *_tables())


def resolve(name: str | Target) -> Target:
    """Target of a name.

    Parameters
    ----------
    name : str or Target
        One of :func:`names`; ``,-FEATURE`` behind it leaves out a dot product or matrix extension,
        such as ``"host,-amx-tile"``, for a comparison. A Target is returned as it is.

    Returns
    -------
    Target

    Raises
    ------
    UsageError
        If there is no target of that name, or what is to be left out cannot be.
    ToolchainError
        If the name is ``"host"`` and this machine is not one that hone generates code for.
    """
    if isinstance(name, Target):
        return name
    base, *changes = name.split(",")
    if changes:
        if not all(change.startswith("-") for change in changes):
            raise UsageError(
                f"{name!r} names no target: what follows a comma must be -FEATURE, which leaves "
                "an extension out.",
                hint="such as --target host,-amx-tile.",
            )
        return resolve(base).without(*(change.removeprefix("-") for change in changes))
    if name == "host":
        from .host import detect

        return detect()
    known = _tables()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), names(), n=3, cutoff=0.5)
    did_you_mean = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(
        f"there is no target {name!r}.", hint=f"{did_you_mean}`hone target list` shows them all."
    )


def describe(target: Target) -> dict[str, Any]:
    """Facts about a target as JSON-able data.

    Parameters
    ----------
    target : Target

    Returns
    -------
    dict
        Field name to value, tuples as lists; ``compiles`` says whether this version of hone
        generates code for it.
    """
    facts = {field.name: getattr(target, field.name) for field in fields(target)}
    return {
        **{key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()},
        "compiles": target.kind == "cpu",
    }
