"""All versions of a model and its peers in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import ToolchainError
from .measure import Contender, InProcess, Measurement, Rounds, measure
from .peers import Peer, PeerInfo
from .progress import Progress

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class BesidePeers:
    """What was measured.

    Parameters
    ----------
    measured : Measurement
        Of every version and every peer that runs, by name.
    peers : tuple of PeerInfo
        Those that run.
    notes : tuple of str
        Why others do not.
    """

    measured: Measurement
    peers: tuple[PeerInfo, ...]
    notes: tuple[str, ...]


def measure_beside_peers(
    versions: Mapping[str, Callable[[], object]],
    shipped: str,
    *,
    names: Sequence[str],
    source: onnx.ModelProto,
    inputs: Mapping[str, np.ndarray],
    threads: int,
    precision: str,
    rounds: Rounds,
    progress: Progress,
) -> BesidePeers:
    """Measure versions of a model and other engines together.

    Parameters
    ----------
    versions : mapping of str to callable
        Each runs once.
    shipped : str
        The version that is compared with the peers until the intervals are narrow.
    names : sequence of str
        Of the peers. One that refuses the model is left out, with a note: what was compressed and
        measured so far is worth more than the comparison.
    source : onnx.ModelProto
        What peers run.
    inputs : mapping of str to ndarray
        One sample.
    threads : int
        Threads of one run.
    precision : {"fp32", "bf16", "fp16"}
        Of the peers' float layers, as far as they can.
    rounds : Rounds
        How often to run.
    progress : Progress
        Where to report.
    """
    contenders: dict[str, Contender] = {name: InProcess(run) for name, run in versions.items()}
    running, notes = [], []
    with ExitStack() as stack:
        for name in names:
            try:
                peer = Peer(name, source, inputs, threads=threads, precision=precision)
            except ToolchainError as error:
                notes.append(f"not compared with {name}: {error.message}")
                continue
            contenders[name] = stack.enter_context(peer)
            running.append(peer.info)
        task = stack.enter_context(progress.task("measure all together", total=rounds.most))
        measured = measure(
            contenders,
            rounds,
            settle=[(shipped, info.name) for info in running]
            + [(shipped, name) for name in versions if name != shipped],
            on_round=task.update,
        )
    return BesidePeers(measured=measured, peers=tuple(running), notes=tuple(notes))
