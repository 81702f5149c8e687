"""Each model as it is, and with each change that no test may notice: class MODEL_RUN."""

from unittest import TestCase

from .models import InternVL, Qwen3Moe, Qwen3VLMoe
from .runs import NothingPruned, NothingReduced, OurExperts


class Qwen3Moe_Stock(Qwen3Moe, TestCase):
    pass


class Qwen3Moe_OurExperts(OurExperts, Qwen3Moe, TestCase):
    pass


class InternVL_Stock(InternVL, TestCase):
    pass


class InternVL_OurExperts(OurExperts, InternVL, TestCase):
    pass


class InternVL_NothingReduced(NothingReduced, InternVL, TestCase):
    pass


class InternVL_NothingPruned(NothingPruned, InternVL, TestCase):
    pass


class Qwen3VLMoe_Stock(Qwen3VLMoe, TestCase):
    pass


class Qwen3VLMoe_OurExperts(OurExperts, Qwen3VLMoe, TestCase):
    pass


class Qwen3VLMoe_NothingReduced(NothingReduced, Qwen3VLMoe, TestCase):
    pass


class Qwen3VLMoe_NothingPruned(NothingPruned, Qwen3VLMoe, TestCase):
    pass
