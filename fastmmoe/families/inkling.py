"""Inkling, which is refused."""

from fastmmoe.families.family import Family

INKLING = Family(
    title="Inkling",
    parent_type="inkling_mm_model",
    text_type="inkling_text",
    obstacle="its gate weighs shared and routed experts together, so that fewer routed ones would change the shared "
    "ones too, and its short convolutions run across the tokens that pruning would take away",
)
