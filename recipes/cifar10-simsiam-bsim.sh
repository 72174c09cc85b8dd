#!/usr/bin/env bash
# SimSiam with BSIM, half and half: ResNet-18 on CIFAR-10, 800 epochs, one GPU.
#   DATA=uoft-cs/cifar10 recipes/cifar10-simsiam-bsim.sh [further flags of bsim.py]
# Numbers: arXiv 2011.10566, appendix D: ResNet-18, SGD, lr 0.03 for each 256 images, batch 512, weight decay 5e-4,
# cosine, 800 epochs, no blur, outputs of 2048; the predictor's quarter: section 3; crops of 0.2 and more: appendix A.
# There the projector has two layers, here three.
# sim_weight 0.5, cutmix and alpha 1 are ours: no published setting is at hand (README).
# Computed, not measured (how: recipes/README.md): 4.8 GiB a GPU, 13.6 hours on a V100. --dry_run 20 measures both.
set -euo pipefail
here=$(dirname "$0")/..
if [ -z "${DATA:-}" ]; then
    echo "DATA is not set: want a Hub id, as uoft-cs/cifar10, or files; type DATA=uoft-cs/cifar10 $0" >&2
    exit 2
fi
exec accelerate launch --config_file "${CONFIG:-$here/configs/gpu.yaml}" "$here/bsim.py" \
    --method simsiam --dataset "$DATA" --out "${OUT:-runs/cifar10-simsiam-bsim}" --resume \
    --sim_weight 0.5 \
    --mix cutmix --alpha 1 \
    --backbone resnet18 --image_size 32 --min_crop 0.2 --flip 0.5 --epochs 800 --batch_size 512 \
    --optimizer sgd --lr 0.03 --weight_decay 5e-4 --warmup_epochs 0 \
    --hidden_dim 2048 --embedding_dim 2048 --predictor_dim 512 "$@"
