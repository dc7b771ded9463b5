"""CUDA devices, listed for what comes later: this version of hone writes packages for processors.

``Target.llvm`` of these raises; see :class:`hone.targets.target.Target`.
"""

from __future__ import annotations

from .target import Target
from .x86 import LEVELS, TRIPLE

_GUIDE = "NVIDIA CUDA C++ Programming Guide 12.9, table 'Technical Specifications per CC'"
_TUNING = "NVIDIA {} Tuning Guide 12.9"

_KIB, _MIB = 1024, 1024 * 1024


def _device(
    arch: str, *, sms: int, shared: int, l2: int, mma: tuple[str, ...], guide: str, part: str
) -> Target:
    return Target(
        name=arch,
        kind="cuda",
        arch="x86_64",
        triple=TRIPLE,
        mcpu=arch,
        features=LEVELS["x86-64"],
        cores=sms,
        # A warp is 32 lanes of 32 bits; 255 registers per thread.
        vector_bits=1024,
        vector_registers=255,
        l1d_bytes=shared,
        l2_bytes=l2,
        l3_bytes=0,
        tensor_instructions=mma,
        sources=(_GUIDE, _TUNING.format(guide), f"multiprocessors and L2 of {part}, its datasheet"),
    )


_TURING = ("mma.s8", "mma.f16")
_AMPERE = ("mma.s8", "mma.bf16", "mma.f16", "mma.tf32")
_ADA = ("mma.e4m3", *_AMPERE)
_HOPPER = ("wgmma.e4m3", "wgmma.s8", "wgmma.bf16", "wgmma.f16", "wgmma.tf32")
_BLACKWELL = ("tcgen05.e2m1", "tcgen05.e4m3", "tcgen05.bf16", "tcgen05.f16", "tcgen05.tf32")

TARGETS: tuple[Target, ...] = (
    _device("sm_75", sms=40, shared=96 * _KIB, l2=4 * _MIB, mma=_TURING, guide="Turing", part="T4"),
    _device(
        "sm_80",
        sms=108,
        shared=192 * _KIB,
        l2=40 * _MIB,
        mma=_AMPERE,
        guide="NVIDIA Ampere GPU Architecture",
        part="A100",
    ),
    _device(
        "sm_86",
        sms=84,
        shared=128 * _KIB,
        l2=6 * _MIB,
        mma=_AMPERE,
        guide="NVIDIA Ampere GPU Architecture",
        part="RTX A6000",
    ),
    _device("sm_89", sms=58, shared=128 * _KIB, l2=48 * _MIB, mma=_ADA, guide="Ada", part="L4"),
    _device(
        "sm_90", sms=132, shared=256 * _KIB, l2=50 * _MIB, mma=_HOPPER, guide="Hopper", part="H100"
    ),
    _device(
        "sm_100",
        sms=148,
        shared=256 * _KIB,
        l2=126 * _MIB,
        mma=_BLACKWELL,
        guide="Blackwell",
        part="B200",
    ),
)
