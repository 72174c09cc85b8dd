"""Draws docs/bsim.png: BSIM in one picture, from the two photographs that scikit-learn bundles.

python docs/picture.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from sklearn.datasets import load_sample_images  # noqa: E402

from bsim import ViewRecipe, cutmix, make_view  # noqa: E402
from training.pictures import BSIM, OTHER, SIM  # noqa: E402

SIZE = 160


def main():
    photos = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    images = torch.stack([photo[:, 60:420, 140:500] for photo in photos])
    recipe = ViewRecipe(SIZE, scale=(0.35, 0.8), blur=0, grayscale=0, mean=(0, 0, 0), std=(1, 1, 1))
    draws = torch.Generator().manual_seed(12)
    a, b = (make_view(images, recipe, generator=draws) for _ in range(2))
    mixture = cutmix(a, torch.tensor([0.62, 0.5]), torch.tensor([1, 0]), generator=torch.Generator().manual_seed(2))
    w = float(mixture.weight[0])

    figure = Figure(figsize=(11, 4.6))
    canvas = figure.add_axes([0, 0, 1, 1])
    canvas.set(xlim=(0, 11), ylim=(0, 4.6))
    canvas.axis("off")

    def tile(image, x, y, name, colour="black"):
        axis = figure.add_axes([x / 11, y / 4.6, 1.45 / 11, 1.45 / 4.6])
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set(color=colour, linewidth=2)
        canvas.text(x + 0.725, y - 0.2, name, ha="center", fontsize=12)

    def arrow(start, end, text="", colour=OTHER, style="->", shift=(0, 0.16)):
        canvas.annotate("", end, start, arrowprops=dict(arrowstyle=style, color=colour, linewidth=2))
        middle = (start[0] + end[0]) / 2 + shift[0], (start[1] + end[1]) / 2 + shift[1]
        canvas.text(*middle, text, ha="center", color=colour, fontsize=12)

    tile(images[0], 0.3, 2.7, "image $x_n$")
    tile(images[1], 0.3, 0.5, "partner $x_{p(n)}$")
    tile(a[0], 2.9, 2.7, "view $a_n$")
    tile(a[1], 2.9, 0.5, "view $a_{p(n)}$")
    tile(mixture.images[0], 5.5, 1.6, "mixture $m_n$", BSIM)
    tile(b[0], 9.0, 2.7, "view $b_n$")
    tile(b[1], 9.0, 0.5, "view $b_{p(n)}$")
    for y in (3.42, 1.22):
        arrow((1.8, y), (2.85, y), "draw")
    arrow((4.4, 3.3), (5.45, 2.6), f"w = {w:.2f}", shift=(0.3, 0.2))
    arrow((4.4, 1.3), (5.45, 2.0), f"1 - w = {1 - w:.2f}", shift=(0.2, -0.55))
    arrow((7.0, 2.55), (8.95, 3.3), f"similar: {w:.2f}", BSIM, "<->", shift=(0, -0.42))
    arrow((7.0, 2.05), (8.95, 1.3), f"similar: {1 - w:.2f}", BSIM, "<->", shift=(0, 0.32))
    arrow((4.4, 3.75), (8.95, 3.75), "SIM: two views of one image are alike", SIM, "<->")
    canvas.text(6.22, 0.6, "BSIM: alike in the proportion of the mix", ha="center", color=BSIM, fontsize=12)
    figure.savefig(Path(__file__).parent / "bsim.png", dpi=110)


if __name__ == "__main__":
    main()
