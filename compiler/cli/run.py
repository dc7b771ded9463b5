"""``hone run``: a package on inputs."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hone.cli import options, output
from hone.cli.command import verb
from hone.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from hone.runtime import Runner


@verb(
    "run",
    example="hone run net.hone -i in.npz -o out.npz\nhone run net.hone -i random:1 --json",
)
@click.argument("package", type=options.PATH, metavar="PACKAGE")
@click.option(
    "-i",
    "--input",
    "given",
    required=True,
    metavar="DATA",
    help="in.npz with an array per input, or other samples in the data syntax.",
)
@click.option("-o", "--output", "to", type=options.PATH, metavar="OUT.npz", help="All outputs.")
@click.option("--threads", type=options.THREADS, metavar="N", help="Default: the package's.")
@options.as_json
def run(package: Path, given: str, to: Path | None, threads: int | None, as_json: bool) -> None:
    """Run a package and write its outputs, or show them in short.

    The outputs of several samples are joined along their first axis. No compiler is needed.
    """
    from hone import runtime

    if to is not None:
        options.writable(to, package, Path(given))
    runner = runtime.load(package, threads=threads)
    outputs, samples = _answers(runner, given)
    if to is not None:
        write_npz(to, outputs)
        output.note(f"wrote {to}")
    rows = [_summary(name, array) for name, array in outputs.items()]
    if as_json:
        output.write_json({"samples": samples, "outputs": rows})
    elif to is None:
        output.table(
            ("output", "dtype", "shape", "least", "largest", "mean"),
            [
                (
                    row["name"],
                    row["dtype"],
                    "x".join(map(str, row["shape"])) or "scalar",
                    *(_figure(row[key]) for key in ("min", "max", "mean")),
                )
                for row in rows
            ],
            right="   >>>",
        )


def _answers(runner: Runner, given: str) -> tuple[dict[str, np.ndarray], int]:
    """Run every sample; return the joined outputs and how many samples there were."""
    import numpy as np

    from hone.data import load

    exact = _exact(runner, given)
    if exact is not None:
        return runner.run(exact), 1
    dataset = load(given, runner.signature, allow_random=True)
    answers = [runner.run(dataset.sample(index)) for index in range(len(dataset))]
    if not answers:
        raise UsageError("at least one sample is required, there is none", where=given)
    joined = {
        spec.name: (np.concatenate if spec.shape else np.stack)([a[spec.name] for a in answers])
        for spec in runner.signature.outputs
    }
    return joined, len(answers)


def _exact(runner: Runner, given: str) -> dict[str, np.ndarray] | None:
    """Return the arrays of an npz file that are just one run's inputs, else None."""
    import numpy as np

    if not given.endswith(".npz"):
        return None
    try:
        with np.load(given, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
        return None  # hone.data says what is wrong with it
    shapes = {spec.name: spec.shape for spec in runner.signature.inputs}
    return arrays if {name: array.shape for name, array in arrays.items()} == shapes else None


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an npz file; unlike `numpy.savez` it takes an array that is called ``file``.

    Raises
    ------
    UsageError
        It cannot be written.
    """
    from numpy.lib import format

    try:
        with zipfile.ZipFile(path, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    format.write_array(member, array, allow_pickle=False)
    except OSError as error:
        raise UsageError(f"cannot write: {error.strerror}", where=str(path)) from error


def _summary(name: str, array: np.ndarray) -> dict[str, Any]:
    import numpy as np

    row: dict[str, Any] = {"name": name, "dtype": str(array.dtype), "shape": list(array.shape)}
    # JSON has no NaN; a summary of such an output is what a reader wants to see first.
    row["finite"] = bool(np.isfinite(array).all())
    for key in ("min", "max", "mean"):
        row[key] = float(getattr(np, key)(array)) if array.size and row["finite"] else None
    return row


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"
