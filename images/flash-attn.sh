#!/bin/sh
# Build a wheel of FlashAttention 2 in /wheels, with the CUDA compiler from the PyPI wheels.
# Only the Dockerfile uses this script.
set -eu
apt-get update
apt-get install --yes --no-install-recommends g++ libpython3-dev
python /mnt/install.py --whole /build/requirements-torch.txt
python /mnt/install.py --whole /build/requirements-nvcc.txt
CUDA_HOME=$(echo /opt/medjob/lib/python3*/site-packages/nvidia/cu13)
# The wheels are built for running programs and lack the names that a linker looks for.
ln -s lib "$CUDA_HOME/lib64"
ln -s libcudart.so.13 "$CUDA_HOME/lib/libcudart.so"
PYTHONPATH=$(echo /mnt/pip-*.whl)
PIP_CONFIG_FILE=/run/secrets/pip.conf
PATH=$CUDA_HOME/bin:$PATH
FLASH_ATTENTION_FORCE_BUILD=TRUE
export CUDA_HOME PYTHONPATH PIP_CONFIG_FILE PATH FLASH_ATTENTION_FORCE_BUILD
python -m pip wheel --no-deps --no-build-isolation --use-pep517 --no-cache-dir --require-hashes --wheel-dir /wheels -r /build/requirements-flash-attn.txt
