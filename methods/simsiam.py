"""SimSiam: BYOL without the slow copy. The target is the same network, with a stop-gradient.

Chen and He, "Exploring simple Siamese representation learning", CVPR 2021, arXiv 2011.10566.
"""

import torch
from torch import nn

from bsim import ViewRecipe, negative_cosine
from methods.networks import SMALL_STEM, Losses, mlp


def defaults(*, image_size, width, steps, images):
    small = image_size <= SMALL_STEM
    return dict(
        optimizer="sgd",  # section 3
        lr=0.4 if small else 0.05,  # for each 256 images of a batch: section 3; small images: ours, docs/study.md
        weight_decay=5e-4 if small else 1e-4,  # section 3; appendix D for small images
        warmup_epochs=1.0 if small else 0.0,  # none published at batch 512
        hidden_dim=width,  # section 3; 2048, 2048 and 512 for ResNet-50
        embedding_dim=width,
        predictor_dim=max(1, width // 4),
    )


def views(image_size):
    """Appendix A: the recipe's own defaults; no blur for small images (appendix D)."""
    recipe = ViewRecipe(image_size, blur=0.0 if image_size <= SMALL_STEM else 0.5)
    return recipe, recipe


class Method(nn.Module):
    both_views = True
    batch_norm = "sync"  # section 3
    constant_lr = "predictor"  # section 4.2 and the published code: its learning rate does not decay

    def __init__(self, backbone, *, hidden_dim, embedding_dim, predictor_dim):
        super().__init__()
        width = backbone.num_features
        self.backbone = backbone
        self.projector = mlp(width, hidden_dim, hidden_dim, embedding_dim, last_norm=True, affine=False)
        self.predictor = mlp(embedding_dim, predictor_dim, embedding_dim)  # h

    def encode(self, images):
        return self.projector(self.backbone(images))  # f

    def forward(self, a, b, mixture=None, sim=True):
        with torch.set_grad_enabled(sim and torch.is_grad_enabled()):
            z = self.encode(torch.cat([a, b]))
        targets = z.chunk(2)[::-1]  # z_2 for view a, z_1 for view b; the loss stops the gradient
        losses = Losses(self.loss(z, targets) if sim else None, None, z)
        if mixture:
            mixed = self.encode(torch.cat(mixture.images.chunk(2, dim=1)))  # m_a, then m_b: mixed alike
            bsim = self.loss(mixed, targets, mixture.weight, mixture.partner)
            losses = losses._replace(bsim=bsim, embeddings=mixed)
        return losses

    def loss(self, z, targets, weight=None, partner=None):
        p = self.predictor(z).chunk(2)
        return sum(negative_cosine(*pair, weight=weight, partner=partner) for pair in zip(p, targets)) / 2  # equation 2

    def after_step(self, progress):
        pass
