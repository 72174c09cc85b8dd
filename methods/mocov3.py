"""MoCo v3: each view predicts its slow copy's key of the other view, which all other keys of the step repel; no queue.

Chen, Xie and He, "An empirical study of training self-supervised vision transformers", ICCV 2021, arXiv 2104.02057.
"""

from copy import deepcopy

import torch
from torch import nn

from bsim import ViewRecipe, info_nce
from methods.networks import SMALL_STEM, Losses, cosine, gather_others, mlp, moving_average


def defaults(*, image_size, width, steps, images, network=None):
    # Section 3, code: 0.99 rising to 1; in short runs a memory of 1 % of the run, or 10 steps, as for BYOL.
    momentum = min(0.99, max(0.9, 1 - 100 / steps))
    small, transformer = image_size <= SMALL_STEM, hasattr(network, "patch_embed")
    heads = dict(hidden_dim=2 * width if small else 4096, embedding_dim=256, momentum=momentum)  # section 3
    if transformer:
        # Section 4: lr for each 256 images of a batch. Small images: ours, measured: docs/study.md.
        rates = dict(lr=2e-3, weight_decay=0.1, warmup_epochs=3.0) if small else dict(lr=1.5e-4, weight_decay=0.1)
        return dict(optimizer="adamw", temperature=0.2, **{"warmup_epochs": 40.0} | rates, **heads)
    if small:
        return dict(optimizer="sgd", lr=0.12, weight_decay=5e-4, warmup_epochs=1.0, temperature=0.2, **heads)  # ours
    # Code, the preset for ResNet-50 and 300 epochs.
    return dict(optimizer="lars", lr=0.3, weight_decay=1e-6, warmup_epochs=10.0, temperature=1.0, **heads)


def views(image_size):
    """BYOL's two recipes, as in the code: T blurs always; T' blurs 1 in 10, solarizes 1 in 5. Small images: neither."""
    if image_size <= SMALL_STEM:
        recipe = ViewRecipe(image_size, saturation=0.2, blur=0.0)
        return recipe, recipe
    recipe = ViewRecipe(image_size, scale=(0.08, 1), saturation=0.2)
    return recipe._replace(blur=1.0), recipe._replace(blur=0.1, solarize=0.2)


class Method(nn.Module):
    momentum_backbone = "key_encoder.0."  # where a checkpoint has the slow copy
    both_views = True
    batch_norm = "sync"

    def __init__(self, backbone, *, hidden_dim, embedding_dim, temperature, momentum):
        super().__init__()
        self.backbone = backbone
        layers = (hidden_dim,) * (
            2 if hasattr(backbone, "patch_embed") else 1
        )  # section 3: 3 layers for ViT, 2 for ResNet
        norm = dict(last_norm=True, affine=False)
        self.projector = mlp(backbone.num_features, *layers, embedding_dim, **norm)
        self.predictor = mlp(embedding_dim, hidden_dim, embedding_dim, **(norm if len(layers) == 2 else {}))
        if hasattr(backbone, "patch_embed"):
            backbone.patch_embed.requires_grad_(False)  # section 4.2: a fixed patch projection trains stably
        self.key_encoder = deepcopy(nn.Sequential(backbone, self.projector)).requires_grad_(False)  # f_k
        self.temperature, self.momentum = temperature, momentum

    def forward(self, a, b, mixture=None, sim=True):
        with torch.no_grad():
            keys = self.key_encoder(b), self.key_encoder(a)  # of the other view
        sim_loss, bsim_loss = None, None
        if sim:
            sim_loss, q = self.loss((a, b), keys)
        if mixture:
            mixed = mixture.images.chunk(2, dim=1)  # m_a and m_b: mixed alike
            bsim_loss, q = self.loss(mixed, keys, mixture.weight, mixture.partner)
        return Losses(sim_loss, bsim_loss, q)

    def loss(self, images, keys, weight=None, partner=None):
        queries = [self.predictor(self.projector(self.backbone(x))) for x in images]
        loss = 0
        for q, k in zip(queries, keys):  # algorithm 1: ctr(q1, k2) + ctr(q2, k1), each times 2 t
            others = gather_others(k)  # the keys of the other processes
            others = k[:0] if others is None else others
            joint = dict(weight=weight, partner=partner, in_batch=True)
            loss = loss + 2 * self.temperature * info_nce(q, k, others, self.temperature, **joint)
        return loss, torch.cat(queries)

    def after_step(self, progress):
        momentum = cosine(self.momentum, 1.0, progress)  # section 3
        moving_average(self.key_encoder, nn.Sequential(self.backbone, self.projector), momentum)
