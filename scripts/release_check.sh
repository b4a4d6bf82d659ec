#!/usr/bin/env bash
# What is in dist works for somebody who has nothing else: in an empty environment, outside the source tree, without the Hub.
set -euo pipefail
wheel=$(realpath "$(ls -t dist/peml-*.whl | head -1)")
constraints=$(realpath constraints.txt)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
"${PYTHON:-python3}" -m venv empty
PIP_CONSTRAINT="$constraints" empty/bin/pip -qq --disable-pip-version-check install "$wheel"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
empty/bin/peml demo --steps 10 --output demo >demo.txt
empty/bin/peml methods >methods.txt
cat >recipe.yaml <<'YAML'
model: toy
tasks: [{suite: toy, include: [mood, past], limit_train: 64, limit_eval: 16}]
method: peml
set: {adapter.r: 4, prompt.num_virtual_tokens: 8, prompt.width: 16, prompt.embedding_dim: 16, prompt.head_rank: 8}
train: {max_steps: 5, per_device_train_batch_size: 8, max_length: 64}
YAML
empty/bin/peml train recipe.yaml --output run
empty/bin/peml evaluate run >scores.txt
empty/bin/peml plan toy >plan.txt
empty/bin/python -c "import peml; assert 'empty' in peml.__file__, peml.__file__"
echo "$(basename "$wheel"): installs, trains and evaluates in an empty environment"
