"""The console: server-rendered pages for people, under `/console`.

`router` is all of it. It reads services straight through open sessions, never over HTTP, and
needs these on `app.state`: settings, database, storage, broadcast, uploads, builder, sign_ins.
"""

from app.console.routes import router

__all__ = ["router"]
