#!/usr/bin/env bash
# Builds the images with docker, podman or buildah, whichever works here (`make images`).
#   docker/build.sh [options passed on to the builder]
# Variables: BUILDER, IMAGE_PREFIX (such as registry.example.com/team/), TAG, BASE, TARGETS (controller, cpu, gpu),
# PUSH=1 (docker only: pushes, with an SBOM and provenance).
set -euo pipefail
cd "$(dirname "$0")/.."
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
tag=${TAG:-$version}

works() { "$@" >/dev/null 2>&1; }
builder=${BUILDER:-}
if [ -z "$builder" ]; then
    if works docker buildx version && works docker info; then builder=docker
    elif works podman info; then builder=podman
    elif works buildah info; then builder=buildah
    else
        echo "error: images need docker (and buildx), podman or buildah, and none of them works here. Install one" >&2
        exit 1
    fi
fi
case $builder in
    docker) build=(docker buildx build --load) ;;
    podman | buildah) build=("$builder" build --layers --format docker) ;; # the other format forgets SHELL
    *)
        echo "error: BUILDER must be docker, podman or buildah, and is \"$builder\". Without it the first that works is taken" >&2
        exit 1
        ;;
esac
[ "$builder" != docker ] || [ -z "${PUSH:-}" ] || build=(docker buildx build --push --sbom=true --provenance=mode=max)

args=(--build-arg "VERSION=$version" --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)"
    --build-arg "CREATED=${CREATED:-$(date -u +%Y-%m-%dT%H:%M:%SZ)}")
[ -z "${BASE:-}" ] || args+=(--build-arg "BASE=$BASE")
for target in ${TARGETS:-controller cpu gpu}; do
    case $target in
        controller) file=controller image=grpo-controller:$tag ;;
        cpu) file=worker image=grpo-worker:$tag-cpu ;;
        gpu) file=worker image=grpo-worker:$tag ;;
        *) echo "error: TARGETS holds controller, cpu and gpu, and not \"$target\"" >&2; exit 1 ;;
    esac
    image=${IMAGE_PREFIX:-}$image
    "${build[@]}" "${args[@]}" "$@" --file "docker/$file.Dockerfile" --target "$target" --tag "$image" .
    echo "built $image" >&2
done
