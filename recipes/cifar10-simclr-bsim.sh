#!/usr/bin/env bash
# SimCLR with BSIM, half and half: ResNet-18 on CIFAR-10, 1000 epochs, one GPU.
#   DATA=uoft-cs/cifar10 recipes/cifar10-simclr-bsim.sh [further flags of bsim.py]
# Numbers: the authors' command for CIFAR-10 and ResNet-18 at their first release: batch 512, 1000 epochs, lr 1 for each
# 256 images, weight decay 1e-6, temperature 0.5, LARS, 10 warm-up epochs: github.com/google-research/simclr, README and
# run.py at 0075cc07 (later ones say 1e-4, for a head of three layers). Crops of 0.08 and more: arXiv 2002.05709,
# appendix A. Heads of 512 and 128: B.6, at this width.
# sim_weight 0.5, cutmix and alpha 1 are ours: no published setting is at hand (README).
# Computed, not measured (how: recipes/README.md): 3.5 GiB a GPU, 12.7 hours on a V100. --dry_run 20 measures both.
set -euo pipefail
here=$(dirname "$0")/..
if [ -z "${DATA:-}" ]; then
    echo "DATA is not set: want a Hub id, as uoft-cs/cifar10, or files; type DATA=uoft-cs/cifar10 $0" >&2
    exit 2
fi
exec accelerate launch --config_file "${CONFIG:-$here/configs/gpu.yaml}" "$here/bsim.py" \
    --method simclr --dataset "$DATA" --out "${OUT:-runs/cifar10-simclr-bsim}" --resume \
    --sim_weight 0.5 \
    --mix cutmix --alpha 1 \
    --backbone resnet18 --image_size 32 --min_crop 0.08 --flip 0.5 --epochs 1000 --batch_size 512 \
    --optimizer lars --lr 1 --weight_decay 1e-6 --warmup_epochs 10 \
    --temperature 0.5 --hidden_dim 512 --embedding_dim 128 "$@"
