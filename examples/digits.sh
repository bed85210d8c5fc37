#!/usr/bin/env bash
# The paper's evaluation, whole, on a small real data set: what docs/digits.md reports. About half an hour on two cores.
#   examples/digits.sh [FOLDER]
# scikit-learn's 1 797 digits: 1 437 to train on (a tenth of them for validation) and 360 to test on. Two pre-trainings
# of the demo preset, auto-regressive and BERT; of each a probe of every layer, few labels, fine-tuning, likelihood; and
# the same network trained from scratch.
set -euo pipefail
out=${1:-digits}
igpt-data() { python -m data_prep "$@"; }
igpt-ds() { python -m igpt_ds "$@"; }

python - "$out" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

digits = load_digits()
for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
    path = Path(sys.argv[1], "images", "train" if index < 1437 else "test", str(label), f"{index:04d}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.minimum(image, 15).astype(np.uint8) * 17).save(path)
PYTHON
igpt-data palette "$out/images/train" --k 16 --no-crop --out "$out/palette.npy"
shape=(--palette "$out/palette.npy" --resolution 8 --no-crop --out "$out/data")
igpt-data shards image_folder "$out/images/train" "${shape[@]}" --holdout 0.1 --split train --split val
igpt-data shards image_folder "$out/images/test" "${shape[@]}" --split test

for objective in next_pixel masked_pixel; do
  run=$out/$objective
  igpt-ds pretrain "$run" --preset demo --data "$out/data" --set "objective.name=$objective"
  igpt-ds probe "$run" --untrained --concatenate 3 --split test
  igpt-ds low-data "$run" --labels 4,25 --split test
  igpt-ds eval "$run" --split test
  igpt-ds finetune "$run-tuned" --from "$run" --data "$out/data" --split test
done
igpt-ds finetune "$out/scratch" --from "$out/next_pixel" --from-scratch --data "$out/data" --split test
igpt-ds sample "$out/next_pixel" --images 16 --out "$out/next_pixel/samples.png"
igpt-ds figures "$out/next_pixel" "$out/masked_pixel" "$out/next_pixel-tuned" "$out/masked_pixel-tuned" "$out/scratch" \
  --out "$out/paper"
igpt-ds report "$out/next_pixel"
