"""Where each method's parity with an oracle is tested: config class -> module of `tests/model`."""

from fastmmoe.methods import FastMMoEConfig, FastVConfig, MoDESConfig, RandomConfig, SparseVLMConfig, UniformConfig

PARITY = {
    FastMMoEConfig: "test_parity_internvl",
    FastVConfig: "test_parity_baselines",
    SparseVLMConfig: "test_parity_baselines",
    MoDESConfig: "test_parity_families",
    UniformConfig: "test_parity_baselines",
    RandomConfig: "test_parity_baselines",
}
