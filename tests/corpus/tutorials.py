"""Programs in the manner of Pyro's tutorials: conditional VAEs, attend-infer-repeat, Markov models, topics, flows."""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import torch
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from corpus.form import NO_LATENTS_OF_ROWS, Pair, program
from corpus.networks import bits


class Gaussian(nn.Module):
    """Mean and spread from covariates."""

    def __init__(self, taken: int, given: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(taken, 8), nn.ReLU(), nn.Linear(8, 2 * given))

    def forward(self, *inputs):
        loc, log_scale = self.net(torch.cat(inputs, -1)).chunk(2, -1)
        return loc, log_scale.exp()


@program(quick=False)
def conditional_vae() -> Pair:
    """A conditional VAE: the prior of the latent is a network of the input, the output is drawn if it is not there."""

    class CVAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.baseline = nn.Linear(4, 4)
            self.prior_net, self.recognition_net = Gaussian(8, 2), Gaussian(8, 2)
            self.generation_net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4), nn.Sigmoid())

        def model(self, xs, ys=None):
            pyro.module("generation_net", self)
            with pyro.plate("data"):
                with torch.no_grad():
                    y_hat = self.baseline(xs)
                zs = pyro.sample("z", dist.Normal(*self.prior_net(xs, y_hat)).to_event(1))
                loc = self.generation_net(zs)
                pyro.sample("y", dist.Bernoulli(loc, validate_args=False).to_event(1), obs=ys)
                return loc

        def guide(self, xs, ys=None):
            with pyro.plate("data"):
                if ys is None:
                    loc, scale = self.prior_net(xs, self.baseline(xs))
                else:
                    loc, scale = self.recognition_net(xs, ys)
                pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    cvae = CVAE()
    whole = bits(16)
    return Pair(cvae.model, cvae.guide, (whole[:, :4], whole[:, 4:]))


@program
def scanvi() -> Pair:
    """Cells with known labels: library sizes, latents in two layers, a classifier's loss as a factor in the guide."""

    class SCANVI(nn.Module):
        def __init__(self, genes=5, labels=3):
            super().__init__()
            self.labels, self.l_loc, self.l_scale = labels, 2.0, 0.7
            self.z2_decoder, self.z2l_encoder = Gaussian(2 + labels, 2), Gaussian(genes, 3)
            self.x_decoder = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2 * genes))
            self.classifier, self.z1_encoder = nn.Linear(2, labels), Gaussian(2 + labels, 2)

        def model(self, x, y=None):
            pyro.module("scanvi", self)
            theta = pyro.param(
                "inverse_dispersion", 10.0 * x.new_ones(5), constraint=dist.constraints.positive
            )
            with pyro.plate("batch", len(x)), pyro.poutine.scale(scale=0.1):
                z1 = pyro.sample("z1", dist.Normal(0, x.new_ones(2)).to_event(1))
                y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(self.labels)), obs=y)
                z2 = pyro.sample("z2", dist.Normal(*self.z2_decoder(z1, y)).to_event(1))
                size = pyro.sample("l", dist.LogNormal(self.l_loc, self.l_scale).expand([1]).to_event(1))
                gate_logits, mu = self.x_decoder(z2).chunk(2, -1)
                mu = torch.softmax(mu, -1)
                logits = (size * mu + 1e-6).log() - (theta + 1e-6).log()
                law = dist.ZeroInflatedNegativeBinomial(
                    gate_logits=gate_logits, total_count=theta, logits=logits, validate_args=False
                )
                pyro.sample("x", law.to_event(1), obs=x)

        def guide(self, x, y=None):
            pyro.module("scanvi", self)
            with pyro.plate("batch", len(x)), pyro.poutine.scale(scale=0.1):
                loc, scale = self.z2l_encoder(torch.log(1 + x))
                pyro.sample("l", dist.LogNormal(loc[:, :1], scale[:, :1]).to_event(1))
                z2 = pyro.sample("z2", dist.Normal(loc[:, 1:], scale[:, 1:]).to_event(1))
                y_dist = dist.OneHotCategorical(logits=self.classifier(z2))
                if y is None:
                    y = pyro.sample("y", y_dist)
                else:
                    classification_loss = y_dist.log_prob(y)
                    pyro.factor("classification_loss", -50.0 * classification_loss, has_rsample=False)
                pyro.sample("z1", dist.Normal(*self.z1_encoder(z2, y)).to_event(1))

    module = SCANVI()
    counts, labels = torch.poisson(3 * torch.rand(12, 5)), functional.one_hot(torch.arange(12) % 3, 3).float()
    return Pair(
        module.model,
        module.guide,
        (counts, labels),
        objective=lambda: TraceEnum_ELBO(strict_enumeration_warning=False),
    )


@program(quick=False)
def attend_infer_repeat() -> Pair:
    """Two steps of attend, infer, repeat: presence, place and content of objects, masked, a network as baseline."""

    class AIR(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.predict = nn.LSTMCell(36 + 1 + 3 + 4, 8), nn.Linear(8, 7)
            self.encode, self.decode = nn.Linear(9, 8), nn.Linear(4, 9)
            self.bl_rnn, self.bl_predict = nn.LSTMCell(36 + 1 + 3 + 4, 8), nn.Linear(8, 1)

        def window(self, z_where, images, size, out):
            theta = torch.zeros(len(images), 2, 3)
            theta[:, 0, 0] = theta[:, 1, 1] = size
            theta = theta + functional.pad(z_where[:, 1:].unsqueeze(-1), (2, 0))
            grid = functional.affine_grid(theta, [len(images), 1, out, out], align_corners=False)
            return functional.grid_sample(
                images.view(len(images), 1, *images.shape[-2:]), grid, align_corners=False
            )

        def model(self, x):
            pyro.module("air", self)
            with pyro.plate("data", len(x)):
                drawn, present = x.new_zeros(x.shape), x.new_ones(len(x), 1)
                for t in range(2):
                    present = pyro.sample(f"z_pres_{t}", dist.Bernoulli(0.4 * present).to_event(1))
                    z_where = pyro.sample(
                        f"z_where_{t}", dist.Normal(x.new_zeros(len(x), 3), 1.0).mask(present).to_event(1)
                    )
                    z_what = pyro.sample(
                        f"z_what_{t}", dist.Normal(x.new_zeros(len(x), 4), 1.0).mask(present).to_event(1)
                    )
                    patch = torch.sigmoid(self.decode(z_what)).view(-1, 3, 3)
                    drawn = drawn + self.window(z_where, patch, 2.0, 6).squeeze(1) * present.unsqueeze(-1)
                pyro.sample("obs", dist.Normal(drawn.flatten(1), 0.3).to_event(1), obs=x.flatten(1))

        def guide(self, x):
            pyro.module("air", self)
            with pyro.plate("data", len(x)):
                n = len(x)
                h, c, bl_h, bl_c = (x.new_zeros(n, 8) for _ in range(4))
                present, z_where, z_what = x.new_ones(n, 1), x.new_zeros(n, 3), x.new_zeros(n, 4)
                for t in range(2):
                    inputs = torch.cat([x.flatten(1), present, z_where, z_what], -1)
                    h, c = self.rnn(inputs, (h, c))
                    bl_h, bl_c = self.bl_rnn(inputs.detach(), (bl_h, bl_c))
                    pres_logit, loc, scale = self.predict(h).split([1, 3, 3], -1)
                    baseline = {"baseline": {"baseline_value": (self.bl_predict(bl_h) * present).squeeze(-1)}}
                    present = pyro.sample(
                        f"z_pres_{t}",
                        dist.Bernoulli(torch.sigmoid(pres_logit) * present).to_event(1),
                        infer=baseline,
                    )
                    z_where = pyro.sample(
                        f"z_where_{t}", dist.Normal(loc, functional.softplus(scale)).mask(present).to_event(1)
                    )
                    what = self.encode(self.window(z_where, x, 0.5, 3).flatten(1))
                    z_what = pyro.sample(
                        f"z_what_{t}",
                        dist.Normal(what[:, :4], functional.softplus(what[:, 4:])).mask(present).to_event(1),
                    )

    air = AIR()
    return Pair(air.model, air.guide, (torch.rand(6, 6, 6),), objective=TraceGraph_ELBO)


@program
def deep_markov_model() -> Pair:
    """A deep Markov model: padded sequences under masks, a recurrent guide backwards, the KL annealed by a number."""

    class DMM(nn.Module):
        def __init__(self):
            super().__init__()
            self.emitter, self.trans, self.combiner = nn.Linear(2, 3), Gaussian(2, 2), Gaussian(2 + 4, 2)
            self.rnn = nn.RNN(3, 4, batch_first=True)
            self.z_0, self.z_q_0 = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
            self.h_0 = nn.Parameter(torch.zeros(1, 1, 4))

        def model(self, mini_batch, reversed_batch, mask, lengths, annealing_factor=1.0):
            pyro.module("dmm", self)
            z_prev = self.z_0.expand(mini_batch.size(0), 2)
            with pyro.plate("z_minibatch", len(mini_batch)):
                for t in pyro.markov(range(1, mini_batch.size(1) + 1)):
                    loc, scale = self.trans(z_prev)
                    with pyro.poutine.scale(scale=annealing_factor):
                        z_t = pyro.sample(
                            f"z_{t}", dist.Normal(loc, scale).mask(mask[:, t - 1 : t]).to_event(1)
                        )
                    probs = torch.sigmoid(self.emitter(z_t))
                    law = dist.Bernoulli(probs).mask(mask[:, t - 1 : t]).to_event(1)
                    pyro.sample(f"obs_x_{t}", law, obs=mini_batch[:, t - 1, :])
                    z_prev = z_t

        def guide(self, mini_batch, reversed_batch, mask, lengths, annealing_factor=1.0):
            pyro.module("dmm", self)
            h_0 = self.h_0.expand(1, len(mini_batch), 4).contiguous()
            packed = pack_padded_sequence(reversed_batch, lengths, batch_first=True, enforce_sorted=False)
            states, _ = pad_packed_sequence(self.rnn(packed, h_0)[0], batch_first=True, total_length=4)
            z_prev = self.z_q_0.expand(len(mini_batch), 2)
            with pyro.plate("z_minibatch", len(mini_batch)):
                for t in pyro.markov(range(1, mini_batch.size(1) + 1)):
                    law = dist.Normal(*self.combiner(z_prev, states[:, t - 1, :]))
                    with pyro.poutine.scale(scale=annealing_factor):
                        z_prev = pyro.sample(f"z_{t}", law.mask(mask[:, t - 1 : t]).to_event(1))

    dmm, x, lengths = DMM(), torch.bernoulli(0.5 * torch.ones(6, 4, 3)), torch.tensor([4, 3, 2, 4, 1, 3])
    mask = (torch.arange(4) < lengths.unsqueeze(-1)).float()
    backwards = torch.stack(
        [torch.cat([s[:n].flip(0), s[n:]]) for s, n in zip(x, lengths.tolist(), strict=True)]
    )
    return Pair(dmm.model, dmm.guide, (x, backwards, mask, lengths), {"annealing_factor": 0.5})


@program(quick=False)
def topics_by_logistic_normal() -> Pair:
    """ProdLDA: a decoder and an encoder with batch normalisation and dropout, counts as Multinomial."""

    class ProdLDA(nn.Module):
        def __init__(self, vocab=10, topics=3):
            super().__init__()
            self.topics = topics
            self.beta, self.bn, self.drop = (
                nn.Linear(topics, vocab, bias=False),
                nn.BatchNorm1d(vocab, affine=False),
                nn.Dropout(0.2),
            )
            self.fc, self.mu, self.lv = nn.Linear(vocab, 8), nn.Linear(8, topics), nn.Linear(8, topics)
            self.bnmu, self.bnlv = nn.BatchNorm1d(topics, affine=False), nn.BatchNorm1d(topics, affine=False)

        def model(self, docs):
            pyro.module("prodlda", self)
            with pyro.plate("documents", docs.shape[0]):
                zero = torch.zeros((docs.shape[0], self.topics))
                logtheta = pyro.sample("logtheta", dist.Normal(zero, torch.ones_like(zero)).to_event(1))
                count_param = functional.softmax(
                    self.bn(self.beta(self.drop(functional.softmax(logtheta, -1)))), dim=1
                )
                total_count = int(docs.sum(-1).max())
                pyro.sample("obs", dist.Multinomial(total_count, count_param), obs=docs)

        def guide(self, docs):
            with pyro.plate("documents", docs.shape[0]):
                h = self.drop(functional.softplus(self.fc(docs)))
                loc, scale = self.bnmu(self.mu(h)), (0.5 * self.bnlv(self.lv(h))).exp()
                pyro.sample("logtheta", dist.Normal(loc, scale).to_event(1))

    docs = torch.distributions.Multinomial(12, torch.ones(10)).sample((8,))
    prodlda = ProdLDA()
    return Pair(prodlda.model, prodlda.guide, (docs,), objective=TraceMeanField_ELBO)


@program(quick=False, declines=NO_LATENTS_OF_ROWS)
def density_by_splines() -> Pair:
    """A flow as the likelihood, conditional on a covariate and trained to the greatest likelihood, no latents."""
    context = torch.randn(20, 1)
    x = torch.cat([context, context.cos()], -1) + 0.2 * torch.randn(20, 2)
    marginal = transforms.spline(1, count_bins=4)
    conditional = transforms.conditional_spline(1, 1, hidden_dims=[6], count_bins=4)

    def model(x):
        modules = pyro.module("flows", nn.ModuleList([marginal, conditional]))
        base = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("x1", dist.TransformedDistribution(base, [modules[0]]), obs=x[:, :1])
            law = dist.ConditionalTransformedDistribution(base, [modules[1]])
            pyro.sample("x2", law.condition(x[:, :1]), obs=x[:, 1:])

    return Pair(model, lambda x: None, (x,))


@program(quick=False)
def vae_with_a_flow_as_prior() -> Pair:
    """A VAE whose prior is a learned coupling flow."""
    flow = transforms.affine_coupling(2, hidden_dims=[6])
    decoder, encoder = nn.Linear(2, 8), Gaussian(8, 2)

    def model(x):
        pyro.module("decoder", decoder)
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(len(x), 2), 1.0)
            z = pyro.sample("z", dist.TransformedDistribution(base, [flow]))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*encoder(x)).to_event(1))

    return Pair(model, guide, (bits(12),))


@program(quick=False, declines=NO_LATENTS_OF_ROWS)
def correlations_by_lkj() -> Pair:
    """A covariance from an LKJCholesky prior and scales, observed as rows of a multivariate normal."""
    x = torch.randn(25, 3) @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 0.7]])

    def model(x):
        theta = pyro.sample("theta", dist.HalfCauchy(torch.ones(3)).to_event(1))
        L_omega = pyro.sample("L_omega", dist.LKJCholesky(3, 2.0))
        with pyro.plate("observations", len(x)):
            tril = torch.mm(torch.diag(theta.sqrt()), L_omega)
            pyro.sample("obs", dist.MultivariateNormal(torch.zeros(3), scale_tril=tril), obs=x)

    return Pair(model, AutoNormal(model), (x,))


@program(quick=False, declines=NO_LATENTS_OF_ROWS)
def mixture_in_closed_form() -> Pair:
    """A mixture whose likelihood sums its components itself, by MixtureSameFamily."""
    x = torch.cat([torch.randn(10) - 2, torch.randn(14) + 2])

    def model(x):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 2.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        law = dist.MixtureSameFamily(
            dist.Categorical(weights), dist.Normal(locs, scale.unsqueeze(-1).expand(locs.shape))
        )
        with pyro.plate("data", len(x)):
            pyro.sample("x", law, obs=x)

    return Pair(model, AutoDiagonalNormal(model), (x,))


SUMMED_OUT = {"k-hat per datum": "is enumerated", "collapse": "is enumerated"}


@program(quick=False, missing=SUMMED_OUT)
def zero_inflation_summed_out() -> Pair:
    """Zero-inflated counts with a switch for each row that is summed out."""
    x = torch.randn(20)
    y = torch.poisson((0.5 + 0.3 * x).exp()) * torch.bernoulli(0.7 * torch.ones(20))

    @config_enumerate
    def model(x, y=None):
        gate = pyro.sample("gate", dist.Beta(2.0, 2.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Bernoulli(1 - gate))
            rate = (b[0] + b[1] * x).exp()
            pyro.sample("y", dist.Poisson(torch.where(on.bool(), rate, torch.tensor(1e-6))), obs=y)

    guide = AutoNormal(pyro.poutine.block(model, hide=["on"]))
    return Pair(model, guide, (x, y), objective=lambda: TraceEnum_ELBO(max_plate_nesting=1))


@program(
    quick=False,
    declines={"log_evidence": "summed out", "export": "summed out"},
    missing={**SUMMED_OUT, "log p(x)": "summed out"},
)
def annotators() -> Pair:
    """Dawid and Skene: classes of items summed out, confusion matrices of annotators, all items by all annotators."""
    answers = torch.randint(0, 3, (4, 10))  # [annotators, items]

    @config_enumerate
    def model(answers):
        pi = pyro.sample("pi", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("annotator", len(answers), dim=-2), pyro.plate("class", 3):
            beta = pyro.sample("beta", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("item", answers.shape[1], dim=-1):
            c = pyro.sample("c", dist.Categorical(pi))
            with pyro.plate("position", len(answers), dim=-2):
                rows = torch.arange(len(answers)).unsqueeze(-1)
                pyro.sample("y", dist.Categorical(beta[rows, c]), obs=answers)

    guide = AutoNormal(pyro.poutine.block(model, hide=["c"]))
    return Pair(model, guide, (answers,), objective=lambda: TraceEnum_ELBO(max_plate_nesting=2))


@program(quick=False, missing=SUMMED_OUT)
def sticks_summed_out() -> Pair:
    """A Dirichlet process by stick breaking, the assignments summed out of the model."""
    x = torch.cat([torch.randn(12, 2) - 2, torch.randn(12, 2) + 2])

    @config_enumerate
    def model(x):
        with pyro.plate("beta_plate", 3):
            beta = pyro.sample("beta", dist.Beta(1.0, 1.5))
        weights = functional.pad(beta, (0, 1), value=1) * functional.pad(
            (1 - beta).cumprod(-1), (1, 0), value=1
        )
        with pyro.plate("mu_plate", 4):
            mu = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(2), 5 * torch.eye(2)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.MultivariateNormal(mu[z], torch.eye(2)), obs=x)

    guide = AutoNormal(pyro.poutine.block(model, expose=["beta", "mu"]))
    return Pair(model, guide, (x,), objective=lambda: TraceEnum_ELBO(max_plate_nesting=1))


@program(
    quick=False,
    declines={
        **NO_LATENTS_OF_ROWS,
        **dict.fromkeys(("predict", "reconstruct", "sample"), "observes no data"),
    },
    missing={"predictive check": "observes no data"},
)
def proportional_hazards() -> Pair:
    """Cox's partial likelihood as a factor: what is observed is the order of events."""
    x, time = torch.randn(15, 2), torch.rand(15)
    event = (torch.arange(15) % 3 > 0).float()

    def model(x, time, event):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        order = time.argsort(descending=True)
        risk = (x @ beta)[order]
        pyro.factor("partial", ((risk - risk.logcumsumexp(0)) * event[order]).sum())

    return Pair(model, AutoNormal(model), (x, time, event))


@program(quick=False, declines=NO_LATENTS_OF_ROWS)
def logistic_growth() -> Pair:
    """A compartment in a loop with names by f-strings, all rows of a county at one time in a plate."""
    y = torch.poisson(torch.linspace(1, 20, 6).unsqueeze(-1).expand(6, 4))

    def model(y):
        rate = pyro.sample("rate", dist.LogNormal(-0.5, 0.3))
        with pyro.plate("county", y.shape[1]):
            state = pyro.sample("start", dist.LogNormal(0.0, 0.5))
            for t in range(len(y)):
                state = state + rate * state * (1 - state / 50)
                pyro.sample(f"y_{t}", dist.Poisson(state.clamp(min=1e-3)), obs=y[t])

    return Pair(model, AutoNormal(model), (y,))


@program(quick=False, declines=NO_LATENTS_OF_ROWS)
def cells_as_a_dataclass() -> Pair:
    """The data in a dataclass of tensors, as one argument."""

    @dataclass
    class Cells:
        counts: torch.Tensor
        size: torch.Tensor

    cells = Cells(torch.poisson(2 * torch.ones(10)), torch.rand(10) + 1)

    def model(cells):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("cells", len(cells.counts)):
            z = pyro.sample("z", dist.Normal(loc, 0.5))
            pyro.sample("counts", dist.Poisson(cells.size * z.exp()), obs=cells.counts)

    return Pair(model, AutoNormal(model), (cells,))
