"""The whole appliance as `tapeout serve` runs it, but for its workers, which are null.

Started by `benchmarks.gateway`, with the data directory and the port as arguments.
"""

import asyncio
import functools
import os
import sys
from pathlib import Path

import msgspec
import uvicorn

import app.main
from app.cli.connection import Connection
from app.core import clock
from app.core.database import Database
from app.core.storage import Storage
from app.deployments.launchers.base import Launch
from app.deployments.launchers.local import LocalLauncher
from app.deployments.service import deploy_version
from app.organizations.service import bootstrap, default_organization_id
from app.registry.tables import Artifact, Model, ModelVersion
from app.settings import Settings, read_settings
from benchmarks.null_worker import MANIFESTS, RECEIPT


def null_command(launch: Launch, socket_path: str) -> list[str]:
    return [sys.executable, "-P", "-m", "benchmarks.null_worker", "--socket", socket_path]


async def deploy(settings: Settings) -> None:
    """Registers a built version of each kind, as a finished build would."""
    storage = Storage(settings.data_dir)
    await asyncio.to_thread(app.main.migrate, settings)
    database = Database(settings.async_database_url)
    await bootstrap(database, settings)
    now = clock.now()
    async with database.write() as session:
        organization_id = await default_organization_id(session)
        for kind, manifest in MANIFESTS.items():
            path = storage.artifact(f"art_{kind}")
            path.mkdir(parents=True)
            (path / "kind").write_text(kind)
            session.add(Artifact(id=f"art_{kind}", digest=kind, size_bytes=8, created_at=now))
            session.add(
                Model(id=f"mod_{kind}", organization_id=organization_id, name=kind, created_at=now)
            )
            await session.flush()
            version = ModelVersion(
                id=f"ver_{kind}",
                model_id=f"mod_{kind}",
                number=1,
                upload_id="none",
                filename="none",
                upload_bytes=1,
                sha256="",
                status="ready",
                artifact_id=f"art_{kind}",
                manifest=msgspec.to_builtins(manifest, str_keys=True),
                receipt=msgspec.to_builtins(RECEIPT, str_keys=True),
                created_at=now,
            )
            session.add(version)
            await session.flush()
            await deploy_version(session, version)
    await database.close()


def main() -> None:
    data_dir, port = Path(sys.argv[1]), int(sys.argv[2])
    settings = read_settings(os.environ, data_dir=data_dir, port=port)
    asyncio.run(deploy(settings))
    app.main.LocalLauncher = functools.partial(LocalLauncher, command=null_command)  # type: ignore[misc,assignment]
    server = uvicorn.Server(
        uvicorn.Config(
            app.main.create_app(settings),
            http=Connection,
            host="127.0.0.1",
            port=port,
            access_log=False,
            log_config=None,
            server_header=False,
        )
    )
    server.run()


if __name__ == "__main__":
    main()
