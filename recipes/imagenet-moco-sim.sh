#!/usr/bin/env bash
# MoCo v2: ResNet-50 on ImageNet-1k, 200 epochs, eight GPUs.
#   DATA=path/to/imagenet recipes/imagenet-moco-sim.sh [further flags of bsim.py]
# Numbers: arXiv 2003.04297 (v2): temperature 0.2, MLP head, cosine, 200 epochs (section 2, table 1); arXiv 1911.05722:
# SGD, lr 0.03 at batch 256, weight decay 1e-4, queue 65536, momentum 0.999, 128 dimensions (section 3.3); crops of 0.2
# and more: github.com/facebookresearch/moco.
# Computed, not measured (how: recipes/README.md): 1.8 GiB a GPU, 5.7 hours on eight A100. --dry_run 20 measures both.
set -euo pipefail
here=$(dirname "$0")/..
if [ -z "${DATA:-}" ]; then
    echo "DATA is not set: want a folder with train/ and val/, or a Hub id; type DATA=path/to/imagenet $0" >&2
    exit 2
fi
exec accelerate launch --config_file "${CONFIG:-$here/configs/8gpu.yaml}" "$here/bsim.py" \
    --method moco --dataset "$DATA" --out "${OUT:-runs/imagenet-moco-sim}" --resume \
    --sim_weight 1 \
    --backbone resnet50 --image_size 224 --min_crop 0.2 --flip 0.5 --epochs 200 --batch_size 256 --batch_norm shuffle \
    --optimizer sgd --lr 0.03 --weight_decay 1e-4 --warmup_epochs 0 \
    --temperature 0.2 --momentum 0.999 --queue 65536 --hidden_dim 2048 --embedding_dim 128 "$@"
