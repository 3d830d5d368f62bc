"""Logits where a graph wants them: the output layer writes them there, or what changes them behind it is copied."""

from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor, nn

from engine.config import EngineConfig
from engine.model.loader import load_model
from engine.model.output_rows import OutputRows
from tests.fakes.fast_interpreter import speed_up_interpreter
from tests.fakes.packed_forward import BLOCK_SIZE, batch_of, prompts
from tests.fakes.tiny_models import make_tiny_model

speed_up_interpreter()


@pytest.mark.parametrize(("has_bias", "num_rows", "is_there"), [(False, 3, True), (True, 3, False), (False, 4, False)])
def test_a_plain_output_layer_writes_its_rows_where_they_go_once(has_bias: bool, num_rows: int, is_there: bool) -> None:
    rows, x, target = OutputRows(nn.Linear(8, 5, bias=has_bias)), torch.randn(1, num_rows, 8), torch.zeros(3, 5)
    with torch.inference_mode():
        expected = rows(x)
        rows.target = target
        logits: Tensor = rows(x)
        assert (logits.data_ptr() == target.data_ptr()) == is_there
        torch.testing.assert_close(logits, expected)
        target.zero_()
        torch.testing.assert_close(rows(x), expected)
    assert not target.any(), "the next forward's are another's"


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])  # the latter change logits behind the layer
def test_a_forwards_logits_are_the_same_where_they_are_asked_for(architecture: str, tmp_path: Path) -> None:
    folder = make_tiny_model(architecture, tmp_path)
    model = load_model(
        EngineConfig(model_path=str(folder), dtype="float32", attention="triton", device="cpu", block_size=BLOCK_SIZE)
    )
    tokens = prompts(model.vocab_size)[1]
    count = len(tokens)
    model.allocate_kv_cache(1)
    model.context.batch = batch_of([(0, 0, count)], (torch.zeros(1, dtype=torch.int64),))
    expected = model.forward(tokens, torch.arange(count), torch.arange(count))
    out = torch.full_like(expected, float("nan"))
    assert model.forward(tokens, torch.arange(count), torch.arange(count), out=out) is out
    torch.testing.assert_close(out, expected)
