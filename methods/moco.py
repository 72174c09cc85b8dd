"""MoCo v2: a query attracts its key from a slow encoder, and a queue of earlier keys repels it.

He et al., "Momentum contrast", CVPR 2020, arXiv 1911.05722; Chen et al., "Improved baselines with momentum contrastive
learning" (v2), arXiv 2003.04297.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn

from bsim import ViewRecipe, info_nce
from methods.networks import SMALL_STEM, Losses, deal, deal_back, gather, mlp, moving_average


def defaults(*, image_size, width, steps, images):
    small = image_size <= SMALL_STEM
    return dict(
        optimizer="sgd",  # section 3.3
        lr=0.12 if small else 0.03,  # for each 256 images of a batch: section 3.3; small images: ours, docs/study.md
        weight_decay=5e-4 if small else 1e-4,  # section 3.3; small images: ours
        warmup_epochs=1.0 if small else 0.0,
        temperature=0.2,  # v2, table 1; small images: 0.1 gains in k-NN, hardly in linear (docs/study.md)
        momentum=min(0.999, max(0.9, 1 - 10 / steps)),  # section 3.3; in short runs a memory of a tenth of the run
        # Section 3.3, but no longer than half the images: else keys of the same image would be its negatives.
        queue=max(1, min(4096 if small else 65536, (images or 1 << 30) // 2)),
        hidden_dim=width,  # v2, section 2; 2048 for ResNet-50
        embedding_dim=128,  # section 3.3
    )


def views(image_size):
    """v2, section 2: the recipe's own defaults; no blur for small images."""
    recipe = ViewRecipe(image_size, blur=0.0 if image_size <= SMALL_STEM else 0.5)
    return recipe, recipe


class Method(nn.Module):
    momentum_backbone = "key_encoder.0."  # where a checkpoint has the slow copy
    both_views = False
    queue: torch.Tensor  # [queue, embedding_dim], unit rows
    oldest: torch.Tensor  # [], int64: the row that is replaced next
    batch_norm = "shuffle"  # section 3.3: a key's batch statistics are not its query's, which would give it away

    def __init__(self, backbone, *, hidden_dim, embedding_dim, temperature, momentum, queue):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.num_features, hidden_dim, embedding_dim, norm=False)
        self.key_encoder = deepcopy(nn.Sequential(backbone, self.projector)).requires_grad_(False)  # f_k
        self.temperature, self.momentum = temperature, momentum
        self.register_buffer("queue", F.normalize(torch.randn(queue, embedding_dim), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))
        self.fresh: list[torch.Tensor] = []

    def forward(self, a, b, mixture=None, sim=True):
        k, sim_loss, bsim_loss = self.keys(b), None, None
        if sim:
            q = self.queries(a)
            sim_loss = info_nce(q, k, self.queue, self.temperature)
        if mixture:
            q = self.queries(mixture.images)
            bsim_loss = self.mixed_loss(q, k, mixture.weight, mixture.partner)
        if self.training:
            self.fresh.append(k)  # queued after the step: backward still needs the queue as it was
        return Losses(sim_loss, bsim_loss, q)

    def queries(self, x):
        return self.projector(self.backbone(x))  # q = f_q(x^q)

    @torch.no_grad()
    def keys(self, x):
        k = deal_back(self.key_encoder(deal(x))) if self.batch_norm == "shuffle" else self.key_encoder(x)
        return F.normalize(k.float(), dim=1)

    def mixed_loss(self, q, k, weight, partner):
        return info_nce(q, k, self.queue, self.temperature, weight=weight, partner=partner)

    @torch.no_grad()
    def after_step(self, progress):
        moving_average(self.key_encoder, nn.Sequential(self.backbone, self.projector), self.momentum)  # equation 2
        for k in self.fresh:
            keys = gather(k)[-len(self.queue) :]
            rows = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.queue)
            self.queue[rows] = keys
            self.oldest.copy_((self.oldest + len(keys)) % len(self.queue))
        self.fresh = []
