"""Faster R-CNN and Mask R-CNN with a feature pyramid on a timm ResNet."""

from collections import OrderedDict
from typing import Any

from accelerate.utils import convert_to_fp32
from timm.models.resnet import ResNet
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from eval.features import IMAGENET


class Pyramid(nn.Module):
    """A timm ResNet's four stages, its own modules, and the feature pyramid above them, with batch norm (MoCo, 4.2).

    Images [N, 3, H, W] to five maps of `out_channels` channels, the last the fourth one subsampled.
    """

    def __init__(self, network: Any):
        super().__init__()
        self.stem = nn.Sequential(network.conv1, network.bn1, network.act1, network.maxpool)
        self.stages = nn.ModuleList([network.layer1, network.layer2, network.layer3, network.layer4])
        widths = [stage["num_chs"] for stage in network.feature_info[1:]]
        self.out_channels = min(256, widths[-1] // 2)  # 256 for all but resnet_tiny
        self.pyramid = FeaturePyramidNetwork(widths, self.out_channels, LastLevelMaxPool(), norm_layer=nn.BatchNorm2d)

    def forward(self, images):
        maps, x = OrderedDict(), self.stem(images)
        for i, stage in enumerate(self.stages):
            maps[str(i)] = x = stage(x)
        return self.pyramid(maps)


def detector(
    network: ResNet,
    classes: int,
    masks: bool,
    sides: list[int],
    max_size: int,
    mean=IMAGENET[0],
    std=IMAGENET[1],
) -> nn.Module:
    """Faster R-CNN, or with `masks` Mask R-CNN, of `classes` classes (He et al., 2017, section 3.1, FPN).

    sides: shorter sides of training images, the last that of test images. Images are float in 0..1; torchvision
    normalises them by `mean` and `std`, as the backbone's training did. The box head has two linear layers and no batch
    norm, as there is no place for one; the mask head's convolutions have it. Nothing is frozen.
    """
    body = Pyramid(network)
    width, scale = body.out_channels, sides[-1] / 800
    options = dict(
        min_size=tuple(sides),
        max_size=max_size,
        image_mean=list(mean),
        image_std=list(std),
        # 32 to 512 pixels at a side of 800 (Lin et al., 2017, section 4.1), and of the same share of smaller images.
        rpn_anchor_generator=AnchorGenerator(
            tuple((round(scale * 32 * 2**level),) for level in range(5)), ((0.5, 1.0, 2.0),) * 5
        ),
        box_head=TwoMLPHead(width * 7 * 7, 4 * width),
        box_predictor=FastRCNNPredictor(4 * width, classes + 1),
        rpn_batch_size_per_image=min(256, max(32, round(256 * scale))),  # the papers' numbers for the papers' images
        box_batch_size_per_image=min(512, max(64, round(512 * scale))),
    )
    if masks:
        options["mask_head"] = MaskRCNNHeads(width, [width] * 4, 1, norm_layer=nn.BatchNorm2d)
        options["mask_predictor"] = MaskRCNNPredictor(width, width, classes + 1)
    model = (MaskRCNN if masks else FasterRCNN)(body, None, **options)
    for head in (model.rpn.head, model.roi_heads.box_predictor):  # bfloat16 would round a place of 1,000 pixels by 4
        head.register_forward_hook(lambda module, arguments, found: convert_to_fp32(found))
    return model
