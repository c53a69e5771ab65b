#!/bin/sh
# Merge an adapter into its base, and see that the merged model writes the same text:
#
#   sh templates/merge_lora_template.sh [ADAPTER [MERGED [PROMPT]]]
#
# PYTHON chooses the interpreter, CHECKPOINTS_DIR another folder of runs.
set -eu # a step that fails ends everything: a merge that nobody checked is worse than none

adapter=${1:-template-lora}
merged=${2:-$adapter-merged}
prompt=${3:-O Romeo}
here=$(cd "$(dirname "$0")/.." && pwd)
[ -n "${PYTHON:-}" ] || { [ -x "$here/.venv/bin/python" ] && PYTHON=$here/.venv/bin/python; } || PYTHON=python

# 1. Look before you write. This reads every file of the adapter and of its base, compares fingerprints, and names all
#    problems at once. An adapter that was trained on other weights would be refused here.
"$PYTHON" "$here/adapters.py" check "${CHECKPOINTS_DIR:-checkpoints}/$adapter"

# 2. Merge: W becomes W + (alpha / rank) B A, computed in 32 bits, in a new run. Base and adapter stay as they are, as
#    nothing can be taken out of a merged weight again without a rounding error. What was written is read back and
#    compared with base and adapter on held-out text before the run gets its name; nothing is ever overwritten.
"$PYTHON" "$here/adapters.py" merge "$adapter" --out "$merged"

# 3. Text from base and adapter, and from the merged run, with one seed. The weights that both compute with are the
#    same, so the texts must be, to the last character.
with_adapter=$("$PYTHON" "$here/generate.py" --run "$adapter" --prompt "$prompt" --max-new-tokens 200 --seed 1)
from_merged=$("$PYTHON" "$here/generate.py" --run "$merged" --prompt "$prompt" --max-new-tokens 200 --seed 1)
[ "$with_adapter" = "$from_merged" ] || { echo "error: $merged writes another text than $adapter" >&2; exit 1; }
printf '%s\n' "$from_merged"

# 4. When to merge: for a program that knows nothing of adapters, for a file that stands alone, or as a base for more
#    training. When not to: to serve several adapters on one base, or where disk space counts, as a merged run is as
#    large as its base, and an adapter a small part of that.
echo "$merged is a run without an adapter; next:"
echo "$PYTHON $here/templates/export_lora_template.py --run $adapter --checkpoints-dir ${CHECKPOINTS_DIR:-checkpoints}"
