"""Folders that are checkpoints, as Hugging Face's libraries lay them out.

What tells such a folder from one of many checkpoints, and what stands in it besides weights. It
looks at names only.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable

from wavg.errors import CheckpointFormatError
from wavg.places import is_folder

__all__ = [
    "INDEX",
    "WEIGHTS",
    "beside",
    "checkpoint_in",
    "has_folder",
    "is_carried",
    "is_shard",
    "is_unfinished",
    "retyped",
    "unlike_an_output",
    "why_none",
]

WEIGHTS = ".safetensors"
INDEX = ".safetensors.index.json"
_BASES = ("model", "diffusion_pytorch_model", "adapter_model")  # where there are several, the first
_OTHER_KINDS = (".h5", ".hdf5", ".keras", ".weights.json", ".npz")
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.safetensors", re.DOTALL)
_PICKLE = re.compile(r"(?:pytorch_|adapter_|diffusion_pytorch_)model(?:-\d{5}-of-\d{5})?\.bin")
_ONE_OF_A_SERIES = re.compile(r".*[-_=]\d+", re.DOTALL)

# What an output's folder has of the reference's besides weights: what tells the model's class, its
# settings, how its input is made, and under which terms it is given.
_CARRIED = (
    *("config.json", "*_config.json", "config_*.json", "modules.json", "*.py"),
    *("tokenizer.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "dict.txt", "normalizer.json"),
    *("*spiece*.model", "*sentencepiece*.model", "*bpe*.model", "*.spm", "*.tiktoken"),
    *("tekken.json", "chat_template.json", "*.jinja", "LICENSE*", "NOTICE*"),
)
# Never, whatever it is called besides: the state of the training, and numbers that are no average.
_STATE = ("optimizer*", "scheduler.*", "scaler.*", "rng_state*", "trainer_state*", "training_args*")
_NEVER = (
    *_STATE,
    *("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack"),
    *("*.onnx", "*.gguf", "*.npz", ".*"),
)


def is_shard(path: str) -> bool:
    """Whether a file is named like one of several that an index names.

    >>> is_shard("model-00001-of-00002.safetensors"), is_shard("model-00001.safetensors")
    (True, False)
    """
    return _SHARD.fullmatch(os.path.basename(path)) is not None


def is_unfinished(name: str) -> bool:
    """Whether a folder is one in which a save was under way, as older Trainers name it.

    >>> is_unfinished("tmp-checkpoint-30"), is_unfinished("checkpoint-30")
    (True, False)
    """
    return name.startswith("tmp-checkpoint-")


def is_carried(name: str) -> bool:
    """Whether a file of this name is carried over into an output's folder.

    >>> [is_carried(n) for n in ("config.json", "tokenizer.model", "optimizer.pt", "rng_state.pth")]
    [True, True, False, False]
    """
    return _matches(name, _CARRIED) and not _matches(name, _NEVER)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def names_in(folder: str) -> list[str]:
    """Return the names in a folder.

    Raises
    ------
    PermissionError
        It may not be listed; or not entered, so that nothing in it would seem to be there.
    """
    names = os.listdir(folder)
    try:
        os.stat(os.path.join(folder, os.curdir))
    except PermissionError as error:
        raise PermissionError(error.errno, error.strerror, folder) from None
    return names


def checkpoint_in(folder: str) -> str | None:
    """Return the file that stands for a folder which is one checkpoint, or None.

    That is its index of shards or its only ``.safetensors``; where there are several, the one named
    as the libraries name it, unless others make a series (``model-100.safetensors``).

    Raises
    ------
    CheckpointFormatError
        There are weights in one file and in shards under the same name.
    """
    names = sorted(name for name in names_in(folder) if not name.startswith("."))
    names = [name for name in names if name.endswith((WEIGHTS, INDEX, *_OTHER_KINDS))]
    # A link to nothing is told when it is opened, not passed over for what else is there.
    names = [name for name in names if not is_folder(os.path.join(folder, name))]
    indexes = [name for name in names if name.endswith(INDEX)]
    plain = [name for name in names if name.endswith(WEIGHTS) and not is_shard(name)]
    bases = [name.removesuffix(INDEX) for name in indexes]
    for base in (*_BASES, *(bases if len(bases) == 1 else ())):
        index, single = base + INDEX, base + WEIGHTS
        if index in indexes and single in plain:
            raise CheckpointFormatError(
                f"{folder} holds both {single} and {index}; name the one that is meant",
                path=folder,
            )
        if index in indexes:
            return os.path.join(folder, index)
        if single in plain:
            series = [n for n in plain if _ONE_OF_A_SERIES.fullmatch(n.removesuffix(WEIGHTS))]
            return None if series else os.path.join(folder, single)
    others = [name for name in names if name.endswith(_OTHER_KINDS)]
    if len(plain) == 1 and not indexes and not others:
        return os.path.join(folder, plain[0])
    return None


def why_none(folder: str) -> str:
    """Say what stands in a folder that is no checkpoint, and what to do; nothing if it is unknown.

    The folder is one that `checkpoint_in` found none in.
    """
    names = sorted(os.listdir(folder))
    parts = [name for name in names if os.path.isdir(os.path.join(folder, name))]
    if "zero_to_fp32.py" in names:
        script = os.path.join(folder, "zero_to_fp32.py")
        return (
            "it holds the pieces of DeepSpeed's processes; join them with "
            f"`python {script} {folder} OUTPUT --safe_serialization`"
        )
    for name in parts:
        if re.fullmatch(r"pytorch_model_fsdp_\d+", name):
            piece = os.path.join(folder, name)
            return (
                "it holds the pieces of FSDP's processes; join them with "
                f"`accelerate merge-weights {piece} OUTPUT`"
            )
    for name in names:
        if _PICKLE.fullmatch(name):
            return (
                f"it holds {name}, a PyTorch pickle, which this version of wavg does not read; "
                "load it with from_pretrained, and save_pretrained writes safetensors"
            )
    if any(map(is_shard, names)):
        return (
            "it holds shards and no index of them, as a save cut short leaves it; "
            "fetch or save it again, or remove it"
        )
    if any(_matches(name, _NEVER) and not _matches(name, _STATE) for name in names):
        return ""  # numbers, of another kind or several of them
    if any(_matches(name, ("config.json", *_STATE)) for name in names):
        return "it holds no weights, as a save cut short leaves it; remove it, or name the others"
    return "" if names else "it is empty"


def has_folder(main: str) -> bool:
    """Whether a file stands for the folder in which it is."""
    if main.endswith(INDEX):
        return True
    try:
        whole = checkpoint_in(os.path.dirname(os.path.abspath(main)))
    except CheckpointFormatError:  # shards stand beside it, and it is the one that was named
        return main.endswith(WEIGHTS)
    return whole is not None and os.path.basename(whole) == os.path.basename(main)


def unlike_an_output(folder: str) -> list[str]:
    """Return what is in a folder that no output has, and that is no checkpoint's weights either."""
    main = os.path.basename(checkpoint_in(folder) or "")
    return [
        name
        for name in sorted(os.listdir(folder))
        if not (name == main or is_carried(name) or (main.endswith(INDEX) and is_shard(name)))
    ]


def retyped(config: bytes, before: Iterable[str], after: str) -> bytes:
    """Return a ``config.json`` in which the model's dtype, one of those before, is another.

    Loaders convert what they load to the dtype that stands there. Every other byte stays.

    >>> retyped(b'{"dtype": "bfloat16", "hidden_size": 8}', ["bfloat16"], "float32")
    b'{"dtype": "float32", "hidden_size": 8}'
    """
    names = b"|".join(re.escape(name).encode() for name in before)
    pattern = rb'("(?:torch_)?dtype"\s*:\s*")(?:%s)(?=")' % names
    return re.sub(pattern, rb"\g<1>" + after.encode(), config)


def beside(main: str) -> list[str]:
    """Return the files that an output's folder has of the one in which `main` stands.

    A link counts as the regular file it leads to, if that lies in the folder itself or among the
    blobs of a Hugging Face cache: whose folder it is must not choose what else is copied.
    """
    folder = os.path.dirname(os.path.abspath(main))
    home = os.path.realpath(folder)
    stores = {home, os.path.join(os.path.dirname(os.path.dirname(home)), "blobs")}
    found = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        real = os.path.realpath(path)
        if is_carried(name) and os.path.isfile(real) and os.path.dirname(real) in stores:
            found.append(path)
    return found
