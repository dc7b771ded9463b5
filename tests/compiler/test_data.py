from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper

from hone import data
from hone.errors import UsageError
from hone.signature import Signature, TensorSpec


def spec(name: str, shape: tuple[int, ...], dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


ONE = Signature(inputs=(spec("x", (1, 2, 3)),), outputs=(spec("y", (1, 4)),))
BATCH = Signature(inputs=(spec("x", (3, 2)),), outputs=(spec("y", (3, 4)),))
TWO = Signature(
    inputs=(spec("ids", (1, 5), "int64"), spec("gpu_0/mask:0", (1, 5), "int64")),
    outputs=(spec("y", (1, 4)),),
)


def ramp(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def save(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def error(spec: str, signature: Signature = ONE, **options: object) -> str:
    with pytest.raises(UsageError) as info:
        data.load(spec, signature, **options)  # type: ignore[arg-type]
    assert info.value.exit_code == 2
    return str(info.value)


# ---------------------------------------------------------------- forms


def test_npz_gives_samples_of_the_signature_shape_when_the_leading_axis_is_samples(tmp_path):
    x = ramp(4, 2, 3)
    dataset = data.load(save(tmp_path / "d.npz", x=x, labels=np.array([0, 1, 2, 3])), ONE)
    assert len(dataset) == 4
    assert dataset.inputs["x"].shape == (4, 1, 2, 3)
    np.testing.assert_array_equal(dataset.sample(2)["x"], x[2:3])
    assert dataset.labels is not None
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.tolist() == [[0], [1], [2], [3]]


def test_npz_keeps_samples_when_they_have_the_signature_shape_already(tmp_path):
    x = ramp(4, 1, 2, 3)
    dataset = data.load(save(tmp_path / "d.npz", x=x), ONE)
    np.testing.assert_array_equal(dataset.inputs["x"], x)
    assert dataset.labels is None


def test_batches_group_consecutive_rows_when_the_model_has_a_batch(tmp_path):
    x = ramp(7, 2)
    path = save(tmp_path / "d.npz", x=x, labels=np.arange(7) % 4)
    with pytest.warns(UserWarning, match="the last 1 of 7 rows do not fill a batch of 3"):
        dataset = data.load(path, BATCH)
    assert dataset.inputs["x"].shape == (2, 3, 2)
    np.testing.assert_array_equal(dataset.sample(1)["x"], x[3:6])
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [[0, 1, 2], [3, 0, 1]]


def test_labels_fit_when_samples_are_stacked_batches(tmp_path):
    labels = np.arange(6).reshape(2, 3) % 4
    for stored in (labels, labels.reshape(-1)):
        path = save(tmp_path / "d.npz", x=ramp(2, 3, 2), labels=stored)
        dataset = data.load(path, BATCH)
        assert dataset.labels is not None
        np.testing.assert_array_equal(dataset.labels, labels)


def test_npy_alone_fits_when_the_model_has_one_input(tmp_path):
    np.save(tmp_path / "d.npy", ramp(4, 2, 3))
    assert len(data.load(str(tmp_path / "d.npy"), ONE)) == 4


def test_npy_is_refused_when_the_model_has_two_inputs(tmp_path):
    np.save(tmp_path / "d.npy", ramp(4, 5))
    assert error(str(tmp_path / "d.npy"), TWO) == (
        f"{tmp_path}/d.npy: an .npy file holds one input, the model has 2: ids, gpu_0/mask:0\n"
        "  hint: save them together: np.savez(path, **arrays)"
    )


def test_folder_joins_npz_files_in_natural_order(tmp_path):
    for index in (10, 2, 1):
        save(tmp_path / f"part{index}.npz", x=np.full((2, 2, 3), index, np.float32))
    dataset = data.load(str(tmp_path), ONE)
    assert dataset.inputs["x"][:, 0, 0, 0].tolist() == [1, 1, 2, 2, 10, 10]


def test_folder_of_npy_files_is_one_input_each_when_named_after_inputs(tmp_path):
    signature = Signature(inputs=(spec("a", (1, 2)), spec("b", (1, 3))), outputs=ONE.outputs)
    np.save(tmp_path / "a.npy", ramp(4, 2))
    np.save(tmp_path / "b.npy", ramp(4, 3))
    np.save(tmp_path / "labels.npy", np.arange(4))
    dataset = data.load(str(tmp_path), signature)
    assert dataset.inputs["b"].shape == (4, 1, 3)
    assert dataset.labels is not None


def test_folder_of_npy_files_is_samples_when_the_model_has_one_input(tmp_path):
    for index in range(3):
        np.save(tmp_path / f"img{index}.npy", np.full((1, 2, 3), index, np.float32))
    assert len(data.load(str(tmp_path), ONE)) == 3
    np.save(tmp_path / "labels.npy", np.array([3, 2, 1]))
    dataset = data.load(str(tmp_path), ONE)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [[3], [2], [1]]


def write_test_set(folder: Path, name: str, x: np.ndarray, y: np.ndarray) -> None:
    folder.mkdir()
    folder.joinpath("input_0.pb").write_bytes(numpy_helper.from_array(x, name).SerializeToString())
    folder.joinpath("output_0.pb").write_bytes(numpy_helper.from_array(y, "").SerializeToString())


def test_test_data_sets_give_inputs_and_reference_outputs(tmp_path):
    for index in range(2):
        folder = tmp_path / f"test_data_set_{index}"
        write_test_set(folder, "", ramp(1, 2, 3) + index, ramp(1, 4) - index)
    (tmp_path / "model.onnx").touch()
    dataset = data.load(str(tmp_path), ONE)
    assert len(dataset) == 2
    np.testing.assert_array_equal(dataset.sample(1)["x"], ramp(1, 2, 3) + 1)
    np.testing.assert_array_equal(dataset.outputs["y"][1], ramp(1, 4) - 1)
    assert len(data.load(str(tmp_path / "test_data_set_1"), ONE)) == 1


def test_test_data_sets_are_refused_when_a_shape_differs(tmp_path):
    write_test_set(tmp_path / "test_data_set_0", "x", ramp(5, 2, 3), ramp(1, 5))
    assert error(str(tmp_path)) == (
        f"{tmp_path}/test_data_set_0: the data do not fit the model: 'x' is [5, 2, 3], required "
        "is [1, 2, 3]; reference output 'y' is [1, 5], the model's is [1, 4]\n"
        "  hint: the model takes x: float32[1, 2, 3]"
    )


def test_test_data_sets_are_refused_when_truncated(tmp_path):
    folder = tmp_path / "test_data_set_0"
    write_test_set(folder, "x", ramp(1, 2, 3), ramp(1, 4))
    stored = folder.joinpath("input_0.pb").read_bytes()
    folder.joinpath("input_0.pb").write_bytes(stored[:-5])
    assert "input_0.pb: it is no ONNX tensor" in error(str(tmp_path))


FUNCTIONS = """
import numpy as np

def whole():
    return {"x": np.ones((4, 2, 3), np.float32), "labels": np.arange(4)}

def endless():
    while True:
        yield {"x": np.ones((1, 2, 3), np.float32)}

def broken():
    yield {"x": np.ones((1, 2, 3), np.float32)}
    raise KeyError("camera")

def number():
    return 3
"""


def test_function_returns_or_yields(tmp_path):
    path = tmp_path / "my.data.py"
    path.write_text(FUNCTIONS)
    assert len(data.load(f"{path}:whole", ONE)) == 4
    assert len(data.load(f"{path}:endless", ONE, limit=5)) == 5
    assert error(f"{path}:broken") == f"{path}:broken: it raised KeyError in line 13: 'camera'"
    assert error(f"{path}:number") == (
        f"{path}:number: it returned a int; it returns a dict of arrays, or yields such dicts"
    )
    assert error(f"{path}:nothing") == (
        f"{path}: it has no function 'nothing'\n  hint: it has whole, endless, broken, number"
    )


def test_what_a_function_prints_goes_to_stderr(tmp_path, capsys):
    path = tmp_path / "my.py"
    path.write_text(
        "import numpy as np\nprint('imported')\n"
        "def f():\n"
        "    print('called')\n"
        "    for i in range(2):\n"
        "        print('gave', i)\n"
        "        yield {'x': np.ones((1, 2, 3), np.float32)}\n"
    )
    assert len(data.load(f"{path}:f", ONE)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "imported\ncalled\ngave 0\ngave 1\n"


def test_a_function_that_exits_is_an_error(tmp_path):
    path = tmp_path / "my.py"
    path.write_text("import sys\ndef f():\n    sys.exit(0)\n")
    assert error(f"{path}:f") == f"{path}:f: it raised SystemExit in line 3: 0"


@pytest.mark.parametrize("content", [b"hello world", b"version https://git-lfs"])
@pytest.mark.parametrize("name", ["d.npz", "d.npy"])
def test_other_files_are_named_as_such(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert error(str(path)) == f"{path}: this is neither an .npz nor a .npy file"


def test_random_is_refused_unless_asked_for_by_name():
    assert error("random:4") == (
        "random:4: random data say nothing about the model's real value ranges and are refused "
        f"here\n  hint: {data.RANDOM_HINT}"
    )
    first, second = (data.load("random:4", TWO, allow_random=True) for _ in range(2))
    np.testing.assert_array_equal(first.inputs["ids"], second.inputs["ids"])
    assert first.inputs["ids"].shape == (4, 1, 5)
    assert set(np.unique(first.inputs["ids"])) <= {0, 1}
    assert error("random:-1", allow_random=True) == (
        "random:-1: random:N needs a number of samples from 1, this is '-1'"
    )


def test_limit_cuts_samples(tmp_path):
    path = save(tmp_path / "d.npz", x=ramp(9, 2, 3), labels=np.arange(9) % 4)
    dataset = data.load(path, ONE, limit=2)
    assert len(dataset) == 2
    assert dataset.labels is not None
    assert len(dataset.labels) == 2
    assert len(data.load("random:9", ONE, allow_random=True, limit=2)) == 2
    assert error(path, limit=0) == f"{path}: the limit is 0 samples, 1 is the least"


def test_byte_order_is_made_native(tmp_path):
    path = save(tmp_path / "d.npz", x=ramp(4, 2, 3).astype(">f4"))
    x = data.load(path, ONE).inputs["x"]
    assert x.dtype == np.float32
    assert x.dtype.isnative
    np.testing.assert_array_equal(x[:, 0], ramp(4, 2, 3))


# ---------------------------------------------------------------- what does not fit


def test_every_difference_is_listed_at_once(tmp_path):
    path = save(tmp_path / "d.npz", idz=np.ones((2, 5), np.int64), extra=np.ones(3))
    assert error(path, TWO) == (
        f"{path}: the data do not fit the model: 'idz' is no input of the model; did you mean "
        "'ids'?; 'extra' is no input of the model; 'ids' is missing; required is "
        "int64[samples, 5]; 'gpu_0/mask:0' is missing; required is int64[samples, 5]\n"
        "  hint: the model takes ids: int64[1, 5], gpu_0/mask:0: int64[1, 5]"
    )


def test_dtype_and_shape_are_named_when_both_differ(tmp_path):
    path = save(tmp_path / "d.npz", x=np.ones((4, 3, 2)))
    assert error(path) == (
        f"{path}: the data do not fit the model: 'x' is float64, required is float32; 'x' is "
        "[4, 3, 2], required is [samples, 2, 3]\n  hint: the model takes x: float32[1, 2, 3]"
    )


def test_counts_must_agree(tmp_path):
    ids = np.ones((3, 5), np.int64)
    path = save(tmp_path / "d.npz", **{"ids": ids, "gpu_0/mask:0": ids[:2]})
    assert "different numbers of samples: 'ids' 3, 'gpu_0/mask:0' 2" in error(path, TWO)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(tmp_path, bad):
    x = ramp(4, 2, 3)
    x[2, 1, 0] = bad
    text = error(save(tmp_path / "d.npz", x=x))
    assert "'x' has one value that is NaN or infinite, in sample 2 at [0, 1, 0]" in text
    x[3, 0, 1] = bad
    text = error(save(tmp_path / "d.npz", x=x))
    assert "'x' has 2 values that are NaN or infinite, the first in sample 2 at [0, 1, 0]" in text


def test_too_few_rows_for_a_batch_are_refused(tmp_path):
    text = error(save(tmp_path / "d.npz", x=ramp(2, 2)), BATCH)
    assert "'x' has 2 rows, one batch of the model takes 3" in text


def test_no_samples_are_refused(tmp_path):
    path = save(tmp_path / "d.npz", x=ramp(0, 2, 3))
    assert error(path) == f"{path}: there are no samples"


@pytest.mark.parametrize(
    ("labels", "wrong"),
    [
        (np.arange(4) + 1, "lie in 1 to 4, the model's classes are 0 to 3"),
        (np.arange(4) - 1, "lie in -1 to 2, the model's classes are 0 to 3"),
        (np.arange(3), "are [3], required is [4]"),
        (
            np.eye(4),
            "are float64[4, 4], required are class indices of an integer type; for one-hot rows "
            "take labels.argmax(axis=1)",
        ),
        (np.eye(4, dtype=np.int64), "are [4, 4], required is [4]"),
    ],
    ids=["high", "negative", "count", "one-hot", "one-hot-int"],
)
def test_labels_are_refused_when_they_do_not_fit(tmp_path, labels, wrong):
    path = save(tmp_path / "d.npz", x=ramp(4, 2, 3), labels=labels)
    assert f"the data do not fit the model: 'labels' {wrong}\n" in error(path)


def test_labels_must_be_in_all_files_or_none(tmp_path):
    save(tmp_path / "a.npz", x=ramp(2, 2, 3), labels=np.arange(2))
    save(tmp_path / "b.npz", x=ramp(2, 2, 3))
    assert error(str(tmp_path)) == (
        f"{tmp_path}: 1 of 2 parts have labels; all or none must, {tmp_path}/b.npz has none"
    )


def test_pickles_are_never_loaded(tmp_path):
    np.save(tmp_path / "d.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "d.npz", x=np.array([{"x": 1}], dtype=object))
    (tmp_path / "p.npz").write_bytes(pickle.dumps({"x": 1}))
    for name in ("d.npy", "d.npz", "p.npz"):
        assert re.search(
            "it holds Python objects, which are never loaded", error(str(tmp_path / name))
        )


def test_damaged_files_are_refused(tmp_path):
    good = Path(save(tmp_path / "d.npz", x=ramp(40, 2, 3))).read_bytes()
    for size in (0, 10, len(good) // 2):
        (tmp_path / "cut.npz").write_bytes(good[:size])
        assert "cut.npz: it " in error(str(tmp_path / "cut.npz"))


def test_folder_must_hold_one_kind(tmp_path):
    assert error(str(tmp_path)).endswith("this one has none of them: nothing")
    save(tmp_path / "a.npz", x=ramp(2, 2, 3))
    np.save(tmp_path / "b.npy", ramp(2, 2, 3))
    assert error(str(tmp_path)).endswith("has more than one kind of them: a.npz, b.npy")


def test_missing_and_unknown_files_name_the_forms(tmp_path):
    forms = (
        "\n  hint: data are x.npz, x.npy, a folder of .npz or .npy files, a folder with "
        "test_data_set_*, file.py:function or random:N"
    )
    assert error("none.npz") == f"none.npz: there is no such file{forms}"
    assert error("none") == f"none: there is no such file or folder{forms}"
    path = tmp_path / "x.csv"
    path.touch()
    assert error(str(path)) == f"{path}: this is not a data file{forms}"


def test_scalars_and_unbatched_inputs_fit(tmp_path):
    signature = Signature(inputs=(spec("s", ()), spec("v", (3,))), outputs=())
    path = save(tmp_path / "d.npz", s=ramp(4), v=ramp(4, 3))
    dataset = data.load(path, signature)
    assert dataset.inputs["s"].shape == (4,)
    assert dataset.inputs["v"].shape == (4, 3)
