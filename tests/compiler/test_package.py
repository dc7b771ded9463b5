import hashlib
import importlib.metadata
import json
import os
import stat
import subprocess
import sys
import zipfile

import jsonschema
import numpy as np
import pytest

import hone
from hone.errors import PackageError, UsageError
from hone.package import Package
from hone.packaging import archive, manifest
from hone.packaging.golden import Golden
from hone.packaging.manifest import AccuracyEntry, Manifest
from hone.signature import Signature, TensorSpec

COPY_AGAIN = "\n  hint: copy or download it again, or rebuild it with `hone compile`."


def sealed(members: dict[str, bytes]) -> bytes:
    """Write members canonically with the right comment, whatever the manifest says."""
    return archive.pack(members, hashlib.sha256(members["manifest.json"]).hexdigest())


def members_of(package: Package) -> dict[str, bytes]:
    return {"manifest.json": package.manifest.to_json(), **package.members}


def with_manifest(package: Package, **changes: object) -> bytes:
    data = json.loads(package.manifest.to_json()) | changes
    return sealed({**package.members, "manifest.json": json.dumps(data).encode()})


def test_round_trip_gives_the_equal_package_when_saved_and_read(paper, tmp_path):
    path = tmp_path / "model.hone"
    paper.save(path)
    again = Package.read(path)
    assert again == paper
    assert again.to_bytes() == path.read_bytes()
    assert again.size_bytes == path.stat().st_size
    assert again.weights_bytes == 24
    assert again.library == b"\x7fELF paper"
    assert Package.read(path.read_bytes()) == paper


def test_golden_samples_are_the_given_arrays_when_read_back(paper, tiny):
    (sample,) = Package.read(paper.to_bytes()).golden()
    for name, array in tiny.feeds().items():
        np.testing.assert_array_equal(sample.inputs[name], array, strict=True)
    for name, array in tiny.answers(tiny.feeds()).items():
        np.testing.assert_array_equal(sample.outputs[name], array, strict=True)


def test_golden_array_is_stored_little_endian_in_c_order_when_given_otherwise(tiny, paper):
    feeds = tiny.feeds()
    odd = {name: np.asarray(a, a.dtype.newbyteorder(">"), order="F") for name, a in feeds.items()}
    sample = Golden(inputs=odd, outputs=tiny.answers(feeds))
    assert tiny.pack(paper.library, golden=(sample,)) == paper


def test_package_cannot_be_changed_when_made(paper):
    with pytest.raises(TypeError):
        paper.members["lib.so"] = b""
    with pytest.raises(AttributeError):
        paper.manifest = None
    with pytest.raises(ValueError, match="frozen"):
        paper.manifest.weights_bytes = 1


def test_zip_tools_read_the_package_when_they_know_nothing_of_hone(paper, tmp_path):
    path = tmp_path / "model.hone"
    paper.save(path)
    with zipfile.ZipFile(path) as archive_:
        assert archive_.testzip() is None
        assert archive_.namelist() == sorted(members_of(paper))
        assert {info.date_time for info in archive_.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {info.compress_type for info in archive_.infolist()} == {zipfile.ZIP_STORED}
        assert {stat.S_IMODE(i.external_attr >> 16) for i in archive_.infolist()} == {0o644}
        text = archive_.read("manifest.json")
        assert archive_.comment.decode() == hashlib.sha256(text).hexdigest()
        for name, file in json.loads(text)["files"].items():
            assert hashlib.sha256(archive_.read(name)).hexdigest() == file["sha256"]


def test_manifest_says_everything_that_a_reader_needs(paper):
    data = json.loads(paper.manifest.to_json())
    assert data["schema"] == "hone.package/1"
    assert data["versions"] == {
        "hone": hone.__version__,
        "tvm": importlib.metadata.version("apache-tvm"),
        "tvm_ffi": importlib.metadata.version("apache-tvm-ffi"),
    }
    assert data["signature"]["inputs"][0] == {
        "name": "gpu_0/data:0",
        "dtype": "float32",
        "shape": [4, 24],
    }
    assert data["kernels"] == {"scale": ["conv_1", "relu_1"]}
    assert data["recipe"] == {"prune": {"ratio": 0.5}}
    assert data["accuracy"] is None
    assert data["golden"]["samples"] == 1
    assert set(data["files"]) == set(paper.members)


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_is_seen(paper, bit):
    data = bytearray(paper.to_bytes())
    for position in range(len(data)):
        data[position] ^= 1 << bit
        with pytest.raises(PackageError) as caught:
            Package.read(bytes(data))
        assert caught.value.exit_code == 8
        assert str(caught.value).endswith(COPY_AGAIN)
        data[position] ^= 1 << bit
    assert Package.read(bytes(data)) == paper


def test_every_truncation_and_extension_is_seen(paper):
    data = paper.to_bytes()
    for size in range(len(data)):
        with pytest.raises(PackageError):
            Package.read(data[:size])
    for tail in (b"\0", b"PK", data):
        with pytest.raises(PackageError):
            Package.read(data + tail)
        with pytest.raises(PackageError):
            Package.read(tail + data)


def test_inserted_bytes_are_seen_when_the_archive_stays_valid(paper, tmp_path):
    path = tmp_path / "model.hone"
    paper.save(path)
    with zipfile.ZipFile(path, "a") as archive_:
        comment = archive_.comment
        archive_.writestr("extra.txt", "x")
        archive_.comment = comment
    with pytest.raises(PackageError, match="the package is damaged"):
        Package.read(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a package is required, but the file is empty."),
        (
            b"\x08\x07onnx model",
            "a hone package is required, but the file does not begin like one.",
        ),
        (
            b"PK\x03\x04",
            "the package is damaged: its 4 bytes do not close with an end record; it was "
            "truncated, extended or altered.",
        ),
    ],
    ids=["empty", "not a zip", "four bytes"],
)
def test_file_is_refused_with_a_reason_when_it_is_no_package(tmp_path, data, message):
    path = tmp_path / "model.hone"
    path.write_bytes(data)
    with pytest.raises(PackageError) as caught:
        Package.read(path)
    assert str(caught.value) == f"{path}: {message}{COPY_AGAIN}"


def test_message_names_the_byte_when_one_differs(paper):
    data = bytearray(paper.to_bytes())
    data[10] ^= 1  # the time in the first local header
    with pytest.raises(PackageError, match=f"byte 10 of {len(data)} is not what its contents"):
        Package.read(bytes(data))


def test_message_names_the_member_when_it_was_replaced_and_zipped_again(paper):
    members = {**members_of(paper), "lib.so": b"\x7fELF other"}
    with pytest.raises(PackageError, match=r"^the package is damaged: checksum differs: lib\.so\."):
        Package.read(sealed(members))


def test_message_names_the_members_when_some_are_missing_or_foreign(paper):
    members = members_of(paper)
    del members["golden/0/input_0.npy"]
    members["note.txt"] = b"hello"
    with pytest.raises(PackageError) as caught:
        Package.read(sealed(members))
    assert str(caught.value) == (
        "the package is damaged: missing: golden/0/input_0.npy; not in the manifest: note.txt."
        + COPY_AGAIN
    )


def test_archive_is_refused_when_it_holds_no_manifest():
    with pytest.raises(PackageError, match=r"the archive holds no manifest\.json"):
        Package.read(archive.pack({"lib.so": b""}, "0" * 64))


def test_manifest_is_refused_when_the_comment_does_not_name_it(paper):
    with pytest.raises(PackageError, match="does not have the checksum in the archive's comment"):
        Package.read(archive.pack(members_of(paper), "0" * 64))


def test_message_says_who_reads_it_when_the_schema_is_newer(paper):
    versions = {"hone": "9.1.0", "tvm": "1", "tvm_ffi": "1"}
    with pytest.raises(PackageError) as caught:
        Package.read(with_manifest(paper, schema="hone.package/2", versions=versions, new_key=1))
    assert str(caught.value) == (
        f"manifest.json: hone {hone.__version__} reads packages of schema hone.package/1, this one "
        "has 'hone.package/2'.\n"
        '  hint: pip install "hone-compiler>=9.1.0" reads it.'
    )


def test_message_asks_to_rebuild_when_the_schema_is_older(paper):
    with pytest.raises(PackageError) as caught:
        Package.read(with_manifest(paper, schema="hone.package/0", versions={"hone": "0.0.3"}))
    assert str(caught.value).endswith(
        "  hint: rebuild the package from its model with `hone compile`. hone-compiler 0.0.3 wrote "
        "it and reads it."
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"weights_bytes": -1}, "weights_bytes: Input should be greater than or equal to 0"),
        ({"golden": {"samples": 1, "tolerance": {"y": 1}}}, "golden tolerances are required for"),
        ({"files": {"../x": {"sha256": "0" * 64, "bytes": 0}}}, "not allowed as names"),
    ],
    ids=["unknown key", "negative", "tolerances", "unsafe name"],
)
def test_manifest_is_refused_when_it_does_not_follow_the_schema(paper, changes, problem):
    with pytest.raises(PackageError, match=r"does not follow schema hone\.package/1") as caught:
        Package.read(with_manifest(paper, **changes))
    assert problem in str(caught.value)


def test_manifest_is_refused_when_it_is_written_another_way(paper):
    with pytest.raises(PackageError, match=r"manifest\.json is not written as hone writes it"):
        Package.read(with_manifest(paper))


@pytest.mark.parametrize(
    "text", [b"not json", b"[]", b'"hone.package/1"', b"\xff", b"null"], ids=repr
)
def test_manifest_is_refused_when_it_is_no_object(paper, text):
    with pytest.raises(PackageError):
        Package.read(sealed({**paper.members, "manifest.json": text}))


def test_golden_arrays_are_refused_when_their_number_is_not_the_manifests(paper):
    golden = {**json.loads(paper.manifest.to_json())["golden"], "samples": 2}
    changed = Manifest.from_data(json.loads(paper.manifest.to_json()) | {"golden": golden})
    with pytest.raises(PackageError, match="its golden arrays are not those of 2 samples"):
        Package(manifest=changed, members=paper.members)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"pickle"], ids=repr)
def test_golden_array_is_refused_when_it_is_no_npy(paper, content):
    data = json.loads(paper.manifest.to_json())
    name = "golden/0/input_0.npy"
    data["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    package = Package(manifest=Manifest.from_data(data), members={**paper.members, name: content})
    with pytest.raises(PackageError, match=r"^golden/0/input_0\.npy: the array cannot be read"):
        package.golden()


def test_golden_sample_is_refused_when_it_does_not_fit_the_signature(paper, tiny):
    feeds, answers = tiny.feeds(), tiny.answers(tiny.feeds())
    wrong = Golden(inputs={**feeds, "n.1": np.zeros(4, np.int32)}, outputs=answers)
    with pytest.raises(UsageError) as caught:
        tiny.pack(paper.library, golden=(wrong,))
    assert str(caught.value) == ("golden sample 0: n.1: int64[3] is required, given is int32[4].")
    with pytest.raises(UsageError, match=r"s: float32\[\] is required, but it is missing"):
        tiny.pack(paper.library, golden=(Golden(inputs={**feeds, "s": None}, outputs=answers),))


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("lib.so", True),
        ("golden/0/input_0.npy", True),
        ("tuning/a-b.json", True),
        ("../lib.so", False),
        ("a/../b", False),
        ("/etc/passwd", False),
        ("a//b", False),
        ("a/", False),
        (".hidden", False),
        ("a\\b", False),
        ("C:x", False),
        ("ünicode", False),
        ("a\n", False),
        ("", False),
        ("x" * 256, False),
    ],
)
def test_member_names_stay_inside_the_archive(name, safe):
    assert archive.is_safe_name(name) is safe
    if not safe:
        with pytest.raises(PackageError):
            archive.pack({name: b""}, "0" * 64)


def test_equal_packages_are_equal_bytes_in_every_process(paper, tiny):
    script = (
        "import sys, hashlib; from hone.package import Package\n"
        "package = Package.read(sys.stdin.buffer.read())\n"
        "again = package.with_evidence(golden=package.golden(), recipe=package.manifest.recipe)\n"
        "print(hashlib.sha256(again.to_bytes()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            input=paper.to_bytes(),
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "TZ": zone},
        ).stdout.decode()
        for seed, zone in (("1", "UTC"), ("2", "Asia/Tokyo"))
    }
    assert digests == {hashlib.sha256(tiny.pack(paper.library).to_bytes()).hexdigest() + "\n"}


def test_evidence_replaces_what_was_there_and_keeps_the_code(paper, tiny):
    accuracy = AccuracyEntry(metric="top-1", value=0.975, samples=360)
    changed = paper.with_evidence(
        golden=(), recipe={"kept": []}, accuracy=accuracy, tuning={"records.json": b"{}"}
    )
    assert changed.library == paper.library
    assert changed.golden() == ()
    assert changed.manifest.recipe == {"kept": []}
    assert changed.manifest.accuracy == accuracy
    assert changed.members["tuning/records.json"] == b"{}"
    assert changed.manifest.target == paper.manifest.target


def test_old_file_stays_when_writing_fails(paper, tmp_path, monkeypatch):
    path = tmp_path / "model.hone"
    path.write_bytes(b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UsageError) as caught:
        paper.save(path)
    assert str(caught.value) == (f"{path}: the package cannot be written: No space left on device.")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.hone"]


def test_saved_file_has_the_umasks_permissions(paper, tmp_path):
    old = os.umask(0o027)
    try:
        paper.save(tmp_path / "model.hone")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "model.hone").stat().st_mode) == 0o640


def test_file_that_cannot_be_opened_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError) as caught:
        Package.read(tmp_path / "missing.hone")
    assert str(caught.value) == (
        f"{tmp_path / 'missing.hone'}: a package is required, but it cannot be read: No such file "
        "or directory."
    )
    with pytest.raises(UsageError, match="Is a directory"):
        Package.read(tmp_path)


def test_json_schema_accepts_and_rejects_what_the_reader_does(paper):
    validator = jsonschema.Draft202012Validator(manifest.json_schema())
    data = json.loads(paper.manifest.to_json())
    validator.validate(data)
    for key, value in (("surprise", 1), ("schema", "hone.package/2"), ("precision", "fp64")):
        assert not validator.is_valid({**data, key: value})


def test_signature_is_refused_when_names_repeat(tiny, paper):
    twice = (TensorSpec(name="x", dtype="float32", shape=(1,)),) * 2
    with pytest.raises(PackageError, match="must be unique"):
        tiny.pack(paper.library, signature=Signature(inputs=twice, outputs=twice), golden=())


def test_package_is_never_written_over_what_is_no_file(paper, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="this is a device or pipe, not a file"):
        paper.save(pipe)
    assert pipe.is_fifo()
    with pytest.raises(UsageError, match="this is a folder, not a file"):
        paper.save(tmp_path)


def test_package_is_one_line_when_it_is_shown(paper):
    assert len(repr(paper)) < 100
    assert repr(paper).startswith("Package(fp32 for ")


def test_memory_of_a_run_is_weights_activations_and_inputs(tiny):
    package = tiny.package(activations_bytes=1000)
    memory = package.manifest.memory
    inputs = 4 * 24 * 4 + 3 * 8 + 4
    assert memory.activations_bytes == 1000
    assert memory.peak_bytes == package.weights_bytes + 1000 + inputs
    again = package.with_evidence(golden=package.golden(), recipe={})
    assert again.manifest.memory == memory


def test_package_of_an_older_hone_stays_byte_for_byte(tiny):
    package = tiny.package()
    text = package.manifest.to_json()
    assert not {"memory", "costs"} & json.loads(text).keys()
    assert Package.read(package.to_bytes()).manifest.to_json() == text
