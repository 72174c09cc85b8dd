"""Candidates for BSIM on SimCLR at the cost of SIM, as methods to compare it with.

    python benchmarks/candidates.py pretrain --method simclr_apart --out runs/apart
    python benchmarks/candidates.py linear --run runs/apart

The words and flags are those of siblings.py. `simclr_apart`: mixtures and clean views go through the network apart, so
that each has batch statistics of its own (as adversarial examples have in Xie et al., 2020, "Adversarial examples
improve image recognition"). `simclr_plain_end`: the last quarter of the run has plain pairs (label mixing is ended
early in He et al., 2019, "Data augmentation revisited"). `simclr_apart_plain_end`: both. With --sim_weight 0 all of
them take as many encoder passes as SIM. `simclr_sim_apart`, with --sim_weight 1: the control, SIM whose two views go
through the network apart.

`moco_plain_end`, `byol_plain_end`, `simsiam_plain_end`: that end for methods whose mixtures go through apart already.

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
from methods import byol, moco, simclr, simsiam  # noqa: E402
from methods.networks import Losses  # noqa: E402

PLAIN_FROM = 0.75  # share of the run after which pairs are plain


class Candidate(simclr.Method):
    """Pure BSIM as it was before `simclr_apart_plain_end` became the default."""

    apart, mix_until = False, 1.0

    def forward(self, a, b, mixture=None, sim=True):
        if self.apart or mixture is None or sim:
            return super().forward(a, b, mixture, sim)
        z_m, z_b = self.projector(self.backbone(torch.cat([mixture.images, b]))).chunk(2)
        return Losses(None, self.loss(z_m, z_b, mixture.weight, mixture.partner), z_b)


class Apart(Candidate):
    apart, mix_until = True, 1.0


class PlainEnd(Candidate):
    mix_until = PLAIN_FROM


class ApartPlainEnd(Candidate):
    apart, mix_until = True, PLAIN_FROM


class SimApart(simclr.Method):
    def forward(self, a, b, mixture=None, sim=True):
        z_a, z_b = (self.projector(self.backbone(x)) for x in (a, b))
        return Losses(self.loss(z_a, z_b), None, z_b)


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


def _candidate(file, method=None, **more):
    return SimpleNamespace(Method=method or file.Method, defaults=file.defaults, views=file.views, **more)


def _plain_end(file):
    return _candidate(file, type("PlainEnd", (file.Method,), {"mix_until": PLAIN_FROM}))


CANDIDATES = {
    "simclr_apart": _candidate(simclr, Apart),
    "simclr_plain_end": _candidate(simclr, PlainEnd),
    "simclr_apart_plain_end": _candidate(simclr, ApartPlainEnd),
    "simclr_sim_apart": _candidate(simclr, SimApart),
    **{f"{name}_plain_end": _plain_end(file) for name, file in (("moco", moco), ("byol", byol), ("simsiam", simsiam))},
    **{
        f"{name}_third": _candidate(file, sample_mixture=THIRD.sample_mixture)
        for name, file in (("simclr", simclr), ("moco", moco), ("byol", byol))
    },
}

if __name__ == "__main__":
    train.make_view = THIRD.make_view
    siblings.main(CANDIDATES)
