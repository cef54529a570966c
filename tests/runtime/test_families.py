"""Every family of decoders is served as docs/models.md says, and proved equal to the original."""

from pathlib import Path

import pytest
import torch

from tests.runtime.families import (
    DOCUMENT,
    FAMILIES,
    FOOT,
    HEAD,
    REGISTRY,
    UNCACHED,
    Family,
    examine,
)

BY_NAME = {family.name: family for family in FAMILIES}
PARAMETERS = [
    pytest.param(family, id=family.name, marks=[] if family.is_required else [pytest.mark.slow])
    for family in FAMILIES
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.filterwarnings("default")  # of transformers' own, which differ between families
@pytest.mark.parametrize("family", PARAMETERS)
def test_family_is_served_as_documented(
    family: Family, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not family.is_required and "slow" not in request.config.option.markexpr:
        pytest.skip("the long tail of families runs with -m slow (make soak)")
    row = examine(family, tmp_path)
    assert row.line in DOCUMENT.read_text(encoding="utf-8").splitlines(), (
        "docs/models.md says otherwise: run python -m tests.runtime.families"
    )


def test_document_has_every_family_and_nothing_else() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.startswith(HEAD)
    assert text.endswith(FOOT)
    table = text.removeprefix(HEAD).removesuffix(FOOT).splitlines()
    assert len(table) == len(FAMILIES) == len(BY_NAME)


HALF = [
    (name, dtype)
    for name in ("llama", "gemma2", "mixtral", "gpt_oss", "deepseek_v3")
    for dtype in (torch.bfloat16, torch.float16)
] + [("jamba", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), HALF, ids=str)
def test_family_is_equal_in_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    row = examine(BY_NAME[name], tmp_path, dtype)
    assert row.proof.verdict == "equal", row.closeness
    assert row.way == (UNCACHED if name == "jamba" else REGISTRY)
