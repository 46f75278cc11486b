#!/usr/bin/env bash
# Builds the images with buildah over a base made by debootstrap, and lays each out as a folder that a node can take for
# a root filesystem. Needs root. Prints a line per image: name, folder, and the image's settings as options of load-image.
#   tests/e2e/images.sh [controller] [cpu] [gpu]
# E2E_CACHE (default ~/.cache/grpo-e2e) keeps layers: a second run redoes only what changed, mostly the source.
# A folder is named after its image and never changes; those of the last three builds stay.
set -euo pipefail
cd "$(dirname "$0")/../.."
cache=${E2E_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/grpo-e2e}
targets=${*:-controller cpu}
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
base=localhost/grpo-base:bookworm
mkdir -p "$cache/rootfs" "$cache/settings" "$cache/uv"
cache=$(realpath "$cache")
exec 3>&1 1>&2
exec 4>"$cache/lock"
flock 4 # one build at a time

missing=()
for program in buildah debootstrap; do command -v $program >/dev/null || missing+=($program); done
if [ ${#missing[@]} -gt 0 ]; then
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}"
fi

# A store of its own; chroot and the host's network, since a sandbox often allows no more.
printf '[storage]\ndriver = "overlay"\ngraphroot = "%s"\nrunroot = "%s"\n' "$cache/storage" "$cache/run" >"$cache/storage.conf"
export CONTAINERS_STORAGE_CONF=$cache/storage.conf BUILDAH_ISOLATION=chroot BUILDER=buildah

# What pip and uv need on this machine to reach their index goes in beside the build, never into a layer.
settings=$cache/settings
chmod 700 "$settings"
uv=.venv/bin/uv
{
    echo '[global]'
    for key in index-url extra-index-url trusted-host; do
        value=$(.venv/bin/python -m pip config get "global.$key" 2>/dev/null) && echo "$key = $value"
    done
    echo 'cert = /etc/ssl/certs/ca-certificates.crt'
} >"$settings/pip.conf"
{
    value=${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-$(.venv/bin/python -m pip config get global.index-url 2>/dev/null || true)}}
    [ -z "$value" ] || echo "index-url = \"$value\""
    echo 'system-certs = true'
    echo 'cache-dir = "/srv"'
} >"$settings/uv.toml"
wheels=$([ -x $uv ] && $uv cache dir || echo "$cache/uv") # what setup has fetched already
mkdir -p "$wheels"
mounts=(-v "$settings/pip.conf:/etc/pip.conf:ro" -v "$settings/uv.toml:/etc/uv/uv.toml:ro" -v "$wheels:/srv")
[ ! -e /etc/ssl/certs ] || mounts+=(-v /etc/ssl/certs:/etc/ssl/certs:ro)

# Before dependencies change, layers that no image has any more go.
key=$(cat requirements/*.lock docker/*.{Dockerfile,sh} | sha256sum)
if [ "$key" != "$(cat "$cache/key" 2>/dev/null)" ]; then
    buildah rmi --prune --force >/dev/null || true
    echo "$key" >"$cache/key"
fi

buildah inspect --type image "$base" >/dev/null 2>&1 || docker/debian-base.sh "$base"
# A constant date: the labels come last, but a new one would still be a new image of the same content.
IMAGE_PREFIX=localhost/ BASE=$base TARGETS=$targets CREATED=${CREATED:-1970-01-01T00:00:00Z} \
    docker/build.sh --network host "${mounts[@]}"

for target in $targets; do
    case $target in
        controller) image=grpo-controller:$version ;;
        cpu) image=grpo-worker:$version-cpu ;;
        gpu) image=grpo-worker:$version ;;
    esac
    # buildah mounts its store over itself, and no hard link leads out of a mount; here it is taken away for this command.
    buildah inspect --type image "localhost/$image" | unshare --mount bash -c \
        'umount --lazy "$1/storage/overlay" 2>/dev/null; exec python3 tests/e2e/rootfs.py "$1" "$2"' - "$cache" "localhost/$image" >&3
done
