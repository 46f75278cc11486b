#!/usr/bin/env bash
# A base image where no registry can be reached: Debian 12 with its own Python 3.11, made by debootstrap, put into
# buildah's store. Needs root, buildah and debootstrap. Packages come from where this machine's apt takes
# them, else from debootstrap's own default.
#   docker/debian-base.sh TAG [options of buildah, such as --root DIR]
set -euo pipefail
tag=${1:?usage: docker/debian-base.sh TAG [buildah options]}
shift
sources=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources 2>/dev/null || true)
mirror=${DEBIAN_MIRROR:-$(sed -nE 's/^(URIs: *|deb (\[[^]]*\] )?)(https?:[^ ]*\/debian)\/?( .*)?$/\3/p' <<<"$sources" | head -1)}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$folder/root" \
    ${mirror:+"$mirror"} >&2
cp /etc/apt/sources.list.d/debian.sources "$folder/root/etc/apt/sources.list.d/" 2>/dev/null &&
    rm -f "$folder/root/etc/apt/sources.list"
rm -rf "$folder"/root/var/{cache/apt/{*.bin,archives/*.deb},cache/debconf/*-old,lib/apt/lists/*,log/*} \
    "$folder"/root/usr/share/{doc,info,locale,man}/* "$folder/root/etc/resolv.conf"
container=$(buildah "$@" from scratch)
buildah "$@" copy -q "$container" "$folder/root" / >&2
buildah "$@" config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --cmd bash "$container"
buildah "$@" commit -q --rm "$container" "$tag"
