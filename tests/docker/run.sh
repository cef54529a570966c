#!/usr/bin/env bash
# `make test-docker`: the compose file on a real engine. Uses the engine that DOCKER_HOST names or
# that answers already; otherwise, as root with Debian's docker.io installed, starts one of its own.
# Base images that are missing are made with debootstrap under the names that the Dockerfile and
# compose.yaml use, so that nothing is pulled; wheels are fetched once by pip.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=${TAPEOUT_DOCKER_WORK:-$PWD/.docker-test}
mkdir -p "$work"

if ! docker version >/dev/null 2>&1; then
    command -v dockerd >/dev/null || { echo "skipped: no Docker engine answers, and none is installed (Debian: docker.io docker-compose debootstrap)"; exit 0; }
    [ "$(id -u)" = 0 ] || { echo "skipped: starting a Docker engine needs root"; exit 0; }
    export DOCKER_HOST=unix://$work/docker.sock
    dockerd --data-root "$work/data" --exec-root "$work/exec" -H "$DOCKER_HOST" \
        --pidfile "$work/docker.pid" >"$work/dockerd.log" 2>&1 &
    trap 'kill "$(cat "$work/docker.pid")"; wait' EXIT
    for _ in $(seq 60); do docker version >/dev/null 2>&1 && break; sleep 0.5; done
    docker version >/dev/null 2>&1 || { echo "skipped: the Docker engine does not start here:"; tail -3 "$work/dockerd.log"; exit 0; }
fi
command -v docker-compose >/dev/null || docker compose version >/dev/null 2>&1 \
    || { echo "skipped: docker compose is not installed"; exit 0; }

python=python:3.11-slim-bookworm
postgres=postgres:16-bookworm
if ! docker image inspect "$python" >/dev/null 2>&1 || ! docker image inspect "$postgres" >/dev/null 2>&1; then
    if ! { docker pull -q "$python" && docker pull -q "$postgres"; } >/dev/null 2>&1; then
        command -v debootstrap >/dev/null || { echo "skipped: base images can neither be pulled nor made (Debian: debootstrap)"; exit 0; }
        echo "making base images"
        debootstrap --variant=minbase --include=python3,python3-venv,python3-dev,g++,ca-certificates,postgresql \
            bookworm "$work/base" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$work/debootstrap.log"
        cp /etc/ssl/certs/ca-certificates.crt "$work/base/etc/ssl/certs/ca-certificates.crt"
        install -m 0755 tests/docker/postgres-entrypoint.sh "$work/base/usr/local/bin/"
        ln -s /usr/lib/postgresql/15/bin/pg_isready "$work/base/usr/local/bin/"  # not the wrapper
        tar -C "$work/base" -c . | docker import - "$python" >/dev/null
        tar -C "$work/base" -c . | docker import --change 'ENTRYPOINT ["postgres-entrypoint.sh"]' - "$postgres" >/dev/null
        rm -rf "$work/base"
    fi
fi
if [ ! -e "$work/wheels/.complete" ]; then
    echo "fetching wheels"
    .venv/bin/pip download -q -d "$work/wheels" -c requirements.lock torch==2.13.0 onnxruntime==1.31.1 "setuptools>=77" .
    touch "$work/wheels/.complete"
fi
export TAPEOUT_DOCKER_WORK=$work
.venv/bin/python -m pytest tests/docker -m docker -v "$@"
