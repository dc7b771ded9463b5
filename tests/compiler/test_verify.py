import numpy as np
import pytest

from hone.errors import AccuracyError, PackageError
from hone.packaging.golden import Golden
from hone.targets import features
from hone.verify import OutputCheck, relative_error, verify


@pytest.fixture
def altered(tiny, tmp_path):
    """Return a function that alters golden outputs and hashes the package again."""

    def alter(**changes):
        feeds = tiny.feeds()
        outputs = tiny.answers(feeds)
        for name, change in changes.items():
            array = np.array(outputs[name])
            change(array)
            outputs[name] = array
        golden = (Golden(inputs=feeds, outputs=tiny.answers(feeds)),)
        golden += (Golden(inputs=feeds, outputs=outputs),)
        path = tmp_path / "altered.hone"
        tiny.package(golden=golden).save(path)
        return path

    return alter


def test_report_lists_every_output_when_the_package_is_sound(tiny, tmp_path):
    path = tmp_path / "model.hone"
    tiny.package().save(path)
    report = verify(path, threads=1)
    assert (report.samples, report.threads) == (1, 1)
    assert [check.name for check in report.outputs] == ["y", "n+1", "same input", "weight"]
    assert [check.tolerance for check in report.outputs] == [1e-5, 0.0, 0.0, 0.0]
    assert all(check.passed for check in report.outputs)
    assert report.outputs[0].error <= 1e-6


def test_package_object_is_verified_without_a_file(tiny):
    assert verify(tiny.package()).samples == 1


def test_error_names_output_error_and_tolerance_when_a_golden_output_was_altered(altered, tiny):
    largest = np.abs(tiny.answers(tiny.feeds())["y"]).max()

    def change(y):
        y[0, 0] += largest / 2

    path = altered(y=change)
    with pytest.raises(AccuracyError) as caught:
        verify(path)
    assert caught.value.exit_code == 4
    assert str(caught.value) == (
        f"{path}: golden outputs are not reproduced: output 'y' has error 0.5, accepted is 1e-05.\n"
        "  hint: this machine computes something else than the one that built the package, or the "
        "golden outputs were changed; rebuild it with `hone compile`."
    )


def test_float_is_accepted_when_within_the_tolerance_and_refused_beyond(altered, tiny):
    # Not the largest element, so that the scale of the error stays what it is.
    y = tiny.answers(tiny.feeds())["y"]
    place, scale = np.unravel_index(np.abs(y).argmin(), y.shape), np.abs(y).max()

    def shift(fraction):
        def change(array):
            array[place] += fraction * scale

        return change

    verify(altered(y=shift(0.8e-5)))
    with pytest.raises(AccuracyError):
        verify(altered(y=shift(1.2e-5)))


def test_integer_is_refused_when_one_element_differs_by_one(altered):
    def change(n):
        n[1] += 1

    with pytest.raises(AccuracyError, match=r"output 'n\+1' has error 0\.333, accepted is 0\."):
        verify(altered(**{"n+1": change}))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_float_is_refused_when_only_the_golden_output_is_not_finite(altered, value):
    def change(y):
        y[2, 3] = value

    with pytest.raises(AccuracyError, match="output 'y' has error inf, accepted is 1e-05"):
        verify(altered(y=change))


def test_all_outputs_are_listed_when_several_differ(altered):
    def change(array):
        array += 1

    with pytest.raises(AccuracyError) as caught:
        verify(altered(y=change, weight=change, **{"n+1": change}))
    for name in ("'y'", "'weight'", "'n+1'"):
        assert f"output {name} has error" in str(caught.value)
    assert "'same input'" not in str(caught.value)


def test_package_is_refused_when_one_byte_flipped(tiny, tmp_path):
    path = tmp_path / "model.hone"
    data = bytearray(tiny.package().to_bytes())
    for position in range(0, len(data), len(data) // 20):
        data[position] ^= 0x10
        path.write_bytes(data)
        with pytest.raises(PackageError) as caught:
            verify(path)
        assert caught.value.exit_code == 8
        data[position] ^= 0x10


def test_package_is_refused_when_it_has_nothing_to_prove_itself(tiny, tmp_path):
    path = tmp_path / "model.hone"
    tiny.package(golden=()).save(path)
    with pytest.raises(PackageError) as caught:
        verify(path)
    assert str(caught.value) == (
        f"{path}: golden samples are required, but the package carries none.\n"
        "  hint: rebuild it with `hone compile`."
    )


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([0.1, 4.0], [0.0, 4.0], 0.025),
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.0, 0.25], [0.0, 0.0], 0.25),
        ([-3.0], [3.0], 2.0),
        ([np.inf, 1.0], [np.inf, 1.0], 0.0),
        ([np.nan, 1.0], [np.nan, 2.0], 0.5),
        ([np.inf, 1.0], [-np.inf, 1.0], np.inf),
        ([np.nan, 1.0], [1.0, 1.0], np.inf),
        ([1.0, 1.0], [np.nan, 1.0], np.inf),
        ([np.nan], [np.nan], 0.0),
        ([], [], 0.0),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_relative_error_is_the_largest_difference_over_the_largest_value(
    actual, expected, error, dtype
):
    computed = relative_error(np.array(actual, dtype), np.array(expected, dtype))
    assert computed == pytest.approx(error, rel=1e-3)


def test_relative_error_does_not_overflow_when_float16_values_are_large():
    large = np.array([6e4], np.float16)
    assert relative_error(-large, large) == 2.0


def test_relative_error_takes_zero_dimensional_arrays():
    assert relative_error(np.array(1.5, np.float32), np.array(1.0, np.float32)) == 0.5


@pytest.mark.parametrize(
    ("error", "passed"), [(0.1, True), (0.10001, False), (float("inf"), False), (np.nan, False)]
)
def test_check_passes_only_when_the_error_is_within_the_tolerance(error, passed):
    assert OutputCheck(name="y", error=error, tolerance=0.1).passed is passed


def test_error_names_the_file_when_the_package_is_for_another_machine(tiny, tmp_path):
    here = features.machine()
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[here]
    path = tmp_path / "board.hone"
    tiny.package(target=tiny.target(arch=other, name="board")).save(path)
    with pytest.raises(PackageError) as caught:
        verify(path)
    assert str(caught.value).startswith(
        f"{path}: the package was built for {other} (target board); this machine is {here}."
    )
