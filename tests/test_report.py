"""The page of a run: whole, self-contained, escaped, and with no other numbers than those of the tables."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyrolvm
from pyrolvm import (
    PPCA,
    BayesianFactorAnalysis,
    DataError,
    GaussianMixture,
    RunFolderError,
    SettingError,
    data_plate,
)
from pyrolvm.data import load_dataset
from pyrolvm.diagnostics.guide_quality import diagnose
from pyrolvm.report import write_report
from pyrolvm.report.parts import number
from pyrolvm.runs import Preparation, Source

SECTIONS = ["Summary", "Model", "Training", "Evidence", "Guide", "Predictive checks"]
SECTIONS += ["Samples", "Data", "Settings", "Versions", "Repeat"]
FIT = {"num_steps": 60, "learning_rate": 0.05, "progress": False, "engine": "eager"}
QUICK = {"num_samples": 100, "max_rows": 60}
VOID = {"meta", "img", "br", "source", "link", "input"}
CHROMIUM = shutil.which("chromium")
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
QUIET += "--disable-component-update --disable-sync --window-size=900,1500"
EVIL = ("<script>alert(1)</script>", '"><img src=x onerror="alert(2)">', "{{ 7 * 7 }} & co")


class Page(HTMLParser):
    """What a page holds: tags, headings, pictures, tables by caption, text of each section."""

    def __init__(self, text):
        super().__init__()
        self.text, self.open, self.tags, self.attributes, self.images = text, [], [], [], []
        self.headings, self.tables, self.sections, self.terms = [], {}, {}, []
        self.rows, self.current = [], None
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "section":
            self.current = dict(attrs)["id"]
        if tag == "table":
            self.rows = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag in ("h1", "h2"):
            self.headings.append((tag, ""))
        if tag == "caption":
            self.tables[""] = self.rows
        if tag in ("dt", "dd"):
            self.terms.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open:
            return
        tag = self.open[-1]
        if self.current and tag != "style":
            self.sections[self.current] = self.sections.get(self.current, "") + data
        if tag in ("th", "td"):
            self.rows[-1][-1] += data
        elif tag in ("h1", "h2"):
            self.headings[-1] = (tag, self.headings[-1][1] + data)
        elif tag == "caption":
            self.tables[data] = self.tables.pop("")
        elif tag in ("dt", "dd"):
            self.terms[-1] += data

    @property
    def facts(self):
        return dict(zip(self.terms[::2], self.terms[1::2], strict=True))

    def table(self, start):
        """The table whose caption begins so, as text: row -> column -> cell."""
        rows = next(rows for caption, rows in self.tables.items() if caption.startswith(start))
        return {r[0]: dict(zip(rows[0][1:], r[1:], strict=True)) for r in rows[1:]}


def parsed(path):
    return Page(path.read_text(encoding="utf-8"))


def agree(cells, table, columns=None):
    """Every cell is the table's number, to the digits that are shown."""
    assert len(cells) == len(table)
    for (name, row), (_, want) in zip(cells.items(), table.iterrows(), strict=True):
        for column, key in (columns or {c: c for c in table.columns}).items():
            digits = len(row[column].partition(".")[2])
            shown = float(row[column].replace(",", ""))
            assert shown == pytest.approx(float(want[key]), abs=0.5000001 * 10**-digits), (name, column)


def recorded(source, path, model, **preparation):
    """A run as the shell saves it."""
    prepared = Preparation(**preparation).apply(source)
    fitted = pyrolvm.fit(model, prepared.train, validation=prepared.held_out, **FIT)
    fitted.save(path, {"command": "pyrolvm fit ppca <data> --out x", "data": prepared.record})
    return fitted, prepared


@pytest.fixture(scope="module")
def iris(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "iris"
    fitted, prepared = recorded(Source("iris"), path, PPCA(4, 2), standardise=True, validation=0.1)
    return path, fitted, prepared


@pytest.fixture(scope="module")
def page(iris):
    path = write_report(iris[0], gaps=True, **QUICK)
    assert path == iris[0] / "report.html"
    return parsed(path)


def test_sections_stand_in_order_under_one_heading_and_are_linked(page):
    assert [text for tag, text in page.headings if tag == "h1"] == ["PPCA, run iris"]
    assert [text for tag, text in page.headings if tag == "h2"] == SECTIONS
    targets = [v for tag, k, v in page.attributes if tag == "a" and k == "href"]
    assert targets == [f"#{s.lower().replace(' ', '-')}" for s in SECTIONS]
    ids = [v for _, k, v in page.attributes if k == "id"]
    assert len(set(ids)) == len(ids)
    assert {t[1:] for t in targets} <= set(ids)


def test_nothing_is_run_or_fetched(page):
    assert not re.search(r"https?://|url\((?!#)|@import", page.text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not [k for _, k, _ in page.attributes if k.startswith("on") or k == "srcset"]
    policy = [v for tag, k, v in page.attributes if tag == "meta" and k == "content" and "default-src" in v]
    assert policy[0].startswith("default-src 'none'")
    links = [v for _, k, v in page.attributes if k.endswith("href") or k == "src"]
    assert all(v.startswith(("#", "data:image/svg+xml;base64,")) for v in links)


def test_drawings_are_plain_svg_without_scripts_or_dates(page):
    for image in page.images:
        svg = base64.b64decode(image["src"].partition("base64,")[2]).decode()
        assert "<svg" in svg
        assert "<script" not in svg
        assert "<dc:date>" not in svg


def test_pictures_have_words_and_tables_have_heads(page):
    # scree, scores, loadings, bound, histogram, k-hat, active units, gaps, checks
    assert len(page.images) == 9
    assert all(len(i["alt"]) > 30 for i in page.images)
    assert "" not in page.tables
    heads = [v for tag, k, v in page.attributes if tag == "th" and k == "scope"]
    assert len(heads) == page.tags.count("th")
    assert set(heads) == {"row", "col"}
    assert page.tags.count("caption") == page.tags.count("table")


def test_numbers_are_those_of_the_tables(page, iris):
    _, fitted, prepared = iris
    found = diagnose(fitted, prepared.train, 100, max_rows=60, gaps=True)
    values = found.evidence["log_evidence"]
    moments = page.table("log p of each datum")
    training = {k: float(v["training rows (60)"]) for k, v in moments.items()}
    assert training["mean"] == pytest.approx(values.mean(), abs=5e-3)
    assert training["median"] == pytest.approx(values.median(), abs=5e-3)
    assert training["standard error of the mean over rows"] == pytest.approx(values.std() / 60**0.5, abs=5e-3)
    held_out = fitted.log_evidence(prepared.held_out, "exact").mean().item()
    assert float(moments["mean"]["held-out rows (15)"]) == pytest.approx(held_out, abs=5e-3)
    shift = float(np.log(prepared.transforms[0].scale).sum())
    own = float(moments["mean in the data's own units"]["training rows (60)"])
    assert own == pytest.approx(values.mean() - shift, abs=5e-3)
    agree(page.table("Data of largest k-hat"), found.worst, {"k-hat": "k_hat", "ELBO": "elbo"})
    agree(page.table("Latent dimensions"), found.collapse.dimensions, {"KL": "kl"})
    agree(page.table("Statistics"), found.predictive.table, {"observed": "observed", "p-value": "p_value"})
    gap = page.table("Evidence and gaps")["inference gap"]["mean"]
    assert float(gap) == pytest.approx(found.gaps.means["inference_gap"], abs=5e-3)
    assert all(sentence in page.sections["summary"] for sentence in found.sentences)
    assert found.paragraph == " ".join(found.sentences)


def test_the_summary_is_of_the_run(page, iris):
    _, fitted, _ = iris
    facts = page.facts
    assert facts["model"] == "PPCA(data_dim=4, latent_dim=2)"
    assert facts["rows"] == "iris: 135 and 15 held out"
    assert float(facts["ELBO, nats per datum"].split()[0]) == pytest.approx(fitted.elbo, abs=5e-3)
    last = fitted.history["validation_elbo"].dropna().iloc[-1]
    assert float(facts["ELBO, held out"]) == pytest.approx(last, abs=5e-3)
    assert facts["engine"] == fitted.engine
    assert facts["stopped"] == fitted.stopped_because
    assert "pyrolvm fit ppca <data> --out x" in page.sections["repeat"]
    assert page.table("What the fit was given")["num_steps"]["value"] == "60"
    assert page.table("What the numbers depend on")["torch"]["of the fit"] == torch.__version__


def test_samples_are_compared_with_the_data_in_the_units_of_the_data(page, iris):
    moments = page.table("1,000 samples")
    prepared = iris[2]
    assert list(moments) == prepared.train.columns
    x = prepared.transforms[0].undo(prepared.train.values)
    assert float(moments["petal length (cm)"]["mean of data"]) == pytest.approx(x[:, 2].mean(), abs=5e-3)


def test_without_data_the_page_says_what_is_missing_and_what_to_type(iris):
    page = parsed(write_report(iris[0], False))
    assert [text for tag, text in page.headings if tag == "h2"] == SECTIONS
    assert "the data were left out" in page.sections["summary"]
    assert f"pyrolvm report {iris[0]} DATA" in page.sections["summary"]
    assert "Not computed" in page.sections["guide"]
    assert len(page.images) == 3  # scree, loadings, bound
    assert "mean of data" not in page.text


def test_the_same_run_gives_the_same_page_and_leaves_nothing_else(iris):
    path = write_report(iris[0], num_samples=50, max_rows=20)
    first, files = path.read_bytes(), sorted(p.name for p in iris[0].iterdir())
    assert write_report(iris[0], num_samples=50, max_rows=20).read_bytes() == first
    assert sorted(p.name for p in iris[0].iterdir()) == files


@pytest.fixture
def evil(tmp_path):
    """A run on a file whose columns are markup."""
    rng = np.random.default_rng(0)
    file = tmp_path / "table.csv"
    pd.DataFrame(rng.normal(size=(30, 3)), columns=list(EVIL)).to_csv(file, index=False)
    recorded(Source(str(file)), tmp_path / "run", PPCA(3, 1), standardise=True)
    return tmp_path / "run", file


def test_names_of_columns_are_text_and_nothing_else(evil):
    path, _ = evil
    page = parsed(write_report(path, num_samples=30, max_rows=10))
    assert "script" not in page.tags
    assert [i["src"] for i in page.images if not i["src"].startswith("data:")] == []
    assert list(page.table("1,000 samples")) == list(EVIL)
    assert list(page.table("standardise")) == list(EVIL)
    assert "pyrolvm fit ppca <data> --out x" in page.sections["repeat"]


def test_notes_of_a_folder_are_text_too(evil):
    path, _ = evil
    (path / "evidence.json").write_text(json.dumps([{"data": EVIL[1], "method": EVIL[0], "mean": -1.25}]))
    page = parsed(write_report(path, False))
    row = page.table("Estimates noted")[EVIL[1]]
    assert (row["method"], row["mean"], row["num samples"]) == (EVIL[0], "-1.250", "–")
    assert "script" not in page.tags


def test_data_that_changed_are_not_taken_for_those_of_the_run(evil):
    path, file = evil
    assert "largest k-hat" in parsed(write_report(path, num_samples=30, max_rows=10)).facts
    frame = pd.read_csv(file)
    frame.iloc[0, 0] += 1
    frame.to_csv(file, index=False)
    assert "are not those that the run was fitted to" in parsed(write_report(path)).sections["summary"]
    named = parsed(write_report(path, str(file), num_samples=30, max_rows=10))
    assert "largest k-hat" in named.facts  # asked for by name, they are used
    file.unlink()
    assert "cannot be read again" in parsed(write_report(path)).sections["summary"]


def test_arrays_are_taken_as_the_model_sees_them_and_the_python_call_is_shown(tmp_path):
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    fitted = pyrolvm.fit(PPCA(3, 1), x, **FIT)
    fitted.save(tmp_path)
    without = parsed(write_report(tmp_path))
    assert "does not name the data" in without.sections["summary"]
    assert "pyrolvm.fit(pyrolvm.PPCA(data_dim=3, latent_dim=1), x," in without.sections["repeat"]
    page = parsed(write_report(tmp_path, x, num_samples=30))
    mean = fitted.log_evidence(x, "exact").mean().item()
    cell = page.table("log p of each datum")["mean"]["training rows (30)"]
    assert float(cell) == pytest.approx(mean, abs=5e-3)


def test_a_pair_of_ones_own_without_latents_of_each_datum(tmp_path):
    def model(x):
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with data_plate(x):
            pyro.sample("x", dist.Normal(m, 1.0).to_event(1), obs=x)

    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    pyrolvm.fit(model, x, guide=AutoNormal, **FIT).save(tmp_path)
    with pytest.raises(RunFolderError, match="name the pair"):
        write_report(tmp_path, x)
    page = parsed(write_report(tmp_path, x, model=model, guide=AutoNormal, num_samples=100))
    assert page.facts["latents shared by all data"] == "m"
    assert np.isfinite(float(page.facts["their k-hat"]))
    assert "predictive log p(x), nats per datum" in page.facts
    assert "No k-hat per datum" in page.sections["guide"]
    assert "pyrolvm.fit(model, x," in page.sections["repeat"]


def test_what_is_not_defined_for_a_program_is_named(tmp_path):
    x = load_dataset("faithful").standardise()[0]
    pyrolvm.fit(GaussianMixture(2, 2), x, **FIT).save(tmp_path)
    page = parsed(write_report(tmp_path, x, num_samples=30, max_rows=20))
    assert "enumerated" in page.sections["guide"]
    assert "exact" in page.sections["evidence"]
    assert page.facts["log p(x), nats per datum"]


def test_the_page_shows_the_principal_axes(page, iris):
    """The scree is that of the covariance W W' + s^2 I, the loadings have orthogonal columns."""
    _, fitted, prepared = iris
    W = fitted.model.loadings.detach().double()
    values = torch.linalg.eigvalsh(W.mT @ W).flip(0)
    total = float(values.sum() + 4 * fitted.model.noise_scale.detach().double() ** 2)
    alt = next(i["alt"] for i in page.images if i["alt"].startswith("Shares"))
    assert [float(v) for v in re.findall(r"[\d.]+(?= %)", alt)] == pytest.approx(
        (100 * values / total).tolist(), abs=0.06
    )
    shown = page.table("Loadings in principal axes")
    unit = prepared.transforms[0].scale
    rows = np.array([[float(v) for v in row.values()] for row in shown.values()]) / unit[:, None]
    assert rows[:, 0] @ rows[:, 1] == pytest.approx(0, abs=0.01)
    assert list(shown) == prepared.train.columns
    assert any("codes as points" in i["alt"] for i in page.images)


def test_the_page_shows_the_components_of_a_mixture(tmp_path):
    path = tmp_path / "run"
    fitted, prepared = recorded(Source("faithful"), path, GaussianMixture(2, 2), standardise=True)
    page = parsed(write_report(path, num_samples=30, max_rows=20))
    shown = page.table("Components")
    means = prepared.transforms[0].undo(fitted.model.means.detach().numpy())
    for k, row in enumerate(shown.values()):
        assert float(row["weight"]) == pytest.approx(float(fitted.model.weights[k].detach()), abs=5e-4)
        assert float(row["mean of waiting"]) == pytest.approx(means[k, 1], abs=5e-2)
        variance = (fitted.model.scale_tril @ fitted.model.scale_tril.mT)[k, 1, 1].detach().item()
        sd = variance**0.5 * prepared.transforms[0].scale[1]
        assert float(row["sd of waiting"]) == pytest.approx(sd, abs=5e-2)
    assert any("ellipses of the 2 components" in i["alt"] for i in page.images)


def test_every_model_of_the_suite_shows_itself(tmp_path):
    fitted, _ = recorded(Source("iris"), tmp_path / "fa", BayesianFactorAnalysis(4, 2), standardise=True)
    page = parsed(write_report(tmp_path / "fa", num_samples=30, max_rows=20))
    assert "Loadings, with intervals" in " ".join(page.tables)
    assert any("codes as points" in i["alt"] for i in page.images)
    assert "BayesianFactorAnalysis(data_dim=4, latent_dim=2)" in page.facts["model"]
    assert fitted.model.latent_dim == 2


def test_a_fit_of_python_is_reported_on_a_named_data_set(tmp_path):
    x = load_dataset("iris")
    fitted = pyrolvm.fit(PPCA(4, 2), x, **FIT)
    fitted.save(tmp_path)
    page = parsed(write_report(tmp_path, "iris", num_samples=30, max_rows=150))
    mean = fitted.log_evidence(x, "exact").mean().item()
    assert float(page.table("log p of each datum")["mean"]["training rows (150)"]) == pytest.approx(
        mean, abs=5e-3
    )
    assert "mean of data" in page.text


def test_tables_can_be_read_on_a_phone_and_on_paper(page):
    """Each cell carries its column's name, and short tables are not torn between pages."""
    names = [v for tag, k, v in page.attributes if tag == "td" and k == "data-name"]
    assert len(names) == page.tags.count("td")
    assert "" not in names
    classes = [v for tag, k, v in page.attributes if tag == "div" and k == "class"]
    assert "scroll short" in classes


def test_rows_that_are_pictures_are_drawn(tmp_path):
    _, prepared = recorded(Source("digits"), tmp_path, PPCA(64, 2))
    page = parsed(write_report(tmp_path, num_samples=30, max_rows=20))
    pictures = [i["alt"] for i in page.images if "pictures" in i["alt"]]
    assert len(pictures) == 2  # samples and reconstructions
    assert pictures[0] == "36 pictures of 8 by 8 pixels that the model made."
    array = prepared.train.values[:, :60]
    pyrolvm.fit(PPCA(60, 2), array, **FIT).save(tmp_path / "array")
    drawn = parsed(write_report(tmp_path / "array", image_shape=(6, 10)))
    assert any("6 by 10 pixels" in i["alt"] for i in drawn.images)


def test_what_cannot_be_is_refused_in_a_line(iris, tmp_path):
    with pytest.raises(RunFolderError):
        write_report(tmp_path / "nothing")
    with pytest.raises(SettingError, match="num_samples must be"):
        write_report(iris[0], num_samples=3)
    with pytest.raises(SettingError, match="does not suit rows"):
        write_report(iris[0], image_shape=(3, 3))
    with pytest.raises(SettingError, match="max_rows must be"):
        write_report(iris[0], max_rows=1)
    with pytest.raises(DataError, match="no column"):
        write_report(iris[0], "wine")
    with pytest.raises(DataError):
        write_report(iris[0], torch.zeros(10, 3))


def test_a_page_that_cannot_be_written_leaves_the_old_one(iris, monkeypatch):
    path = write_report(iris[0], False)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyrolvm.files.os.replace", full)
    with pytest.raises(RunFolderError, match="No space left"):
        write_report(iris[0], False, seed=1)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234, "1,234"),
        (1234.5, "1,234.50"),
        (0.66667, "0.6667"),
        (-3.14159, "-3.142"),
        (1e-7, "1.00e-07"),
        (0.0, "0.000"),
        (float("nan"), "–"),
        (float("-inf"), "-∞"),
        (None, "–"),
        (True, "yes"),
        ("exact", "exact"),
    ],
)
def test_numbers_are_shown_with_the_digits_that_count(value, text):
    assert number(value) == text


def test_zero_has_no_sign():
    assert number(-1e-9, 3) == "0.000"
    assert number(0.0, 5) == "0"


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_it_in_light_and_dark(iris, tmp_path):
    from matplotlib.image import imread

    path = write_report(iris[0], **QUICK)
    brightness = []
    for scheme in (1, 0):
        command = [CHROMIUM, *QUIET.split()]
        command += [
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--user-data-dir={tmp_path / str(scheme)}",
        ]
        command += [f"--screenshot={tmp_path / 'page.png'}", path.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        brightness.append(imread(tmp_path / "page.png")[..., :3].mean())
    assert brightness[0] > 0.9
    assert brightness[1] < 0.35  # figures stay white
