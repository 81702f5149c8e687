"""Vision features that are added behind the first layers, as several families have them."""

import torch


class DeepStack:
    """Mixed in front of a reduced model of vLLM's that keeps such features in buffers until its forward."""

    def added_behind(self, num_tokens: int) -> dict[int, torch.Tensor]:
        deepstack = self._get_deepstack_input_embeds(num_tokens)
        return {} if deepstack is None else dict(enumerate(deepstack.tensors.values()))

    def clear_added(self, num_tokens: int) -> None:
        self._clear_deepstack_input_embeds(num_tokens)
