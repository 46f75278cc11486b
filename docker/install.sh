#!/bin/bash
# Inside an image: installs a lock into the environment /opt/grpo, with uv and pip that do not stay.
#   install.sh LOCK [REGEX of the packages to take]
set -euo pipefail
here=$(dirname "$0")
tools=$(mktemp -d)
export TMPDIR=$tools # uv leaves locks there, which only their owner may remove
lock=$tools/lock
awk -v take="${2:-.}" '/^[a-z]/ { taken = $0 ~ take } taken' "$1" >"$lock"

export HOME=/root
python3 -m venv "$tools/venv"
"$tools/venv/bin/python" -m pip install -q --disable-pip-version-check --require-hashes -r "$here/uv.lock"
[ -e /opt/grpo/bin/python ] || python3 -m venv --without-pip /opt/grpo
"$tools/venv/bin/uv" pip install -q --link-mode copy --python /opt/grpo/bin/python --no-deps --require-hashes -r "$lock"

# A third of the driver's packages is there for others: tests, Ray for Java, learning without language models, Arrow's
# network service, TensorBoard's reader.
packages=$(/opt/grpo/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
(
    cd "$packages"
    find . -type d -name tests -prune -exec rm -r {} +
    rm -rf ray/jars ray/rllib pyarrow/include pyarrow/*flight* tensorboard_data_server/bin
)
# Compiled here, because the root is read-only later; but not the hundreds of modules of which a run loads one or none.
/opt/grpo/bin/python -m compileall -qq -j0 -x '/(transformers/models|plotly/graph_objs)/' "$packages" || true
rm -r "$tools"
rm -rf /root/.cache
