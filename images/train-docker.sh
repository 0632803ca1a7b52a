#!/bin/sh
# Run a run file in the full image, on this machine's GPU or CPU.
# Called by `make train-docker`, which sets the variables.
# Writes only to ./runs and .medjob/docker (models, caches, scratch).
set -euf
say() { echo "train-docker: $*" >&2; }

# Print a bind mount for `--mount`. Unlike --volume, it allows colons in paths, and fails if the source is missing.
# The fields are CSV, so a path with commas or quotes is quoted. Arguments: source, target, further fields.
mount() { printf 'type=bind,"source=%s",target=%s%s' "$(printf %s "$1" | sed 's/"/""/g')" "$2" "${3:-}"; }

[ -f "$RUN" ] || { say "error: RUN=$RUN: no such file"; exit 64; }
[ -z "${SECRETS:-}" ] || [ -d "$SECRETS" ] || { say "error: SECRETS=$SECRETS: no such folder"; exit 64; }
case $IMAGE in
  */*) ;;  # docker may pull it
  *) "$DOCKER" image inspect "$IMAGE" > /dev/null 2>&1 || { say "error: image $IMAGE does not exist; run make image"; exit 64; } ;;
esac
mkdir -p runs .medjob/docker/runs .medjob/docker/data

# The container seals artifacts in ./runs with the same key as `medjob` on this machine.
key=${XDG_CONFIG_HOME:-$HOME/.config}/medjob/seal-key
copy=.medjob/docker/.config/medjob/seal-key
mkdir -p "$(dirname "$key")" "$(dirname "$copy")"
(
  umask 077
  [ -s "$key" ] || od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$key"
  cp "$key" "$copy"
)

# The container runs as the calling user, or as the owner of ./runs if root calls it, so that the
# user owns the files. It never runs as root: a ./runs of root is given to the image's user.
user=$(id -u):$(id -g)
case $user in 0:*)
  user=$(stat -c %u:%g runs)
  case $user in 0:*) user=10001:10001; say "./runs now belongs to uid 10001"; chown -R "$user" runs ;; esac
  chown -R "$user" .medjob/docker
esac

set -- --rm --read-only --user "$user" --cap-drop ALL --security-opt no-new-privileges --tmpfs /tmp --shm-size 2g --stop-timeout 60
# With SELinux a container may read only files with its own label. --mount cannot change labels, and relabelling the
# user's folders could lock other programs out. Where there is no SELinux, the option has no effect.
set -- "$@" --security-opt label=disable
set -- "$@" --mount "$(mount "$PWD/.medjob/docker" /work)" --mount "$(mount "$PWD/runs" /work/runs)"
set -- "$@" --mount "$(mount "$(realpath -- "$RUN")" /etc/medjob/job.yaml ,readonly)"
[ ! -d data ] || set -- "$@" --mount "$(mount "$(realpath -- data)" /work/data ,readonly)"
[ -z "${SECRETS:-}" ] || set -- "$@" --mount "$(mount "$(realpath -- "$SECRETS")" /run/secrets/medjob ,readonly)"
[ ! -t 2 ] || set -- "$@" --tty
if command -v nvidia-smi > /dev/null; then
  set -- "$@" --gpus all
else
  say "nvidia-smi not found, so the run uses the CPU"
fi
# shellcheck disable=SC2086  # flags are split at spaces; set -f keeps * and ? as they are
exec "$DOCKER" run "$@" ${DOCKER_ARGS:-} "$IMAGE" run -f /etc/medjob/job.yaml ${ARGS:-}
