"""Candidates for BSIM on SimCLR at the cost of SIM, as methods to compare it with.

    python benchmarks/candidates.py pretrain --method simclr_apart --out runs/apart
    python benchmarks/candidates.py linear --run runs/apart

The words and flags are those of siblings.py. `simclr_apart`: mixtures and clean views go through the network apart, so
that each has batch statistics of its own (as adversarial examples have in Xie et al., 2020, "Adversarial examples
improve image recognition"). `simclr_plain_end`: the last quarter of the run has plain pairs (label mixing is ended
early in He et al., 2019, "Data augmentation revisited"). `simclr_apart_plain_end`: both. With --sim_weight 0 all of
them take as many encoder passes as SIM.

`simclr_third`, `moco_third`, `byol_third`: the control of half SIM, half BSIM. With --sim_weight 0.5 a third plain view
stands in the place of the mixture, with share 1, so that both losses are SIM's.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))

import siblings  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402
from bsim import Mixture, make_view  # noqa: E402
from methods import byol, moco, simclr  # noqa: E402
from methods.networks import Losses  # noqa: E402

PLAIN_FROM = 0.75  # share of the run after which pairs are plain


class Candidate(simclr.Method):
    apart, plain_end = False, False

    def __init__(self, backbone, **heads):
        super().__init__(backbone, **heads)
        self.register_buffer("progress", torch.zeros(()))  # in the checkpoint: a resumed run knows where it is

    def forward(self, a, b, mixture=None, sim=True):
        if self.plain_end and self.progress >= PLAIN_FROM:
            plain = super().forward(a, b, None, True)
            return Losses(plain.sim if sim else None, plain.sim, plain.embeddings)
        if not self.apart or mixture is None:
            return super().forward(a, b, mixture, sim)
        plain = super().forward(a, b, None, True) if sim else None
        z_m, z_b = (self.projector(self.backbone(x)) for x in (mixture.images, b))
        bsim = self.loss(z_m, z_b, mixture.weight, mixture.partner)
        return Losses(plain.sim if plain else None, bsim, z_b)

    def after_step(self, progress):
        self.progress.fill_(progress)


class Apart(Candidate):
    apart = True


class PlainEnd(Candidate):
    plain_end = True


class ApartPlainEnd(Candidate):
    apart, plain_end = True, True


class Third:
    """Another plain view of the images that the step's views were made of, as a mixture of which all is the image."""

    def make_view(self, images, recipe, *, generator):
        self.images, self.recipe = images, recipe
        return make_view(images, recipe, generator=generator)

    def sample_mixture(self, views, *, generator, **_):
        third = [make_view(self.images, self.recipe, generator=generator) for _ in range(views.shape[1] // 3)]
        partner = torch.arange(len(views), device=views.device).roll(1)
        return Mixture(torch.cat(third, 1), torch.ones(len(views), device=views.device), partner)


THIRD = Third()
CANDIDATES = {
    name: SimpleNamespace(Method=method, defaults=simclr.defaults, views=simclr.views)
    for name, method in (
        ("simclr_apart", Apart),
        ("simclr_plain_end", PlainEnd),
        ("simclr_apart_plain_end", ApartPlainEnd),
    )
} | {
    f"{name}_third": SimpleNamespace(
        Method=file.Method, defaults=file.defaults, views=file.views, sample_mixture=THIRD.sample_mixture
    )
    for name, file in (("simclr", simclr), ("moco", moco), ("byol", byol))
}

if __name__ == "__main__":
    train.make_view = THIRD.make_view
    siblings.main(CANDIDATES)
