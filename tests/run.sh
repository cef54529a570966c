#!/usr/bin/env bash
# Every check this machine can run, and what it skipped and why. Called by `make test`.
# One suite runs on SQLite; of it, every test with a database runs again on PostgreSQL where a server
# is installed: TEST_DATABASE_URL names one, or a private cluster is started for the run. It does not
# wait for the disk: the tests kill Tapeout, never the machine.
set -u
cd "$(dirname "$0")/.."
bin=.venv/bin
status=0
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

part() {
    local title=$1; shift
    local started=$SECONDS
    printf '\n== %s\n' "$title"
    if "$@"; then printf '== %s: passed in %d s\n' "$title" $((SECONDS - started))
    else printf '== %s: FAILED after %d s\n' "$title" $((SECONDS - started)); status=1; fi
}

start_postgres() {
    [ -n "${TEST_DATABASE_URL:-}" ] && return 0
    local programs
    programs=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -1)
    [ -n "$programs" ] || programs=$(dirname "$(command -v initdb 2>/dev/null)" 2>/dev/null)
    [ -x "$programs/initdb" ] || return 1
    cluster=$(mktemp -d /tmp/tapeout-postgres.XXXXXX)
    local as=()
    if [ "$(id -u)" = 0 ]; then chown postgres "$cluster"; as=(runuser -u postgres --); fi
    "${as[@]}" "$programs/initdb" -D "$cluster/data" -U tapeout --auth=trust >"$cluster.log" 2>&1 || return 1
    local port=$((20000 + RANDOM % 20000))
    "${as[@]}" "$programs/pg_ctl" -D "$cluster/data" -w -l "$cluster/server.log" \
        -o "-p $port -k $cluster -c listen_addresses=127.0.0.1 -c max_connections=200 -c fsync=off" start >>"$cluster.log" 2>&1 || return 1
    trap '"${as[@]}" "'"$programs"'/pg_ctl" -D "'"$cluster"'/data" -m immediate stop >/dev/null 2>&1; rm -rf "'"$cluster"'" "'"$cluster"'.log"' EXIT
    export TEST_DATABASE_URL="postgresql://tapeout@127.0.0.1:$port/postgres"
}

part "style" $bin/ruff check .
part "format" $bin/ruff format --check .
part "types" $bin/pyright
part "layers" $bin/lint-imports
url=${TEST_DATABASE_URL:-}
unset TEST_DATABASE_URL
part "tests (SQLite)" $bin/python -m pytest tests -q -n 2 --dist loadfile
[ -n "$url" ] && export TEST_DATABASE_URL=$url
if start_postgres; then
    part "tests with a database (PostgreSQL)" $bin/python -m pytest tests/app tests/evidence/test_{kill,overspend,migrations}.py -q -n 2 --dist loadfile -m "database and not browser"
else
    printf '\n== tests with a database (PostgreSQL): skipped, no PostgreSQL server is installed\n'
fi
printf '\n== %s in %d s\n' "$([ $status = 0 ] && echo "All passed" || echo "SOMETHING FAILED")" $SECONDS
exit $status
