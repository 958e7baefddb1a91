"""A third of the causal language models of transformers read media, as the page's table says of all of them."""

import pytest

from tests.adapters.flamingo.sweep import (
    CANNOT_BE_TRIED,
    KINDS,
    PAGE,
    READS,
    REFUSED,
    ROUNDS,
    row_of,
    table,
    trial,
    written,
)

# Recurrent and hybrid ones, and those that were refused for no reason once, are among them.
NAMED = (
    "bamba", "falcon_h1", "falcon_mamba", "gpt_neox_japanese", "granitemoehybrid", "jamba", "lfm2", "mamba",
    "megatron-bert", "mllama", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_next", "recurrent_gemma", "rembert",
)  # fmt: skip
LARGE = ("longcat_flash", "roc_bert", "xlm")
SOME = sorted({*KINDS[::4], *NAMED} - {*LARGE, *CANNOT_BE_TRIED})


@pytest.mark.parametrize("kind", SOME)
def test_what_the_page_says_of_a_language_model(kind: str) -> None:
    found, said = trial(kind).verdict, row_of(kind, written(PAGE.read_text()))
    # How much is rounded is the machine's.
    assert found == said or {found, said} == {READS, ROUNDS}


def test_the_page_has_every_causal_language_model_of_transformers() -> None:
    page = written(PAGE.read_text())
    verdicts = {kind: row_of(kind, page) for kind in KINDS}
    assert all(verdicts.values()), [kind for kind, verdict in verdicts.items() if not verdict]
    assert all(verdicts[kind] in (READS, ROUNDS) for kind in NAMED)
    assert sum(verdict == REFUSED for verdict in verdicts.values()) < 25


def test_the_table_is_read_as_it_is_written() -> None:
    trials = {kind: trial(kind) for kind in ("llama", "rwkv", "musicgen")}
    for kind, one in trials.items():
        assert row_of(kind, table(trials)) == one.verdict
