#!/usr/bin/env bash
# SimCLR with BSIM, half and half: ResNet-50 on ImageNet-1k, 200 epochs, eight GPUs.
#   DATA=path/to/imagenet recipes/imagenet-simclr-bsim.sh [further flags of bsim.py]
# Numbers: arXiv 2002.05709: LARS, weight decay 1e-6, 10 warm-up epochs, batch 4096 (section 2.2), lr 0.3 for each 256
# images (appendix B.1), temperature 0.1 (table 5), crops of 0.08 and more (appendix A), heads of 2048 and 128 (B.6);
# 200 epochs is a point of figure 9.
# sim_weight 0.5, cutmix and alpha 1 are ours: no published setting is at hand (README).
# Computed, not measured (how: recipes/README.md): 63.1 GiB a GPU, 12.8 hours on eight A100. --dry_run 20 measures both.
set -euo pipefail
here=$(dirname "$0")/..
if [ -z "${DATA:-}" ]; then
    echo "DATA is not set: want a folder with train/ and val/, or a Hub id; type DATA=path/to/imagenet $0" >&2
    exit 2
fi
exec accelerate launch --config_file "${CONFIG:-$here/configs/8gpu.yaml}" "$here/bsim.py" \
    --method simclr --dataset "$DATA" --out "${OUT:-runs/imagenet-simclr-bsim}" --resume \
    --sim_weight 0.5 \
    --mix cutmix --alpha 1 \
    --backbone resnet50 --image_size 224 --min_crop 0.08 --flip 0.5 --epochs 200 --batch_size 4096 --batch_norm sync \
    --optimizer lars --lr 0.3 --weight_decay 1e-6 --warmup_epochs 10 \
    --temperature 0.1 --hidden_dim 2048 --embedding_dim 128 "$@"
