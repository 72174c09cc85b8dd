"""The table of methods: one file and one row each. A method's file has

defaults(image_size, width, steps, images) -> dict    every setting with its value, for these images, this
                                                      backbone's width, and a run of so many steps and images; where
                                                      it also takes `network`, that is the backbone itself
views(image_size) -> (ViewRecipe, ViewRecipe)         how the two views a and b are drawn
Method(backbone, **head settings)                     an nn.Module, called as method(a, b, mixture, sim) -> Losses;
                                                      `both_views`: whether the mixture stacks a and b as channels;
                                                      `batch_norm`: sync, shuffle or local over several processes;
                                                      `after_step(progress)`: what follows an optimiser step

and may have

sample_mixture(views, *, kind, alpha, per_sample, generator) -> Mixture    in place of the core's
"""

import methods.byol
import methods.moco
import methods.mocov3
import methods.simclr
import methods.simsiam

METHODS = {
    "simclr": methods.simclr,
    "moco": methods.moco,
    "mocov3": methods.mocov3,
    "byol": methods.byol,
    "simsiam": methods.simsiam,
}
