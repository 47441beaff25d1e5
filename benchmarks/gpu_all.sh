#!/usr/bin/env bash
# All that wants a GPU, in ten minutes, into one JSON file.
#
#   bash benchmarks/gpu_all.sh OUT              # on the first GPU
#   bash benchmarks/gpu_all.sh OUT --dry        # on a processor, with tiny settings: tries the script, measures nothing
#
# Every step has a time limit of its own; one that fails or runs out of time is named in OUT/gpu.json with the end of
# what it said, and the others go on. Weights are random: cost does not depend on them. Nothing is downloaded.
set -u
out=${1:?where results go}
dry=${2:-}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out/steps"
export PYTHONPATH="$here/..:$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONWARNINGS=ignore
python=${PYTHON:-python3}

if [ "$dry" = --dry ]; then
  device=cpu threads=2 large=timm:vit_tiny_patch16_224 name=vit_tiny_patch16_224
  tiles=16 slides=2 times="1 1" block=1024 repeats=1 limit=900
else
  device=cuda:0 threads=8 large=timm:vit_base_patch16_224 name=vit_base_patch16_224
  tiles=6144 slides=8 times="4 4" block=4096 repeats=1 limit=0
fi

step() { # name, seconds, command: its status, seconds and the end of what it said
  local step=$1 seconds=$2 started ended code
  shift 2
  [ "$limit" != 0 ] && seconds=$limit
  started=$(date +%s)
  timeout --kill-after=10 "$seconds" "$@" >"$out/steps/$step.txt" 2>&1
  code=$?
  ended=$(date +%s)
  printf '{"status": %d, "seconds": %d, "limit": %d}\n' "$code" $((ended - started)) "$seconds" >"$out/steps/$step.state"
  echo "$step: status $code, $((ended - started)) s"
}

step machine 20 sh -c 'nvidia-smi -q 2>/dev/null | head -60; lscpu; cat /proc/loadavg'
step slides 90 "$python" "$here/gpu_slides.py" "$out/slides" --count "$slides" --times $times --block-px "$block"
step engine 150 "$python" "$here/extraction.py" --models "$name" --device "$device" --precision bfloat16 \
  --tiles "$tiles" --repeats 3 --read-threads "$threads" --without-usual --precisions bfloat16,float32 \
  --precision-tiles $((tiles / 8)) --slide "$out/slides/slide0.svs" --json "$out/steps/engine.json"
step archive 170 "$python" -m wsi_pipe benchmark "$out/slides" -e "20x=$large" --encoder-lr "$out/slides/student/student.safetensors" \
  --devices "$device" --random-weights --repeats "$repeats" -o "$out/archive" --json
if [ "$dry" = --dry ]; then
  echo "tests of the GPU: not run without one"
else
  step tests 120 "$python" -m pytest -n 0 -q -p no:cacheprovider "$here/../tests/gpu"
fi

"$python" - "$out" "$dry" <<'PYTHON'
import json, sys
from pathlib import Path

out, dry = Path(sys.argv[1]), sys.argv[2] == "--dry"
said = {"dry_run": dry, "steps": {}}
for state in sorted((out / "steps").glob("*.state")):
    step = json.loads(state.read_text())
    text = state.with_suffix(".txt").read_text(errors="replace")
    step["said"] = text[-4000:]
    figures = state.with_suffix(".json")
    if figures.is_file():
        step["figures"] = json.loads(figures.read_text())
    said["steps"][state.stem] = step
archive = out / "archive" / "benchmark.json"
if archive.is_file():
    said["archive"] = json.loads(archive.read_text())
(out / "gpu.json").write_text(json.dumps(said, indent=1) + "\n")
print(out / "gpu.json", {name: step["status"] for name, step in said["steps"].items()})
PYTHON
