"""What tells a model's weights from another's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers import PreTrainedModel

from fastmmoe.families import find_text_model
from fastmmoe.families.checkpoint import read_config

# of a large file, so many blocks of so many bytes stand for it
BLOCKS = 64
BLOCK = 1 << 16


def checkpoint_sha256(checkpoint: str) -> str:
    """A digest of a checkpoint without loading it: of its directory's files, or of a hub id's revision.

    Raises:
        OSError, ValueError: there is none.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        revision = getattr(read_config(checkpoint), "_commit_hash", None)
        return hashlib.sha256(f"{checkpoint} {revision}".encode()).hexdigest()
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """A digest of a file's size and content, of a large one's at even distances."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    places = (
        range(0, size, BLOCK) if size <= BLOCKS * BLOCK else (i * (size - BLOCK) // (BLOCKS - 1) for i in range(BLOCKS))
    )
    with path.open("rb") as file:
        for place in places:
            file.seek(place)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def gates_sha256(model: PreTrainedModel) -> str:
    """A digest of the gates of all MoE layers, in float32: it stands for all weights."""
    family, text, _ = find_text_model(model)
    digest = hashlib.sha256()
    for layer in text.layers:
        if family.is_moe(layer):
            weight = next(family.gate_of(layer).parameters())
            digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
