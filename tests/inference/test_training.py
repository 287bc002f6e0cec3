"""Training that can be left alone: when it stops, what it keeps, what it tells."""

import json

import numpy as np
import pytest
import torch
from programs import LocalNormal
from safetensors.torch import load_file

import pyrolvm
from pyrolvm import SettingError
from pyrolvm.inference import JSONLines, TensorBoard
from pyrolvm.inference.training.plateau import Plateau

QUIET = {"progress": False, "engine": "eager"}


def stops_at(values, patience=5, first_step=0):
    plateau = Plateau(patience, first_step)
    for step, value in enumerate(values):
        if plateau.add(step, value, {"a": torch.tensor(float(step))}):
            return step, plateau
    return None, plateau


@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_a_rise_within_reach_of_the_noise_goes_on_and_a_flat_end_stops(noise):
    """The rule's power does not hang on the scale: 60 rising values never stop it, a flat tail soon does."""
    rng = np.random.default_rng(0)
    stops = []
    for _ in range(40):
        rising = np.linspace(0, 60 * noise, 60) + noise * rng.standard_normal(60)
        flat = rising[-1] + noise * rng.standard_normal(60)
        stopped, _ = stops_at(np.concatenate([rising, flat]))
        assert stopped is not None
        stops.append(stopped)
    assert min(stops) >= 60
    assert np.median(stops) < 75


def test_evaluations_during_the_warmup_do_not_count():
    stopped, plateau = stops_at([5.0] * 30 + [1.0] * 30, first_step=30)
    assert stopped == 30 + 2 * 5 - 1
    assert plateau.best == 1.0


def test_the_best_parameters_are_kept_even_if_the_end_is_worse():
    _, plateau = stops_at([0.0, 3.0, 1.0, 1.0])
    assert (plateau.best, plateau.best_step, plateau.best_parameters["a"].item()) == (3.0, 1, 1.0)


@pytest.mark.parametrize(("rise", "is_flat"), [(0.25, True), (0.3, False)])
def test_a_rise_is_compared_with_the_error_of_two_means(rise, is_flat):
    """Means 1/3 + rise apart; error sqrt((5 + 2 rise + rise^2) / 15), which is less from rise = 0.28 on."""
    values = [0.0, 1.0, 0.0, 1.0 + rise, rise, 1.0 + rise]
    assert (stops_at(values, patience=3)[0] is not None) == is_flat


def test_the_record_survives_later_steps_and_a_checkpoint():
    plateau, parameter = Plateau(3, 2), torch.tensor(1.0)
    for step, value in enumerate([9.0, 9.0, 5.0, 4.0]):
        plateau.add(step, value, {"a": parameter})
        parameter.add_(1)
    again = Plateau(3, 2)
    again.unflatten(plateau.flatten(), torch.device("cpu"))
    for record in (plateau, again):
        assert (record.best, record.best_step, record.values) == (5.0, 2, [5.0, 4.0])
        assert record.best_parameters["a"].item() == 3.0


def test_fit_stops_on_a_plateau_says_why_and_restores_the_best():
    program, x = LocalNormal(shift=1.0), torch.randn(200, generator=torch.Generator().manual_seed(3))
    fitted = pyrolvm.fit(
        program.model, x, guide=program.guide, validation=0.3, validate_every=10, patience=5, num_steps=20_000,
        learning_rate=0.05, batch_size=20, kl_warmup=0.01, **QUIET,
    )  # fmt: skip
    assert "the held-out ELBO is flat" in fitted.stopped_because
    assert "the best held out" in fitted.stopped_because
    assert 290 <= fitted.history["step"].iloc[-1] < 5000
    held_out = fitted.history["validation_elbo"].dropna()
    late = held_out[fitted.history["kl_weight"] == 1.0]
    best_step = int(fitted.history.loc[late.idxmax(), "step"])
    assert f"those of step {best_step}," in fitted.stopped_because
    assert fitted.held_out_elbo == late.max()  # that of the parameters kept, not of the last step
    assert fitted.held_out_elbo > held_out.iloc[-1]


def test_a_plateau_is_carried_over_by_a_checkpoint(tmp_path):
    program, x = LocalNormal(shift=1.0), torch.randn(60, generator=torch.Generator().manual_seed(3))
    options = {
        "guide": program.guide, "validation": 0.3, "validate_every": 4, "patience": 3, "learning_rate": 1e-9, **QUIET
    }  # fmt: skip
    pyrolvm.fit(program.model, x, num_steps=12, checkpoint=tmp_path, **options)
    saved = load_file(tmp_path / "state.safetensors")
    assert len(saved["plateau/record"]) == 2 + 3
    other = LocalNormal(shift=1.0)
    fitted = pyrolvm.fit(
        other.model, x, num_steps=400, checkpoint=tmp_path, resume=True, **(options | {"guide": other.guide})
    )
    assert fitted.history["step"].iloc[-1] == 24  # six evaluations, three of them before the checkpoint


@pytest.mark.parametrize(
    ("options", "message"), [({}, "give validation"), ({"validation": 0.5}, "at least 2")]
)
def test_patience_needs_held_out_data_and_a_window(options, message):
    program = LocalNormal()
    with pytest.raises(SettingError, match=message):
        pyrolvm.fit(
            program.model, torch.zeros(8), guide=program.guide, patience=1, num_steps=2, **options, **QUIET
        )


def test_json_lines_are_the_history(tmp_path):
    program = LocalNormal()
    path = tmp_path / "log" / "history.jsonl"
    fitted = pyrolvm.fit(
        program.model, torch.zeros(9), guide=program.guide, num_steps=30, validation=1 / 3, validate_every=7,
        callbacks=[JSONLines(path)], **QUIET,
    )  # fmt: skip
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 31))
    np.testing.assert_allclose([r["elbo"] for r in rows], fitted.history["elbo"])
    assert [r["step"] for r in rows if r["validation_elbo"] is not None] == [7, 14, 21, 28]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_of_a_run_that_is_gone_on_with_have_each_step_once(tmp_path):
    program, path = LocalNormal(), tmp_path / "history.jsonl"

    def fit(num_steps, **options):
        pyrolvm.fit(
            program.model, torch.zeros(9), guide=program.guide, num_steps=num_steps, checkpoint=tmp_path,
            callbacks=[JSONLines(path)], **options, **QUIET,
        )  # fmt: skip
        return lines(path)

    first = fit(10)
    path.write_text(path.read_text() + "{}\n")  # steps that the checkpoint does not know of
    both = fit(30, resume=True)
    assert [r["step"] for r in both] == list(range(1, 31))
    assert both[:10] == first


def test_tensorboard_shows_the_history(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    program = LocalNormal()
    for steps in (5, 20):
        fitted = pyrolvm.fit(
            program.model, torch.zeros(9), guide=program.guide, num_steps=steps, checkpoint=tmp_path / "run",
            resume=steps > 5, callbacks=[TensorBoard(tmp_path / "board")], **QUIET,
        )  # fmt: skip
    record = EventAccumulator(str(tmp_path / "board")).Reload()
    found = record.Scalars("elbo")
    assert [event.step for event in found] == list(range(1, 21))
    np.testing.assert_allclose([event.value for event in found], fitted.history["elbo"], rtol=1e-6)


def test_a_warmup_that_was_not_reached_is_warned_of():
    program = LocalNormal()
    options = {"guide": program.guide, "num_steps": 1000, **QUIET}

    def enough(report):
        return "that will do"

    with pytest.warns(UserWarning, match="the KL's weight at 0.01.*not yet the ELBO"):
        fitted = pyrolvm.fit(program.model, torch.zeros(9), kl_warmup=0.8, callbacks=[enough], **options)
    assert fitted.history["kl_weight"].iloc[-1] == pytest.approx(0.01)
    reached = pyrolvm.fit(program.model, torch.zeros(9), kl_warmup=0.8, **options)
    assert reached.history["kl_weight"].iloc[-1] == 1


def test_tensorboard_is_optional_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(SettingError, match="pip install tensorboard"):
        TensorBoard(tmp_path)


def test_what_happens_between_chunks_does_not_change_the_numbers():
    """Validation, callbacks and chunk sizes are outside the stream of noise."""
    program, x = LocalNormal(), torch.linspace(-1, 1, 32)
    options = {"guide": program.guide, "num_steps": 40, "batch_size": 8, "learning_rate": 0.05, **QUIET}
    plain = pyrolvm.fit(program.model, x, **options).history["elbo"]
    watched = pyrolvm.fit(program.model, x, validation=x[:5], validate_every=3, **options)
    np.testing.assert_array_equal(plain, watched.history["elbo"])
