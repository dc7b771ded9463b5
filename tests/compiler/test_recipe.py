from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from hone import recipe
from hone.errors import UsageError
from hone.steps.options.int8 import Int8Step
from hone.steps.options.prune import PruneStep
from hone.steps.options.recover import Recover
from hone.steps.options.split import SplitStep

SMALLEST = '[model]\npath = "net.onnx"\n'

FULL = """
seed = 7
[model]
path = "../net.onnx"
shapes = { x = [1, 1, 8, 8] }
[target]
name = "rpi4"
threads = 4
[data]
calibration = "calibration.npz"
allow_random_calibration = true
evaluation = "data.py:evaluation"
[goal]
goal = "size"
max_accuracy_drop = 0.01
[output]
directory = "out"
name = "tiny"
[tune]
seconds = 30
database = "records"
[measure]
rounds = 4
runs = 6
warmup = 2
baselines = ["onnxruntime", "openvino"]
tune_baseline = false
[[step]]
kind = "prune"
amount = 0.5
norm = "l2"
round_to = 8
recover = { epochs = 3, learning_rate = 0.1, temperature = 4.0, batch = 16, seconds = 20 }
[[step]]
kind = "int8"
observer = "percentile"
percentile = 99.9
equalize = "activations"
bias_correction = true
skip = ["head", "!op:Gemm"]
[[step]]
kind = "split"
layers = ["conv1"]
parts = 2
[[step]]
kind = "tune"
[[step]]
kind = "tune"
seconds = 5
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "hone.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems_of(text: str, write) -> list[str]:
    with pytest.raises(UsageError) as caught:
        recipe.load(write(text))
    return str(caught.value).splitlines()[1:]


def test_load_fills_defaults_when_only_the_model_is_given(write):
    loaded = recipe.load(write(SMALLEST))
    assert (loaded.target.name, loaded.target.threads, loaded.seed) == ("host", 2, 0)
    assert (loaded.goal.goal, loaded.goal.max_accuracy_drop) == ("latency", 0.005)
    assert (loaded.measure.rounds, loaded.measure.runs, loaded.measure.warmup) == (10, 10, 3)
    assert loaded.measure.baselines == ["onnxruntime"]
    assert loaded.step == []
    assert loaded.calibration is None


def test_load_reads_every_section(write):
    loaded = recipe.load(write(FULL))
    prune, int8, split, *_ = loaded.step
    assert isinstance(prune, PruneStep)
    assert prune.recover == Recover(
        epochs=3, learning_rate=0.1, temperature=4.0, batch=16, seconds=20
    )
    assert isinstance(int8, Int8Step)
    assert int8 == Int8Step(
        kind="int8",
        observer="percentile",
        percentile=99.9,
        equalize="activations",
        bias_correction=True,
        skip=["head", "!op:Gemm"],
    )
    assert loaded.data.allow_random_calibration
    assert isinstance(split, SplitStep)
    assert (split.parts, split.axis) == (2, "channels")


def test_paths_start_from_the_folder_of_the_file(write, tmp_path):
    loaded = recipe.load(write(FULL))
    assert loaded.model_path == tmp_path.parent / "net.onnx"
    assert loaded.package_path == tmp_path / "out/tiny.hone"
    assert loaded.database_path == tmp_path / "records"
    assert loaded.calibration == str(tmp_path / "calibration.npz")
    assert loaded.evaluation == str(tmp_path / "data.py:evaluation")


def test_paths_have_defaults_when_absent(write, tmp_path):
    loaded = recipe.load(write(SMALLEST))
    assert loaded.package_path == tmp_path / "build/net.hone"
    assert loaded.database_path == tmp_path / "build/tuning"


def test_random_data_is_no_path(write):
    assert (
        recipe.load(write(SMALLEST + '[data]\nevaluation = "random:8"\n')).evaluation == "random:8"
    )


def test_step_names_are_unique_and_say_the_settings(write):
    extra = '[[step]]\nkind = "int8"\n'
    extra += extra + 'observer = "moving_average"\n'
    assert recipe.load(write(FULL + extra)).step_names() == [
        "prune 50% of channels + recover",
        "int8 percentile 99.9 + equalize activations + bias correction",
        "split conv1 into 2 by channels",
        "tuned (30 s)",
        "tuned (5 s)",
        "int8",
        "int8 moving average",
    ]


def test_overrides_win_over_the_file(write):
    loaded = recipe.load(write(FULL), {"target.threads": 1, "seed": 9})
    assert (loaded.target.threads, loaded.target.name, loaded.seed) == (1, "rpi4", 9)


def test_overrides_make_missing_tables(write):
    assert recipe.load(write(SMALLEST), {"target.threads": 1}).target.threads == 1


def test_load_lists_all_problems_with_keys_when_several_are_wrong(write):
    text = """
seeed = 3
[model]
shape = {}
[target]
threads = "2"
[goal]
goal = "speed"
[measure]
warmup = 20
[[step]]
kind = "prune"
amount = 1.5
recover = { epoch = 3 }
[[step]]
kind = "in8"
[[step]]
amount = 3
"""
    assert problems_of(text, write) == [
        "  - model.path: required, but not given",
        "  - model.shape: unknown key, the nearest is 'shapes'",
        "  - target.threads: required is a valid integer, given is '2'",
        "  - goal.goal: required is 'latency', 'size' or 'memory', given is 'speed'",
        "  - measure: warmup (20) must be less than runs (10)",
        "  - step[0].amount: required is less than 1, given is 1.5",
        "  - step[0].recover.epoch: unknown key, the nearest is 'epochs'",
        "  - step[1].kind: required is one of 'prune', 'int8', 'mixed', 'weights', 'bf16', 'fp16', "
        "'split', 'tune', given is 'in8', the nearest is 'int8'",
        "  - step[2].kind: required is one of 'prune', 'int8', 'mixed', 'weights', 'bf16', 'fp16', "
        "'split', 'tune', but not given",
        "  - seeed: unknown key, the nearest is 'seed'",
    ]


def test_load_lists_known_keys_when_none_is_near(write):
    assert problems_of(SMALLEST + "[target]\nzzz = 1\n", write) == [
        "  - target.zzz: unknown key, known are name, threads"
    ]


def test_load_refuses_a_percentile_that_nothing_uses(write):
    step = '[data]\ncalibration = "c.npz"\n[[step]]\nkind = "int8"\npercentile = 99.0\n'
    assert problems_of(SMALLEST + step, write) == [
        "  - step[0]: percentile is for observer = \"percentile\", not for 'minmax'"
    ]
    step += 'observer = "percentile"\n'
    assert problems_of(SMALLEST + step.replace("99.0", "50.0"), write) == [
        "  - step[0].percentile: required is greater than 50, given is 50.0"
    ]


def test_load_refuses_int8_without_calibration(write):
    assert problems_of(SMALLEST + '[[step]]\nkind = "int8"\n', write) == [
        "  - data.calibration is required by the int8 step"
    ]


def test_load_refuses_an_output_name_with_folders(write):
    assert problems_of(SMALLEST + '[output]\nname = "a/b"\n', write) == [
        "  - output.name: a file name without folders"
    ]


def test_load_refuses_a_value_where_a_table_belongs(write):
    assert problems_of('model = "net.onnx"\n', write) == [
        "  - model: required is a table, given is 'net.onnx'"
    ]


def test_load_says_the_line_when_the_toml_is_broken(write):
    path = write("[model]\npath = \n")
    with pytest.raises(UsageError) as caught:
        recipe.load(path)
    assert str(caught.value) == (
        f"{path}: this is not valid TOML: Invalid value (at line 2, column 8)"
    )


def test_load_says_so_when_the_file_is_missing(tmp_path):
    with pytest.raises(UsageError) as caught:
        recipe.load(tmp_path / "no.toml")
    assert str(caught.value) == (
        f"{tmp_path}/no.toml: a recipe (TOML) is required, but it cannot be read: "
        "No such file or directory\n  hint: see `hone build --help` for the smallest recipe"
    )
    assert caught.value.exit_code == 2


def test_override_says_so_when_its_table_is_a_value(write):
    with pytest.raises(UsageError, match="target: required is a table, given is 3"):
        recipe.load(write("target = 3\n" + SMALLEST), {"target.threads": 1})


def test_recipe_is_frozen(write):
    with pytest.raises(ValueError, match="frozen"):
        recipe.load(write(SMALLEST)).seed = 3


def test_json_schema_accepts_and_rejects_what_load_does(write):
    import tomllib

    validator = jsonschema.Draft202012Validator(recipe.json_schema())
    validator.validate(tomllib.loads(FULL))
    assert not validator.is_valid(tomllib.loads(SMALLEST + "other = 1"))
    assert not validator.is_valid({"model": {"path": "x"}, "step": [{"kind": "prune"}]})


def test_recipe_round_trips_through_json(write):
    loaded = recipe.load(write(FULL))
    again = recipe.parse(loaded.model_dump(mode="json"), folder=loaded.folder, where=loaded.where)
    assert again == loaded
