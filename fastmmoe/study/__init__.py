"""The quality study behind `fastmmoe analyze`: what reducing experts and tokens costs in right answers, and why.

The data's way: `questions` -> `prompts` -> `answers` -> `accuracy`, under the `methods` of a grid; beside it `routing`,
`magnitude` and `timing` look into the prefill, and `prediction` calculates its time elsewhere. `study` runs the parts,
`results` keeps them, `tables` and `plots` show.
"""
