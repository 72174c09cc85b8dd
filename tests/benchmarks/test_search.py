"""The candidates of benchmarks/search.py: what they draw and what they minimise."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import search

import bsim
from methods.networks import backbone


def views(n=12, side=32):
    return torch.rand(2, n, 3, side, side, generator=torch.Generator().manual_seed(0))


def method(name):
    torch.manual_seed(0)
    heads = dict(hidden_dim=16, embedding_dim=8, temperature=0.2)
    return search.SEARCH[name].Method(backbone("resnet_tiny", 32), **heads)


def draw(name, a):
    search.STEP.make_view(a, bsim.ViewRecipe(32), generator=torch.Generator().manual_seed(1))
    options = dict(kind="cutmix", alpha=1.0, per_sample=True)
    return search.SEARCH[name].sample_mixture(a, generator=torch.Generator().manual_seed(2), **options)


def test_soft_targets_of_a_mixture_give_nt_xent():
    draws = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 9, 5, generator=draws)
    weight, partner = torch.rand(9, generator=draws), torch.randperm(9, generator=draws)
    wanted = search.shares(9, (weight, None), (1 - weight, partner))
    torch.testing.assert_close(wanted.sum(1), torch.ones(9))
    found = search.soft_nt_xent(a, b, wanted, 0.2)
    torch.testing.assert_close(found, bsim.nt_xent(a, b, 0.2, weight=weight, partner=partner))


def test_a_tour_goes_to_the_most_similar_image_that_is_left():
    places = torch.tensor([0.0, 5.0, 1.0, 6.5, 2.5])  # from 0: 2, 4, 1, 3
    partner = search.tour(-(places[:, None] - places).abs())
    assert partner.tolist() == [3, 4, 0, 1, 2]
    assert partner.sort().values.tolist() == list(range(5))


def test_a_quarter_of_the_images_is_mixed_and_goes_through_apart(monkeypatch):
    a, b = views(40, 8)
    model, seen = method("simclr_quarter").eval(), []
    monkeypatch.setattr(model, "embed", lambda x: seen.append(x) or x.flatten(1).double())
    found = []
    monkeypatch.setattr(model, "loss", lambda z, z_b, weight, partner: found.append((z, weight)) or z.sum())
    mixture = draw("simclr_quarter", a)
    model.mixed(a, b, mixture)
    (clean, mixed), (z, weight) = seen, found[0]
    assert len(clean) == 30 + 40 and len(mixed) == 10
    rows = torch.where((weight < 1).view(-1, 1, 1, 1), mixture.images, a)
    assert torch.equal(z, rows.flatten(1).double()) and int((weight < 1).sum()) in (9, 10)


def test_two_norms_leave_the_clean_statistics_alone():
    a, b = views()
    one, two = method("simclr_two_norms"), method("simclr_two_norms")
    one.mixed(a, b, draw("simclr_two_norms", a))
    two.embed(b)
    for name, value in one.backbone.state_dict().items():
        assert torch.equal(value, two.backbone.state_dict()[name])
    assert "0/bn1/weight" in one.scales


def test_plain_quarters_are_those_of_the_image():
    """Averages of two quarters that lie across, each pair against the second view."""
    a, b = views()
    model = method("simclr_plain_quarters").eval()
    found, z_b = model.mixed(a, b, draw("simclr_plain_quarters", a))
    corners = [a[:, :, y : y + 16, x : x + 16] for y in (0, 16) for x in (0, 16)]
    f = [model.backbone(corner) for corner in corners]
    wanted = [bsim.nt_xent(model.projector((f[i] + f[j]) / 2), model.embed(b), 0.2) for i, j in ((0, 3), (1, 2))]
    torch.testing.assert_close(found, sum(wanted) / 2)


@pytest.mark.parametrize("name", search.SEARCH)
def test_a_step_has_a_finite_gradient_everywhere(name):
    a, b = views()
    model = method(name)
    losses = model(a, b, draw(name, a), search.WEIGHTS[name] > 0)
    losses.bsim.backward()
    assert (losses.sim is not None) == ("small" in name)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


def test_the_wide_network_is_resnet_tiny_with_twice_the_channels():
    tiny, wide = backbone("resnet_tiny", 32), backbone("resnet_tiny_wide", 32)
    for one, two in zip(tiny.modules(), wide.network.modules(), strict=True):
        if isinstance(one, torch.nn.Conv2d):
            assert (two.kernel_size, two.stride) == (one.kernel_size, one.stride)
            assert two.out_channels == one.out_channels * (1 if one is tiny.conv1 else 2)  # timm's stem has 64
    assert wide(torch.rand(2, 3, 32, 32)).shape == (2, wide.num_features) == (2, 2 * tiny.num_features)
