from __future__ import annotations

import json
import re

import pytest

from hone.errors import HoneError, ToolchainError, UsageError
from hone.targets import features
from hone.targets.target import Target, describe, names, resolve

CPUS = [name for name in names() if resolve(name).kind == "cpu"]
GPUS = [name for name in names() if resolve(name).kind == "cuda"]


def llvm_features(target) -> set[str]:
    from tvm.target import codegen

    return set(codegen.llvm_get_cpu_features(target))


def test_names_hold_what_users_ask_for():
    assert names()[:2] == ("host", "generic")
    assert {
        *("x86-64-v2", "x86-64-v3", "x86-64-v4", "skylake-avx512", "icelake-server"),
        *("sapphirerapids", "zen3", "zen4", "zen5", "rpi3", "rpi4", "rpi5", "jetson-orin"),
        *("graviton2", "graviton3", "graviton4"),
        *("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100"),
    } <= set(names())
    assert len(names()) == len(set(names()))


@pytest.mark.parametrize("name", names())
def test_table_entry_is_consistent(name):
    target = resolve(name)
    assert target.name == name
    assert resolve(target) is target
    assert list(target.features) == sorted(set(target.features))
    assert not set(target.features) & set(target.disabled)
    assert target.sources
    assert target.cores >= 1
    assert target.l1d_bytes % 1024 == 0
    assert target.vector_bits % 128 == 0
    assert set(target.features) | set(target.disabled) <= features.known(target.arch)
    facts = describe(target)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["compiles"] == (target.kind == "cpu")


@pytest.mark.parametrize("name", CPUS)
def test_llvm_generates_exactly_what_the_target_lists(name):
    # Of what can be asked for at load time, LLVM may use all that is listed and nothing else.
    target = resolve(name)
    assert llvm_features(target.tvm_target(2)) & features.known(target.arch) == set(target.features)


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_llvm_knows_every_feature_name(arch):
    from tvm.target import Target as TVMTarget

    mcpu = {"x86_64": "x86-64", "aarch64": "generic"}[arch]
    for name in features.known(arch):
        target = {"kind": "llvm", "mtriple": f"{arch}-linux-gnu", "mcpu": mcpu}
        assert name in llvm_features(TVMTarget({**target, "mattr": [f"+{name}"]})), name


@pytest.mark.parametrize("name", CPUS)
def test_llvm_knows_the_processor(name):
    from tvm.target import codegen

    target = resolve(name)
    assert target.mcpu in set(codegen.llvm_get_cpu_archlist(target.tvm_target(1)))


def test_tvm_sees_the_instructions_when_they_are_explicit():
    from tvm.target import codegen

    def has(name: str, *wanted: str) -> bool:
        return codegen.target_has_features(list(wanted), resolve(name).tvm_target(2))

    assert has("icelake-server", "avx512vnni", "avx512f", "avx512bw")
    assert not has("x86-64-v4", "avx512vnni")
    assert not has("zen3", "avxvnni")
    assert has("rpi5", "dotprod")
    assert not has("rpi4", "dotprod")
    assert not has("rpi4", "aes")
    target = resolve("rpi5").tvm_target(4)
    assert list(target.keys) == ["arm_cpu", "cpu"]
    assert int(target.attrs["num-cores"]) == 4


def registers(name: str, lanes: int) -> set[str]:
    """Kinds of vector registers in a kernel of `lanes` lanes, or of a plain loop when 0."""
    import tvm
    from tvm import te

    a, b = (te.placeholder((1024,), name=name) for name in "AB")
    c = te.compute((1024,), lambda i: a[i] * b[i], name="C")
    schedule = tvm.s_tir.Schedule(te.create_prim_func([a, b, c]))
    if lanes:
        (loop,) = schedule.get_loops(schedule.get_sblock("C"))
        schedule.vectorize(schedule.split(loop, [None, lanes])[1])
    library = tvm.compile(schedule.mod, resolve(name).tvm_target(1))
    used = re.findall(r"\b([xyz]mm)\d+", library.mod.inspect_source("asm"))
    return set(used)


@pytest.mark.parametrize(
    ("name", "lanes", "widest"),
    [
        ("zen5", 16, "zmm"),
        ("zen5", 0, "zmm"),
        ("skylake-avx512", 0, "zmm"),
        ("x86-64-v3", 8, "ymm"),
        ("x86-64-v3", 16, "ymm"),
        ("x86-64-v3", 0, "ymm"),
        ("x86-64-v2", 4, "xmm"),
        ("generic", 0, "xmm"),
    ],
)
def test_vector_bits_are_the_width_that_code_uses(name, lanes, widest):
    assert {"xmm": 128, "ymm": 256, "zmm": 512}[widest] == resolve(name).vector_bits
    assert max(registers(name, lanes)) == widest


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "raspi4",
            "there is no target 'raspi4'.\n"
            "  hint: did you mean rpi4 or rpi5 or rpi3? `hone target list` shows them all.",
        ),
        (
            "Zen5",
            "there is no target 'Zen5'.\n"
            "  hint: did you mean zen5 or zen4 or zen3? `hone target list` shows them all.",
        ),
        ("?", "there is no target '?'.\n  hint: `hone target list` shows them all."),
    ],
)
def test_resolve_names_the_nearest_when_unknown(name, text):
    with pytest.raises(UsageError) as error:
        resolve(name)
    assert str(error.value) == text
    assert error.value.exit_code == 2


@pytest.mark.parametrize("name", GPUS)
def test_cuda_target_refuses_to_compile(name):
    with pytest.raises(ToolchainError) as error:
        resolve(name).tvm_target(1)
    assert str(error.value) == (
        f"target '{name}' is a CUDA device, and this version of hone writes packages for "
        "processors only: CUDA packages come with a later release.\n"
        "  hint: compile for a processor, such as --target host; "
        "`hone target list` shows them all."
    )
    assert error.value.exit_code == 6


@pytest.mark.parametrize("threads", [0, -1])
def test_llvm_refuses_when_there_are_no_threads(threads):
    with pytest.raises(UsageError, match=f"threads must be at least 1, not {threads}\\."):
        resolve("generic").llvm(threads)


def test_resolve_raises_only_errors_of_ours():
    with pytest.raises(HoneError):
        resolve("")


def test_target_is_frozen():
    with pytest.raises(AttributeError):
        resolve("generic").cores = 3
    with pytest.raises(TypeError, match="positional"):
        Target("generic")


def test_extensions_are_left_out_when_the_name_says_so():
    whole, without = resolve("sapphirerapids"), resolve("sapphirerapids,-amx-tile")
    assert without.name == "sapphirerapids,-amx-tile"
    assert set(whole.features) - set(without.features) == {"amx-bf16", "amx-int8", "amx-tile"}
    assert without.tensor_instructions == ("avx512vnni", "avxvnni", "avx512bf16")
    assert without.disabled == ()
    both = resolve("sapphirerapids,-amx-int8,-avx512bf16")
    assert both.name == "sapphirerapids,-amx-int8,-avx512bf16"
    assert set(whole.features) - set(both.features) == {"amx-int8", "avx512bf16"}
    assert not llvm_features(both.tvm_target(1)) & {"amx-int8", "avx512bf16"}


def test_extensions_of_a_core_are_switched_off_when_they_are_left_out():
    target = resolve("graviton3,-i8mm")
    assert "i8mm" in target.disabled
    assert not {"i8mm"} & (set(target.features) | llvm_features(target.tvm_target(1)))


def test_target_is_refused_when_what_is_left_out_is_not_there():
    with pytest.raises(UsageError) as caught:
        resolve("zen5,-amx-tile")
    assert str(caught.value) == (
        "'amx-tile' cannot be left out of target 'zen5'.\n"
        "  hint: these can: avx512bf16, avx512vnni, avxvnni."
    )
    with pytest.raises(UsageError, match=r"^'avx2' cannot be left out of target 'sapphirerapids'"):
        resolve("sapphirerapids,-avx2")
    with pytest.raises(UsageError, match="what follows a comma must be -FEATURE"):
        resolve("host,avx512vnni")
    with pytest.raises(UsageError, match="there is no target 'nothing'"):
        resolve("nothing,-amx-tile")
