"""A program of the corpus under `SVI` and under `fit`, and every question that one may ask of the fit."""

from __future__ import annotations

import math
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import SVI

import pyrolvm
from corpus.form import QUESTIONS, Case, Pair
from pyrolvm.data.arguments import as_call
from pyrolvm.errors import PyrolvmError
from pyrolvm.inference.program.noise import noise_state
from pyrolvm.seeds import Purpose, derived_seed

STEPS, RATE, SEED = 4, 0.01, 0
REPEATS = 40
"""Estimates of the bound at the start, where the numbers drawn differ."""
ROUNDING = 2e-4
DRAWS = 25
CPU = torch.device("cpu")


def data_of(pair: Pair) -> Any:
    """The arguments of a step as the questions take them."""
    return as_call(pair.args, (), pair.kwargs)


def fitted(pair: Pair, num_steps: int = STEPS, rate: float = RATE, **options: Any) -> Any:
    """The pair under `fit`, its arguments as those of `SVI.step`."""
    options = {"engine": "eager", "initialise": False, "progress": False, "seed": SEED} | options
    collected = len(pair.args) == 1 and isinstance(
        pair.args[0], dict | tuple
    )  # alone, these stand for arguments
    return pyrolvm.fit(
        pair.model,
        *((pair.args,) if collected else pair.args),
        model_kwargs=pair.kwargs or None,
        guide=pair.guide,
        objective=pair.objective(),
        num_steps=num_steps,
        learning_rate=rate,
        **options,
    )


# ------------------------------------------------------------------ beside SVI


@dataclass(frozen=True)
class UnderSVI:
    """Bounds [steps] in nats for all data, and the seconds of one step, of this thread."""

    bounds: np.ndarray
    seconds: float


def under_svi(pair: Pair, num_steps: int = STEPS, rate: float = RATE) -> UnderSVI:
    """The pair under `pyro.infer.SVI`: as users run it, from the start and with the noise that `fit` has."""
    guide: Any = (
        getattr(pyro.infer.autoguide, pair.guide)(pair.model) if isinstance(pair.guide, str) else pair.guide
    )
    objective = pair.objective()
    before = torch.get_rng_state()
    with pyro.get_param_store().scope(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(derived_seed(SEED, Purpose.START))
        trace = pyro.poutine.trace(guide).get_trace(*pair.args, **pair.kwargs)
        pyro.poutine.replay(pair.model, trace=trace)(*pair.args, **pair.kwargs)
        if getattr(objective, "max_plate_nesting", 0) == float("inf"):
            objective._guess_max_plate_nesting(pair.model, guide, pair.args, pair.kwargs)
        torch.set_rng_state(noise_state(SEED, CPU)["cpu"])
        svi = SVI(pair.model, guide, pyro.optim.Adam({"lr": rate}), objective)
        bounds = [-_first(svi.step(*pair.args, **pair.kwargs))]
        begun = time.thread_time()
        bounds += [-_first(svi.step(*pair.args, **pair.kwargs)) for _ in range(num_steps - 1)]
        seconds = (time.thread_time() - begun) / max(1, num_steps - 1)
    torch.set_rng_state(before)
    return UnderSVI(np.array([float(b) for b in bounds]), seconds)


def _first(loss: Any) -> Any:
    """The loss of the model, where another is of the guide (`ReweightedWakeSleep`)."""
    return loss[0] if isinstance(loss, tuple) else loss


def disagreement(case: Case) -> str:
    """Empty if `fit` and `SVI` have the same bounds, or `fit` refuses as expected; else what differs."""
    if case.refused:
        return refusal(case)
    if case.apart:
        ours, theirs = totals(fitted(case.build())), under_svi(case.build()).bounds
        same = np.allclose(ours, theirs, rtol=ROUNDING, atol=ROUNDING)
        return "the bounds agree, though they were expected to differ" if same else ""
    if case.noise:
        ours, theirs = totals(fitted(case.build())), under_svi(case.build()).bounds
        same = np.allclose(ours, theirs, rtol=ROUNDING, atol=ROUNDING)
        return "" if same else f"bounds {ours} under fit, {theirs} under SVI"
    still = {"num_steps": REPEATS, "rate": 1e-12}
    ours, theirs = totals(fitted(case.build(), **still)), under_svi(case.build(), **still).bounds
    error = math.hypot(ours.std(ddof=1), theirs.std(ddof=1)) / math.sqrt(REPEATS)
    apart = abs(ours.mean() - theirs.mean())
    return (
        ""
        if apart <= 4 * error + ROUNDING * abs(theirs.mean())
        else f"means {apart:g} apart, error {error:g}"
    )


def refusal(case: Case) -> str:
    """Empty if `fit` refuses the program in the words expected."""
    try:
        fitted(case.build())
    except PyrolvmError as error:
        return "" if case.refused in str(error) else f"refused otherwise: {error}"
    return f"it runs, though it should be refused for '{case.refused}'"


def totals(fit: Any) -> np.ndarray:
    """The bounds of a fit in nats for all data."""
    return fit.history["elbo"].to_numpy() * fit.num_data


# ------------------------------------------------------------------ compiled


def processor_seconds() -> float:
    """Of this process and of those that it waited for."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(r.ru_utime + r.ru_stime for r in (own, children))


def parted(case: Case) -> tuple[str, float]:
    """(what is wrong with the compiled engine, seconds of compiling): equal bounds, or the reason expected.

    Seconds of processors, the C++ compiler's among them; a fit of a few steps, whose own time is nothing beside.
    """
    eager = fitted(case.build())
    begun = processor_seconds()
    try:
        compiled = fitted(case.build(), engine="compiled")
    except PyrolvmError as error:
        words = case.compiled if isinstance(case.compiled, str) else None
        expected = words is not None and words in str(error)
        return ("" if expected else f"does not compile: {error}"), 0.0
    seconds = processor_seconds() - begun
    if case.compiled is not True:
        return f"compiles, though it should be refused for '{case.compiled}'", seconds
    same = np.allclose(totals(compiled), totals(eager), rtol=ROUNDING, atol=ROUNDING)
    return ("" if same else f"compiled {totals(compiled)}, eager {totals(eager)}"), seconds


# ------------------------------------------------------------------ questions


@dataclass(frozen=True)
class Answer:
    """What came of a question: the answer, or the sentence that declines it, or what broke."""

    value: Any = None
    declined: str = ""
    broken: str = ""


def ask(case: Case, question: str, fit: Any, pair: Pair) -> Answer:
    """One question. A refusal must be one of the package's own, in one paragraph; all else is a fault."""
    try:
        answers = WITH_GAPS if question in case.gaps else ANSWERS
        return Answer(answers[question](fit, pair))
    except PyrolvmError as error:
        return Answer(declined=str(error))
    except Exception as error:
        return Answer(broken=f"{type(error).__name__}: {error}")


def wrong(case: Case, question: str, answer: Answer) -> str:
    """Empty if the answer is the one expected, else what is wrong with it."""
    words = case.declines.get(question)
    if answer.broken:
        return f"{question} raises {answer.broken}"
    if answer.declined:
        if words is None:
            return f"{question} is declined: {answer.declined}"
        return "" if words in answer.declined else f"{question} is declined otherwise: {answer.declined}"
    if words is not None:
        return f"{question} is answered, though '{words}' was expected"
    if question == "diagnose":
        return _unsaid(case, answer.value)
    return ""


def _unsaid(case: Case, diagnosis: Any) -> str:
    """Measures that are missing for another reason than the one expected."""
    for measure, reason in diagnosis.not_done.items():
        known = [case.missing[measure]] if measure in case.missing else WITHOUT_LATENTS.get(measure, [])
        if not any(words in reason for words in known):
            return f"diagnose has no {measure}: {reason}"
    surplus = set(case.missing) - set(diagnosis.not_done)
    return f"diagnose computes {surplus}, which was not expected" if surplus else ""


NO_LOCAL = "is about latents of each datum and this program has none"
WITHOUT_LATENTS = {"k-hat per datum": [NO_LOCAL], "collapse": [NO_LOCAL]}
"""What `diagnose` cannot compute without latents of each datum, in its own words."""


def _all_finite(values: Any, rows: int | None = None) -> Any:
    found = values.values() if isinstance(values, dict) else [values]
    for value in found:
        assert torch.isfinite(torch.as_tensor(value).double()).all(), "not finite"
        if rows is not None:
            assert len(value) == rows, f"{len(value)} of {rows}"
    return values


def _export(fit: Any, pair: Pair) -> Any:
    found = pyrolvm.to_inference_data(fit, data_of(pair), num_samples=6, progress=False)
    latents = {"posterior", "prior"} if fit.structure.latents else set()
    assert latents <= set(found.groups()), found.groups()
    for name, draws in found["posterior"].data_vars.items() if latents else ():
        assert np.isfinite(np.asarray(draws, dtype=float)).all(), name
    return found


def _saved(fit: Any, pair: Pair) -> Any:
    """A copy that was built anew gets the parameters back, and draws what the fit draws."""
    anew = pair.rebuilt if hasattr(pair, "rebuilt") else pair
    with tempfile.TemporaryDirectory() as folder:
        loaded = pyrolvm.load(
            fit.save(f"{folder}/run"), model=anew.model, guide=anew.guide, example=data_of(anew)
        )
    for name, tensor in fit.program.tensors().items():
        assert torch.equal(loaded.program.tensors()[name], tensor), name
    before, after = (f.posterior(data_of(pair), 3) for f in (fit, loaded))
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    return loaded


ANSWERS: dict[str, Callable[[Any, Pair], Any]] = {
    "posterior": lambda fit, pair: _all_finite(fit.posterior(data_of(pair), 5), 5),
    "predict": lambda fit, pair: _all_finite(fit.predict(data_of(pair), 5), 5),
    "encode": lambda fit, pair: _all_finite(fit.encode(data_of(pair))),
    "reconstruct": lambda fit, pair: _all_finite(fit.reconstruct(data_of(pair))),
    "sample": lambda fit, pair: _all_finite(fit.sample(3), 3),
    "log_evidence": lambda fit, pair: _all_finite(
        fit.log_evidence(data_of(pair), num_samples=50, progress=False)
    ),
    "diagnose": lambda fit, pair: pyrolvm.diagnose(fit, data_of(pair), DRAWS, progress=False),
    "export": _export,
    "save and load": _saved,
}
assert tuple(ANSWERS) == QUESTIONS
WITH_GAPS: dict[str, Callable[[Any, Pair], Any]] = {"encode": lambda fit, pair: fit.encode(data_of(pair))}


def faults(case: Case, questions: tuple[str, ...] = QUESTIONS) -> list[str]:
    """Every question that is not answered as expected."""
    if case.refused:
        return []
    pair = case.build()
    fit = fitted(pair)
    found = []
    for question in questions:
        asked = Rebuilt(pair, case.build) if question == "save and load" else pair
        found.append(wrong(case, question, ask(case, question, fit, asked)))
    assert "FittedModel" in repr(fit)
    return [f for f in found if f]


class Rebuilt:
    """A pair that knows how to be built anew."""

    def __init__(self, pair: Pair, build: Callable[[], Pair]) -> None:
        self.pair, self.build = pair, build

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pair, name)

    @property
    def rebuilt(self) -> Pair:
        """The same program as another process would build it."""
        return self.build()
