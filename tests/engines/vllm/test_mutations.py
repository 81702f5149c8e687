"""A mistake in any of the things that the plugin keeps makes the comparison with transformers fail."""

import pytest

from .mutations import MUTATIONS
from .prompts import CASES
from .reference import prompt_of
from .test_parity import ALONE, CHUNKS, CROWD, LONGEST, PREEMPTION, SETTINGS, STAGGERED, TOGETHER, check

OPTIONS = {
    "the_rows_last_token_asks": PREEMPTION,
    "pruned_blocks_in_the_prefix_cache": CHUNKS,
    "image_prompts_in_chunks": CHUNKS,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_is_noticed(checkpoint, engine, mutation):
    directory, reduction = checkpoint("qwen3_vl_moe"), SETTINGS["both"]
    options = OPTIONS.get(mutation, {})
    schedules = [ALONE, CROWD] if options is PREEMPTION else [ALONE, *TOGETHER, STAGGERED]
    result = engine(directory, schedules, reduction, mutation=mutation, **options)
    dense = {case for case in CASES if options is CHUNKS and prompt_of(directory, case)[0] > LONGEST}
    with pytest.raises(AssertionError, match="wrong"):
        check(result, directory, reduction, schedules, dense)
