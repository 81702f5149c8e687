"""What tells a checkpoint's files from another's: every file, and any change of a small one."""

import os

import pytest

from fastmmoe.families.fingerprint import BLOCK, BLOCKS, checkpoint_sha256, file_sha256


def test_every_file_of_a_checkpoint_counts(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    seen = [checkpoint_sha256(str(tmp_path))]
    for name, content in (
        ("config.json", b"[]"),
        ("model.safetensors", bytes(999) + b"1"),
        ("pytorch_model.bin", b""),
        ("preprocessor_config.json", b"1"),
    ):
        (tmp_path / name).write_bytes(content)
        seen.append(checkpoint_sha256(str(tmp_path)))
    assert len(set(seen)) == len(seen)
    os.utime(tmp_path / "config.json", (0, 0))
    assert checkpoint_sha256(str(tmp_path)) == seen[-1]
    with pytest.raises((OSError, ValueError), match="nowhere"):
        checkpoint_sha256(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("size", [0, 1, BLOCK, BLOCK * BLOCKS, BLOCK * BLOCKS + 1, 3 * BLOCK * BLOCKS])
def test_size_beginning_and_end_of_a_file_count(size, tmp_path):
    path = tmp_path / "a"
    content = bytearray(size)
    path.write_bytes(content)
    plain = file_sha256(path)
    for place in {0, size - 1} if size else ():
        content[place] = 1
        path.write_bytes(content)
        assert file_sha256(path) != plain
        content[place] = 0
    path.write_bytes(content + b"\0")
    assert file_sha256(path) != plain
