"""Checkpoints of every layout end in the same model; bad ones end in one clear error before weights are read."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    ANYRES,
    DECODER,
    TILE,
    VISION,
    VOCAB,
    original_config,
    original_weights,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    write_hf,
    write_json,
    write_original,
    write_tower,
    write_weights,
)
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)
from transformers.quantizers.quantizers_utils import should_convert_module

from llava.mm_utils import process_images, tokenizer_image_token
from llava.model import checkpoint, key_mapping, placement
from llava.model.builder import context_length, load_pretrained_model
from llava.model.configs import is_hf_layout, model_class, model_config
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.model.vision import vision_config_of
from llava.utils import UserError

DATA = Path(__file__).parent / "data"
PROMPT = "USER: <image>\nwhat is this ASSISTANT:"


def picture() -> Image.Image:
    image = Image.new("RGB", (90, 40), (200, 30, 20))
    image.paste((10, 220, 60), (0, 0, 30, 30))
    return image


def answer(tokenizer, model, image_processor) -> torch.Tensor:
    """Logits of the prompt with the picture, over the tokens that every layout has."""
    images = process_images([picture()], image_processor, model.config)
    ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None]
    with torch.inference_mode():
        return model(ids, images=images, image_sizes=[picture().size]).logits[..., :VOCAB]


def load(folder, base=None, name=None, **options):
    options.setdefault("device", "cpu")
    tokenizer, model, image_processor, _ = load_pretrained_model(folder, base, name or Path(folder).name, **options)
    return tokenizer, model, image_processor


# --- the same weights in every layout ---


@pytest.mark.parametrize("mistral", [False, True], ids=["llama", "mistral"])
@pytest.mark.parametrize("layout", [{}, ANYRES], ids=["pad", "anyres"])
def test_every_layout_of_the_same_weights_gives_equal_logits(tmp_path, mistral, layout):
    model = tiny_model(tiny_config(mistral, **layout))
    folders = [
        write_original(tmp_path / "safetensors", model),
        write_original(tmp_path / "safetensors-shards", model, shards=3),
        write_original(tmp_path / "bin", model, "bin"),
        write_original(tmp_path / "bin-shards", model, "bin", shards=2),
        write_hf(tmp_path / "hf", model),
        write_hf(tmp_path / "hf-padded", model, extra_vocab=7),
        write_hf(tmp_path / "hf-newer", model, newer=True),
    ]
    loaded = [load(folder) for folder in folders]
    for tokenizer, other, image_processor in loaded:
        assert isinstance(other, LlavaMistralForCausalLM if mistral else LlavaLlamaForCausalLM)
        assert not other.training
        for name, weight in model.state_dict().items():
            assert torch.equal(other.state_dict()[name][: len(weight)] if weight.ndim else weight, weight), name
        assert torch.equal(answer(tokenizer, other, image_processor), answer(tokenizer, model, image_processor))


def test_model_type_llava_is_told_apart_by_what_is_inside(tmp_path):
    model = tiny_model()
    original = write_original(tmp_path / "original", model, model_type="llava")
    hf = write_hf(tmp_path / "hf", model)
    for folder in (original, hf):
        assert json.loads((folder / "config.json").read_text())["model_type"] == "llava"
    assert torch.equal(answer(*load(original)), answer(*load(hf)))


def test_mistral_in_the_name_decides_where_the_config_says_only_llava(tmp_path):
    model = tiny_model(tiny_config(mistral=True))
    folder = write_original(tmp_path / "llava-mistral-7b", model, model_type="llava", architectures=None)
    assert isinstance(load(folder)[1], LlavaMistralForCausalLM)


def test_a_tower_beside_the_checkpoint_is_loaded_from_its_own_folder(tmp_path):
    model = tiny_model()
    tower = write_tower(tmp_path / "clip", model)
    folder = write_original(tmp_path / "llava", model, "bin", vision_config=None, mm_vision_tower=str(tower))
    weights = {k: v for k, v in original_weights(model).items() if "vision_tower" not in k}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    write_weights(folder, weights, "bin")
    tokenizer, loaded, image_processor = load(folder)
    assert list(image_processor.image_mean) == [0.5, 0.4, 0.3]
    assert torch.equal(answer(tokenizer, loaded, image_processor), answer(tokenizer, model, image_processor))
    # A saved copy holds the tower and needs its folder no longer.
    loaded.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    shutil.copy(tower / "preprocessor_config.json", tmp_path / "saved")
    shutil.rmtree(tower)
    assert torch.equal(answer(*load(tmp_path / "saved")), answer(tokenizer, model, image_processor))


def test_a_projector_beside_the_weights_is_taken_where_they_lack_it(tmp_path):
    model = tiny_model()
    folder = write_original(tmp_path / "llava", model)
    state = original_weights(model)
    write_weights(folder, {k: v for k, v in state.items() if "mm_projector" not in k})
    torch.save({k: v for k, v in state.items() if "mm_projector" in k}, folder / "mm_projector.bin")
    tokenizer, loaded, image_processor = load(folder)
    assert torch.equal(answer(tokenizer, loaded, image_processor), answer(tokenizer, model, image_processor))


@pytest.mark.parametrize("mistral", [False, True], ids=["llama", "mistral"])
def test_hf_checkpoints_answer_as_transformers_own_llava(tmp_path, mistral):
    folder = write_hf(tmp_path / "hf", tiny_model(tiny_config(mistral)), extra_vocab=3)
    tokenizer, model, image_processor = load(folder)
    reference = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    pixels = process_images([picture(), picture().rotate(180)], image_processor, model.config)
    ids = tokenizer_image_token("USER: <image> what <image> is", tokenizer, return_tensors="pt")
    per_image = model.get_vision_tower().num_patches
    expanded = [i for index in ids.tolist() for i in ([VOCAB] * per_image if index < 0 else [index])]
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([expanded]), pixel_values=pixels).logits
        torch.testing.assert_close(model(ids[None], images=pixels).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(90, 40), (40, 90), (60, 60), (57, 41), (200, 33)])
def test_hf_anyres_checkpoints_answer_as_transformers_own_llava_next(tmp_path, size):
    folder = write_hf(tmp_path / "hf", tiny_model(tiny_config(**ANYRES)), extra_vocab=3)
    tokenizer, model, image_processor = load(folder)
    reference = LlavaNextForConditionalGeneration.from_pretrained(folder).eval()
    tiles = process_images([picture().resize(size)], image_processor, model.config)
    ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")
    num_rows = len(model.image_rows(tiles, [size])[0])
    expanded = [i for index in ids.tolist() for i in ([VOCAB] * num_rows if index < 0 else [index])]
    with torch.inference_mode():
        expected = reference(
            input_ids=torch.tensor([expanded]), pixel_values=tiles, image_sizes=torch.tensor([size[::-1]])
        ).logits
        ours = model(ids[None], images=tiles, image_sizes=[size]).logits
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mistral", [False, True], ids=["llama", "mistral"])
def test_from_pretrained_reads_original_checkpoints_and_saved_models(tmp_path, mistral):
    model = tiny_model(tiny_config(mistral))
    original = write_original(tmp_path / "original", model, "bin", sliding_window=None)
    write_json(original / "generation_config.json", {"eos_token_id": [2, 7]})
    loaded = type(model).from_pretrained(original, dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == original_weights(model).keys()
    for other in (loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        assert type(other) is type(model) and other.generation_config.eos_token_id == [2, 7]
        assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in other.state_dict().items())


def base_of(folder: Path, model) -> Path:
    """The plain language model below a LLaVA."""
    folder.mkdir()
    write_json(folder / "config.json", {**DECODER, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    weights = original_weights(model).items()
    write_weights(folder, {k: v for k, v in weights if "mm_" not in k and "vision" not in k}, "bin")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_projector_only_on_a_base(tmp_path):
    model = tiny_model()
    tower = write_tower(tmp_path / "clip", model)
    base = base_of(tmp_path / "vicuna", model)
    folder = tmp_path / "llava-pretrain"
    folder.mkdir()
    write_json(folder / "config.json", original_config(model, vision_config=None, mm_vision_tower=str(tower)))
    state = original_weights(model)
    torch.save({k: v for k, v in state.items() if "mm_projector" in k}, folder / "mm_projector.bin")
    tokenizer, loaded, image_processor = load(folder, base)
    assert torch.equal(answer(tokenizer, loaded, image_processor), answer(tokenizer, model, image_processor))
    (folder / "mm_projector.bin").unlink()
    with pytest.raises(UserError, match=r"mm_projector\.bin is missing"):
        load(folder, base)


@pytest.mark.parametrize(
    ("extra_tokens", "targets"),
    [
        (0, ["q_proj", "down_proj"]),
        (3, ["q_proj", "down_proj"]),
        (0, [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]),
        (0, r"model\.layers\.\d+\.(self_attn\.q_proj|mlp\.down_proj)"),
    ],
    ids=["ends of names", "more tokens", "original names", "pattern"],
)
def test_lora_on_a_base_is_base_plus_scaled_product(tmp_path, extra_tokens, targets):
    peft = pytest.importorskip("peft")
    model = tiny_model()
    tower = write_tower(tmp_path / "clip", model)
    base = base_of(tmp_path / "vicuna", model)
    folder = tmp_path / "llava-lora"
    text = LlamaForCausalLM(LlamaConfig(**DECODER))  # adapters are in the layout of the original decoder
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(text, settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    write_json(folder / "config.json", original_config(model, vision_config=None, mm_vision_tower=str(tower)))
    projector = original_weights(tiny_model(seed=9))
    extras = {k: v for k, v in projector.items() if "mm_projector" in k}
    if extra_tokens:
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            extras[key] = torch.cat([original_weights(model)[key], torch.ones(extra_tokens, 24)])
    torch.save({f"base_model.model.{k}": v for k, v in extras.items()}, folder / "non_lora_trainables.bin")

    expected = {**original_weights(model), **extras}
    pairs = dict(adapted.named_parameters())
    for name, a in pairs.items():
        if "lora_A" in name:
            b = pairs[name.replace("lora_A", "lora_B")]
            key = name.removeprefix("base_model.model.").replace("lora_A.default.", "")
            expected[key] = expected[key] + 3.0 * (b @ a)
    _, loaded, _ = load(folder, base)
    assert original_weights(loaded).keys() == expected.keys()
    for name, weight in original_weights(loaded).items():
        torch.testing.assert_close(weight, expected[name], msg=name)
    assert loaded.config.vocab_size == VOCAB + extra_tokens
    with pytest.raises(UserError, match="--model-base"):
        load(folder)

    adapter = load_file(folder / "adapter_model.safetensors")
    first = next(name for name in adapter if "lora_A" in name)
    save_file({k: v for k, v in adapter.items() if k != first}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"lacks {re.escape(first)}$"):
        load(folder, base)
    moved = {k.replace("layers.2", "layers.7"): v for k, v in adapter.items()}
    save_file(moved, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"not for this base model: .*layers\.7"):
        load(folder, base)
    for file, message in (("adapter_model.safetensors", "adapter_model"), ("non_lora_trainables.bin", "non_lora")):
        (folder / file).unlink()
        with pytest.raises(UserError, match=message):
            load(folder, base)


# --- from the hub ---


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder: ``snapshot_download`` copies what its patterns name; the list says which files it gave."""
    fetched: list[str] = []

    def snapshot_download(repo_id, allow_patterns):
        source, cache = tmp_path / "hub" / repo_id, tmp_path / "cache" / repo_id
        if not source.is_dir():
            raise FileNotFoundError(repo_id)
        cache.mkdir(parents=True, exist_ok=True)
        for file in sorted(source.iterdir()):
            if any(file.match(pattern) for pattern in allow_patterns) and not (cache / file.name).exists():
                shutil.copy(file, cache)
                fetched.append(file.name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return fetched


@pytest.mark.parametrize(("form", "shards"), [("safetensors", 1), ("safetensors", 2), ("bin", 1), ("bin", 2)])
def test_a_hub_id_fetches_one_form_of_the_weights(tmp_path, hub, form, shards):
    model = tiny_model()
    folder = write_original(tmp_path / "hub" / "someone" / "llava", model, form, shards)
    if form == "safetensors":
        torch.save({}, folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(b"not for us")
    tokenizer, loaded, image_processor = load("someone/llava")
    assert torch.equal(answer(tokenizer, loaded, image_processor), answer(tokenizer, model, image_processor))
    assert "training_args.bin" not in hub
    assert all(file.endswith(form) for file in hub if not file.endswith(".json"))


def test_nothing_big_is_fetched_of_a_model_that_is_no_llava(tmp_path, hub):
    folder = write_original(tmp_path / "hub" / "someone" / "mpt", tiny_model(), model_type="mpt")
    with pytest.raises(UserError, match="'mpt'"):
        load("someone/mpt")
    assert (folder / "model.safetensors").exists() and "model.safetensors" not in hub


def test_a_tower_on_the_hub_is_fetched_and_its_absence_named(tmp_path, hub):
    model = tiny_model()
    folder = write_original(tmp_path / "llava", model, vision_config=None, mm_vision_tower="openai/some-clip")
    write_weights(folder, {k: v for k, v in original_weights(model).items() if "vision_tower" not in k})
    edit_config(folder, vision_config=VISION)
    with pytest.raises(UserError, match="'openai/some-clip'"):
        load(folder)
    write_tower(tmp_path / "hub" / "openai" / "some-clip", model)
    tokenizer, loaded, image_processor = load(folder)
    assert torch.equal(answer(tokenizer, loaded, image_processor), answer(tokenizer, model, image_processor))


# --- options ---


def test_dtype_is_the_devices_unless_asked(tmp_path):
    folder = write_original(tmp_path / "llava", tiny_model())
    assert load(folder)[1].dtype == torch.float32
    for asked, dtype in {"bfloat16": torch.bfloat16, "fp16": torch.float16, torch.float64: torch.float64}.items():
        model = load(folder, dtype=asked)[1]
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_the_one_asked_for(tmp_path, attention):
    folder = write_original(tmp_path / "llava", tiny_model())
    assert load(folder, attn_implementation=attention)[1].config._attn_implementation == attention


DECODER_PARTS = ("embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb")
PARTS = tuple(f"model.language_model.{part}" for part in DECODER_PARTS)
PARTS = (*PARTS, "model.vision_tower", "model.multi_modal_projector", "lm_head")


@pytest.mark.parametrize(
    "on_disk",
    [
        ("model.language_model.layers.1", "model.multi_modal_projector"),
        ("model.language_model.embed_tokens", "model.vision_tower"),
        ("lm_head", "model.language_model.layers.0", "model.language_model.layers.2", "model.language_model.norm"),
    ],
)
def test_offloaded_parts_give_the_same_answer(tmp_path, on_disk):
    folder = write_original(tmp_path / "llava", tiny_model())
    device_map = {part: "disk" if part in on_disk else "cpu" for part in PARTS}
    tokenizer, model, image_processor = load(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    torch.testing.assert_close(answer(tokenizer, model, image_processor), answer(*load(folder)))


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "cpu"])
def test_device_maps_give_the_same_answer(tmp_path, device_map):
    folder = write_original(tmp_path / "llava", tiny_model())
    placed = load(folder, device=None, device_map=device_map, dtype="float32")
    torch.testing.assert_close(answer(*placed).cpu(), answer(*load(folder)), atol=1e-4, rtol=1e-4)


def test_the_generation_config_of_the_folder_is_taken(tmp_path):
    folder = write_original(tmp_path / "llava", tiny_model())
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 7], "max_new_tokens": 3})
    model = load(folder)[1]
    assert model.generation_config.eos_token_id == [2, 7] and model.generation_config.max_new_tokens == 3
    assert model.generation_config.pad_token_id == tiny_tokenizer().pad_token_id


def test_published_generation_configs_bring_no_warnings(tmp_path, caplog):
    folder = write_original(tmp_path / "llava", tiny_model())
    published = {"_from_model_config": True, "max_length": 4096, "temperature": 0.9, "top_p": 0.6, "pad_token_id": 0}
    write_json(folder / "generation_config.json", published)
    model = load(folder)[1]
    ids = torch.tensor([[1, 5, 6]])
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        greedy = model.generate(ids, do_sample=False, max_new_tokens=3)
        assert torch.equal(model.generate(ids, do_sample=False, temperature=0, top_p=None, max_new_tokens=3), greedy)
        torch.manual_seed(0)
        sampled = model.generate(ids, do_sample=True, temperature=5.0, max_new_tokens=20)
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert caplog.messages == []
    options = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 20}
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, top_p=0.6, **options), sampled)
    torch.manual_seed(0)
    assert not torch.equal(model.generate(ids, top_p=None, **options), sampled)
    model.save_pretrained(tmp_path / "saved")


def test_the_model_remembers_its_name(tmp_path):
    folder = write_original(tmp_path / "llava-v1.5-13b", tiny_model())
    model = load(folder)[1]
    assert model.config._name_or_path == str(folder)


def test_context_length(tmp_path):
    folder = write_original(tmp_path / "a", tiny_model())
    assert load_pretrained_model(folder, device="cpu")[3] == DECODER["max_position_embeddings"]
    folder = write_original(tmp_path / "b", tiny_model(), max_sequence_length=77)
    assert load_pretrained_model(folder, device="cpu")[3] == 77
    assert context_length(object()) == 2048


def test_image_tokens_are_added_where_the_config_asks(tmp_path):
    model = tiny_model(tiny_config(vocab_size=12))  # as many rows as the tokenizer has words
    folder = write_original(tmp_path / "llava", model, mm_use_im_start_end=True, mm_use_im_patch_token=True)
    tokenizer, loaded, _ = load(folder)
    assert tokenizer.convert_tokens_to_ids(["<im_patch>", "<im_start>", "<im_end>"]) == [12, 13, 14]
    for table, old in (
        (loaded.get_input_embeddings(), model.get_input_embeddings()),
        (loaded.get_output_embeddings(), model.lm_head),
    ):
        assert table.weight.shape[0] == 15
        assert torch.equal(table.weight[:12], old.weight)
        torch.testing.assert_close(table.weight[12:], old.weight.mean(dim=0).expand(3, -1))
    assert loaded.config.vocab_size == 15


def test_padded_vocabularies_are_not_cut(tmp_path):
    folder = write_original(tmp_path / "llava", tiny_model(), mm_use_im_start_end=True)
    assert load(folder)[1].get_input_embeddings().weight.shape[0] == VOCAB


def test_quantised_loading_needs_its_extra(tmp_path, monkeypatch):
    folder = write_original(tmp_path / "llava", tiny_model())
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: None)
    for options in ({"load_8bit": True}, {"load_4bit": True}):
        with pytest.raises(UserError, match=r"needs the extra 'quant': .*pip install "):
            load(folder, **options)
    with pytest.raises(UserError, match="exclude each other"):
        load(folder, load_8bit=True, load_4bit=True)


def test_quantised_loading_asks_for_nf4_and_spares_tower_and_projector(tmp_path, monkeypatch):
    folder = write_original(tmp_path / "llava", tiny_model())
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: object())

    class Seen(Exception):
        pass

    def from_pretrained(cls, *args, quantization_config, **options):
        raise Seen(quantization_config)

    monkeypatch.setattr(LlavaLlamaForCausalLM, "from_pretrained", classmethod(from_pretrained))
    with pytest.raises(Seen) as four:
        load(folder, load_4bit=True)
    with pytest.raises(Seen) as eight:
        load(folder, load_8bit=True)
    four, eight = four.value.args[0], eight.value.args[0]
    assert four.load_in_4bit and four.bnb_4bit_quant_type == "nf4" and four.bnb_4bit_use_double_quant
    assert four.bnb_4bit_compute_dtype == torch.float16
    assert eight.load_in_8bit and not eight.load_in_4bit
    linear = [name for name, module in tiny_model().named_modules() if isinstance(module, torch.nn.Linear)]
    spared = ("lm_head", "model.multi_modal_projector", "model.vision_tower")
    for config in (four, eight):
        for name in linear:
            assert should_convert_module(name, config.llm_int8_skip_modules) != name.startswith(spared), name


# --- published checkpoints, on the meta device ---


def expand(keys: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """``a.{0..2}.b`` stands for three keys."""
    out = {}
    for key, shape in keys.items():
        span = re.search(r"\{(\d+)\.\.(\d+)\}", key)
        names = [key]
        if span:
            names = [key.replace(span[0], str(index)) for index in range(int(span[1]), int(span[2]) + 1)]
        out |= {name: torch.empty(shape, device="meta") for name in names}
    return out


@pytest.mark.parametrize("file", sorted(DATA.glob("keys_*.json")), ids=lambda file: file.stem.removeprefix("keys_"))
def test_every_published_key_finds_its_place_and_none_is_left_over(file):
    published = json.loads(file.read_text())
    config = model_config(published["config"], file.stem)
    config.vision_config = vision_config_of(config).to_dict()
    with torch.device("meta"):
        model = model_class(config)(config)
    weights = key_mapping.module_names(expand(published["keys"]))
    weights |= key_mapping.tower_names(expand(published.get("tower_keys", {})))
    checkpoint.check_weights(model, weights, frozenset(), file.stem)
    assert weights.keys() == model.state_dict().keys()


@pytest.mark.parametrize("file", sorted(DATA.glob("keys_*.json")), ids=lambda file: file.stem.removeprefix("keys_"))
def test_the_key_mapping_is_exact_both_ways(file):
    published = json.loads(file.read_text())
    keys = [key for key in expand(published["keys"]) if not key.endswith(("inv_freq", "position_ids"))]
    modules = {key_mapping.module_name(key): key for key in keys}
    assert len(modules) == len(keys)
    for name, key in modules.items():
        original = key_mapping.original_name(name)
        assert key_mapping.module_name(original) == key_mapping.module_name(name) == name
        assert original == key or is_hf_layout(published["config"])


def test_hf_configs_are_read_as_the_original_ones_say():
    config = model_config(json.loads((DATA / "keys_llava-v1.6-mistral-7b-hf.json").read_text())["config"])
    original = model_config(json.loads((DATA / "keys_llava-v1.6-mistral-7b.json").read_text())["config"])
    for key in (
        "image_aspect_ratio",
        "image_grid_pinpoints",
        "mm_patch_merge_type",
        "mm_projector_type",
        "mm_hidden_size",
        "mm_vision_select_layer",
        "mm_vision_select_feature",
        "hidden_size",
        "num_key_value_heads",
        "rope_parameters",
    ):
        assert (
            sorted(getattr(config, key)) == sorted(getattr(original, key))
            if "pinpoints" in key
            else (getattr(config, key) == getattr(original, key))
        ), key


# --- bad checkpoints ---


@pytest.fixture
def no_weights_read(monkeypatch):
    """Fails the test if loading gets as far as the weights."""

    def from_pretrained(cls, *args, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr(LlavaLlamaForCausalLM, "from_pretrained", classmethod(from_pretrained))


def rewrite(folder: Path, change) -> None:
    state = original_weights(tiny_model())
    change(state)
    write_weights(folder, state)


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, **changes})


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "malformed config": (lambda f: (f / "config.json").write_text("{'a': 1}"), r"config\.json is not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"cannot read .*config\.json"),
    "unknown type": (lambda f: edit_config(f, model_type="mpt"), "model_type 'mpt'"),
    "plain language model": (lambda f: write_json(f / "config.json", {**DECODER, "model_type": "llama"}), "'llama'"),
    "impossible sizes": (lambda f: edit_config(f, hidden_size="wide"), r"config\.json does not describe a model"),
    "stored quantised": (lambda f: edit_config(f, quantization_config={"load_in_4bit": True}), "stored quantised"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no model weights"),
    "truncated safetensors": (lambda f: truncate(f / "model.safetensors"), r"model\.safetensors is truncated"),
    "missing keys": (
        lambda f: rewrite(f, lambda s: [s.pop("lm_head.weight"), s.pop("model.mm_projector.0.bias")]),
        r"missing: lm_head\.weight, model\.mm_projector\.0\.bias$",
    ),
    "missing tower keys": (
        lambda f: rewrite(f, lambda s: s.pop("model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias")),
        r"missing: model\.vision_tower\.vision_tower\.vision_model\.pre_layrnorm\.bias$",
    ),
    "unexpected keys": (
        lambda f: rewrite(f, lambda s: s.update({"model.extra.weight": torch.ones(2)})),
        r"unexpected: model\.extra\.weight$",
    ),
    "wrong shape": (
        lambda f: rewrite(f, lambda s: s.update({"model.norm.weight": torch.ones(2)})),
        r"wrong shape: model\.norm\.weight \[2\] instead of \[24\]$",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot read the tokenizer"),
    "tower of another kind": (
        lambda f: edit_config(f, vision_config={"model_type": "siglip_vision_model"}),
        "'siglip_vision_model' is not supported",
    ),
    "tower nowhere": (
        lambda f: edit_config(f, vision_config=None, mm_vision_tower="/nowhere/clip"),
        "/nowhere/clip",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_checkpoint_is_one_clear_error(tmp_path, no_weights_read, kind):
    damage, message = BROKEN[kind]
    folder = write_original(tmp_path / "llava", tiny_model())
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def damage_shard(folder: Path, form: str, kind: str) -> str:
    suffix, stem = (".safetensors", "model") if form == "safetensors" else (".bin", "pytorch_model")
    shard, index = folder / f"{stem}-00002-of-00003{suffix}", folder / f"{stem}{suffix}.index.json"
    content = json.loads(index.read_text())
    if kind == "missing":
        shard.unlink()
        return f"lacks {shard.name}"
    if kind == "truncated":
        truncate(shard)
        return f"{shard.name} is truncated"
    key = next(key for key, name in content["weight_map"].items() if name == shard.name)
    if kind == "promise":
        content["weight_map"][key] = f"{stem}-00001-of-00003{suffix}"
        content["weight_map"].pop(next(k for k, n in content["weight_map"].items() if n == shard.name), None)
        write_json(index, content)
        return f"promises weights that its files lack: {re.escape(key)}"
    if kind == "no map":
        write_json(index, {"metadata": {}})
        return "no weight_map"
    outside = {"parent": f"../{shard.name}", "absolute": f"/tmp/{shard.name}", "windows": f"C:\\{shard.name}"}[kind]
    shutil.copy(shard, folder.parent / shard.name)
    content["weight_map"][key] = outside
    write_json(index, content)
    return "outside its folder"


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", ["missing", "truncated", "promise", "no map", "parent", "absolute", "windows"])
def test_bad_shards_are_one_clear_error(tmp_path, no_weights_read, form, kind):
    folder = write_original(tmp_path / "llava", tiny_model(), form, shards=3)
    message = damage_shard(folder, form, kind)
    with pytest.raises(UserError, match=message):
        load(folder)


class Trap:
    """Would run code if a loader unpickled it."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_code_in_a_bin_file_is_never_run(tmp_path):
    folder = write_original(tmp_path / "llava", tiny_model(), "bin")
    torch.save({"model.norm.weight": Trap(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/llava", "model folder /nowhere/llava does not exist"),
        ("./nowhere/llava", "does not exist"),
        ("../../etc/llava", "does not exist"),
    ],
)
def test_a_missing_folder_is_named(path, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load(path)


def test_a_file_is_no_checkpoint_folder(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="is a file"):
        load(tmp_path / "model.bin")


def test_a_hub_model_out_of_reach_is_one_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'liuhaotian/no-such-llava' is neither a folder here nor a model"):
        load("liuhaotian/no-such-llava")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "abacus"}, "'abacus' is unknown"),
        ({"device": "xpu"}, "'xpu' is not supported"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"dtype": torch.int64}, "torch.int64"),
        ({"attn_implementation": "magic"}, "'magic'"),
    ],
)
def test_bad_options_are_named_before_anything_is_opened(options, message):
    with pytest.raises(UserError, match=message):
        load("/nowhere", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("options", [{"device": "cuda"}, {"device_map": {"": 0}}, {"device_map": "cuda:1"}])
def test_cuda_asked_for_and_absent_is_an_error(options):
    with pytest.raises(UserError, match="no CUDA GPU"):
        load("/nowhere", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_flash_attention_where_it_is_not_installed_names_the_extra():
    with pytest.raises(UserError, match=r"needs the extra 'flash': .*pip install "):
        load("/nowhere", use_flash_attn=True)


def test_the_tower_image_size_is_the_processors_where_nothing_is_said(tmp_path):
    folder = write_original(tmp_path / "llava", tiny_model())
    image_processor = load(folder)[2]
    assert dict(image_processor.crop_size)["height"] == TILE == VISION["image_size"]
