#!/bin/bash
# As the official image's, as far as compose.yaml needs it: makes a cluster in PGDATA once, runs it.
set -e
export PATH=$(ls -d /usr/lib/postgresql/*/bin):$PATH
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    install -d -o postgres -g postgres -m 0700 "$PGDATA"
    echo "$POSTGRES_PASSWORD" >/tmp/password
    chown postgres /tmp/password
    runuser -u postgres -- initdb -D "$PGDATA" -U "$POSTGRES_USER" --pwfile=/tmp/password --auth=scram-sha-256 \
        --encoding=UTF8 --locale=C.UTF-8 >/dev/null
    echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
    echo "listen_addresses = '*'" >>"$PGDATA/postgresql.conf"
    runuser -u postgres -- pg_ctl -D "$PGDATA" -w -o "-c listen_addresses=" start >/dev/null
    PGPASSWORD=$POSTGRES_PASSWORD runuser -u postgres -- createdb -U "$POSTGRES_USER" "$POSTGRES_USER"
    runuser -u postgres -- pg_ctl -D "$PGDATA" -w stop >/dev/null
fi
exec runuser -u postgres -- postgres -D "$PGDATA"
