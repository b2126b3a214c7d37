#!/bin/sh
# Packs UC Merced for the configs here: configs/ucm/shards.sh [DIR [OUT]], from DIR/{images,labels.csv,classes.csv,splits.csv}.
# Shards of about 67 images, so that a fifth of the train split can be held out by whole ones.
set -eu
dir=${1:-${MLPL_TEST_DATA:-../shared/data}/ucm_multilabel}
exec dist-mlpl shards build --source table --images "$dir/images" --labels "$dir/labels.csv" \
    --classes "$dir/classes.csv" --splits "$dir/splits.csv" --target-shard-bytes 1048576 --out "${2:-runs/ucm-shards}"
