"""Linear layers in 8 bits: what their twin in plain integers computes, the same bits on any instruction set."""

import platform
import resource
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.config import EngineConfig
from engine.errors import InvalidRequestError, ModelLoadError
from engine.kernels.build import build_library
from engine.kernels.cpu_features import cpu_flags
from engine.kernels.threads import one_thread
from engine.model import int8_linear
from engine.model.int8_linear import Int8Kernels, Int8Linear
from engine.model.loader import load_model
from engine.model.locate import default_cache_dir
from engine.model.packed_linear import int8_packer
from tests.fakes.kernel_builds import hardly_optimise
from tests.fakes.tiny_models import make_tiny_model

KERNELS = default_cache_dir() / "kernels"
EMULATED_VNNI = Path(__file__).parents[2] / "fakes" / "emulated_vnni.h"
SHAPES = [(37, 45), (100, 64), (192, 576), (576, 1536)]  # out_features, in_features
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels() -> Int8Kernels:
    return Int8Kernels(KERNELS)


def random_layer(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and rows, some of which have an element that towers over the others."""
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator) * shape[1] ** -0.5
    x = torch.randn(70, shape[1], generator=generator)
    x[::3, 5] += 40
    return weight.to(dtype), torch.randn(shape[0], generator=generator).to(dtype), x.to(dtype)


def column_scales(weight: Tensor) -> Tensor:
    """The least with which codes stay within 127, and those that 16 bits add, four by sign, within 128 when rounded."""
    padded = nn.functional.pad(weight.float(), (0, -weight.shape[1] % 8)).view(len(weight), -1, 2, 2, 2)
    fours = [part.clamp(min=0).sum((2, 4)).flatten(1).amax(1) / 126 for part in (padded, -padded)]
    return torch.stack([weight.float().abs().amax(1) / 127, *fours]).amax(0)


def twin(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor) -> Tensor:
    """The layer in plain torch; scales: float32, of the columns."""
    codes = (weight.float() / scales[:, None]).round()
    rows, zero = x.float(), torch.zeros(1)
    below, above = torch.maximum(-rows.amin(1), zero), torch.maximum(rows.amax(1), zero)
    inverse = torch.tensor(255.0) / (below + above)  # a number over a tensor would round twice
    zeros = (below * inverse).round()
    row_codes = ((rows * inverse[:, None]).round() + zeros[:, None]).clamp(0, 255)
    sums = (row_codes - zeros[:, None]).double() @ codes.double().t()  # integers, exact in float64
    output = sums.float() * (scales * ((below + above) / 255)[:, None])
    return (output if bias is None else output + bias.float()).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_computes_its_integer_twin_to_the_bit(
    kernels: Int8Kernels, shape: tuple[int, int], dtype: torch.dtype, has_bias: bool
) -> None:
    weight, bias, x = random_layer(shape, dtype)
    layer_bias = bias if has_bias else None
    scales = kernels.pack(weight).scales[: shape[0]]
    torch.testing.assert_close(scales, column_scales(weight))  # the twin adds in another order
    assert torch.equal(Int8Linear(weight, layer_bias, kernels)(x), twin(x, weight, layer_bias, scales))


def test_no_rows_give_no_rows() -> None:
    weight, bias, x = random_layer(SHAPES[0], torch.float32)
    assert Int8Linear(weight, bias, Int8Kernels(KERNELS))(x[:0]).shape == (0, SHAPES[0][0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer_is_close_to_the_unquantised_one(kernels: Int8Kernels, shape: tuple[int, int]) -> None:
    weight, _, _ = random_layer(shape, torch.float32)
    x = torch.randn(70, shape[1], generator=torch.Generator().manual_seed(1))
    expected = x @ weight.t()
    error = Int8Linear(weight, None, kernels)(x) - expected
    # Each side's step is about 1/40 of a standard deviation; its uniform rounding is 1/sqrt(12) of that.
    assert error.pow(2).mean().sqrt() < 0.03 * expected.pow(2).mean().sqrt()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_to_the_bit_in_every_batch_and_for_any_number_of_threads(
    kernels: Int8Kernels, dtype: torch.dtype
) -> None:
    weight, bias, x = random_layer((1000, 576), dtype)
    layer = Int8Linear(weight, bias, kernels)
    whole = layer(x)
    for num_threads in (1, 2, 3, 16):
        torch.set_num_threads(num_threads)
        for first, last in [(0, 1), (0, 2), (3, 10), (5, 69), (0, 70)]:
            assert torch.equal(layer(x[first:last]), whole[first:last]), (num_threads, first, last)


def test_sums_are_exact_where_16_bits_would_saturate(kernels: Int8Kernels) -> None:
    """All weights of one sign and size, and rows at both ends of the codes' range."""
    weight = torch.ones(48, 64) * torch.tensor([1.0, -1.0, 0.5]).repeat(16)[:, None]
    weight[:, 1::2] *= torch.tensor([1.0, -1.0]).repeat(24)[:, None]
    x = torch.stack([torch.full((64,), 3.0), torch.full((64,), -3.0), torch.linspace(-1, 1, 64)])
    scales = kernels.pack(weight).scales
    assert torch.equal(Int8Linear(weight, None, kernels)(x), twin(x, weight, None, scales))


def test_a_row_that_is_not_finite_stays_alone_and_zeros_give_the_bias(kernels: Int8Kernels) -> None:
    weight, bias, x = random_layer((37, 45), torch.float32)
    layer = Int8Linear(weight, bias, kernels)
    expected = layer(x)
    x[1, 44], x[2, 3], x[3, 0], x[4] = float("nan"), float("inf"), float("-inf"), 0
    output = layer(x)
    assert output[1:4].isnan().all()
    assert torch.equal(output[4], bias)
    assert torch.equal(output[[0, *range(5, 70)]], expected[[0, *range(5, 70)]])


def test_a_weight_that_is_not_finite_is_refused(kernels: Int8Kernels) -> None:
    with pytest.raises(ModelLoadError, match=r"4 x 8 cannot be quantised: it must be finite.*set quantize to none"):
        kernels.pack(torch.full((4, 8), float("nan")))


@pytest.mark.parametrize(
    ("machine", "flags"),
    [
        pytest.param("x86_64", ("-march=x86-64",), id="none"),
        pytest.param("x86_64", ("-mavx2", "-include", str(EMULATED_VNNI)), id="vnni"),
        pytest.param("aarch64", ("-march=armv8-a",), id="neon"),
    ],
)
def test_every_instruction_sets_path_gives_the_same_bits(
    kernels: Int8Kernels, machine: str, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if platform.machine() != machine:
        pytest.skip(f"names an instruction set of {machine}")
    if "-mavx2" in flags and ("avx2" not in cpu_flags() or "avx512f" in cpu_flags()):
        pytest.skip("AVX-VNNI is emulated by AVX2, and compiled where there is no AVX512")
    monkeypatch.setattr(int8_linear, "_FLAGS", (*int8_linear._FLAGS, *flags))
    others = Int8Kernels(KERNELS)
    assert others.build != kernels.build
    for shape in SHAPES:
        for dtype in DTYPES:
            weight, bias, x = random_layer(shape, dtype)
            expected = Int8Linear(weight, bias, kernels)(x)
            assert torch.equal(Int8Linear(weight, bias, others)(x), expected), (shape, dtype)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
@pytest.mark.parametrize("march", ["haswell", "skylake-avx512", "icelake-server", "alderlake", "sapphirerapids"])
def test_the_kernel_compiles_for_instruction_sets_that_are_not_here(
    march: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hardly_optimise(monkeypatch)
    assert build_library("matmul_int8", KERNELS, flags=(f"-march={march}",)).exists()


def test_a_quantised_model_has_another_fingerprint_no_plain_linear_layer_and_keys_of_16_bits(tmp_path: Path) -> None:
    folder = str(make_tiny_model("llama", tmp_path))
    plain = load_model(EngineConfig(model_path=folder, dtype="float32"))
    quantised = load_model(EngineConfig(model_path=folder, dtype="float32", quantize="int8"))
    assert quantised.fingerprint != plain.fingerprint
    assert quantised.is_batch_invariant
    assert (plain.dtypes.kv_cache, quantised.dtypes.kv_cache) == (torch.float32, torch.float16)
    assert quantised.kv_block_bytes * 2 == plain.kv_block_bytes
    assert any(isinstance(module, Int8Linear) for module in quantised.model.modules())
    assert not any(isinstance(module, nn.Linear) for module in quantised.model.modules())


def test_what_cannot_be_quantised_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequestError, match="quantize must be one of none, int8"):
        EngineConfig(model_path="x", quantize="int3")
    with pytest.raises(ModelLoadError, match="float16 has no 8-bit layers; set dtype"):
        int8_packer(torch.float16, KERNELS)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelLoadError, match=r"no C compiler.*set quantize to none"):
        int8_packer(torch.float32, tmp_path)


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="for a system that says how much memory is in use")
def test_a_threads_room_goes_with_it(kernels: Int8Kernels) -> None:
    """OpenMP ends threads when fewer are asked for, and makes new ones later."""
    layer, x = Int8Linear(torch.randn(16, 4096), None, kernels), torch.randn(1024, 4096)
    with one_thread():
        layer(x)
        before = resident_pages()
        for _ in range(100):
            thread = threading.Thread(target=layer, args=(x,))
            thread.start()
            thread.join()
        num_bytes = (resident_pages() - before) * resource.getpagesize()
    # a number of a row takes a byte of room, and the C library keeps some freed rooms for later
    assert num_bytes < 40 * x.numel()
