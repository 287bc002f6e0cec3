"""The package's messages name Python arguments; the shell says the same with its own flags."""

from __future__ import annotations

import re

RENAMED = {
    "num_steps": "--steps",
    "num_epochs": "--epochs",
    "num_particles": "--particles",
    "checkpoint_seconds": "--checkpoint-every",
    "num_restarts": "--restarts",
}
# fmt: off
FLAGS = (
    "alpha", "batch_size", "beta", "binarise", "clip_norm", "covariance", "device", "dtype", "engine", "eta",
    "guide", "key", "kl_warmup", "labels", "latent_dim", "learning_rate", "likelihood", "method",
    "num_components", "num_samples", "objective", "on_nan", "optimizer", "patience", "schedule", "seed",
    "threshold", "validate_every", "validation",
)
SETTINGS = (
    "activation", "assignments", "baseline", "decoder", "encoder", "hidden", "image_shape", "loadings_prior",
    "noise_scale", "prior",
)
# fmt: on
PHRASES = {
    "header=False": "--no-header",
    "header=True": "--header",
    "per_column=False": "--standardise-overall",
    "resume=True": "--resume",
}

_NAMES = "|".join((*RENAMED, *FLAGS, *SETTINGS))
_VALUE = r"=(?:\"([^\"]*)\"|'([^']*)'|([\w.+-]*\w)|)"
_ARGUMENT = re.compile(rf"(?<!--set )\b({_NAMES}){_VALUE}")
# a name alone is that of an argument only if it cannot be a word
_ALONE = re.compile(rf"(?<![\w'\"./=-])({'|'.join(n for n in (*RENAMED, *FLAGS) if '_' in n)})(?![\w'\".=])")
_CUT = re.compile(r"\(x > ([-+.\deg]+)\)\.float\(\)")


def speak(message: str) -> str:
    """`batch_size=64` -> `--batch-size 64`, and so on; everything else is left alone."""
    for python, shell in PHRASES.items():
        message = message.replace(python, shell)
    message = _ARGUMENT.sub(_with_value, _CUT.sub(r"--binarise --threshold \1", message))
    return _ALONE.sub(lambda match: _flag(match[1]), message)


def _with_value(match: re.Match[str]) -> str:
    name = match[1]
    value = match[2] or match[3] or match[4] or ""
    # --guide names a guide of one's own; a guide with a value is a model's own option
    if name in SETTINGS or (name == "guide" and value):
        return f"--set {name}={value}"
    if value == "None":
        return f"no {_flag(name)}"
    return f"{_flag(name)} {value}".rstrip()


def _flag(name: str) -> str:
    return RENAMED.get(name, "--" + name.replace("_", "-"))
