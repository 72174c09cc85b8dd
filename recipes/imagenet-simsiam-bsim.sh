#!/usr/bin/env bash
# SimSiam with BSIM, half and half: ResNet-50 on ImageNet-1k, 100 epochs, eight GPUs.
#   DATA=path/to/imagenet recipes/imagenet-simsiam-bsim.sh [further flags of bsim.py]
# Numbers: arXiv 2011.10566, section 3: SGD, lr 0.05 for each 256 images, batch 512, weight decay 1e-4, no warm-up, 100
# epochs, heads of 2048, 2048 and 512; crops of 0.2 and more: appendix A.
# sim_weight 0.5, cutmix and alpha 1 are ours: no published setting is at hand (README).
# Computed, not measured (how: recipes/README.md): 11.0 GiB a GPU, 8.6 hours on eight A100. --dry_run 20 measures both.
set -euo pipefail
here=$(dirname "$0")/..
if [ -z "${DATA:-}" ]; then
    echo "DATA is not set: want a folder with train/ and val/, or a Hub id; type DATA=path/to/imagenet $0" >&2
    exit 2
fi
exec accelerate launch --config_file "${CONFIG:-$here/configs/8gpu.yaml}" "$here/bsim.py" \
    --method simsiam --dataset "$DATA" --out "${OUT:-runs/imagenet-simsiam-bsim}" --resume \
    --sim_weight 0.5 \
    --mix cutmix --alpha 1 \
    --backbone resnet50 --image_size 224 --min_crop 0.2 --flip 0.5 --epochs 100 --batch_size 512 --batch_norm sync \
    --optimizer sgd --lr 0.05 --weight_decay 1e-4 --warmup_epochs 0 \
    --hidden_dim 2048 --embedding_dim 2048 --predictor_dim 512 "$@"
