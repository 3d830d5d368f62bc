"""Loading: every way of naming a model, what is refused and in which words, and what a loaded model says of itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from engine.attention.base import AttentionBatch, AttentionContext
from engine.attention.torch_backend import TorchAttention
from engine.config import EngineConfig
from engine.errors import InvalidRequestError, ModelLoadError
from engine.model import devices, loader
from engine.model.attention_hook import attach_attention
from engine.model.devices import Dtypes
from engine.model.loader import LoadedModel, load_model
from tests.fakes.packed_forward import BLOCK_SIZE, prompts, run, steps_of
from tests.fakes.tiny_models import EOS_TOKEN_ID, VOCAB_SIZE, make_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model("llama", tmp_path / "model")


def load(folder: Path | str, **options: object) -> LoadedModel:
    return load_model(EngineConfig(model_path=str(folder), **({"dtype": "float32"} | options)))  # type: ignore[arg-type]


def test_a_loaded_model_describes_itself(folder: Path) -> None:
    model = load(folder, block_size=16, max_model_len=100)
    assert (model.num_layers, model.num_kv_heads, model.head_dim) == (2, 2, 8)
    assert (model.vocab_size, model.max_model_len) == (VOCAB_SIZE, 100)
    assert model.eos_token_ids == (EOS_TOKEN_ID,)
    assert model.kv_block_bytes == 2 * 2 * 16 * 2 * 8 * 4
    assert model.model_dir == folder.resolve()
    assert model.dtypes == Dtypes(torch.float32, torch.float32, torch.float32)
    assert not model.model.training


def test_the_cache_is_laid_out_as_the_backends_read_it(folder: Path) -> None:
    model = load(folder, block_size=4)
    model.allocate_kv_cache(7)
    assert model.context.kv_cache is not None
    assert model.context.kv_cache.shape == (2, 2, 7, 4, 2, 8)


def test_a_cache_beyond_all_memory_is_refused_with_the_numbers(folder: Path) -> None:
    model = load(folder)
    with pytest.raises(ModelLoadError, match=r"KV blocks need .* GiB.*lower num_kv_blocks"):
        model.allocate_kv_cache(1 << 42)


def test_a_single_token_is_computed_as_it_is_among_others(folder: Path) -> None:
    model = load(folder)
    model.allocate_kv_cache(2)
    zeros, one = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)

    def step(num_seqs: int) -> torch.Tensor:
        model.context.batch = AttentionBatch(
            query_start=torch.arange(num_seqs + 1, dtype=torch.int32),
            context_lens=one.expand(num_seqs).contiguous(),
            block_tables=torch.arange(num_seqs, dtype=torch.int32)[:, None],
            slot_mapping=torch.arange(num_seqs) * model.block_size,
            num_seqs=num_seqs,
            num_tokens=num_seqs,
            max_query_len=1,
            max_context_len=1,
        )
        tokens = torch.tensor([65, 66])[:num_seqs]
        return model.forward(tokens, zeros.long().expand(num_seqs), torch.arange(num_seqs))

    assert torch.equal(step(1), step(2)[:1])


def test_dtype_auto_is_bfloat16_only_where_the_cpu_computes_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cpu_flags", lambda: frozenset({"avx512f", "avx512_vnni"}))
    assert load(folder, dtype="auto", device="cpu").dtypes.weights == torch.float32
    monkeypatch.setattr(devices, "cpu_flags", lambda: frozenset({"avx512f", "avx512_bf16"}))
    assert load(folder, dtype="auto", device="cpu").dtypes.weights == torch.bfloat16


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_dtype_that_the_cpu_does_not_multiply_in_is_of_weights_keys_and_values_and_float32_is_computed(
    folder: Path, quantize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"avx512f"}
    monkeypatch.setattr(devices, "cpu_flags", lambda: frozenset(flags))
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        model = load(folder, dtype=name, device="cpu", quantize=quantize)
        assert model.dtypes == Dtypes(weights=dtype, activations=torch.float32, kv_cache=dtype)
        assert model.backend_name == load(folder, device="cpu").backend_name
        network: Any = model.model
        embeddings, output = network.get_input_embeddings(), network.get_output_embeddings()
        assert embeddings.table.dtype == dtype
        assert quantize == "int8" or output.layer._panels.dtype == dtype
    flags.add("avx512_bf16")
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        activations = load(folder, dtype=name, device="cpu", quantize=quantize).dtypes.activations
        assert activations == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


def test_keys_and_values_in_8_bits_take_head_dim_and_a_scale_of_four_bytes_each(folder: Path) -> None:
    model = load(folder, device="cpu", dtype="float32", kv_cache_dtype="int8")
    plain = load(folder, device="cpu", dtype="float32")
    assert model.dtypes == replace(plain.dtypes, kv_cache=torch.int8)
    assert model.backend_name == plain.backend_name
    assert model.fingerprint != plain.fingerprint
    model.allocate_kv_cache(7)
    assert model.context.kv_cache is not None
    assert model.context.kv_cache.nbytes == 7 * model.kv_block_bytes
    assert model.kv_block_bytes * 4 * model.head_dim == plain.kv_block_bytes * (model.head_dim + 4)


@pytest.mark.parametrize(("field", "without"), [("quantize", "none"), ("kv_cache_dtype", "auto")])
def test_8_bits_are_refused_on_a_gpu_with_the_remedy(
    folder: Path, field: str, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "resolve_device", lambda name, rank: torch.device("cuda", 0))
    monkeypatch.setattr(loader, "use_device", lambda device: None)
    with pytest.raises(ModelLoadError, match=f"{field} int8 is for a CPU, not for cuda:0; set {field} to {without}"):
        load(folder, **{field: "int8"})


@pytest.mark.parametrize("fields", [{"dtype": "float16"}, {"dtype": "float32", "kv_cache_dtype": "int8"}], ids=str)
def test_without_a_compiler_weights_keys_and_values_are_the_same_numbers(
    folder: Path, fields: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, object] = {**fields, "device": "cpu", "block_size": BLOCK_SIZE}
    expected = run(load(folder, **options), prompts(VOCAB_SIZE), steps_of(13))
    monkeypatch.setenv("PATH", str(tmp_path))
    model = load(folder, cache_dir=str(tmp_path), **options)
    assert (model.backend_name, model.dtypes.kv_cache.itemsize) == ("torch", 1 if "kv_cache_dtype" in fields else 2)
    for output, same in zip(run(model, prompts(VOCAB_SIZE), steps_of(13)), expected, strict=True):
        # Sums in another order, and a key here and there on the other side of a rounding: logits are of size 1 to 4.
        torch.testing.assert_close(output, same, rtol=0, atol=4e-3)


def test_a_weight_that_float16_has_no_number_for_is_named_with_the_remedy(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"model.norm.weight has numbers of up to 1e\+05.*set dtype to bfloat16"):
        load(folder, dtype="float16", device="cpu")


def test_the_fingerprint_changes_with_weights_dtype_and_attention_and_with_nothing_else(
    folder: Path, tmp_path: Path
) -> None:
    fingerprint = load(folder).fingerprint
    assert load(folder, max_num_seqs=3).fingerprint == fingerprint
    assert load(folder, dtype="bfloat16").fingerprint != fingerprint
    assert load(folder, attention="torch").fingerprint != load(folder, attention="auto").fingerprint or (
        load(folder).backend_name == "torch"
    )
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).fingerprint != fingerprint


def test_sharded_weights_load_and_a_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    sequences = prompts(VOCAB_SIZE)
    expected = run(load(folder, block_size=BLOCK_SIZE), sequences, steps_of(1000))
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file_name, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / file_name, metadata={"format": "pt"})
    weight_map = {name: file_name for file_name, part in shards.items() for name in part}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for output, same in zip(run(load(folder, block_size=BLOCK_SIZE), sequences, steps_of(1000)), expected, strict=True):
        assert torch.equal(output, same)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"lacks model-00002-of-00002.safetensors"):
        load(folder)


def test_a_folder_that_is_not_there_is_refused_with_what_may_be_given() -> None:
    with pytest.raises(
        ModelLoadError, match=r"/no/such/model does not exist here; give a model's folder, a .gguf file"
    ):
        load("/no/such/model")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"1234")
    with pytest.raises(ModelLoadError, match=r"is a file but no .gguf"):
        load(path)


def test_a_hub_model_that_cannot_be_fetched_is_refused_with_the_remedy() -> None:
    with pytest.raises(ModelLoadError, match=r"some-org/no-such-model .*(hub|network)"):
        load("some-org/no-such-model")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{broken", "config.json is not valid JSON"),
        ("config.json", b"[1]", "does not hold a JSON object"),
        ("tokenizer.json", None, "has no tokenizer.json; write one with transformers"),
        ("model.safetensors", None, "has no model.safetensors"),
        ("model.safetensors", b"", "model.safetensors is damaged; fetch the model again"),
        ("model.safetensors", b"\xff" * 64, "model.safetensors is damaged"),
        ("model.safetensors", (9).to_bytes(8, "little") + b"not JSON!", "its header cannot be read"),
    ],
)
def test_a_missing_or_broken_file_is_named_with_the_remedy(
    folder: Path, name: str, content: bytes | None, reason: str
) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=reason):
        load(folder)


def test_truncated_weights_are_refused_with_both_sizes(folder: Path) -> None:
    path = folder / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 100)
    with pytest.raises(ModelLoadError, match=f"is damaged.*{size - 100} bytes, {size} by its header"):
        load(folder)


def test_pickled_weights_are_refused_by_name_with_the_way_to_convert_them(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"pytorch_model.bin, a pickle that could run code.*save_pretrained"):
        load(folder)


def test_a_weight_that_is_missing_is_refused_instead_of_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 1 weights of LlamaForCausalLM, model.layers.1.mlp.up_proj.weight"):
        load(folder)


def test_a_config_that_does_not_fit_the_weights_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(ModelLoadError, match=r"cannot be loaded as LlamaForCausalLM.*compare config.json"):
        load(folder)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused_by_name(folder: Path, device: str) -> None:
    with pytest.raises(ModelLoadError, match=f"device .*'{device}'"):
        load(folder, device=device)


def test_an_unknown_attention_backend_is_refused_with_the_list(folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match="attention must be one of auto, native, torch, triton; got 'flash'"):
        load(folder, attention="flash")


def test_a_model_whose_layers_do_not_call_the_engines_attention_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "choose_kit", lambda *given: None)  # nothing is fused in it
    model: Any = load(folder).model
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ModelLoadError, match="only 1 of the model's 2 layers attend through"):
        attach_attention(model, AttentionContext(TorchAttention()), num_layers=2)


def test_generation_config_adds_its_ends_to_the_configs(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, EOS_TOKEN_ID]}))
    assert load(folder).eos_token_ids == (7, EOS_TOKEN_ID)


def test_the_tiny_models_tokenizer_gives_every_byte_back(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Grüße, 世界! \t\n<|end|>"
    encoded = tokenizer.encode(text)
    assert encoded.ids[-1] == EOS_TOKEN_ID
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert bytes(encoded.ids[:-1]) == text.removesuffix("<|end|>").encode()
