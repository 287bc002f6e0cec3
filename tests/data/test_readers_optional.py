"""Files that need a package of their own: parquet and h5ad."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from typer.testing import CliRunner

from pyrolvm.cli import app
from pyrolvm.data import as_batch, read
from pyrolvm.errors import DataError

X = np.array([[1.0, 2.0], [3.5, 4.0], [5.0, 6.0]])
FRAME = pd.DataFrame({"width": [1.0, 3.5, 5.0]})


def refused(message, *args, **options):
    with pytest.raises(DataError, match=message) as caught:
        read(*args, **options)
    assert "\n" not in str(caught.value)


class TestParquet:
    @pytest.fixture(autouse=True)
    def _needs_pyarrow(self):
        pytest.importorskip("pyarrow")

    def test_in_row_groups(self, tmp_path):
        frame = pd.DataFrame({"a": np.arange(10.0), "b": np.arange(10), "kind": list("xyxyxyxyxy")})
        frame.to_parquet(tmp_path / "x.parquet", row_group_size=3)
        data = read(tmp_path / "x.parquet", labels="kind")
        assert np.array_equal(data.values, frame[["a", "b"]].to_numpy())
        assert data.labels.tolist() == frame["kind"].tolist()
        assert read(tmp_path / "x.parquet", columns=["b"]).values.dtype == np.int64
        refused("column 'kind' holds 'x' at row 0", tmp_path / "x.parquet")
        refused("did you mean 'kind'", tmp_path / "x.parquet", labels="kin")

    def test_missing_values_are_found_and_can_be_kept(self, tmp_path):
        frame = pd.DataFrame({"n": pd.array([*range(7), None], "Int64")})
        frame.to_parquet(tmp_path / "x.parquet", row_group_size=3)
        refused("missing at row 7, column 'n'", tmp_path / "x.parquet")
        values = read(tmp_path / "x.parquet", allow_missing=True).values[:, 0]
        assert values[:7].tolist() == list(range(7))
        assert np.isnan(values[7])

    def test_mapped_values_are_the_same_and_used_in_place(self, tmp_path):
        frame = pd.DataFrame({"a": np.arange(10, dtype=np.float32), "b": np.arange(10, dtype=np.float32) / 7})
        frame.to_parquet(tmp_path / "x.parquet", row_group_size=3)
        mapped = read(tmp_path / "x.parquet", mmap=True).values
        assert np.array_equal(mapped, frame.to_numpy())
        assert isinstance(mapped, np.memmap)
        assert as_batch(mapped).args[0].data_ptr() == mapped.ctypes.data
        frame = pd.DataFrame({"n": pd.array([*range(7), None], "Int64")})  # becomes real in its last group
        frame.to_parquet(tmp_path / "x.parquet", row_group_size=3)
        mapped = read(tmp_path / "x.parquet", mmap=True, allow_missing=True).values
        assert mapped[:7, 0].tolist() == list(range(7))
        assert np.isnan(mapped[7, 0])
        assert not list(Path(tempfile.gettempdir()).glob("tmp*/<f8"))

    def test_the_index_of_the_frame_is_not_data(self, tmp_path):
        FRAME.set_axis([5, 3, 1]).to_parquet(tmp_path / "x.parquet")
        assert read(tmp_path / "x.parquet").columns == ["width"]

    def test_empty_and_truncated(self, tmp_path):
        FRAME.iloc[:0].to_parquet(tmp_path / "x.parquet")
        refused("too few rows of data: 0", tmp_path / "x.parquet")
        FRAME.to_parquet(tmp_path / "y.parquet")
        raw = (tmp_path / "y.parquet").read_bytes()
        (tmp_path / "y.parquet").write_bytes(raw[: len(raw) // 2])
        refused("damaged, truncated or not parquet", tmp_path / "y.parquet")


@pytest.mark.parametrize(("module", "name"), [("pyarrow.parquet", "x.parquet"), ("anndata", "x.h5ad")])
def test_what_is_not_installed_is_named_with_its_command(monkeypatch, tmp_path, module, name):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    refused(f"needs {module.split('.')[0]}: type pip install", tmp_path / name)


def write_h5ad(path, matrix, layers=None):
    """Three cells, two genes. Their names are objects, because anndata cannot write the strings of pandas 3."""
    anndata = pytest.importorskip("anndata")
    names = {
        k: pd.Index(v, dtype=object) for k, v in {"c": ["c0", "c1", "c2"], "g": ["gene1", "gene2"]}.items()
    }
    kinds = pd.Categorical(
        np.array(["b", "t", "b"], dtype=object), categories=pd.Index(["b", "t"], dtype=object)
    )
    table = anndata.AnnData(
        matrix, pd.DataFrame({"cell_type": kinds}, names["c"]), pd.DataFrame(index=names["g"])
    )
    table.layers.update(layers or {})
    table.write_h5ad(path)
    return path


class TestH5ad:
    @pytest.mark.parametrize("kind", [np.asarray, scipy.sparse.csr_matrix, scipy.sparse.csc_array])
    def test_genes_are_columns_and_obs_has_labels(self, tmp_path, kind):
        path = write_h5ad(tmp_path / "x.h5ad", kind(X))
        data = read(path, labels="cell_type")
        assert np.array_equal(data.values, X)
        assert data.columns == ["gene1", "gene2"]
        assert data.labels.tolist() == ["b", "t", "b"]
        assert read(path, columns=["gene2"]).values[:, 0].tolist() == [2, 4, 6]

    def test_a_layer_can_stand_for_the_matrix(self, tmp_path):
        path = write_h5ad(tmp_path / "x.h5ad", None, {"counts": scipy.sparse.csr_matrix(X)})
        assert np.array_equal(read(path, key="counts").values, X)
        refused("has no matrix X, and its layers are counts: type key=counts", path)
        refused("has no layer 'count': its layers are counts", path, key="count")
        refused("it has no layers", write_h5ad(tmp_path / "y.h5ad", X), key="counts")
        refused("store the counts in adata.X", write_h5ad(tmp_path / "z.h5ad", None))

    def test_what_is_missing_is_named(self, tmp_path):
        path = write_h5ad(tmp_path / "x.h5ad", X)
        refused("did you mean 'gene", path, columns=["gen1"])
        refused("obs. has no column 'cell'", path, labels="cell")
        refused(
            "missing at row 1, column 'gene2'", write_h5ad(tmp_path / "n.h5ad", np.where(X == 4, np.nan, X))
        )
        path.write_bytes(path.read_bytes()[:300])
        refused("damaged or not h5ad", path)

    def test_from_the_shell(self, tmp_path, monkeypatch):
        write_h5ad(tmp_path / "x.h5ad", scipy.sparse.csr_matrix(X), {"counts": X + 9})
        monkeypatch.chdir(tmp_path)
        shell = ["fit", "ppca", "x.h5ad", "-l", "1", "-n", "2", "-q", "--engine", "eager", "--key", "counts"]
        done = CliRunner().invoke(app, [*shell, "-o", "run"])
        assert done.exit_code == 0, done.output
        codes = CliRunner().invoke(app, ["encode", "run", "x.h5ad", "--labels", "cell_type"])
        assert [line[:2] for line in codes.stdout.splitlines()] == ["la", "b,", "t,", "b,"]
        named = CliRunner().invoke(
            app, ["encode", "run", "x.h5ad", "--labels", "cell_type", "--key", "counts"]
        )
        assert codes.stdout == named.stdout  # the run's own layer is read again
        samples = CliRunner().invoke(app, ["sample", "run", "-s", "2"])
        assert samples.stdout.startswith("gene1,gene2\n")
        wrong = CliRunner().invoke(app, [*shell[:-1], "none", "-o", "other"])
        assert (wrong.exit_code, wrong.stderr.strip()) == (
            2,
            "error: x.h5ad has no layer 'none': its layers are counts",
        )
