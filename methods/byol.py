"""BYOL: an online network predicts what a slow copy of it, the target, says of the other view.

Grill et al., "Bootstrap your own latent", NeurIPS 2020, arXiv 2006.07733.
"""

from copy import deepcopy

import torch
from torch import nn

from bsim import ViewRecipe, negative_cosine
from methods.networks import SMALL_STEM, Losses, cosine, mlp, moving_average


def defaults(*, image_size, width, steps, images):
    heads = dict(hidden_dim=2 * width, embedding_dim=256)  # section 3.3; 4096 and 256 for ResNet-50
    # tau_base, section 3.3; in short runs a memory of 1 % of the run, or 10 steps: a younger target teaches more.
    momentum = min(0.996, max(0.9, 1 - 100 / steps))
    if image_size <= SMALL_STEM:  # ours, measured: docs/study.md
        return dict(optimizer="sgd", lr=0.2, weight_decay=5e-4, warmup_epochs=1.0, momentum=momentum, **heads)
    return dict(
        optimizer="lars",  # section 3.3
        lr=0.2,  # for each 256 images of a batch: section 3.3
        weight_decay=1.5e-6,  # section 3.3
        warmup_epochs=10.0,  # section 3.3, then cosine
        momentum=momentum,
        **heads,
    )


def views(image_size):
    """Appendix B, table 6: T blurs always; T' blurs one in ten, solarizes one in five. Neither for small images."""
    if image_size <= SMALL_STEM:
        recipe = ViewRecipe(image_size, saturation=0.2, blur=0.0)
        return recipe, recipe
    recipe = ViewRecipe(image_size, scale=(0.08, 1), saturation=0.2)
    return recipe._replace(blur=1.0), recipe._replace(blur=0.1, solarize=0.2)


class Method(nn.Module):
    momentum_backbone = "target.0."  # where a checkpoint has the slow copy
    both_views = True
    batch_norm = "sync"

    def __init__(self, backbone, *, hidden_dim, embedding_dim, momentum):
        super().__init__()
        self.backbone = backbone  # f_theta
        self.projector = mlp(backbone.num_features, hidden_dim, embedding_dim)  # g_theta
        self.predictor = mlp(embedding_dim, hidden_dim, embedding_dim)  # q_theta
        self.target = deepcopy(nn.Sequential(backbone, self.projector)).requires_grad_(False)  # xi
        self.momentum = momentum

    def forward(self, a, b, mixture=None, sim=True):
        with torch.no_grad():
            targets = self.target(torch.cat([b, a]))  # z'_xi of the other view
        sim_loss, bsim_loss = None, None
        if sim:
            sim_loss, z = self.loss(torch.cat([a, b]), targets)
        if mixture:
            mixed = torch.cat(mixture.images.chunk(2, dim=1))  # m_a, then m_b: mixed alike
            bsim_loss, z = self.loss(mixed, targets, mixture.weight, mixture.partner)
        return Losses(sim_loss, bsim_loss, z)

    def loss(self, images, targets, weight=None, partner=None):
        z = self.projector(self.backbone(images))  # z_theta
        directions = zip(self.predictor(z).chunk(2), targets.chunk(2))
        loss = sum(2 + 2 * negative_cosine(q, t, weight=weight, partner=partner) for q, t in directions)  # equation 2
        return loss, z

    def after_step(self, progress):
        tau = cosine(self.momentum, 1.0, progress)  # section 3.3
        moving_average(self.target, nn.Sequential(self.backbone, self.projector), tau)  # equation 1
