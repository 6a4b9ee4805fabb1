"""Fixtures for every test: tiny random models of each supported family, written as ordinary Hugging Face folders."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Set before transformers is imported anywhere: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny tensors: a second thread costs more than it brings, and far more on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton reads this when it is first imported, whoever imports it: without a GPU its kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# One small shape for all: 2 layers, 4 query heads of 16 channels, a byte vocabulary.
_SHAPE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": {"model_type": "llama", "rope_theta": 500000.0},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}

MakeCheckpoint = Callable[..., Path]


# Files of minutes, begun first: of two that work through files, one would end with such a file while the other waits.
LONGEST = ("end_to_end", "restore_signals", "restore_forecast", "restore_parallel", "restore_estimate")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that bounds wall-clock time is tried again when it fails: a busy machine must not fail the suite."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    for item in items:
        if item.get_closest_marker("timing"):
            item.add_marker(pytest.mark.flaky(reruns=3, reruns_delay=2))


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Name of a supported family; a test that takes it runs once for each."""
    return str(request.param)


@pytest.fixture(scope="session")
def vllm_tells_each_table_once() -> Iterator[None]:
    """Exports compare their RoPE with vLLM's, whose import takes a core 8 to 20 s; equal configs have one answer."""
    from restore import verification

    run, told = verification._run_rotary_tables, {}

    def cached(path: Path, target_length: int, folder: Path) -> Any:
        asked = (target_length, (folder / "config.json").read_bytes(), os.environ.get("PYTHONPATH"))
        if asked not in told:
            ended = run(path, target_length, folder)
            told[asked] = ended, path.read_bytes() if path.exists() else None
        ended, table = told[asked]
        if table is not None:
            path.write_bytes(table)
        return ended

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "_run_rotary_tables", cached)
        yield


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory, vllm_tells_each_table_once: None) -> MakeCheckpoint:
    """Write a tiny random checkpoint: make_checkpoint("qwen3", max_shard_size="40KB", **config overrides) -> folder."""

    def make(family: str = "llama3", max_shard_size: str = "5GB", seed: int = 0, **overrides: Any) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = {**_SHAPE, **FAMILIES[family], **overrides}
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))  # type: ignore[no-untyped-call]
        # Default initialisation gives nearly uniform attention; wider weights make RoPE and adapters matter.
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.data.normal_(0, 0.15)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        _write_tokenizer(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four text files, about 2,000 bytes each, that a byte model can learn something from."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(4):
        lines = [f"{number} times {i} is {number * i}; the harbour lay quiet under the rain.\n" for i in range(40)]
        (folder / f"book-{number}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def _write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: ids 0-255 are bytes, then <s>, </s> and <pad>; BOS is put before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)} | {"<s>": 256, "</s>": 257, "<pad>": 258}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)  # type: ignore[no-untyped-call]
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    fast.save_pretrained(folder)
