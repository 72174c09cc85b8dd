"""The search: what else a mixture may give at the cost of SIM, as methods on SimCLR (docs/study.md has the log).

    python benchmarks/search.py pretrain --method simclr_near --sim_weight 0 --out runs/near
    python benchmarks/search.py linear --run runs/near

The words and flags are those of siblings.py. With --sim_weight 0 and, as pure BSIM, plain pairs in the last quarter:

    simclr_half, simclr_quarter   a half or a quarter of the images are mixed, mixed and clean ones apart
    simclr_near, simclr_far       partners whose second views look alike to the network, or as unlike as can be
    simclr_two_norms              mixtures have norms of their own, with scale and shift (Xie et al., 2020, "Adversarial
                                  examples improve image recognition"); the clean ones are kept
    simclr_both_mixed             both views are mixed, with partners of their own; two mixtures attract by what they
                                  have in common (Ren et al., 2022, "A simple data mixing prior", arXiv 2206.07692)
    simclr_four                   a mixture of four images, a quarter each (Shen et al., 2023, "Inter-instance
                                  similarity modeling", arXiv 2306.12243)
    simclr_quarters               the first view in four quarters; the features of two of the image and two of its
                                  partner are averaged
    simclr_plain_quarters         its control: two quarters of the image alone (Ci et al., 2022, "Fast-MoCo",
                                  arXiv 2207.08220)

With --sim_weight 0.5:

    simclr_small_two, simclr_small_four               SIM, and mixtures of 16 pixels of small crops
    simclr_plain_small_two, simclr_plain_small_four   their controls: small crops as they are (Caron et al., 2020, SwAV)

And a network for any method, --backbone resnet_tiny_wide: resnet_tiny with twice the channels after its stem.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))

import siblings  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from einops import rearrange  # noqa: E402
from timm.models import register_model  # noqa: E402
from timm.models.resnet import BasicBlock, ResNet  # noqa: E402
from torch import nn  # noqa: E402

import train  # noqa: E402
from bsim import Mixture, make_view, sample_mixture  # noqa: E402
from methods import simclr  # noqa: E402
from methods.networks import Losses, _small_stem  # noqa: E402

SMALL, SMALL_SCALE = 16, (0.1, 0.4)  # the side of small views, and the area of their crops


class Step:
    """What the step's views and mixtures are drawn from, for methods that draw more."""

    def make_view(self, images, recipe, *, generator):
        self.images, self.recipe = images, recipe
        return make_view(images, recipe, generator=generator)

    def sample_mixture(self, views, *, generator, **options):
        self.generator, self.options = generator, options
        return self.mix(views)

    def mix(self, views, partner=None):
        return sample_mixture(views, generator=self.generator, partner=partner, **self.options)

    def small_view(self):
        recipe = self.recipe._replace(size=SMALL, scale=SMALL_SCALE)
        return make_view(self.images, recipe, generator=self.generator)


STEP = Step()


class Candidate(simclr.Method):
    def forward(self, a, b, mixture=None, sim=True):
        if mixture is None or sim:
            return super().forward(a, b, mixture, sim)
        loss, z_b = self.mixed(a, b, mixture)
        return Losses(None, loss, z_b)

    def embed(self, x):
        return self.projector(self.backbone(x))


class Near(Candidate):
    sign = 1

    def mixed(self, a, b, mixture):
        z_b = self.embed(b)
        z = F.normalize(z_b.detach().float(), dim=1)
        images, weight, partner = STEP.mix(a, tour(self.sign * z @ z.T))
        return self.loss(self.embed(images), z_b, weight, partner), z_b


class Far(Near):
    sign = -1


class TwoNorms(Candidate):
    def __init__(self, backbone, **heads):
        super().__init__(backbone, **heads)
        network = nn.Sequential(self.backbone, self.projector)
        self.network = [network]  # in a list, so that its weights are not there twice
        norms = [k for k, module in network.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        state = {k: v for k, v in network.state_dict().items() if k.rpartition(".")[0] in norms}
        learnt = {k for k, _ in network.named_parameters()}
        self.scales = nn.ParameterDict({k.replace(".", "/"): v.clone() for k, v in state.items() if k in learnt})
        for k, v in state.items():
            if k not in learnt:
                self.register_buffer(k.replace(".", "/"), v.clone())

    def mixed(self, a, b, mixture):
        own = {k.replace("/", "."): v for k, v in [*self.scales.items(), *self._buffers.items()]}
        z_m, z_b = torch.func.functional_call(self.network[0], own, mixture.images), self.embed(b)
        return self.loss(z_m, z_b, mixture.weight, mixture.partner), z_b


class Sometimes(Candidate):
    probability = 1 / 2

    def mixed(self, a, b, mixture):
        count = round(self.probability * len(a))  # the same in every step: networks are slower where sizes change
        mixed = torch.rand(len(a), generator=STEP.generator, device=STEP.generator.device).argsort() < count
        mixed = mixed.to(a.device)
        z_clean, z_b = self.embed(torch.cat([a[~mixed], b])).split([len(a) - count, len(b)])
        z_m = z_b.new_empty(z_b.shape)
        z_m[mixed], z_m[~mixed] = self.embed(mixture.images[mixed]), z_clean
        weight = mixture.weight.where(mixed, torch.ones_like(mixture.weight))
        return self.loss(z_m, z_b, weight, mixture.partner), z_b


class BothMixed(Candidate):
    def mixed(self, a, b, mixture):
        other = STEP.mix(b)
        z_m, z_o = self.embed(mixture.images), self.embed(other.images)
        first, second = (shares(len(b), (m.weight, None), (1 - m.weight, m.partner)) for m in (mixture, other))
        return soft_nt_xent(z_m, z_o, first @ second.T, self.temperature), z_o


class Four(Candidate):
    def mixed(self, a, b, mixture):
        partners = [None, mixture.partner, mixture.partner[mixture.partner]]
        partners.append(mixture.partner[partners[-1]])
        half = a.shape[-1] // 2
        images, quarter = a.clone(), a.new_full((len(a),), 0.25)
        for number, partner in enumerate(partners[1:], 1):
            rows, columns = (slice(half * k, half * (k + 1)) for k in divmod(number, 2))
            images[:, :, rows, columns] = a[partner, :, rows, columns]
        z_m, z_b = self.embed(images), self.embed(b)
        wanted = shares(len(b), *((quarter, partner) for partner in partners))
        return soft_nt_xent(z_m, z_b, wanted, self.temperature), z_b


class Quarters(Candidate):
    plain = False

    def mixed(self, a, b, mixture):
        parts = rearrange(a, "n c (p h) (q w) -> (p q n) c h w", p=2, q=2)
        f, z_b = self.backbone(parts).unflatten(0, (4, -1)), self.embed(b)
        losses = []
        half, across = torch.full_like(mixture.weight, 0.5), (f[0] + f[3], f[1] + f[2])
        for one, other in (across, across[::-1]):
            if self.plain:
                losses.append(self.loss(self.projector(one / 2), z_b))
            else:
                z_m = self.projector((one + other[mixture.partner]) / 4)
                losses.append(self.loss(z_m, z_b, half, mixture.partner))
        return sum(losses) / 2, z_b


class PlainQuarters(Quarters):
    plain = True


class Small(Candidate):
    count, plain = 2, False

    def forward(self, a, b, mixture=None, sim=True):
        if mixture is None or not sim:
            raise ValueError("sim_weight: want one between 0 and 1, as SIM and small mixtures are trained together")
        z_a, z_b = self.embed(torch.cat([a, b])).chunk(2)
        views = [STEP.small_view() for _ in range(self.count)]
        mixtures = [Mixture(v, None, None) if self.plain else STEP.mix(v) for v in views]
        small = self.embed(torch.cat([m.images for m in mixtures])).chunk(self.count)
        pairs = zip(small, (z_a, z_b) * self.count, mixtures)
        losses = [self.loss(z, other, m.weight, m.partner) for z, other, m in pairs]
        return Losses(self.loss(z_a, z_b), sum(losses) / self.count, z_b)


class Wide(nn.Module):  # of a ResNet itself the stem would be made anew, without its stride
    num_features = 384

    def __init__(self):
        super().__init__()
        channels = tuple(self.num_features // k for k in (8, 4, 2, 1))
        network = ResNet(BasicBlock, layers=(1, 1, 1, 1), channels=channels, zero_init_last=False, num_classes=0)
        self.network = _small_stem(network, stride=2)

    def forward(self, x):
        return self.network(x)


@register_model
def resnet_tiny_wide(pretrained=False, **_):
    return Wide()


def tour(similarity):
    """Partners [N] on one cycle that goes to the most similar image that is left."""
    left, order = similarity.cpu().clone().fill_diagonal_(-torch.inf), [0]
    for _ in range(len(left) - 1):
        left[:, order[-1]] = -torch.inf
        order.append(int(left[order[-1]].argmax()))
    order = torch.tensor(order)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner.to(similarity.device)


def shares(n, *parts):
    """[N, N]: how much of image j is in mixture i, for parts (weight [N], partner [N] or None, which is i itself)."""
    own = torch.arange(n, device=parts[0][0].device)
    return sum(weight[:, None] * F.one_hot(own if partner is None else partner, n) for weight, partner in parts)


def soft_nt_xent(a, b, wanted, temperature):
    """`nt_xent` of any targets: wanted [N, N] >= 0, of a_i on b_j, from either side made to sum to 1."""
    z = F.normalize(torch.cat([a, b]).float(), dim=1)
    scores = (z @ z.T / temperature).fill_diagonal_(-torch.inf).log_softmax(1)
    sides = (scores[: len(a), len(a) :], wanted), (scores[len(a) :, : len(a)], wanted.T)
    losses = [-(x * w / w.sum(1, keepdim=True).clamp(min=1e-9)).sum(1).mean() for x, w in sides]
    return sum(losses) / 2


def _candidate(method, **more):
    file = dict(defaults=simclr.defaults, views=simclr.views, sample_mixture=STEP.sample_mixture)
    return SimpleNamespace(Method=type(method.__name__, (method,), more), **file)


SEARCH = {
    "simclr_half": _candidate(Sometimes),
    "simclr_quarter": _candidate(Sometimes, probability=1 / 4),
    "simclr_near": _candidate(Near),
    "simclr_far": _candidate(Far),
    "simclr_two_norms": _candidate(TwoNorms),
    "simclr_both_mixed": _candidate(BothMixed),
    "simclr_four": _candidate(Four),
    "simclr_quarters": _candidate(Quarters),
    "simclr_plain_quarters": _candidate(PlainQuarters),
    "simclr_small_two": _candidate(Small, mix_until=1.0),
    "simclr_small_four": _candidate(Small, mix_until=1.0, count=4),
    "simclr_plain_small_two": _candidate(Small, mix_until=1.0, plain=True),
    "simclr_plain_small_four": _candidate(Small, mix_until=1.0, plain=True, count=4),
}

WEIGHTS = {name: 0.5 if "small" in name else 0.0 for name in SEARCH}  # each one's sim_weight

if __name__ == "__main__":
    train.make_view = STEP.make_view
    siblings.main(SEARCH)
