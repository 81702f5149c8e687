"""What a request of vLLM's says of its prompt, and which rows of a step are shortened."""

from collections.abc import Iterable, Sequence

from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sampling_params import SamplingParams

from fastmmoe.engines.vllm.plan import Prompt, Row, Rules, Step

VISION = ("image", "video")


def read_prompt(
    rules: Rules,
    length: int,
    features: Sequence[MultiModalFeatureSpec] | None,
    sampling: SamplingParams | None,
) -> Prompt:
    """The prompt of a request, as vLLM's scheduler and its workers know it: no device is read."""
    ranges = [
        (start, last + 1)
        for feature in features or ()
        if feature.modality in VISION
        for start, last in feature.mm_position.extract_embeds_range()
    ]
    return Prompt.of(rules, length, ranges, sampling is not None and sampling.prompt_logprobs is not None)


class Requests:
    """The requests of a model runner.

    Whether a request's prompt was shortened is the one thing that is not a function of the request: a prompt that did
    not come whole was not.
    """

    def __init__(self, rules: Rules):
        self.rules = rules
        self._prompts: dict[str, Prompt] = {}
        self._owners: dict[str, object] = {}
        self._short: set[str] = set()

    def add(
        self,
        name: str,
        length: int,
        features: Sequence[MultiModalFeatureSpec] | None,
        sampling: SamplingParams | None,
        owner: object = None,
    ) -> None:
        """Know a request, in place of an earlier one of that name; `owner` is what the runner keeps of it."""
        self.remove(name)
        self._owners[name] = owner
        self._prompts[name] = read_prompt(self.rules, length, features, sampling)

    def remove(self, name: str) -> None:
        self._prompts.pop(name, None)
        self._owners.pop(name, None)
        self._short.discard(name)

    def keep(self, names: Iterable[str]) -> None:
        """Forget all but these."""
        for name in self._prompts.keys() - set(names):
            self.remove(name)

    def knows(self, name: str, owner: object) -> bool:
        """Whether it is the same request: a name may be used again."""
        return self._owners.get(name) is owner

    def step(self, names: Sequence[str], computed: Sequence[int], new: Sequence[int]) -> Step | None:
        """The plan of a forward; None for one of requests that nobody sent: profiling, or capturing a graph."""
        if not names or any(name not in self._prompts for name in names):
            return None
        rows = []
        for name, done, tokens in zip(names, map(int, computed), map(int, new), strict=True):
            prompt = self._prompts[name]
            if done == 0:
                comes_whole = prompt.prunes and tokens >= prompt.length
                (self._short.add if comes_whole else self._short.discard)(name)
            rows.append(Row(prompt, done, tokens, name in self._short))
        return Step(len(self.rules.config.prune_layers), rows)
