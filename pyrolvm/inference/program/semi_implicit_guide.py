"""A semi-implicit guide of any program with continuous latents (Yin and Zhou 2018): see `pyrolvm.semi_implicit`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoGuide, init_to_feasible
from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor, nn
from torch.distributions import biject_to

from pyrolvm.errors import ProgramError, count
from pyrolvm.plates import DATA_PLATE, data_plate
from pyrolvm.semi_implicit import BUDGET, GaussianConditional, SemiImplicit


class SemiImplicitGuide(AutoGuide):
    """A semi-implicit guide of any program with continuous latents.

    Latents outside the data plate are one vector u, and so are those of each datum, whose mixing distribution is
    amortised: its network sees the row beside the noise. The latents are T(u), with T torch's map from the real numbers
    to the support of each. Shared latents and those of a datum are independent of each other in the guide.

    Parameters
    ----------
    model : callable
        The program's model.
    num_mixing : int
        K, extra draws of psi beside that of z. More cost time and tighten the bound. May be set on a trained guide.
    noise_dim : int
        Dimensions of the noise.
    hidden : sequence of int
        Widths of the mixing network's hidden layers, if `mixing` is not given.
    scale, learn_scale : float, bool
        Of the Gaussian conditional, if `conditional` is not given.
    mixing : callable, optional
        (inputs, outputs) -> module of noise [..., inputs] to psi [..., outputs]; for latents of each datum the inputs
        are the row's features and then the noise.
    conditional : callable, optional
        size -> module of psi [..., psi_dim] to a reparameterised distribution of u with event [size]; psi_dim is its
        attribute of that name, or size if it has none.
    encode : callable, optional
        The program's arguments -> features [rows, num_features]; by default the rows of the first argument, flat.
    plate : str
        The data plate. Latents of other plates belong to the shared vector.

    Raises
    ------
    SettingError
        A setting is not valid.
    ProgramError
        The program has no latents or a latent that is not continuous.
    """

    def __init__(
        self,
        model: Callable,
        *,
        num_mixing: int = 50,
        noise_dim: int = 10,
        hidden: Sequence[int] = (40, 60, 40),
        scale: float = 0.1,
        learn_scale: bool = False,
        mixing: Callable[[int, int], nn.Module] | None = None,
        conditional: Callable[[int], Any] | None = None,
        encode: Callable[..., Tensor] | None = None,
        plate: str = DATA_PLATE,
    ) -> None:
        super().__init__(InitMessenger(_start)(model))
        self.num_mixing, self.noise_dim = count("num_mixing", num_mixing, 0), count("noise_dim", noise_dim)
        widths = [count("hidden", width) for width in hidden]
        self._mixing = mixing or (lambda inputs, outputs: _layers([inputs, *widths, outputs]))
        self._conditional = conditional or (lambda size: GaussianConditional(size, scale, learn_scale))
        self._conditional(1)  # refuses settings now
        self._encode, self.plate = encode or _rows, plate
        self.nets, self.conditionals = nn.ModuleDict(), nn.ModuleDict()

    def _prototype_hide_fn(self, msg: Any) -> bool:
        """Whether a site of the model is not drawn here: data, plates, and what is summed out or left to the prior."""
        return prototype_hide_fn(msg) or _drawn_elsewhere(msg)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        self._groups: dict[str, list[_Latent]] = {}
        prototype: Any = self.prototype_trace
        for name, site in prototype.iter_stochastic_nodes():
            latent = _Latent.of(name, site, self.plate)
            self._groups.setdefault("local" if latent.local else "shared", []).append(latent)
        if not self._groups:
            raise ProgramError("the model has no latents for a semi-implicit guide to draw")
        for group, latents in self._groups.items():
            size = sum(latent.size for latent in latents)
            conditional = self._conditional(size)
            local = self._features(args, kwargs).shape[-1] if group == "local" else 0
            net = self._mixing(local + self.noise_dim, getattr(conditional, "psi_dim", size))
            device, dtype = latents[0].device, torch.get_default_dtype()
            self.nets[group] = net.to(device=device, dtype=dtype)
            self.conditionals[group] = conditional.to(device=device, dtype=dtype)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the latents; arguments as of the model."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        # all noise comes before all draws: with the draws given, the same generator makes the same mixture
        mixtures = {group: self._mixture(group, args, kwargs) for group in self._groups}
        plates = self._plates(args, kwargs)
        found: dict[str, Tensor] = {}
        for group, mixture in mixtures.items():
            with ExitStack() as stack:
                if group == "local":
                    stack.enter_context(plates[self.plate])
                u = pyro.sample(f"_{self._pyro_name}_{group}", mixture, infer={"is_auxiliary": True})
            found |= self._unpacked(group, u, plates)
        return found

    def _mixture(self, group: str, args: tuple, kwargs: dict) -> SemiImplicit:
        """The K + 1 components that this run draws from: of all data, or of each row."""
        M, net = self.num_mixing + 1, self.nets[group]
        if group == "shared":
            return SemiImplicit(self.conditionals[group], net(self._noise(M)))
        features = self._features(args, kwargs)  # [rows, num_features]
        rows = len(features)
        inputs = torch.cat([features.unsqueeze(1).expand(-1, M, -1), self._noise(rows, M)], -1)
        # rows stand at the data plate's dimension
        inner = (1,) * (-1 - self._prototype_frames[self.plate].dim)
        psi = _in_parts(net, inputs)
        return SemiImplicit(self.conditionals[group], psi.reshape(rows, *inner, *psi.shape[1:]))

    def _noise(self, *shape: int) -> Tensor:
        """N(0, I) [..., noise_dim]; a compiled step does not know the default dtype of its trace."""
        device = next(iter(self._groups.values()))[0].device
        return torch.randn(*shape, self.noise_dim, device=device, dtype=torch.get_default_dtype())

    def _features(self, args: tuple, kwargs: dict) -> Tensor:
        features = self._encode(*args, **kwargs)
        return features.to(torch.get_default_dtype())

    def _plates(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """A plate for each of the latents', the data plate over the rows that there are now."""
        plates = {}
        for name, frame in self._prototype_frames.items():
            if name == self.plate:
                plates[name] = data_plate(self._features(args, kwargs), name, dim=frame.dim)
            else:
                plates[name] = pyro.plate(name, frame.size, dim=frame.dim)
        return plates

    def _unpacked(self, group: str, u: Tensor, plates: dict[str, Any]) -> dict[str, Tensor]:
        """Draw each latent of a group from its part of u."""
        found, first = {}, 0
        for latent in self._groups[group]:
            shape = torch.broadcast_shapes(latent.shape, u.shape[:-1] + (1,) * latent.real_dim)
            own = u[..., first : first + latent.size].reshape(shape)
            first += latent.size
            with ExitStack() as stack:
                for name in latent.plates:
                    stack.enter_context(plates[name])
                found[latent.name] = pyro.sample(latent.name, latent.delta(own))
        return found


class _Latent(NamedTuple):
    """A latent of the model: its place in u, and how it follows from it.

    Attributes
    ----------
    shape : torch.Size
        Of the unconstrained value, 1 at the data plate's dimension.
    real_dim, event_dim : int
        Rightmost dimensions of the unconstrained and of the constrained value that are of no plate.
    """

    name: str
    transform: Any
    shape: torch.Size
    real_dim: int
    event_dim: int
    plates: tuple[str, ...]
    local: bool
    device: torch.device

    @property
    def size(self) -> int:
        return self.shape.numel()

    @classmethod
    def of(cls, name: str, site: Any, plate: str) -> _Latent:
        """The latent of a site of the model. Raises `ProgramError` if it is not continuous, or its plate subsampled."""
        fn, frames = site["fn"], [f for f in site["cond_indep_stack"] if f.vectorized]
        try:
            transform = biject_to(fn.support)
        except NotImplementedError:
            raise ProgramError(
                f"a semi-implicit guide draws continuous latents, and no map from real numbers to the support of "
                f"'{name}' ({fn.support}) is known: give the guide another site for it, or sum it out"
            ) from None
        for frame in frames:
            if frame.name != plate and frame.full_size not in (None, frame.size):
                raise ProgramError(
                    f"'{name}' stands in the subsampled plate '{frame.name}', which is not the data plate '{plate}': "
                    f"pass SemiImplicitGuide(model, plate='{frame.name}') if its latents belong to data"
                )
        unconstrained = transform.inv(site["value"])
        real_dim = fn.event_dim + unconstrained.dim() - site["value"].dim()
        shape = list(unconstrained.shape)
        inside = [f for f in frames if f.name == plate]
        for frame in inside:
            shape[frame.dim - real_dim] = 1
        plates = tuple(f.name for f in frames)
        return cls(
            name,
            transform,
            torch.Size(shape),
            real_dim,
            fn.event_dim,
            plates,
            bool(inside),
            unconstrained.device,
        )

    def delta(self, u: Tensor) -> dist.Delta:
        """The latent at T(u), with the density that log |dT| takes from that of u."""
        value = self.transform(u)
        log_density = -self.transform.log_abs_det_jacobian(u, value)
        log_density = sum_rightmost(log_density, log_density.dim() - value.dim() + self.event_dim)
        return dist.Delta(value, log_density=log_density, event_dim=self.event_dim)


def _drawn_elsewhere(msg: Any) -> bool:
    return any(msg["infer"].get(key) for key in ("enumerate", "left_to_prior"))


def _start(site: Any) -> Tensor:
    """A value in the site's support, for the prototype. Raises `ProgramError` if the site is not continuous."""
    if _drawn_elsewhere(site):
        return site["fn"].sample()
    if site["fn"].support.is_discrete:
        raise ProgramError(
            f"a semi-implicit guide draws continuous latents, and '{site['name']}' is discrete: sum it out, "
            "infer={'enumerate': 'parallel'}, and fit by TraceEnum_ELBO()"
        )
    return init_to_feasible(site)


def _layers(widths: list[int]) -> nn.Sequential:
    """Linear layers with a ReLU between two."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _rows(*args: Any, **kwargs: Any) -> Tensor:
    """The rows of the first argument that is a tensor, flat."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return value.reshape(len(value), -1)
    raise ProgramError(
        "a semi-implicit guide of latents of each datum sees the rows of the first argument, and there is no tensor: "
        "pass SemiImplicitGuide(model, encode=...), a function of the arguments to features [rows, num_features]"
    )


def _in_parts(net: nn.Module, inputs: Tensor) -> Tensor:
    """net(inputs) [rows, ...], some rows at a time where no gradient needs all of them at once."""
    size = len(inputs) if torch.is_grad_enabled() else max(1, BUDGET // (64 * max(1, inputs[0].numel())))
    return torch.cat([net(part) for part in inputs.split(max(1, size))])
