"""The same networks in JAX: each torch layer read as the JAX operation that NumPyro users write.

Images are [batch, height, width, channels] between the layers, which XLA runs faster on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def apply(net: nn.Sequential, values: dict[str, Any], x: Any) -> Any:
    """`net` with the weights `values` ("0.weight", ...) on x [batch, ...]."""
    for index, layer in enumerate(net):
        x = _layer(layer, values.get(f"{index}.weight"), values.get(f"{index}.bias"), x)
    return x


def _layer(layer: nn.Module, weight: Any, bias: Any, x: Any) -> Any:
    import jax
    import jax.numpy as jnp

    if isinstance(layer, nn.Linear):
        return x @ weight.T + bias
    if isinstance(layer, nn.ReLU):
        return jax.nn.relu(x)
    if isinstance(layer, nn.Tanh):
        return jnp.tanh(x)
    if isinstance(layer, nn.Flatten):
        return (x if x.ndim == 2 else x.transpose(0, 3, 1, 2)).reshape(len(x), -1)
    if isinstance(layer, nn.Unflatten):
        return x.reshape(len(x), *layer.unflattened_size).transpose(0, 2, 3, 1)
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        return _convolution(layer, weight, x) + bias
    raise TypeError(f"{type(layer).__name__} has no JAX form here")


def _convolution(layer: nn.Conv2d | nn.ConvTranspose2d, weight: Any, x: Any) -> Any:
    import jax

    names = ("NHWC", "HWIO", "NHWC")
    pad, kernel, stride = int(layer.padding[0]), layer.kernel_size[0], layer.stride
    if isinstance(layer, nn.Conv2d):
        kernels = weight.transpose(2, 3, 1, 0)  # torch keeps [out, in, height, width]
        return jax.lax.conv_general_dilated(x, kernels, stride, [(pad, pad)] * 2, dimension_numbers=names)
    edge = kernel - 1 - pad
    flipped = weight[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)  # torch keeps [in, out, height, width]
    return jax.lax.conv_general_dilated(
        x, flipped, (1, 1), [(edge, edge)] * 2, lhs_dilation=stride, dimension_numbers=names
    )


def in_numpyro(start: dict[str, Any], plate: Any, networks: Callable[[], Any]) -> tuple[Any, Any, Any]:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as npdist
    from numpyro.infer import Trace_ELBO

    nets = networks()
    biases = [v for k, v in start.items() if k.startswith("encoder") and k.endswith("bias")]
    latent_dim = len(biases[-1]) // 2

    def network(key: str, x: Any) -> Any:
        own = {name for name in start if name.startswith(key)}
        values = {name.partition(".")[2]: numpyro.param(name, start[name]) for name in sorted(own)}
        return apply(nets[key], values, x)

    def model(x: Any) -> None:
        with plate(x):
            z = numpyro.sample("z", npdist.Normal(jnp.zeros(latent_dim), 1.0).to_event(1))
            numpyro.sample("x", npdist.Bernoulli(logits=network("decoder", z)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        loc, log_scale = jnp.split(network("encoder", x), 2, axis=-1)
        with plate(x):
            numpyro.sample("z", npdist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    return model, guide, Trace_ELBO()
