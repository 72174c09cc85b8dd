#!/usr/bin/env bash
# BYOL: ResNet-18 on CIFAR-10, 800 epochs, one GPU.
#   DATA=uoft-cs/cifar10 recipes/cifar10-byol-sim.sh [further flags of bsim.py]
# Numbers: ours, the paper (arXiv 2006.07733) has none for CIFAR-10: our defaults for small images (README, "What we
# measured": from short runs of a small network) and SimSiam's 800 epochs. Momentum from 0.996: the paper's section 3.3.
# Computed, not measured (how: recipes/README.md): 1.3 GiB a GPU, 9.1 hours on a V100. --dry_run 20 measures both.
set -euo pipefail
here=$(dirname "$0")/..
if [ -z "${DATA:-}" ]; then
    echo "DATA is not set: want a Hub id, as uoft-cs/cifar10, or files; type DATA=uoft-cs/cifar10 $0" >&2
    exit 2
fi
exec accelerate launch --config_file "${CONFIG:-$here/configs/gpu.yaml}" "$here/bsim.py" \
    --method byol --dataset "$DATA" --out "${OUT:-runs/cifar10-byol-sim}" --resume \
    --sim_weight 1 \
    --backbone resnet18 --image_size 32 --min_crop 0.2 --flip 0.5 --epochs 800 --batch_size 256 \
    --optimizer sgd --lr 0.2 --weight_decay 5e-4 --warmup_epochs 1 \
    --momentum 0.996 --hidden_dim 1024 --embedding_dim 256 "$@"
