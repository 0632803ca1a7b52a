#!/bin/sh
# Run a run file in the full image, on this machine's GPU or CPU.
# Called by `make train-docker`, which sets the variables.
# Writes only to ./runs and .medjob/docker (models, caches, scratch).
set -eu
say() { echo "train-docker: $*" >&2; }
[ -f "$RUN" ] || { say "error: RUN=$RUN: no such file"; exit 64; }
case $IMAGE in
  */*) ;;  # docker may pull it
  *) "$DOCKER" image inspect "$IMAGE" > /dev/null 2>&1 || { say "error: image $IMAGE does not exist; run make image"; exit 64; } ;;
esac
mkdir -p runs .medjob/docker/runs .medjob/docker/data

# The container runs as the calling user, or as the owner of ./runs if root calls it, so that the
# user owns the files. It never runs as root: a ./runs of root is given to the image's user.
user=$(id -u):$(id -g)
case $user in 0:*)
  user=$(stat -c %u:%g runs)
  case $user in 0:*) user=10001:10001; say "./runs now belongs to uid 10001"; chown -R "$user" runs ;; esac
  chown -R "$user" .medjob/docker
esac

set -- --rm --read-only --user "$user" --cap-drop ALL --security-opt no-new-privileges --tmpfs /tmp --shm-size 2g --stop-timeout 60
set -- "$@" --volume "$PWD/.medjob/docker:/work" --volume "$PWD/runs:/work/runs" --volume "$(realpath "$RUN"):/etc/medjob/job.yaml:ro"
[ ! -d data ] || set -- "$@" --volume "$PWD/data:/work/data:ro"
[ -z "$SECRETS" ] || set -- "$@" --volume "$(realpath "$SECRETS"):/run/secrets/medjob:ro"
[ ! -t 2 ] || set -- "$@" --tty
if command -v nvidia-smi > /dev/null; then
  set -- "$@" --gpus all
else
  say "nvidia-smi not found, so the run uses the CPU"
fi
# shellcheck disable=SC2086  # flags are split at spaces
exec "$DOCKER" run "$@" $DOCKER_ARGS "$IMAGE" run -f /etc/medjob/job.yaml $ARGS
