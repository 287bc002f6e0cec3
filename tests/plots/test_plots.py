"""Figures show what their tables hold: what is drawn, how it is labelled, and what is refused."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from pyrolvm import DataError, plots

RNG = np.random.default_rng(0)
STEPS = np.arange(1, 501)
HISTORY = pd.DataFrame({"step": STEPS, "elbo": -100 - 5000 * np.exp(-STEPS / 8) + RNG.normal(0, 1, 500)})
FEATURES = pd.MultiIndex.from_product([["a", "b", "c"], [0, 1]], names=["feature", "factor"])
LOADINGS = pd.DataFrame(
    {"mean": np.arange(6.0), "lower": np.arange(6.0) - 1, "upper": np.arange(6.0) + 2}, index=FEATURES
)
MIXTURE = ([0.75, 0.25], [[0.0, 0.0], [3.0, 1.0]], [np.eye(2), np.diag([4.0, 1.0])])
UNITS = pd.DataFrame({"kl": [0.1, 2.0, 0.0], "active": [True, True, False]}, index=["u", "v", "w"])
GAPS = pd.DataFrame({"gap": [1.5, 0.5], "standard_error": [0.2, 0.1]}, index=["evidence", "amortisation"])
IMAGES = RNG.random((7, 12))

TERMS = HISTORY.assign(
    reconstruction=-90 + RNG.normal(0, 1, 500),
    temperature=np.linspace(1, 0.1, 500),
    learning_rate=1e-3,
    seconds=STEPS / 100,
)

DRAWN = {
    "elbo": lambda ax=None: plots.plot_elbo(HISTORY, ax=ax),
    "latents": lambda ax=None: plots.plot_latents(RNG.random((9, 2)), np.arange(9) % 3, ax=ax),
    "loadings": lambda ax=None: plots.plot_loadings(LOADINGS, ax=ax),
    "mixture": lambda ax=None: plots.plot_mixture(RNG.random((9, 2)), *MIXTURE, ax=ax),
    "active units": lambda ax=None: plots.plot_active_units(UNITS, ax=ax),
    "scree": lambda ax=None: plots.plot_scree([1.0, 3.0], total=5.0, noise=0.2, ax=ax),
    "weights": lambda ax=None: plots.plot_weights([0.75, 0.25], ax=ax),
    "khat": lambda ax=None: plots.plot_khat(RNG.random(20), ax=ax),
    "ranks": lambda ax=None: plots.plot_ranks(RNG.integers(0, 10, 100), 9, ax=ax),
    "gaps": lambda ax=None: plots.plot_gaps(GAPS, ax=ax),
    "samples": lambda ax=None: plots.plot_samples(IMAGES, (3, 4), ax=ax),
    "reconstructions": lambda ax=None: plots.plot_reconstructions(IMAGES, IMAGES, (3, 4), ax=ax),
    "traversals": lambda ax=None: plots.plot_traversals(IMAGES[:6].reshape(2, 3, 12), (3, 4), ax=ax),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_returned_and_matplotlib_left_as_found(name, tmp_path):
    settings, open_figures = dict(matplotlib.rcParams), plt.get_fignums()
    figure = DRAWN[name]()
    figure.savefig(tmp_path / "figure.png")
    assert isinstance(figure, Figure)
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert dict(matplotlib.rcParams) == settings
    assert plt.get_fignums() == open_figures


@pytest.mark.parametrize("name", DRAWN)
def test_given_axes_are_drawn_into(name):
    figure = Figure()
    left, right = figure.subfigures(1, 2)
    ax = right.subplots()
    assert DRAWN[name](ax) is figure
    assert ax.has_data()
    assert not left.axes


def line(figure, label):
    return next(artist for artist in figure.axes[0].lines if artist.get_label() == label)


def test_the_bound_is_shown_at_the_height_of_its_end():
    figure = plots.plot_elbo(HISTORY)
    ax = figure.axes[0]
    low, high = ax.get_ylim()
    assert -110 < low < -100 < high < -90
    assert ax.get_ylabel() == "ELBO (nats per datum)"
    mean = line(figure, "running mean").get_ydata()
    assert mean[-1] == pytest.approx(HISTORY["elbo"].tail(5).mean(), abs=1)
    assert np.std(mean[250:]) < np.std(HISTORY["elbo"][250:]) / 2
    assert plots.plot_elbo(HISTORY, unit="nats in total").axes[0].get_ylabel() == "ELBO (nats in total)"


def test_held_out_bounds_and_warm_up_are_marked_where_there_are_any():
    history = HISTORY.assign(validation_elbo=np.nan, kl_weight=np.minimum(1, STEPS / 100))
    history.loc[99::100, "validation_elbo"] = -101.0
    figure = plots.plot_elbo(history)
    points = line(figure, "held out")
    assert list(points.get_xdata()) == [100, 200, 300, 400, 500]
    shade = next(p for p in figure.axes[0].patches if p.get_label() == "KL weight below 1")
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == (1, 99)
    plain = plots.plot_elbo(history.assign(kl_weight=1.0)[["step", "elbo", "kl_weight"]])
    assert not plain.axes[0].patches
    assert len(plain.axes[0].lines) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_steps_that_are_not_finite_do_not_break_the_bounds_figure(bad, tmp_path):
    history = HISTORY.assign(elbo=HISTORY["elbo"].where(STEPS % 7 > 0, bad))
    figure = plots.plot_elbo(history)
    figure.savefig(tmp_path / "figure.png")
    assert np.isfinite(figure.axes[0].get_ylim()).all()
    assert figure.axes[0].get_ylim() == pytest.approx(plots.plot_elbo(HISTORY).axes[0].get_ylim(), abs=0.5)
    mean = line(figure, "running mean").get_ydata()
    assert mean[-1] == pytest.approx(history["elbo"][STEPS % 7 > 0].tail(5).mean(), abs=1)
    for nothing in (HISTORY.assign(elbo=bad), HISTORY.assign(elbo=bad).head(1)):
        figure = plots.plot_elbo(nothing)
        figure.savefig(tmp_path / "nothing.png")
        assert not np.isfinite(line(figure, "running mean").get_ydata()).any()
    one = plots.plot_elbo(HISTORY.head(1)).axes[0]
    assert one.get_ylim()[0] < HISTORY["elbo"][0] < one.get_ylim()[1]


def labels_of(axis):
    return [float(t.get_text().replace("\N{MINUS SIGN}", "-")) for t in axis.get_ticklabels()]


@pytest.mark.parametrize("level", [-1.4171, -1e8, -1.4e16, 1e-9])
def test_ticks_are_labelled_with_the_numbers_themselves(level):
    """No offset and no power of ten stands above the axis, where the legend is."""
    history = HISTORY.assign(elbo=level * (1 + 1e-5 * RNG.random(500)), step=10_000_000 + STEPS)
    figure = plots.plot_elbo(history)
    figure.canvas.draw()
    (ax,) = figure.axes
    for axis in (ax.xaxis, ax.yaxis):
        assert axis.get_offset_text().get_text() == ""
        np.testing.assert_allclose(labels_of(axis), axis.get_ticklocs(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DRAWN)
def test_no_figure_has_an_offset_apart_from_its_ticks(name):
    figure = DRAWN[name]()
    figure.canvas.draw()
    assert [a.get_offset_text().get_text() for ax in figure.axes for a in (ax.xaxis, ax.yaxis)] == [
        "" for _ in range(2 * len(figure.axes))
    ]


def test_a_run_that_has_settled_looks_flat():
    """1e-5 nats of rounding do not fill the frame; a rise of half a nat does."""
    flat = plots.plot_elbo(HISTORY.assign(elbo=-1.4171 + 1e-5 * RNG.normal(size=500))).axes[0]
    low, high = flat.get_ylim()
    assert 0.019 < high - low < 0.025
    assert low < -1.4171 - 0.005 < -1.4171 + 0.005 < high
    low, high = plots.plot_elbo(HISTORY.assign(elbo=-1e6 + RNG.normal(size=500))).axes[0].get_ylim()
    assert high - low == pytest.approx(1000, rel=0.05)
    low, high = plots.plot_elbo(HISTORY.assign(elbo=-1.4 + 0.5 * STEPS / 500)).axes[0].get_ylim()
    assert high - low < 0.6


def test_the_bound_needs_no_terms_and_minds_none():
    plain, more = (plots.plot_elbo(h).axes[0] for h in (HISTORY, TERMS))
    assert more.get_ylim() == plain.get_ylim()
    assert len(more.lines) == len(plain.lines)


def test_every_term_and_control_that_changes_has_a_panel():
    figure = plots.plot_terms(TERMS)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["reconstruction", "temperature"]
    ramp = figure.axes[1]
    np.testing.assert_allclose(ramp.lines[0].get_ydata(), TERMS["temperature"])
    assert ramp.get_ylim()[0] <= 0.1 < 1 <= ramp.get_ylim()[1]
    only = plots.plot_terms(TERMS, ["learning_rate"])
    assert [ax.get_title(loc="left") for ax in only.axes] == ["learning rate"]
    gaps = TERMS.assign(kl=np.where(STEPS % 3, np.nan, STEPS))
    assert np.isfinite(plots.plot_terms(gaps, ["kl"]).axes[0].get_ylim()).all()


def test_long_runs_are_thinned():
    steps = np.arange(100_000)
    figure = plots.plot_elbo(pd.DataFrame({"step": steps, "elbo": np.sin(steps)}))
    assert len(line(figure, "each step").get_xdata()) == 2000


def test_codes_have_a_marker_and_a_name_for_each_class():
    z, labels = torch.randn(30, 3), np.array(["cat", "dog", "emu"] * 10)
    figure = plots.plot_latents(z, labels, dims=(2, 0))
    ax = figure.axes[0]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["cat", "dog", "emu"]
    np.testing.assert_allclose(ax.collections[1].get_offsets(), z[labels == "dog"][:, [2, 0]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("z[2]", "z[0]")
    paths = [len(c.get_paths()[0].vertices) for c in ax.collections]
    assert len(set(paths)) > 1, "the classes differ in shape, not in colour alone"


def test_many_numbers_are_a_scale_of_colours_and_one_dimension_goes_against_the_row():
    figure = plots.plot_latents(torch.randn(30, 2), torch.linspace(0, 1, 30))
    assert len(figure.axes) == 2
    assert plots.plot_latents(torch.randn(30, 1)).axes[0].get_xlabel() == "row"
    z = torch.randn(30, 2, requires_grad=True)
    assert len(plots.plot_latents(z * float("nan")).axes[0].collections) == 1


def test_loadings_stand_with_their_intervals():
    figure = plots.plot_loadings(LOADINGS)
    ax = figure.axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "c"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["factor 0", "factor 1"]
    first = ax.containers[0]
    assert list(first.lines[0].get_xdata()) == [0.0, 2.0, 4.0]
    segments = first.lines[2][0].get_segments()
    assert [(s[0][0], s[1][0]) for s in segments] == [(-1.0, 2.0), (1.0, 4.0), (3.0, 6.0)]


def test_loadings_without_a_posterior_are_points():
    ax = plots.plot_loadings(LOADINGS[["mean"]]).axes[0]
    points = [list(container.lines[0].get_xdata()) for container in ax.containers]
    assert points == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    assert all(not container.lines[2] for container in ax.containers), "no whiskers"


def test_directions_stand_in_the_order_of_their_variance_with_their_shares():
    ax = plots.plot_scree(torch.tensor([1.0, 3.0, 0.5], requires_grad=True), total=5.0, noise=0.1).axes[0]
    assert [b.get_height() for b in ax.patches] == [3.0, 1.0, 0.5]
    assert [t.get_text() for t in ax.texts] == ["60%", "80%", "90%"]
    assert ax.get_legend().get_texts()[0].get_text() == "noise variance"
    assert list(ax.lines[0].get_ydata()) == [0.1, 0.1]
    bare = plots.plot_scree([1.0, 3.0]).axes[0]
    assert not bare.texts
    assert bare.get_legend() is None


def test_weights_have_the_colours_of_the_mixture():
    bars = plots.plot_weights([0.75, 0.25], names=["short", "long"]).axes[0]
    assert [b.get_height() for b in bars.patches] == [0.75, 0.25]
    assert [t.get_text() for t in bars.texts] == ["0.75", "0.25"]
    assert [t.get_text() for t in bars.get_xticklabels()] == ["short", "long"]
    ellipses = plots.plot_mixture(RNG.random((5, 2)), *MIXTURE).axes[0].patches
    assert [b.get_facecolor() for b in bars.patches] == [e.get_edgecolor() for e in ellipses[::2]]


def test_ellipses_hold_their_share_of_a_component():
    covariance = np.array([[2.0, 1.2], [1.2, 1.0]])
    figure = plots.plot_mixture(RNG.random((5, 2)), [1.0], [[1.0, -1.0]], [covariance])
    x = RNG.multivariate_normal([1.0, -1.0], covariance, 20_000)
    shares = []
    for e in (p for p in figure.axes[0].patches if isinstance(p, Ellipse)):
        angle = np.radians(e.angle)
        turned = (x - e.center) @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        shares.append(((2 * turned / [e.width, e.height]) ** 2).sum(1) < 1)
    assert np.mean(shares, 1) == pytest.approx([0.5, 0.9], abs=0.015)
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "1.00"


@pytest.mark.parametrize(
    "covariances",
    [np.array(v) for v in ([4.0, 1.0], [[4.0], [1.0]], [[4.0, 4.0], [1.0, 1.0]])],
)
def test_variances_are_covariances_too(covariances):
    figure = plots.plot_mixture(RNG.random((5, 2)), *MIXTURE[:2], covariances)
    widths = [p.width for p in figure.axes[0].patches]
    assert widths[0] == pytest.approx(2 * widths[2])
    broken = covariances.copy()
    broken[0] = np.nan
    assert len(plots.plot_mixture(RNG.random((5, 2)), *MIXTURE[:2], broken).axes[0].patches) == 2


def test_units_are_sorted_and_counted():
    ax = plots.plot_active_units(UNITS).axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["v", "u", "w"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["active (2)", "inactive (1)"]
    assert [b.get_height() for b in ax.patches] == [2.0, 0.1, 0.0]
    assert "nats per datum" in ax.get_ylabel()
    index = pd.MultiIndex.from_tuples([("z", 0), ("z", 1), ("w", (0, 1))])
    labels = plots.plot_active_units(UNITS.set_axis(index)[["kl"]]).axes[0].get_xticklabels()
    assert labels[0].get_text() == "z[1]"


def test_k_hats_above_the_threshold_and_without_a_value_are_counted():
    k = np.array([0.1, 0.5, 0.9, np.nan, np.inf])
    figure = plots.plot_khat(torch.from_numpy(k), 0.7)
    ax = figure.axes[0]
    assert ax.get_title(loc="left") == "1 of 5 above 0.70, 2 not finite"
    sizes = [len(c.get_offsets()) for c in ax.collections]
    assert sizes == [2, 1, 2]
    assert plots.plot_khat(k[:2]).axes[0].get_title(loc="left") == "0 of 2 above 0.70"


def test_ranks_are_binned_whole_with_the_binomial_band():
    ranks = np.random.default_rng(1).integers(0, 100, 2000)
    ax = plots.plot_ranks(ranks, 99, bins=20).axes[0]
    counts = next(p for p in ax.patches if p.get_label() == "ranks").get_data()
    assert counts.values.sum() == 2000
    assert np.diff(counts.edges) == pytest.approx(5)
    band = next(p for p in ax.patches if "band" in p.get_label()).get_data()
    assert band.baseline[0] == pytest.approx(100 - 1.96 * np.sqrt(95), abs=1.5)
    assert band.values[0] == pytest.approx(100 + 1.96 * np.sqrt(95), abs=1.5)
    outside = (counts.values < band.baseline) | (counts.values > band.values)
    assert outside.mean() <= 0.15


def test_bins_that_hold_unequal_numbers_of_ranks_have_bands_of_their_own():
    ax = plots.plot_ranks(RNG.integers(0, 10, 5000), 9, bins=4).axes[0]
    dashes = next(p for p in ax.patches if p.get_linestyle() == "--").get_data()
    assert dashes.values.sum() == pytest.approx(5000)
    assert len(np.unique(dashes.values)) == 2


def test_every_quantity_has_a_panel():
    table = pd.DataFrame(RNG.integers(0, 10, (50, 5)), columns=list("abcde"))
    figure = plots.plot_ranks(table, 9)
    assert [a.get_title(loc="left") for a in figure.axes] == list("abcde")


def test_gaps_have_their_errors_and_values():
    ax = plots.plot_gaps(GAPS).axes[0]
    assert [b.get_width() for b in ax.patches] == [1.5, 0.5]
    assert [t.get_text() for t in ax.texts] == ["1.5", "0.5"]
    assert "nats per datum" in ax.get_xlabel()
    assert ax.get_xlim()[0] == 0
    bare = plots.plot_gaps(pd.Series({"a": -1.0, "b": np.nan})).axes[0]
    assert [t.get_text() for t in bare.texts] == ["-1", "not finite"]
    assert bare.get_xlim()[0] < -1


def test_gaps_of_data_are_averaged():
    table = pd.DataFrame(
        {"elbo": [0.0] * 4, "inference_gap": [1.0, 2.0, 3.0, np.nan], "amortisation_gap": 0.5}
    )
    ax = plots.plot_gaps(table).axes[0]
    assert [b.get_width() for b in ax.patches] == [2.0, 0.5]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["inference gap", "amortisation gap"]
    whisker = ax.collections[0].get_segments()[0]
    assert whisker[1][0] - 2.0 == pytest.approx(2 / np.sqrt(3))


def picture(figure):
    return np.asarray(figure.axes[0].images[0].get_array())


def test_pictures_stand_in_their_places_on_one_scale():
    shown = picture(plots.plot_samples(IMAGES, (3, 4), columns=4))
    assert shown.shape == (2 * 4 - 1, 4 * 5 - 1, 4)
    scaled = (IMAGES - IMAGES.min()) / (IMAGES.max() - IMAGES.min())
    np.testing.assert_allclose(shown[4:7, 5:9, 0], scaled[5].reshape(3, 4))
    assert (shown[4:, 15:, 3] == 0).all(), "the empty place is transparent"
    assert (shown[3, :, 3] == 0).all(), "and so are the gaps"


def test_colours_come_channels_first_and_missing_pixels_are_left_out():
    x = np.arange(12.0).reshape(1, 3, 2, 2)
    x[0, 1, 0, 1] = np.nan
    shown = picture(plots.plot_samples(x, (3, 2, 2)))
    assert shown[..., 3].tolist() == [[1, 0], [1, 1]]
    np.testing.assert_allclose(shown[1, 1, :3], np.array([3, 7, 11]) / 11)


def test_reconstructions_stand_below_the_data_on_the_datas_scale():
    figure = plots.plot_reconstructions(IMAGES, IMAGES * 3, (3, 4), count=5)
    shown = picture(figure)
    assert shown.shape[:2] == (7, 24)
    np.testing.assert_allclose(
        shown[:3, :4, 0].min(), (IMAGES[0].min() - IMAGES[:5].min()) / np.ptp(IMAGES[:5])
    )
    assert shown[..., :3].max() == 1.0
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["data", "model"]


def test_traversals_keep_their_rows():
    shown = picture(plots.plot_traversals(torch.arange(24.0).reshape(2, 3, 4), (2, 2)))
    assert shown.shape[:2] == (5, 8)
    assert shown[3, 0, 0] == pytest.approx(12 / 23)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.plot_elbo(HISTORY[["step"]]), "lacks the column 'elbo' .it has step"),
        (lambda: plots.plot_elbo(HISTORY.head(0)), "has no rows"),
        (lambda: plots.plot_latents(np.zeros(5)), r"z has shape \[5\]"),
        (lambda: plots.plot_latents(np.zeros((5, 2)), np.zeros(4)), "pass one label for each"),
        (lambda: plots.plot_latents(np.zeros((5, 2)), dims=(0, 2)), "2 dimensions"),
        (lambda: plots.plot_latents(np.zeros((20, 2)), list("abcdefghijklmnopqrst")), "20 different labels"),
        (lambda: plots.plot_latents(np.zeros((0, 2))), "z is empty"),
        (lambda: plots.plot_latents(np.array([["a", "b"]])), "not numbers"),
        (lambda: plots.plot_elbo({"step": [1], "elbo": [1.0]}), r"lacks the column 'step' .it has none"),
        (lambda: plots.plot_terms(TERMS, ["kl"]), "lacks the column 'kl'"),
        (lambda: plots.plot_terms(HISTORY), "no terms or controls that change"),
        (lambda: plots.plot_scree(np.zeros((2, 2))), "needs 1 dimension"),
        (lambda: plots.plot_weights([0.5, 0.5], names=["a"]), "1 names of 2 components"),
        (lambda: plots.plot_loadings(LOADINGS.drop(columns="lower")), "lacks the column 'lower'"),
        (lambda: plots.plot_loadings(LOADINGS.reset_index(drop=True)), "1 index level"),
        (lambda: plots.plot_mixture(np.zeros((5, 3)), *MIXTURE), "choose two columns"),
        (lambda: plots.plot_mixture(np.zeros((5, 2)), *MIXTURE[:2], np.zeros((2, 3))), r"pass \[2, 2, 2\]"),
        (lambda: plots.plot_active_units(UNITS[["active"]]), "lacks the column 'kl'"),
        (lambda: plots.plot_khat(np.zeros((2, 2))), "needs 1 dimension"),
        (lambda: plots.plot_ranks(np.array([0, 12]), 9), "with 9 draws, 0 to 9"),
        (lambda: plots.plot_ranks(np.zeros((4, 30)), 9), "30 quantities: choose 24"),
        (lambda: plots.plot_ranks(np.zeros((4, 2)), 9, ax=Figure().subplots()), "choose 1"),
        (lambda: plots.plot_gaps(GAPS[["standard_error"]]), "lacks the column 'gap'"),
        (lambda: plots.plot_samples(IMAGES, (5, 5)), "rows of 25 pixels"),
        (lambda: plots.plot_samples(IMAGES, (2, 6, 1)), "must be"),
        (lambda: plots.plot_reconstructions(IMAGES, IMAGES[:3], (3, 4)), "7 rows and x_hat 3"),
        (lambda: plots.plot_traversals(IMAGES, (3, 4)), r"pass \[rows, columns, pixels\]"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()
