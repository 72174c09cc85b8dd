"""BSIM: mix two images and learn how similar the mixture is to each, in the proportion of the mix.

The whole idea as pure functions of tensors: views, mixtures, joint-similarity losses, and two measures of the sphere.
Copy any of them, with the helpers above it in its section, into your own code: nothing else is needed.

Paper: Chu, Zhan and Wei, "Beyond Single Instance Multi-view Unsupervised Representation Learning", arXiv 2011.13356;
Chu, Zhan and Zhang, "A Unified Mixture-View Framework for Unsupervised Representation Learning", BMVC 2022.
Where the abstract is silent the definitions are ours; docs/paper.md says which.

Randomness is an argument: every function that draws takes a `torch.Generator`, and none touches global state. A CPU
generator gives the same draws whatever device the images are on, and drawing never waits for an accelerator.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# Mixtures, and the losses that take them.


class Mixture(NamedTuple):
    """A batch of mixtures: `images[n]` holds the share `weight[n]` of image n, the rest is of image `partner[n]`."""

    images: Tensor  # [N, C, H, W], the input's dtype
    weight: Tensor  # [N] float32 in [0, 1]
    partner: Tensor  # [N] int64, a permutation of range(N)


def _check_images(images):
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(f"images: got shape {list(images.shape)}, want [N, C, H, W], none of them 0")


def _readable(tensor):
    # Looking at values makes the host wait for an accelerator and breaks a compiled graph; shapes are always checked.
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _to(x, like, dtype=None):
    """x on the device of `like`. What comes from the host is not waited for: that would end all overlap."""
    return x.to(like.device, dtype or x.dtype, non_blocking=x.device.type == "cpu")


def _check_share(name, share, n):
    if share.shape != (n,) or not share.is_floating_point():
        raise ValueError(f"{name}: got {share.dtype} of shape {list(share.shape)}, want a float tensor of shape [{n}]")
    if _readable(share) and not ((share >= 0) & (share <= 1)).all():
        raise ValueError(f"{name}: got values from {share.min():g} to {share.max():g}, want shares in [0, 1]")


def _check_partner(partner, n):
    if partner.shape != (n,) or partner.dtype != torch.int64:
        got = f"{partner.dtype} of shape {list(partner.shape)}"
        raise ValueError(f"partner: got {got}, want an int64 tensor of shape [{n}]")
    if _readable(partner) and not torch.equal(partner.sort().values, torch.arange(n)):
        raise ValueError(f"partner: got {partner.tolist()[:8]}..., want a permutation of range({n})")


def mixup(images: Tensor, weight: Tensor, partner: Tensor) -> Mixture:
    """m_n = w_n x_n + (1 - w_n) x_p(n) (Zhang et al., 2018, section 2).

    images: [N, C, H, W], float or integer (rounded). weight: [N] float in [0, 1]. partner: [N] int64, a permutation.
    Mixes in at least float32, integers of 32 and 64 bits in float64, and returns the dtype of `images`.
    Raises ValueError for other shapes or ranges, and for integers beyond 2^53, which float64 does not hold.
    """
    _check_images(images)
    if images.dtype in (torch.uint16, torch.uint32, torch.uint64):  # of which torch has few operations
        raise ValueError(f"images: got {images.dtype}, want floats, uint8, or signed integers")
    wide = not images.is_floating_point() and images.dtype.itemsize > 2  # float32 is exact up to 2^24
    if images.dtype.itemsize == 8 and wide and _readable(images):
        low, high = images.aminmax()
        if low < -(2**53) or high > 2**53:
            raise ValueError(f"images: got {images.dtype} from {low} to {high}, want integers of up to 2^53 in size")
    _check_share("weight", weight, len(images))
    _check_partner(partner, len(images))
    weight, partner = _to(weight, images, torch.float32), _to(partner, images)
    share = weight.view(-1, 1, 1, 1).to(torch.float64 if wide else torch.float32)
    mixed = share * images + (1 - share) * images[partner]
    if not images.is_floating_point():
        mixed = mixed.round()
    return Mixture(mixed.to(images.dtype), weight, partner)


def cutmix(images: Tensor, share: Tensor, partner: Tensor, *, generator: torch.Generator) -> Mixture:
    """x_n with one box replaced by the same box of x_p(n) (Yun et al., 2019, section 3.1).

    images: [N, C, H, W] of any dtype. share: [N] float in [0, 1], one box an image; or [] for one share and one box
    for the whole batch. partner: [N] int64, a permutation. The box has the sides sqrt(1 - share) of the image's and a
    centre drawn from the whole image, is rounded to pixels and clipped at the border; the weight that is returned is
    the area that really remained of x_n. A share of 0 or 1 is exact. Raises ValueError for other shapes or ranges.
    """
    _check_images(images)
    n, _, height, width = images.shape
    drawn = share.reshape(1) if share.dim() == 0 else share
    _check_share("share", drawn, len(drawn) if share.dim() == 0 else n)
    _check_partner(partner, n)
    device = generator.device
    drawn = drawn.to(device, torch.float32)

    def span(size):
        length = (size * (1 - drawn).sqrt()).round().long()
        centre = (size * torch.rand(len(drawn), generator=generator, device=device)).long()
        start, stop = (centre - length // 2).clamp(min=0), (centre - length // 2 + length).clamp(max=size)
        whole = drawn == 0  # a box of the whole image has only one place to be
        return start.masked_fill(whole, 0), stop.masked_fill(whole, size)

    top, bottom = span(height)
    left, right = span(width)
    area = (bottom - top).clamp(min=0) * (right - left).clamp(min=0)
    weight = (height * width - area).float() / (height * width)

    box = _to(torch.stack([top, bottom, left, right], 1), images)[:, :, None]
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    rows, columns = (y >= box[:, 0]) & (y < box[:, 1]), (x >= box[:, 2]) & (x < box[:, 3])
    inside = rearrange(rows, "n h -> n 1 h 1") & rearrange(columns, "n w -> n 1 1 w")
    partner = _to(partner, images)
    return Mixture(torch.where(inside, images[partner], images), _to(weight, images).expand(n), partner)


def sample_mixture(
    images: Tensor,
    *,
    kind: str = "cutmix",
    alpha: float = 1.0,
    per_sample: bool = True,
    partner: Tensor | None = None,
    generator: torch.Generator,
) -> Mixture:
    """Draw partners and shares, and mix: shares from Beta(alpha, alpha), partners on one random cycle of the batch.

    images: [N, C, H, W]. kind: "cutmix", "mixup" or "either" (a fair coin). per_sample: one share (and box, and coin)
    an image, or one for the whole batch. A cycle never pairs an image with itself (N > 1): the idea is to mix two
    *different* images. partner: [N] int64, a permutation, in place of the cycle; all else is drawn as without it. To
    mix two views alike, stack them along the channels. Raises ValueError for another kind, alpha <= 0, another shape,
    or a partner that is no permutation.
    """
    _check_images(images)
    if kind not in ("cutmix", "mixup", "either"):
        raise ValueError(f"kind: got {kind!r}, want 'cutmix', 'mixup' or 'either'")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha: got {alpha}, want a number above 0")
    n, device = len(images), generator.device
    if partner is not None:
        _check_partner(partner, n)

    def uniform():
        return torch.rand(n if per_sample else 1, generator=generator, device=device, dtype=torch.float64)

    order = torch.randperm(n, generator=generator, device=device)  # for a given partner too: the rest is drawn alike
    if partner is None:
        partner = torch.empty_like(order)
        partner[order] = order.roll(1)
    # Beta(alpha, alpha) from two uniforms and no rejection: 1/2 + t / 2 sqrt(1 + t^2), where t sqrt(2 alpha) follows
    # Student's law of 2 alpha degrees of freedom, drawn by Bailey's polar method (Math. Comp. 62, 1994).
    u, cosine = uniform().pow(1 / alpha), torch.cos(2 * math.pi * uniform())
    share = (0.5 + 0.5 * cosine * ((1 - u) / (u + (1 - u) * cosine**2)).sqrt()).clamp(0, 1).float()
    if kind == "mixup":
        return mixup(images, share.expand(n), partner)
    cut = cutmix(images, share if per_sample else share[0], partner, generator=generator)
    if kind == "cutmix":
        return cut
    blend = mixup(images, share.expand(n), partner)
    coin = _to(uniform() < 0.5, images)
    chosen = torch.where(coin.view(-1, 1, 1, 1), cut.images, blend.images)
    return Mixture(chosen, torch.where(coin, cut.weight, blend.weight), cut.partner)


def _check_embeddings(**named):
    (first, reference), *others = named.items()
    for name, x in named.items():
        if x.dim() != 2 or len(x) == 0 or not x.is_floating_point():
            raise ValueError(f"{name}: got {x.dtype} of shape {list(x.shape)}, want a float tensor of shape [N, D]")
    for name, x in others:
        if x.shape != reference.shape:
            wanted = f"{list(reference.shape)} as {first} has"
            raise ValueError(f"{name}: got shape {list(x.shape)}, want {wanted}")


def _check_negatives(negatives, like):
    if negatives.dim() != 2 or negatives.shape[1] != like.shape[1]:
        raise ValueError(f"negatives: got shape {list(negatives.shape)}, want [K, {like.shape[1]}]")
    if not negatives.is_floating_point():
        raise ValueError(f"negatives: got {negatives.dtype}, want a float tensor")


def _check_temperature(temperature):
    if isinstance(temperature, Tensor):
        if _readable(temperature) and not ((temperature > 0) & (temperature < math.inf)).all():
            raise ValueError(f"temperature: got {temperature.detach()}, want numbers above 0")
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, want a number above 0")


def _pairing(weight, partner, like):
    """None, or the checked (weight, partner) with the weight in the precision of the embeddings `like`."""
    if (weight is None) != (partner is None):
        missing, given = ("weight", "partner") if weight is None else ("partner", "weight")
        raise ValueError(f"{missing}: got None beside a {given}; a mixture has both, pass both or neither")
    if weight is None:
        return None
    _check_share("weight", weight, len(like))
    _check_partner(partner, len(like))
    return _to(weight, like, like.dtype), _to(partner, like)


def _unit(x, dtype=torch.float32):
    """Rows of length 1, in `dtype` at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, dtype)), dim=1)


def _exact(x):
    # Autocast would compute even float32 products in half precision.
    return torch.autocast(x.device.type, enabled=False)


# log-sum-exps of similarities, without the whole matrix. A tile fits the cache of a CPU; a GPU wants larger ones, and
# so do several threads, which wait for the slowest of them at the end of every tile.
WHOLE, TILE, GPU_TILE = 1 << 18, 512, 8192


def _whole(rows, columns, temperature):
    """Whether to hold the matrix: it is small, or e^(1 / temperature) beyond e^40, or the temperature is learnt."""
    return rows * columns <= WHOLE or isinstance(temperature, Tensor) or temperature < 0.025


def _side(x):
    several = not torch.compiler.is_compiling() and torch.get_num_threads() > 1
    return TILE * (1 + several) if x.device.type == "cpu" else GPU_TILE


def _parts(n, size):
    return [slice(i, i + size) for i in range(0, n, size)]


class _SelfSpread(torch.autograd.Function):
    """log sum over j != i of e^(x_i . x_j), [N], for x [N, D] with |x_i|^2 <= 40; and the sums, which float32 holds.

    A tile and its mirror image are computed once, forward and again backward; memory grows with N. A gradient that is
    to be differentiated again (create_graph, torch.func) is taken of the whole matrix.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        sums, parts = x.new_zeros(len(x)), _parts(len(x), _side(x))
        for number, i in enumerate(parts):
            for j in parts[number:]:
                e = _exponentials(x[i], x[j], i == j)
                sums[i] += e.sum(1)
                if i != j:
                    sums[j] += e.sum(0)
        return sums.log(), sums

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        x, sums = ctx.saved_tensors
        with _exact(x):
            if torch.is_grad_enabled():
                pull = grad[:, None] * _without_itself(x @ x.T).softmax(1)
                return (pull + pull.T) @ x
            return _SelfSpread.tiled(x, grad / sums)

    @staticmethod
    def tiled(x, share):
        found, parts = torch.zeros_like(x), _parts(len(x), _side(x))
        for number, i in enumerate(parts):
            for j in parts[number:]:
                e = _exponentials(x[i], x[j], i == j)
                e *= share[i, None] + share[j]
                found[i].addmm_(e, x[j])
                if i != j:
                    found[j].addmm_(e.T, x[i])
        return found


class _Spread(torch.autograd.Function):
    """log sum over j of e^(scale x_i . y_j), [N], for x [N, D] of unit rows and y [K, D], whose rows are made unit.

    Also returns the sums, and the mean of the y_j by these weights, [N, D], which is the gradient of x. Where y has a
    gradient its rows are unit already; it is computed by tiles, or of the whole matrix where it is to be
    differentiated again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y, scale):
        sums, pull, scaled = x.new_zeros(len(x)), torch.zeros_like(x), scale * x
        for i, j in _Spread.tiles(x, y):
            unit = _unit(y[j], x.dtype)
            e = _exponentials(scaled[i], unit)
            sums[i] += e.sum(1)
            pull[i] += e @ unit
            del e, unit  # before the next are made
        return sums.log(), sums, pull / sums[:, None]

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, ctx.scale = inputs
        ctx.save_for_backward(x, y, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, grad, *_):
        (x, y, sums, mean), scale, of_y = ctx.saved_tensors, ctx.scale, None
        with _exact(x):
            if torch.is_grad_enabled():
                unit = y if ctx.needs_input_grad[1] else _unit(y, x.dtype)
                pull = scale * grad[:, None] * (scale * x @ unit.T).softmax(1)
                return pull @ unit, pull.T @ x if ctx.needs_input_grad[1] else None, None
            if ctx.needs_input_grad[1]:
                of_y, scaled, share = torch.zeros_like(y), scale * x, (grad / sums)[:, None]
                for i, j in _Spread.tiles(x, y):
                    of_y[j].addmm_(_exponentials(y[j], scaled[i]), share[i] * scaled[i])
            return scale * grad[:, None] * mean, of_y, None

    @staticmethod
    def tiles(x, y):
        """Square, but wide where x has few rows."""
        side = _side(x)
        wide = max(side, min(4 * side**2, GPU_TILE**2) // len(x))
        return [(i, j) for i in _parts(len(x), side) for j in _parts(len(y), wide)]


def _without_itself(scores):
    """Scores [N, N] with -inf on the diagonal."""
    return scores.masked_fill(torch.eye(len(scores), dtype=torch.bool, device=scores.device), -math.inf)


def _exponentials(x, y, same=False):
    """e^(x_i . y_j), 0 on the diagonal where x and y are the `same`."""
    e = (x @ y.T).exp_()
    if same:
        e.diagonal().zero_()  # which torch.func.vmap knows
    return e


def _spread_of_each(z, temperature):
    """log sum over j != i of e^(z_i . z_j / temperature), [N], for unit rows z [N, D]."""
    if not _whole(len(z), len(z), temperature):
        return _SelfSpread.apply(z * temperature**-0.5)[0]
    return _without_itself(z @ z.T / temperature).logsumexp(1)


def _spread(x, y, temperature):
    """log sum over j of e^(x_i . y_j / temperature), [N], for unit rows x [N, D], and y [K, D] as they are."""
    x = x.to(torch.promote_types(x.dtype, y.dtype))
    if not _whole(len(x), len(y), temperature):
        return _Spread.apply(x, _unit(y, x.dtype) if y.requires_grad else y, 1 / temperature)[0]
    return (x @ _unit(y, x.dtype).T / temperature).logsumexp(1)


def nt_xent(
    a: Tensor,
    b: Tensor,
    temperature: float = 0.5,
    *,
    weight: Tensor | None = None,
    partner: Tensor | None = None,
    negatives: Tensor | None = None,
) -> Tensor:
    """SimCLR's loss (Chen et al., 2020, equation 1); with `weight` and `partner`, its joint-similarity form.

    a: [N, D] float, embeddings of the first views, or of the mixtures m where `weight` is given. b: [N, D], of the
    second views. weight: [N] float in [0, 1]. partner: [N] int64, a permutation. negatives: [K, D], more candidates
    for every anchor (the embeddings of other processes; gradients flow into them). Nothing need be normalised.

    Each of the 2N rows of [a; b] is an anchor, all others its candidates; the mean of the cross-entropy between soft
    targets and softmax(cosine / temperature). m_n has the target w_n on b_n and 1 - w_n on b_p(n); seen from b_j that
    is w_j on m_j and 1 - w_q on m_q, p(q) = j, normalised to sum to 1 (a b_j that no mixture holds has no target and
    adds 0). Scalar, float32 or float64. Raises ValueError for other shapes or ranges.
    """
    _check_embeddings(a=a, b=b)
    _check_temperature(temperature)
    if negatives is not None:
        _check_negatives(negatives, a)
    with _exact(a):
        a, b = _unit(a), _unit(b)
        pairing = _pairing(weight, partner, a)
        z = torch.cat([a, b])
        spread = _spread_of_each(z, temperature)
        if negatives is not None:
            spread = torch.logaddexp(spread, _spread(z, negatives, temperature))
        own = (a * b).sum(1) / temperature
        if pairing is None:
            return (spread - own.repeat(2)).mean()
        weight, partner = pairing
        other = (a * b[partner]).sum(1) / temperature
        from_b = partner.argsort()  # q of each j: the mixture that b_j is the partner in
        rest = (1 - weight)[from_b]
        total = weight + rest
        norm = torch.where(total > 0, total, torch.ones_like(total))
        of_m = weight * own + (1 - weight) * other
        of_b = weight / norm * own + rest / norm * other[from_b]
        held = torch.cat([torch.ones_like(total), (total > 0).to(total.dtype)])
        return (held * spread - torch.cat([of_m, of_b])).mean()


def info_nce(
    queries: Tensor,
    keys: Tensor,
    negatives: Tensor,
    temperature: float = 0.2,
    *,
    weight: Tensor | None = None,
    partner: Tensor | None = None,
    in_batch: bool = False,
) -> Tensor:
    """MoCo's loss (He et al., 2020, equation 1); with `weight` and `partner`, its joint-similarity form.

    queries: [N, D] float, embeddings of the first views, or of the mixtures where `weight` is given. keys: [N, D], of
    the second views. negatives: [K, D], the queue. weight: [N] float in [0, 1]. partner: [N] int64, a permutation.
    in_batch: the batch's other keys are candidates too. Nothing need be normalised; keys and negatives get no gradient.

    The mean over n of w_n l(m_n, b_n) + (1 - w_n) l(m_n, b_p(n)), with
    l(q, k) = -log(e^(q.k/t) / (e^(q.k/t) + sum over negatives e^(q.neg/t))),
    whose denominator with `in_batch` is the sum over all N keys and the negatives (i-Mix; Lee et al., 2021).
    Scalar, float32 or float64. Raises ValueError for other shapes or ranges.
    """
    _check_embeddings(queries=queries, keys=keys)
    _check_temperature(temperature)
    _check_negatives(negatives, queries)
    with _exact(queries):
        queries, keys = _unit(queries), _unit(keys.detach())
        pairing = _pairing(weight, partner, queries)
        elsewhere = _spread(queries, negatives.detach(), temperature)
        everywhere = torch.logaddexp(elsewhere, _spread(queries, keys, temperature)) if in_batch else None

        def each(keys):  # l, one a row: -log sigmoid(positive - log-sum-exp of the negatives)
            positive = (queries * keys).sum(1) / temperature
            return everywhere - positive if in_batch else -F.logsigmoid(positive - elsewhere)

        if pairing is None:
            return each(keys).mean()
        weight, partner = pairing
        return (weight * each(keys) + (1 - weight) * each(keys[partner])).mean()


def negative_cosine(
    predictions: Tensor, targets: Tensor, *, weight: Tensor | None = None, partner: Tensor | None = None
) -> Tensor:
    """SimSiam's D (Chen and He, 2021, equation 1); with `weight` and `partner`, its joint-similarity form.

    predictions: [N, D] float, of the first views, or of the mixtures where `weight` is given. targets: [N, D], of the
    second views, no gradient. weight: [N] float in [0, 1]. partner: [N] int64, a permutation.

    The mean over n of -(w_n cos(m_n, b_n) + (1 - w_n) cos(m_n, b_p(n))). BYOL's loss (Grill et al., 2020, equation 2)
    is 2 + 2 x this. Scalar, float32 or float64. Raises ValueError for other shapes or ranges.
    """
    _check_embeddings(predictions=predictions, targets=targets)
    with _exact(predictions):
        predictions, targets = _unit(predictions), _unit(targets.detach())
        pairing = _pairing(weight, partner, predictions)
        own = (predictions * targets).sum(1)
        if pairing is None:
            return -own.mean()
        weight, partner = pairing
        other = (predictions * targets[partner]).sum(1)
        return -(weight * own + (1 - weight) * other).mean()


# ---------------------------------------------------------------------------------------------------------------------
# The sphere.


def _pair_of_unit(x, y):
    if x.dim() != 2 or x.shape != y.shape or len(x) == 0:
        raise ValueError(f"x, y: got shapes {list(x.shape)} and {list(y.shape)}, want [N, D] twice")
    return (F.normalize(v.to(torch.promote_types(v.dtype, torch.float32)), dim=1) for v in (x, y))


def alignment(x: Tensor, y: Tensor, power: float = 2) -> Tensor:
    """The mean of |x_n - y_n|^power over positive pairs on the unit sphere (Wang and Isola, 2020, section 4.1.1).

    x, y: [N, D] float, normalised here. Scalar >= 0; 0 is perfect. Raises ValueError for other shapes.
    """
    x, y = _pair_of_unit(x, y)
    return (x - y).norm(dim=1).pow(power).mean()


def uniformity(x: Tensor, t: float = 2) -> Tensor:
    """log of the mean of e^(-t |x_i - x_j|^2) over all pairs i < j (Wang and Isola, 2020, section 4.1.2).

    x: [N, D] float, N of 2 or more, normalised here. Scalar <= 0; lower is more uniform. Raises ValueError for other
    shapes. Without a gradient memory grows with N.
    """
    if x.dim() != 2 or len(x) < 2:
        raise ValueError(f"x: got shape {list(x.shape)}, want [N, D] with N of 2 or more")
    x, _ = _pair_of_unit(x, x)
    dtype = x.dtype
    if t > 20:  # e^(-4t) is no float32
        x = x.double()
    total, rows, weight = x.new_zeros(()), max(1, (1 << 22) // len(x)), (-t * x.pow(2).sum(1)).exp()
    with torch.autocast(x.device.type, enabled=False):
        for i in range(0, len(x), rows):
            part, rest = slice(i, i + rows), weight[i:].clone()
            rest[:rows] /= 2  # the pairs of these rows stand in the block twice
            scores = 2 * t * x[part] @ x[i:].T
            scores.diagonal().fill_(-math.inf)
            total = total + weight[part] @ (scores.exp_() @ rest)
    return (total.log() - math.log(len(x) * (len(x) - 1) / 2)).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Views. Operations take float images [N, 3, H, W] in [0, 1] and one parameter an image, and agree with
# torchvision.transforms.v2.functional where that takes the same parameter.


class ViewRecipe(NamedTuple):
    """How to draw a view: random-resized-crop, flip, colour jitter in a random order, grayscale, blur, solarize.

    The defaults are MoCo v2's and SimSiam's for ImageNet (Chen et al., 2020, "Improved baselines", section 2)."""

    size: int = 224  # the view's side in pixels
    scale: tuple[float, float] = (0.2, 1.0)  # the crop's area, as a share of the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # the crop's width / height
    flip: float = 0.5  # probabilities: flip, jitter, grayscale, blur, solarize
    jitter: float = 0.8
    brightness: float = 0.4  # strengths: a factor from 1 - s to 1 + s
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1  # a shift from -s to s, in turns of the colour circle
    grayscale: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # in pixels of the view
    solarize: float = 0.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    vertical_flip: float = 0.0  # probabilities, for images without an up and a down
    rotate90: float = 0.0  # of a turn by 90, 180 or 270 degrees, each as likely


def _column(parameter, images):
    return _beside(parameter, images, images.dtype).view(-1, 1, 1, 1)


def _beside(x, like, dtype=None):
    """As `_to`, so that this section can be pasted alone."""
    return x.to(like.device, dtype or x.dtype, non_blocking=x.device.type == "cpu")


def random_crop_box(n, height, width, scale, ratio, *, generator) -> Tensor:
    """[n, 4] int64 boxes (top, left, height, width), drawn as torchvision's RandomResizedCrop draws them.

    Ten tries an image, the first that fits inside, else the largest central box of an allowed ratio.
    """
    device = generator.device

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator, device=device)

    area = height * width * uniform(*scale, 10)
    aspect = uniform(math.log(ratio[0]), math.log(ratio[1]), 10).exp()
    sides = torch.stack([(area / aspect).sqrt().round(), (area * aspect).sqrt().round()], -1).long()
    limits = torch.tensor([height, width], device=device)
    fits = ((sides > 0) & (sides <= limits)).all(-1)
    first = fits.long().argmax(1)  # the first try that fits; 0 where none does
    own = width / height
    central = [height, width]
    if own < ratio[0]:
        central = [min(height, round(width / ratio[0])), width]
    elif own > ratio[1]:
        central = [height, min(width, round(height * ratio[1]))]
    fallback = torch.tensor(central, device=device).expand(n, 2)
    none_fits = ~fits.any(1, keepdim=True)
    sides = torch.where(none_fits, fallback, sides[torch.arange(n, device=device), first])
    room = limits - sides
    corner = torch.where(none_fits, room // 2, ((room + 1) * uniform(0, 1, 2)).long().minimum(room))
    return torch.cat([corner, sides], 1)


def _resampling(start, length, flip, source, target):
    """[N, target, source]: rows that resample [start, start + length) with a triangle filter, widened to shrink."""
    scale = length / target
    centre = start + scale * (torch.arange(target, device=start.device) + 0.5)
    centre = torch.where(flip, centre.flip(1), centre)[:, :, None]
    pixel = torch.arange(source, device=start.device) + 0.5
    weight = (1 - (pixel - centre).abs() / scale.clamp(min=1)[:, :, None]).clamp(min=0)
    inside = (pixel > start) & (pixel < start + length)
    weight = weight * inside[:, None]
    return weight / weight.sum(-1, keepdim=True)


def _by_products(images, box, size, flip):
    """As `resized_crop`, for accelerators: rows [N, size, H] @ images @ columns [N, size, W] transposed.

    The result's memory is [N, size, C, size]: so both are plain batched products, and no matrix is copied.
    """
    n, channels, height, width = images.shape
    box, flip = _beside(box, images, images.dtype)[:, :, None], _beside(flip, images)[:, None]
    rows = _resampling(box[:, 0], box[:, 2], torch.zeros_like(flip), height, size)
    columns = _resampling(box[:, 1], box[:, 3], flip, width, size)
    found = rows @ images.transpose(1, 2).reshape(n, height, channels * width)
    found = found.view(n, -1, width) @ columns.mT
    return found.view(n, -1, channels, columns.shape[1]).transpose(1, 2)


def _enlarged(images, box, size, flip):
    """As `resized_crop` where nothing shrinks: the triangle is two pixels wide, and the box's border is repeated."""
    box = box.to(images.dtype)
    start, length = box[:, :2, None], box[:, 2:, None]
    at = start + length * (torch.arange(size, device=box.device) + 0.5) / size
    at = at.maximum(start + 0.5).minimum(start + length - 0.5)
    y, x = (2 * at / box.new_tensor(images.shape[2:])[:, None] - 1).unbind(1)
    x = torch.where(flip[:, None], x.flip(1), x)
    grid = torch.stack([x[:, None].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], -1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _one_by_one(images, box, size, flip):
    found = []
    for image, (top, left, height, width), flipped in zip(images, box.long().tolist(), flip.tolist()):
        cut = image[None, :, top : top + height, left : left + width]
        cut = F.interpolate(cut, (size, size), mode="bilinear", antialias=True)
        found.append(cut.flip(3) if flipped else cut)
    return torch.cat(found)


def resized_crop(images: Tensor, box: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
    """Cut `box` [N, 4] (top, left, height, width) out of each image, resize it to size x size, flip where `flip` [N].

    Bilinear and antialiased: images [N, C, H, W] float to [N, C, size, size]. box: int64. flip: bool.
    """
    flip = torch.zeros(len(images), dtype=torch.bool) if flip is None else flip
    if box.device.type != "cpu" or images.device.type != "cpu":
        return _by_products(images, box, size, flip)
    enlarges = bool((box[:, 2:] <= size).all())
    return (_enlarged if enlarges else _one_by_one)(images, box, size, flip)


def grayscale(images: Tensor) -> Tensor:
    """Luma (ITU-R 601) in all three channels."""
    return _luma(images).repeat(1, 3, 1, 1)


def _luma(images):
    red, green, blue = images.split(1, 1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Times `factor` [N], clipped to [0, 1]."""
    return (images * _column(factor, images)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """From the mean luma of the image (factor 0) to the image (1) and beyond, clipped to [0, 1]."""
    factor, mean = _column(factor, images), _luma(images.mean((2, 3), keepdim=True))
    return (images * factor).add_((1 - factor) * mean).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """From the luma (factor 0) to the image (1) and beyond, clipped to [0, 1]."""
    factor = _column(factor, images)
    return (images * factor).add_((1 - factor) * _luma(images)).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` [N] of the colour circle, in HSV."""
    red, green, blue = images.split(1, 1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # Which channel is the largest, as 0 or 1: on a CPU torch.where takes twenty times as long as a product.
    channels, largest = images.detach().split(1, 1), value.detach()
    is_red, is_green = (torch.eq(channel, largest, out=torch.empty_like(largest)) for channel in channels[:2])
    is_green *= 1 - is_red
    is_blue = 1 - is_red - is_green
    slope = torch.addcmul(is_red * (green - blue), is_green, blue - red).addcmul(is_blue, red - green)
    start = torch.sub(_column(shift, images) + 2 / 3, is_red, alpha=2 / 3).sub_(is_green, alpha=1 / 3)
    hue = torch.addcdiv(start, slope, chroma.clamp(min=torch.finfo(images.dtype).tiny), value=1 / 6)
    hue = hue - hue.detach().round()  # from -1/2 to 1/2 of the circle; red is at 0
    away = [hue.abs().mul_(6).sub_(1), *(torch.rsub((hue + turn).abs(), 2, alpha=6) for turn in (1 / 6, -1 / 6))]
    return torch.cat([torch.addcmul(value, chroma, share.clamp_(0, 1), value=-1) for share in away], 1)


def _taps(sigma, radius):
    """Half of each Gaussian, [N, radius + 1]: the weight of a pixel, of its neighbours, of theirs."""
    taps = torch.exp(-0.5 * (torch.arange(radius + 1, device=sigma.device) / sigma[:, None]) ** 2)
    return taps / (2 * taps.sum(1, keepdim=True) - taps[:, :1])


def _by_convolutions(padded, taps):
    """As `gaussian_blur`, for accelerators, of padded images and half a kernel each [N, radius + 1]."""
    n, channels = padded.shape[:2]
    kernel = torch.cat([taps.flip(1)[:, :-1], taps], 1).repeat_interleave(channels, 0)[:, None, None]
    planes = padded.flatten(0, 1)[None]
    for weight in (kernel, kernel.mT):
        planes = F.conv2d(planes, weight, groups=n * channels)
    return planes.view(n, channels, *planes.shape[2:])


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """A Gaussian of `sigma` [N] pixels, cut off at `radius` pixels, the border mirrored; radius < min(H, W)."""
    if sigma.device.type == "cpu":  # beyond five sigma a millionth is left
        radius = min(radius, 1 + int(5 * sigma.max()))
    taps = _taps(_beside(sigma, images, images.dtype), radius)
    padded = F.pad(images, [radius] * 4, mode="reflect")
    if images.device.type != "cpu":
        return _by_convolutions(padded, taps)
    for dim in (2, 3):
        size = images.shape[dim]
        blurred = _column(taps[:, 0], images) * padded.narrow(dim, radius, size)
        for away in range(1, radius + 1):
            for start in (radius - away, radius + away):
                blurred.addcmul_(_column(taps[:, away], images), padded.narrow(dim, start, size))
        padded = blurred
    return padded


def solarize(images: Tensor) -> Tensor:
    """Invert what is at or above 0.5."""
    return torch.minimum(images, 1 - images)


def _rows(drawn):
    """Of each column of `drawn` [N, K] bool the rows that drew it."""
    return drawn.T.nonzero()[:, 1].split(drawn.sum(0).tolist())


def _at(rows, images, operation, *parameters):
    """`images` with operation(images, *parameters) in the place of these rows."""
    if len(rows) == len(images):
        return operation(images, *parameters)
    if len(rows):
        there = _beside(rows, images)
        images.index_copy_(0, there, operation(images.index_select(0, there), *(p[rows] for p in parameters)))
    return images


def _render(out, images, box, flipped, turns, factors, gray, blurred, sigma, solarized, *, recipe):
    """Write into `out` the view of each image that was drawn for it."""
    given, images = images, images.contiguous()
    if images.dtype != torch.float64:
        images = images / 255 if images.dtype == torch.uint8 else images.float()
    if images.shape == out.shape and recipe.scale == recipe.ratio == (1, 1):  # cropped before
        view = images.clone() if images is given else images
        view = _at(*_rows(flipped[:, None]), view, lambda part: part.flip(3))
    else:
        view = resized_crop(images, box, recipe.size, flipped)
    colours = adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue
    for k, rows in enumerate(_rows((turns[:, :, None] == torch.arange(4, device=turns.device)).flatten(1))):
        view = _at(rows, view, colours[k % 4], factors[:, k % 4])
    radius = recipe.size // 20
    grays, blurs, inverted = _rows(torch.stack([gray, blurred, solarized], 1))
    view = _at(grays, view, grayscale)
    if radius:
        view = _at(blurs, view, lambda part, sigma: gaussian_blur(part, sigma, radius), sigma)
    view = _at(inverted, view, solarize)
    mean, std = (_beside(torch.tensor(v), view, view.dtype).view(1, 3, 1, 1) for v in (recipe.mean, recipe.std))
    torch.sub(view, mean, out=out).mul_(1 / std)


# Numbers of views that a CPU thread makes at once, measured. Many, as each part costs a millisecond of calls; but a
# view of LARGE or more fills one thread's cache alone, and is a part alone.
PART, LARGE = 1 << 20, 1 << 17


@torch.no_grad()
def make_view(images: Tensor, recipe: ViewRecipe, *, generator: torch.Generator) -> Tensor:
    """Draw one view of each image (Chen et al., 2020, appendix A; Grill et al., 2020, appendix B).

    images: [N, 3, H, W], uint8, or float in [0, 1]. Returns [N, 3, size, size], normalised, float32 (float64 for
    float64). The blur's kernel is a tenth of the view wide, as SimCLR's. Raises ValueError for another shape or dtype,
    and for floats outside [0, 1] on a CPU (on an accelerator values are not looked at: that would wait for it).
    """
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images: got shape {list(images.shape)}, want [N, 3, H, W]")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images: got {images.dtype}, want uint8, or float in [0, 1]")
    if images.is_floating_point() and images.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (float(value) for value in images.aminmax())
        if not (low >= -1e-6 and high <= 1 + 1e-6):
            raise ValueError(f"images: got floats from {low:g} to {high:g}, want [0, 1]; divide 0 to 255 by 255")
    n, _, height, width = images.shape

    def uniform(low=0.0, high=1.0, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator, device=generator.device)

    box = random_crop_box(n, height, width, recipe.scale, recipe.ratio, generator=generator)
    flipped = uniform() < recipe.flip
    jittered, order = uniform() < recipe.jitter, uniform(0, 1, 4).argsort(1)
    turns = torch.where(jittered[:, None], order, -1)
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation)
    factors = [uniform(max(0.0, 1 - strength), 1 + strength) for strength in strengths]
    factors.append(uniform(-recipe.hue, recipe.hue))
    gray, blurred, sigma = uniform() < recipe.grayscale, uniform() < recipe.blur, uniform(*recipe.blur_sigma)
    draws = (box, flipped, turns, torch.stack(factors, 1), gray, blurred, sigma, uniform() < recipe.solarize)

    shape, dtype = (n, 3, recipe.size, recipe.size), torch.float64 if images.dtype == torch.float64 else torch.float32
    views = torch.empty(shape, dtype=dtype, device=images.device)
    own = views[0].numel()
    threads = torch.get_num_threads()
    at_once = own if own >= LARGE and threads == 1 else PART * threads
    parts = -(-views.numel() // at_once) if images.device.type == "cpu" else 1
    with torch.autocast(images.device.type, enabled=False):
        for part in zip(*(x.chunk(parts) for x in (views, images, *draws))):
            _render(*part, recipe=recipe)
    if recipe.vertical_flip:
        views = torch.where(_column(uniform() < recipe.vertical_flip, views) > 0, views.flip(2), views)
    if recipe.rotate90:
        turns = uniform(1, 4).long() * (uniform() < recipe.rotate90)
        for quarter in (1, 2, 3):
            views = torch.where(_column(turns == quarter, views) > 0, views.rot90(quarter, (2, 3)), views)
    return views


if __name__ == "__main__":
    from flags import answer, launch
    from training.settings import Pretraining

    answer(Pretraining, "bsim.py")  # before what is slow to import
    from train import pretrain

    launch(pretrain, "bsim.py")
