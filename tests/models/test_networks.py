import copy
import math

import pyro
import pytest
import torch
from torch import nn

from pyrolvm.errors import ProgramError, SettingError
from pyrolvm.models.base import register
from pyrolvm.models.make import check_decoder, check_encoder, make_decoder, make_encoder
from pyrolvm.models.networks import (
    ACTIVATIONS,
    MLP,
    SCALE_FLOOR,
    ConvDecoder,
    ConvEncoder,
    MLPEncoder,
    Rowwise,
    split_loc_scale,
)

IMAGES = [(1, 8, 8), (1, 28, 28), (3, 9, 14)]


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_mlp_is_affine_maps_with_the_activation_between(activation):
    mlp = MLP(3, 2, hidden=(5,), activation=activation)
    first, nonlinearity, last = mlp.layers
    x = torch.randn(4, 3)
    expected = nonlinearity(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(mlp(x), expected)
    assert (mlp(2 * x) - 2 * mlp(x)).abs().max() > 1e-3  # not affine


def test_no_hidden_layer_is_one_affine_map():
    mlp = MLP(3, 2, hidden=())
    weight, bias = mlp.parameters()
    assert weight.shape == (2, 3)
    x = torch.randn(4, 3)
    torch.testing.assert_close(mlp(x), x @ weight.T + bias)


NETWORKS = {
    "MLP": (lambda: MLP(7, 3, hidden=(4,)), 7),
    "MLPEncoder": (lambda: MLPEncoder(7, 3, hidden=(4, 5)), 7),
    **{
        f"ConvEncoder {i}": (lambda i=i: ConvEncoder(i, 3, (4, 6), (5,)), torch.Size(i).numel())
        for i in IMAGES
    },
    **{f"ConvDecoder {i}": (lambda i=i: ConvDecoder(3, i, (4, 6), (5,)), 3) for i in IMAGES},
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_leading_dimensions_equal_slice_by_slice_application(name):
    build, in_dim = NETWORKS[name]
    net, x = build(), torch.randn(3, 1, 2, in_dim)  # [chain, particle, batch, in_dim]
    whole = net(x)
    rows = [net(row) for row in x.reshape(-1, in_dim)]  # each without a batch dimension
    parts = list(zip(*rows, strict=True)) if isinstance(whole, tuple) else [rows]
    for out, slices in zip(whole if isinstance(whole, tuple) else (whole,), parts, strict=True):
        assert out.shape[:-1] == x.shape[:-1]
        torch.testing.assert_close(out, torch.stack(list(slices)).reshape(out.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", IMAGES)
def test_conv_networks_see_and_make_every_pixel_and_take_no_rows(shape):
    """The last row and column of odd sizes too, which halving drops and doubling must add again."""
    encoder, decoder = ConvEncoder(shape, 2, activation="tanh"), ConvDecoder(2, shape, activation="tanh")
    x = torch.randn(5, math.prod(shape), requires_grad=True)
    loc, scale = encoder(x)
    seen = torch.autograd.grad((loc + scale).sum(), x)[0]  # [5, pixels]
    assert (seen != 0).all()
    made = decoder(torch.randn(5, 2)) - decoder(torch.zeros(5, 2))
    assert made.shape == x.shape
    assert (made != 0).all()
    assert decoder(loc[:0]).shape == (0, math.prod(shape))


def test_conv_encoder_reads_pixels_in_the_order_of_the_flat_vector():
    encoder = ConvEncoder((1, 8, 8), 2, channels=(3,))
    conv = encoder.net.net[0]
    image = torch.zeros(8, 8)
    image[0, 1] = 1.0  # flat index 1: the first row's second column
    seen = conv(torch.eye(64)[1].reshape(1, 1, 8, 8)) - conv.bias[:, None, None]
    torch.testing.assert_close(seen, conv(image[None, None]) - conv.bias[:, None, None])
    loc, _ = encoder(torch.eye(64)[1])
    rest = encoder.net.net[1:]
    torch.testing.assert_close(loc, rest(conv(image[None, None]))[0, :2])


def test_scale_is_positive_and_bounded_below_for_any_output():
    raw = torch.tensor([0.0, -1e4, -100.0, 1e4]).repeat_interleave(2)
    _, scale = split_loc_scale(torch.stack([torch.zeros(8), raw], -1).reshape(8, 2))
    assert torch.isfinite(scale).all()
    assert scale.min().item() == pytest.approx(SCALE_FLOOR)


def test_autocast_leaves_the_outputs_in_float32():
    x = torch.randn(4, 64)
    nets = [MLPEncoder(64, 2), ConvEncoder((1, 8, 8), 2)]
    with torch.autocast("cpu", torch.bfloat16):
        outs = [part for net in nets for part in net(x)] + [ConvDecoder(64, (1, 8, 8))(x), MLP(64, 2)(x)]
        assert MLP(64, 2).layers(x).dtype == torch.bfloat16  # the layers did run in low precision
    assert {out.dtype for out in outs} == {torch.float32}


def test_images_too_small_and_unknown_names_are_refused():
    with pytest.raises(SettingError, match="at most 3 entries"):
        ConvEncoder((1, 8, 8), 2, channels=(2, 2, 2, 2))
    with pytest.raises(SettingError, match="image_shape"):
        ConvDecoder(2, (8, 8))
    with pytest.raises(SettingError, match="choose from relu"):
        MLP(2, 2, activation="relo")
    with pytest.raises(SettingError, match="not a square"):
        make_encoder("conv", 50, 2)
    with pytest.raises(SettingError, match="choose from mlp, conv, linear"):
        make_decoder("cnn", 2, 50)


def test_make_builds_what_it_is_asked():
    x = torch.randn(3, 5)
    encoder = make_encoder("linear", 5, 2)
    torch.testing.assert_close(encoder(x)[0] + encoder(-x)[0], 2 * encoder(0 * x)[0])  # affine
    assert [p.numel() for p in make_decoder("linear", 2, 5).parameters()] == [10, 5]
    assert make_encoder("conv", 64, 2, hidden=(4,))(torch.zeros(3, 64))[1].shape == (3, 2)
    assert make_decoder("conv", 2, 192, hidden=(4,), image_shape=(3, 8, 8))(torch.zeros(2)).shape == (192,)
    widths = [layer.out_features for layer in make_decoder("mlp", 2, 5, (7, 3)).layers[::2]]
    assert widths == [3, 7, 5]  # the encoder's, reversed
    mine = nn.Linear(2, 5)
    assert make_decoder(mine, 2, 5) is mine


class Returns(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, x):
        return self.out


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        (nn.Linear(5, 2), r"a tensor \[1, 2\].*tuple \(loc, scale\)"),
        (Returns((torch.zeros(1, 2), torch.ones(1, 3))), r"\[1, 3\].*\[\.\.\., 2\]"),
        (Returns((torch.zeros(1, 2), -torch.ones(1, 2))), "scale of -1.*softplus"),
        (Returns([torch.zeros(1, 2), torch.ones(1, 2)]), "a list"),
        (nn.Linear(6, 2), r"row \[1, 5\]"),
        (nn.Conv2d(1, 2, 3), "Rowwise"),
    ],
)
def test_wrong_encoders_are_refused_with_shapes(encoder, said):
    with pytest.raises(ProgramError, match=said):
        check_encoder(encoder, 5, 2)


def test_wrong_decoder_is_refused_with_shapes():
    with pytest.raises(ProgramError, match=r"a tensor \[1, 4\] for z \[1, 2\].*\[\.\.\., 5\]"):
        check_decoder(nn.Linear(2, 4), 2, 5)


def test_checking_a_network_leaves_it_and_the_random_state_alone():
    norm = nn.BatchNorm1d(4)
    net = nn.Sequential(nn.Linear(2, 4), norm, nn.Dropout(0.5), nn.LazyLinear(5)).double()
    net[1].eval()
    state = torch.get_rng_state()
    net[3](torch.zeros(1, 4, dtype=torch.double))  # initialises the lazy layer
    torch.set_rng_state(state)
    check_decoder(net, 2, 5)
    assert [m.training for m in net] == [True, False, True, True]
    assert norm.num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_rowwise_reshapes_each_member_of_a_tuple():
    both = Rowwise(Returns((torch.arange(12.0).reshape(6, 2, 1), torch.ones(6, 1))), (1,))
    loc, scale = both(torch.zeros(2, 3, 1))
    assert torch.equal(loc, torch.arange(12.0).reshape(2, 3, 2))
    assert torch.equal(scale, torch.ones(2, 3, 1))


def test_register_shows_trainable_parameters_and_no_frozen_one():
    net = nn.Linear(2, 3)
    net.bias.requires_grad_(False)
    register(net)
    entries = dict(pyro.get_param_store().items())
    assert len(entries) == 1
    assert next(iter(entries.values())) is net.weight
    assert not net.bias.requires_grad


def test_register_keeps_instances_and_copies_apart():
    first = nn.Linear(2, 3)
    register(first)
    for other in (nn.Linear(2, 3), copy.deepcopy(first)):
        register(other)
        assert any(value is other.weight for _, value in pyro.get_param_store().items())
    register(first)  # again, from the guide
    assert len(list(pyro.get_param_store().keys())) == 6


def test_register_refuses_a_store_that_would_train_another_tensor():
    net = nn.Linear(2, 3)
    register(net)
    net.weight = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(ProgramError, match="clear_param_store"):
        register(net)
