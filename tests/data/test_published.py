"""Data sets with a name: MNIST-1D is its package's, Fashion-MNIST is its authors'."""

from __future__ import annotations

import gzip
import hashlib
import os
import random

import numpy as np
import pytest

from research.data import fashion_mnist as fashion
from research.data.__main__ import main
from research.data.folder import data_folders, writable_folder
from research.data.mnist1d import mnist1d, mnist1d_sources
from tests.data.test_images import idx

FIRST = ["-0.3320", "-0.4719", "-0.7787"]


@pytest.mark.parametrize("shuffled", [False, True])
def test_mnist1d_equals_its_package_bit_for_bit(shuffled):
    package = pytest.importorskip("mnist1d.data")
    arguments = package.get_dataset_args()
    arguments.num_samples, arguments.shuffle_seq = 500, shuffled
    state, own = np.random.get_state(), random.getstate()
    theirs = package.make_dataset(arguments)
    np.random.set_state(state)
    random.setstate(own)
    ours = mnist1d(samples=500, shuffled=shuffled)
    for part, x, y in (("train", "x", "y"), ("test", "x_test", "y_test")):
        np.testing.assert_array_equal(ours[part][0], theirs[x].astype(np.float32))
        np.testing.assert_array_equal(ours[part][1], theirs[y])
    assert ours["train"][0].dtype == np.float32 and ours["train"][1].dtype == np.int32


def test_mnist1d_has_the_published_sizes_and_touches_no_global_seed():
    before = np.random.get_state()[1].copy()
    sources = mnist1d_sources()
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    assert (len(sources["train"]), len(sources["test"])) == (4000, 1000)
    record = sources["train"].gather(np.arange(4000), 0)
    assert record["inputs"].shape == (4000, 40) and np.bincount(record["targets"]).min() > 350
    assert [f"{x:.4f}" for x in record["inputs"][0, :3]] == FIRST


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Four small files of its format, and the sums to match; nothing of it is found elsewhere."""
    contents = {}
    for name in fashion.FILES:
        rows = 6 if name.startswith("train") else 2
        array = np.arange(rows * 12).reshape(rows, 4, 3) % 256 if "images" in name else np.arange(rows) % 10
        contents[name] = idx(array)
    monkeypatch.setattr(fashion, "FILES", {name: hashlib.sha256(c).hexdigest() for name, c in contents.items()})
    monkeypatch.setattr(fashion, "SYSTEM_FOLDER", str(tmp_path / "system"))
    monkeypatch.setenv("GNOMON_DATA", str(tmp_path / "data"))

    def write(folder, say):
        for name, content in contents.items():
            with open(os.path.join(folder, name), "wb") as handle:
                handle.write(gzip.compress(content))

    return write


def refuse(folder, say):
    raise OSError("no network")


def test_fashion_mnist_is_fetched_checked_and_loaded(small, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="this gets it: gnomon data fashion-mnist"):
        fashion.fashion_mnist()
    monkeypatch.setattr(fashion, "WAYS", {"first": refuse, "second": small})
    said: list[str] = []
    folder = fashion.fetch(say=said.append)
    assert folder == str(tmp_path / "data" / "fashion-mnist")
    assert said == ["first: no network", f"Fashion-MNIST is in {folder}, checksums right"]
    assert sorted(os.listdir(folder)) == sorted(fashion.FILES)  # nothing left behind
    data = fashion.fashion_mnist()
    assert data["train"][0].shape == (6, 4, 3, 1) and data["test"][1].tolist() == [0, 1]
    monkeypatch.setattr(fashion, "WAYS", {"first": refuse})
    assert fashion.fetch(say=said.append) == folder  # already there


def test_fashion_mnist_with_other_content_is_never_put_in_place(small, monkeypatch, tmp_path, capsys):
    def wrong(folder, say):
        small(folder, say)
        with open(os.path.join(folder, "t10k-labels-idx1-ubyte.gz"), "wb") as handle:
            handle.write(gzip.compress(idx(np.arange(3))))

    monkeypatch.setattr(fashion, "WAYS", {"first": wrong, "second": refuse})
    target = tmp_path / "a b"
    assert main(["fashion-mnist", "--to", str(target)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "t10k-labels" in error and "wanted" in error and "second: no network" in error
    assert os.listdir(target) == []
    monkeypatch.setattr(fashion, "WAYS", {"first": small})
    assert main(["fashion-mnist", "--to", str(target)]) == 0
    file = target / "train-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte.gz' is truncated or damaged"):
        fashion.fashion_mnist(str(target))
    assert main(["fashion-mnist", "--to", str(target)]) == 2


def test_the_debian_package_is_had_with_lists_of_our_own_where_the_machines_lack_it(small, monkeypatch, tmp_path):
    commands = []

    def run(command, cwd, **_):
        commands.append(command)
        if "download" in command and not any("Dir::State::lists=" in part for part in command):
            raise fashion.subprocess.CalledProcessError(100, command, stderr="E: Unable to locate package")
        if "download" in command:
            open(os.path.join(cwd, "dataset.deb"), "w").close()
        if command[0] == "dpkg-deb":
            unpacked = os.path.join(cwd, "unpacked", fashion.SYSTEM_FOLDER.lstrip("/"))
            os.makedirs(unpacked)
            small(unpacked, None)

    monkeypatch.setattr(fashion.subprocess, "run", run)
    folder = fashion.fetch(say=lambda line: None)
    assert [next(p for p in c if p in ("update", "download", "dpkg-deb")) for c in commands] == [
        "download", "update", "download", "dpkg-deb"]  # fmt: skip
    assert sorted(os.listdir(folder)) == sorted(fashion.FILES)


def test_the_mirror_is_asked_for_the_four_files(small, monkeypatch, tmp_path):
    (tmp_path / "mirror").mkdir()
    small(tmp_path / "mirror", None)
    monkeypatch.setattr(fashion, "MIRROR", (tmp_path / "mirror").as_uri() + "/")
    monkeypatch.setattr(fashion, "WAYS", {"mirror": fashion.from_mirror})
    assert len(fashion.fashion_mnist(fashion.fetch(say=lambda line: None))["train"][1]) == 6


def test_the_real_fashion_mnist_where_it_is():
    try:
        data = fashion.fashion_mnist()
    except ValueError as error:
        pytest.skip(str(error))
    assert data["train"][0].shape == (60000, 28, 28, 1) and data["test"][0].shape == (10000, 28, 28, 1)
    assert np.bincount(data["train"][1]).tolist() == [6000] * 10 and np.bincount(data["test"][1]).tolist() == [1000] * 10


def test_data_goes_where_the_user_says_else_to_the_cache_else_beside_him(monkeypatch, tmp_path):
    monkeypatch.setenv("GNOMON_DATA", str(tmp_path / "x"))
    assert data_folders() == [str(tmp_path / "x")]
    monkeypatch.delenv("GNOMON_DATA")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert writable_folder("d") == str(tmp_path / "cache" / "gnomon" / "d")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # as a read-only home: no folder can be made there
    assert writable_folder("d") == str(tmp_path / "data" / "d")


def test_label_noise_changes_training_labels_alone_and_leaves_the_examples():
    plain, noisy = mnist1d(samples=2000, train=0.5), mnist1d(samples=2000, train=0.5, label_noise=0.5)
    for part in ("train", "test"):
        np.testing.assert_array_equal(plain[part][0], noisy[part][0])
    np.testing.assert_array_equal(plain["test"][1], noisy["test"][1])
    # half are drawn anew, a tenth of those to what they were: 0.45 of 1,000 with a deviation of 16; 5 deviations
    assert abs((plain["train"][1] != noisy["train"][1]).sum() - 450) < 80
    assert noisy["train"][1].dtype == np.int32 and set(noisy["train"][1]) == set(range(10))
