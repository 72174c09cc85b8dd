"""SimCLR: two views of an image attract, all other images of the batch repel.

Chen et al., "A simple framework for contrastive learning of visual representations", ICML 2020, arXiv 2002.05709.
"""

import torch
from torch import nn

from bsim import ViewRecipe, nt_xent
from methods.networks import SMALL_STEM, Losses, gather_others, mlp


def defaults(*, image_size, width, steps, images):
    heads = dict(hidden_dim=width, embedding_dim=128)  # section 2.1 and appendix B.6; 2048 and 128 for ResNet-50
    if image_size <= SMALL_STEM:  # ours, measured: docs/study.md
        return dict(optimizer="sgd", lr=0.12, weight_decay=5e-4, warmup_epochs=1.0, temperature=0.2, **heads)
    return dict(
        optimizer="lars",  # section 2.2
        lr=0.3,  # for each 256 images of a batch: appendix B.1
        weight_decay=1e-6,  # section 2.3
        warmup_epochs=10.0,  # section 2.3, then cosine
        temperature=0.1,  # table 5
        **heads,
    )


def views(image_size):
    """Appendix A: colour strength 1 and blur half the time; appendix B.9: strength 0.5 and no blur for small images."""
    if image_size <= SMALL_STEM:
        recipe = ViewRecipe(image_size, blur=0.0)
    else:
        recipe = ViewRecipe(image_size, scale=(0.08, 1), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
    return recipe, recipe


class Method(nn.Module):
    both_views = False
    batch_norm = "sync"  # section 2.2, "Global BN"
    mix_until = 0.75  # ours, of pure BSIM: the last quarter has plain pairs (docs/study.md)

    def __init__(self, backbone, *, hidden_dim, embedding_dim, temperature):
        super().__init__()
        self.backbone = backbone  # f
        self.projector = mlp(backbone.num_features, hidden_dim, embedding_dim, last_norm=True)  # g
        self.temperature = temperature

    def forward(self, a, b, mixture=None, sim=True):
        if mixture and not sim:
            # Apart, so that clean views have batch statistics of their own: measured to be better (docs/study.md).
            z_m, z_b = (self.projector(self.backbone(x)) for x in (mixture.images, b))
            return Losses(None, self.loss(z_m, z_b, mixture.weight, mixture.partner), z_b)
        first = [a] + ([mixture.images] if mixture else [])
        z = self.projector(self.backbone(torch.cat([*first, b])))  # one pass: z = g(f(x)) of every view
        *firsts, z_b = z.split(len(b))
        losses = Losses(self.loss(firsts[0], z_b), None, z_b)
        if mixture:
            losses = losses._replace(bsim=self.loss(firsts[-1], z_b, mixture.weight, mixture.partner))
        return losses

    def loss(self, a, b, weight=None, partner=None):
        others = gather_others(torch.cat([a, b]))  # the candidates of the other processes
        return nt_xent(a, b, self.temperature, weight=weight, partner=partner, negatives=others)

    def after_step(self, progress):
        pass
