"""BSIM's published siblings on MoCo, and BSIM with the mixture on the other side, as methods to compare it with.

    python benchmarks/siblings.py pretrain --method imix --mix mixup --sim_weight 0.5 --out runs/imix
    python benchmarks/siblings.py linear --run runs/imix

The first word is pretrain, knn, linear or geometry; the flags are those of bsim.py and of eval.knn, eval.linear and
eval.geometry. The methods are imix, unmix, mixco and keymix: MoCo with another term for the mixtures, from the same
defaults. --mix and --alpha draw their mixtures as they draw BSIM's, so by themselves only the term differs. Published
on small images, all with Beta(1, 1): i-Mix and MixCo --mix mixup, Un-Mix --mix either.

What is trained is sim_weight x SIM + (1 - sim_weight) x mixture term: with --sim_weight 0.5 half of SIM + mixture term
for all of them. That sum is what Un-Mix and MixCo publish; i-Mix publishes its term alone, --sim_weight 0.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import bsim  # noqa: E402
import flags  # noqa: E402
from bsim import info_nce  # noqa: E402
from eval.geometry import geometry  # noqa: E402
from eval.knn import knn  # noqa: E402
from eval.linear import linear  # noqa: E402
from methods import METHODS, moco  # noqa: E402
from methods.networks import SMALL_STEM, Losses  # noqa: E402
from train import pretrain  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# The losses.


def imix(
    queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float = 0.2, *, weight: Tensor, partner: Tensor
) -> Tensor:
    """i-Mix's loss on MoCo (Lee et al., ICLR 2021, arXiv 2010.08887; kibok90/imix, builder.py, `mocon`).

    queries: [N, D] float, embeddings of the mixtures. keys: [N, D], of the second views. negatives: [K, D], the queue.
    weight: [N] float in [0, 1]. partner: [N] int64, a permutation. Nothing need be normalised; keys and negatives get
    no gradient.

    The mean over n of -(w_n log p_n(b_n) + (1 - w_n) log p_n(b_p(n))), where p_n is the softmax of m_n.k / temperature
    over all N + K keys k. The published code folds the drawn w to [1/2, 1]; in mixup, where w and 1 - w name the same
    mixture, that changes no expectation. Scalar, float32 or float64. Raises ValueError for other shapes or ranges.
    """
    return info_nce(queries, keys, negatives, temperature, weight=weight, partner=partner, in_batch=True)


def mixco(
    queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float = 0.05, *, weight: Tensor, partner: Tensor
) -> Tensor:
    """MixCo's loss of mixtures on MoCo (Kim et al., 2020, arXiv 2010.06300; moco/models/encoder.py).

    The arguments, the equation and what raises are `imix`'s; what differs is the temperature, the mixtures' own: by
    the published code 0.05, for ImageNet 1. That code mixes the halves of a batch, N / 2 mixtures; here all N images
    are mixed, as for the others, which has the same expectation.
    """
    return imix(queries, keys, negatives, temperature, weight=weight, partner=partner)


def unmix(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float = 0.2, *, weight: Tensor) -> Tensor:
    """Un-Mix's loss of mixtures on MoCo (Shen et al., AAAI 2022, arXiv 2003.05438): the batch with itself reversed.

    queries: [N, D] float, embeddings of the mixtures m_n of a_n and a_N+1-n. keys: [N, D], of the second views.
    negatives: [K, D], the queue. weight: [] float in [0, 1], one share for the batch. Nothing need be normalised; keys
    and negatives get no gradient.

    w L(m, b) + (1 - w) L(reversed m, b) with L = MoCo's loss. The mixtures are in the branch with gradients, as in the
    published code for MoCo on CIFAR and on ImageNet (szq0214/Un-Mix). It is BSIM's info_nce of this partner and share:
    one is the other summed in another order. Scalar, float32 or float64. Raises ValueError for other shapes or ranges.
    """
    if weight.dim():
        raise ValueError(f"weight: got shape {list(weight.shape)}, want [], one share for the batch")
    reverse = _reverse(len(queries), queries.device)
    return info_nce(queries, keys, negatives, temperature, weight=weight.expand(len(queries)), partner=reverse)


def keymix(
    queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float = 0.2, *, weight: Tensor, partner: Tensor
) -> Tensor:
    """BSIM's info_nce with the mixture in the momentum branch: clean queries, keys of mixtures.

    queries: [N, D] float, embeddings of the first views a. keys: [N, D], of the mixtures m of the second views.
    negatives: [K, D], the queue. weight: [N] float in [0, 1]. partner: [N] int64, a permutation. Nothing need be
    normalised; keys and negatives get no gradient.

    The mean over n of w_n l(a_n, m_n) + (1 - w_n) l(a_p(n), m_n), with l as in info_nce: every mixture counts once, as
    there, and what is compared is the same, so that only the side of the gradient differs. (To normalise the targets
    of each query instead, as nt_xent does, would also weigh the pairs anew.) Scalar, float32 or float64. Raises
    ValueError for other shapes or ranges.
    """
    bsim._check_embeddings(queries=queries, keys=keys)
    bsim._check_temperature(temperature)
    bsim._check_negatives(negatives, queries)
    with bsim._exact(queries):
        queries, keys = bsim._unit(queries), bsim._unit(keys.detach())
        weight, partner = bsim._pairing(weight, partner, queries)
        elsewhere = bsim._spread(queries, negatives.detach(), temperature)

        def each(queries, elsewhere):
            return -F.logsigmoid((queries * keys).sum(1) / temperature - elsewhere)

        other = each(queries[partner], elsewhere[partner])
        return (weight * each(queries, elsewhere) + (1 - weight) * other).mean()


# ---------------------------------------------------------------------------------------------------------------------
# The methods. In-batch keys are those of a process: each has its own.


class IMix(moco.Method):
    def mixed_loss(self, q, k, weight, partner):
        return imix(q, k, self.queue, self.temperature, weight=weight, partner=partner)


class UnMix(moco.Method):
    def mixed_loss(self, q, k, weight, partner):
        return unmix(q, k, self.queue, self.temperature, weight=weight[0])


class MixCo(moco.Method):
    def __init__(self, backbone, *, mix_temperature, **heads):
        super().__init__(backbone, **heads)
        self.mix_temperature = mix_temperature

    def mixed_loss(self, q, k, weight, partner):
        return mixco(q, k, self.queue, self.mix_temperature, weight=weight, partner=partner)


class KeyMix(moco.Method):
    both_views = True  # the mixture of the second views takes their place: a query must not meet its own pixels

    def forward(self, a, b, mixture=None, sim=True):
        q, k, sim_loss, bsim_loss = self.queries(a), self.keys(b), None, None
        if sim:
            sim_loss = info_nce(q, k, self.queue, self.temperature)
        if mixture:
            images, weight, partner = mixture
            m = self.keys(images.chunk(2, 1)[1])
            bsim_loss = keymix(q, m, self.queue, self.temperature, weight=weight, partner=partner)
        if self.training:
            self.fresh.append(k)  # the clean keys: with mixtures in the queue the negatives would change as well
        return Losses(sim_loss, bsim_loss, q)


def _reverse(n, device=None):
    return torch.arange(n - 1, -1, -1, device=device)


def reversed_mixture(views, *, kind, alpha, per_sample, generator):
    """Un-Mix's: each image with the one at its place from the batch's end, one share for all, whatever `per_sample`."""
    reverse = _reverse(len(views))
    return bsim.sample_mixture(views, kind=kind, alpha=alpha, per_sample=False, partner=reverse, generator=generator)


def mixco_defaults(*, image_size, **scale):
    temperature = 0.05 if image_size <= SMALL_STEM else 1.0
    return moco.defaults(image_size=image_size, **scale) | {"mix_temperature": temperature}


def _sibling(method, defaults=moco.defaults, **more):
    return SimpleNamespace(Method=method, defaults=defaults, views=moco.views, **more)


SIBLINGS = {
    "imix": _sibling(IMix),
    "unmix": _sibling(UnMix, sample_mixture=reversed_mixture),
    "mixco": _sibling(MixCo, mixco_defaults),
    "keymix": _sibling(KeyMix),
}
COMMANDS = {"pretrain": pretrain, "knn": knn, "linear": linear, "geometry": geometry}


def main(methods=SIBLINGS):
    word = sys.argv.pop(1) if len(sys.argv) > 1 else "nothing"
    if word in ("--help", "-h"):
        print(__doc__)
        return
    if word not in COMMANDS:
        print(f"siblings.py: got {word}, want {', '.join(COMMANDS)}, and then its flags", file=sys.stderr)
        sys.exit(2)
    METHODS.update(methods)
    flags.launch(COMMANDS[word], f"siblings.py {word}")


if __name__ == "__main__":
    main()
