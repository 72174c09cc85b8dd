"""View operations against torchvision's, image by image with the same parameters; draws against their recipe."""

import ast
import contextlib
import inspect
import math
import sys
from itertools import permutations
from pathlib import Path

import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF

import bsim
from bsim import ViewRecipe, make_view

NOTHING = ViewRecipe(16, scale=(1, 1), ratio=(1, 1), flip=0, jitter=0, grayscale=0, blur=0, mean=(0,) * 3, std=(1,) * 3)
WITHIN = 2 / 255


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=6, height=40, width=52, seed=0):
    """Smooth colour with noise, gray, black, white and saturated pixels."""
    x = torch.rand(n, 3, 6, 7, generator=generator(seed))
    x = torch.nn.functional.interpolate(x, (height, width), mode="bicubic").clamp(0, 1)
    x[:, :, :5] = torch.rand(n, 3, 5, width, generator=generator(seed + 1))
    for i, (channels, value) in enumerate([(slice(0, 3), 0), (slice(0, 3), 1), (slice(1, 3), 0), (slice(0, 3), 0.5)]):
        x[i : i + 1, channels, 5:9] = value
    return x


def each(operation, x, *parameters):
    return torch.stack([operation(x[i], *(p[i] for p in parameters)) for i in range(len(x))])


def close(found, wanted):
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) < WITHIN


@pytest.mark.parametrize("size", [5, 16, 33, 64, 120])
def test_crop_and_flip(size):
    x = images()
    boxes = torch.tensor(
        [[0, 0, 40, 52], [3, 5, 20, 30], [39, 51, 1, 1], [10, 20, 7, 9], [30, 0, 10, 52], [0, 4, 40, 8]]
    )
    flips = torch.tensor([False, True, False, True, True, False])

    def wanted(image, box, flip):
        image = TF.resized_crop(image, *box.tolist(), [size, size], antialias=True)
        return TF.horizontal_flip(image) if flip else image

    close(bsim.resized_crop(x, boxes, size, flips), each(wanted, x, boxes, flips))


@pytest.mark.parametrize(
    "name, low, high", [("brightness", 0, 2), ("contrast", 0, 2), ("saturation", 0, 2), ("hue", -0.5, 0.5)]
)
def test_jitter(name, low, high):
    x = images()
    factors = torch.linspace(low, high, len(x))
    wanted = each(lambda image, f: getattr(TF, f"adjust_{name}")(image, float(f)), x, factors)
    close(getattr(bsim, f"adjust_{name}")(x, factors), wanted)


@pytest.mark.parametrize("radius", [1, 3, 11, 39])
def test_blur(radius):
    x = images()
    sigmas = torch.tensor([0.1, 0.3, 0.7, 1.0, 1.6, 2.0]) * (1 if radius < 39 else 12)
    kernel = [2 * radius + 1] * 2
    wanted = each(lambda image, s: TF.gaussian_blur(image, kernel, [float(s)] * 2), x, sigmas)
    close(bsim.gaussian_blur(x, sigmas, radius), wanted)


def test_grayscale_and_solarize():
    close(bsim.grayscale(images()), TF.rgb_to_grayscale(images(), 3))
    close(bsim.solarize(images()), TF.solarize(images(), 0.5))


def test_boxes_are_drawn_as_torchvision_draws_them():
    for height, width, scale, ratio in (
        (32, 32, (0.2, 1), (3 / 4, 4 / 3)),
        (20, 60, (0.6, 1), (3 / 4, 4 / 3)),  # mostly none of ten fits: the central box
        (60, 20, (0.9, 1), (3 / 4, 4 / 3)),
        (48, 64, (0.08, 1), (0.5, 3)),
    ):
        n = 3000
        ours = bsim.random_crop_box(n, height, width, scale, ratio, generator=generator(1))
        theirs = torch.tensor([draw(height, width, scale, ratio) for _ in range(n)])
        assert ((ours >= 0) & (ours[:, :2] + ours[:, 2:] <= torch.tensor([height, width])).repeat(1, 2)).all()
        assert (ours[:, 2:] > 0).all()
        for column in range(4):
            apart = (ours[:, column].sort().values - theirs[:, column].sort().values).abs().float().mean()
            assert apart < 0.05 * max(height, width), (height, width, column)


def draw(height, width, scale, ratio):
    crop = T.RandomResizedCrop(8, scale=scale, ratio=ratio)
    found = crop.make_params([torch.empty(3, height, width)])
    return [found[name] for name in ("top", "left", "height", "width")]


def test_a_recipe_that_does_nothing_returns_the_image():
    x = images(height=16, width=16)
    close(make_view(x, NOTHING, generator=generator()), x)
    byte = (x * 255).round().to(torch.uint8)
    close(make_view(byte, NOTHING, generator=generator()), byte / 255)


def test_normalisation():
    x = images(height=16, width=16)
    recipe = NOTHING._replace(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    wanted = TF.normalize(x, [0.4, 0.5, 0.6], [0.1, 0.2, 0.3])
    torch.testing.assert_close(make_view(x, recipe, generator=generator()), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change, wanted", [
    (dict(flip=1), TF.horizontal_flip),
    (dict(grayscale=1), lambda x: TF.rgb_to_grayscale(x, 3)),
    (dict(solarize=1), lambda x: TF.solarize(x, 0.5)),
    (dict(blur=1, blur_sigma=(2, 2), size=40), lambda x: TF.gaussian_blur(TF.resize(x, [40, 40]), [5, 5], [2, 2])),
])  # fmt: skip
def test_each_probability_switches_its_operation(change, wanted):
    x = images(height=16, width=16)
    close(make_view(x, NOTHING._replace(**change), generator=generator()), wanted(x))


def test_every_image_draws_its_own():
    x = images(1, 16, 16).expand(400, 3, 16, 16)
    for change, share in ((dict(flip=0.5), 0.5), (dict(grayscale=0.2), 0.2), (dict(solarize=0.3), 0.3)):
        views = make_view(x, NOTHING._replace(**change), generator=generator(4))
        changed = ((views - x).abs().flatten(1).amax(1) > WITHIN).float().mean()
        assert abs(float(changed) - share) < 0.1, change
    views = make_view(x, NOTHING._replace(jitter=0.8), generator=generator(5))
    distinct = len({tuple(v.flatten()[:50].tolist()) for v in views})
    assert 290 < distinct < 350  # the fifth that drew no jitter is alike


def test_jitter_comes_in_every_order():
    """With a strong contrast and saturation the order shows: compare with torchvision's functions in all 24."""
    x = torch.rand(1, 3, 16, 16, generator=generator(1)).expand(240, 3, 16, 16)
    recipe = NOTHING._replace(jitter=1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    draws = generator(8)
    views = make_view(x, recipe, generator=draws)

    # The same draws again, in make_view's order: what follows the box and the flip is the jitter's.
    draws = generator(8)
    bsim.random_crop_box(240, 16, 16, (1, 1), (1, 1), generator=draws)
    torch.rand(240, generator=draws), torch.rand(240, generator=draws), torch.rand(240, 4, generator=draws)
    factors = [0.6 + 0.8 * torch.rand(240, generator=draws) for _ in range(3)]
    factors.append(-0.1 + 0.2 * torch.rand(240, generator=draws))
    names = ("brightness", "contrast", "saturation", "hue")
    orders = set()
    for n in range(240):
        for order in permutations(range(4)):
            image = x[n]
            for i in order:
                image = getattr(TF, f"adjust_{names[i]}")(image, float(factors[i][n]))
            if float((image - views[n]).abs().max()) < 1e-4:
                orders.add(order)
                break
        else:
            raise AssertionError(f"image {n} is no order of the four adjustments")
    assert len(orders) > 15


def test_randomness_is_the_generator_alone_and_the_input_stays():
    x = images(height=20, width=20)
    kept, state = x.clone(), torch.get_rng_state()
    recipe = ViewRecipe(40, solarize=0.5)
    first, again = (make_view(x, recipe, generator=generator(3)) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state) and torch.equal(x, kept)
    assert not torch.equal(first, make_view(x, recipe, generator=generator(4)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(first, make_view(x, recipe, generator=generator(3)))
    assert make_view(x.double(), recipe, generator=generator(3)).dtype == torch.float64
    assert make_view(x.half(), recipe, generator=generator(3)).dtype == torch.float32


@pytest.mark.parametrize("x, message", [
    (torch.rand(3, 8, 8), r"images: got shape \[3, 8, 8\], want \[N, 3, H, W\]"),
    (torch.rand(2, 1, 8, 8), r"images: got shape \[2, 1, 8, 8\]"),
    (torch.ones(2, 3, 8, 8, dtype=torch.int64), r"images: got torch.int64, want uint8, or float"),
])  # fmt: skip
def test_refusals(x, message):
    with pytest.raises(ValueError, match=message):
        make_view(x, NOTHING, generator=generator())


# The core as something to paste from.


def sections():
    """The source of bsim.py between its rulers, without the head and the launcher."""
    source = Path(bsim.__file__).read_text().partition("if __name__")[0]
    return source.split("# " + "-" * 117)[1:]


def test_a_function_runs_when_pasted_with_the_helpers_above_it():
    x, partner = torch.randn(4, 8), torch.tensor([1, 2, 3, 0])
    draws = dict(generator=generator())
    calls = {
        "mixup": lambda f: f(x.view(4, 2, 2, 2), torch.rand(4), partner),
        "cutmix": lambda f: f(x.view(4, 2, 2, 2), torch.rand(4), partner, **draws),
        "sample_mixture": lambda f: f(x.view(4, 2, 2, 2), **draws),
        "nt_xent": lambda f: f(x, x + 1, weight=torch.rand(4), partner=partner, negatives=x),
        "info_nce": lambda f: f(x, x + 1, x, weight=torch.rand(4), partner=partner),
        "negative_cosine": lambda f: f(x, x + 1, weight=torch.rand(4), partner=partner),
        "alignment": lambda f: f(x, x + 1),
        "uniformity": lambda f: f(x),
        "make_view": lambda f: f(torch.rand(4, 3, 9, 9), ViewRecipe(40, solarize=1), **draws),
    }
    head = "import math\nfrom typing import NamedTuple\nimport torch\nimport torch.nn.functional as F\n"
    head += "from einops import rearrange\nfrom torch import Tensor\n"
    for name, call in calls.items():
        section = next(s for s in sections() if f"def {name}(" in s)
        tree = ast.parse(section)
        end = next(node.end_lineno for node in tree.body if getattr(node, "name", "") == name)
        space = {}
        exec(head + "\n".join(section.splitlines()[:end]), space)
        call(space[name])


def test_imports_are_torch_einops_and_the_standard_library():
    tree = ast.parse(Path(bsim.__file__).read_text().partition("if __name__")[0])
    found = {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    found |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert found <= {"torch", "einops"} | set(sys.stdlib_module_names)


def test_every_public_function_says_its_shapes():
    for name in "mixup cutmix sample_mixture nt_xent info_nce negative_cosine make_view alignment uniformity".split():
        text = inspect.getdoc(getattr(bsim, name))
        assert "[N" in text and "Raises ValueError" in text, name


# The sphere.


def test_uniformity_of_many_is_that_of_all_pairs_at_once():
    """In two blocks of rows here; rows of zeros, as dead features are, stay in the centre."""
    x = torch.randn(2100, 6, generator=generator(), dtype=torch.float64)
    x[::3] = 0
    x.requires_grad_()
    distances = torch.pdist(torch.nn.functional.normalize(x, dim=1)).pow(2)
    for t in (0.5, 2, 60):
        wanted = (-t * distances).logsumexp(0) - math.log(len(distances))
        found = bsim.uniformity(x, t)
        torch.testing.assert_close(found, wanted)
        of_found, of_wanted = (torch.autograd.grad(value, x, retain_graph=True)[0] for value in (found, wanted))
        alive = x.detach().any(1)  # a row of zeros has no direction
        torch.testing.assert_close(of_found[alive], of_wanted[alive])


def test_uniformity_of_opposite_rows_is_no_infinity():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    for t in (2, 20, 25, 150):
        found = bsim.uniformity(x, t)
        assert found.dtype == torch.float32 and float(found) == pytest.approx(-4 * t, rel=1e-6)


def test_alignment_and_uniformity_are_wang_and_isolas():
    x, y = torch.randn(7, 4, generator=generator()), torch.randn(7, 4, generator=generator(1))
    unit = [[v / math.sqrt(sum(q * q for q in row)) for v in row] for row in x.tolist()]
    other = [[v / math.sqrt(sum(q * q for q in row)) for v in row] for row in y.tolist()]

    def squared(p, q):
        return sum((s - t) ** 2 for s, t in zip(p, q))

    for power in (1, 2, 3):
        wanted = sum(squared(p, q) ** (power / 2) for p, q in zip(unit, other)) / 7
        assert float(bsim.alignment(x, y, power)) == pytest.approx(wanted, rel=1e-5)
    for t in (1, 2):
        pairs = [math.exp(-t * squared(unit[i], unit[j])) for j in range(7) for i in range(j)]
        assert float(bsim.uniformity(x, t)) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)
    for value in (0.0, 1.0):
        assert float(bsim.uniformity(torch.full((5, 3), value))) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="N of 2 or more"):
        bsim.uniformity(x[:1])
    with pytest.raises(ValueError, match=r"want \[N, D\] twice"):
        bsim.alignment(x, y[:3])


def test_what_accelerators_compute_is_what_a_cpu_computes():
    x, flips = images(), torch.tensor([False, True] * 3)
    boxes = bsim.random_crop_box(6, 40, 52, (0.2, 1), (3 / 4, 4 / 3), generator=generator())
    for size in (16, 70):
        wanted = bsim.resized_crop(x, boxes, size, flips)
        torch.testing.assert_close(bsim._by_products(x, boxes, size, flips), wanted, rtol=0, atol=1e-5)
    sigma, radius = torch.linspace(0.1, 2, 6), 11
    padded = torch.nn.functional.pad(x, [radius] * 4, mode="reflect")
    found = bsim._by_convolutions(padded, bsim._taps(sigma, radius))
    torch.testing.assert_close(found, bsim.gaussian_blur(x, sigma, radius), rtol=0, atol=1e-5)


@pytest.mark.parametrize("limit", ["PART", "LARGE"])
def test_views_do_not_depend_on_how_many_are_made_at_once(limit, monkeypatch):
    x, recipe = images(9), ViewRecipe(40, solarize=0.5, grayscale=0.5)
    wanted = make_view(x, recipe, generator=generator(3))
    seen, render = [], bsim._render
    monkeypatch.setattr(bsim, "_render", lambda out, *drawn, **own: (seen.append(len(out)), render(out, *drawn, **own)))
    monkeypatch.setattr(bsim, limit, 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    torch.testing.assert_close(make_view(x, recipe, generator=generator(3)), wanted, rtol=0, atol=1e-5)
    assert seen == [1] * 9


def test_operations_have_the_gradients_of_what_they_compute():
    x = torch.rand(2, 3, 5, 6, generator=generator(), dtype=torch.float64) * 0.6 + 0.2
    box, factor = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]]), torch.tensor([0.8, 1.1])
    for operation in (
        lambda x: bsim.resized_crop(x, box, 7, torch.tensor([True, False])),
        lambda x: bsim.resized_crop(x, box, 3, torch.tensor([True, False])),
        lambda x: bsim.adjust_hue(x, factor - 1),
        lambda x: bsim.adjust_brightness(x, factor),
        lambda x: bsim.adjust_contrast(x, factor),
        lambda x: bsim.adjust_saturation(x, factor),
        lambda x: bsim.gaussian_blur(x, factor, 2),
    ):
        assert torch.autograd.gradcheck(operation, x.clone().requires_grad_())


def test_gray_in_half_precision_stays_gray():
    gray = torch.full((1, 3, 2, 2), 0.5, dtype=torch.float16)
    assert torch.equal(bsim.adjust_hue(gray, torch.tensor([0.1])), gray)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("whole", [False, True])
def test_the_images_that_are_given_are_left_alone(dtype, layout, whole):
    x = images(height=40, width=40)
    x = ((x * 255).round().to(dtype) if dtype == torch.uint8 else x.to(dtype)).contiguous(memory_format=layout)
    before, recipe = x.clone(), ViewRecipe(40, flip=1, jitter=1, solarize=1)
    recipe = recipe._replace(scale=(1, 1), ratio=(1, 1)) if whole else recipe
    make_view(x, recipe, generator=generator())
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_everything_goes_where_the_images_are(dtype, monkeypatch):
    """On another device than the CPU, as far as one is at hand: "meta" has no numbers, but refuses to mix devices."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which "meta" does not know
    monkeypatch.setattr(bsim, "_exact", lambda x: contextlib.nullcontext())
    for side in (20, 40, 50):
        x = torch.empty(6, 3, side, side, dtype=dtype, device="meta")
        for recipe in (ViewRecipe(40, solarize=0.5), ViewRecipe(40, scale=(1, 1), ratio=(1, 1))):
            view = make_view(x, recipe, generator=generator())
            assert (view.device.type, view.shape, view.dtype) == ("meta", (6, 3, 40, 40), torch.float32)
    for kind in ("cutmix", "mixup", "either"):
        for per_sample in (True, False):
            mixture = bsim.sample_mixture(view, kind=kind, per_sample=per_sample, generator=generator())
            assert {part.device.type for part in mixture} == {"meta"} and mixture.weight.shape == (6,)
    weight, partner = torch.rand(600), torch.randperm(600)  # of a CPU
    for whole in (1 << 18, 0):
        monkeypatch.setattr(bsim, "WHOLE", whole)
        a, b = (torch.empty(600, 8, device="meta").requires_grad_() for _ in range(2))
        for loss in (
            bsim.nt_xent(a, b, weight=weight, partner=partner, negatives=b),
            bsim.info_nce(a, b, b, weight=weight, partner=partner, in_batch=True),
            bsim.negative_cosine(a, b, weight=weight, partner=partner),
        ):
            loss.backward()
            assert loss.device.type == a.grad.device.type == "meta"


@pytest.mark.parametrize(
    "images", [255 * torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8) - 0.5, torch.full((2, 3, 8, 8), torch.nan)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_floats_outside_0_to_1_are_refused(images, dtype):
    with pytest.raises(ValueError, match=r"images: got floats from .* want \[0, 1\]; divide 0 to 255 by 255"):
        make_view(images.to(dtype), ViewRecipe(8), generator=torch.Generator())


def test_upside_down_and_quarter_turns():
    """Each a share of the views; a turn by 90, 180 and 270 degrees is as likely. Nothing else changes."""
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).expand(1200, -1, -1, -1)
    for change, turned, share in (
        (dict(vertical_flip=0.5), [x.flip(2)], 0.5),
        (dict(rotate90=0.6), [torch.rot90(x, k, (2, 3)) for k in (1, 2, 3)], 0.2),
    ):
        views = make_view(x, NOTHING._replace(**change), generator=torch.Generator().manual_seed(1))
        same = (views - x).abs().flatten(1).amax(1) < 1e-5
        kinds = [(views - wanted).abs().flatten(1).amax(1) < 1e-5 for wanted in turned]
        assert bool((same | torch.stack(kinds).any(0)).all())
        for kind in kinds:
            assert abs(float(kind.float().mean()) - share) < 0.05
    plain, drawn = (torch.Generator().manual_seed(2) for _ in range(2))
    usual = make_view(x[:4], ViewRecipe(16), generator=plain)
    turned = make_view(x[:4], ViewRecipe(16, vertical_flip=1.0), generator=drawn)
    torch.testing.assert_close(turned, usual.flip(2))  # what a recipe does not turn is drawn as before
