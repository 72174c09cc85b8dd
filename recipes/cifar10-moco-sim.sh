#!/usr/bin/env bash
# MoCo v2: ResNet-18 on CIFAR-10, 200 epochs, one GPU.
#   DATA=uoft-cs/cifar10 recipes/cifar10-moco-sim.sh [further flags of bsim.py]
# Numbers: the authors' notebook, github.com/facebookresearch/moco, colab/moco_cifar10_demo.ipynb: ResNet-18, 200
# epochs, batch 512, lr 0.06 (0.03 for each 256), weight decay 5e-4, cosine, temperature 0.1, momentum 0.99, queue 4096,
# crops of 0.08 and more. Its encoder has no MLP head and splits batch norm in eight; the head of 512 is ours.
# Computed, not measured (how: recipes/README.md): 1.3 GiB a GPU, 1.1 hours on a V100. --dry_run 20 measures both.
set -euo pipefail
here=$(dirname "$0")/..
if [ -z "${DATA:-}" ]; then
    echo "DATA is not set: want a Hub id, as uoft-cs/cifar10, or files; type DATA=uoft-cs/cifar10 $0" >&2
    exit 2
fi
exec accelerate launch --config_file "${CONFIG:-$here/configs/gpu.yaml}" "$here/bsim.py" \
    --method moco --dataset "$DATA" --out "${OUT:-runs/cifar10-moco-sim}" --resume \
    --sim_weight 1 \
    --backbone resnet18 --image_size 32 --min_crop 0.08 --flip 0.5 --epochs 200 --batch_size 512 \
    --optimizer sgd --lr 0.03 --weight_decay 5e-4 --warmup_epochs 0 \
    --temperature 0.1 --momentum 0.99 --queue 4096 --hidden_dim 512 --embedding_dim 128 "$@"
