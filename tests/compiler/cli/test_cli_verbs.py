from __future__ import annotations

import typing
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from hone.cli.compile import compile as compile_
from hone.errors import OutOfTimeError
from hone.measure import Speedup
from hone.passes.quantize.calibrator import Method
from hone.passes.quantize.equalize import By
from hone.quantized import Wanted
from hone.steps.options.int8 import Int8Step


@pytest.fixture
def package_file(tiny, tmp_path):
    path = tmp_path / "tiny.hone"
    tiny.package().save(path)
    return path


@pytest.fixture
def paper_file(paper, tmp_path):
    path = tmp_path / "paper.hone"
    paper.save(path)
    return path


@pytest.fixture
def digits(tmp_path):
    from hone import models

    path = tmp_path / "mlp.onnx"
    path.write_bytes(models.build("mlp").SerializeToString())
    return path


class TestCheck:
    def test_says_yes(self, run, digits):
        shown = run("check", digits)
        assert shown.code == 0
        assert shown.out.splitlines()[-1] == "this model can be compiled"

    def test_lists_problems_and_exits_3(self, run, tmp_path):
        import onnx
        from onnx import helper

        x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
        y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
        nodes = [
            helper.make_node("Nonsense", ["x"], ["a"], name="first"),
            helper.make_node("Gibberish", ["a"], ["y"], name="second"),
        ]
        graph = helper.make_graph(nodes, "g", [x], [y])
        path = tmp_path / "bad.onnx"
        path.write_bytes(helper.make_model(graph).SerializeToString())
        shown = run("check", path, "--json")
        assert shown.code == 3
        assert not shown.data["ok"]
        assert [p["node"] for p in shown.data["problems"]] == ["first", "second"]
        assert "'first'" in shown.err
        assert "'second'" in shown.err
        assert "Traceback" not in shown.err


class TestInspect:
    def test_shows_a_package(self, run, paper_file):
        shown = run("inspect", paper_file)
        assert shown.code == 0
        assert "gpu_0/data:0: float32[4, 24]" in shown.out
        assert "conv_1 relu_1" in shown.out

    def test_gives_the_manifest_as_json(self, run, paper_file):
        data = run("inspect", paper_file, "--json").data
        assert data["kind"] == "package"
        assert data["package_bytes"] == paper_file.stat().st_size
        assert data["manifest"]["schema"] == "hone.package/1"

    def test_knows_a_package_by_its_content(self, run, paper_file, tmp_path):
        other = paper_file.rename(tmp_path / "any.bin")
        assert run("inspect", other, "--json").data["kind"] == "package"

    def test_shows_a_model(self, run, digits):
        data = run("inspect", digits, "--json").data
        assert data["kind"] == "model"
        assert data["layers"]
        assert run("inspect", digits).out.startswith("model ")

    def test_model_shows_what_each_layer_costs(self, run, digits):
        data = run("inspect", digits, "--json").data
        first = next(layer for layer in data["layers"] if layer["op_type"] == "Gemm")
        assert first["macs"] == first["parameters"] - first["shape"][-1]
        assert data["macs"] == sum(layer["macs"] for layer in data["layers"])
        assert data["activation_bytes"] > 0
        lines = run("inspect", digits).out.splitlines()
        assert ["layer", "operator", "result", "multiply-adds", "parameters", "share"] in map(
            str.split, lines
        )
        operators = lines[lines.index("") + 1 :]
        gemm = next(line for line in reversed(operators) if line.startswith("Gemm "))
        assert gemm.split()[-1] == "100.0%"

    def test_refuses_shapes_of_a_package(self, run, paper_file):
        shown = run("inspect", paper_file, "--shape", "x:[1]")
        assert shown.code == 2
        assert "the shapes of a package are fixed" in shown.err

    @pytest.mark.parametrize("name", ["no.onnx", "no.hone"])
    def test_missing_file_is_an_error_without_a_traceback(self, run, tmp_path, name):
        shown = run("inspect", tmp_path / name)
        assert (shown.code, shown.out) == (2, "")
        assert shown.err.startswith(f"error: {tmp_path / name}")


class TestRun:
    def test_writes_the_outputs_of_exact_inputs(self, run, tiny, package_file, tmp_path):
        feeds = tiny.feeds(3)
        from hone.cli.run import write_npz

        write_npz(tmp_path / "in.npz", feeds)
        out = tmp_path / "out.npz"
        shown = run("run", package_file, "-i", tmp_path / "in.npz", "-o", out)
        assert (shown.code, shown.out) == (0, "")
        assert shown.err == f"wrote {out}\n"
        with np.load(out) as written:
            for name, expected in tiny.answers(feeds).items():
                np.testing.assert_allclose(written[name], expected, rtol=1e-6)

    def test_an_empty_input_file_is_an_error_of_usage(self, run, package_file, tmp_path):
        given = tmp_path / "in.npz"
        given.touch()
        shown = run("run", package_file, "-i", given)
        assert (shown.code, shown.out) == (2, "")
        assert shown.err.startswith(f"error: {given}: it cannot be read")

    def test_never_writes_over_its_inputs(self, run, package_file):
        before = package_file.read_bytes()
        assert run("run", package_file, "-i", "random:1", "-o", package_file).code == 2
        assert package_file.read_bytes() == before

    def test_joins_the_outputs_of_several_samples(self, run, tiny, package_file, tmp_path):
        out = tmp_path / "out.npz"
        shown = run("run", package_file, "-i", "random:3", "-o", out, "--json")
        assert shown.data["samples"] == 3
        with np.load(out) as written:
            assert written["y"].shape == (12, 24)

    def test_summarizes_without_an_output_file(self, run, package_file):
        shown = run("run", package_file, "-i", "random:1")
        assert shown.out.splitlines()[0].split() == [
            "output", "dtype", "shape", "least", "largest", "mean",
        ]  # fmt: skip
        assert len(shown.out.splitlines()) == 5

    def test_refuses_inputs_of_another_shape(self, run, package_file, tmp_path):
        np.savez(tmp_path / "in.npz", x=np.zeros(3))
        shown = run("run", package_file, "-i", tmp_path / "in.npz")
        assert (shown.code, shown.out) == (2, "")

    def test_array_called_file_can_be_written(self, tmp_path):
        from hone.cli.run import write_npz

        write_npz(tmp_path / "x.npz", {"file": np.arange(3), "a/b": np.zeros(2)})
        with np.load(tmp_path / "x.npz") as read:
            assert sorted(read.files) == ["a/b", "file"]
            assert read["file"].tolist() == [0, 1, 2]


class TestVerify:
    def test_passes(self, run, package_file):
        shown = run("verify", package_file)
        assert shown.code == 0
        assert shown.out.splitlines()[-1] == f"{package_file}: verified on 1 golden samples"
        assert run("verify", package_file, "--json").data["ok"] is True

    def test_exits_8_when_a_byte_is_flipped(self, run, paper_file):
        data = bytearray(paper_file.read_bytes())
        data[len(data) // 2] ^= 1
        paper_file.write_bytes(bytes(data))
        shown = run("verify", paper_file)
        assert (shown.code, shown.out) == (8, "")


class TestCompile:
    @pytest.fixture
    def seen(self, replace_module, paper):
        seen = {}

        def compile(model, **settings):
            seen.update(settings, model=model)
            return paper

        replace_module("driver", compile=compile)
        replace_module("importer", load=lambda path, shapes: (path.name, shapes), parse_shape=parse)
        return seen

    def test_passes_every_option_on_and_writes_the_package(self, run, seen, tmp_path):
        out = tmp_path / "net.hone"
        arguments = [
            "--target", "rpi4", "--threads", "3", "--precision", "int8", "--tune", "2m", "--locked",
            "--database", "records", "--calibration", "c.npz", "--shape", "x:[1,2]",
            "--goal", "size", "-o", out,
        ]  # fmt: skip
        shown = run("compile", "net.onnx", *arguments, "--json")
        assert shown.code == 0
        progress = seen.pop("progress")
        assert hasattr(progress, "task")
        assert {key: str(value) for key, value in seen.items()} == {
            "model": "('net.onnx', {'x': (1, 2)})",
            "target": "rpi4",
            "threads": "3",
            "precision": "int8",
            "tune_seconds": "120.0",
            "database": "records",
            "locked": "True",
            "calibration": "c.npz",
            "int8": "None",
            "half": "None",
            "allow_random_calibration": "False",
            "goal": "size",
        }
        assert shown.data["package_bytes"] == out.stat().st_size

    def test_says_what_it_wrote(self, run, seen, tmp_path):
        shown = run("compile", "net.onnx", "-o", tmp_path / "net.hone")
        assert shown.out.startswith(f"{tmp_path}/net.hone: ")
        assert shown.out.endswith("weights, fp32 for host\n")

    def test_never_writes_over_its_model(self, run, seen, tmp_path):
        model = tmp_path / "net.onnx"
        model.write_bytes(b"model")
        assert run("compile", model, "-o", model).code == 2
        assert model.read_bytes() == b"model"
        assert seen == {}

    def test_passes_the_layers_that_16_bit_floats_skip_on(self, run, seen, tmp_path):
        arguments = ["--precision", "bf16", "--skip", "first", "--skip", "!op:Gemm"]
        assert run("compile", "net.onnx", *arguments, "-o", tmp_path / "net.hone").code == 0
        assert (seen["precision"], seen["int8"]) == ("bf16", None)
        assert (seen["half"].kind, seen["half"].skip) == ("bf16", ["first", "!op:Gemm"])

    def test_passes_every_option_of_int8_on(self, run, seen, tmp_path):
        arguments = [
            "--precision", "int8", "--calibration", "random:4", "--allow-random-calibration",
            "--observer", "percentile", "--percentile", "99.5", "--equalize", "weights",
            "--bias-correction", "--skip", "first", "--skip", "!op:Gemm",
        ]  # fmt: skip
        shown = run("compile", "net.onnx", *arguments, "-o", tmp_path / "net.hone")
        assert shown.code == 0
        assert seen["allow_random_calibration"] is True
        assert seen["int8"] == Int8Step(
            kind="int8",
            observer="percentile",
            percentile=99.5,
            equalize="weights",
            bias_correction=True,
            skip=["first", "!op:Gemm"],
        )

    def test_observers_and_equalizations_are_those_of_the_passes_and_the_recipe(self):
        choices = {p.name: p.type.choices for p in compile_.params if hasattr(p.type, "choices")}
        assert list(choices["observer"]) == list(Method)
        assert list(choices["equalize"]) == list(By)
        fields = Int8Step.model_fields
        assert typing.get_args(fields["observer"].annotation) == tuple(Method)
        assert typing.get_args(typing.get_args(fields["equalize"].annotation)[0]) == tuple(By)

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["--observer", "mse"], "--observer is for --precision int8."),
            (["--allow-random-calibration"], "--allow-random-calibration is for --precision int8."),
            (["--skip", "first"], "--skip is for --precision int8, bf16 and fp16."),
            (
                ["--precision", "int8", "--observer", "mse", "--percentile", "99"],
                "--percentile is for --observer percentile.",
            ),
        ],
    )
    def test_refuses_options_of_int8_that_nothing_uses(self, run, seen, tmp_path, arguments, text):
        shown = run("compile", "net.onnx", *arguments, "-o", tmp_path / "net.hone")
        assert shown.code == 2
        assert text in shown.err
        assert seen == {}

    def test_refuses_calibration_data_that_nothing_uses(self, run, seen, tmp_path):
        shown = run("compile", "net.onnx", "--calibration", "c.npz", "-o", tmp_path / "net.hone")
        assert shown.code == 2
        assert "--calibration is for --precision int8" in shown.err
        assert seen == {}

    def test_refuses_threads_without_end(self, run, seen, tmp_path):
        shown = run("compile", "net.onnx", "--threads", "100000", "-o", tmp_path / "net.hone")
        assert shown.code == 2
        assert seen == {}

    def test_refuses_a_missing_folder_before_any_work(self, run, seen, tmp_path):
        shown = run("compile", "net.onnx", "-o", tmp_path / "no" / "net.hone")
        assert shown.code == 2
        assert seen == {}


def parse(text: str) -> tuple[str, tuple[int, ...]]:
    name, sizes = text.split(":")
    return name, tuple(map(int, sizes[1:-1].split(",")))


@dataclass(frozen=True)
class Kernel:
    name: str = "conv"
    calls: int = 2
    untuned_ms: float | None = 3.0
    before_ms: float | None = None
    after_ms: float | None = 1.25
    trials: int = 8
    failed: int = 1
    model_ms: float | None = 6.0
    verdict: str | None = "confirmed"


@dataclass(frozen=True)
class Lowering:
    choices: int = 9
    tried: int = 4
    decided: dict[str, str] = field(default_factory=lambda: {"winograd 1x7x7x8 to 8": "2x2"})
    speedup: float | None = 1.25
    exhausted: bool = False
    elapsed_s: float = 18.0
    failure: str = ""


@dataclass(frozen=True)
class Tuned:
    trials: int = 8
    records: int = 7
    kernels: tuple[Kernel, ...] = (Kernel(),)
    elapsed_s: float = 59.0
    quarantined: tuple[object, ...] = ()
    exhausted: bool = False
    model_speedup: float | None = 1.5
    lowering: Lowering | None = field(default_factory=Lowering)


class TestTune:
    @pytest.fixture
    def seen(self, replace_module):
        seen = {}

        def tune(model, **settings):
            seen.update(settings)
            if settings["budget_s"] < 2:
                raise OutOfTimeError("no candidate could be measured within 1 s")
            return Tuned()

        replace_module("driver", tune=tune)
        replace_module("importer", load=lambda path, shapes: path, parse_shape=parse)
        return seen

    def test_shows_every_kernel(self, run, seen):
        shown = run("tune", "net.onnx", "--budget", "1m", "--database", "records")
        assert shown.code == 0
        row = "conv 2 8 1 3 - 1.25 100% confirmed"
        assert shown.out.splitlines()[1].split() == row.split()
        for text in (
            "4 of 9 ways to lower layers were tried: 1.25 times as fast with 1 of them",
            "winograd 1x7x7x8 to 8: 2x2",
            "the kernels with confirmed records make the model 1.50 times as fast as without",
        ):
            assert text in shown.err
        assert shown.out.splitlines()[-1] == "7 records in 59 s, kept in records"
        assert (seen["budget_s"], str(seen["database"])) == (60.0, "records")

    def test_passes_precision_and_goal_on_as_compile_does(self, run, seen):
        arguments = ["--precision", "int8", "--calibration", "c.npz", "--observer", "mse"]
        assert run("tune", "net.onnx", *arguments, "--goal", "size").code == 0
        wanted = Wanted(
            precision="int8",
            calibration="c.npz",
            int8=Int8Step(kind="int8", observer="mse"),
        )
        assert (seen["wanted"], seen["goal"]) == (wanted, "size")
        refused = run("tune", "net.onnx", "--observer", "mse")
        assert refused.code == 2
        assert "--observer is for --precision int8." in refused.err

    def test_has_a_default_database_and_budget(self, run, seen):
        assert run("tune", "net.onnx", "--json").data["database"] == ".hone/tuning"
        assert seen["budget_s"] == 600.0

    def test_exits_11_without_a_record(self, run, seen):
        shown = run("tune", "net.onnx", "--budget", "1s")
        assert (shown.code, shown.out) == (11, "")
        assert shown.err == "error: no candidate could be measured within 1 s\n"


class TestBench:
    @pytest.fixture
    def seen(self, replace_module):
        seen = {}
        latency = SimpleNamespace(median_ms=0.5, p90_ms=0.6, ci95_ms=(0.49, 0.51), samples=70)
        speedup = Speedup(ratio=1.5, ci95=(1.4, 1.6), rounds=10)

        def bench(items, **settings):
            seen.update(settings, items=items)
            peers = settings["vs"]
            results = [
                SimpleNamespace(
                    name="net.hone",
                    precision="int8",
                    latency=latency,
                    ratio=dict.fromkeys(peers, speedup),
                ),
                *(
                    SimpleNamespace(name=peer, precision="fp32", latency=latency, ratio={})
                    for peer in peers
                ),
            ]
            return SimpleNamespace(
                results=tuple(results), threads=settings["threads"], environment={"cpu": "x"}
            )

        replace_module("bench", bench=bench)
        return seen

    def test_json_holds_the_contract(self, run, seen):
        data = run(
            "bench", "net.hone", "--vs", "onnxruntime,openvino", "--threads", "2", "--json"
        ).data
        assert data["results"][0] == {
            "name": "net.hone",
            "precision": "int8",
            "latency_ms": {"median": 0.5, "p90": 0.6, "ci95": [0.49, 0.51], "samples": 70},
            "ratio": {"onnxruntime": 1.5, "openvino": 1.5},
            "ratio_ci95": {"onnxruntime": [1.4, 1.6], "openvino": [1.4, 1.6]},
            "outcome": {"onnxruntime": "faster", "openvino": "faster"},
        }
        assert [row["name"] for row in data["results"][1:]] == ["onnxruntime", "openvino"]
        assert data["environment"] == {"cpu": "x"}

    def test_table_has_a_column_per_peer(self, run, seen):
        shown = run("bench", "net.hone", "a.onnx", "--vs", "onnxruntime", "--rounds", "4")
        head, first, second = shown.out.splitlines()
        assert head.split()[-2:] == ["vs", "onnxruntime"]
        assert first.endswith("1.50x")
        assert second.endswith("-")
        assert (seen["items"], seen["rounds"].rounds) == (("net.hone", "a.onnx"), 4)


class TestTarget:
    def test_list_has_every_target(self, run):
        names = [row["name"] for row in run("target", "list", "--json").data["targets"]]
        assert {"host", "rpi4", "sm_90"} <= set(names)
        shown = run("target", "list").out
        assert all(name in shown for name in names)

    def test_show_prints_facts_and_sources(self, run):
        shown = run("target", "show", "rpi4")
        assert "aarch64-linux-gnu" in shown.out
        assert "source: " in shown.out
        assert run("target", "show", "rpi4", "--json").data["name"] == "rpi4"

    def test_show_leaves_out_what_there_is_not(self, run):
        rows = [line.split() for line in run("target", "show", "host").out.splitlines()]
        assert all(len(row) > 1 and row[1] != "None" for row in rows)

    def test_show_names_the_nearest_when_unknown(self, run):
        shown = run("target", "show", "rpi44")
        assert (shown.code, shown.out) == (2, "")
        assert "rpi4" in shown.err


class TestDb:
    def test_stats_of_an_empty_folder_are_zero(self, run, tmp_path):
        data = run("db", "stats", "--database", tmp_path, "--target", "rpi4", "--json").data
        assert (data["records"], data["kernels"], data["entries"]) == (0, 0, [])
        assert "records" in run("db", "stats", "--database", tmp_path, "--target", "rpi4").out

    @pytest.mark.parametrize("verb", ["stats", "show"])
    def test_folder_that_does_not_exist_is_an_error(self, run, tmp_path, verb):
        shown = run("db", verb, "--database", tmp_path / "no")
        assert (shown.code, shown.out) == (2, "")
        assert shown.err == (
            f"error: {tmp_path / 'no'}: there is no tuning database\n"
            "  hint: `hone tune` makes one, --database says where it is\n"
        )


class TestDbShow:
    @pytest.fixture
    def records(self, tmp_path):
        from hone.database import Database
        from hone.targets.target import resolve

        database = Database(tmp_path, resolve("rpi4"), threads=2)
        split = ["Split", ["l1", "None", 4, 8], [True, False], ["l2", "l3", "l4"]]
        with database.writing():
            for seconds in (2e-3, 1e-3):
                trace = [[["GetLoops", ["b0"], [], ["l1"]], split], []]
                database.add_record(["123", "eA=="], [trace, [seconds], {}, []])
            database.add_task("123", name="fused_conv", untuned_s=4e-3)
        return ("--database", tmp_path, "--target", "rpi4", "--threads", "2")

    def test_lists_the_kernels(self, run, records):
        shown = run("db", "show", *records)
        assert shown.out.splitlines()[1].split()[:5] == ["fused_conv", "123", "2", "1", "4"]
        entry = run("db", "show", *records, "--json").data["entries"][0]
        assert (entry["name"], entry["records"], entry["best_ms"]) == ("fused_conv", 2, 1.0)

    def test_shows_the_best_records_of_a_kernel(self, run, records):
        shown = run("db", "show", "fused_conv", *records, "--limit", "1")
        assert [line.split() for line in shown.out.splitlines()] == [
            ["workload", "ms", "tile"],
            ["123", "1", "_x4x8"],
        ]
        (kernel,) = run("db", "show", "123", *records, "--json").data["kernels"]
        assert [row["mean_ms"] for row in kernel["best"]] == [1.0, 2.0]
        assert kernel["best"][0]["tile"] == ["_x4x8"]

    def test_names_the_way_out_when_a_kernel_is_unknown(self, run, records):
        shown = run("db", "show", "dense", *records)
        assert (shown.code, shown.out) == (2, "")
        assert "no kernel 'dense' in the database" in shown.err
        assert "`hone db show` lists the kernels" in shown.err


class TestDoctor:
    @pytest.fixture
    def checks(self, replace_module):
        @dataclass(frozen=True)
        class Check:
            name: str
            status: object
            detail: str
            fix: str | None
            required: bool

        from enum import StrEnum

        class Status(StrEnum):
            OK = "ok"
            MISSING = "missing"

        checks = [Check("jinja2", Status.MISSING, "not installed", "pip install x", False)]
        replace_module("doctor", Status=Status, diagnose=lambda: checks)
        return checks, lambda: Check("linker", Status.MISSING, "none", None, True)

    def test_passes_when_only_extras_are_missing(self, run, checks):
        shown = run("doctor")
        assert shown.code == 0
        assert "pip install x" in shown.out

    def test_exits_6_when_something_required_is_missing(self, run, checks):
        listed, broken = checks
        listed.append(broken())
        shown = run("doctor", "--json")
        assert shown.code == 6
        assert [check["name"] for check in shown.data["checks"]] == ["jinja2", "linker"]
        assert shown.err == "error: hone cannot compile on this machine without linker\n"
