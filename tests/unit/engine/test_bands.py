"""A step in bands of rows, which threads compute side by side: how it is cut, and that no bit depends on it."""

import ctypes
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.attention.base import AttentionBatch
from engine.config import EngineConfig
from engine.kernels.threads import one_thread
from engine.model import native_decoder
from engine.model.bands import MIN_ROWS, MIN_ROWS_FROM_MEMORY, Bands, cut_bands, moved
from engine.model.loader import load_model
from engine.model.locate import default_cache_dir
from engine.model.native_rows import NativeRows
from engine.model.workspace import Workspace
from tests.fakes.packed_forward import BLOCK_SIZE, batch_of, prompts, run, steps_of
from tests.fakes.tiny_models import make_tiny_model
from tests.fakes.waiting import wait_until

BLOCKS = torch.arange(8).split([1, 1, 3, 3])


def decodes(num_seqs: int) -> AttentionBatch:
    batch = batch_of([(3, 4 + i, 5 + i) for i in range(num_seqs)], BLOCKS)
    batch.num_decodes = num_seqs
    return batch


def cut(batch: AttentionBatch, num_threads: int, min_rows: int = MIN_ROWS) -> Bands:
    bands = cut_bands(batch, num_threads, min_rows)
    assert bands is not None
    return bands


def test_a_step_is_cut_into_one_more_band_than_threads() -> None:
    bands = cut(decodes(26), 2)
    assert [band.first for band in bands.parts] == [0, 8, 17] and not bands.in_order
    assert [band.num_rows for band in bands.parts] == [8, 9, 9]
    assert [band.batch.context_lens.tolist() for band in bands.parts] == [
        [*range(5 + i, 5 + j)] for i, j in ((0, 8), (8, 17), (17, 26))
    ]
    assert len(cut(decodes(23), 2).parts) == 2, "of 8 rows at least"


@pytest.mark.parametrize(
    ("num_rows", "num_threads", "min_rows"), [(15, 2, MIN_ROWS), (40, 1, MIN_ROWS), (40, 2, MIN_ROWS_FROM_MEMORY)]
)
def test_few_rows_are_not_cut(num_rows: int, num_threads: int, min_rows: int) -> None:
    assert cut_bands(decodes(num_rows), num_threads, min_rows) is None


def test_a_prompt_is_cut_where_a_band_ends() -> None:
    """Of 5 tokens, then 20 of 33 behind 8, then 7."""
    batch = batch_of([(1, 0, 5), (2, 8, 28), (3, 0, 7)], BLOCKS)
    bands = cut(batch, 3)
    assert bands.in_order
    assert [band.batch.query_start.tolist() for band in bands.parts] == [[0, 5, 8], [0, 8], [0, 8], [0, 1, 8]]
    assert [band.batch.context_lens.tolist() for band in bands.parts] == [[5, 11], [19], [27], [28, 7]]
    assert torch.equal(torch.cat([band.batch.slot_mapping for band in bands.parts]), batch.slot_mapping)
    assert [band.batch.block_tables.tolist() for band in bands.parts] == [
        batch.block_tables[first:end].tolist() for first, end in ((0, 2), (1, 2), (1, 2), (1, 3))
    ]
    assert batch.context_lens.tolist() == [5, 28, 7], "the step's own are left alone"


@pytest.mark.parametrize("num_threads", [2, 20, 40, 63])
def test_every_band_has_room_in_the_workspace(num_threads: int) -> None:
    for num_rows in (64, 511, 512):
        workspace = Workspace()
        workspace.reserve(num_rows, spare_rows=num_threads + 1)
        bands = cut(batch_of([(0, 0, 1)] * num_rows, BLOCKS), num_threads, 1)
        assert max(band.num_rows for band in bands.parts) <= workspace.num_rows // len(bands.parts)


def test_rows_are_found_where_their_bands_have_room() -> None:
    bands = cut(decodes(26), 2)
    assert moved(torch.tensor([0, 7, 8, 16, 17, 25]), bands, 10).tolist() == [0, 7, 10, 18, 20, 28]


@pytest.mark.parametrize("in_order", [True, False])
def test_a_segment_waits_for_earlier_ones_of_all_bands_before_and_only_where_it_reads_them(in_order: bool) -> None:
    """The first segment of the first band takes as long as the others need to go as far as they may."""
    began: list[tuple[int, int, int, bool]] = []
    ended: list[tuple[int, int]] = []
    expected = {(band, segment) for band in (1, 2, 3) for segment in range(1 if in_order else 3)}

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int64))
    def compute(arguments: Any) -> int:
        band, segment, num_rows = arguments[:3]
        began.append((band, segment, num_rows, len(ended) > 0 and (0, 0) in ended))
        if (band, segment) == (0, 0):
            wait_until(lambda: len(ended) == len(expected))
            time.sleep(0.05)  # for one that does not wait
        ended.append((band, segment))
        return 0

    address = ctypes.cast(compute, ctypes.c_void_p).value
    rows = NativeRows(default_cache_dir() / "kernels")
    bands = [[struct.pack("@P2q3q", address, 24, 16, band, segment, 0) for segment in range(3)] for band in range(4)]
    torch.set_num_threads(3)
    rows.chain.prepare_bands(bands)([5, 6, 7, 8], in_order=in_order)
    assert sorted(ended) == [(band, segment) for band in range(4) for segment in range(3)]
    assert all(num_rows == 5 + band for band, _, num_rows, _ in began)
    early = {(band, segment) for band, segment, _, is_late in began if not is_late} - {(0, 0)}
    assert early == expected


def test_a_band_that_fails_stops_and_is_told() -> None:
    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int64))
    def compute(arguments: Any) -> int:
        ran.append((band := arguments[0], segment := arguments[1]))
        return int((band, segment) == (1, 1))

    ran: list[tuple[int, int]] = []
    address = ctypes.cast(compute, ctypes.c_void_p).value
    bands = [[struct.pack("@P2q2q", address, 16, -1, band, segment) for segment in range(3)] for band in range(3)]
    torch.set_num_threads(2)
    with pytest.raises(MemoryError):
        NativeRows(default_cache_dir() / "kernels").chain.prepare_bands(bands)([1, 1, 1], in_order=True)
    assert sorted(ran) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]


@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_a_prompt_in_bands_has_the_bits_of_one_alone(
    num_threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A band of two rows reads what up to eight others have written."""
    monkeypatch.setattr(native_decoder, "MIN_ROWS", 2)
    model = load_model(EngineConfig(model_path=str(make_tiny_model("llama", tmp_path)), block_size=BLOCK_SIZE))
    sequences = prompts(model.vocab_size)
    with one_thread():
        expected = run(model, sequences, steps_of(1000))
    torch.set_num_threads(num_threads)
    for size in (1000, 17) * 3:
        assert all(map(torch.equal, run(model, sequences, steps_of(size)), expected))


def test_decodes_in_bands_have_the_bits_of_decodes_alone(tmp_path: Path) -> None:
    model = load_model(EngineConfig(model_path=str(make_tiny_model("qwen3", tmp_path)), block_size=BLOCK_SIZE))
    tokens = torch.arange(25)
    blocks = tuple(torch.arange(25 * 2).split([2] * 25))

    def logits(num_threads: int) -> list[torch.Tensor]:
        """Of 25 sequences' tokens, all at once."""
        model.allocate_kv_cache(50)
        torch.set_num_threads(num_threads)
        outputs = []
        for position in range(20):
            model.context.batch = batch = batch_of([(i, position, position + 1) for i in range(25)], blocks)
            batch.num_decodes = 25
            outputs.append(model.forward(tokens + position, torch.full((25,), position), tokens).clone())
        return outputs

    assert all(map(torch.equal, logits(2), logits(1)))
