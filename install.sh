#!/usr/bin/env bash
# Install into .venv with uv, which pip brings, and with pip where that fails. uv does not read pip's
# settings, so it is given pip's index, find-links and certificates. torch's CPU or CUDA build is chosen
# by the machine where PyTorch's own index can be reached.
set -euo pipefail
pip=(.venv/bin/python -m pip)
setting() { "${pip[@]}" config get "global.$1" 2>/dev/null || true; }
"${pip[@]}" install --quiet --disable-pip-version-check uv==0.13.9 || true
export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(setting find-links)}}"
export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$(setting index-url)}}"
export SSL_CERT_FILE="${SSL_CERT_FILE:-${PIP_CERT:-$(setting cert)}}"
export HTTPS_PROXY="${HTTPS_PROXY:-${PIP_PROXY:-$(setting proxy)}}"
for name in UV_FIND_LINKS UV_DEFAULT_INDEX SSL_CERT_FILE HTTPS_PROXY; do
    [ -n "${!name}" ] || unset "$name"
done
uv=(.venv/bin/uv pip install --python .venv/bin/python)
"${uv[@]}" --torch-backend=auto "$@" 2>.venv/uv.log || "${uv[@]}" "$@" ||
    "${pip[@]}" install --disable-pip-version-check "$@"
