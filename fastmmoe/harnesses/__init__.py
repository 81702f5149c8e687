"""Evaluation harnesses: FastMMoE's models inside them, under any method, with what the prefills took.

`answers` is what they have in common: conversations in batches, answered by a model, and their costs. `settings` reads
a method from names and words, `runs` is what each harness is to who compares runs, and `comparison` makes their table.
Each harness has a room of its own.
"""
