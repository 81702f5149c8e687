"""Prompts for models that several processes hold."""

import torch

from ..hostile.families import ONE, TWO, batch_of, prompt


def batch_of_rank(family: str, rank: int) -> dict[str, torch.Tensor]:
    """A padded batch with one image and with two; of the second process: text alone."""
    if rank == 0:
        return batch_of([prompt(family, ONE), prompt(family, TWO, seed=2)])
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [0, 0, 0, 12, 13, 14, 15]])
    mask = (ids != 0).long()
    text = {"input_ids": ids, "attention_mask": mask}
    return text | ({"mm_token_type_ids": torch.zeros_like(ids)} if family.startswith("qwen") else {})
