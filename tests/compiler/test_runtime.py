import gc
import os
import re
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hone import runtime
from hone.errors import PackageError, ToolchainError, UsageError
from hone.package import Package
from hone.packaging import loaded_code, tvm_runtime
from hone.packaging.manifest import Versions
from hone.signature import Signature, TensorSpec
from hone.targets import features

two_processors = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")


@pytest.fixture(scope="module")
def package(tiny) -> Package:
    return tiny.package(thread_ids=True)


@pytest.fixture(scope="module")
def runner(package) -> runtime.Runner:
    return runtime.load(package)


def check(tiny, outputs, feeds, factor=2.0) -> None:
    # The kernel may fuse multiply and add: one rounding less, of products below 32.
    atol = 32 * 2**-24
    for name, expected in tiny.answers(feeds, factor).items():
        np.testing.assert_allclose(outputs[name], expected, rtol=1e-6, atol=atol, strict=True)


def threads_used(outputs) -> int:
    return len(set(outputs["thread"].tolist()))


def in_new_thread(function, *arguments):
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function, *arguments).result()


def python(script: str, *arguments: object, **environment: str) -> str:
    """Run a script in a fresh interpreter and return what it printed."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TVM_")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=inherited | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def mappings() -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:" in line]


def test_runner_answers_what_numpy_answers(tiny, runner):
    for seed in range(3):
        check(tiny, runner.run(tiny.feeds(seed)), tiny.feeds(seed))


def test_package_is_loaded_from_path_bytes_and_object(tiny, package, tmp_path):
    path = tmp_path / "model.hone"
    package.save(path)
    for source in (path, str(path), package.to_bytes(), package):
        loaded = runtime.load(source)
        assert loaded.manifest == package.manifest
        assert loaded.signature == package.signature
        check(tiny, loaded.run(tiny.feeds()), tiny.feeds())


def test_outputs_keep_the_order_of_the_signature(runner):
    feeds = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in runner.signature.inputs}
    assert list(runner.run(feeds)) == [spec.name for spec in runner.signature.outputs]


# --- inputs of any layout -------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 4, 16, 60])
def test_input_is_copied_when_it_is_misaligned(tiny, runner, offset):
    feeds = tiny.feeds()
    for name, array in tiny.feeds().items():
        memory = loaded_code.aligned_empty((array.nbytes + offset,), np.dtype(np.uint8))
        placed = memory[offset:].view(np.uint8)
        placed[:] = np.frombuffer(array.tobytes(), np.uint8)
        feeds[name] = np.ndarray(array.shape, array.dtype, placed.data)
        assert feeds[name].ctypes.data % 64 == offset
    check(tiny, runner.run(feeds), feeds)
    runner.prepare(feeds)()


@pytest.mark.parametrize(
    "rearrange",
    [
        lambda a: a[::-1, ::-1],
        lambda a: np.asfortranarray(a),
        lambda a: np.repeat(a, 2, axis=1)[:, ::2],
        lambda a: np.broadcast_to(a[:1], a.shape),
        lambda a: a.astype(">f4"),
        lambda a: np.asfortranarray(a.astype(">f4"))[::-1],
        lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
        lambda a: np.lib.stride_tricks.as_strided(a, a.shape, a.strides, writeable=False),
    ],
    ids=["negative", "fortran", "step", "broadcast", "big-endian", "all", "bytes", "read-only"],
)
def test_input_is_copied_when_its_layout_is_another(tiny, runner, rearrange):
    feeds = tiny.feeds()
    feeds["gpu_0/data:0"] = rearrange(feeds["gpu_0/data:0"])
    before = feeds["gpu_0/data:0"].tobytes()
    check(tiny, runner.run(feeds), feeds)
    assert feeds["gpu_0/data:0"].tobytes() == before


def test_inputs_are_taken_when_big_endian_integers_and_zero_dimensional(tiny, runner):
    feeds = tiny.feeds()
    feeds["n.1"] = feeds["n.1"].astype(">i8")[::-1]
    feeds["s"] = feeds["s"].astype(">f4")
    assert feeds["s"].shape == ()
    check(tiny, runner.run(feeds), feeds)


def test_inputs_are_refused_when_they_do_not_fit(tiny, runner):
    feeds = tiny.feeds()
    feeds["gpu_0/data:0"] = feeds["gpu_0/data:0"].astype(np.float64)
    feeds["n.1"] = feeds["n.1"][:2]
    feeds["z"] = feeds.pop("s")
    for refuse in (runner.run, runner.prepare):
        with pytest.raises(UsageError) as caught:
            refuse(feeds)
        assert str(caught.value) == (
            "inputs do not fit the model: input 'z' is unknown; input 'gpu_0/data:0' is float64, "
            "required is float32; input 'n.1' is (2,), required is (3,); input 's' is missing\n"
            "  hint: it takes gpu_0/data:0: float32[4, 24], n.1: int64[3], s: float32[]"
        )


def test_run_does_not_see_changes_when_an_input_is_bound(tiny, runner):
    feeds = tiny.feeds()
    call = runner.prepare(feeds)
    other = tiny.feeds(1)
    call()
    check(tiny, runner.run(other), other)
    call()
    assert call() is None
    check(tiny, runner.run(feeds), feeds)


@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "int8", "bool", "float64"])
def test_aligned_array_begins_at_64_bytes(shape, dtype):
    for _ in range(8):
        array = loaded_code.aligned_empty(shape, np.dtype(dtype))
        assert array.__array_interface__["data"][0] % 64 == 0
        assert (array.shape, array.dtype, array.flags.c_contiguous) == (shape, dtype, True)
        array[...] = 1


# --- outputs --------------------------------------------------------------------------------


def test_outputs_stay_what_they_were_when_the_runner_runs_again(tiny, runner):
    first = runner.run(tiny.feeds(1))
    for seed in range(2, 6):
        runner.run(tiny.feeds(seed))
    check(tiny, first, tiny.feeds(1))


def test_outputs_belong_to_the_caller_when_they_are_inputs_or_weights(tiny, runner):
    feeds = tiny.feeds()
    outputs = runner.run(feeds)
    for array in outputs.values():
        assert array.flags.owndata
        assert array.flags.writeable
        array[...] = 77
    check(tiny, runner.run(feeds), feeds)
    np.testing.assert_array_equal(feeds["gpu_0/data:0"], tiny.feeds()["gpu_0/data:0"])


def test_outputs_live_on_when_the_runner_is_gone(tiny):
    outputs = runtime.load(tiny.package(5.0)).run(tiny.feeds())
    gc.collect()
    check(tiny, outputs, tiny.feeds(), 5.0)


def test_package_is_refused_when_its_code_is_not_what_the_manifest_says(tiny):
    library = tiny.package().library
    fewer = Signature(inputs=tiny.inputs, outputs=tiny.outputs[:2])
    package = tiny.pack(library, signature=fewer, golden=(), tolerance={"y": 0})
    with pytest.raises(
        PackageError, match=r"lists the outputs y: .*; its code has float32\[4, 24\]"
    ):
        runtime.load(package)
    wrong = TensorSpec(name="s", dtype="float32", shape=(1,))
    other = Signature(inputs=(*tiny.inputs[:2], wrong), outputs=tiny.outputs)
    with pytest.raises(PackageError) as caught:
        runtime.load(tiny.pack(library, signature=other, golden=()))
    assert str(caught.value) == (
        "the package's manifest lists the inputs gpu_0/data:0: float32[4, 24], n.1: int64[3], "
        "s: float32[1]; its code has float32[4, 24], int64[3], float32[].\n"
        "  hint: rebuild it with `hone compile`."
    )


# --- mapping --------------------------------------------------------------------------------


def test_library_is_mapped_from_sealed_memory(tiny, package, monkeypatch):
    created = []
    create = os.memfd_create

    def memfd_create(name: str, flags: int) -> int:
        descriptor = create(name, flags)
        created.append((os.dup(descriptor), os.fstat(descriptor).st_ino))
        return descriptor

    monkeypatch.setattr(os, "memfd_create", memfd_create)
    loaded = runtime.load(package)
    ((descriptor, inode),) = created
    try:
        mapped = [line.split() for line in mappings() if line.split()[4] == str(inode)]
        assert "r-xp" in {fields[1] for fields in mapped}
        assert os.pread(descriptor, 1 << 20, 0) == package.library
        for tamper in (
            lambda: os.pwrite(descriptor, b"x", 0),
            lambda: os.ftruncate(descriptor, 1),
            lambda: os.ftruncate(descriptor, 1 << 20),
        ):
            with pytest.raises(PermissionError):
                tamper()
    finally:
        os.close(descriptor)
    check(tiny, loaded.run(tiny.feeds()), tiny.feeds())


def test_each_runner_runs_its_own_code_when_several_are_alive(tiny):
    # The dynamic loader knows libraries by path, and descriptor numbers repeat.
    factors = (2.0, 3.0, 5.0)
    runners = {factor: runtime.load(tiny.package(factor)) for factor in factors}
    twin = runtime.load(tiny.package(3.0))
    for factor, loaded in runners.items():
        check(tiny, loaded.run(tiny.feeds()), tiny.feeds(), factor)
    del runners[2.0], loaded
    gc.collect()
    again = runtime.load(tiny.package(7.0))
    check(tiny, again.run(tiny.feeds()), tiny.feeds(), 7.0)
    check(tiny, twin.run(tiny.feeds()), tiny.feeds(), 3.0)
    check(tiny, runners[5.0].run(tiny.feeds()), tiny.feeds(), 5.0)


def test_nothing_stays_open_or_mapped_when_a_runner_is_gone(tiny):
    package = tiny.package(11.0)
    runtime.load(package)
    gc.collect()
    descriptors, mapped = os.listdir("/proc/self/fd"), len(mappings())
    for _ in range(3):
        runtime.load(package).run(tiny.feeds())
    gc.collect()
    assert os.listdir("/proc/self/fd") == descriptors
    assert len(mappings()) == mapped


def test_library_is_refused_when_it_is_no_code(paper):
    with pytest.raises(ToolchainError) as caught:
        runtime.load(paper)
    assert "the package's code cannot be mapped from memory" in str(caught.value)


def test_environment_is_named_when_memory_files_are_forbidden(package, monkeypatch):
    def refuse(name: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(ToolchainError, match="cannot be mapped from memory") as caught:
        runtime.load(package)
    assert caught.value.exit_code == 6


# --- machines -------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_mapped(monkeypatch):
    def load_library(self, code: bytes) -> None:
        raise AssertionError("code was mapped")

    monkeypatch.setattr(tvm_runtime.TVMRuntime, "load_library", load_library)


@pytest.mark.usefixtures("nothing_is_mapped")
def test_package_is_refused_before_mapping_when_the_processor_lacks_features(tiny, monkeypatch):
    asked = []

    def missing(wanted, arch):
        asked.append((tuple(wanted), arch))
        return ("avx512f", "avx512vl")

    monkeypatch.setattr(features, "missing", missing)
    monkeypatch.setattr(features, "machine", lambda: "x86_64")
    target = tiny.target(arch="x86_64", name="x86-64-v4", features=("avx2", "avx512f", "avx512vl"))
    with pytest.raises(PackageError) as caught:
        runtime.load(tiny.package(target=target))
    assert asked == [(("avx2", "avx512f", "avx512vl"), "x86_64")]
    assert caught.value.exit_code == 8
    assert str(caught.value) == (
        "the package was built for avx2, avx512f, avx512vl (target x86-64-v4); this CPU lacks "
        "avx512f, avx512vl.\n"
        "  hint: rebuild it for this machine: `hone compile --target host`, or for a named one: "
        "`--target x86-64-v3`."
    )


@pytest.mark.usefixtures("nothing_is_mapped")
def test_package_is_refused_when_it_is_for_another_architecture(tiny):
    here = features.machine()
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[here]
    with pytest.raises(PackageError) as caught:
        runtime.load(tiny.package(target=tiny.target(arch=other, name="board")))
    assert str(caught.value) == (
        f"the package was built for {other} (target board); this machine is {here}.\n"
        "  hint: rebuild it for this machine: `hone compile --target host`."
    )


@pytest.mark.usefixtures("nothing_is_mapped")
def test_file_is_named_when_it_cannot_run_here(tiny, tmp_path):
    path = tmp_path / "model.hone"
    tiny.package(target=tiny.target(glibc="99.1")).save(path)
    with pytest.raises(PackageError, match=f"^{re.escape(str(path))}: the package needs glibc"):
        runtime.load(path)


@pytest.mark.usefixtures("nothing_is_mapped")
def test_package_is_refused_when_the_c_library_is_older(tiny):
    with pytest.raises(PackageError, match=r"needs glibc 99\.1 or newer; this machine has glibc 2"):
        runtime.load(tiny.package(target=tiny.target(glibc="99.1")))


def test_package_is_loaded_when_the_c_library_is_new_enough(tiny):
    runtime.load(tiny.package(target=tiny.target(glibc="2.9")))


@pytest.mark.usefixtures("nothing_is_mapped")
def test_package_is_refused_when_another_tvm_built_it(tiny):
    package = tiny.package()
    versions = Versions(hone="0.1.0", tvm="0.99.1", tvm_ffi="0.9.9")
    foreign = Package(
        manifest=package.manifest.model_copy(update={"versions": versions}),
        members=package.members,
    )
    with pytest.raises(PackageError) as caught:
        runtime.load(foreign)
    here = package.manifest.versions.tvm
    assert str(caught.value) == (
        f"the package was built with TVM 0.99.1; TVM {here} is installed.\n"
        "  hint: pip install apache-tvm==0.99.1 apache-tvm-ffi==0.9.9, or rebuild the package."
    )


@pytest.mark.parametrize("wanted", [("amx-int8", "amx-tile"), ()], ids=["amx", "none"])
def test_tiles_are_requested_when_the_code_may_use_them(tiny, monkeypatch, wanted):
    requests = []
    monkeypatch.setattr(features, "missing", lambda names, arch: ())
    monkeypatch.setattr(features, "request_tiles", lambda: requests.append(1) or True)
    runtime.load(tiny.package(target=tiny.target(features=wanted)))
    assert requests == ([1] if wanted else [])


def test_package_is_refused_when_the_kernel_grants_no_tiles(tiny, monkeypatch):
    monkeypatch.setattr(features, "missing", lambda names, arch: ())
    monkeypatch.setattr(features, "request_tiles", lambda: False)
    package = tiny.package(target=tiny.target(features=("amx-int8", "amx-tile")))
    with pytest.raises(PackageError) as caught:
        runtime.load(package)
    assert str(caught.value).startswith(
        "the package's code uses AMX tiles, and the operating system refuses them to this process "
        "(arch_prctl ARCH_REQ_XCOMP_PERM)."
    )
    assert f"`--target {package.manifest.target.name},-amx-tile`" in caught.value.hint


# --- threads --------------------------------------------------------------------------------


def test_threads_are_the_manifests_when_none_are_asked_for(tiny):
    assert runtime.load(tiny.package()).threads == 1


@pytest.mark.parametrize("asked", [None, 9999], ids=["default", "asked"])
def test_threads_are_capped_with_a_warning_when_they_exceed_the_processors(tiny, asked):
    package = tiny.package(target=tiny.target(threads=9999))
    usable = len(os.sched_getaffinity(0))
    with pytest.warns(RuntimeWarning) as caught:
        loaded = runtime.load(package, threads=asked)
    source = "the package's default is" if asked is None else "asked were"
    assert str(caught[0].message) == (
        f"{source} 9999 threads; this process may use {usable} processors and runs on so many "
        "threads."
    )
    assert caught[0].filename == __file__
    assert loaded.threads == usable


def test_threads_are_refused_when_not_positive(tiny):
    with pytest.raises(UsageError, match="threads must be at least 1, not 0"):
        runtime.load(tiny.package(), threads=0)


def on_own_threads(tiny, one, two) -> bool:
    """Run both in turns: the first on one thread, the second on two, never more.

    A part of a loop whose thread is late is taken over by the caller, so two is not certain.
    """
    pairs = [
        (threads_used(one.run(tiny.feeds())), threads_used(two.run(tiny.feeds()))) for _ in range(8)
    ]
    return {used for used, _ in pairs} == {1} and {used for _, used in pairs} in ({2}, {1, 2})


@two_processors
def test_each_package_runs_on_its_own_threads_when_called_alternately(tiny, package):
    one, two = runtime.load(package, threads=1), runtime.load(package, threads=2)
    assert on_own_threads(tiny, one, two)
    assert in_new_thread(on_own_threads, tiny, one, two)


@two_processors
def test_threads_of_a_package_end_when_its_runner_is_gone(tiny, package):
    def count() -> int:
        return sum(
            Path(f"/proc/self/task/{task}/comm").read_text() == "hone\n"
            for task in os.listdir("/proc/self/task")
        )

    gc.collect()
    before = count()
    loaded = runtime.load(package, threads=2)
    assert count() == before
    loaded.run(tiny.feeds())
    assert count() == before + 1
    del loaded
    gc.collect()
    assert count() == before


@two_processors
def test_answers_are_right_when_four_threads_share_two_packages(tiny, package):
    runners = {
        2.0: runtime.load(package, threads=1),
        3.0: runtime.load(tiny.package(3.0, thread_ids=True), threads=2),
    }
    start = threading.Barrier(4)

    def work(seed: int) -> set[tuple[float, int]]:
        start.wait()
        counts = set()
        for step in range(25):
            feeds = tiny.feeds(1000 * seed + step)
            factor = (2.0, 3.0)[(seed + step) % 2]
            outputs = runners[factor].run(feeds)
            check(tiny, outputs, feeds, factor)
            counts.add((factor, threads_used(outputs)))
        return counts

    with ThreadPoolExecutor(4) as executor:
        counts = set().union(*executor.map(work, range(4)))
    assert counts <= {(2.0, 1), (3.0, 1), (3.0, 2)}
    assert (3.0, 2) in counts


@two_processors
def test_threads_are_not_those_of_tvm(tiny, package):
    import tvm_ffi

    loaded = runtime.load(package, threads=2)

    def run() -> set[int]:
        tvm_ffi.get_global_func("runtime.config_threadpool")(-3, 1, ["0"])
        return {threads_used(loaded.run(tiny.feeds())) for _ in range(8)}

    assert 2 in in_new_thread(run)


@two_processors
def test_child_process_answers_when_it_was_forked_after_a_run(package, tmp_path):
    path = tmp_path / "model.hone"
    package.save(path)
    script = """
        import os, signal, sys
        import numpy as np
        import hone.runtime

        runner = hone.runtime.load(sys.argv[1], threads=2)
        feeds = {t.name: np.ones(t.shape, t.dtype) for t in runner.signature.inputs}
        before = runner.run(feeds)
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # the workers of the parent's pool do not exist here
            code = 1
            used = set()
            try:
                for _ in range(8):
                    outputs = runner.run(feeds)
                    assert (outputs["y"] == before["y"]).all()
                    used.add(len(set(outputs["thread"].tolist())))
                assert max(used) == 2
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert max(len(set(runner.run(feeds)["thread"].tolist())) for _ in range(8)) == 2
        print("done")
    """
    assert python(script, path).endswith("done\n")


def test_next_call_works_when_a_call_failed(tiny, package, monkeypatch):
    loaded = runtime.load(package)
    good = loaded._code.planned

    def fail(table):
        raise RuntimeError("broken")

    monkeypatch.setattr(loaded._code, "planned", fail)
    with pytest.raises(RuntimeError, match="broken"):
        loaded.run(tiny.feeds())
    monkeypatch.setattr(loaded._code, "planned", good)
    check(tiny, loaded.run(tiny.feeds()), tiny.feeds())


@two_processors
@pytest.mark.parametrize("bind", ["0", "1", ""], ids=["free", "bound", "unset"])
def test_affinity_of_the_caller_stays_when_a_pool_is_configured(package, tmp_path, bind):
    path = tmp_path / "model.hone"
    package.save(path)
    script = """
        import os, sys
        import numpy as np
        import hone.runtime
        before = os.sched_getaffinity(0)
        for threads in (1, 2, 1):
            runner = hone.runtime.load(sys.argv[1], threads=threads)
            zeros = {t.name: np.zeros(t.shape, t.dtype) for t in runner.signature.inputs}
            used = {len(set(runner.run(zeros)["thread"].tolist())) for _ in range(8)}
            assert max(used) == threads, used
            assert os.sched_getaffinity(0) == before
        half = {min(before)}
        os.sched_setaffinity(0, half)
        runner.run(zeros)
        assert os.sched_getaffinity(0) == half
        print("done")
    """
    environment = {"TVM_BIND_THREADS": bind} if bind else {}
    assert python(script, path, **environment) == "done\n"


# --- what is imported -----------------------------------------------------------------------

FORBID = """
    import sys

    class Forbid:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {"tvm", "onnx", "onnxruntime"}:
                raise ImportError(f"{name} is forbidden here")

    sys.meta_path.insert(0, Forbid())
"""


def test_packages_run_when_neither_tvm_nor_onnx_can_be_imported(tiny, tmp_path):
    path = tmp_path / "model.hone"
    tiny.package().save(path)
    script = (
        FORBID
        + """
    import numpy as np
    import hone
    from hone.verify import verify

    package = hone.Package.read(sys.argv[1])
    print(package.manifest.target.arch, package.signature.outputs[0])
    print(verify(sys.argv[1]).samples)
    runner = hone.runtime.load(sys.argv[1], threads=1)
    zeros = {t.name: np.zeros(t.shape, t.dtype) for t in runner.signature.inputs}
    print(runner.run(zeros)["n+1"])
    for name in ("tvm", "onnx", "onnxruntime"):
        assert name not in sys.modules
    assert "libtvm_runtime.so" in open("/proc/self/maps").read()
    assert "libtvm_compiler" not in open("/proc/self/maps").read()
    assert "libtvm_runtime_extra" not in open("/proc/self/maps").read()
    """
    )
    assert python(script, path) == f"{features.machine()} y: float32[4, 24]\n1\n[1 1 1]\n"


def test_extra_library_is_loaded_when_the_manifest_says_so(tiny, tmp_path):
    path = tmp_path / "model.hone"
    tiny.package(needs_runtime_extra=True).save(path)
    script = (
        FORBID
        + """
    import hone.runtime
    hone.runtime.load(sys.argv[1])
    assert "libtvm_runtime_extra" in open("/proc/self/maps").read()
    """
    )
    python(script, path)


def test_compiler_can_be_imported_after_a_package_ran(tiny, tmp_path):
    path = tmp_path / "model.hone"
    tiny.package().save(path)
    script = """
    import re, sys
    import hone.runtime, hone.verify
    runner = hone.runtime.load(sys.argv[1])
    import tvm
    assert tvm.compile(tvm.IRModule(), target=tvm.target.Target("llvm"))
    hone.verify.verify(sys.argv[1])
    maps = open("/proc/self/maps").read()
    print(len(set(re.findall(r"\\S*/libtvm_runtime\\.so", maps))))
    """
    assert python(script, path) == "1\n"


def test_importing_the_runtime_stays_light():
    script = """
    import sys
    import hone.runtime, hone.package, hone.verify
    heavy = "tvm tvm_ffi onnx onnxruntime torch xgboost scipy ml_dtypes rich click openvino".split()
    print(sorted(set(heavy) & set(sys.modules)))
    """
    assert python(script) == "[]\n"


def test_missing_tvm_is_named_when_it_is_not_installed(tiny, tmp_path):
    path = tmp_path / "model.hone"
    tiny.package().save(path)
    script = """
    import importlib.metadata as metadata, sys
    find = metadata.distribution
    def distribution(name):
        if name == "apache-tvm":
            raise metadata.PackageNotFoundError(name)
        return find(name)
    metadata.distribution = distribution
    import hone.runtime
    from hone.errors import ToolchainError
    try:
        hone.runtime.load(sys.argv[1])
    except ToolchainError as error:
        print(error)
    """
    assert python(script, path) == (
        "TVM's runtime library is required, but it is not installed.\n"
        "  hint: pip install hone-compiler\n"
    )


def test_no_path_of_this_machine_is_in_the_package(package):
    text = package.manifest.to_json().decode()
    assert not re.search(r"/(home|root|work|tmp|usr)/", text)
