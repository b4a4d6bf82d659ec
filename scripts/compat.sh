#!/usr/bin/env bash
# The fast tests under other versions of transformers and peft: scripts/compat.sh lowest|highest
# lowest: what pyproject.toml allows at least. highest: the newest that it allows.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bound() { sed -n "s/^ *\"$1>=\([0-9.]*\),*\(.*\)\".*/\1 \2/p" pyproject.toml; }
case "${1:-}" in
lowest)  pins=("transformers==$(bound transformers | cut -d' ' -f1).*" "peft==$(bound peft | cut -d' ' -f1).*") ;;
highest) pins=("transformers$(bound transformers | cut -d' ' -f2)" "peft$(bound peft | cut -d' ' -f2)") ;;
*) echo "say lowest or highest" >&2; exit 2 ;;
esac
# The other pins stay; what they say of these two, and of what these two ask for, does not.
place=build/compat-$1
mkdir -p build
grep -vE '^(transformers|peft|huggingface_hub|tokenizers|safetensors|accelerate)==' constraints.txt >"$place.txt"
"${PYTHON:-python3}" -m venv "$place"
PIP_CONSTRAINT="$place.txt" "$place/bin/pip" -qq --disable-pip-version-check install '.[tune]' pytest hypothesis "${pins[@]}"
"$place/bin/pip" list --format=freeze | grep -E '^(torch|transformers|peft)=='
"$place/bin/python" -m pytest -q -p no:cacheprovider tests/contract tests/test_peft.py tests/test_training.py tests/test_recipe.py
