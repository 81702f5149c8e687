"""Where each method's parity with an oracle is tested: config class -> module of `tests/model`; configs for tests."""

from fastmmoe.methods import FastMMoEConfig, FastVConfig, MoDESConfig, RandomConfig, SparseVLMConfig, UniformConfig

PARITY = {
    FastMMoEConfig: "test_parity_internvl",
    FastVConfig: "test_parity_baselines",
    SparseVLMConfig: "test_parity_baselines",
    MoDESConfig: "test_parity_modes",
    UniformConfig: "test_parity_baselines",
    RandomConfig: "test_parity_baselines",
}


def skipping(layers: int = 6, **others) -> MoDESConfig:
    """Skips about half of the experts of a tiny model with K = 4, by other importances in every layer."""
    values = dict(
        text_threshold=0.23,
        vision_threshold=0.25,
        text_importance=tuple(1.1 - 0.1 * (layer % 3) for layer in range(layers)),
        vision_importance=tuple(0.9 + 0.1 * (layer % 4) for layer in range(layers)),
    )
    return MoDESConfig(**(values | others))
