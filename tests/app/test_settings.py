"""Settings are read once, and every bad variable is named."""

from pathlib import Path

import pytest

from app.settings import FIELDS, Settings, SettingsError, read_settings


def test_variables_and_overrides_are_read(tmp_path: Path) -> None:
    environment = {
        "TAPEOUT_PORT": "9000",
        "TAPEOUT_MAX_UPLOAD": "2G",
        "TAPEOUT_DATABASE_URL": "postgresql://u:p@host/db",
        "TAPEOUT_URL": "http://elsewhere",  # the client's, not the server's
        "HOME": "/nowhere",
    }
    settings = read_settings(environment, data_dir=tmp_path, host=None)
    assert settings.port == 9000
    assert settings.max_upload_bytes == 2 * 1024**3
    assert settings.data_dir == tmp_path
    assert settings.host == "127.0.0.1"
    assert settings.async_database_url == "postgresql+psycopg://u:p@host/db"


def test_every_bad_variable_is_named() -> None:
    environment = {
        "TAPEOUT_PORT": "0",
        "TAPEOUT_ADMIN_KEY": "short",
        "TAPEOUT_TYPO": "1",
        "TAPEOUT_KV_CACHE": "much",
    }
    with pytest.raises(SettingsError) as caught:
        read_settings(environment)
    assert "TAPEOUT_KV_CACHE: 'much' is not a whole number" in caught.value.problems
    named = {problem.split()[0].rstrip(":") for problem in caught.value.problems}
    assert named == set(environment)


def test_every_setting_has_a_variable() -> None:
    assert {field for field, _, _ in FIELDS.values()} == set(Settings.__struct_fields__)


@pytest.mark.parametrize(("text", "expected"), [("1024", 1024), ("3k", 3072), ("1GiB", 1024**3)])
def test_sizes_may_carry_a_unit(text: str, expected: int) -> None:
    assert read_settings({"TAPEOUT_KV_CACHE": text}).kv_cache_bytes == expected
