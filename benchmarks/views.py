"""Two views of each image, full recipe: ours against lightly's, kornia's and torchvision's, pairs a second.

    python benchmarks/views.py --threads 1 --sizes 32 224

Crop, flip, colour jitter, grayscale, blur, normalisation. Ours and kornia's take batches; lightly's and torchvision's
an image at a time. Peers as for losses.py; kornia's blur is slow at 224 pixels,
so that there it is also shown without.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision.transforms import v2  # noqa: E402
from turns import in_turns, machine, spread  # noqa: E402

from bsim import ViewRecipe, make_view  # noqa: E402

SOURCE = {32: (32, 512), 224: (256, 32)}  # side of the images, and how many, for views of this size


def smooth(n, side):
    draws = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 8, 8, generator=draws)
    return (torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def contenders(size: int) -> tuple[int, dict]:
    side, n = SOURCE[size]
    images = smooth(n, side)
    pictures = [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())) for image in images]
    recipe, draws = ViewRecipe(size), torch.Generator().manual_seed(0)
    mean, std = list(recipe.mean), list(recipe.std)
    kernel = max(3, size // 10 // 2 * 2 + 1)
    an_image = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=recipe.scale, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], 0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )
    found = {
        "ours": lambda: [make_view(images, recipe, generator=draws) for _ in range(2)],
        "torchvision": lambda: [torch.stack([an_image(image) for image in images]) for _ in range(2)],
    }
    try:
        from lightly.transforms import SimCLRTransform

        two = SimCLRTransform(size, cj_strength=0.5, gaussian_blur=0.5, min_scale=recipe.scale[0])
        found["lightly"] = lambda: [two(picture) for picture in pictures]
    except ImportError:
        print("lightly is not installed", file=sys.stderr)
    try:
        import kornia.augmentation as K

        def of_kornia(*blur):
            made = K.AugmentationSequential(
                K.RandomResizedCrop((size, size), scale=recipe.scale),
                K.RandomHorizontalFlip(),
                K.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue, p=0.8),
                K.RandomGrayscale(p=0.2),
                *blur,
                K.Normalize(torch.tensor(mean), torch.tensor(std)),
            )
            return lambda: [made(images.float() / 255) for _ in range(2)]

        found["kornia"] = of_kornia(K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=0.5))
        if size > 64:
            found["kornia, no blur"] = of_kornia()
    except ImportError:
        print("kornia is not installed", file=sys.stderr)
    return n, found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224], choices=SOURCE)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine("lightly", "kornia", "torchvision", "pillow"))
    print("\n| pixels | | pairs/s | quartiles | ours is |\n| --- | --- | --- | --- | --- |")
    for size in options.sizes:
        n, found = contenders(size)
        with torch.no_grad():
            seconds = in_turns(found, options.repeats)
        for name, seen in seconds.items():
            middle, low, high = spread([n / s for s in seen])
            times, _, _ = spread([theirs / own for theirs, own in zip(seen, seconds["ours"])])
            print(
                f"| {size} | {name} | {middle:,.0f} | {low:,.0f} to {high:,.0f} | {times:.1f} x as fast |", flush=True
            )


if __name__ == "__main__":
    main()
