"""Runs that transformers saved, averaged, and loaded again by it."""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_folders
import wavg
from wavg.checkpoint import FileIdentity, Index, TensorSpec
from wavg.cli import main
from wavg.formats import safetensors_shards

pytestmark = pytest.mark.frameworks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

STEPS = (9, 10, 11, 100)
TOKENS = torch.arange(20).reshape(2, 10)


def gpt2():
    return transformers.GPT2Config(
        vocab_size=50,
        n_positions=16,
        n_embd=16,
        n_layer=3,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )


def llama(tied):
    return transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )


CONFIGS = {
    "gpt2, tied": gpt2,
    "llama, tied": lambda: llama(True),
    "llama": lambda: llama(False),
}


def random_model(config, seed, dtype):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval()  # not model.to(dtype): positions are computed in float32


def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>")
    core = tokenizers.Tokenizer(words)
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def save_run(folder, config, dtype, shard_size):
    """Save models as the Trainer lays them out; return them and their folders, oldest first."""
    models, folders = [], []
    for step in STEPS:
        path = os.path.join(folder, f"checkpoint-{step}")
        model = random_model(config, step, dtype)
        model.save_pretrained(path, max_shard_size=shard_size)
        tokenizer().save_pretrained(path)
        optimizer = torch.optim.AdamW(model.parameters())
        torch.save(optimizer.state_dict(), os.path.join(path, "optimizer.pt"))
        torch.save(torch.get_rng_state(), os.path.join(path, "rng_state.pth"))
        torch.save({}, os.path.join(path, "scheduler.pt"))
        torch.save({}, os.path.join(path, "training_args.bin"))
        with open(os.path.join(path, "trainer_state.json"), "w") as file:
            json.dump({"global_step": step}, file)
        models.append(model)
        folders.append(path)
    return models, folders


def mean(models):
    """The average made in torch: in float64, exact for four models, and rounded once."""
    result = copy.deepcopy(models[-1])
    rows = zip(*(model.state_dict().items() for model in models), strict=True)
    with torch.no_grad():
        for tensors in rows:
            name = tensors[0][0]
            exact = sum(tensor.double() for _, tensor in tensors) / len(tensors)
            result.state_dict()[name].copy_(rounded(exact, tensors[0][1].dtype))
    return result


def rounded(exact, dtype):
    """Round once. To bfloat16 torch goes through float32: rounded to odd there, once is once."""
    if dtype is torch.float32:
        return exact.float()
    near = exact.float()
    bits = near.numpy().view(np.int32)
    inexact = (near.double() != exact).numpy()
    below = inexact & (abs(near.double()) > abs(exact)).numpy()
    odd = np.where(inexact, (bits - below) | 1, bits).astype(np.int32)
    return torch.from_numpy(odd.view(np.float32)).to(dtype)


def load(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, local_files_only=True
        )


def assert_alike(folder, expected):
    model, told = load(folder)
    assert not any(told.values())  # nothing missing, nothing unexpected
    assert model.dtype == expected.dtype
    for (name, found), (other, wanted) in zip(
        model.state_dict().items(), expected.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(found, wanted), name
    with torch.no_grad():
        assert torch.equal(model.eval()(TOKENS).logits, expected(TOKENS).logits)
    return model


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_size", ["5KB", "5GB"])
def test_the_average_of_a_run_loads_and_computes_as_that_made_in_torch(
    tmp_path, config, dtype, shard_size
):
    config = CONFIGS[config]()
    models, folders = save_run(tmp_path / "run", config, getattr(torch, dtype), shard_size)
    output = str(tmp_path / "averaged")
    assert main(["average", *sorted(folders), "-o", output, "--quiet"]) == 0
    model = assert_alike(output, mean(models))
    if config.tie_word_embeddings:
        embeddings = model.get_input_embeddings().weight
        assert model.get_output_embeddings().weight is embeddings
        names = set(wavg.load(output))
        assert len({"lm_head.weight"} & names) == 0
    newest = hf_folders.contents(folders[-1])
    found = hf_folders.contents(output)
    trained = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"}
    assert found.keys() == newest.keys() - trained - {"trainer_state.json"}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert found[name] == newest[name]
    read = transformers.AutoTokenizer.from_pretrained(output, local_files_only=True)
    assert read("one two")["input_ids"] == [1, 2]


@pytest.mark.parametrize("limit", ["4KB", "20KB", "5GB"])
def test_divided_anew_it_is_what_transformers_divides(tmp_path, limit):
    models, folders = save_run(tmp_path / "run", llama(True), torch.float32, "8KB")
    output = str(tmp_path / "averaged")
    wavg.average_checkpoints(folders, output, max_shard_size=limit)
    expected = mean(models)
    assert_alike(output, expected)
    expected.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    names = [
        sorted(name for name in os.listdir(folder) if "safetensors" in name)
        for folder in (output, tmp_path / "theirs")
    ]
    assert len(names[0]) == len(names[1])


def test_another_dtype_is_that_in_which_it_loads(tmp_path):
    models, folders = save_run(tmp_path / "run", llama(True), torch.bfloat16, "8KB")
    wavg.average_checkpoints(folders, tmp_path / "averaged", dtype="float32")
    wider = [copy.deepcopy(model).float() for model in models]
    assert_alike(str(tmp_path / "averaged"), mean(wider))


def test_runs_divided_differently_average(tmp_path):
    models, folders = save_run(tmp_path / "run", llama(False), torch.float32, "8KB")
    for model, folder, size in zip(models, folders, ("3KB", "5GB", "20KB"), strict=False):
        shutil.rmtree(folder)
        model.save_pretrained(folder, max_shard_size=size)
    wavg.average_checkpoints(tmp_path / "run", tmp_path / "averaged")
    assert_alike(str(tmp_path / "averaged"), mean(models))


def test_the_average_of_a_run_is_the_base_of_the_next(tmp_path):
    models, folders = save_run(tmp_path / "run", gpt2(), torch.float32, "5GB")
    wavg.average_checkpoints(folders, tmp_path / "averaged")
    model, _ = load(str(tmp_path / "averaged"))
    model.save_pretrained(tmp_path / "again")
    assert_alike(str(tmp_path / "again"), mean(models))


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, position):
        tokens = torch.randint(50, (8,), generator=torch.Generator().manual_seed(position))
        return {"input_ids": tokens, "labels": tokens}


def train(model, folder):
    """A run of the Trainer's own; returns its checkpoints, oldest first."""
    pytest.importorskip("accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = transformers.TrainingArguments(
            str(folder),
            max_steps=12,
            save_steps=3,
            learning_rate=0.1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        transformers.Trainer(model, options, train_dataset=Sentences()).train()
    return [os.path.join(folder, f"checkpoint-{step}") for step in (3, 6, 9, 12)]


def test_a_run_of_the_trainer_averages(tmp_path):
    folders = train(random_model(llama(True), 1, torch.float32), tmp_path / "run")
    reports = wavg.average_checkpoints(tmp_path / "run", tmp_path / "averaged")
    assert [part.step for part in reports.plan.inputs] == [3, 6, 9, 12]
    assert_alike(str(tmp_path / "averaged"), mean([load(folder)[0].eval() for folder in folders]))
    assert "optimizer.pt" in os.listdir(folders[-1])
    assert sorted(os.listdir(tmp_path / "averaged")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_adapters_of_peft_average(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
        base = random_model(llama(True), 1, torch.float32)
        settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
        train(peft.get_peft_model(copy.deepcopy(base), settings), tmp_path / "run")
        wavg.average_checkpoints(tmp_path / "run", tmp_path / "averaged")
        model = peft.PeftModel.from_pretrained(base, tmp_path / "averaged").eval()
    tensors = wavg.load(tmp_path / "averaged")
    found = peft.get_peft_model_state_dict(model)
    assert tensors.keys() == found.keys()
    for name, array in wavg.average_checkpoints(tmp_path / "run").items():
        assert np.array_equal(found[name].numpy(), array)


@pytest.mark.parametrize("metadata", [{"format": "pt"}, None])
def test_a_loader_that_insists_on_the_format_takes_what_was_averaged(tmp_path, metadata):
    modeling = pytest.importorskip("accelerate.utils.modeling")
    import torch
    from safetensors.torch import save_file

    for step in (1, 2):
        tensors = {"w": torch.full((3,), float(step), dtype=torch.bfloat16)}
        save_file(tensors, tmp_path / f"model_{step}.safetensors", metadata=metadata)
    output = tmp_path / "average.safetensors"
    wavg.average_checkpoints(str(tmp_path / "model_*.safetensors"), output)
    loaded = modeling.load_state_dict(str(output))
    assert loaded["w"].tolist() == [1.5] * 3
    wavg.save(output, wavg.load(output), metadata={"wavg": "no format"}, overwrite=True)
    with pytest.raises(OSError, match="valid metadata"):  # it does insist
        modeling.load_state_dict(str(output))


def test_the_comparison_sees_planted_errors(tmp_path):
    models, folders = save_run(tmp_path / "run", llama(True), torch.float32, "8KB")
    wavg.average_checkpoints(folders[1:], tmp_path / "averaged")
    with pytest.raises(AssertionError):
        assert_alike(str(tmp_path / "averaged"), mean(models))
    assert_alike(str(tmp_path / "averaged"), expected := mean(models[1:]))
    expected.model.layers[0].mlp.act_fn = torch.nn.Identity()
    with pytest.raises(AssertionError):
        assert_alike(str(tmp_path / "averaged"), expected)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 60))
def test_shards_are_those_of_huggingface_hub(sizes, limit):
    hub = pytest.importorskip("huggingface_hub")
    tensors = {f"t{n}": torch.zeros(size, dtype=torch.uint8) for n, size in enumerate(sizes)}
    pattern = "model{suffix}.safetensors"
    theirs = hub.split_torch_state_dict_into_shards(
        tensors, filename_pattern=pattern, max_shard_size=limit
    )
    specs = [TensorSpec(name, "uint8", tuple(t.shape)) for name, t in tensors.items()]
    reference = Index("safetensors", (FileIdentity("in/model.safetensors", 0, 0, 0, 0),), ())
    parts = safetensors_shards.parts("out/", specs, reference, limit)
    ours = {os.path.basename(part.path): list(part.names) for part in parts if part.names}
    assert ours == dict(theirs.filename_to_tensors)
