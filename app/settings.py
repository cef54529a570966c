"""The box's settings: one frozen value, read once from `TAPEOUT_*` variables.

Owns names, defaults and validation. Every bad variable is reported, not only the first.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

Launcher = Literal["local", "docker"]
LogFormat = Literal["text", "json"]


class SettingsError(Exception):
    """One line per variable that cannot be used, each saying what would be accepted."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """See `FIELDS` for the variable behind each setting."""

    data_dir: Path = Path("tapeout-data")
    host: str = "127.0.0.1"
    port: int = 8080
    public_url: str = ""
    database_url: str = ""
    admin_key: str = ""
    launcher: Launcher = "local"
    launcher_socket: Path = Path("/run/tapeout/launcher.sock")
    device: str = "cpu"
    worker_threads: int = 0
    build_threads: int = 0
    build_timeout_seconds: int = 1800
    build_memory_bytes: int = 0
    optimise: bool = True
    optimise_timeout_seconds: int = 1800
    max_upload_bytes: int = 64 * 1024**3
    max_open_uploads: int = 16
    upload_quota_bytes: int = 0
    max_request_bytes: int = 32 * 1024**2
    kv_cache_bytes: int = 512 * 1024**2
    kv_swap_bytes: int = 0
    kv_poison: bool = False
    request_timeout_seconds: int = 600
    drain_seconds: int = 30
    session_days: int = 14
    currency: str = "usd"
    usage_detail_days: int = 62
    stripe_api_key: str = ""
    stripe_webhook_secrets: tuple[str, ...] = ()
    stripe_api_base: str = ""
    log_level: str = "INFO"
    log_format: LogFormat = "text"

    @property
    def url(self) -> str:
        """Where people reach the box, without a trailing slash."""
        return self.public_url.rstrip("/") or f"http://{self.host}:{self.port}"

    @property
    def async_database_url(self) -> str:
        """The control plane's SQLAlchemy URL, with an asynchronous driver."""
        url = self.database_url or f"sqlite:///{self.data_dir / 'tapeout.db'}"
        if url.startswith("sqlite:"):
            return url.replace("sqlite:", "sqlite+aiosqlite:", 1)
        return "postgresql+psycopg:" + url.split(":", 1)[1]

    @property
    def sync_database_url(self) -> str:
        """The same database for the account writer and migrations, which run in threads."""
        return self.async_database_url.replace("+aiosqlite", "", 1)

    @property
    def is_sqlite(self) -> bool:
        return self.async_database_url.startswith("sqlite")

    @property
    def threads_per_worker(self) -> int:
        return self.worker_threads or os.cpu_count() or 1

    @property
    def threads_per_build(self) -> int:
        return self.build_threads or os.cpu_count() or 1


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None


def _port(text: str) -> int:
    port = _number(text)
    if not 0 < port < 65536:
        raise ValueError("a port is between 1 and 65535")
    return port


def _positive(text: str) -> int:
    number = _number(text)
    if number < 1:
        raise ValueError("must be at least 1")
    return number


def _count(text: str) -> int:
    number = _number(text)
    if number < 0:
        raise ValueError("must be 0 or more")
    return number


def _flag(text: str) -> bool:
    if text not in {"0", "1"}:
        raise ValueError("must be 0 or 1")
    return text == "1"


_UNITS = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}


def _bytes(text: str) -> int:
    digits = text.strip().lower().removesuffix("b").removesuffix("i")
    unit = digits[-1:] if digits[-1:] in _UNITS and digits[-1:] else ""
    number = _number(digits.removesuffix(unit)) * _UNITS[unit]
    if number < 0:
        raise ValueError("must be 0 or more")
    return number


def _database_url(text: str) -> str:
    if text.partition(":")[0] not in {"sqlite", "postgresql", "postgresql+psycopg", "postgres"}:
        raise ValueError("must start with sqlite: or postgresql:")
    return text


def _launcher(text: str) -> str:
    if text not in {"local", "docker"}:
        raise ValueError("one of local, docker")
    return text


def _log_format(text: str) -> str:
    if text not in {"text", "json"}:
        raise ValueError("one of text, json")
    return text


def _admin_key(text: str) -> str:
    if len(text) < 16:
        raise ValueError("must have at least 16 characters")
    return text


def _secrets(text: str) -> tuple[str, ...]:
    secrets = tuple(part.strip() for part in text.split(",") if part.strip())
    if not secrets:
        raise ValueError("is empty")
    return secrets


def _log_level(text: str) -> str:
    if text.upper() not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
        raise ValueError("one of DEBUG, INFO, WARNING, ERROR")
    return text.upper()


# variable suffix: (field, parser, what it does). The table in docs/operations.md is checked
# against this.
FIELDS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "DATA_DIR": ("data_dir", Path, "where uploads, models, journal and SQLite live"),
    "HOST": ("host", str, "address to listen on"),
    "PORT": ("port", _port, "port to listen on"),
    "PUBLIC_URL": ("public_url", str, "how people reach the box, if not by host and port"),
    "DATABASE_URL": ("database_url", _database_url, "SQLite in the data directory, or PostgreSQL"),
    "ADMIN_KEY": ("admin_key", _admin_key, "an admin API key that exists from the first start"),
    "LAUNCHER": ("launcher", _launcher, "how workers and builds are started: local or docker"),
    "LAUNCHER_SOCKET": ("launcher_socket", Path, "where `tapeout launcher` takes orders"),
    "DEVICE": ("device", str, "where models run: cpu or cuda"),
    "WORKER_THREADS": ("worker_threads", _count, "CPU threads of a worker; 0: all cores"),
    "BUILD_THREADS": ("build_threads", _count, "CPU threads of a build; 0: all cores"),
    "BUILD_TIMEOUT_SECONDS": ("build_timeout_seconds", _positive, "a build is stopped after this"),
    "BUILD_MEMORY": ("build_memory_bytes", _bytes, "memory limit of a build; 0: none"),
    "OPTIMISE": ("optimise", _flag, "look for faster forms of models that are no decoders: 0 or 1"),
    "OPTIMISE_TIMEOUT_SECONDS": (
        "optimise_timeout_seconds",
        _positive,
        "looking for a faster form is stopped after this",
    ),
    "MAX_UPLOAD": ("max_upload_bytes", _bytes, "largest upload"),
    "MAX_OPEN_UPLOADS": ("max_open_uploads", _positive, "unfinished uploads of an organization"),
    "UPLOAD_QUOTA": (
        "upload_quota_bytes",
        _bytes,
        "bytes of an organization's uploads together; 0: four of the largest",
    ),
    "MAX_REQUEST": ("max_request_bytes", _bytes, "largest request body"),
    "KV_CACHE": ("kv_cache_bytes", _bytes, "KV cache of each decoder replica"),
    "KV_SWAP": ("kv_swap_bytes", _bytes, "host memory for preempted sequences; 0: recompute"),
    "KV_POISON": ("kv_poison", _flag, "fill freed cache blocks with NaN (debugging): 0 or 1"),
    "REQUEST_TIMEOUT_SECONDS": ("request_timeout_seconds", _positive, "a request ends after this"),
    "DRAIN_SECONDS": ("drain_seconds", _positive, "how long SIGTERM lets requests finish"),
    "SESSION_DAYS": ("session_days", _positive, "how long a sign-in lasts"),
    "CURRENCY": ("currency", str, "currency of prices and accounts; a box has one for good"),
    "USAGE_DETAIL_DAYS": (
        "usage_detail_days",
        _positive,
        "days until settled requests move from the database to compressed archives",
    ),
    "STRIPE_API_KEY": ("stripe_api_key", str, "secret key; without it nothing is paid by Stripe"),
    "STRIPE_WEBHOOK_SECRET": (
        "stripe_webhook_secrets",
        _secrets,
        "signing secret of the webhook; two with a comma between while they rotate",
    ),
    "STRIPE_API_BASE": ("stripe_api_base", str, "another address of Stripe's API, for tests"),
    "LOG_LEVEL": ("log_level", _log_level, "how much is logged"),
    "LOG_FORMAT": ("log_format", _log_format, "lines of the log: text or json"),
}


def read_settings(environment: Mapping[str, str], **overrides: Any) -> Settings:
    """Settings from `TAPEOUT_*`, with command-line overrides (`None` means not given).

    Raises `SettingsError` with every problem found, unknown variables included.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for variable, text in environment.items():
        name = variable.removeprefix("TAPEOUT_")
        if name == variable or name in CLIENT_VARIABLES:
            continue
        if name not in FIELDS:
            problems.append(f"{variable} is not a setting")
            continue
        field, parse, _ = FIELDS[name]
        try:
            values[field] = parse(text)
        except ValueError as error:
            problems.append(f"{variable}: {error}")
    if problems:
        raise SettingsError(sorted(problems))
    values.update({name: value for name, value in overrides.items() if value is not None})
    values["data_dir"] = Path(values.get("data_dir", Settings().data_dir)).resolve()
    return Settings(**values)


# Read by the command-line client and by the runtime, not by the server.
CLIENT_VARIABLES = frozenset({"URL", "API_KEY", "NATIVE_DIR"})
