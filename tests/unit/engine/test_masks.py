"""Which rows of a step need a mask, and that asking about a token says what its bit in the mask says."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.masks import MaskFiller, TokenMasks
from engine.grammar.matcher import GrammarMatcher
from engine.grammar_spec import GrammarSpec
from tests.fakes.random_schemas import random_schema
from tests.fakes.tiny_models import EOS_TOKEN_ID, VOCAB_SIZE

SPECS = [
    *(GrammarSpec("json_schema", json.dumps(random_schema(seed))) for seed in range(20)),
    GrammarSpec("json_schema", '{"type": "string", "maxLength": 5}'),
    GrammarSpec("json_object"),
    GrammarSpec("regex", r"(GET|POST) /[a-z]{1,9}(\?q=[0-9]{1,3})?"),
    GrammarSpec("regex", "(é|ü|漢){2,4}"),
    GrammarSpec("choice", '["yes", "no", "yesterday", "n\\u00e9"]'),
    GrammarSpec("lark", "start: body /[x-z]/\nbody[max_tokens=3]: /[a-z ]*/"),
    GrammarSpec("lark", f'start: "a" <[{EOS_TOKEN_ID + 1}]> /b*/ | "c"'),
]
NUM_WALKS, NUM_STEPS = 3, 12


@pytest.fixture(scope="module")
def compiler(tokenizer_dir: Path) -> GrammarCompiler:
    return GrammarCompiler(str(tokenizer_dir), vocab_size=VOCAB_SIZE, eos_token_ids=(EOS_TOKEN_ID,))


def begin(compiler: GrammarCompiler, spec: GrammarSpec, *, takes_forced: bool = True) -> GrammarMatcher:
    matcher = GrammarMatcher(compiler.compile(spec), (EOS_TOKEN_ID,), takes_forced=takes_forced)
    matcher.start([])
    return matcher


def admitted(bits: NDArray[np.int32]) -> NDArray[np.bool_]:
    """bool `[VOCAB_SIZE]` of a row of a mask."""
    return np.unpackbits(bits.view(np.uint8), bitorder="little")[:VOCAB_SIZE].astype(np.bool_)


@pytest.mark.parametrize("takes_forced", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_token_is_admitted_if_and_only_if_the_mask_holds_it(
    compiler: GrammarCompiler, spec: GrammarSpec, takes_forced: bool
) -> None:
    filler, random = MaskFiller(VOCAB_SIZE), np.random.default_rng(0)
    num_states = 0
    for _ in range(NUM_WALKS):
        matcher = begin(compiler, spec, takes_forced=takes_forced)
        for _ in range(NUM_STEPS):
            if matcher.has_ended:
                break
            asked = np.array([matcher.admits(token_id) for token_id in range(VOCAB_SIZE)])
            mask = admitted(filler.fill([matcher])[0])
            assert np.array_equal(asked, mask)
            num_states += 1
            token_id = int(random.choice(mask.nonzero()[0]))
            matcher.accept(token_id)
            assert matcher.error is None
            if token_id == EOS_TOKEN_ID:
                break
    assert num_states or takes_forced  # a grammar of one sentence has no state that asks for a choice


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE - 1, VOCAB_SIZE, VOCAB_SIZE + 1])
def test_the_last_token_of_any_vocabulary_has_a_bit(tokenizer_dir: Path, vocab_size: int) -> None:
    compiler = GrammarCompiler(str(tokenizer_dir), vocab_size=vocab_size, eos_token_ids=(EOS_TOKEN_ID,))
    matcher = begin(compiler, GrammarSpec("lark", f'start: "a" | <[{vocab_size - 1}]>'))
    bits = MaskFiller(vocab_size).fill([matcher]).view(np.uint8)
    assert np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist() == [ord("a"), vocab_size - 1]


def test_rows_without_filters_get_masks_only_where_their_tokens_are_refused(compiler: GrammarCompiler) -> None:
    matchers = [begin(compiler, GrammarSpec("regex", f"[{letters}]x*")) for letters in ("ab", "ab", "cd", "cd")]
    has_filter = np.array([False, False, True, False])
    masks = TokenMasks(MaskFiller(VOCAB_SIZE), np.array([0, 2, 3, 5]), matchers, has_filter)
    first = masks.before_sampling()
    assert first is not None and first.rows.tolist() == [3]
    assert admitted(first.bits[0]).nonzero()[0].tolist() == [ord("c"), ord("d")]
    drawn = np.array([ord("b"), 0, ord("c"), ord("d"), 0, ord("a")])
    refused = masks.after_sampling(drawn)
    assert refused is not None and refused.rows.tolist() == [2, 5]
    assert [admitted(bits).nonzero()[0].tolist() for bits in refused.bits] == [[97, 98], [99, 100]]


def test_tokens_that_are_all_admitted_need_no_mask_at_all(compiler: GrammarCompiler) -> None:
    matcher = begin(compiler, GrammarSpec("regex", "[a-z]{2,9}"))
    masks = TokenMasks(MaskFiller(VOCAB_SIZE), np.array([1]), [matcher], np.array([False]))
    assert masks.before_sampling() is None
    assert masks.after_sampling(np.array([0, ord("q")])) is None
