"""Which compiled operators a process uses: those that were proved, where they run."""

from collections.abc import Iterator

import pytest

from runtime.execution import kernels
from runtime.execution.native import library_path, variants


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    kernels.PREFERRED.clear()
    kernels.fastest_variant.cache_clear()


def test_the_proved_variant_serves_even_where_another_is_faster() -> None:
    usable = [each for each in variants() if each.is_supported and library_path(each).is_file()]
    if not usable:
        pytest.skip("no C++ operators were compiled")
    for variant in usable:
        assert kernels.prefer_variant(variant.name)
        assert kernels.fastest_variant() == variant


def test_where_it_does_not_run_the_fastest_serves_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fastest = kernels.fastest_variant()
    assert not kernels.prefer_variant("another_machines")
    assert kernels.fastest_variant() == fastest
    assert "another_machines were proved" in caplog.text
