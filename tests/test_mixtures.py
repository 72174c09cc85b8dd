"""Mixtures: the weight is what is really there, whatever the size, the share and the device of the generator."""

import pytest
import torch

from bsim import Mixture, cutmix, mixup, sample_mixture


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def cycle(n):
    return torch.arange(n).roll(1)


@pytest.mark.parametrize("height, width", [(32, 32), (7, 19), (24, 5), (1, 1), (1, 9), (2, 3)])
def test_cutmix_weight_is_the_fraction_of_pixels_that_stay(height, width):
    n = 10_000 // 6 + 1  # six sizes: 10,000 draws
    images = torch.arange(n, dtype=torch.float64).view(n, 1, 1, 1).expand(n, 2, height, width)
    before = images.clone()
    share = torch.rand(n, generator=generator(1))
    share[:50], share[50:100] = 0, 1
    mixture = cutmix(images, share, cycle(n), generator=generator(2))
    own = mixture.images == images
    assert (own | (mixture.images == images[mixture.partner])).all()
    torch.testing.assert_close(mixture.weight, own[:, 0].double().mean((1, 2)).float(), rtol=0, atol=1e-7)
    assert torch.equal(images, before)
    assert torch.equal(mixture.images[:50], images[mixture.partner[:50]]) and (mixture.weight[:50] == 0).all()
    assert torch.equal(mixture.images[50:100], images[50:100]) and (mixture.weight[50:100] == 1).all()


def test_cutmix_replaces_one_box_of_the_drawn_area():
    n, height, width = 2000, 40, 60
    images = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 1, height, width)
    share = torch.rand(n, generator=generator(3))
    mixture = cutmix(images, share, cycle(n), generator=generator(4))
    replaced = mixture.images[:, 0] != images[:, 0]
    rows, columns = replaced.any(2), replaced.any(1)
    assert torch.equal(replaced, rows[:, :, None] & columns[:, None])  # an axis-aligned box
    for line in (rows, columns):
        assert ((line.int().diff(dim=1) != 0).sum(1) <= 2).all()  # of neighbouring lines
    assert (mixture.weight >= share - 0.05).all()  # clipping only ever leaves more
    whole = (rows[:, 0] | rows[:, -1] | columns[:, 0] | columns[:, -1]) == 0
    assert whole.sum() > 200
    torch.testing.assert_close(mixture.weight[whole], share[whole], rtol=0, atol=0.03)


def test_boxes_fall_everywhere_alike():
    n = 4000
    images = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 1, 16, 16)
    mixture = cutmix(images, torch.full((n,), 0.9), cycle(n), generator=generator(5))
    hits = (mixture.images != images)[:, 0].float().mean(0)
    inside = hits[3:-3, 3:-3]
    assert inside.std() / inside.mean() < 0.1


def test_mixup_is_the_weighted_sum():
    images = torch.randn(6, 3, 5, 4, generator=generator())
    weight, partner = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.9, 0.1]), torch.tensor([5, 3, 0, 1, 2, 4])
    mixture = mixup(images, weight, partner)
    for n in range(6):
        wanted = weight[n] * images[n] + (1 - weight[n]) * images[partner[n]]
        torch.testing.assert_close(mixture.images[n], wanted)
    assert torch.equal(mixture.images[0], images[5]) and torch.equal(mixture.images[1], images[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("kind", ["cutmix", "mixup", "either"])
def test_the_dtype_is_kept_and_the_share_is_not_rounded_to_it(dtype, kind):
    images = (torch.rand(4, 3, 8, 8, generator=generator()) * 255).to(dtype)
    mixture = sample_mixture(images, kind=kind, generator=generator(1))
    exact = sample_mixture(images.double(), kind=kind, generator=generator(1))
    assert mixture.images.dtype == dtype and mixture.weight.dtype == torch.float32
    assert torch.equal(mixture.weight, exact.weight)
    step = 0.5001 if dtype == torch.uint8 else 255 * torch.finfo(dtype).eps
    assert (mixture.images.double() - exact.images).abs().max() <= step


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 2.0, 8.0])
def test_shares_follow_the_beta_distribution(alpha):
    from scipy import stats

    n = 40_000
    weight = sample_mixture(torch.zeros(n, 1, 1, 1), kind="mixup", alpha=alpha, generator=generator(6)).weight
    for level in (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98):  # away from 0 and 1, where float32 rounds
        wanted = stats.beta(alpha, alpha).cdf(level)
        spread = (wanted * (1 - wanted) / n) ** 0.5
        assert abs(float((weight < level).double().mean()) - wanted) < 4.5 * spread + 1e-6, level


def test_partners_are_one_random_cycle_and_never_oneself():
    for n in (2, 3, 17):
        for seed in range(20):
            partner = sample_mixture(torch.zeros(n, 1, 2, 2), generator=generator(seed)).partner
            seen, at = [], 0
            for _ in range(n):
                at = int(partner[at])
                seen.append(at)
            assert sorted(seen) == list(range(n))
    firsts = {int(sample_mixture(torch.zeros(5, 1, 2, 2), generator=generator(s)).partner[0]) for s in range(60)}
    assert firsts == {1, 2, 3, 4}
    assert sample_mixture(torch.zeros(1, 1, 2, 2), generator=generator()).partner.tolist() == [0]


@pytest.mark.parametrize("kind", ["cutmix", "mixup", "either"])
@pytest.mark.parametrize("per_sample", [True, False])
def test_a_given_partner_changes_the_partner_alone(kind, per_sample):
    images, partner = torch.rand(6, 3, 8, 8, generator=generator()), torch.tensor([0, 2, 1, 5, 3, 4])
    draws = [generator(1) for _ in range(3)]
    rule = dict(kind=kind, per_sample=per_sample)
    cycled, given = (sample_mixture(images, **rule, partner=p, generator=g) for p, g in zip((None, partner), draws))
    assert torch.equal(given.partner, partner) and torch.equal(given.weight, cycled.weight)
    assert torch.equal(torch.rand(3, generator=draws[0]), torch.rand(3, generator=draws[1]))
    # The cycle that is drawn, given, is the mixture that is drawn.
    again = sample_mixture(images, **rule, partner=cycled.partner, generator=draws[2])
    assert all(torch.equal(x, y) for x, y in zip(again, cycled))
    for n in range(6):
        blend = given.weight[n] * images[n] + (1 - given.weight[n]) * images[partner[n]]
        pasted = (given.images[n] == images[n]) | (given.images[n] == images[partner[n]])
        assert torch.allclose(given.images[n], blend) or (kind != "mixup" and pasted.all())


@pytest.mark.parametrize("kind", ["cutmix", "mixup", "either"])
def test_one_share_for_the_batch(kind):
    images = torch.rand(8, 3, 16, 16, generator=generator())
    seen = set()
    for seed in range(6):
        weight = sample_mixture(images, kind=kind, per_sample=False, generator=generator(seed)).weight
        assert len(weight.unique()) == 1
        seen.add(float(weight[0]))
    assert len(seen) == 6
    assert len(sample_mixture(images, kind=kind, generator=generator()).weight.unique()) > 4


def test_either_mixes_each_image_by_one_of_the_two():
    n = 400
    images = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 1, 8, 8)
    mixture = sample_mixture(images, kind="either", generator=generator(7))
    pasted = ((mixture.images == images) | (mixture.images == images[mixture.partner])).flatten(1).all(1)
    assert 140 < pasted.sum() < 260
    mean = mixture.images.mean((1, 2, 3))
    wanted = mixture.weight * images[:, 0, 0, 0] + (1 - mixture.weight) * images[mixture.partner, 0, 0, 0]
    torch.testing.assert_close(mean, wanted, rtol=1e-4, atol=1e-3)


def test_views_stacked_along_the_channels_are_mixed_alike():
    a, b = torch.rand(5, 3, 12, 12, generator=generator()), torch.rand(5, 3, 12, 12, generator=generator(1))
    both = sample_mixture(torch.cat([a, b], 1), generator=generator(2))
    for part, view in zip(both.images.chunk(2, 1), (a, b)):
        alone = sample_mixture(view, generator=generator(2))
        assert torch.equal(part, alone.images) and torch.equal(both.weight, alone.weight)


def test_randomness_is_the_generator_alone():
    images = torch.rand(6, 3, 8, 8)
    before = torch.get_rng_state()
    first, again = (sample_mixture(images, kind="either", alpha=0.3, generator=generator(9)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(first, again))
    assert isinstance(first, Mixture)
    assert not torch.equal(first.images, sample_mixture(images, kind="either", generator=generator(10)).images)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, p: mixup(x[0], torch.rand(4), p), r"images: got shape \[3, 8, 8\], want \[N, C, H, W\]"),
        (lambda x, p: mixup(x, torch.rand(3), p), r"weight: got torch.float32 of shape \[3\], want .* \[4\]"),
        (
            lambda x, p: mixup(x, torch.full((4,), 1.5), p),
            r"weight: got values from 1.5 to 1.5, want shares in \[0, 1\]",
        ),
        (lambda x, p: mixup(x, torch.full((4,), float("nan")), p), r"weight: got values from nan"),
        (lambda x, p: mixup(x, torch.rand(4), p.float()), r"partner: got torch.float32"),
        (lambda x, p: cutmix(x, torch.rand(4), p * 0, generator=generator()), r"permutation of range\(4\)"),
        (lambda x, p: cutmix(x, torch.tensor(-0.1), p, generator=generator()), r"share: got values from -0.1"),
        (lambda x, p: sample_mixture(x, kind="cutout", generator=generator()), r"kind: got 'cutout', want 'cutmix'"),
        (lambda x, p: sample_mixture(x, partner=p * 0, generator=generator()), r"permutation of range\(4\)"),
        (lambda x, p: sample_mixture(x, alpha=0, generator=generator()), r"alpha: got 0, want a number above 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(4, 3, 8, 8), cycle(4))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integers_are_mixed_exactly(dtype):
    """Against Python's whole numbers; a weight of 1 or 0 gives a source back, however large."""
    top = min(torch.iinfo(dtype).max, 2**53)
    images = torch.tensor([top, top - 1, 7, -top if torch.iinfo(dtype).min < 0 else 0]).view(4, 1, 1, 1).to(dtype)
    partner = torch.tensor([1, 2, 3, 0])
    for weight in ([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.25, 0.5, 0.75, 1.0]):
        mixed = mixup(images, torch.tensor(weight), partner).images.flatten().tolist()
        for n, (value, w) in enumerate(zip(mixed, weight)):
            own, other = int(images[n]), int(images[partner[n]])
            quarters = int(4 * w) * own + int(4 - 4 * w) * other  # four times the mixture, exactly
            assert abs(4 * value - quarters) <= (2 if w % 1 else 0)


def test_integers_beyond_float64_are_refused():
    images = torch.full((2, 1, 1, 1), 2**53 + 1)
    with pytest.raises(
        ValueError, match="images: got torch.int64 from 9007199254740993 .* want integers of up to 2.53"
    ):
        mixup(images, torch.ones(2), torch.tensor([1, 0]))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_integers_of_which_torch_has_few_operations_are_refused(dtype):
    with pytest.raises(ValueError, match="images: got torch.uint.*, want floats, uint8, or signed integers"):
        mixup(torch.zeros(2, 1, 1, 1, dtype=dtype), torch.ones(2), torch.tensor([1, 0]))
