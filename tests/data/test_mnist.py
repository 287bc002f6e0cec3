"""MNIST from a folder, from the cache, and by a download that is checked. No test uses the net."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
from requests import ConnectionError

from pyrolvm.data import load_mnist, mnist
from pyrolvm.errors import DataError, SettingError


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.tobytes(), mtime=0)


@pytest.fixture
def originals(monkeypatch, tmp_path):
    """A little MNIST in the place of the real one: file name -> bytes of the archive."""
    rng = np.random.default_rng(0)
    files, raw = {}, {}
    for (split, part), file in mnist._FILES.items():
        shape = (6, 28, 28) if part == "images" else (6,)
        data = idx(rng.integers(0, 256 if part == "images" else 10, shape).astype(np.uint8))
        files[split, part] = mnist._File(file.name, shape, hashlib.sha256(data).hexdigest())
        raw[f"{file.name}.gz"] = data
    monkeypatch.setattr(mnist, "_FILES", files)
    monkeypatch.setattr(mnist, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.delenv("PYROLVM_DATA", raising=False)
    return raw


@pytest.fixture
def net(monkeypatch, originals):
    """A net whose mirrors serve `net[url]` or else the originals; an exception is raised."""
    served, asked = {}, []

    def download(url, output_file, pooch):
        asked.append(url)
        body = served.get(url, served.get("*", originals[url.rsplit("/", 1)[1]]))
        if isinstance(body, Exception):
            raise body
        Path(output_file).write_bytes(body)

    monkeypatch.setattr(mnist.pooch, "HTTPDownloader", lambda timeout: download)
    served["asked"] = asked
    return served


@pytest.mark.parametrize("folder", ["mnist", "."])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dot", [True, False])
def test_from_the_users_folder(originals, net, monkeypatch, tmp_path, folder, packed, dot):
    place = tmp_path / "data" / folder
    place.mkdir(parents=True)
    for name, raw in originals.items():
        name = name.replace("-idx", ".idx") if dot else name
        (place / (name if packed else name[:-3])).write_bytes(raw if packed else gzip.decompress(raw))
    monkeypatch.setenv("PYROLVM_DATA", str(tmp_path / "data"))
    data = load_mnist("test")
    assert data.values.shape == (6, 784)
    assert data.values.dtype == np.float32
    assert data.values.max() <= 1
    assert data.labels.dtype == np.int64
    assert net["asked"] == []
    raw = load_mnist("test", scale=False).values
    assert raw.dtype == np.uint8
    assert np.array_equal((data.values * 255).round(), raw)


def test_downloaded_once_then_from_the_cache(net, tmp_path):
    first = load_mnist()
    assert len(net["asked"]) == 2
    assert np.array_equal(load_mnist(download=False).values, first.values)
    assert len(net["asked"]) == 2
    assert sorted(p.name for p in (tmp_path / "cache" / "mnist").iterdir()) == [
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
    ]


def test_a_damaged_cache_is_fetched_again(net, tmp_path):
    first = load_mnist()
    path = tmp_path / "cache" / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    assert np.array_equal(load_mnist().values, first.values)
    assert len(net["asked"]) == 3


def test_the_second_mirror_helps_out(net, originals):
    for name, body in zip(originals, [b"<html>", ConnectionError("down")] * 2, strict=True):
        net[mnist._MIRRORS[0] + name] = body
    assert load_mnist().num_rows == 6


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            ConnectionError("retries exceeded (Caused by no route)"),
            r"mnist/: no route.*set the environment.*PYROLVM_DATA",
        ),
        (TimeoutError("timed out"), "timed out"),
        (b"not the file", "hash of downloaded file.*does not match"),
    ],
)
def test_no_original_to_be_had(net, tmp_path, body, message):
    net["*"] = body
    with pytest.raises(DataError, match=message) as caught:
        load_mnist()
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "mnist").iterdir()) == []


def test_no_download_wanted(net):
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte was not found in .*PYROLVM_DATA"):
        load_mnist(download=False)
    assert net["asked"] == []


def test_a_local_file_of_another_shape_is_refused(originals, monkeypatch, tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(originals["train-labels-idx1-ubyte.gz"])
    monkeypatch.setenv("PYROLVM_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"is not MNIST's train-images-idx3-ubyte: it holds uint8 \[6\]"):
        load_mnist()


def test_unknown_split():
    with pytest.raises(SettingError, match="split='valid' is not known: choose from train, test"):
        load_mnist("valid")
