import pytest
import torch

from pyrolvm.errors import DataError, SettingError
from pyrolvm.models.alignment import (
    align_loadings,
    canonical,
    match_components,
    match_signs,
    procrustes,
    varimax,
)


def random_rotation(size, *batch):
    return torch.linalg.qr(torch.randn(*batch, size, size, dtype=torch.double))[0]


def simple_loadings():
    """Three factors with features of their own: simple structure, so that varimax has one answer."""
    W = torch.block_diag(*(torch.full((4, 1), strength, dtype=torch.double) for strength in (2.0, 1.5, 1.0)))
    return W + 0.02 * torch.randn_like(W)  # [12, 3]


def signed_permutation(order, signs):
    return torch.eye(len(order), dtype=torch.double)[:, order] * torch.tensor(signs, dtype=torch.double)


def test_procrustes_undoes_any_rotation():
    W, R = torch.randn(7, 3, dtype=torch.double), random_rotation(3, 5)
    aligned = procrustes(W @ R, W)
    torch.testing.assert_close(aligned.loadings, W.expand(5, 7, 3))
    torch.testing.assert_close(aligned.rotation, R.mT)


def test_varimax_recovers_simple_structure():
    W = simple_loadings()
    rotated, R = varimax(W @ random_rotation(3))
    matched = match_signs(rotated, varimax(W).loadings).loadings
    torch.testing.assert_close(matched, varimax(W).loadings, atol=1e-4, rtol=0)
    assert (matched - W).abs().max() < 0.1
    torch.testing.assert_close(R @ R.mT, torch.eye(3, dtype=torch.double))


def test_varimax_climbs_its_criterion():
    W = torch.randn(10, 4, dtype=torch.double)
    best = varimax(W).loadings.square().var(0).sum()
    others = torch.stack([(W @ random_rotation(4)).square().var(0).sum() for _ in range(200)])
    assert best > others.max()


def test_signs_and_order_are_found_exactly():
    W = torch.randn(6, 4, dtype=torch.double)
    shuffle = signed_permutation([2, 0, 3, 1], [1.0, -1.0, -1.0, 1.0])
    matched = match_signs(W @ shuffle, W)
    torch.testing.assert_close(matched.loadings, W)
    torch.testing.assert_close(matched.rotation, shuffle.mT)


def test_canonical_form_does_not_depend_on_the_rotation():
    W = simple_loadings()
    forms = [canonical(W @ random_rotation(3)).loadings for _ in range(5)]
    torch.testing.assert_close(torch.stack(forms), forms[0].expand(5, 12, 3), atol=1e-4, rtol=0)
    assert (forms[0].sum(0) > 0).all()
    assert (forms[0].square().sum(0).diff() < 0).all()


@pytest.mark.parametrize("method", ["procrustes", "varimax"])
@pytest.mark.parametrize("known", [True, False])
def test_rotated_draws_come_together(method, known):
    W = canonical(simple_loadings()).loadings
    noise = 0.02 * torch.randn(30, 12, 3, dtype=torch.double)
    draws = (W + noise) @ random_rotation(3, 30)
    aligned = align_loadings(draws, W if known else None, method)
    assert aligned.loadings.std(0).max() < 0.05  # before: about 1
    assert (aligned.loadings.mean(0) - W).abs().max() < 0.05
    torch.testing.assert_close(draws @ aligned.rotation, aligned.loadings)
    torch.testing.assert_close(aligned.rotation.mT @ aligned.rotation, torch.eye(3).double().expand(30, 3, 3))


def test_signs_alone_leave_the_rotation():
    W = torch.randn(8, 3, dtype=torch.double)
    shuffles = torch.stack(
        [signed_permutation(torch.randperm(3).tolist(), [1.0, -1.0, 1.0]) for _ in range(9)]
    )
    aligned = align_loadings(W @ shuffles, method="signs").loadings
    torch.testing.assert_close(aligned, (W @ shuffles[0]).expand(9, 8, 3))


def test_components_are_matched_by_mean_and_spread():
    means = torch.tensor([[0.0, 0.0], [0.0, 0.0], [5.0, 1.0]])
    tril = torch.eye(2) * torch.tensor([0.2, 3.0, 1.0])[:, None, None]
    order = torch.tensor([1, 2, 0])
    assert match_components(means, tril, means[order], tril[order]).tolist() == order.tolist()


def test_wrong_shapes_and_methods_are_refused():
    with pytest.raises(SettingError, match="choose from procrustes, varimax, signs"):
        align_loadings(torch.randn(3, 4, 2), method="rsp")
    with pytest.raises(DataError, match="num_draws, data_dim, latent_dim"):
        align_loadings(torch.randn(4, 2))
    with pytest.raises(DataError, match=r"\[5, 2\].*\[4, 2\]"):
        align_loadings(torch.randn(3, 4, 2), torch.randn(5, 2))
    with pytest.raises(DataError, match="same num_components"):
        match_components(torch.randn(2, 2), torch.eye(2), torch.randn(3, 2), torch.eye(2))
