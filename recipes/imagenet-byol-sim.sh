#!/usr/bin/env bash
# BYOL: ResNet-50 on ImageNet-1k, 300 epochs, eight GPUs.
#   DATA=path/to/imagenet recipes/imagenet-byol-sim.sh [further flags of bsim.py]
# Numbers: the authors' settings for 300 epochs, lr 0.3 for each 256 images, weight decay 1e-6, momentum from 0.99, 10
# warm-up epochs: github.com/google-deepmind/deepmind-research, byol/configs/byol.py. LARS, batch 4096, heads of 4096
# and 256: arXiv 2006.07733, section 3.3; crops of 0.08 and more: appendix B.
# Computed, not measured (how: recipes/README.md): 42.4 GiB a GPU, 17.1 hours on eight A100. --dry_run 20 measures both.
set -euo pipefail
here=$(dirname "$0")/..
if [ -z "${DATA:-}" ]; then
    echo "DATA is not set: want a folder with train/ and val/, or a Hub id; type DATA=path/to/imagenet $0" >&2
    exit 2
fi
exec accelerate launch --config_file "${CONFIG:-$here/configs/8gpu.yaml}" "$here/bsim.py" \
    --method byol --dataset "$DATA" --out "${OUT:-runs/imagenet-byol-sim}" --resume \
    --sim_weight 1 \
    --backbone resnet50 --image_size 224 --min_crop 0.08 --flip 0.5 --epochs 300 --batch_size 4096 --batch_norm sync \
    --optimizer lars --lr 0.3 --weight_decay 1e-6 --warmup_epochs 10 \
    --momentum 0.99 --hidden_dim 4096 --embedding_dim 256 "$@"
